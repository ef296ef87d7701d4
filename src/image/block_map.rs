//! The BAT in memory, shared by every queue.
//!
//! One atomic word per BAT slot, in the format's own bit layout, so that looking a block up is one load and
//! building a BAT page for the log is a copy. A word is published with release and loaded with acquire:
//! whoever sees a mapping sees everything that made it true.
//!
//! The engine stores, and fronts load; but a front may give a block space that has none, where the engine has
//! set space aside for that. So a payload slot whose block has no space changes by compare-exchange only, by
//! whomever: what has changed in between stays. The slot of a block that has space, and that of a sector
//! bitmap, are the engine's alone.
//!
//! Bits that are reserved in the format have a meaning in memory:
//!
//! * bit 3, DURABLE: the entry that logged this very word has been synced;
//! * bit 4, MOVING: the block is on its way to another place. It is read where it was, and whoever would
//!   change it asks the engine first. A killed process may leave the mark, which the next such ask takes off.

use std::ops::Range;
use std::sync::Arc;

use super::bitmaps::SectorBitmaps;
use super::memory::SessionMemory;
use crate::atomic::{AtomicU64, Ordering};
use crate::disk::PAGE_BYTES;
use crate::format::bat::{BatEntry, BitmapState, ENTRY_SIZE, Geometry, PayloadState, Role, nonzero};
use crate::format::{MIB, index};
use crate::simulation::{Plant, ordered, planted};

/// Slots in one 4096-byte BAT page.
pub const SLOTS_PER_PAGE: u64 = (PAGE_BYTES / size_of::<u64>()) as u64;

/// BAT pages that one word has bits for.
const PAGES_PER_WORD: usize = u64::BITS as usize;

/// In memory only, and of a salvaged image: a reserved state, which no image that opens has.
const LOST: BatEntry = BatEntry(4);

/// In memory only: the entry that logged this word has been synced.
const DURABLE: u64 = 1 << 3;

/// In memory only: the block is on its way to another place.
const MOVING: u64 = 1 << 4;

/// What an entry of a file never has.
const MARKS: u64 = DURABLE | MOVING;

const _: () = assert!(LOST.payload_state().is_none(), "a lost block is taken for no other");
const _: () = assert!(BatEntry(MARKS).reserved_bits() == MARKS, "no entry of a file has the bits");
const _: () = assert!(SLOTS_PER_PAGE * ENTRY_SIZE as u64 == PAGE_BYTES as u64, "slots fill a page");

/// A BAT word as the engine and the fronts see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The entry as the format has it.
    pub entry: BatEntry,
    /// Whether this very entry survives a power cut.
    pub durable: bool,
    /// Whether the block is on its way to another place: nothing may change it.
    pub moving: bool,
}

impl Mapping {
    fn of(word: u64) -> Self {
        let (durable, moving) = (word & DURABLE != 0, word & MOVING != 0);
        Self { entry: BatEntry(word & !MARKS), durable, moving }
    }

    fn word(self) -> u64 {
        let mark = |is_set, mark| if is_set { mark } else { 0 };
        self.entry.0 | mark(self.durable, DURABLE) | mark(self.moving, MOVING)
    }
}

/// The BAT as atomics; the module's head says which thread may do what. What it says of partially present
/// blocks, their sector bitmaps complete.
pub struct BlockMap {
    memory: SessionMemory,
    bitmaps: Arc<SectorBitmaps>,
    geometry: Geometry,
    /// One bit per BAT page: whether any of its slots may ever have been set.
    set_pages: Box<[AtomicU64]>,
    /// How long the file surely is, bytes.
    file_bytes: AtomicU64,
    /// From which byte on nothing is known of the file.
    lost_from: u64,
}

impl BlockMap {
    /// A map in which no slot is set, in private memory.
    pub fn empty(geometry: Geometry) -> Self {
        Self::over(SessionMemory::private(&geometry), geometry)
    }

    /// A map in which no slot is set, in fresh `memory`.
    ///
    /// # Panics
    /// If the memory was made for another geometry.
    pub(super) fn over(memory: SessionMemory, geometry: Geometry) -> Self {
        assert!(memory.fits(&geometry), "memory made for another disk");
        let words = index(geometry.slot_count().div_ceil(SLOTS_PER_PAGE)).div_ceil(PAGES_PER_WORD);
        Self {
            bitmaps: memory.bitmaps(&geometry),
            memory,
            geometry,
            set_pages: (0..words).map(|_| AtomicU64::new(0)).collect(),
            file_bytes: AtomicU64::new(0),
            lost_from: u64::MAX,
        }
    }

