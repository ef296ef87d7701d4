//! The memory of a session: its state, whose it is, and the words of the block map.
//!
//! It is either private, or shared memory that outlives the process: then a successor goes on where this one
//! was killed, and nothing acknowledged is lost. Layout, in words of 64 bits: a header of one page, then one
//! word per BAT slot; of a differencing image, from the next page on, the sector bitmaps, chunk by chunk.
//!
//! One atomic word is the unit of everything in it, so a process may be killed between any two stores:
//!
//! * the magic is stored last: memory without it was never complete and is worth nothing;
//! * of the two `FileWriteGuid`s, `next` is stored before any header carries it and `current` is replaced only
//!   when every header that could be found carries `next`. So one of the two is whole and in the file.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use uuid::Uuid;
use zerocopy::FromZeros;

use super::bitmaps::{SectorBitmaps, WORDS_PER_CHUNK};
use crate::disk::PAGE_BYTES;
use crate::format::bat::Geometry;

/// Words before the first slot: a page.
const HEADER_WORDS: usize = PAGE_BYTES / size_of::<u64>();

/// "vhdxubl" and the layout's version, 1.
const MAGIC: u64 = u64::from_le_bytes(*b"vhdxubl\x01");

const MAGIC_PLACE: usize = 0;
const STATE_PLACE: usize = 1;
const CURRENT_PLACE: usize = 2;
const NEXT_PLACE: usize = 4;
const OWNER_PLACE: usize = 8;

const IDLE: u64 = 0;
const OPEN: u64 = 1;
const POISONED: u64 = 2;

/// Where the writable session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Session {
    /// Nothing has been modified: the file is still as it was found.
    Idle,
    /// The headers announce a writer; modifications may go on.
    Open,
    /// Something that must not fail has failed: no write or flush succeeds any more, reads go on.
    Poisoned,
}

/// Whose memory it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The image's file system (`st_dev`).
    pub file_system: u64,
    /// The image's inode there.
    pub inode: u64,
    /// Size of the virtual disk, bytes.
    pub virtual_size: u64,
    /// Size of a block, bytes.
    pub block_size: u64,
    /// Size of a logical sector, bytes.
    pub sector_size: u64,
}

impl Owner {
    fn words(&self) -> [u64; 5] {
        [self.file_system, self.inode, self.virtual_size, self.block_size, self.sector_size]
    }
}

/// Why memory cannot be used for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// It was never completed.
    Incomplete,
    /// It is another image's.
    Foreign,
    /// The image was written by somebody else since.
    Changed,
}

/// Makes room for a range of shared memory, in words: touching memory without room would kill the process.
pub type Reserve = Arc<dyn Fn(Range<usize>) -> io::Result<()> + Send + Sync>;

/// A handle on the memory; clones share it.
#[derive(Clone)]
pub struct SessionMemory(Words);

#[derive(Clone)]
enum Words {
    Private(Arc<Private>),
    Shared(Shared),
}

struct Private {
    words: Box<[AtomicU64]>,
    bitmaps: Arc<SectorBitmaps>,
}

/// Memory that others may have used before, and may use afterwards.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) words: &'static [AtomicU64],
    pub(super) reserve: Reserve,
}

impl SessionMemory {
    /// Zeroed memory of this process for a map of `geometry`. It is touched only where something is stored.
    pub fn private(geometry: &Geometry) -> Self {
        let words = <[AtomicU64]>::new_box_zeroed_with_elems(Self::reserved_words(geometry));
        let words = words.expect("513 MiB of address space at most");
        Self(Words::Private(Arc::new(Private { words, bitmaps: Arc::new(SectorBitmaps::private(geometry)) })))
    }

    /// Memory that others may have used before, and may use afterwards. There is room for its first
    /// [`Self::reserved_words`]; `reserve` makes more.
    pub fn shared(words: &'static [AtomicU64], reserve: Reserve) -> Self {
        assert!(words.len() > HEADER_WORDS, "a header and at least one slot");
        Self(Words::Shared(Shared { words, reserve }))
    }

    /// How many words a map of `geometry` needs from the start.
    pub fn reserved_words(geometry: &Geometry) -> usize {
        HEADER_WORDS + index(geometry.slot_count())
    }

    /// How many words it may need, with all sector bitmaps.
    pub fn words_for(geometry: &Geometry) -> usize {
        let reserved = Self::reserved_words(geometry);
        if geometry.is_differencing() {
            bitmaps_place(geometry) + index(geometry.bitmap_block_count()) * WORDS_PER_CHUNK
        } else {
            reserved
        }
    }

    /// The sector bitmaps in it.
    pub(super) fn bitmaps(&self, geometry: &Geometry) -> Arc<SectorBitmaps> {
        match &self.0 {
            Words::Private(private) => private.bitmaps.clone(),
            Words::Shared(shared) => {
                let place = bitmaps_place(geometry);
                Arc::new(SectorBitmaps::shared(geometry, shared.clone(), place))
            }
        }
    }

    /// Whether it has room for a map of `geometry`.
    pub fn fits(&self, geometry: &Geometry) -> bool {
        match &self.0 {
            Words::Private(private) => private.words.len() >= Self::reserved_words(geometry),
            Words::Shared(shared) => shared.words.len() >= Self::words_for(geometry),
        }
    }

