//! How the kernel's drivers read the file systems that are trimmed or resized.
//!
//! The content of an image is anybody's. So the type is always passed, the options are those that a driver
//! needs, and none of them can have a file system stop the machine.

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
    /// Whether it trims only while the file system can be written.
    pub(super) trims_writable: bool,
    /// Whether the bytes to be trimmed are those of the device. Otherwise all is trimmed at once.
    pub(super) trims_parts: bool,
}

const PLAIN: Driver = Driver { name: "", flags: &[], values: &[], trims_writable: false, trims_parts: true };

/// Its superblock may ask for a panic when an error is found.
const EXT4: Driver = Driver { name: "ext4", values: &[("errors", "remount-ro")], ..PLAIN };

/// The host may have the same file system mounted: an image is often a copy.
const XFS: Driver = Driver { name: "xfs", flags: &["nouuid"], ..PLAIN };

const BTRFS: Driver = Driver { name: "btrfs", flags: &["skip_balance"], trims_parts: false, ..PLAIN };

/// Where it discards by itself, it leaves a trim to later.
const F2FS: Driver = Driver { name: "f2fs", flags: &["nodiscard"], trims_writable: true, ..PLAIN };

/// It trims only where it may discard.
const NTFS: Driver = Driver { name: "ntfs3", flags: &["discard"], ..PLAIN };

const VFAT: Driver = Driver { name: "vfat", ..PLAIN };

/// The driver of a file system of this kind, if it is one that is mounted here.
pub(super) fn of(kind: VolumeKind) -> Option<&'static Driver> {
    match kind {
        VolumeKind::Ext2 | VolumeKind::Ext3 | VolumeKind::Ext4 => Some(&EXT4),
        VolumeKind::Xfs => Some(&XFS),
        VolumeKind::Btrfs => Some(&BTRFS),
        VolumeKind::F2fs => Some(&F2FS),
        VolumeKind::Ntfs => Some(&NTFS),
        VolumeKind::Vfat => Some(&VFAT),
        VolumeKind::Refs
        | VolumeKind::Exfat
        | VolumeKind::Swap
        | VolumeKind::Luks
        | VolumeKind::Lvm2
        | VolumeKind::Bitlocker => None,
    }
}
