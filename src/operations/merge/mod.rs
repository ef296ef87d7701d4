//! Merging a child into an image further down its chain.
//!
//! The chain is found first, without changing anything, then locked: all that the merge writes and removes
//! for writing, the rest for reading. What is written and removed must be what was found, whatever has
//! happened to the paths meanwhile.

mod layers;
mod live;
mod neighbours;
mod stand_in;

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use uuid::Uuid;

use super::inspect::{Inspected, inspect};
use super::{Devices, Watch, locked};
use crate::chain::{self, Layer, Member, Search};
use crate::disk::{Access, HostFile, ImageFile, Place, Reactor, UringDisk, folder_of};
use crate::engine::Outcome;
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::printable::{both_sizes, shell};

pub use layers::{Files, Guids, Link, Merge};
pub use live::{Child, LiveMerge, Served};
pub use neighbours::refuse_relatives_of_served;

/// What the user wants to be merged.
pub struct Request {
    /// The image that is merged, and removed in the end.
    pub child: PathBuf,
    /// The image that it is merged into, with all layers between; its parent by default.
    pub into: Option<PathBuf>,
    /// The file of the copy that the target has become, if it is a copy.
    pub copied: Option<HostFile>,
    /// Its children in other folders than the chain's. They become children of what it is merged into, as all
    /// its children do.
    pub children: Vec<PathBuf>,
    /// Where its parents are.
    pub search: Search,
    /// Whether the target's other children may be lost.
    pub force: bool,
    /// Whether the target's disk may become smaller.
    pub shrink: bool,
}

/// What becomes of the target's other children.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Beside {
    /// They must not be there.
    Refuse,
    /// They may be lost.
    Lose,
    /// They keep their parent: it is only read.
    Keep,
}

/// Watches a merge.
pub trait Progress: Watch {
    /// The layer at `path` is removed.
    ///
    /// # Errors
    ///
    /// Any, which ends the merge.
    fn removed(&self, path: &Path) -> Result<()>;
}

/// A chain that is ready to be merged, all its images locked.
pub struct LockedChain {
    /// What is merged, the child first.
    layers: Vec<Member>,
    /// Where the layers are, in the same order.
    places: Vec<Place>,
    target: Member,
    /// The target's parents.
    below: Vec<Member>,
    /// The children of the child that is merged.
    children: Vec<Member>,
}

/// Which file is at which place. The owner of a folder can put another file there, or a link that leads to
/// one, at any moment: what is written and removed must be what was examined.
struct Found {
    path: PathBuf,
    file: HostFile,
}

impl From<&Inspected> for Found {
    fn from(image: &Inspected) -> Self {
        Self { path: image.path.clone(), file: image.file }
    }
}

impl From<&Member> for Found {
    fn from(image: &Member) -> Self {
        Self { path: image.path().to_owned(), file: image.file.identity() }
    }
}

impl Found {
    /// Fails unless `opened` is this file.
    fn require(&self, opened: &ImageFile) -> Result<()> {
        if self.file == opened.identity() {
            return Ok(());
        }
        let error =
            Error::new(Kind::InUse, "the file was replaced while it was being opened").file(&self.path);
        Err(error.remedy("find out what changes the folder, and merge again; nothing has been changed"))
    }
}

impl Request {
    /// The child and its parents, and which of them is the target.
    fn find(&self) -> Result<(Vec<Found>, usize)> {
        let leaf = inspect(&self.child)?;
        let named = |into: &PathBuf| HostFile::at(into).doing("finding the image to merge into").file(into);
        let into = self.copied.map(Ok).or_else(|| self.into.as_ref().map(named)).transpose()?;
        let parents = chain::open_parents(&leaf, &self.search, inspect)?;
        let found: Vec<Found> = std::iter::once(&leaf).chain(&parents).map(Found::from).collect();
        if parents.is_empty() {
            let message = "it is not a differencing image, and has no parent to merge into";
            let remedy = format!("`vhdx-ublk info {}` shows its type", shell(&leaf.path));
            let error = Error::new(Kind::Unsupported, message).file(&leaf.path).in_structure("metadata");
            return Err(error.remedy(remedy));
        }
        let is_target = |parent: &Found| into.is_none_or(|into| into == parent.file);
        let Some(target) = found.iter().skip(1).position(is_target) else {
            let into = self.into.as_deref().unwrap_or(Path::new("")).display();
            let message = format!("{into} is not one of its parents");
            let remedy = format!("vhdx-ublk info --chain {}", shell(&leaf.path));
            return Err(Error::new(Kind::Usage, message).file(&leaf.path).remedy(remedy));
        };
        let target = target + 1;
        self.refuse_unnamed(&found[..=target])?;
        Ok((found, target))
    }

