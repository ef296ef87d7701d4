//! Reading the BAT: every entry checked, and the space that it names taken.

use std::ops::Range;

use super::block_map::BlockMap;
use super::space::{Extent, Space};
use super::view::{CUT_SHORT, View};
use crate::disk::{PAGE_BYTES, ReadDisk};
use crate::error::{Error, Kind, Result};
use crate::format::MIB;
use crate::format::bat::{
    BITMAP_BLOCK_SIZE, BatEntry, BitmapState, ENTRY_SIZE, Geometry, PayloadState, Role,
};

/// How much of the BAT is read or written at a time, bytes.
pub(super) const BAT_CHUNK_BYTES: u64 = MIB;

/// The map that the BAT in `bat` is, of a file of `file_length` bytes, and the slots that the file stores,
/// ascending. What blocks occupy is taken from `space`.
pub(super) async fn read_bat<D: ReadDisk>(
    file: &View<'_, D>,
    geometry: Geometry,
    bat: Extent,
    file_length: u64,
    space: &mut Space,
) -> Result<(BlockMap, Vec<Range<u64>>)> {
    if geometry.bat_length() > bat.length {
        let message = format!("has {} bytes, the disk needs {}", bat.length, geometry.bat_length());
        return Err(Error::corrupt("BAT", message).at(bat.offset));
    }
    let map = BlockMap::empty(geometry);
    let mut stored: Vec<Range<u64>> = Vec::new();
    let mut done = 0;
    while let Some(next) = file.next_stored(bat.offset + done).await? {
        // What lies between is a hole: slots that are all zero, as the map has them already.
        done = next - bat.offset;
        if done >= geometry.bat_length() {
            break;
        }
        let length = (geometry.bat_length() - done).min(BAT_CHUNK_BYTES).next_multiple_of(PAGE_BYTES as u64);
        let length = usize::try_from(length).expect("at most 1 MiB");
        let bytes = file.read("BAT", bat.offset + done, length).await?;
        let first = done / ENTRY_SIZE as u64;
        let past = (first + (length / ENTRY_SIZE) as u64).min(geometry.slot_count());
        assert!(past > first && past <= geometry.slot_count(), "slots {first} to {past} are in the BAT");
        let words = &bytes.as_chunks().0[..usize::try_from(past - first).expect("a chunk's")];
        take_words(first, words, &geometry, bat, file_length, space)?;
        map.restore(first, words);
        done += length as u64;
        assert!(stored.last().is_none_or(|last| last.end <= first), "slots are read in order");
        match stored.last_mut() {
            Some(last) if last.end == first => last.end = past,
            _ => stored.push(first..past),
        }
    }
    Ok((map, stored))
}

/// Checks BAT entries, those of the slots from `first` on, and takes the space they name.
fn take_words(
    first: u64,
    words: &[[u8; ENTRY_SIZE]],
    geometry: &Geometry,
    bat: Extent,
    file_length: u64,
    space: &mut Space,
) -> Result<()> {
    for ((slot, role), word) in geometry.walk(first..first + words.len() as u64).zip(words) {
        let entry = BatEntry::read(*word);
        if entry.0 != 0 {
            let taken = take_entry(entry, role, geometry, file_length, space);
            taken.map_err(|error| error.at(bat.offset + slot * ENTRY_SIZE as u64))?;
        }
    }
    Ok(())
}

/// Checks one BAT entry that is not all zero and takes the space it names.
#[inline]
fn take_entry(
    entry: BatEntry,
    role: Role,
    geometry: &Geometry,
    file_length: u64,
    space: &mut Space,
) -> Result<()> {
    let extent = match role {
        Role::Block(block) => checked_payload(entry, block, geometry)?,
        Role::Bitmap(chunk) if geometry.is_differencing() => checked_bitmap(entry, chunk)?,
        // Images exist whose unused slots hold garbage, or a bitmap no reader may use: it is kept, not
        // obeyed.
        Role::Bitmap(_) | Role::Nothing => None,
    };
    if let Some(extent) = extent {
        if extent.offset >= file_length {
            return Err(past_the_end(role, extent, file_length));
        }
        space.occupy(extent, "payload block").map_err(|error| of_role(role, &error))?;
    }
    Ok(())
}

#[cold]
fn past_the_end(role: Role, extent: Extent, file_length: u64) -> Error {
    let message = format!("{role} lies at byte {}, the file has {file_length} bytes", extent.offset);
    Error::new(Kind::Truncated, message).in_structure("BAT").remedy(CUT_SHORT)
}

#[cold]
fn of_role(role: Role, error: &Error) -> Error {
    let in_bat = Error::corrupt("BAT", format!("{role}: {error}"));
    match error.remedy_text() {
        Some(remedy) => in_bat.remedy(remedy),
        None => in_bat,
    }
}

#[inline]
pub(super) fn checked_payload(entry: BatEntry, block: u64, geometry: &Geometry) -> Result<Option<Extent>> {
    let wrong = |what: &str| Err(illegal(block, what));
    let Some(state) = entry.payload_state() else { return wrong("has the reserved state 4") };
    if entry.reserved_bits() != 0 {
        return wrong("has reserved bits set");
    }
    if state == PayloadState::PartiallyPresent && !geometry.is_differencing() {
        return wrong("says partially present, in an image without parent");
    }
    let extent = payload_extent(entry, geometry);
    if extent.is_some_and(|extent| extent.offset == 0) {
        return wrong("says present, at offset 0");
    }
    Ok(extent)
}

#[cold]
fn illegal(block: u64, what: &str) -> Error {
    Error::corrupt("BAT", format!("the entry of block {block} {what}"))
}

fn checked_bitmap(entry: BatEntry, chunk: u64) -> Result<Option<Extent>> {
    match entry.bitmap_state() {
        Some(BitmapState::NotPresent) => Ok(None),
        Some(BitmapState::Present) if entry.offset() != 0 => {
            Ok(Some(Extent { offset: entry.offset(), length: BITMAP_BLOCK_SIZE }))
        }
        _ => {
            let role = Role::Bitmap(chunk);
            Err(Error::corrupt("BAT", format!("{role} has an entry that is not legal")))
        }
    }
}

/// The space that a payload entry occupies: a present block's, or the old contents that an undefined or
/// unmapped one still names.
#[inline]
pub fn payload_extent(entry: BatEntry, geometry: &Geometry) -> Option<Extent> {
    let names_space = match entry.payload_state() {
        Some(PayloadState::FullyPresent | PayloadState::PartiallyPresent) => true,
        Some(PayloadState::Undefined | PayloadState::Unmapped) => entry.offset() != 0,
        Some(PayloadState::NotPresent | PayloadState::Zero) | None => false,
    };
    names_space.then(|| Extent { offset: entry.offset(), length: geometry.block_size() })
}
