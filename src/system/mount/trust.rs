//! Whether an image can have been made by somebody else than root.
//!
//! A file system may hold programs that run with their owner's rights, and nodes of the machine's devices.
//! Who writes the image decides on these, whatever the permissions on the mounted files say.

use std::fs::{self, File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::device::registry::Entry;
use crate::disk::HostFile;
use crate::error::{Doing, Locate, Result};
use crate::operations::named_file;

/// An image file, held so that no other gets its inode.
pub(super) struct Held {
    _file: File,
    found: Metadata,
}

impl Held {
    /// The file that `path` leads to. It is not opened for I/O.
    ///
    /// # Errors
    ///
    /// As [`named_file::find`].
    pub(super) fn at(path: &Path) -> Result<Self> {
        let file = named_file::find(path)?;
        let found = file.metadata().doing("examining the image").file(path)?;
        Ok(Self { _file: file, found })
    }

    /// Which file it is.
    pub(super) fn file(&self) -> HostFile {
        HostFile::of(&self.found)
    }

    /// Whether root alone can write to this image, which the device of `entry` serves, and to its parents.
    pub(super) fn is_of_root(&self, entry: &Entry) -> bool {
        let parents = entry.parents.iter().zip(&entry.parent_files);
        let is_parent_of_root = |(path, file): (&PathBuf, &HostFile)| {
            fs::metadata(path).is_ok_and(|found| HostFile::of(&found) == *file && is_of_root(&found))
        };
        entry.image_file == self.file()
            && is_of_root(&self.found)
            && entry.parents.len() == entry.parent_files.len()
            && parents.into_iter().all(is_parent_of_root)
    }
}

fn is_of_root(found: &Metadata) -> bool {
    allows_root_alone(found.uid(), found.mode())
}

fn allows_root_alone(owner: u32, mode: u32) -> bool {
    owner == 0 && mode & 0o022 == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_and_whoever_may_write_decide_what_is_on_an_image() {
        assert!(allows_root_alone(0, 0o100_644) && allows_root_alone(0, 0o100_600));
        assert!(!allows_root_alone(1000, 0o100_600), "it is a user's");
        assert!(!allows_root_alone(0, 0o100_664) && !allows_root_alone(0, 0o100_646), "others write to it");
    }
}