    /// An image may name a parent anywhere. What is written and removed outside of its own folder is what the
    /// user has named, and nothing else.
    fn refuse_unnamed(&self, changed: &[Found]) -> Result<()> {
        let leaf = &changed[0].path;
        let is_named = |image: &Found| {
            let mut named = self.into.iter().chain(&self.search.parents);
            folder_of(&image.path) == folder_of(leaf)
                || named.any(|named| HostFile::at(named).is_ok_and(|named| named == image.file))
        };
        let Some(number) = changed.iter().position(|image| !is_named(image)) else { return Ok(()) };
        let (target, path) = (number + 1 == changed.len(), &changed[number].path);
        let change = if target { "write to" } else { "remove" };
        let option = if target { "--into" } else { "--parent" };
        let message = format!(
            "the merge would {change} {}, which is in another folder and was not named",
            path.display()
        );
        Err(Error::new(Kind::Usage, message)
            .file(leaf)
            .remedy(format!("if that is intended, name it: {option} {}", shell(path))))
    }
}

impl LockedChain {
    /// Finds and locks the chain of `request`, and refuses what must not or cannot be merged. Nothing is
    /// written.
    ///
    /// # Errors
    ///
    /// Those of finding, locking and reading the images; [`Kind::Usage`] if the request does not fit the
    /// chain; [`Kind::InUse`] if another image would lose its parent; [`Kind::Unsupported`] if the target
    /// cannot take the disk's size.
    pub fn open(request: &Request, reactor: &Reactor, devices: &dyn Devices) -> Result<Self> {
        let beside = if request.force { Beside::Lose } else { Beside::Refuse };
        Self::lock(request, beside, reactor, devices)
    }

    /// As [`Self::open`], but that the target is locked for reading if others keep it.
    fn lock(request: &Request, beside: Beside, reactor: &Reactor, devices: &dyn Devices) -> Result<Self> {
        let (found, target) = request.find()?;
        let written = if beside == Beside::Keep { target } else { target + 1 };
        let opened = Cell::new(0);
        let open = |path: &Path| {
            let number = opened.replace(opened.get() + 1);
            let access = if number < written { Access::ReadWrite } else { Access::ReadOnly };
            let layer = match number {
                0 => locked::open_named(reactor, path, devices)?,
                _ => locked::open(reactor, path, access, devices)?,
            };
            found[number].require(&layer.file)?;
            Ok(layer)
        };
        let leaf = open(&request.child)?;
        let parents = found[1..].iter().map(|parent| parent.path.clone()).collect();
        let search = Search { parents, ..Search::default() };
        let mut layers = chain::open_parents(&leaf, &search, open)?;
        layers.insert(0, leaf);
        let below = layers.split_off(target + 1);
        // They may have been moved since they were found.
        request.refuse_unnamed(&layers.iter().map(Found::from).collect::<Vec<_>>())?;
        let target = layers.pop().expect("it was found there");
        // Their folders are held from now on: the copy takes long, and paths may lead elsewhere when it is
        // done.
        let places = layers.iter().map(|layer| Place::of_file(&layer.file)).collect::<Result<_>>()?;
        let mut chain = Self { layers, places, target, below, children: Vec::new() };
        chain.check(request.shrink)?;
        for named in &request.children {
            chain.lock_child(named, &request.search, reactor, devices)?;
        }
        for found in neighbours::refuse_relatives(&chain, request, beside)? {
            chain.lock_child(&found, &request.search, reactor, devices)?;
        }
        Ok(chain)
    }

    /// Locks the image at `path`, a child of the image that is merged, which it will no longer need.
    fn lock_child(
        &mut self,
        path: &Path,
        search: &Search,
        reactor: &Reactor,
        devices: &dyn Devices,
    ) -> Result<()> {
        let child = locked::open_named(reactor, path, devices)?;
        child.image.check_writable().file(child.path())?;
        if !self.is_child(&child, search) {
            let message = format!("it is not a child of {}", self.child().display());
            let remedy = format!("vhdx-ublk info --chain {}", shell(child.path()));
            return Err(Error::new(Kind::Usage, message).file(child.path()).remedy(remedy));
        }
        self.children.push(child);
        Ok(())
    }

