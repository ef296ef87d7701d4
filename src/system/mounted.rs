//! A mount that no other process sees.
//!
//! It has no place in any tree of mounts, so there is nothing to find for a process of the host, and nothing
//! to clean up: it ends with its descriptors, at the latest with this process.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};
use uuid::Uuid;

use super::btrfs;
use super::driver::Driver;
use crate::device::{btrfs_devices, device_number, trim_file_system};
use crate::disk::Access;

/// A mounted file system. Dropping it unmounts it.
pub(super) struct Mounted(OwnedFd);

/// Why a file system is not mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The kernel does not have the driver.
    NoDriver,
    /// The driver does not mount it.
    Mount(Errno),
    /// The driver has put it together with other devices.
    OtherDevices,
}

impl Refusal {
    /// As users read it: why the file system is left alone.
    pub(super) fn reason(self, driver: &Driver) -> String {
        match self {
            Self::NoDriver => format!("this kernel does not have {}", driver.name),
            Self::Mount(Errno::ROFS) => {
                "its journal must be replayed: shut its system down cleanly, or mount it once".into()
            }
            Self::OtherDevices => {
                "this machine has other devices with the same identifier, which the kernel takes for parts \
                 of it"
                    .into()
            }
            Self::Mount(errno) => {
                format!("the kernel's {} does not mount it: {}", driver.name, io::Error::from(errno))
            }
        }
    }
}

impl Mounted {
    /// Has `driver` mount what is on the block device at `node`, and on no other. Nothing on it can be run,
    /// and no node or link on it leads anywhere.
    pub(super) fn mount(driver: &Driver, node: &Path, access: Access) -> Result<Self, Refusal> {
        let context = fsopen(driver.name, FsOpenFlags::FSOPEN_CLOEXEC).map_err(|errno| match errno {
            Errno::NODEV => Refusal::NoDriver,
            errno => Refusal::Mount(errno),
        })?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW
            | MountAttrFlags::MOUNT_ATTR_NOATIME;
        let mount = || -> rustix::io::Result<Self> {
            fsconfig_set_string(&context, "source", node)?;
            if access == Access::ReadOnly {
                fsconfig_set_flag(&context, "ro")?;
            }
            driver.flags.iter().try_for_each(|flag| fsconfig_set_flag(&context, *flag))?;
            driver.values.iter().try_for_each(|(key, value)| fsconfig_set_string(&context, *key, *value))?;
            fsconfig_create(&context)?;
            Ok(Self(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?))
        };
        let failed = |error| Refusal::Mount(Errno::from_io_error(&error).unwrap_or(Errno::IO));
        if driver.joins_devices && btrfs::has_other_devices(node, 0).map_err(failed)? {
            return Err(Refusal::OtherDevices);
        }
        let mounted = mount().map_err(Refusal::Mount)?;
        // Another device may have come since.
        if driver.joins_devices && !mounted.is_on_one_device(node).map_err(failed)? {
            return Err(Refusal::OtherDevices);
        }
        Ok(mounted)
    }

    /// Whether this btrfs has no other device than `node`. Its superblock alone does not say so: the kernel
    /// joins all devices with one identifier, and may even have mounted another one of them.
    fn is_on_one_device(&self, node: &Path) -> io::Result<bool> {
        let (id, count) = btrfs_devices(self.root()?)?;
        let folder = format!("/sys/fs/btrfs/{}/devices", Uuid::from_bytes(id));
        let mut devices = fs::read_dir(folder)?;
        let (Some(first), None) = (devices.next(), devices.next()) else { return Ok(false) };
        let number = fs::read_to_string(first?.path().join("dev"))?;
        Ok(count == 1 && number.trim() == device_number(fs::metadata(node)?.rdev()))
    }

    fn root(&self) -> io::Result<OwnedFd> {
        Ok(openat(&self.0, ".", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// Gives it a place in the mount namespace of this thread, where it stays until it is unmounted.
    pub(super) fn attach(self, folder: &Path) -> rustix::io::Result<()> {
        move_mount(&self.0, "", CWD, folder, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
    }

    /// Has it discard what is free in `length` bytes at `start`; how many bytes it says that it discarded.
    pub(super) fn trim(&self, start: u64, length: u64) -> io::Result<u64> {
        trim_file_system(self.root()?, start, length)
    }
}
