//! Opening a chain: every parent found, recognised, and none of them twice.

use std::path::{Path, PathBuf};

use super::relative::{Relative, is_made_of};
use super::search::{Candidate, Search};
use crate::disk::{HostFile, folder_of, in_time};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::guid;
use crate::format::locator::{ABSOLUTE_WIN32_PATH, ParentLocator, RELATIVE_PATH, VOLUME_PATH};
use crate::printable::shortened;

/// The most layers of a chain, the leaf included.
pub const MAX_DEPTH: usize = 256;

/// The most memory that the images of a chain may take together, bytes: the BAT of a full disk of the largest
/// size in the smallest blocks and all bits of its sectors, twice. All of it is locked, and any user
/// can make a layer.
pub const MAX_CHAIN_BYTES: u64 = 17 << 30;

/// Opens the parents of `leaf`, its own parent first, with `open`.
///
/// # Errors
///
/// Those of [`follow_parents`].
pub fn open_parents<R: Relative>(
    leaf: &dyn Relative,
    search: &Search,
    open: impl FnMut(&Path) -> Result<R>,
) -> Result<Vec<R>> {
    let mut parents = Vec::new();
    follow_parents(leaf, search, &mut parents, open)?;
    Ok(parents)
}

/// As [`open_parents`]; `parents` gets those that were found, also where the chain breaks off behind them.
///
/// # Errors
///
/// [`Kind::NotFound`] if a parent is nowhere; [`Kind::Mismatch`] if what is there is not, or no longer, the
/// image that the child was made of; corrupt if the chain returns to one of its own; unsupported if it is too
/// long; those of `open`.
pub fn follow_parents<R: Relative>(
    leaf: &dyn Relative,
    search: &Search,
    parents: &mut Vec<R>,
    open: impl FnMut(&Path) -> Result<R>,
) -> Result<()> {
    let followed = follow(leaf, &search.anew(), parents, open);
    let locators = std::iter::once(leaf).chain(parents.iter().map(|parent| parent as &dyn Relative));
    let locators: Vec<_> = locators.filter_map(|image| image.metadata().parent_locator.as_ref()).collect();
    search.warn_of_idle_maps(&locators);
    followed
}

fn follow<R: Relative>(
    leaf: &dyn Relative,
    search: &Search,
    parents: &mut Vec<R>,
    mut open: impl FnMut(&Path) -> Result<R>,
) -> Result<()> {
    let mut given = search.parents.iter();
    let mut resident = leaf.resident_bytes();
    loop {
        let child = parents.last().map_or(leaf, |parent| parent);
        let Some(locator) = &child.metadata().parent_locator else { break };
        if parents.len() + 1 == MAX_DEPTH {
            let message = format!("the chain has more than {MAX_DEPTH} layers");
            return Err(Error::new(Kind::Unsupported, message).file(leaf.path()));
        }
        let told = given.next();
        let by_user = told.is_some();
        let places = match told {
            Some(path) => vec![Candidate { path: path.clone(), file: None, guessed: false }],
            None => search.candidates(child.path(), locator),
        };
        let used: Vec<&Path> = std::iter::once(leaf.path()).chain(parents.iter().map(R::path)).collect();
        if search.beside_only && places.is_empty() {
            return Err(not_beside(child));
        }
        let parent = first_fitting(child, locator, (places, by_user), &used, &mut open)?;
        // The folder may have changed between the look and the opening.
        if search.beside_only && folder_of(parent.path()) != folder_of(child.path()) {
            return Err(not_beside(child));
        }
        resident = resident.saturating_add(parent.resident_bytes());
        if resident > MAX_CHAIN_BYTES {
            let most = MAX_CHAIN_BYTES >> 30;
            let message = format!("the images of the chain down to here take more than {most} GiB of memory");
            let remedy = "merge some of the layers: blocks that are there as a whole take less";
            return Err(Error::new(Kind::Unsupported, message).file(parent.path()).remedy(remedy));
        }
        parents.push(parent);
    }
    match given.next() {
        None => Ok(()),
        Some(path) => {
            let message =
                format!("{} is given as a parent, and the image before it has none", path.display());
            Err(Error::new(Kind::Usage, message).file(leaf.path()))
        }
    }
}

