//! FAT and `exFAT`, by their boot sectors, the start of their FAT, and the label in their root folder.

use super::ReadAt;
use super::area::{Area, has, le16, le32, le64, text, wide_text};
use super::volume::{Journal, Volume, VolumeKind};
use crate::error::Result;

/// How much of a root folder is searched for the label.
const FOLDER_BYTES: usize = 32 << 10;

/// An entry of a folder, bytes.
const ENTRY: usize = 32;

/// The attribute of an entry that is the label, and the attributes of one that is a part of a long name.
const LABEL: u8 = 0x08;
const LONG_NAME: u8 = 0x0f;

/// The most clusters of FAT12 and FAT16.
const MOST_CLUSTERS_12: u64 = 4084;
const MOST_CLUSTERS_16: u64 = 65524;

/// What the boot sector of a FAT says.
struct Boot {
    sector: u64,
    reserved: u64,
    fats: u64,
    fat_sectors: u64,
    root_entries: u64,
    sectors: u64,
    sectors_per_cluster: u64,
}

impl Boot {
    fn parse(head: &[u8]) -> Option<Self> {
        let jumps = matches!(head.first()?, 0xeb | 0xe9) && has(head, 510, &[0x55, 0xaa]);
        let media = matches!(head.get(21)?, 0xf0 | 0xf8..);
        let size = |found: u64| found.is_power_of_two();
        let short = |at| le16(head, at).map(u64::from);
        let long = |at| le32(head, at).map(u64::from);
        let sector = short(11).filter(|&sector| size(sector) && (512..=4096).contains(&sector))?;
        let sectors_per_cluster = u64::from(*head.get(13)?);
        let fats = u64::from(*head.get(16)?);
        let sectors = if short(19)? > 0 { short(19)? } else { long(32)? };
        let fat_sectors = if short(22)? > 0 { short(22)? } else { long(36)? };
        let reserved = short(14)?;
        let is_sound =
            size(sectors_per_cluster) && (1..=2).contains(&fats) && reserved > 0 && fat_sectors > 0;
        let boot = Self {
            sector,
            reserved,
            fats,
            fat_sectors,
            root_entries: short(17)?,
            sectors,
            sectors_per_cluster,
        };
        (jumps && media && is_sound && boot.first_data() < sectors).then_some(boot)
    }

    fn root_sectors(&self) -> u64 {
        (self.root_entries * ENTRY as u64).div_ceil(self.sector)
    }

    fn first_root(&self) -> u64 {
        self.reserved + self.fats * self.fat_sectors
    }

    fn first_data(&self) -> u64 {
        self.first_root() + self.root_sectors()
    }

    fn clusters(&self) -> u64 {
        assert!(self.first_data() < self.sectors, "a boot sector that was parsed");
        (self.sectors - self.first_data()) / self.sectors_per_cluster
    }
}

/// A FAT with 12, 16 or 32 bits.
///
/// # Errors
///
/// Those of reading the disk.
pub(super) async fn vfat<R: ReadAt>(area: &Area<'_, R>, head: &[u8]) -> Result<Option<Volume>> {
    let Some(boot) = Boot::parse(head) else { return Ok(None) };
    let is_32 = le16(head, 22) == Some(0);
    let version = match boot.clusters() {
        _ if is_32 => "FAT32",
        clusters if clusters <= MOST_CLUSTERS_12 => "FAT12",
        clusters if clusters <= MOST_CLUSTERS_16 => "FAT16",
        _ => return Ok(None),
    };
    // Behind the fields that differ: the mark, the serial number, the label.
    let extended = if is_32 { 64 } else { 36 };
    let serial = le32(head, extended + 3).filter(|_| head.get(extended + 2) == Some(&0x29));
    let fat = area.read(boot.reserved * boot.sector, 8).await?;
    let (root, length) = if is_32 {
        let cluster = le32(head, 44).map_or(0, |cluster| u64::from(cluster).saturating_sub(2));
        (boot.first_data() + cluster * boot.sectors_per_cluster, boot.sectors_per_cluster * boot.sector)
    } else {
        (boot.first_root(), boot.root_sectors() * boot.sector)
    };
    let length = usize::try_from(length).unwrap_or(FOLDER_BYTES).min(FOLDER_BYTES);
    let folder = area.read(root * boot.sector, length).await?;
    Ok(Some(Volume {
        version: Some(version),
        label: label(&folder),
        uuid: serial.map(serial_text),
        size: boot.sectors.checked_mul(boot.sector),
        journal: Journal::dirty(
            head.get(extended + 1).is_some_and(|state| state & 1 != 0) || {
                // Windows has a bit in the entry that stands for no cluster, which Linux does not use.
                let (clean, entry) = match version {
                    "FAT32" => (1 << 27, le32(&fat, 4)),
                    "FAT16" => (1 << 15, le16(&fat, 2).map(u32::from)),
                    _ => (0, None),
                };
                entry.is_some_and(|entry| entry & clean != clean)
            },
        ),
        ..Volume::new(VolumeKind::Vfat)
    }))
}

/// The label in a root folder.
fn label(folder: &[u8]) -> Option<String> {
    let entries = folder.chunks_exact(ENTRY).take_while(|entry| entry[0] != 0);
    let is_label = |entry: &&[u8]| {
        let attributes = entry[11];
        attributes & LABEL != 0 && attributes & LONG_NAME != LONG_NAME
    };
    entries.filter(|entry| entry[0] != 0xe5).find(is_label).and_then(|entry| text(entry, 0, 11))
}

/// An `exFAT`.
///
/// # Errors
///
/// Those of reading the disk.
pub(super) async fn exfat<R: ReadAt>(area: &Area<'_, R>, head: &[u8]) -> Result<Option<Volume>> {
    let Some((mut volume, root, length)) = exfat_boot(head) else { return Ok(None) };
    let folder = area.read(root, length).await?;
    let entry = folder.chunks_exact(ENTRY).take_while(|entry| entry[0] != 0).find(|entry| entry[0] == 0x83);
    volume.label = entry.and_then(|entry| wide_text(entry, 2, 2 * usize::from(entry[1].min(11))));
    Ok(Some(volume))
}

/// What the boot sector of an `exFAT` says: the volume, and where how much of its root folder is.
fn exfat_boot(head: &[u8]) -> Option<(Volume, u64, usize)> {
    let sector = *head.get(108).filter(|log| (9..=12).contains(*log))?;
    let cluster = *head.get(109).filter(|log| **log <= 25 - sector)?;
    if !has(head, 3, b"EXFAT   ") || !has(head, 510, &[0x55, 0xaa]) {
        return None;
    }
    let first = u64::from(le32(head, 88)?);
    let root = first + (u64::from(le32(head, 96)?.checked_sub(2)?) << cluster);
    let length = FOLDER_BYTES.min(1 << (sector + cluster));
    let flags = le16(head, 106)?;
    let volume = Volume {
        uuid: le32(head, 100).map(serial_text),
        size: le64(head, 72)?.checked_mul(1 << sector),
        journal: Journal::dirty(flags & 2 != 0),
        ..Volume::new(VolumeKind::Exfat)
    };
    Some((volume, root << sector, length))
}

fn serial_text(serial: u32) -> String {
    format!("{:04X}-{:04X}", serial >> 16, serial & 0xffff)
}
