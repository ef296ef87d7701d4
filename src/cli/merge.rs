//! `merge`: merges a child into its parent and removes the child.

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
/// Copies the content of the child, and of the layers between, into that image. After a power cut the child
/// still reads as before; run the command again to finish the merge.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Merge {
    /// The differencing image, which is removed at the end
    child: PathBuf,
    /// The image to merge into, with all layers between [default: the parent of the child]
    #[arg(long, value_name = "ANCESTOR")]
    into: Option<PathBuf>,
    /// Merge even if the ancestor has other children, which become unreadable
    #[arg(long)]
    force: bool,
    /// Merge even if the disk of the child is smaller than that of the ancestor: the data beyond its end is
    /// lost
    #[arg(long)]
    shrink: bool,
    #[command(flatten)]
    parents: ParentOptions,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk merge child.vhdx                      into its parent
  vhdx-ublk merge newest.avhdx --into disk.vhdx   and every checkpoint between

Prints each file after removing it. The merge is refused if an image in the folders of the chain
is a child of an image that would be changed or removed, or cannot be read; children in other
folders are not found.
An image in another folder than the child is written only if --into names it, and removed only if
--parent names it.
The ancestor gets the size of the child: a smaller ancestor needs room in its block allocation
table, a larger one loses the data beyond the end (--shrink).
Exit status: 0 merged, 1 failure (the child reads as before), 2 wrong usage.";

impl Merge {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let Self { child, into, force, shrink, parents } = self;
        let request = Request { child, into, search: parents.search(), force, shrink };
        let reactor = Reactor::new()?;
        let chain = LockedChain::open(&request, &reactor, &Claims)?;
        tracing::info!("merging {} into {}", chain.child().display(), chain.target().display());
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
