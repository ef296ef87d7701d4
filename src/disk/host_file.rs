//! Which file it is, whatever its names.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// A file of the host, independent of its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFile {
    /// Its file system (`st_dev`).
    pub device: u64,
    /// Its inode.
    pub inode: u64,
}

impl HostFile {
    /// The file of `metadata`.
    pub fn of(metadata: &fs::Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }

    /// The file that `path` leads to now.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn at(path: &Path) -> io::Result<Self> {
        fs::metadata(path).map(|found| Self::of(&found))
    }
}
