//! How the kernel's drivers read the file systems that are trimmed or resized.
//!
//! The content of an image is anybody's. So the type is always passed, the options are those that a driver
//! needs, and none of them can have a file system stop the machine. A file system that leads its driver to
//! other devices of the host is not mounted here.

use crate::operations::contents::VolumeKind;

/// A driver, and what it needs to be told.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Driver {
    /// The type that it has for mount(2).
    pub(super) name: &'static str,
    /// Options without a value.
    pub(super) flags: &'static [&'static str],
    /// Options with one.
    pub(super) values: &'static [(&'static str, &'static str)],
    /// Whether the bytes to be trimmed are those of the device. Otherwise all is trimmed at once.
    pub(super) trims_parts: bool,
    /// Whether it takes other devices that the kernel has seen for parts of the same file system.
    pub(super) joins_devices: bool,
}

const PLAIN: Driver = Driver { name: "", flags: &[], values: &[], trims_parts: true, joins_devices: false };

/// Its superblock may ask for a panic when an error is found.
const EXT4: Driver = Driver { name: "ext4", values: &[("errors", "remount-ro")], ..PLAIN };

/// The host may have the same file system mounted: an image is often a copy.
const XFS: Driver = Driver { name: "xfs", flags: &["nouuid"], ..PLAIN };

const BTRFS: Driver =
    Driver { name: "btrfs", flags: &["skip_balance"], trims_parts: false, joins_devices: true, ..PLAIN };

/// It trims only where it may discard.
const NTFS: Driver = Driver { name: "ntfs3", flags: &["discard"], ..PLAIN };

const VFAT: Driver = Driver { name: "vfat", ..PLAIN };

/// The driver of a file system of this kind, if it is one that is mounted here.
pub(super) fn of(kind: VolumeKind) -> Option<&'static Driver> {
    match kind {
        VolumeKind::Ext2 | VolumeKind::Ext3 | VolumeKind::Ext4 => Some(&EXT4),
        VolumeKind::Xfs => Some(&XFS),
        VolumeKind::Btrfs => Some(&BTRFS),
        VolumeKind::Ntfs => Some(&NTFS),
        VolumeKind::Vfat => Some(&VFAT),
        // F2FS opens the devices whose paths are in its superblock.
        VolumeKind::F2fs
        | VolumeKind::Refs
        | VolumeKind::Exfat
        | VolumeKind::Swap
        | VolumeKind::Luks
        | VolumeKind::Lvm2
        | VolumeKind::Bitlocker => None,
    }
}

/// Why a volume of this kind that has a part on other devices is left alone: its driver would open these, and
/// they belong to the host.
pub(super) fn why_alone(kind: VolumeKind) -> &'static str {
    match kind {
        VolumeKind::Ext2 | VolumeKind::Ext3 | VolumeKind::Ext4 => "its journal is on another device",
        VolumeKind::F2fs => "it names them by path",
        _ => "it is one of several devices of a file system",
    }
}
