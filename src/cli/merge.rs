//! `merge`: puts what a child has into the image it was made of, and removes the child.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::disk::Reactor;
use vhdx_ublk::error::Result;
use vhdx_ublk::operations::merge::{LockedChain, Progress, Request};

use super::output;
use super::parent_options::ParentOptions;

/// Merge a differencing image into its parent, or into an image further down its chain, and remove it.
///
/// What the child and the layers between have is copied into that image, which then holds the child's disk.
/// The power may be cut at any moment: the child reads as before until it is removed, and a merge that was
/// cut short is repeated by the same command.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Merge {
    /// The differencing image; it is removed in the end
    child: PathBuf,
    /// The image that takes it over, with all layers between [default: the child's parent]
    #[arg(long, value_name = "ANCESTOR")]
    into: Option<PathBuf>,
    /// Merge even if other images have the ancestor as their parent: they can no longer be opened
    #[arg(long)]
    force: bool,
    /// Merge even if the child's disk is smaller than the ancestor's: what lies behind its end is lost
    #[arg(long)]
    shrink: bool,
    #[command(flatten)]
    parents: ParentOptions,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk merge child.vhdx                      into its parent
  vhdx-ublk merge newest.avhdx --into disk.vhdx   and every checkpoint between

Prints the files that it removes, when they are gone. Images that have one of them as their
parent are searched for in the folders of the chain and nowhere else; the merge is refused while
there are any, or while an image there cannot be read.
A child may name images anywhere: those in other folders than its own are written only if they are
named by --into, and removed only if they are named by --parent.
The ancestor takes the child's size: one that is smaller needs room in its block allocation
table, one that is larger loses what lies behind (--shrink).
Exit status: 0 merged, 1 failure (the child reads as before), 2 wrong usage.";

impl Merge {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let Self { child, into, force, shrink, parents } = self;
        let request = Request { child, into, search: parents.search(), force, shrink };
        let reactor = Reactor::new()?;
        let chain = LockedChain::open(&request, &reactor, &Claims)?;
        tracing::info!("{} is merged into {}", chain.child().display(), chain.target().display());
        let shown = Shown { bar: progress_bar(chain.disk_bytes()), copied: Cell::new(0) };
        let merged = chain.merge(&reactor, &shown);
        shown.bar.finish_and_clear();
        merged
    }
}

/// Shown where standard error is a terminal.
fn progress_bar(bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    let template = "{bar:40} {percent:>3}%  {binary_bytes} of {binary_total_bytes}  {eta} left";
    bar.with_style(ProgressStyle::with_template(template).expect("a good template"))
}

/// What the user sees of the merge.
struct Shown {
    bar: ProgressBar,
    /// Bytes shown as copied.
    copied: Cell<u64>,
}

impl Progress for Shown {
    fn copied(&self, bytes: u64) {
        self.bar.inc(bytes - self.copied.replace(bytes));
    }

    fn removed(&self, path: &Path) -> Result<()> {
        self.bar.suspend(|| output::print_line(&path.display().to_string()))
    }
}
