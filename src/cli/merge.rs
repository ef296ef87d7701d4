//! `merge`: puts what a child has into the image it was made of, and removes the child.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressStyle};
use uuid::Uuid;

use vhdx_ublk::chain::{self, FileIdentity, Known, Layer, Search};
use vhdx_ublk::disk::{Access, ImageFile, Place, Reactor, UringDisk, folder_of};
use vhdx_ublk::error::{Doing, Error, Kind, Locate, Result};
use vhdx_ublk::format::locator::ParentLocator;
use vhdx_ublk::format::metadata::Metadata;
use vhdx_ublk::operations::merge::{self, Files};
use vhdx_ublk::printable::shell;

use super::look::{self, Seen};
use super::parents::ParentOptions;
use super::rest::AtRest;
use super::{output, size};

/// Merge a differencing image into its parent, or into an image further down its chain, and remove it.
///
/// What the child has, and the layers between, is copied into that image, which holds the child's disk then. The
/// power may be cut at any moment: the child reads as before until it is removed, and a merge that was cut short is
/// done again.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Merge {
    /// The differencing image; it is removed in the end
    child: PathBuf,
    /// The image that takes it over, with all layers between [default: the child's parent]
    #[arg(long, value_name = "ANCESTOR")]
    into: Option<PathBuf>,
    /// Merge even if other images have the ancestor as their parent: they do not open any more
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
parent are looked for in the folders of the chain, and the merge is refused while there are any,
or while an image there cannot be read; those in other folders are not found.
A merge that was cut short is done again by the same command.
A child may name images anywhere: those in other folders than its own are written only if they are
named by --into, and removed only if they are named by --parent.
The ancestor takes the child's size: one that is smaller needs room in its block allocation
table, one that is larger loses what lies behind (--shrink).
Exit status: 0 merged, 1 failure (the child reads as before), 2 wrong usage.";

impl Merge {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let reactor = Reactor::new()?;
        let chain = self.open_chain(&reactor)?;
        chain.check(self.shrink)?;
        chain.refuse_relatives(self.force)?;
        tracing::info!(
            "{} is merged into {}",
            chain.layers[0].path().display(),
            chain.target.path().display()
        );
        let merge = chain.merge();
        let bar = progress(chain.layers[0].image.metadata.virtual_size);
        let (files, places) = chain.into_files();
        let files = Locked { reactor: &reactor, files, places, bar, shown: Cell::new(0) };
        let merged = reactor.block_on(merge.run(&files, reactor.executor().clone(), Uuid::new_v4));
        files.bar.finish_and_clear();
        merged.map_err(explain)
    }

    /// Opens all that the merge writes and removes for writing, the rest for reading.
    fn open_chain(&self, reactor: &Reactor) -> Result<Chain> {
        let (found, target) = self.find_chain()?;
        let opened = Cell::new(0);
        let open = |path: &Path| {
            let number = opened.replace(opened.get() + 1);
            let access = if number <= target { Access::ReadWrite } else { Access::ReadOnly };
            let layer = AtRest::open(reactor, path, access)?;
            found[number].require(&layer.file)?;
            Ok(layer)
        };
        let leaf = open(&self.child)?;
        let parents = found[1..].iter().map(|parent| parent.path.clone()).collect();
        let search = Search { parents, ..Search::default() };
        let mut layers = chain::open_parents(&leaf, &search, open)?;
        layers.insert(0, leaf);
        let below = layers.split_off(target + 1);
        // They may have been moved since they were found.
        self.refuse_unnamed(&layers.iter().map(Found::from).collect::<Vec<_>>())?;
        let target = layers.pop().expect("it was found there");
        // Their folders are held from now on: the copy takes long, and paths may lead elsewhere when it is done.
        let places = layers.iter().map(|layer| Place::of_file(&layer.file)).collect::<Result<_>>()?;
        Ok(Chain { layers, places, target, below })
    }

    /// The child and its parents, and which of them is the target.
    fn find_chain(&self) -> Result<(Vec<Found>, usize)> {
        let leaf = look::look(&self.child)?;
        let into =
            self.into.as_ref().map(|into| chain::identity(into).doing("finding the ancestor").file(into));
        let into = into.transpose()?;
        let parents = chain::open_parents(&leaf, &self.parents.search(), look::look)?;
        let found: Vec<Found> = std::iter::once(&leaf).chain(&parents).map(Found::from).collect();
        if parents.is_empty() {
            let message = "it is no differencing image: there is nothing to merge it into";
            let remedy = format!("`vhdx-ublk info {}` tells what it is", shell(&leaf.path));
            return Err(Error::new(Kind::Unsupported, message)
                .file(&leaf.path)
                .in_structure("metadata")
                .remedy(remedy));
        }
        let is_target = |parent: &Found| into.is_none_or(|into| into == parent.file);
        let Some(target) = found.iter().skip(1).position(is_target) else {
            let into = self.into.as_deref().unwrap_or(Path::new("")).display();
            let message = format!("{into} is not among its parents");
            let remedy = format!("vhdx-ublk info --chain {}", shell(&leaf.path));
            return Err(Error::new(Kind::Usage, message).file(&leaf.path).remedy(remedy));
        };
        let target = target + 1;
        self.refuse_unnamed(&found[..=target])?;
        Ok((found, target))
    }

    /// An image may name a parent anywhere. What is written and removed outside of its own folder is what the user has
    /// named, and nothing else.
    fn refuse_unnamed(&self, changed: &[Found]) -> Result<()> {
        let leaf = &changed[0].path;
        let is_named = |image: &Found| {
            let mut named = self.into.iter().chain(self.parents.named());
            folder_of(&image.path) == folder_of(leaf)
                || named.any(|named| chain::identity(named).is_ok_and(|named| named == image.file))
        };
        let Some(number) = changed.iter().position(|image| !is_named(image)) else { return Ok(()) };
        let (target, path) = (number + 1 == changed.len(), &changed[number].path);
        let change = if target { "write to" } else { "remove" };
        let option = if target { "--into" } else { "--parent" };
        let message =
            format!("the merge would {change} {}, in another folder, which was not named", path.display());
        Err(Error::new(Kind::Usage, message)
            .file(leaf)
            .remedy(format!("name it, if it is yours: {option} {}", shell(path))))
    }
}

