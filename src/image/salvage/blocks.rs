//! The BAT of a damaged image: which blocks are where, and which are lost.
//!
//! A block is lost if its entry cannot be read or cannot be true, if it lies beyond the end of the file, or
//! if it shares space with something else: then none of the two is known to have its bytes. A partially
//! present block is lost, too, if its bits are: which sectors are its own is not known.
//!
//! The BAT streams by, holes are skipped; memory is bounded by what it stores, and by some bits for each
//! block and for each MiB of the file.

use std::ops::Range;

use fixedbitset::FixedBitSet;

use super::notes::Notes;
use super::source::{Found, Source};
use crate::disk::{PAGE_BYTES, ReadDisk};
use crate::error::{Doing, Locate, Result};
use crate::format::bat::{
    BITMAP_BLOCK_SIZE, BatEntry, BitmapState, ENTRY_SIZE, Geometry, PayloadState, Role,
};
use crate::format::{MIB, index};
use crate::image::bat_reader::BAT_CHUNK_BYTES;
use crate::image::bitmap_reader::partial_blocks;
use crate::image::block_map::BlockMap;
use crate::image::space::{Extent, MAX_FILE_BYTES};

/// Slots in a chunk of the BAT that is read at a time.
const CHUNK_SLOTS: u64 = BAT_CHUNK_BYTES / ENTRY_SIZE as u64;

/// The blocks of an image.
pub(super) struct Blocks {
    /// Where they are; of lost ones it may say anything.
    pub(super) map: BlockMap,
    /// Which of them are lost.
    pub(super) lost: FixedBitSet,
    /// Chunks whose sector bitmap is lost.
    lost_bitmaps: FixedBitSet,
    /// The slots that were read, ascending; all others are zero.
    pub(super) stored: Vec<Range<u64>>,
    /// MiB of the file that something names, and those that two things name.
    used: FixedBitSet,
    shared: FixedBitSet,
    counts: Counts,
}

/// Lost blocks by what became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    unread: u64,
    impossible: u64,
    beyond: u64,
    shared: u64,
    bits: u64,
}

/// Why an entry leads nowhere.
enum Loss {
    Impossible,
    Beyond,
}

impl Blocks {
    /// The blocks of a disk of this `geometry` by the BAT at `bat`. Of the file, `fixtures` are taken by
    /// other structures.
    pub(super) async fn read<D: ReadDisk>(
        source: &Source<'_, D>,
        geometry: Geometry,
        bat: Extent,
        fixtures: &[Extent],
        notes: &mut Notes,
    ) -> Result<Self> {
        let units =
            index(source.length.min(MAX_FILE_BYTES).div_ceil(MIB)) + index(geometry.block_size() / MIB);
        let mut blocks = Self {
            map: BlockMap::empty(geometry),
            lost: FixedBitSet::with_capacity(index(geometry.block_count())),
            lost_bitmaps: FixedBitSet::with_capacity(index(geometry.bitmap_block_count())),
            stored: Vec::new(),
            used: FixedBitSet::with_capacity(units),
            shared: FixedBitSet::with_capacity(units),
            counts: Counts::default(),
        };
        // Whatever else lies there has lost.
        for fixture in fixtures {
            let units = blocks.units(fixture.offset, fixture.length);
            blocks.shared.insert_range(units);
        }
        blocks.shared.insert(0);
        blocks.read_bat(source, bat).await?;
        blocks.drop_shared();
        if geometry.is_differencing() {
            blocks.read_bits(source).await?;
        }
        blocks.counts.note(notes);
        Ok(blocks)
    }

    /// The memory that they take: what the file has of the BAT, and the bits of partially present blocks.
    pub(super) fn resident_bytes(&self) -> u64 {
        let geometry = self.map.geometry();
        let partial = self.stored.iter().flat_map(|slots| partial_blocks(&self.map, slots.clone()));
        let bits = partial.map(|block| geometry.bitmap_slice(block)).map(|slice| slice.end - slice.start);
        let slots: u64 = self.stored.iter().map(|slots| slots.end - slots.start).sum();
        slots * ENTRY_SIZE as u64 + bits.sum::<u64>() + self.lost.len() as u64 / 8
    }