    /// The map that a killed process has left in `memory`.
    ///
    /// # Panics
    /// If the memory was made for another geometry.
    pub(super) fn left_in(memory: SessionMemory, geometry: Geometry) -> Self {
        let map = Self::over(memory, geometry);
        let (mut page, last) = (0, index(geometry.slot_count()));
        while page < map.page_count()
            && let Some(written) = map.memory.written_slots(index(page * SLOTS_PER_PAGE)..last)
        {
            page = written.start as u64 / SLOTS_PER_PAGE;
            let past = (written.end as u64).div_ceil(SLOTS_PER_PAGE);
            for page in page..past {
                let slots = map.page_slots(page);
                let mut words = map.memory.slots()[index(slots.start)..index(slots.end)].iter();
                if words.any(|word| word.load(Ordering::Relaxed) != 0) {
                    map.note_set(slots.start);
                }
            }
            page = past;
        }
        map
    }

    /// How long the file surely is, bytes: what is missing of them has been lost. Behind them blocks read as
    /// zeros.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes.load(Ordering::Acquire)
    }

    /// The file has so many bytes from now on.
    pub fn set_file_bytes(&self, bytes: u64) {
        self.file_bytes.store(bytes, Ordering::Release);
    }

    /// From which byte on nothing is known of the file: what blocks have there is lost.
    pub fn lost_from(&self) -> u64 {
        self.lost_from
    }

    /// It is the map of a damaged file: `blocks` are lost, and so is what lies from byte `lost_from` of the
    /// file on.
    pub(super) fn lose(&mut self, blocks: impl Iterator<Item = u64>, lost_from: u64) {
        for block in blocks {
            self.store(self.geometry.payload_slot(block), LOST.0);
        }
        self.lost_from = lost_from;
    }

    /// The memory it is in.
    pub fn memory(&self) -> &SessionMemory {
        &self.memory
    }

    /// Which sectors of its partially present blocks are in the file.
    #[inline]
    pub fn bitmaps(&self) -> &SectorBitmaps {
        &self.bitmaps
    }

    /// The geometry that numbers the slots.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The mapping of payload block `block`.
    #[inline]
    pub fn load(&self, block: u64) -> Mapping {
        debug_assert!(block < self.geometry.block_count(), "block {block} is on the disk");
        let word = &self.memory.slots()[index(self.geometry.payload_slot(block))];
        Mapping::of(word.load(ordered(Plant::RelaxedLookup, Ordering::Acquire)))
    }

    /// Whether the block of `slot`, if it is one's, is partially present.
    #[inline]
    pub(super) fn may_be_partial(&self, slot: u64) -> bool {
        let word = self.memory.slots()[index(slot)].load(Ordering::Acquire);
        Mapping::of(word).entry.payload_state() == Some(PayloadState::PartiallyPresent)
    }

    /// The first of `blocks` whose slot may be set, their end if there is none. Pages that never had a slot
    /// set are passed over by their bit: looking at their slots would cost a page fault each, 8 of them for
    /// 4 GiB in blocks of 1 MiB.
    pub fn first_set(&self, blocks: Range<u64>) -> u64 {
        let mut block = blocks.start;
        while block < blocks.end && !self.is_set(self.page_of(block)) {
            block = self.geometry.first_block_from((self.page_of(block) + 1) * SLOTS_PER_PAGE);
        }
        block.min(blocks.end)
    }

    /// The slots of all pages of which this map or `other`, a map of the same disk, may have a slot set.
    pub(super) fn slots_set_with<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = Range<u64>> + 'a {
        assert_eq!(self.geometry, other.geometry, "both are maps of one disk");
        let is_set = |&page: &u64| self.is_set(page) || other.is_set(page);
        (0..self.page_count()).filter(is_set).map(|page| self.page_slots(page))
    }

    /// Publishes a new mapping of payload block `block`, not yet durable, unless the block is no longer as it
    /// was `seen`. Whether it was.
    pub fn replace(&self, block: u64, seen: Mapping, entry: BatEntry) -> bool {
        assert_eq!(entry.reserved_bits(), 0, "reserved bits never reach the map");
        let old = seen.entry;
        assert!(self.may_become(old, entry), "block {block} goes from {old:?} to {entry:?}");
        let slot = self.geometry.payload_slot(block);
        self.note_set(slot);
        // One that moves may come to have all its sectors meanwhile.
        let mark = if seen.moving { MOVING } else { 0 };
        let order = ordered(Plant::RelaxedPublish, Ordering::AcqRel);
        let word = &self.memory.slots()[index(slot)];
        word.compare_exchange(seen.word(), entry.0 | mark, order, Ordering::Relaxed).is_ok()
    }

    /// The same where nothing else changes the block. Engine only.
    pub fn publish(&self, block: u64, entry: BatEntry) {
        let replaced = self.replace(block, self.load(block), entry);
        assert!(replaced, "block {block} is the engine's alone");
    }

    /// The changes that are made. Space comes and goes as a whole; a block becomes partially present
    /// only over its parents, and fully present from there only in its place; it never shows its parents
    /// again.
    fn may_become(&self, old: BatEntry, new: BatEntry) -> bool {
        let differencing = self.geometry.is_differencing();
        match (old.payload_state(), new.payload_state()) {
            (Some(PayloadState::PartiallyPresent), Some(PayloadState::FullyPresent)) => {
                old.offset() == new.offset()
            }
            (Some(PayloadState::FullyPresent), Some(PayloadState::FullyPresent)) => false,
            (Some(_), Some(PayloadState::FullyPresent)) => new.offset() >= MIB,
            (Some(PayloadState::NotPresent), Some(PayloadState::PartiallyPresent)) => {
                differencing && new.offset() >= MIB
            }
            (Some(_), Some(PayloadState::Zero)) => new.offset() == 0,
            (_, Some(PayloadState::NotPresent)) => planted(Plant::RevealParents),
            _ => false,
        }
    }

    /// Publishes where the sector bitmap of `chunk` lies. Engine only.
    pub fn publish_bitmap(&self, chunk: u64, file_offset: u64) {
        assert!(self.geometry.is_differencing(), "only a child has sector bitmaps");
        assert!(chunk < self.geometry.bitmap_block_count(), "chunk {chunk} is on the disk");
        assert_eq!(self.bitmap_place(chunk), None, "a chunk gets one bitmap");
        self.store(self.geometry.bitmap_slot(chunk), BatEntry::present(file_offset).0);
    }

    /// From now on nothing changes payload block `block`: it is about to move. What was looked up before may
    /// still change it. Engine only.
    pub fn begin_move(&self, block: u64) {
        let word = &self.memory.slots()[index(self.geometry.payload_slot(block))];
        let before = word.fetch_or(MOVING, Ordering::AcqRel);
        assert_eq!(before & MOVING, 0, "block {block} moves once at a time");
    }

    /// Payload block `block` may be changed again where it is. Engine only.
    pub fn end_move(&self, block: u64) {
        let word = &self.memory.slots()[index(self.geometry.payload_slot(block))];
        word.fetch_and(!MOVING, Ordering::AcqRel);
    }

    /// Publishes another place of payload block `block`, at which its content is; not yet durable. A fully
    /// present block no longer moves; [`Self::end_move`] follows for a partially present one. Engine only.
    pub fn move_block(&self, block: u64, file_offset: u64) {
        let old = self.load(block).entry;
        let new = match old.payload_state() {
            Some(PayloadState::FullyPresent) => BatEntry::present(file_offset).0,
            Some(PayloadState::PartiallyPresent) => BatEntry::partially_present(file_offset).0 | MOVING,
            state => panic!("block {block} moves, which is {state:?}"),
        };
        let apart = old.offset().abs_diff(file_offset);
        assert!(apart >= self.geometry.block_size(), "block {block} moves onto itself");
        self.store(self.geometry.payload_slot(block), new);
    }

    /// Publishes another place of the sector bitmap of `chunk`, at which all its bits are. Engine only.
    pub fn move_bitmap(&self, chunk: u64, file_offset: u64) {
        let old = self.bitmap_place(chunk).expect("a bitmap that moves has a place");
        assert!(old.abs_diff(file_offset) >= MIB, "the bitmap of chunk {chunk} moves onto itself");
        self.store(self.geometry.bitmap_slot(chunk), BatEntry::present(file_offset).0);
    }

    /// Where the sector bitmap of `chunk` lies in the file, if there is one.
    pub fn bitmap_place(&self, chunk: u64) -> Option<u64> {
        let entry = self.load_slot(self.geometry.bitmap_slot(chunk)).entry;
        (entry.bitmap_state() == Some(BitmapState::Present)).then(|| entry.offset())
    }

    /// Any slot, a sector bitmap's included.
    pub(super) fn load_slot(&self, slot: u64) -> Mapping {
        debug_assert!(slot < self.geometry.slot_count(), "slot {slot} is in the BAT");
        let word = self.memory.slots()[index(slot)].load(Ordering::Acquire);
        if self.geometry.is_bitmap_slot(slot) {
            return Mapping { entry: BatEntry(word), durable: false, moving: false };
        }
        Mapping::of(word)
    }

    /// Takes over the slots from `first` on as the file has them, durable by that. For opening only.
    pub fn restore(&self, first: u64, words: &[[u8; ENTRY_SIZE]]) {
        let past = first + words.len() as u64;
        assert!(past <= self.geometry.slot_count(), "slots {first} to {past} are in the BAT");
        let mut noted = None;
        // A store of zeros would take memory.
        for (at, words) in nonzero(words) {
            let first = first + at as u64;
            for (word, (slot, role)) in words.iter().zip(self.geometry.walk(first..past)) {
                let durable = if matches!(role, Role::Bitmap(_)) { 0 } else { DURABLE };
                // Once a page: to note one takes longer than to store one of up to 2^26 words.
                let page = slot / SLOTS_PER_PAGE;
                if noted.replace(page) != Some(page) {
                    self.note_set(slot);
                }
                self.memory.slots()[index(slot)]
                    .store(u64::from_le_bytes(*word) | durable, Ordering::Release);
            }
        }
    }

    /// Takes over what `other`, a map of the same disk, has in `slots`. For opening only.
    pub(super) fn take_over(&self, other: &Self, slots: Range<u64>) {
        assert_eq!(self.geometry, other.geometry, "both are maps of one disk");
        assert!(slots.end <= self.geometry.slot_count(), "{slots:?} are in the BAT");
        for slot in slots {
            let word = other.memory.slots()[index(slot)].load(Ordering::Relaxed);
            if word != 0 {
                self.store(slot, word);
            }
        }
    }

    /// Number of BAT pages.
    pub fn page_count(&self) -> u64 {
        self.geometry.slot_count().div_ceil(SLOTS_PER_PAGE)
    }

    /// The BAT page that holds the slot of payload block `block`.
    pub fn page_of(&self, block: u64) -> u64 {
        debug_assert!(block < self.geometry.block_count(), "block {block} is on the disk");
        self.geometry.payload_slot(block) / SLOTS_PER_PAGE
    }

    /// The BAT page that holds the slot of the sector bitmap of `chunk`.
    pub fn page_of_bitmap(&self, chunk: u64) -> u64 {
        assert!(chunk < self.geometry.bitmap_block_count(), "chunk {chunk} is on the disk");
        self.geometry.bitmap_slot(chunk) / SLOTS_PER_PAGE
    }

    /// A copy of BAT page `page` as it is written to the file.
    pub fn copy_page(&self, page: u64) -> Box<[u8; PAGE_BYTES]> {
        let mut bytes = Box::new([0; PAGE_BYTES]);
        for (slot, target) in self.page_slots(page).zip(bytes.as_chunks_mut::<8>().0) {
            *target = self.file_word(slot).to_le_bytes();
        }
        bytes
    }

    /// Marks every slot of `page` that still holds what `logged` says as durable. Engine only, after the sync
    /// of the entry that logged it. A front may change a slot meanwhile: the next entry has that.
    pub fn mark_durable(&self, page: u64, logged: &[u8; PAGE_BYTES]) {
        for (slot, word) in self.page_slots(page).zip(logged.as_chunks::<8>().0) {
            let word = u64::from_le_bytes(*word);
            assert!(word & MARKS == 0 || self.geometry.is_bitmap_slot(slot), "a mark is not logged");
            let live = &self.memory.slots()[index(slot)];
            let current = live.load(Ordering::Relaxed);
            if (current & !MOVING != word && !planted(Plant::IgnoreChange))
                || self.geometry.is_bitmap_slot(slot)
            {
                continue;
            }
            let durable = current | DURABLE;
            if planted(Plant::StoreDurable) {
                live.store(durable, Ordering::Release);
            } else {
                let _ = live.compare_exchange(current, durable, Ordering::Release, Ordering::Relaxed);
            }
        }
    }

    /// The bit comes before the word, so that whoever has seen the word sees the bit.
    fn store(&self, slot: u64, word: u64) {
        self.note_set(slot);
        self.memory.slots()[index(slot)].store(word, Ordering::Release);
    }

    fn note_set(&self, slot: u64) {
        let page = index(slot / SLOTS_PER_PAGE);
        self.set_pages[page / PAGES_PER_WORD].fetch_or(1 << (page % PAGES_PER_WORD), Ordering::Release);
    }

    fn is_set(&self, page: u64) -> bool {
        let page = index(page);
        let word = self.set_pages[page / PAGES_PER_WORD].load(Ordering::Acquire);
        word & (1 << (page % PAGES_PER_WORD)) != 0
    }

    fn page_slots(&self, page: u64) -> Range<u64> {
        assert!(page < self.page_count(), "page {page} is past the BAT");
        page * SLOTS_PER_PAGE..((page + 1) * SLOTS_PER_PAGE).min(self.geometry.slot_count())
    }

    fn file_word(&self, slot: u64) -> u64 {
        let word = self.memory.slots()[index(slot)].load(Ordering::Relaxed);
        if self.geometry.is_bitmap_slot(slot) { word } else { word & !MARKS }
    }
}

