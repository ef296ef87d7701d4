//! Giving up what was written since a snapshot: a new child of an image of the chain takes the place of those
//! above it.
//!
//! The image that is returned to is not written, as it was frozen; what is given up stays as it is, until it
//! is [discarded](discard), the uppermost first: at each moment what is left is a chain.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Devices;
use super::children::children;
use super::inspect::identify_neighbour;
use super::tree::chain_of;
use crate::chain::{Search, same_file};
use crate::disk::{Access, HostFile, ImageFile};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::printable::shell;

/// What a return to an image means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Return {
    /// The image.
    pub to: PathBuf,
    /// Its parents, its own first.
    pub parents: Vec<PathBuf>,
    /// What is above it in the chain, the uppermost first.
    pub given_up: Vec<PathBuf>,
}

/// What it means for the image at `leaf` and its parents to return to the image at `to`.
///
/// # Errors
///
/// [`Kind::Mismatch`] if that is not below `leaf`; what is wrong with the chain.
pub fn plan(leaf: &Path, to: &Path, search: &Search) -> Result<Return> {
    let (chain, broken) = chain_of(leaf, search)?;
    HostFile::at(to).doing("finding the image").file(to)?;
    let mut files: Vec<PathBuf> = chain.into_iter().map(|image| image.path).collect();
    let list = || format!("vhdx-ublk snapshot list {}", shell(leaf));
    let Some(place) = files.iter().position(|path| same_file(path, to)) else {
        let message = format!("it is not in the chain of {}", leaf.display());
        return Err(broken.unwrap_or_else(|| Error::new(Kind::Mismatch, message).file(to).remedy(list())));
    };
    if place == 0 {
        let message = "nothing lies above it: there is nothing to give up";
        return Err(Error::new(Kind::Mismatch, message).file(to).remedy(list()));
    }
    if let Some(broken) = broken {
        return Err(broken);
    }
    let mut below = files.split_off(place);
    Ok(Return { to: below.remove(0), parents: below, given_up: files })
}

/// A free name beside `image`: `disk-1.vhdx`.
pub fn free_name(image: &Path) -> PathBuf {
    let stem = image.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let end = image.extension().map_or(String::new(), |end| format!(".{}", end.to_string_lossy()));
    let names = (1_u64..).map(|number| image.with_file_name(format!("{stem}-{number}{end}")));
    names.into_iter().find(|path| fs::symlink_metadata(path).is_err()).expect("a folder has an end")
}

/// Removes the images of `given_up`, the uppermost first, up to one that is in use or has other children.
/// Those that were removed, and why the next one stays.
pub fn discard(given_up: &[PathBuf], devices: &dyn Devices) -> (Vec<PathBuf>, Option<Error>) {
    let mut removed = Vec::new();
    for path in given_up {
        if let Err(error) = discard_one(path, devices) {
            return (removed, Some(error));
        }
        removed.push(path.clone());
    }
    (removed, None)
}

fn discard_one(path: &Path, devices: &dyn Devices) -> Result<()> {
    let file = ImageFile::open(path, Access::ReadWrite, Duration::ZERO);
    let file = file.map_err(|error| devices.with_holder(error, path))?;
    devices.refuse_abandoned(&file, Access::ReadWrite)?;
    let image = identify_neighbour(path)?;
    if let Some(child) = children(&image, &Search::default(), devices).first() {
        let message = format!("it is the parent of {}", child.display());
        return Err(Error::new(Kind::InUse, message).file(path));
    }
    let found = HostFile::at(path).doing("finding the image").file(path)?;
    if found != file.identity() {
        return Err(Error::new(Kind::Mismatch, "another file has its name by now").file(path));
    }
    fs::remove_file(path).doing("removing the image").file(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_name_counts_on() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let image = folder.path().join("disk.vhdx");
        assert_eq!(free_name(&image), folder.path().join("disk-1.vhdx"));
        fs::write(folder.path().join("disk-1.vhdx"), "").expect("room");
        assert_eq!(free_name(&image), folder.path().join("disk-2.vhdx"));
    }
}
