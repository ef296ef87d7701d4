//! The images beside a chain, which a merge would cost their parent or its content.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::{Beside, LockedChain, Request};
use crate::chain::{self, Known, Layer, Member, Search};
use crate::disk::folder_of;
use crate::error::{Error, Kind, Result};
use crate::format::locator::ParentLocator;
use crate::format::metadata::Metadata;
use crate::operations::inspect::identify_neighbour;
use crate::printable::shell;

/// The images that a merge writes and removes.
struct Family<'a> {
    layers: &'a [Member],
    target: &'a Member,
    /// The images that are locked.
    known: Vec<&'a Path>,
}

/// Looks for images that would lose their parent, or that would be over changed content where they must not
/// be `beside` it. Returns the children of the image that is merged, but those that are locked already.
pub(super) fn refuse_relatives(
    chain: &LockedChain,
    request: &Request,
    beside: Beside,
) -> Result<Vec<PathBuf>> {
    let LockedChain { layers, target, below, children, .. } = chain;
    let members = layers.iter().chain([target]).chain(below).chain(children);
    let family = Family { layers, target, known: members.map(Layer::path).collect() };
    family.refuse_relatives(Kinship::of(request), beside)
}

/// The same for a merge of `layer` into `target` while a device serves the `chain`, whose images are known.
/// No other child of the layer may be there, either.
///
/// # Errors
///
/// [`Kind::InUse`] if there is one.
pub fn refuse_relatives_of_served(layer: &Member, target: &Member, chain: &[PathBuf]) -> Result<()> {
    let known = chain.iter().map(PathBuf::as_path).collect();
    let family = Family { layers: std::slice::from_ref(layer), target, known };
    let search = Search::default();
    let kinship = Kinship { search: &search, is_copied: false };
    let refused = family.refuse_relatives(kinship, Beside::Refuse).and_then(|children| {
        let Some(child) = children.first() else { return Ok(()) };
        let message = format!("its parent is {}, which the merge would remove", layer.path().display());
        Err(Error::new(Kind::InUse, message).file(child))
    });
    refused.map_err(|error| {
        // What is advised for a merge at rest is no option here.
        let Some(path) = error.file_path().filter(|_| error.kind() == Kind::InUse) else { return error };
        let served = Error::new(Kind::InUse, error.message()).file(path);
        served.remedy(
            "remove the device first (`vhdx-ublk del`), and merge then: at rest a merge takes care of other \
             children (`vhdx-ublk merge --help`)",
        )
    })
}

impl Family<'_> {
    fn refuse_relatives(&self, kinship: Kinship<'_>, beside: Beside) -> Result<Vec<PathBuf>> {
        let force = beside == Beside::Lose;
        let Self { layers, target, known } = self;
        let changed = layers.iter().chain([*target]);
        let folders: BTreeSet<&Path> = changed.map(|member| folder_of(member.path())).collect();
        let mut others = Vec::new();
        for path in folders.into_iter().flat_map(images_in) {
            if !known.iter().any(|known| chain::same_file(known, &path)) {
                others.extend(identify(&path, force)?.map(|other| (path, other)));
            }
        }
        let mut children = Vec::new();
        for (path, other) in &others {
            if is_child_of_merged((&layers[0], target), other, kinship.search) {
                children.push(path.clone());
            } else if let Some(layer) = layers.iter().find(|layer| kinship.is_child(other, *layer)) {
                return Err(loses_its_parent(path, layer.path()));
            } else if let Some(layer) = layers.iter().find(|layer| kinship.may_be_child(other, *layer)) {
                may_lose_its_parent(path, layer.path(), force)?;
            } else if self.is_left_over(other, kinship) {
                let needs_it = |(_, child): &&(PathBuf, Known)| kinship.may_be_child(child, other);
                if let Some((child, _)) = others.iter().find(needs_it) {
                    return Err(is_unfinished(path, child));
                }
                tracing::warn!(
                    "{}: it is left over from an interrupted merge into {}, and can be removed",
                    path.display(),
                    target.path().display()
                );
            } else if beside == Beside::Refuse && kinship.is_beside(other, *target) {
                return Err(over_changed_content(path, target.path()));
            }
        }
        Ok(children)
    }

    /// Whether `other` took part in a merge that has come to its last steps, as this chain did: both are
    /// known to the target by the second linkage that only a merge gives, and several are only when all is
    /// copied. It was the parent of the lowest layer.
    fn is_left_over(&self, other: &Known, kinship: Kinship) -> bool {
        let merged = Some(self.target.image.header.header.data_write_guid);
        let linkage2 =
            |metadata: &Metadata| metadata.parent_locator.as_ref().and_then(ParentLocator::linkage2);
        let lowest = &self.layers.last().expect("a merge has a layer").image.metadata;
        let linkage = lowest.parent_locator.as_ref().and_then(|locator| locator.linkage().ok());
        kinship.may_be_child(other, self.target)
            && linkage2(lowest) == merged
            && linkage2(&other.identity.metadata) == merged
            && linkage == Some(other.identity.data_write_guid)
    }
}