/// Which file is at which place. The owner of a folder can put another file there, or a link that leads to one, at any
/// moment: what is written and removed must be what was examined.
struct Found {
    path: PathBuf,
    file: FileIdentity,
}

impl From<&Seen> for Found {
    fn from(seen: &Seen) -> Self {
        Self { path: seen.path.clone(), file: seen.file }
    }
}

impl From<&AtRest> for Found {
    fn from(layer: &AtRest) -> Self {
        Self { path: layer.path().to_owned(), file: (layer.file.device(), layer.file.inode()) }
    }
}

impl Found {
    /// Fails unless `opened` is this file.
    fn require(&self, opened: &ImageFile) -> Result<()> {
        if self.file == (opened.device(), opened.inode()) {
            return Ok(());
        }
        let error = Error::new(Kind::InUse, "it was replaced while it was being opened").file(&self.path);
        Err(error.remedy("find out who changes the folder, and merge again; nothing is changed"))
    }
}

/// What takes part.
struct Chain {
    /// What is merged, the child first.
    layers: Vec<AtRest>,
    /// Where the layers are, in the same order.
    places: Vec<Place>,
    target: AtRest,
    /// The target's parents.
    below: Vec<AtRest>,
}

impl Chain {
    fn all(&self) -> impl Iterator<Item = &AtRest> {
        self.layers.iter().chain([&self.target]).chain(&self.below)
    }

    /// What the images themselves forbid, and what is lost unless the disk may `shrink`.
    fn check(&self, shrink: bool) -> Result<()> {
        for layer in &self.layers {
            layer.image.check_writable().file(layer.path())?;
        }
        let parent = self.below.first().map(|parent| &*parent.image);
        let checked = merge::check(&self.layers[0].image, &self.target.image, parent);
        checked.file(self.target.path())?;
        let [wanted, found] = [&self.layers[0], &self.target].map(|layer| layer.image.metadata.virtual_size);
        if shrink || wanted >= found {
            return Ok(());
        }
        let (found, wanted) = (size::both(found), size::both(wanted));
        let message = format!("its disk of {found} bytes would shrink to the child's {wanted}");
        let remedy = "--shrink merges, and what lies behind the end of the child's disk is lost";
        Err(Error::new(Kind::Unsupported, message).file(self.target.path()).remedy(remedy))
    }

    /// Looks for images that would lose their parent, or that would be over changed content unless `force` allows
    /// it.
    fn refuse_relatives(&self, force: bool) -> Result<()> {
        let search = Search::default();
        let members = || self.layers.iter().chain([&self.target]);
        let folders: BTreeSet<&Path> = members().map(|member| folder_of(member.path())).collect();
        for path in folders.into_iter().flat_map(images_in) {
            if self.all().any(|member| chain::same_file(member.path(), &path)) {
                continue;
            }
            let Some(other) = look_at(&path, force)? else { continue };
            if let Some(layer) = self.layers.iter().find(|layer| chain::is_child(&other, *layer, &search)) {
                return Err(loses_its_parent(&path, layer.path()));
            }
            if !chain::is_child(&other, &self.target, &search) {
                continue;
            }
            if self.is_left_over(&other) {
                tracing::warn!(
                    "{}: it is left of a merge that was cut short, has nothing that {} has not, and may be removed",
                    path.display(),
                    self.target.path().display()
                );
            } else if !force {
                return Err(over_changed_content(&path, self.target.path()));
            }
        }
        Ok(())
    }

