//! The file systems and the swap space of Linux, by their superblocks.

use super::area::{array, be64, has, le16, le32, le64, text, wide_text};
use super::volume::{Journal, Volume, VolumeKind, uuid};

/// Where ext and F2FS have their superblocks.
const SUPERBLOCK: usize = 1024;

/// What an ext3 may have: file types, a journal to be replayed, meta block groups.
const EXT3_INCOMPATIBLE: u32 = 0x2 | EXT_NEEDS_RECOVERY | 0x10;

/// What an ext3 may have: sparse superblocks, large files, trees as directories.
const EXT3_READ_ONLY: u32 = 0x1 | 0x2 | 0x4;

const EXT_HAS_JOURNAL: u32 = 0x4;
const EXT_NEEDS_RECOVERY: u32 = 0x4;
const EXT_JOURNAL_DEVICE: u32 = 0x8;
const EXT_64_BIT: u32 = 0x80;
const EXT_VALID: u16 = 1;
const EXT_ERRORS: u16 = 2;

/// An ext2, ext3 or ext4.
pub(super) fn ext(head: &[u8]) -> Option<Volume> {
    let block = head.get(SUPERBLOCK..)?;
    let [compatible, incompatible, read_only] = [0x5c, 0x60, 0x64].map(|at| le32(block, at));
    let (compatible, incompatible, read_only) = (compatible?, incompatible?, read_only?);
    let block_size_log = le32(block, 0x18).filter(|&log| log <= 6)?;
    if le16(block, 0x38)? != 0xef53 || incompatible & EXT_JOURNAL_DEVICE != 0 {
        return None;
    }
    let high = if incompatible & EXT_64_BIT == 0 { 0 } else { u64::from(le32(block, 0x150)?) };
    let blocks = high << 32 | u64::from(le32(block, 4)?);
    let kind = if incompatible & !EXT3_INCOMPATIBLE != 0 || read_only & !EXT3_READ_ONLY != 0 {
        VolumeKind::Ext4
    } else if compatible & EXT_HAS_JOURNAL != 0 {
        VolumeKind::Ext3
    } else {
        VolumeKind::Ext2
    };
    let has_journal = compatible & EXT_HAS_JOURNAL != 0;
    // While it is mounted, one without a journal is not valid; one with a journal is, and has to recover.
    let state = le16(block, 0x3a)?;
    let dirty = incompatible & EXT_NEEDS_RECOVERY != 0
        || state & EXT_ERRORS != 0
        || !has_journal && state & EXT_VALID == 0;
    Some(Volume {
        label: text(block, 0x78, 16),
        uuid: uuid(array(block, 0x68)?),
        size: blocks.checked_mul(1024 << block_size_log),
        journal: Journal::dirty(dirty),
        // A journal that is no file of its own is a device, which the superblock names by number.
        other_devices: has_journal && le32(block, 0xe0)? == 0,
        ..Volume::new(kind)
    })
}

/// An XFS. Whether its log is empty shows only in the log itself.
pub(super) fn xfs(head: &[u8]) -> Option<Volume> {
    let block_size = u64::from(u32::from_be_bytes(array(head, 4)?));
    if !has(head, 0, b"XFSB") || !block_size.is_power_of_two() || !(512..=65536).contains(&block_size) {
        return None;
    }
    Some(Volume {
        label: text(head, 108, 12),
        uuid: uuid(array(head, 32)?),
        size: be64(head, 8)?.checked_mul(block_size),
        ..Volume::new(VolumeKind::Xfs)
    })
}

/// A btrfs, or one device of it: the size is this device's.
pub(super) fn btrfs(head: &[u8]) -> Option<Volume> {
    let block = head.get(64 << 10..)?;
    if !has(block, 64, b"_BHRfS_M") {
        return None;
    }
    Some(Volume {
        label: text(block, 299, 256),
        uuid: uuid(array(block, 32)?),
        size: le64(block, 209),
        journal: Journal::dirty(le64(block, 96)? != 0),
        other_devices: le64(block, 136)? != 1,
        ..Volume::new(VolumeKind::Btrfs)
    })
}

const F2FS_MAGIC: u32 = 0xf2f5_2010;