    /// Whether `other`, which looks for its parent as `search` says, is a child of the image that is merged,
    /// or was: a merge that was cut may have made it one of the target's.
    fn is_child(&self, other: &impl chain::Relative, search: &Search) -> bool {
        neighbours::is_child_of_merged((&self.layers[0], &self.target), other, search)
    }

    /// The file of the child.
    pub fn child(&self) -> &Path {
        self.layers[0].path()
    }

    /// The file of the target.
    pub fn target(&self) -> &Path {
        self.target.path()
    }

    /// The size of the child's disk, bytes.
    pub fn disk_bytes(&self) -> u64 {
        self.layers[0].image.metadata.virtual_size
    }

    /// Refuses what the images themselves forbid, and what is lost unless the disk may `shrink`.
    fn check(&self, shrink: bool) -> Result<()> {
        for layer in &self.layers {
            layer.image.check_writable().file(layer.path())?;
        }
        self.target.image.check_writable().file(self.target.path())?;
        let (wanted, found) = (self.disk_bytes(), self.target.image.metadata.virtual_size);
        if shrink || wanted >= found {
            return Ok(());
        }
        let (found, wanted) = (both_sizes(found), both_sizes(wanted));
        let message = format!("its disk would shrink from {found} to {wanted} bytes, the size of the child");
        let remedy = "merge with --shrink if the data beyond the end of the child's disk may be lost";
        Err(Error::new(Kind::Unsupported, message).file(self.target.path()).remedy(remedy))
    }

    /// Merges, and removes the layers.
    ///
    /// # Errors
    ///
    /// Those of [`Merge::run`]: the child reads as before, and can be merged again.
    pub fn merge(self, reactor: &Reactor, progress: &impl Progress) -> Result<()> {
        let disk_bytes = self.disk_bytes();
        let paths = |layers: &[Member]| layers.iter().map(|layer| layer.path().to_owned()).collect();
        let target = self.target.path().to_owned();
        let merge = Merge {
            layers: paths(&self.layers),
            target: target.clone(),
            below: paths(&self.below),
            children: paths(&self.children),
        };
        let members = self.layers.into_iter().chain([self.target]).chain(self.below).chain(self.children);
        let files = members.map(|member| member.file).collect();
        let files = LockedFiles { reactor, files, places: self.places, progress, disk_bytes };
        let merged = reactor.block_on(merge.run(&files, reactor.executor().clone(), Uuid::new_v4));
        let is_stopped = |error: &Error| error.os_error() == Some(Errno::ECANCELED as i32);
        merged.map_err(|error| match error {
            error if progress.stop_requested() && is_stopped(&error) => stopped_by_user(&target),
            error => with_remedy(error),
        })
    }
}

fn stopped_by_user(target: &Path) -> Error {
    let error = Error::new(Kind::Stopped, "the merge was stopped").file(target);
    error.remedy("the child reads as before; the same command finishes the merge")
}

/// A merge that failed is done again.
fn with_remedy(error: Error) -> Error {
    match error.kind() {
        Kind::NoSpace => error.remedy(
            "free space on the file system, or raise the file size limit (`ulimit -f`; FAT ends at 4 GiB), \
                 and merge again; nothing is lost",
        ),
        Kind::Io => error.remedy("the child reads as before: find the cause (dmesg), and merge again"),
        _ => error,
    }
}

/// The files of a chain that is merged.
struct LockedFiles<'a, P> {
    reactor: &'a Reactor,
    files: Vec<Arc<ImageFile>>,
    /// Of those that are removed: the first of the files, in the same order.
    places: Vec<Place>,
    progress: &'a P,
    /// The size of the child's disk.
    disk_bytes: u64,
}

impl<P: Progress> Files for LockedFiles<'_, P> {
    type Disk = UringDisk;

    fn disk(&self, path: &Path) -> UringDisk {
        let file = self.files.iter().find(|file| file.path() == path).expect("a file of the chain");
        self.reactor.disk(file.clone())
    }

    async fn remove(&self, path: &Path) -> Result<()> {
        let mut placed = self.files.iter().zip(&self.places);
        let (file, place) = placed.find(|(file, _)| file.path() == path).expect("a layer is removed");
        place.remove(file)?;
        self.progress.removed(path)
    }

    fn copied(&self, bytes: u64) -> Outcome {
        self.progress.progress(bytes, self.disk_bytes);
        if self.progress.stop_requested() { Err(Errno::ECANCELED) } else { Ok(()) }
    }
}
