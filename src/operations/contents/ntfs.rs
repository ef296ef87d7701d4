//! NTFS, `ReFS` and `BitLocker`, by their boot sectors; NTFS also by its first files.
//!
//! NTFS is left in order if neither `$Volume` has its dirty bit nor `$LogFile` an open client: a hibernated
//! Windows leaves the latter.

use super::ReadAt;
use super::area::{Area, array, has, le16, le32, le64, wide_text};
use super::volume::{Journal, Volume, VolumeKind};
use crate::error::Result;

/// The numbers of two files.
const LOG_FILE: u64 = 2;
const VOLUME: u64 = 3;

/// The types of three attributes.
const VOLUME_NAME: u32 = 0x60;
const VOLUME_INFORMATION: u32 = 0x70;
const DATA: u32 = 0x80;

/// A file record lies in whole units of 512 bytes, the last two bytes of each kept elsewhere.
const STRIDE: usize = 512;

/// What begins the header of a `BitLocker` volume that other systems take for FAT.
const BITLOCKER_TO_GO: [u8; 16] =
    [0x3b, 0xd6, 0x67, 0x49, 0x29, 0x2e, 0xd8, 0x4a, 0x83, 0x99, 0xf6, 0xa3, 0x39, 0xe3, 0xd0, 0x01];

/// A volume under `BitLocker`.
pub(super) fn bitlocker(head: &[u8]) -> Option<Volume> {
    let is_fixed = has(head, 3, b"-FVE-FS-");
    let is_to_go = has(head, 3, b"MSWIN4.1") && has(head, 424, &BITLOCKER_TO_GO);
    (is_fixed || is_to_go).then(|| Volume::new(VolumeKind::Bitlocker))
}

/// A `ReFS`.
pub(super) fn refs(head: &[u8]) -> Option<Volume> {
    if !has(head, 3, b"ReFS\0\0\0\0") {
        return None;
    }
    let size = le64(head, 24)?.checked_mul(le32(head, 32)?.into());
    Some(Volume { size, ..Volume::new(VolumeKind::Refs) })
}

/// An NTFS. What its files do not say stays unknown.
///
/// # Errors
///
/// Those of reading the disk.
pub(super) async fn ntfs<R: ReadAt>(area: &Area<'_, R>, head: &[u8]) -> Result<Option<Volume>> {
    let Some(boot) = Boot::parse(head) else { return Ok(None) };
    let mut volume = Volume {
        uuid: Some(format!("{:016X}", boot.serial)),
        size: boot.size,
        ..Volume::new(VolumeKind::Ntfs)
    };
    let Some(record) = boot.file(area, VOLUME).await? else { return Ok(Some(volume)) };
    volume.label = resident(&record, VOLUME_NAME).and_then(|name| wide_text(name, 0, name.len()));
    let Some(flags) = resident(&record, VOLUME_INFORMATION).and_then(|found| le16(found, 10)) else {
        return Ok(Some(volume));
    };
    volume.journal = match boot.log_is_clean(area).await? {
        _ if flags & 1 != 0 => Journal::Dirty,
        Some(clean) => Journal::dirty(!clean),
        None => Journal::Unknown,
    };
    Ok(Some(volume))
}

/// What the boot sector says.
struct Boot {
    cluster: u64,
    record: usize,
    files: u64,
    serial: u64,
    size: Option<u64>,
}

impl Boot {
    fn parse(head: &[u8]) -> Option<Self> {
        if !has(head, 3, b"NTFS    ") {
            return None;
        }
        let sector = le16(head, 11).map(u64::from).filter(|size| size.is_power_of_two())?;
        let sectors = match *head.get(13)? {
            few @ 1..=0x80 => u64::from(few),
            many => 1_u64.checked_shl(256 - u32::from(many))?,
        };
        let cluster = (sector * sectors.min(1 << 20)).min(2 << 20);
        let record = match i8::from_le_bytes(array(head, 64)?) {
            clusters @ 1.. => cluster.checked_mul(clusters.unsigned_abs().into())?,
            log => 1_u64.checked_shl(log.unsigned_abs().into())?,
        };
        let record = usize::try_from(record).ok().filter(|size| (STRIDE..=65536).contains(size))?;
        let files = le64(head, 48)?.checked_mul(cluster)?;
        // The copy of the boot sector behind the file system belongs to it.
        let size = le64(head, 40)?.checked_add(1).and_then(|sectors| sectors.checked_mul(sector));
        Some(Self { cluster, record, files, serial: le64(head, 72)?, size })
    }