    /// The words of the block map.
    #[inline]
    pub(super) fn slots(&self) -> &[AtomicU64] {
        &self.words()[HEADER_WORDS..]
    }

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        match &self.0 {
            Words::Private(private) => &private.words,
            Words::Shared(shared) => shared.words,
        }
    }

    /// The session word.
    #[inline]
    pub fn session(&self) -> Session {
        match self.words()[STATE_PLACE].load(Ordering::Acquire) {
            IDLE => Session::Idle,
            OPEN => Session::Open,
            _ => Session::Poisoned,
        }
    }

    /// Idle becomes open; poison stays.
    pub fn open(&self) {
        let word = &self.words()[STATE_PLACE];
        let _ = word.compare_exchange(IDLE, OPEN, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Open becomes idle: the file has everything, durably. Poison stays.
    pub fn rest(&self) {
        let word = &self.words()[STATE_PLACE];
        let _ = word.compare_exchange(OPEN, IDLE, Ordering::AcqRel, Ordering::Acquire);
    }

    /// From now on no write or flush may succeed. `true` for the one caller that changed it.
    pub fn poison(&self) -> bool {
        self.words()[STATE_PLACE].swap(POISONED, Ordering::AcqRel) != POISONED
    }

    /// Completes fresh memory, whose slots are in place, as `owner`'s, whose file carries `current`.
    pub(super) fn complete(&self, owner: &Owner, current: Uuid) {
        assert_eq!(self.load(MAGIC_PLACE), 0, "memory is completed once");
        for (place, word) in (OWNER_PLACE..).zip(owner.words()) {
            self.store(place, word);
        }
        self.store_guid(CURRENT_PLACE, current);
        self.store_guid(NEXT_PLACE, current);
        self.store(MAGIC_PLACE, MAGIC);
    }

    /// Whether this is `owner`'s memory, whose file carries `file_write_guid`.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, owner: &Owner, file_write_guid: Uuid) -> Result<(), Mismatch> {
        let words = owner.words();
        if self.load(MAGIC_PLACE) != MAGIC {
            return Err(Mismatch::Incomplete);
        }
        if !(OWNER_PLACE..).zip(words).all(|(place, word)| self.load(place) == word) {
            return Err(Mismatch::Foreign);
        }
        let known = [CURRENT_PLACE, NEXT_PLACE].map(|place| self.load_guid(place));
        if known.contains(&file_write_guid) { Ok(()) } else { Err(Mismatch::Changed) }
    }

    /// A header is about to carry `next`.
    pub fn announce(&self, next: Uuid) {
        self.store_guid(NEXT_PLACE, next);
    }

    /// Every header that could be found carries `file_write_guid`.
    pub fn settle(&self, file_write_guid: Uuid) {
        self.store_guid(CURRENT_PLACE, file_write_guid);
    }

    fn load(&self, place: usize) -> u64 {
        self.words()[place].load(Ordering::Acquire)
    }

    fn store(&self, place: usize, word: u64) {
        self.words()[place].store(word, Ordering::Release);
    }

    fn load_guid(&self, place: usize) -> Uuid {
        Uuid::from_u64_pair(self.load(place), self.load(place + 1))
    }

    fn store_guid(&self, place: usize, guid: Uuid) {
        let (high, low) = guid.as_u64_pair();
        self.store(place, high);
        self.store(place + 1, low);
    }
}

/// The word with which the sector bitmaps begin.
fn bitmaps_place(geometry: &Geometry) -> usize {
    SessionMemory::reserved_words(geometry).next_multiple_of(HEADER_WORDS)
}

fn index(count: u64) -> usize {
    usize::try_from(count).expect("64-bit hosts only")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Owner =
        Owner { file_system: 1, inode: 2, virtual_size: 16 << 20, block_size: 1 << 20, sector_size: 512 };

    fn guid(number: u128) -> Uuid {
        Uuid::from_u128(number << 64 | number)
    }

    fn memory() -> SessionMemory {
        SessionMemory::private(&Geometry::new(16 << 20, 1 << 20, 512, false))
    }

    #[test]
    fn only_complete_memory_of_the_same_image_in_the_same_state_matches() {
        let memory = memory();
        assert_eq!(memory.check(&OWNER, guid(1)), Err(Mismatch::Incomplete));
        memory.complete(&OWNER, guid(1));
        assert_eq!(memory.check(&OWNER, guid(1)), Ok(()));
        assert_eq!(memory.check(&Owner { inode: 3, ..OWNER }, guid(1)), Err(Mismatch::Foreign));
        assert_eq!(memory.check(&OWNER, guid(2)), Err(Mismatch::Changed));
    }

    /// A process killed between any two stores leaves memory that still matches what the file carries.
    #[test]
    fn the_guid_in_the_file_is_known_at_every_moment() {
        let memory = memory();
        memory.complete(&OWNER, guid(1));
        memory.store(NEXT_PLACE, guid(2).as_u64_pair().0);
        assert_eq!(memory.check(&OWNER, guid(1)), Ok(()), "half announced: no header carries it");
        memory.announce(guid(2));
        for in_file in [guid(1), guid(2)] {
            assert_eq!(memory.check(&OWNER, in_file), Ok(()), "the headers change one after the other");
        }
        memory.store(CURRENT_PLACE, guid(2).as_u64_pair().0);
        assert_eq!(memory.check(&OWNER, guid(2)), Ok(()), "half settled: every header carries the next");
        memory.settle(guid(2));
        memory.announce(guid(3));
        assert_eq!(memory.check(&OWNER, guid(2)), Ok(()));
    }

    #[test]
    fn the_session_opens_once_and_poison_stays() {
        let memory = memory();
        assert_eq!(memory.session(), Session::Idle);
        memory.open();
        assert_eq!(memory.session(), Session::Open);
        assert!(memory.poison() && !memory.poison());
        memory.open();
        assert_eq!(memory.session(), Session::Poisoned);
    }
}