#[cfg(test)]
mod tests {
    use fastrand::Rng;

    use super::super::memory::HEADER_WORDS;
    use super::*;
    use crate::format::MIB;

    /// Blocks that are in no page ever set are passed over, and no block that is set.
    #[test]
    fn the_first_set_block_is_never_passed_over() {
        let mut rng = Rng::with_seed(1);
        let mut passed = 0;
        for (block_mib, differencing) in [(1, false), (1, true), (32, false), (256, true)] {
            let bytes = u64::from(block_mib) * MIB;
            let geometry = Geometry::new(20_000 * bytes, block_mib << 20, 512, differencing);
            let map = BlockMap::empty(geometry);
            for round in 0..200 {
                let start = rng.u64(..geometry.block_count());
                let blocks = start..rng.u64(start..=geometry.block_count());
                let first = map.first_set(blocks.clone());
                assert!((blocks.start..=blocks.end).contains(&first), "{first} of {blocks:?}");
                assert!((blocks.start..first).all(|block| map.load(block).entry == BatEntry(0)));
                passed += first - blocks.start;
                if round % 20 == 0 {
                    map.publish(rng.u64(..geometry.block_count()), BatEntry::present(MIB));
                }
            }
        }
        assert!(passed > 100_000, "only {passed} blocks were passed over");
    }

