//! The children of an image: they become unreadable when it is written to.
//!
//! A parent does not know its children. They are searched for where they usually are, beside it.

use std::fs::{self, DirEntry};
use std::path::{Path, PathBuf};

use super::relative::{Relative, is_made_of};
use super::search::Search;
use crate::disk::{HostFile, folder_of};
use crate::error::Result;

/// The most images of a folder that are looked at: as many as the longest chain has. Each costs a few hundred
/// KiB of reading, so that even all of them are found in seconds.
pub const MAX_NEIGHBOURS: usize = 256;

/// How the names of images end, in small letters.
const EXTENSIONS: [&str; 2] = ["vhdx", "avhdx"];

/// The images in the folder of `parent` that were made of it, as it is now. `identify` must not wait for
/// anybody; what it cannot read is no child.
pub fn children_beside<R: Relative>(
    parent: &dyn Relative,
    search: &Search,
    mut identify: impl FnMut(&Path) -> Result<R>,
) -> Vec<PathBuf> {
    let search = search.anew();
    let is_its = |path: &PathBuf| identify(path).is_ok_and(|image| is_child(&image, parent, &search));
    neighbours(parent.path()).into_iter().filter(is_its).collect()
}

/// Whether `child`, which looks for its parent as `search` says, would take `parent` for it.
pub fn is_child(child: &dyn Relative, parent: &dyn Relative, search: &Search) -> bool {
    is_made_of(child, parent) && leads_to(child, search, parent.path())
}

/// Whether one of the places where `child` would look for its parent is the file at `parent`.
fn leads_to(child: &dyn Relative, search: &Search, parent: &Path) -> bool {
    let Some(locator) = &child.metadata().parent_locator else { return false };
    let Ok(parent) = HostFile::at(parent) else { return false };
    search.candidates(child.path(), locator).iter().any(|place| place.file == Some(parent))
}

/// The other files in the folder of `image` that are called as images are, in the order of their names. No
/// link among them is followed.
fn neighbours(image: &Path) -> Vec<PathBuf> {
    let folder = folder_of(image);
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let is_called_so = |path: &PathBuf| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|found| EXTENSIONS.contains(&&*found.to_lowercase()))
    };
    let image = HostFile::at(image).ok();
    let is_other = |entry: &DirEntry| {
        let found = entry.metadata();
        found.is_ok_and(|found| found.is_file() && Some(HostFile::of(&found)) != image)
    };
    let entries = entries
        .filter_map(std::result::Result::ok)
        .filter(|entry| is_called_so(&entry.path()) && is_other(entry));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths.truncate(MAX_NEIGHBOURS);
    paths
}