/// The first of `places`, which the user has named or not, that is the parent of `child`. If none is, why the
/// likeliest is not.
fn first_fitting<R: Relative>(
    child: &dyn Relative,
    locator: &ParentLocator,
    (places, by_user): (Vec<Candidate>, bool),
    used: &[&Path],
    open: &mut impl FnMut(&Path) -> Result<R>,
) -> Result<R> {
    let mut first_error = None;
    for Candidate { path, file, guessed } in places {
        // Images in two folders often share a name: that the child lies beside itself makes no circle.
        if guessed && used.iter().any(|used| HostFile::at(used).ok() == file) {
            continue;
        }
        let checked = refuse_cycle(&path, used).and_then(|()| open(&path));
        let checked = checked.and_then(|parent| {
            recognise(child, locator, &parent, by_user).map_err(|error| error.remedy(REMEDY))?;
            Ok(parent)
        });
        match checked {
            Ok(parent) => return Ok(parent),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    Err(first_error.unwrap_or_else(|| nowhere(child, locator)))
}

/// An image that is open already would have to be locked against itself.
fn refuse_cycle(path: &Path, used: &[&Path]) -> Result<()> {
    let paths: Vec<PathBuf> = used.iter().chain([&path]).map(|path| path.to_path_buf()).collect();
    let identity = |path: PathBuf| HostFile::at(&path).doing("finding the parent").file(&path);
    let found = in_time(move || paths.into_iter().map(identity).collect::<Result<Vec<_>>>());
    let found = found.and_then(|found| found).file(path)?;
    if found[..used.len()].contains(&found[used.len()]) {
        let message = "it is its own ancestor: the chain never ends";
        return Err(Error::corrupt("parent locator", message).file(path).remedy(REMEDY));
    }
    Ok(())
}

/// What to do about a parent that was not found, or is not the right one.
const REMEDY: &str = "name the right file with --parent, or what its drive is here with --parent-map; \
     `vhdx-ublk relink` has the child name it for good";

/// Whether `parent` is what `child`, whose locator is `locator`, was made of. Only of a parent that is named
/// `by_user` is its own GUID shown: the maker of the child can make it name an image that they may not read.
pub(super) fn recognise(
    child: &dyn Relative,
    locator: &ParentLocator,
    parent: &dyn Relative,
    by_user: bool,
) -> Result<()> {
    let linkage = locator.linkage().map_err(|error| error.file(child.path()))?;
    if !is_made_of(child, parent) {
        let (found, wanted) = (guid::print(parent.data_write_guid()), guid::print(linkage));
        let guids = if by_user {
            format!("its DataWriteGuid is {found}, {wanted} is wanted")
        } else {
            format!("its DataWriteGuid is not {wanted}")
        };
        let child = child.path().display();
        let message = format!("it is not the parent of {child}, or was written since that was made: {guids}");
        return Err(Error::new(Kind::Mismatch, message).file(parent.path()));
    }
    same_sectors(child, parent)
}

/// Whether `parent` has the sectors of `child`.
pub(super) fn same_sectors(child: &dyn Relative, parent: &dyn Relative) -> Result<()> {
    let sectors = |image: &dyn Relative| image.metadata().logical_sector_size;
    if sectors(parent) != sectors(child) {
        let message = format!(
            "it has sectors of {} bytes, its child {} of {}",
            sectors(parent),
            child.path().display(),
            sectors(child)
        );
        let error = Error::corrupt("metadata", message).file(parent.path());
        return Err(error.remedy("find the image that the child was made of"));
    }
    Ok(())
}

fn not_beside(child: &dyn Relative) -> Error {
    let message = "its parent is not in its own folder, and no other folder is searched";
    Error::new(Kind::NotFound, message)
        .in_structure("parent locator")
        .file(child.path())
        .remedy("copy the parent into that folder; or, if you trust the image, open it without this limit")
}

fn nowhere(child: &dyn Relative, locator: &ParentLocator) -> Error {
    let keys = [RELATIVE_PATH, VOLUME_PATH, ABSOLUTE_WIN32_PATH];
    let known: Vec<_> = keys.into_iter().filter_map(|key| locator.get(key)).map(shortened).collect();
    let message = match &known[..] {
        [] => "it names no place where its parent may be".to_owned(),
        known => format!("its parent is in none of the places it names: {}", known.join(", ")),
    };
    Error::new(Kind::NotFound, message).in_structure("parent locator").file(child.path()).remedy(REMEDY)
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::format::locator::PARENT_LINKAGE;
    use crate::format::metadata::Metadata;

    struct Heavy {
        metadata: Metadata,
        path: PathBuf,
    }

    impl Relative for Heavy {
        fn metadata(&self) -> &Metadata {
            &self.metadata
        }

        fn data_write_guid(&self) -> Uuid {
            Uuid::max()
        }

        fn resident_bytes(&self) -> u64 {
            MAX_CHAIN_BYTES / 4
        }

        fn path(&self) -> &Path {
            &self.path
        }
    }

    /// Each layer is within its own bound, and all of them are not.
    #[test]
    fn the_memory_of_a_chain_is_bounded_in_all() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let heavy = |path: &Path| {
            let mut locator = ParentLocator::default();
            locator.set(PARENT_LINKAGE, guid::print(Uuid::max()));
            let metadata = Metadata {
                block_size: 1 << 20,
                leave_blocks_allocated: false,
                has_parent: true,
                virtual_size: 1 << 30,
                disk_id: Uuid::max(),
                logical_sector_size: 512,
                physical_sector_size: 4096,
                parent_locator: Some(locator),
            };
            Ok(Heavy { metadata, path: path.to_owned() })
        };
        let files: Vec<PathBuf> = (0..6).map(|number| folder.path().join(number.to_string())).collect();
        for path in &files {
            std::fs::write(path, "").expect("room");
        }
        let search = Search { parents: files[1..].to_vec(), ..Search::default() };
        let mut parents = Vec::new();
        let leaf = heavy(&files[0]).expect("made");
        let error = follow_parents(&leaf, &search, &mut parents, heavy).expect_err("too much");
        assert!(error.to_string().contains("GiB of memory"), "{error}");
        assert_eq!(parents.len(), 3, "a quarter each");
    }
}
