//! `merge`: merges a child into its parent and removes the child.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::chain::{self, Search};
use vhdx_ublk::device::claims::{self, Claims};
use vhdx_ublk::device::order::Merged;
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::device::stop::Target;
use vhdx_ublk::disk::{Reactor, Remover};
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::operations::Watch;
use vhdx_ublk::operations::inspect::inspect;
use vhdx_ublk::operations::merge::{LockedChain, Progress, Request};

use super::parent_options::ParentOptions;
use super::progress::{ProgressOptions, Shown};
use super::served_layer::ServedLayer;
use super::{output, served};

/// Merge a differencing image into its parent, or into an image further down its chain, and remove it.
///
/// Copies the content of the child, and of the layers between, into that image. After a power cut the child
/// still reads as before; run the command again to finish the merge. A layer below the image of a device is
/// merged while the device is served.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Merge {
    /// The differencing image, which is removed at the end; with --keep, the image or the device whose chain
    /// it is: its number, its name, or /dev/ublkbN
    child: PathBuf,
    /// The image to merge into, with all layers between [default: the parent of the child]
    #[arg(long, value_name = "ANCESTOR")]
    into: Option<PathBuf>,
    /// Merge the oldest layers of the chain into its first image, one after another, until N layers are left
    /// above that, the image itself included
    #[arg(long, value_name = "N", conflicts_with_all = ["into", "children", "copy", "force", "shrink"])]
    keep: Option<usize>,
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
    /// As JSON: one object, errors too; with --keep an array of such objects
    #[arg(long)]
    pub json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk merge child.vhdx                      into its parent
  vhdx-ublk merge newest.avhdx --into disk.vhdx   and every checkpoint between
  vhdx-ublk merge monday.vhdx                     a layer in the middle: its children stay
  vhdx-ublk merge child.vhdx --copy own.vhdx      the parent has other children, and stays
  vhdx-ublk merge --keep 3 /dev/ublkb0            at most three layers above the first image

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
While a device serves the chain, its daemon merges, and requests are served as before; they wait
for a moment, twice. A layer goes into its parent, and neither may have other children. The image
that is served is not merged itself: take a snapshot first, then merge the frozen image. Ctrl-C
ends the merge early. Snapshots and `upgrade` have to wait for the end of it, `del` ends it. If
the daemon is killed meanwhile, `recover` serves the device as before; then merge it again.
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
        if let Some(keep) = self.keep {
            return self.merge_oldest(keep);
        }
        match ServedLayer::find(self.child.as_os_str())? {
            Some(served) => self.merge_served(&served),
            None => self.merge_at_rest(),
        }
    }

    fn merge_at_rest(self) -> Result<()> {
        let Self { child, into, keep: _, children, copy, force, shrink, parents, progress, json } = self;
        let mut request =
            Request { child, into, copied: None, children, search: parents.search(), force, shrink };
        let removed = json.then(RefCell::default);
        let (reactor, merging) = (Reactor::new()?, Merging { shown: progress.start()?, removed });
        if let Some(copy) = copy {
            request.copy_target(&copy, &reactor, &Claims, &merging)?;
        }
        let answer = merge_locked(&request, &reactor, &merging)?;
        if json { output::print_json(&answer) } else { Ok(()) }
    }

    fn merge_served(&self, served: &ServedLayer) -> Result<()> {
        let is_plain = self.into.is_none()
            && self.children.is_empty()
            && self.copy.is_none()
            && !(self.force || self.shrink)
            && self.parents.search().parents.is_empty();
        if !is_plain {
            let message = "while a device serves the chain, a layer is merged into its parent, and no option \
                           changes that";
            return Err(Error::new(Kind::Usage, message)
                .file(&self.child)
                .remedy("omit the options, or remove the device first (`vhdx-ublk del`)"));
        }
        let answer = self.merge_layer(served)?;
        if self.json { output::print_json(&answer) } else { answer.print() }
    }

    fn merge_layer(&self, layer: &ServedLayer) -> Result<Answer> {
        let merging = Merging { shown: self.progress.start()?, removed: None };
        layer.merge(&merging).map(|merged| Answer::of(&merged))
    }

    /// One layer after another; what is merged stays merged if the next one fails.
    fn merge_oldest(&self, keep: usize) -> Result<()> {
        let mut answers = Vec::new();
        while let Some(answer) = self.merge_next(keep)? {
            let is_leaf = answer.child == WrittenPath::of(self.leaf()?);
            if self.json {
                answers.push(answer);
            } else {
                answer.print()?;
            }
            if is_leaf {
                break;
            }
        }
        if self.json { output::print_json(&answers) } else { Ok(()) }
    }

    /// The image that the user has named, as it is at rest.
    fn leaf(&self) -> Result<PathBuf> {
        let target = Target::parse(self.child.as_os_str())?;
        Ok(target.image().unwrap_or(&self.child).to_owned())
    }

    /// Merges the oldest layer above the first image, unless only `keep` are left there.
    fn merge_next(&self, keep: usize) -> Result<Option<Answer>> {
        let target = Target::parse(self.child.as_os_str())?;
        let is_path = target.image().is_some_and(Path::exists);
        if !is_path || nix::unistd::geteuid().is_root() {
            match claims::find(&target) {
                Ok(listed) if listed.entry.daemon.is_alive() => {
                    let oldest = ServedLayer::oldest(listed.entry, keep)?;
                    return oldest.map(|layer| self.merge_layer(&layer)).transpose();
                }
                Err(error) if !is_path => return Err(served::missing(&self.child, error)),
                Ok(_) | Err(_) => {}
            }
        }
        let search = self.parents.search();
        let leaf = inspect(&self.leaf()?)?;
        let parents = chain::open_parents(&leaf, &search, inspect)?;
        if parents.len() <= keep {
            return Ok(None);
        }
        let mut layers = std::iter::once(&leaf).chain(&parents).map(|image| image.path.clone());
        let above = parents.len().checked_sub(2).and_then(|above| layers.nth(above));
        let child = layers.next().expect("it has a parent");
        let (into, children) = (layers.next(), above.into_iter().collect());
        let search = Search { parents: Vec::new(), ..search };
        let request = Request { child, into, copied: None, children, search, force: false, shrink: false };
        let merging = Merging { shown: self.progress.start()?, removed: Some(RefCell::default()) };
        merge_locked(&request, &Reactor::new()?, &merging).map(Some)
    }
}

fn merge_locked(request: &Request, reactor: &Reactor, merging: &Merging) -> Result<Answer> {
    let chain = LockedChain::open(request, reactor, &Claims)?;
    tracing::info!("merging {} into {}", chain.child().display(), chain.target().display());
    let (child, target) = (WrittenPath::of(chain.child()), WrittenPath::of(chain.target()));
    chain.merge(reactor, merging)?;
    let removed = merging.removed.as_ref().map(RefCell::take).unwrap_or_default();
    Ok(Answer { child, target, removed })
}

impl Answer {
    fn of(merged: &Merged) -> Self {
        let layer = WrittenPath::of(&merged.layer);
        Self { child: layer.clone(), target: WrittenPath::of(&merged.target), removed: vec![layer] }
    }

    fn print(&self) -> Result<()> {
        self.removed.iter().try_for_each(|path| output::print_line(path.text()))
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