    /// The MiB of the file that `length` bytes at `offset` touch.
    fn units(&self, offset: u64, length: u64) -> Range<usize> {
        let [start, end] = [offset / MIB, offset.saturating_add(length).div_ceil(MIB)].map(index);
        start.min(self.used.len())..end.min(self.used.len())
    }

    async fn read_bat<D: ReadDisk>(&mut self, source: &Source<'_, D>, bat: Extent) -> Result<()> {
        let slots = self.map.geometry().slot_count();
        let room = bat.length / ENTRY_SIZE as u64;
        let mut first = 0;
        while first < slots.min(room) {
            let place = bat.offset + first * ENTRY_SIZE as u64;
            if source.overlay.is_none() && place < source.length {
                let stored = source.disk.next_data(place).await.doing("looking for holes").at(place)?;
                let stored = stored.unwrap_or(source.length).min(source.length) - place;
                let skipped = stored / PAGE_BYTES as u64 * (PAGE_BYTES / ENTRY_SIZE) as u64;
                if skipped > 0 {
                    first += skipped;
                    continue;
                }
            }
            let past = (first + CHUNK_SLOTS).min(slots).min(room);
            let length = index((past - first) * ENTRY_SIZE as u64).next_multiple_of(PAGE_BYTES);
            let found = source.read(place, length).await?;
            self.take_chunk(first..past, place, &found);
            first = past;
        }
        self.lose_slots(slots.min(room)..slots);
        Ok(())
    }

    /// Takes over `slots`, which were found at `place` in the file.
    fn take_chunk(&mut self, slots: Range<u64>, place: u64, found: &Found) {
        let geometry = *self.map.geometry();
        let mut words = found.bytes.as_chunks::<ENTRY_SIZE>().0[..index(slots.end - slots.start)].to_vec();
        for missing in &found.missing {
            let slot = |at: u64| slots.start + (at - place) / ENTRY_SIZE as u64;
            let unread = slot(missing.start)..slot(missing.end + 7).min(slots.end);
            if unread.start < unread.end {
                let [from, to] = [unread.start, unread.end].map(|slot| index(slot - slots.start));
                words[from..to].fill([0; ENTRY_SIZE]);
                self.lose_slots(unread);
            }
        }
        for ((_, role), word) in geometry.walk(slots.clone()).zip(&mut words) {
            let entry = BatEntry::read(*word);
            if entry.0 != 0 {
                *word = self.take_entry(role, entry, &geometry).write();
            }
        }
        self.map.restore(slots.start, &words);
        match self.stored.last_mut() {
            Some(last) if last.end == slots.start => last.end = slots.end,
            _ => self.stored.push(slots),
        }
    }

    /// The `entry` of `role` if it leads somewhere, otherwise an empty one.
    fn take_entry(&mut self, role: Role, entry: BatEntry, geometry: &Geometry) -> BatEntry {
        let end = (self.used.len() as u64) * MIB - geometry.block_size();
        match role {
            Role::Block(block) => match judged(entry, geometry.is_differencing(), end) {
                Ok(sound) => {
                    self.claim(sound, geometry.block_size());
                    return sound;
                }
                Err(loss) => {
                    match loss {
                        Loss::Impossible => self.counts.impossible += 1,
                        Loss::Beyond => self.counts.beyond += 1,
                    }
                    self.lost.insert(index(block));
                }
            },
            Role::Bitmap(chunk) if geometry.is_differencing() => match entry.bitmap_state() {
                Some(BitmapState::NotPresent) => {}
                Some(BitmapState::Present) if (MIB..end).contains(&entry.offset()) => {
                    let sound = BatEntry::present(entry.offset());
                    self.claim(sound, BITMAP_BLOCK_SIZE);
                    return sound;
                }
                _ => self.lost_bitmaps.insert(index(chunk)),
            },
            Role::Bitmap(_) | Role::Nothing => {}
        }
        BatEntry::not_present()
    }

    /// `entry` has `length` bytes of the file, if it has any.
    fn claim(&mut self, entry: BatEntry, length: u64) {
        if entry.offset() == 0 {
            return;
        }
        let units = self.units(entry.offset(), length);
        assert!(!units.is_empty(), "a sound entry leads into the file");
        if self.used.contains_any_in_range(units.clone()) {
            for unit in units.clone().filter(|unit| self.used.contains(*unit)) {
                self.shared.insert(unit);
            }
        }
        self.used.insert_range(units);
    }

