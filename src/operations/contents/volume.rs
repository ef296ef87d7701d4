//! What a partition, or a disk without partitions, holds.

use schemars::JsonSchema;
use serde::Serialize;
use uuid::Uuid;

/// A file system, swap space, or a layer that hides what it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Volume {
    /// What it is.
    pub kind: VolumeKind,
    /// Which form of it, where there are several.
    pub version: Option<&'static str>,
    /// The name that its owner gave it.
    pub label: Option<String>,
    /// What distinguishes it from others, as `blkid` writes it.
    pub uuid: Option<String>,
    /// Its length by its own account, bytes; unknown where it does not say.
    pub size: Option<u64>,
    /// Whether it was left in order.
    pub journal: Journal,
    /// Whether it says that a part of it is on other devices: F2FS and ext name these themselves, and the
    /// kernel opens them when it mounts the volume.
    #[serde(skip)]
    pub other_devices: bool,
}

/// The kinds of volumes that are recognised. Serialised in small letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum VolumeKind {
    /// Linux, without a journal.
    Ext2,
    /// Linux, with a journal.
    Ext3,
    /// Linux, with extents and others of its features.
    Ext4,
    /// Linux.
    Xfs,
    /// Linux.
    Btrfs,
    /// Linux, for flash memory.
    F2fs,
    /// Windows.
    Ntfs,
    /// Windows, for servers.
    Refs,
    /// FAT with 12, 16 or 32 bits; the version says which.
    Vfat,
    /// The successor of FAT.
    Exfat,
    /// Linux swap space.
    Swap,
    /// Linux, encrypted.
    Luks,
    /// A physical volume of Linux' volume manager.
    Lvm2,
    /// Windows, encrypted.
    Bitlocker,
}

impl VolumeKind {
    /// As `blkid` and `mount` write it, in small letters.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ext2 => "ext2",
            Self::Ext3 => "ext3",
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::F2fs => "f2fs",
            Self::Ntfs => "ntfs",
            Self::Refs => "refs",
            Self::Vfat => "vfat",
            Self::Exfat => "exfat",
            Self::Swap => "swap",
            Self::Luks => "luks",
            Self::Lvm2 => "lvm2",
            Self::Bitlocker => "bitlocker",
        }
    }
}

/// Whether a volume was left in order. Mounting one that was not replays its journal, or repairs it: the
/// volume changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Journal {
    /// It was unmounted cleanly.
    Clean,
    /// It was not: it is mounted somewhere, its machine crashed or is hibernated, or errors were found in it.
    Dirty,
    /// It does not show: its state lies deeper (XFS, F2FS), or it hides what it holds.
    Unknown,
}

impl Journal {
    /// What a flag says.
    pub(super) fn dirty(flag: bool) -> Self {
        if flag { Self::Dirty } else { Self::Clean }
    }
}

impl Volume {
    /// A volume of which nothing else is known yet.
    pub(super) fn new(kind: VolumeKind) -> Self {
        Self {
            kind,
            version: None,
            label: None,
            uuid: None,
            size: None,
            journal: Journal::Unknown,
            other_devices: false,
        }
    }
}

/// The UUID with these bytes; nothing if all are zero.
pub(super) fn uuid(bytes: [u8; 16]) -> Option<String> {
    let uuid = Uuid::from_bytes(bytes);
    (!uuid.is_nil()).then(|| uuid.to_string())
}
