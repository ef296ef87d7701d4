//! Reading the BAT: every entry checked, and the space that it names taken.

use std::ops::Range;

use super::block_map::BlockMap;
use super::space::{Extent, Space};
use super::view::{CUT_SHORT, View};
use crate::disk::{PAGE_BYTES, ReadDisk};
use crate::error::{Error, Kind, Result};
use crate::format::MIB;
use crate::format::bat::{
    BITMAP_BLOCK_SIZE, BatEntry, BitmapState, ENTRY_SIZE, Geometry, PayloadState, Role, nonzero,
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
    for (at, mut words) in nonzero(words) {
        let mut slot = first + at as u64;
        while !words.is_empty() {
            let (run, rest) = words.split_at(run_length(words, geometry));
            if !take_run(slot, run, geometry, file_length, space) {
                let entries = geometry.walk(slot..slot + run.len() as u64).zip(run);
                for ((slot, role), entry) in entries.map(|(place, word)| (place, BatEntry::read(*word))) {
                    let taken = take_entry(entry, role, geometry, file_length, space);
                    taken.map_err(|error| error.at(bat.offset + slot * ENTRY_SIZE as u64))?;
                }
            }
            slot += run.len() as u64;
            words = rest;
        }
    }
    Ok(())
}

/// How many entries, from the first on, name space that follows the one before's; at least 1.
fn run_length(words: &[[u8; ENTRY_SIZE]], geometry: &Geometry) -> usize {
    let word = |at: usize| u64::from_le_bytes(words[at]);
    let follows = |at: &usize| word(*at - 1).checked_add(geometry.block_size()) == Some(word(*at));
    1 + (1..words.len()).take_while(follows).count()
}

/// Takes the space of a run of blocks at once, as far as they follow each other on the disk, too. Most files
/// have long runs, and to take a run costs what one block costs. If anything may be wrong with it, nothing is
/// taken: its entries are to be checked one by one.
fn take_run(
    slot: u64,
    words: &[[u8; ENTRY_SIZE]],
    geometry: &Geometry,
    file_length: u64,
    space: &mut Space,
) -> bool {
    let (Some(first), Some(last)) = (words.first(), words.last()) else { return false };
    // Between two blocks that are as far apart as their slots there is no slot of another kind.
    let apart = words.len() as u64 - 1;
    let blocks = geometry.block_of_slot(slot).zip(geometry.block_of_slot(slot + apart));
    if apart == 0 || blocks.is_none_or(|(first, last)| last - first != apart) {
        return false;
    }
    let (first, last) = (BatEntry::read(*first), BatEntry::read(*last));
    let is_present = first.payload_state() == Some(PayloadState::FullyPresent) && first.reserved_bits() == 0;
    let run = Extent { offset: first.offset(), length: words.len() as u64 * geometry.block_size() };
    // The last place is looked at first: the end of one that is far away could not be told.
    let is_in_file = first.offset() >= MIB
        && (first.offset()..file_length).contains(&last.offset())
        && run.end() <= file_length;
    if !is_present || !is_in_file || space.is_used(run.offset..run.end()) {
        return false;
    }
    let shared = space.claim(run);
    assert!(shared.is_none(), "{run:?} was free");
    true
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
        if is_cut_off(entry, role, geometry, file_length) {
            return Err(past_the_end(entry, role, geometry, file_length));
        }
        space.occupy(extent, "payload block").map_err(|error| of_role(role, &error))?;
    }
    Ok(())
}

/// Whether the file ends before what the space of an entry holds, which would be read as zeros. Other
/// programs end a file where the disk ends, inside its last block (rule 58): nothing is missing there.
pub(super) fn is_cut_off(entry: BatEntry, role: Role, geometry: &Geometry, file_length: u64) -> bool {
    entry.offset() >= file_length || entry.offset() + needed_bytes(entry, role, geometry) > file_length
}