    /// Loses what the entries in `slots` would say.
    fn lose_slots(&mut self, slots: Range<u64>) {
        let geometry = *self.map.geometry();
        let [first, past] =
            [slots.start, slots.end].map(|slot| geometry.first_block_from(slot).min(geometry.block_count()));
        self.counts.unread += past - first;
        self.lost.insert_range(index(first)..index(past));
        // Each chunk's last slot is its bitmap's.
        let [first, past] = [slots.start, slots.end]
            .map(|slot| (slot / (geometry.chunk_ratio() + 1)).min(geometry.bitmap_block_count()));
        self.lost_bitmaps.insert_range(index(first)..index(past));
    }

    /// Loses what shares space with something else.
    fn drop_shared(&mut self) {
        let geometry = *self.map.geometry();
        for (slot, role) in self.stored.iter().cloned().flat_map(|slots| geometry.walk(slots)) {
            let entry = self.map.load_slot(slot).entry;
            let length =
                if matches!(role, Role::Block(_)) { geometry.block_size() } else { BITMAP_BLOCK_SIZE };
            let units = self.units(entry.offset(), length);
            if entry.offset() == 0 || !self.shared.contains_any_in_range(units) {
                continue;
            }
            match role {
                Role::Block(block) => {
                    self.counts.shared += 1;
                    self.lost.insert(index(block));
                }
                Role::Bitmap(chunk) => self.lost_bitmaps.insert(index(chunk)),
                Role::Nothing => {}
            }
        }
    }

    /// Reads which sectors of partially present blocks are in the file.
    async fn read_bits<D: ReadDisk>(&mut self, source: &Source<'_, D>) -> Result<()> {
        let Self { map, lost, lost_bitmaps, stored, counts, .. } = self;
        for block in stored.iter().flat_map(|slots| partial_blocks(map, slots.clone())) {
            if lost.contains(index(block)) {
                continue;
            }
            let chunk = map.geometry().chunk_of_block(block);
            let known = !lost_bitmaps.contains(index(chunk));
            let kept = match map.bitmap_place(chunk).filter(|_| known) {
                None => false,
                Some(place) => read_slice(source, map, place, block).await?,
            };
            if !kept {
                counts.bits += 1;
                lost.insert(index(block));
            }
        }
        Ok(())
    }
}

/// Takes over the bits of `block` from the bitmap at `place`; whether they are there.
async fn read_slice<D: ReadDisk>(
    source: &Source<'_, D>,
    map: &BlockMap,
    place: u64,
    block: u64,
) -> Result<bool> {
    let slice = map.geometry().bitmap_slice(block);
    let bits = place + slice.start..place + slice.end;
    let from = bits.start - bits.start % PAGE_BYTES as u64;
    let found = source.read(from, index(bits.end - from).next_multiple_of(PAGE_BYTES)).await?;
    let bytes = &found.bytes[index(bits.start - from)..index(bits.end - from)];
    Ok(found.has(&bits) && map.bitmaps().store(map.geometry(), block, bytes).is_ok())
}

/// What `entry`, which is not all zero, says, without what has no meaning; blocks start below `end`.
fn judged(entry: BatEntry, is_differencing: bool, end: u64) -> std::result::Result<BatEntry, Loss> {
    let Some(state) = entry.payload_state().filter(|_| entry.reserved_bits() == 0) else {
        return Err(Loss::Impossible);
    };
    match state {
        PayloadState::PartiallyPresent if !is_differencing => Err(Loss::Impossible),
        PayloadState::FullyPresent | PayloadState::PartiallyPresent => match entry.offset() {
            offset if offset < MIB => Err(Loss::Impossible),
            offset if offset >= end => Err(Loss::Beyond),
            _ => Ok(entry),
        },
        // What they once had is of no use.
        state => Ok(BatEntry(state as u64)),
    }
}

impl Counts {
    fn note(&self, notes: &mut Notes) {
        let losses = [
            (self.unread, "their entries cannot be read"),
            (self.impossible, "their entries cannot be true"),
            (self.beyond, "they lie beyond the end of the file"),
            (self.shared, "they share space with something else, and either may have it"),
            (self.bits, "they are partially present, and it is not known which of their sectors are"),
        ];
        for (count, why) in losses.into_iter().filter(|(count, _)| *count > 0) {
            notes.add("BAT", format!("blocks lost because {why}: {count}"));
        }
    }
}
