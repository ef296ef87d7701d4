//! What a child says of its parent, from the first day or since they were moved.

use std::path::{Component, Path};

use uuid::Uuid;

use super::open::{recognise, same_sectors};
use super::relative::Layer;
use super::search::{Search, is_direct};
use crate::disk::folder_of;
use crate::error::{Error, Kind, Result};
use crate::format::guid;
use crate::format::locator::{
    ABSOLUTE_WIN32_PATH, PARENT_LINKAGE, PARENT_LINKAGE2, ParentLocator, RELATIVE_PATH, VOLUME_PATH,
};
use crate::image::{FoundLog, ParentRef};
use crate::printable::shell;

/// What a child, to be in a file in `folder`, has from `parent`. `folder` is absolute, without symbolic
/// links.
///
/// # Errors
///
/// [`Kind::Unsupported`] if the parent was not closed cleanly, or its path cannot be written in UTF-16.
pub fn parent_ref(parent: &impl Layer, folder: &Path) -> Result<ParentRef> {
    if parent.image().found_log != FoundLog::Clean {
        let message = "it was not closed cleanly, and its log has to be replayed before it becomes a parent";
        let remedy = format!("`vhdx-ublk check --repair {}`", shell(parent.path()));
        return Err(Error::new(Kind::Unsupported, message).file(parent.path()).remedy(remedy));
    }
    let guid = parent.image().header.header.data_write_guid;
    parent_ref_of(parent.path(), guid, parent.image().metadata.disk_id, folder)
}

/// The same for the parent in the file at `path`, absolute and without symbolic links, of which it is known
/// that it will not change again.
///
/// # Errors
///
/// [`Kind::Unsupported`] if its path cannot be written in UTF-16.
pub fn parent_ref_of(path: &Path, data_write_guid: Uuid, disk_id: Uuid, folder: &Path) -> Result<ParentRef> {
    let relative = way(folder, path)?;
    let mut locator = ParentLocator::default();
    locator.set(PARENT_LINKAGE, guid::print(data_write_guid));
    locator.set(PARENT_LINKAGE2, guid::print(Uuid::nil()));
    locator.set(RELATIVE_PATH, relative);
    Ok(ParentRef { locator, disk_id })
}

/// Has `locator`, of the child in the file `child`, say that its parent is in the file `parent`, and nothing
/// that leads elsewhere. Both paths are absolute, without symbolic links.
///
/// # Errors
///
/// [`Kind::Unsupported`] if the path cannot be written in UTF-16.
pub fn point_to(locator: &mut ParentLocator, child: &Path, parent: &Path) -> Result<()> {
    locator.set(RELATIVE_PATH, way(folder_of(child), parent)?);
    locator.remove(ABSOLUTE_WIN32_PATH);
    locator.remove(VOLUME_PATH);
    Ok(())
}

/// The locator of `child` after its parent was found in the file `parent`, by `search`, if the relative path
/// does not lead there. Absolute paths go that lead elsewhere; what they mean on other machines is not known
/// here.
///
/// # Errors
///
/// As [`point_to`].
pub fn with_found_path(
    child: &Path,
    locator: &ParentLocator,
    parent: &Path,
    search: &Search,
) -> Result<Option<ParentLocator>> {
    if is_direct(child, locator, parent) {
        return Ok(None);
    }
    let mut redirected = locator.clone();
    redirected.set(RELATIVE_PATH, way(folder_of(child), parent)?);
    for key in [ABSOLUTE_WIN32_PATH, VOLUME_PATH] {
        if locator.get(key).is_some_and(|text| search.misleads(text, parent)) {
            redirected.remove(key);
        }
    }
    Ok(Some(redirected))
}

/// The locator with which `child` names `parent`, whatever it named before. Its linkage changes only where
/// that does not recognise `parent` and `ignore_mismatch` allows it.
///
/// # Errors
///
/// [`Kind::Unsupported`] if `child` has no parent at all, and as [`point_to`]; [`Kind::Mismatch`], with both
/// GUIDs, if `parent` is not what it was made of; corrupt if their sectors differ.
pub fn with_parent(child: &impl Layer, parent: &impl Layer, ignore_mismatch: bool) -> Result<ParentLocator> {
    let Some(locator) = &child.image().metadata.parent_locator else {
        let message = "it is not a differencing image: it has no parent, and takes none";
        let remedy = format!("`vhdx-ublk info {}` shows what it is", shell(child.path()));
        let error = Error::new(Kind::Unsupported, message).file(child.path()).in_structure("metadata");
        return Err(error.remedy(remedy));
    };
    same_sectors(child, parent)?;
    let mut relinked = locator.clone();
    match recognise(child, locator, parent, true) {
        Err(error) if !ignore_mismatch => return Err(error.remedy(MISMATCH_REMEDY)),
        Err(_) => {
            relinked.set(PARENT_LINKAGE, guid::print(parent.image().header.header.data_write_guid));
            relinked.set(PARENT_LINKAGE2, guid::print(Uuid::nil()));
        }
        Ok(()) => {}
    }
    if !is_direct(child.path(), locator, parent.path()) {
        point_to(&mut relinked, child.path(), parent.path())?;
    }
    Ok(relinked)
}

/// What to do about a parent that is another one, or has changed.
const MISMATCH_REMEDY: &str = "find the right file; `--ignore-mismatch` takes this one all the same, and \
     where its content is not what the child was made over, the disk is a mix of two: file systems on it \
     may be \
      damaged";

/// The way from `folder` to `file` as a child names it.
fn way(folder: &Path, file: &Path) -> Result<String> {
    relative_path(folder, file).ok_or_else(|| {
        let message = "its path is not UTF-8, or a name in it has a backslash: a child cannot record it";
        Error::new(Kind::Unsupported, message).file(file).remedy("rename it")
    })
}

/// The way from `folder` to `file`, both absolute, as Windows writes it.
fn relative_path(folder: &Path, file: &Path) -> Option<String> {
    let (from, to): (Vec<_>, Vec<_>) = (folder.components().collect(), file.components().collect());
    let common = from.iter().zip(&to).take_while(|(from, to)| from == to).count();
    let up = std::iter::repeat_n("..", from.len() - common);
    let down = to[common..].iter().map(|component| match component {
        // What Linux takes for a part of a name Windows takes for a border.
        Component::Normal(name) => name.to_str().filter(|name| !name.contains('\\')),
        _ => None,
    });
    let here = (common == from.len()).then_some(".");
    let way: Option<Vec<&str>> = here.into_iter().chain(up).map(Some).chain(down).collect();
    Some(way?.join("\\"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_to_a_parent_is_written_as_windows_does() {
        let way = |folder: &str, file: &str| relative_path(Path::new(folder), Path::new(file));
        assert_eq!(way("/disks", "/disks/base.vhdx").as_deref(), Some(r".\base.vhdx"));
        assert_eq!(way("/disks/a", "/disks/b/base.vhdx").as_deref(), Some(r"..\b\base.vhdx"));
        assert_eq!(way("/", "/base.vhdx").as_deref(), Some(r".\base.vhdx"));
        assert_eq!(way("/disks", r"/disks/a\b.vhdx"), None, "Windows would look for it elsewhere");
    }
}
