//! A part of a disk, and the numbers in its bytes.
//!
//! Every read is clipped to the part, and every number is asked for by an offset that may lie outside: what
//! is not there is `None`, and no structure can lead a reader elsewhere.

use super::ReadAt;
use crate::error::Result;
use crate::format::index;

/// Consecutive bytes of a disk: all of it, or a partition.
pub(super) struct Area<'a, R> {
    disk: &'a R,
    start: u64,
    length: u64,
}

impl<'a, R: ReadAt> Area<'a, R> {
    /// All of `disk`.
    pub(super) fn whole(disk: &'a R) -> Self {
        Self { disk, start: 0, length: disk.size() }
    }

    /// As much of `length` bytes at `start` as the disk has.
    pub(super) fn part(disk: &'a R, start: u64, length: u64) -> Self {
        let start = start.min(disk.size());
        let length = length.min(disk.size() - start);
        assert!(start + length <= disk.size(), "the part lies in the disk");
        Self { disk, start, length }
    }

    /// How long it is, bytes.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// The disk's logical sector, bytes.
    pub(super) fn sector_size(&self) -> u64 {
        self.disk.sector_size().into()
    }

    /// As many of `length` bytes at `at` as there are.
    pub(super) async fn read(&self, at: u64, length: usize) -> Result<Vec<u8>> {
        let from = self.start + at.min(self.length);
        let end = from.saturating_add(length as u64).min(self.start + self.length);
        if from == end {
            return Ok(Vec::new());
        }
        let sector = self.sector_size();
        let first = from - from % sector;
        let mut bytes = vec![0; index(end.next_multiple_of(sector).min(self.disk.size()) - first)];
        self.disk.read_at(first, &mut bytes).await?;
        bytes.truncate(index(end - first));
        Ok(bytes.split_off(index(from - first)))
    }
}

/// The `N` bytes at `at`.
pub(super) fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// The little-endian number at `at`.
pub(super) fn le16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

/// The little-endian number at `at`.
pub(super) fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

/// The little-endian number at `at`.
pub(super) fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_le_bytes)
}

/// The big-endian number at `at`.
pub(super) fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    array(bytes, at).map(u64::from_be_bytes)
}

/// Whether `magic` is at `at`.
pub(super) fn has(bytes: &[u8], at: usize, magic: &[u8]) -> bool {
    bytes.get(at..).is_some_and(|rest| rest.starts_with(magic))
}

/// The text in the field of `length` bytes at `at`, up to its first zero and without spaces around; nothing
/// if it is empty.
pub(super) fn text(bytes: &[u8], at: usize, length: usize) -> Option<String> {
    let field = bytes.get(at..at.checked_add(length)?)?;
    let field = field.split(|&byte| byte == 0).next().unwrap_or_default();
    named(&String::from_utf8_lossy(field))
}

/// The UTF-16 text in the field of `length` bytes at `at`, as [`text`].
pub(super) fn wide_text(bytes: &[u8], at: usize, length: usize) -> Option<String> {
    let field = bytes.get(at..at.checked_add(length)?)?;
    let units = field.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
    let units: Vec<u16> = units.take_while(|&unit| unit != 0).collect();
    named(&String::from_utf16_lossy(&units))
}

fn named(text: &str) -> Option<String> {
    let text = text.trim_matches(' ');
    (!text.is_empty()).then(|| text.to_owned())
}
