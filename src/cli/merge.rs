//! `merge`: merges a child into its parent and removes the child.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::disk::{Reactor, Remover};
use vhdx_ublk::error::Result;
use vhdx_ublk::operations::Watch;
use vhdx_ublk::operations::merge::{LockedChain, Progress, Request};

use super::output;
use super::parent_options::ParentOptions;
use super::progress::{ProgressOptions, Shown};

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
    /// A child of the image in another folder. It becomes a child of the ancestor, as those do that are
    /// found. Can be repeated
    #[arg(long = "child", value_name = "FILE")]
    children: Vec<PathBuf>,
    /// Leave the ancestor as it is, for its other children: copy it to FILE, and merge into that
    #[arg(long, value_name = "FILE", conflicts_with = "force")]
    copy: Option<PathBuf>,
    /// Merge even if the ancestor has other children, which become unreadable
    #[arg(short, long)]
    force: bool,
    /// Merge even if the disk of the child is smaller than that of the ancestor: the data beyond its end is
    /// lost
    #[arg(long)]
    shrink: bool,
    #[command(flatten)]
    parents: ParentOptions,
    #[command(flatten)]
    progress: ProgressOptions,
    /// As JSON: one object, errors too
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk merge child.vhdx                      into its parent
  vhdx-ublk merge newest.avhdx --into disk.vhdx   and every checkpoint between
  vhdx-ublk merge monday.vhdx                     a layer in the middle: its children stay
  vhdx-ublk merge child.vhdx --copy own.vhdx      the parent has other children, and stays

Prints each file after removing it. The children of the merged image become children of the
ancestor: those in the folders of the chain are found, others must be named with --child. The
merge is refused if another image in these folders is a child of an image that would be changed or
removed, or if the host does not let it be read. A damaged image there is only warned of: look at
it first, for it may be such a child. With --parent, an image that was made of one of these and no
longer finds it counts as a child: relink it first, or use --force.
An image in another folder than the child is written only if --into names it, and removed only if
--parent names it.
The ancestor gets the size of the child: a fixed one needs space for all new blocks, a larger one
loses the data beyond the end (--shrink).
With --copy, only FILE and the merged images are written. FILE shares its blocks with the ancestor
where the host can do that, and belongs to the child's owner. A command that was interrupted is
repeated as it was: --parent still names the ancestor.
JSON: child, target (the image that has the content now), removed (an array of paths).
Exit status: 0 merged, 1 failure (the child reads as before), 2 wrong usage.";

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Answer {
    /// The image that was merged.
    child: WrittenPath,
    /// The image that has its content now.
    target: WrittenPath,
    /// The files that were removed.
    removed: Vec<WrittenPath>,
}

impl Merge {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let Self { child, into, children, copy, force, shrink, parents, progress, json } = self;
        let mut request =
            Request { child, into, copied: None, children, search: parents.search(), force, shrink };
        let removed = json.then(RefCell::default);
        let (reactor, merging) = (Reactor::new()?, Merging { shown: progress.start()?, removed });
        if let Some(copy) = copy {
            request.copy_target(&copy, &reactor, &Claims, &merging)?;
        }
        let chain = LockedChain::open(&request, &reactor, &Claims)?;
        tracing::info!("merging {} into {}", chain.child().display(), chain.target().display());
        let (child, target) = (WrittenPath::of(chain.child()), WrittenPath::of(chain.target()));
        chain.merge(&reactor, &merging)?;
        match merging.removed {
            Some(removed) => output::print_json(&Answer { child, target, removed: removed.into_inner() }),
            None => Ok(()),
        }
    }
}

/// What the user sees of the merge.
struct Merging {
    shown: Shown,
    /// What was removed, if it is shown at the end.
    removed: Option<RefCell<Vec<WrittenPath>>>,
}

impl Watch for Merging {
    fn progress(&self, done: u64, total: u64) {
        self.shown.progress(done, total);
    }

    fn stop_requested(&self) -> bool {
        self.shown.stop_requested()
    }

    fn unfinished(&self, remover: Remover) {
        self.shown.unfinished(remover);
    }
}

impl Progress for Merging {
    fn removed(&self, path: &Path) -> Result<()> {
        match &self.removed {
            Some(removed) => removed.borrow_mut().push(WrittenPath::of(path)),
            None => self.shown.suspend(|| output::print_line(&path.display().to_string()))?,
        }
        Ok(())
    }
}
