//! The BAT in memory, shared by every queue.
//!
//! One atomic word per BAT slot, in the format's own bit layout, so that looking a block up is one load and
//! building a BAT page for the log is a copy. Only the engine stores; fronts load. A word is published with
//! release and loaded with acquire: whoever sees a mapping sees everything that made it true.
//!
//! Bit 3, reserved in the format, is DURABLE in memory: the entry that logged this very word has been synced.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::bitmaps::SectorBitmaps;
use super::memory::SessionMemory;
use crate::disk::PAGE_BYTES;
use crate::format::bat::{BatEntry, BitmapState, ENTRY_SIZE, Geometry, Role};

/// Slots in one 4096-byte BAT page.
pub const SLOTS_PER_PAGE: u64 = (PAGE_BYTES / size_of::<u64>()) as u64;

/// In memory only: the entry that logged this word has been synced.
const DURABLE: u64 = 1 << 3;

/// A BAT word as the engine and the fronts see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The entry as the format has it.
    pub entry: BatEntry,
    /// Whether this very entry survives a power cut.
    pub durable: bool,
}

/// The BAT as atomics; see the module's head for who may do what. What it says of partially present blocks, their
/// sector bitmaps complete.
pub struct BlockMap {
    memory: SessionMemory,
    bitmaps: Arc<SectorBitmaps>,
    geometry: Geometry,
    /// How long the file surely is, bytes.
    file_bytes: AtomicU64,
}

impl BlockMap {
    /// A map in which no slot is set, in private memory.
    pub fn empty(geometry: Geometry) -> Self {
        Self::over(SessionMemory::private(&geometry), geometry)
    }

    /// The map that is in `memory`.
    ///
    /// # Panics
    /// If the memory was made for another geometry.
    pub(super) fn over(memory: SessionMemory, geometry: Geometry) -> Self {
        assert!(memory.fits(&geometry), "memory made for another disk");
        Self { bitmaps: memory.bitmaps(&geometry), memory, geometry, file_bytes: AtomicU64::new(0) }
    }

    /// How long the file surely is, bytes: what is missing of them has been lost. Behind them blocks read as zeros.
    pub fn file_bytes(&self) -> u64 {
        self.file_bytes.load(Ordering::Acquire)
    }

    /// The file has so many bytes from now on.
    pub fn set_file_bytes(&self, bytes: u64) {
        self.file_bytes.store(bytes, Ordering::Release);
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
        let word = self.memory.slots()[index(self.geometry.payload_slot(block))].load(Ordering::Acquire);
        Mapping { entry: BatEntry(word & !DURABLE), durable: word & DURABLE != 0 }
    }

    /// Publishes a new mapping of payload block `block`, not yet durable. Engine only.
    pub fn publish(&self, block: u64, entry: BatEntry) {
        assert_eq!(entry.0 & DURABLE, 0, "reserved bits never reach the map");
        self.memory.slots()[index(self.geometry.payload_slot(block))].store(entry.0, Ordering::Release);
    }

    /// Publishes where the sector bitmap of `chunk` lies. Engine only.
    pub fn publish_bitmap(&self, chunk: u64, file_offset: u64) {
        let slot = index(self.geometry.bitmap_slot(chunk));
        self.memory.slots()[slot].store(BatEntry::present(file_offset).0, Ordering::Release);
    }

    /// Where the sector bitmap of `chunk` lies in the file, if there is one.
    pub fn bitmap_place(&self, chunk: u64) -> Option<u64> {
        let entry = self.load_slot(self.geometry.bitmap_slot(chunk)).entry;
        (entry.bitmap_state() == Some(BitmapState::Present)).then(|| entry.offset())
    }

    /// Any slot, a sector bitmap's included.
    pub(super) fn load_slot(&self, slot: u64) -> Mapping {
        let word = self.memory.slots()[index(slot)].load(Ordering::Acquire);
        if self.geometry.is_bitmap_slot(slot) {
            return Mapping { entry: BatEntry(word), durable: false };
        }
        Mapping { entry: BatEntry(word & !DURABLE), durable: word & DURABLE != 0 }
    }

    /// Takes over the slots from `first` on as the file has them, durable by that. For opening only.
    pub fn restore(&self, first: u64, words: &[[u8; ENTRY_SIZE]]) {
        let slots = &self.memory.slots()[index(first)..][..words.len()];
        let roles = self.geometry.walk(first..first + words.len() as u64);
        for ((slot, word), (_, role)) in slots.iter().zip(words).zip(roles) {
            let word = u64::from_le_bytes(*word);
            let durable = if matches!(role, Role::Bitmap(_)) { 0 } else { DURABLE };
            // A store of zeros would take memory.
            if word != 0 {
                slot.store(word | durable, Ordering::Relaxed);
            }
        }
    }

    /// Takes over what `other`, a map of the same disk, has in `slots`. For opening only.
    pub(super) fn take_over(&self, other: &Self, slots: Range<u64>) {
        let slots = index(slots.start)..index(slots.end);
        for (mine, others) in self.memory.slots()[slots.clone()].iter().zip(&other.memory.slots()[slots]) {
            let word = others.load(Ordering::Relaxed);
            if word != 0 {
                mine.store(word, Ordering::Relaxed);
            }
        }
    }

    /// Number of BAT pages.
    pub fn page_count(&self) -> u64 {
        self.geometry.slot_count().div_ceil(SLOTS_PER_PAGE)
    }

    /// The BAT page that holds the slot of payload block `block`.
    pub fn page_of(&self, block: u64) -> u64 {
        self.geometry.payload_slot(block) / SLOTS_PER_PAGE
    }

    /// The BAT page that holds the slot of the sector bitmap of `chunk`.
    pub fn page_of_bitmap(&self, chunk: u64) -> u64 {
        self.geometry.bitmap_slot(chunk) / SLOTS_PER_PAGE
    }

    /// A copy of BAT page `page` as the file shall have it.
    pub fn copy_page(&self, page: u64) -> Box<[u8; PAGE_BYTES]> {
        let mut bytes = Box::new([0; PAGE_BYTES]);
        for (slot, target) in self.page_slots(page).zip(bytes.as_chunks_mut::<8>().0) {
            *target = self.file_word(slot).to_le_bytes();
        }
        bytes
    }

    /// Marks every slot of `page` that still holds what `logged` says as durable. Engine only, after the sync
    /// of the entry that logged it.
    pub fn mark_durable(&self, page: u64, logged: &[u8; PAGE_BYTES]) {
        for (slot, word) in self.page_slots(page).zip(logged.as_chunks::<8>().0) {
            let word = u64::from_le_bytes(*word);
            let current = self.memory.slots()[index(slot)].load(Ordering::Relaxed);
            if current == word && !self.geometry.is_bitmap_slot(slot) {
                self.memory.slots()[index(slot)].store(word | DURABLE, Ordering::Release);
            }
        }
    }

    fn page_slots(&self, page: u64) -> Range<u64> {
        assert!(page < self.page_count(), "page {page} is past the BAT");
        page * SLOTS_PER_PAGE..((page + 1) * SLOTS_PER_PAGE).min(self.geometry.slot_count())
    }

    fn file_word(&self, slot: u64) -> u64 {
        let word = self.memory.slots()[index(slot)].load(Ordering::Relaxed);
        if self.geometry.is_bitmap_slot(slot) { word } else { word & !DURABLE }
    }
}

/// A slot number as an index: the map exists, so every slot fits.
#[inline]
fn index(slot: u64) -> usize {
    usize::try_from(slot).expect("64-bit hosts only")
}
