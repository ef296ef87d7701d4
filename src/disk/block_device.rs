//! A block device of this machine, as a disk without a format around it.
//!
//! It is examined before it is opened, as a regular file is. One that is written is opened exclusively: the
//! kernel then refuses a device that is mounted, swapped to or part of another device, and refuses all that
//! while it is open.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::Access;
use super::refusal::without_proc;
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::machine;

/// An open block device.
#[derive(Debug)]
pub struct BlockDevice {
    file: File,
    path: PathBuf,
    number: u64,
    length: u64,
    sector_size: u32,
}

impl BlockDevice {
    /// Whether `path` leads to a block device.
    pub fn is_at(path: &Path) -> bool {
        std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device())
    }

    /// Opens the block device at `path`.
    ///
    /// # Errors
    ///
    /// [`Kind::Unsupported`] for anything else; [`Kind::InUse`] if it is to be written and is mounted or used
    /// by another device; what the operating system says.
    pub fn open(path: &Path, access: Access) -> Result<Self> {
        const OPENING: &str = "opening the device";
        let found = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path);
        let found = found.doing("finding the device").file(path)?;
        let what = found.metadata().doing("examining the device").file(path)?;
        if !what.file_type().is_block_device() && machine::folder().is_none() {
            return Err(Error::new(Kind::Unsupported, "this is not a block device").file(path));
        }
        let link = link_to(&found);
        let write = access == Access::ReadWrite;
        let exclusive = if write { libc::O_EXCL } else { 0 };
        let opened = OpenOptions::new().read(true).write(write).custom_flags(exclusive).open(link);
        let mut file = match opened {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let error = Error::new(Kind::InUse, "the device is mounted, or another device uses it");
                return Err(error.file(path).remedy("lsblk shows its use: unmount or stop that first"));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(without_proc().file(path)),
            opened => opened.doing(OPENING).file(path)?,
        };
        let length = file.seek(SeekFrom::End(0)).doing("reading the size of the device").file(path)?;
        // A file, which has none, takes the place of a device in tests.
        let sector_size = rustix::fs::ioctl_blksszget(&file).unwrap_or(512);
        Ok(Self { file, path: path.to_owned(), number: what.rdev(), length, sector_size })
    }

    /// Whether it is mounted, or part of another device.
    pub fn is_in_use(&self) -> bool {
        // By its name another one could be opened, and there are devices to which that does something.
        Self::is_claimed(Path::new(&link_to(&self.file)))
    }

    /// Whether the kernel has claimed the block device at `path`, which leads to no other device.
    pub fn is_claimed(path: &Path) -> bool {
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(path);
        opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
    }

    /// The device, open.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its path, as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its number, which distinguishes it from all other devices.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Its size, bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Its logical sector, bytes: what partition tables on it count in.
    pub fn sector_size(&self) -> u32 {
        self.sector_size
    }
}

/// By which exactly this file is opened again.
fn link_to(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_a_block_device_is_one() {
        for path in ["/dev/null", "/"] {
            assert!(!BlockDevice::is_at(Path::new(path)));
            let error = BlockDevice::open(Path::new(path), Access::ReadWrite).expect_err("no block device");
            assert_eq!(error.kind(), Kind::Unsupported);
        }
        let missing = BlockDevice::open(Path::new("/no/such/device"), Access::ReadOnly);
        assert_eq!(missing.expect_err("missing").kind(), Kind::NotFound);
    }
}
