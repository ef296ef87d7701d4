//! What a new child says of its parent.

use std::path::{Component, Path};

use uuid::Uuid;

use super::open::Layer;
use crate::error::{Error, Kind, Result};
use crate::format::guid;
use crate::format::locator::{PARENT_LINKAGE, PARENT_LINKAGE2, ParentLocator, RELATIVE_PATH};
use crate::image::{Descent, FoundLog};

/// What a child, to be in a file in `folder`, has from `parent`. `folder` is absolute, without symbolic links.
///
/// # Errors
///
/// [`Kind::Unsupported`] if the parent was not closed cleanly, or its path cannot be told in UTF-16.
pub fn descent(parent: &impl Layer, folder: &Path) -> Result<Descent> {
    if parent.image().found_log != FoundLog::Clean {
        let message = "it was not closed cleanly, and its log has to be replayed before it becomes a parent";
        let remedy = format!("`vhdx-ublk check --repair {}`", parent.path().display());
        return Err(Error::new(Kind::Unsupported, message).file(parent.path()).remedy(remedy));
    }
    let guid = parent.image().header.header.data_write_guid;
    descent_of(parent.path(), guid, parent.image().metadata.disk_id, folder)
}

/// The same for the parent in the file at `path`, absolute and without symbolic links, of which it is known that it
/// will not change any more.
///
/// # Errors
///
/// [`Kind::Unsupported`] if its path cannot be told in UTF-16.
pub fn descent_of(path: &Path, data_write_guid: Uuid, disk_id: Uuid, folder: &Path) -> Result<Descent> {
    let relative = relative_path(folder, path).ok_or_else(|| {
        let message = "its path is no UTF-8, and a child could not name it";
        Error::new(Kind::Unsupported, message).file(path).remedy("rename it")
    })?;
    let mut locator = ParentLocator::default();
    locator.set(PARENT_LINKAGE, guid::print(data_write_guid));
    locator.set(PARENT_LINKAGE2, guid::print(Uuid::nil()));
    locator.set(RELATIVE_PATH, relative);
    Ok(Descent { locator, disk_id })
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
