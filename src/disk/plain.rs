//! A file that is only read, by plain system calls and without a ring.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::file::{next_data, takes_space_back};
use super::open::{Links, Opened, open_regular};
use super::{Access, Buffer, ImageFile, ReadDisk};
use crate::error::{Doing, Locate, Result};

/// An image file that is only read.
pub struct PlainDisk(File);

impl PlainDisk {
    /// Opens the image at `path` without a lock: it is read as it is at this moment. Its path, absolute and
    /// without symbolic links.
    ///
    /// # Errors
    ///
    /// Those of [`open_regular`].
    pub fn open(path: &Path, links: Links) -> Result<(Self, PathBuf)> {
        let Opened { file, path } = open_regular(path, Access::ReadOnly, links)?;
        Ok((Self(file), path))
    }

    /// The disk of `locked`, whose lock the caller keeps.
    ///
    /// # Errors
    ///
    /// When the process has no descriptor left.
    pub fn of(locked: &ImageFile) -> Result<Self> {
        let same = locked.as_fd().try_clone_to_owned();
        Ok(Self(same.doing("duplicating the image's descriptor").file(locked.path())?.into()))
    }

    /// The file beneath.
    pub fn file(&self) -> &File {
        &self.0
    }
}

impl Drop for PlainDisk {
    /// What was read leaves the host's page cache: direct writes of a device to this file would be slower for
    /// it.
    fn drop(&mut self) {
        let _ = posix_fadvise(&self.0, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}

impl ReadDisk for PlainDisk {
    async fn read(&self, offset: u64, length: usize) -> io::Result<Buffer> {
        let mut buffer = Buffer::zeroed(length);
        let mut done = 0;
        while done < length {
            match self.0.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break, // the end of the file, behind which everything is zero
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(buffer)
    }

    async fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        next_data(&self.0, offset)
    }

    async fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn takes_space_back(&self) -> bool {
        takes_space_back(&self.0)
    }
}