    /// The record of a file, if it is whole.
    async fn file<R: ReadAt>(&self, area: &Area<'_, R>, number: u64) -> Result<Option<Vec<u8>>> {
        assert!((STRIDE..=65536).contains(&self.record), "a boot sector that was parsed");
        let Some(at) = self.files.checked_add(number * self.record as u64) else { return Ok(None) };
        Ok(whole(area.read(at, self.record).await?))
    }

    /// Whether no program has the log open, if that can be found out.
    async fn log_is_clean<R: ReadAt>(&self, area: &Area<'_, R>) -> Result<Option<bool>> {
        let Some(record) = self.file(area, LOG_FILE).await? else { return Ok(None) };
        let first = attribute(&record, DATA).and_then(first_cluster);
        let Some(at) = first.and_then(|cluster| cluster.checked_mul(self.cluster)) else { return Ok(None) };
        Ok(is_closed(&area.read(at, 4096).await?))
    }
}

/// The record in `bytes`, with what was kept elsewhere back in its places.
fn whole(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let (kept, count) = (usize::from(le16(&bytes, 4)?), usize::from(le16(&bytes, 6)?));
    if !has(&bytes, 0, b"FILE") || count != bytes.len() / STRIDE + 1 {
        return None;
    }
    let number: [u8; 2] = array(&bytes, kept)?;
    for unit in 1..count {
        let end = unit * STRIDE;
        let right: [u8; 2] = array(&bytes, kept + 2 * unit)?;
        let place = bytes.get_mut(end - 2..end)?;
        if place != number {
            return None;
        }
        place.copy_from_slice(&right);
    }
    Some(bytes)
}

/// The first attribute of `kind` in a file record.
fn attribute(record: &[u8], kind: u32) -> Option<&[u8]> {
    let mut at = usize::from(le16(record, 20)?);
    loop {
        let length = usize::try_from(le32(record, at + 4)?).ok().filter(|&length| length >= 24)?;
        let found = record.get(at..at.checked_add(length)?)?;
        match le32(found, 0)? {
            u32::MAX => return None,
            this if this == kind => return Some(found),
            _ => at += length,
        }
    }
}

/// The content of an attribute that is in its record.
fn resident(record: &[u8], kind: u32) -> Option<&[u8]> {
    let found = attribute(record, kind).filter(|found| found[8] == 0)?;
    let at = usize::from(le16(found, 20)?);
    found.get(at..at.checked_add(usize::try_from(le32(found, 16)?).ok()?)?)
}

/// Where an attribute begins that is outside of its record.
fn first_cluster(found: &[u8]) -> Option<u64> {
    let runs = found.get(usize::from(le16(found, 32).filter(|_| found[8] != 0)?)..)?;
    let (of_length, of_offset) = (usize::from(runs.first()? & 15), usize::from(runs.first()? >> 4));
    let offset = runs.get(1 + of_length..)?.get(..of_offset)?;
    if !(1..=7).contains(&of_offset) || offset[of_offset - 1] > 0x7f {
        return None;
    }
    let mut cluster = [0; 8];
    cluster[..of_offset].copy_from_slice(offset);
    Some(u64::from_le_bytes(cluster))
}

/// Whether the log with this first page is closed.
fn is_closed(page: &[u8]) -> Option<bool> {
    if !page.is_empty() && page.iter().all(|&byte| byte == 0xff) {
        return Some(true); // it was emptied
    }
    if !has(page, 0, b"RSTR") {
        return None;
    }
    let area = page.get(usize::from(le16(page, 24)?)..)?;
    let (clients, flags) = (le16(area, 12)?, le16(area, 14)?);
    Some(clients == u16::MAX || flags & 2 != 0)
}