    /// Whether `other` took part in a merge that has come to its last steps, as this chain did: both are known to the
    /// target by the second linkage that only a merge gives, and several are only when all is copied.
    fn is_left_over(&self, other: &Known) -> bool {
        let merged = Some(self.target.image.header.header.data_write_guid);
        let linkage2 =
            |metadata: &Metadata| metadata.parent_locator.as_ref().and_then(ParentLocator::linkage2);
        let lowest = self.layers.last().expect("a merge has a layer");
        linkage2(&lowest.image.metadata) == merged && linkage2(&other.identity.metadata) == merged
    }

    fn merge(&self) -> merge::Merge {
        let paths = |layers: &[AtRest]| layers.iter().map(|layer| layer.path().to_owned()).collect();
        merge::Merge {
            layers: paths(&self.layers),
            target: self.target.path().to_owned(),
            below: paths(&self.below),
        }
    }

    fn into_files(self) -> (Vec<Arc<ImageFile>>, Vec<Place>) {
        let layers = self.layers.into_iter().chain([self.target]).chain(self.below);
        (layers.map(|layer| layer.file).collect(), self.places)
    }
}

/// The files in `folder` that may be images, in the order of their names.
fn images_in(folder: &Path) -> Vec<PathBuf> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => {
            tracing::warn!("{}: not searched for other children: {error}", folder.display());
            return Vec::new();
        }
    };
    let is_file = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_file());
    let files = entries.filter_map(std::result::Result::ok).filter(is_file).map(|entry| entry.path());
    let mut files: Vec<PathBuf> = files.collect();
    files.sort();
    files
}

/// The image at `path`, if it is one. What cannot be looked at may be a child that would be lost: it is refused, unless
/// `force`.
fn look_at(path: &Path, force: bool) -> Result<Option<Known>> {
    match look::identify_neighbour(path) {
        Ok(known) => Ok(Some(known)),
        Err(error) if matches!(error.kind(), Kind::NotVhdx | Kind::Truncated) => Ok(None),
        Err(error) if !force && matches!(error.kind(), Kind::Permission | Kind::Io) => Err(error.remedy(
            "it may be a child of an image that is merged: make it readable, move it away, or merge with --force",
        )),
        Err(error) => {
            tracing::warn!("it is not known whether this is a child of an image that is merged: {error:#}");
            Ok(None)
        }
    }
}

fn loses_its_parent(path: &Path, parent: &Path) -> Error {
    let message = format!("its parent is {}, which the merge would remove", parent.display());
    let remedy = format!("merge it first: vhdx-ublk merge {}; or relink it, or move it away", shell(path));
    Error::new(Kind::InUse, message).file(path).remedy(remedy)
}

fn over_changed_content(path: &Path, parent: &Path) -> Error {
    let message = format!("its parent is {}, which the merge would change", parent.display());
    let remedy = "only one child can be merged: give the others a parent of their own first (copy the parent, and \
                  relink them to the copy); --force merges, and they do not open any more";
    Error::new(Kind::InUse, message).file(path).remedy(remedy)
}

/// A merge that failed is done again.
fn explain(error: Error) -> Error {
    match error.kind() {
        Kind::NoSpace => {
            error.remedy(
                "make room on the file system that holds it, or let files grow (`ulimit -f`; FAT ends at 4 GiB), and \
                 merge again; nothing is lost",
            )
        }
        Kind::Io => error.remedy("the child reads as before; look for the cause (dmesg), and merge again"),
        _ => error,
    }
}

/// Shown where standard error is a terminal.
fn progress(bytes: u64) -> ProgressBar {
    let bar = ProgressBar::new(bytes);
    let template = "{bar:40} {percent:>3}%  {binary_bytes} of {binary_total_bytes}  {eta} left";
    bar.with_style(ProgressStyle::with_template(template).expect("a good template"))
}

/// The chain's files.
struct Locked<'a> {
    reactor: &'a Reactor,
    files: Vec<Arc<ImageFile>>,
    /// Of those that are removed: the first of the files, in the same order.
    places: Vec<Place>,
    bar: ProgressBar,
    /// Bytes shown as copied.
    shown: Cell<u64>,
}

impl Files for Locked<'_> {
    type Disk = UringDisk;

    fn disk(&self, path: &Path) -> UringDisk {
        let file = self.files.iter().find(|file| file.path() == path).expect("a file of the chain");
        self.reactor.disk(file.clone())
    }

    async fn remove(&self, path: &Path) -> Result<()> {
        let mut placed = self.files.iter().zip(&self.places);
        let (file, place) = placed.find(|(file, _)| file.path() == path).expect("a layer is removed");
        place.remove(file)?;
        self.bar.suspend(|| output::print_line(&path.display().to_string()))
    }

    fn copied(&self, bytes: u64) {
        self.bar.inc(bytes - self.shown.replace(bytes));
    }
}
