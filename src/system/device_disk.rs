//! What is on a block device, as [`contents`] reads it.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::ioctl_blksszget;

use crate::disk::{Access, BlockDevice};
use crate::error::{Doing, Locate, Result};
use crate::machine;
use crate::operations::contents::{self, Contents, ReadAt};

/// Of the file that a test has in the place of a device.
const SECTOR_BYTES_OF_FILES: u32 = 512;

/// An open block device. While it is open, the device is in use.
pub struct DeviceDisk {
    device: BlockDevice,
    sector_bytes: u32,
}

impl DeviceDisk {
    /// Opens the device at `path` for reading.
    ///
    /// # Errors
    ///
    /// The operating system's.
    pub fn open(path: &Path) -> Result<Self> {
        let device = BlockDevice::open(&machine::node(path), Access::ReadOnly)?;
        let sector_bytes = match machine::folder() {
            None => ioctl_blksszget(device.file()).doing("reading the sector size").file(path)?,
            Some(_) => SECTOR_BYTES_OF_FILES,
        };
        Ok(Self { device, sector_bytes })
    }

    /// Has what was written to it, and discarded, become durable.
    ///
    /// # Errors
    ///
    /// The operating system's.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.device.file().sync_all()
    }

    /// Size of a logical sector, bytes.
    pub fn sector_bytes(&self) -> u32 {
        self.sector_bytes
    }

    /// What is on it.
    pub fn contents(&self) -> Contents {
        smol::future::block_on(contents::find(self))
    }
}

impl ReadAt for DeviceDisk {
    fn size(&self) -> u64 {
        self.device.length()
    }

    fn sector_size(&self) -> u32 {
        self.sector_bytes
    }

    async fn read_at(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        let read = self.device.file().read_exact_at(bytes, from);
        read.doing("reading the device").at(from).file(self.device.path())
    }
}