/// Where a copy of F2FS' superblock may be, beside the first: in the second block, and a block has the length
/// of a page. The kernel takes any copy that is sound.
const F2FS_COPIES: [usize; 4] = [0, 4 << 10, 16 << 10, 64 << 10];

/// Where the superblock has the paths of devices, how many, and how far apart.
const F2FS_DEVICES: usize = 2201;
const F2FS_MAX_DEVICES: usize = 8;
const F2FS_DEVICE_BYTES: usize = 68;

/// Whether a superblock at the start of an F2FS names devices by path.
fn f2fs_names_devices(head: &[u8]) -> bool {
    let copies = F2FS_COPIES.iter().filter_map(|at| head.get(at + SUPERBLOCK..));
    let mut copies = copies.filter(|block| le32(block, 0) == Some(F2FS_MAGIC));
    copies.any(|block| {
        let paths = block.get(F2FS_DEVICES..).unwrap_or_default().chunks(F2FS_DEVICE_BYTES);
        paths.take(F2FS_MAX_DEVICES).any(|path| path[0] != 0)
    })
}

/// An F2FS. Whether it was unmounted cleanly shows only in its checkpoints.
pub(super) fn f2fs(head: &[u8]) -> Option<Volume> {
    let block = head.get(SUPERBLOCK..)?;
    let block_size_log = le32(block, 16).filter(|&log| (9..=16).contains(&log))?;
    if le32(block, 0)? != F2FS_MAGIC {
        return None;
    }
    Some(Volume {
        label: wide_text(block, 124, 1024),
        uuid: uuid(array(block, 108)?),
        size: le64(block, 36)?.checked_mul(1 << block_size_log),
        other_devices: f2fs_names_devices(head),
        ..Volume::new(VolumeKind::F2fs)
    })
}

/// What ends the first page of swap space: in use as such, and with a machine that sleeps in it.
const SWAP: [(&[u8; 10], bool); 6] = [
    (b"SWAPSPACE2", false),
    (b"SWAP-SPACE", false),
    (b"S1SUSPEND\0", true),
    (b"S2SUSPEND\0", true),
    (b"ULSUSPEND\0", true),
    (b"LINHIB0001", true),
];

/// Swap space, in pages of any size that Linux has had.
pub(super) fn swap(head: &[u8]) -> Option<Volume> {
    let magic = |page: &usize| {
        let found = SWAP.iter().find(|(magic, _)| has(head, page - magic.len(), *magic));
        found.map(|(_, sleeps)| (*page, *sleeps))
    };
    let (page, sleeps) = [4096, 8192, 16384, 32768, 65536].iter().find_map(magic)?;
    Some(Volume {
        label: text(head, 1052, 16),
        uuid: uuid(array(head, 1036)?),
        size: Some((u64::from(le32(head, 1028)?) + 1) * page as u64),
        journal: Journal::dirty(sleeps),
        ..Volume::new(VolumeKind::Swap)
    })
}

/// A LUKS header. How long the volume is, its device says.
pub(super) fn luks(head: &[u8]) -> Option<Volume> {
    let (version, label) = match array(head, 6).map(u16::from_be_bytes)? {
        1 => ("1", None),
        2 => ("2", text(head, 24, 48)),
        _ => return None,
    };
    has(head, 0, b"LUKS\xba\xbe").then(|| Volume {
        version: Some(version),
        label,
        uuid: text(head, 168, 40),
        ..Volume::new(VolumeKind::Luks)
    })
}

/// A physical volume, by the label in one of its first four sectors.
pub(super) fn lvm2(head: &[u8]) -> Option<Volume> {
    let is_label = |at: &usize| has(head, *at, b"LABELONE") && has(head, at + 24, b"LVM2 001");
    let label = [0, 512, 1024, 1536].into_iter().find(is_label)?;
    let header = label + usize::try_from(le32(head, label + 20)?).ok().filter(|&offset| offset <= 480)?;
    let id = text(head, header, 32).filter(|id| id.is_ascii() && id.len() == 32);
    let parts = [0..6, 6..10, 10..14, 14..18, 18..22, 22..26, 26..32];
    Some(Volume {
        uuid: id.map(|id| parts.map(|part| &id[part]).join("-")),
        size: le64(head, header + 32),
        ..Volume::new(VolumeKind::Lvm2)
    })
}