    /// A successor finds the blocks that a killed process has set.
    #[test]
    fn what_a_killed_process_has_set_is_found() {
        let geometry = Geometry::new(1 << 40, 1 << 20, 512, false);
        let map = BlockMap::empty(geometry);
        map.publish(777_777, BatEntry::present(MIB));
        let left = BlockMap::left_in(map.memory().clone(), geometry);
        let first = left.first_set(0..geometry.block_count());
        assert_eq!(left.page_of(first), left.page_of(777_777));
        assert_eq!(left.first_set(first..777_778), first);
    }

    /// Only what was written is looked at.
    #[test]
    fn what_a_killed_process_has_not_written_is_passed_over() {
        let geometry = Geometry::new(1 << 40, 1 << 20, 512, false);
        let count = SessionMemory::words_for(&geometry);
        let words: Vec<AtomicU64> = (0..count).map(|_| AtomicU64::new(0)).collect();
        let pages = |range: Range<usize>| range.start * HEADER_WORDS..range.end * HEADER_WORDS;
        let written = [pages(3..5), pages(100..101)];
        for page in [3, 4, 7, 100] {
            words[page * HEADER_WORDS + 9].store(BatEntry::present(MIB).0, Ordering::Relaxed);
        }
        let find = move |asked: Range<usize>| {
            let cut = |part: &Range<usize>| part.start.max(asked.start)..part.end.min(asked.end);
            written.iter().map(cut).find(|part| part.start < part.end)
        };
        let none = Arc::new(|_| Err(std::io::ErrorKind::ReadOnlyFilesystem.into()));
        let left = BlockMap::left_in(SessionMemory::shared(words.into(), none, Arc::new(find)), geometry);
        // The first page of the memory is its header, and page 7 was not said to be written.
        let set: Vec<u64> = left.slots_set_with(&left).map(|slots| slots.start / SLOTS_PER_PAGE).collect();
        assert_eq!(set, [2, 3, 99]);
        let other = BlockMap::empty(geometry);
        other.publish(0, BatEntry::present(MIB));
        assert_eq!(left.slots_set_with(&other).count(), 4);
    }
}