/// Whether `other`, which looks for its parent as `search` says, is a child of the image that is merged into
/// `target`, or was: a merge that was cut may have made it one of the target's.
pub(super) fn is_child_of_merged(
    (merged, target): (&Member, &Member),
    other: &impl chain::Relative,
    search: &Search,
) -> bool {
    let linkage = other.metadata().parent_locator.as_ref().and_then(|locator| locator.linkage().ok());
    let knows = linkage == Some(merged.image.header.header.data_write_guid);
    knows && [merged, target].iter().any(|parent| chain::is_child(other, *parent, search))
}

/// How an image beside a chain is known as a child of one of its images.
#[derive(Clone, Copy)]
struct Kinship<'a> {
    search: &'a Search,
    /// The target is a copy. The children of the original know it by the same GUID.
    is_copied: bool,
}

impl<'a> Kinship<'a> {
    fn of(request: &'a Request) -> Self {
        Self { search: &request.search, is_copied: request.copied.is_some() }
    }

    /// Whether `child` finds `parent` by itself.
    fn is_child(self, child: &dyn chain::Relative, parent: &dyn chain::Relative) -> bool {
        chain::is_child(child, parent, self.search)
    }

    /// As [`Self::is_child`], or where the user has named the parents: files were renamed or moved then, and
    /// the places that a child names say nothing. The GUID does.
    fn may_be_child(self, child: &dyn chain::Relative, parent: &dyn chain::Relative) -> bool {
        let are_named = !self.search.parents.is_empty();
        self.is_child(child, parent) || (are_named && chain::is_made_of(child, parent))
    }

    /// Whether `child` may be another child of the `target`.
    fn is_beside(self, child: &dyn chain::Relative, target: &dyn chain::Relative) -> bool {
        if self.is_copied { self.is_child(child, target) } else { self.may_be_child(child, target) }
    }
}

fn is_unfinished(path: &Path, child: &Path) -> Error {
    let message = format!("its merge was interrupted, and it is still the parent of {}", child.display());
    let remedy = format!("finish that merge first: vhdx-ublk merge {}", shell(path));
    Error::new(Kind::InUse, message).file(path).remedy(remedy)
}

/// The files in `folder` that may be images, in the order of their names.
fn images_in(folder: &Path) -> Vec<PathBuf> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) => {
            tracing::warn!("{}: cannot be searched for other children: {error}", folder.display());
            return Vec::new();
        }
    };
    let is_file = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_file());
    let files = entries.filter_map(std::result::Result::ok).filter(is_file).map(|entry| entry.path());
    let mut files: Vec<PathBuf> = files.collect();
    files.sort();
    files
}

/// The image at `path`, if it is one. What cannot be read may be a child that would be lost: it is refused,
/// unless `force`.
fn identify(path: &Path, force: bool) -> Result<Option<Known>> {
    match identify_neighbour(path) {
        Ok(known) => Ok(Some(known)),
        Err(error) if matches!(error.kind(), Kind::NotVhdx | Kind::Truncated) => Ok(None),
        Err(error) if !force && matches!(error.kind(), Kind::Permission | Kind::Io) => Err(error
            .remedy("it may be a child of a merged image: make it readable, move it away, or use --force")),
        Err(error) => {
            tracing::warn!("this may be a child of a merged image, and cannot be read: {error:#}");
            Ok(None)
        }
    }
}

fn loses_its_parent(path: &Path, parent: &Path) -> Error {
    let message = format!("its parent is {}, which the merge would remove", parent.display());
    let remedy = format!(
        "first merge it (`vhdx-ublk merge {}`), relink it, or move it to another folder",
        shell(path)
    );
    Error::new(Kind::InUse, message).file(path).remedy(remedy)
}

/// An image that knows `parent` by its GUID, and does not find it: it is a child whose parent was renamed, or
/// one that has a parent elsewhere.
fn may_lose_its_parent(path: &Path, parent: &Path, force: bool) -> Result<()> {
    let message = format!("it was made of {}, which the merge would remove", parent.display());
    if force {
        tracing::warn!("{}: {message}: it becomes unreadable, unless it has that elsewhere", path.display());
        return Ok(());
    }
    let remedy = format!(
        "if it is needed, have it find its parent: `vhdx-ublk relink {} {}`; otherwise move it to another \
         folder, or merge with --force",
        shell(path),
        shell(parent)
    );
    Err(Error::new(Kind::InUse, message).file(path).remedy(remedy))
}

fn over_changed_content(path: &Path, parent: &Path) -> Error {
    let message = format!("its parent is {}, which the merge would change", parent.display());
    let remedy = "merge into a copy, so that the other children keep their parent: --copy NEW.vhdx; with \
                  --force they become unreadable";
    Error::new(Kind::InUse, message).file(path).remedy(remedy)
}