/// Bytes of a payload or bitmap block that hold something.
fn needed_bytes(entry: BatEntry, role: Role, geometry: &Geometry) -> u64 {
    match (role, entry.payload_state()) {
        (Role::Block(block), Some(PayloadState::FullyPresent | PayloadState::PartiallyPresent)) => {
            geometry.disk_bytes_of(block)
        }
        (Role::Bitmap(_), _) => BITMAP_BLOCK_SIZE,
        (Role::Block(_) | Role::Nothing, _) => 0,
    }
}

#[cold]
fn past_the_end(entry: BatEntry, role: Role, geometry: &Geometry, file_length: u64) -> Error {
    let message = if entry.offset() >= file_length {
        format!("{role} lies at byte {}, the file has {file_length} bytes", entry.offset())
    } else {
        let end = entry.offset() + needed_bytes(entry, role, geometry);
        format!("{role} needs the file up to byte {end}, it ends at {file_length}")
    };
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// So long that there is a bitmap's slot among those of few blocks.
    const BLOCK_BYTES: u64 = 256 * MIB;
    const BLOCKS: u64 = 40;
    const FILE_BYTES: u64 = 64 * BLOCK_BYTES;
    const QUARTER: u64 = BLOCK_BYTES / 4;
    /// The last block is needed in part only.
    const DISK_BYTES: u64 = (BLOCKS - 1) * BLOCK_BYTES + QUARTER;
    const BAT: Extent = Extent { offset: 2 * MIB, length: MIB };

    fn space() -> Space {
        let mut space = Space::new(FILE_BYTES).expect("small");
        space.occupy(BAT, "region").expect("free");
        space
    }

    /// What `words` say, entry by entry.
    fn one_by_one(words: &[[u8; ENTRY_SIZE]], geometry: &Geometry, space: &mut Space) -> Result<()> {
        for (slot, role) in geometry.walk(0..words.len() as u64) {
            let entry = BatEntry::read(words[usize::try_from(slot).expect("few")]);
            if entry.0 != 0 {
                let taken = take_entry(entry, role, geometry, FILE_BYTES, space);
                taken.map_err(|error| error.at(BAT.offset + slot * ENTRY_SIZE as u64))?;
            }
        }
        Ok(())
    }

    /// Runs of blocks, anywhere in the file and past its end. Some overlap, and some have wrong words.
    fn words() -> impl Strategy<Value = Vec<u64>> {
        const LAST: u64 = u64::MAX / QUARTER;
        let place = prop_oneof![20 => 0..270_u64, 1 => LAST - 80..=LAST];
        let run = (place, 1..20_u64, prop_oneof![20 => Just(6_u64), 1 => 0..8_u64, 1 => Just(14)]);
        let runs = prop::collection::vec(run, 1..8);
        runs.prop_map(|runs| {
            let words = runs.into_iter().flat_map(|(place, count, low)| {
                let start = place * QUARTER;
                (0..count).map(move |number| start.wrapping_add(number * BLOCK_BYTES) | low)
            });
            words.collect()
        })
    }

    proptest! {
        /// To take a run at once takes what its entries take, and finds what is wrong with them.
        #[test]
        fn a_run_is_taken_as_its_entries_are(words in words(), differencing in any::<bool>()) {
            let geometry = Geometry::new(DISK_BYTES, 256 << 20, 512, differencing);
            let slots = usize::try_from(geometry.slot_count()).expect("few");
            let words: Vec<_> = words.into_iter().take(slots).map(u64::to_le_bytes).collect();
            let (mut at_once, mut single) = (space(), space());
            let found = take_words(0, &words, &geometry, BAT, FILE_BYTES, &mut at_once);
            let expected = one_by_one(&words, &geometry, &mut single);
            let text = |outcome: Result<()>| outcome.map_err(|error| error.to_string());
            prop_assert_eq!(text(found), text(expected));
            for place in 0..2 * FILE_BYTES / QUARTER {
                let here = place * QUARTER..(place + 1) * QUARTER;
                prop_assert_eq!(at_once.is_used(here.clone()), single.is_used(here), "quarter {}", place);
            }
        }
    }
}
