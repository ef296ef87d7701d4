//! The memory of a session: its state, whose it is, and the words of the block map.
//!
//! It is either private, or shared memory that outlives the process: then a successor takes it over where
//! this one was killed, and nothing acknowledged is lost. Layout, version 1, in words of 64 bits: a header of
//! one page, then one word per BAT slot; of a differencing image, from the next page on, the sector bitmaps,
//! chunk by chunk.
//!
//! | words of the header | what |
//! |---|---|
//! | 0 | the magic, "vhdxsess", of every version |
//! | 1 | the version of the layout |
//! | 2 | CRC-32C of words 1, 3 to 15 and 32 to 511, which do not change |
//! | 3, 4 | the kernel's boot id |
//! | 5, 6, 7 | the image's inode, `st_dev` and `f_fsid` when the session began |
//! | 8, 9 | the image's disk id |
//! | 10, 11, 12 | bytes of the virtual disk, of a block, of a logical sector |
//! | 16 | the session word: idle, open or poisoned |
//! | 17 to 19, 20 to 22 | the current and the next `FileWriteGuid`, each with its check |
//! | 23 | whether data of the disk has passed through the host's page cache, and whether the host's answer about it is gone |
//! | 32, 33 to 511 | the length of the image's path, and the path |
//!
//! One atomic word is the unit of everything in it, so a process may be killed between any two stores:
//!
//! * the magic is stored last: memory without it was never complete and is worth nothing;
//! * of the two `FileWriteGuid`s, `next` is stored before any header carries it and `current` is replaced
//!   only when every header that could be found carries `next`. So one of the two is whole and in the file.
//!
//! What a kill cannot leave is damage: it is distinguished from memory that was never complete and from
//! another version's, because acknowledged data may depend on it. A word of the map is checked as an entry of
//! a BAT is.

use std::ffi::OsString;
use std::ops::Range;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

use super::bitmaps::{MAX_BITMAP_BYTES, SectorBitmaps, WORDS_PER_CHUNK};
use super::words::{Reserve, Shared, SharedWords, Written};
use crate::atomic::{AtomicU64, Ordering, zeroed};
use crate::disk::PAGE_BYTES;
use crate::format::bat::Geometry;
use crate::format::index;
use crate::simulation::{Plant, planted};

/// Words before the first slot: a page.
pub const HEADER_WORDS: usize = PAGE_BYTES / size_of::<u64>();

/// Of every version, so that memory of another one is not taken for damaged.
const MAGIC: u64 = u64::from_le_bytes(*b"vhdxsess");

/// The layout's version.
pub const VERSION: u64 = 1;

const MAGIC_PLACE: usize = 0;
const VERSION_PLACE: usize = 1;
const CHECKSUM_PLACE: usize = 2;
const BOOT_PLACE: usize = 3;
const FILE_PLACE: usize = 5;
const DISK_PLACE: usize = 8;
const SHAPE_PLACE: usize = 10;
/// The words that change lie between this one and [`PATH_PLACE`]; the checksum covers all others.
const STATE_PLACE: usize = 16;
const CURRENT_PLACE: usize = 17;
const NEXT_PLACE: usize = 20;
const CACHE_PLACE: usize = 23;
const PATH_PLACE: usize = 32;

const _: () = assert!(BOOT_PLACE == CHECKSUM_PLACE + 1 && FILE_PLACE == BOOT_PLACE + 2);
const _: () = assert!(DISK_PLACE == FILE_PLACE + 3 && SHAPE_PLACE == DISK_PLACE + 2);
const _: () = assert!(SHAPE_PLACE + 3 <= STATE_PLACE, "what is constant comes first");
const _: () = assert!(CURRENT_PLACE == STATE_PLACE + 1 && NEXT_PLACE == CURRENT_PLACE + 3);
const _: () = assert!(CACHE_PLACE == NEXT_PLACE + 3 && CACHE_PLACE < PATH_PLACE);

/// The longest path that is kept, bytes; of a longer one nothing is.
const MAX_PATH_BYTES: usize = (HEADER_WORDS - PATH_PLACE - 1) * size_of::<u64>();

// Words that no damage of a few bits turns into one another.
const IDLE: u64 = 0x1d1e_1d1e_0f0f_0f01;
const OPEN: u64 = 0x09e4_5e55_a5a5_a502;
const POISONED: u64 = 0x7015_04ed_5a5a_5a03;
const CACHED: u64 = 0xcac4_ed00_cac4_ed00;
const IN_DOUBT: u64 = 0xd0b7_d000_d0b7_d000;

/// Where the writable session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Session {
    /// Nothing has been modified: the file is still as it was found.
    Idle,
    /// The headers announce a writer; the image may be modified.
    Open,
    /// Something that must not fail has failed: no write or flush succeeds from now on; reads do.
    Poisoned,
}

/// Where an image is, and since which start of the kernel what is in memory counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The kernel's boot id: a power cut takes what was not flushed, and what memory says of it is worth
    /// nothing.
    pub boot: Uuid,
    /// The image's inode.
    pub inode: u64,
    /// `st_dev` of its file system, which another mount may change.
    pub device: u64,
    /// `f_fsid` of its file system, which stays; 0 where the host does not say.
    pub file_system: u64,
    /// Its path, absolute.
    pub path: PathBuf,
}

/// Whose memory it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Where the image is.
    pub place: Place,
    /// The image's disk id.
    pub disk_id: Uuid,
    /// Size of the virtual disk, bytes.
    pub virtual_size: u64,
    /// Size of a block, bytes.
    pub block_size: u64,
    /// Size of a logical sector, bytes.
    pub sector_size: u64,
}

impl Owner {
    fn shape(&self) -> [u64; 3] {
        [self.virtual_size, self.block_size, self.sector_size]
    }
}

/// Why memory cannot be used for an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mismatch {
    /// It was never completed.
    Incomplete,
    /// It has another layout, of this version.
    Version(u64),
    /// It is not what any process stores: this part is damaged.
    Damaged(&'static str),
    /// It is from before the kernel was started: the power was cut since.
    OtherBoot,
    /// It is another image's.
    Foreign,
    /// The image was written by another program since.
    Changed,
    /// The disk has become larger under this session, which rests: the image has everything, and a new
    /// session takes its place.
    Grown,
}

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

impl SessionMemory {
    /// Zeroed memory of this process for a map of `geometry`. It is touched only where something is stored.
    pub fn private(geometry: &Geometry) -> Self {
        let words = zeroed(Self::reserved_words(geometry));
        words[STATE_PLACE].store(IDLE, Ordering::Relaxed);
        Self(Words::Private(Arc::new(Private { words, bitmaps: Arc::new(SectorBitmaps::private(geometry)) })))
    }

    /// Memory that others may have used before, and may use afterwards. There is room for its first
    /// [`Self::reserved_words`]; `reserve` makes more. `written` finds what others have left.
    pub fn shared(words: SharedWords, reserve: Reserve, written: Written) -> Self {
        // No more than that for a disk of no blocks, which a hostile image may have.
        assert!(words.len() >= HEADER_WORDS, "a header");
        Self(Words::Shared(Shared { words, reserve, written }))
    }

    /// The words, if others may share them.
    pub fn shared_words(&self) -> Option<&SharedWords> {
        match &self.0 {
            Words::Shared(shared) => Some(&shared.words),
            Words::Private(_) => None,
        }
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

    /// The most bytes it may take, all bitmaps that may be in memory at once included.
    pub fn most_bytes(geometry: &Geometry) -> u64 {
        let bytes = |words: usize| (words * size_of::<u64>()) as u64;
        bytes(Self::words_for(geometry)).min(bytes(bitmaps_place(geometry)) + MAX_BITMAP_BYTES)
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

    /// The first of `slots` that may hold anything but zeros, and those behind them up to the next that does
    /// not; `None` if there are none.
    pub(super) fn written_slots(&self, slots: Range<usize>) -> Option<Range<usize>> {
        assert!(slots.start <= slots.end && slots.end <= self.slots().len(), "{slots:?} are in the memory");
        if slots.is_empty() {
            return None;
        }
        let Words::Shared(shared) = &self.0 else { return Some(slots) };
        let words = (shared.written)(HEADER_WORDS + slots.start..HEADER_WORDS + slots.end)?;
        let written = words.start.max(HEADER_WORDS + slots.start)..words.end.min(HEADER_WORDS + slots.end);
        assert!(written.start < written.end, "{words:?} were asked for");
        Some(written.start - HEADER_WORDS..written.end - HEADER_WORDS)
    }

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        match &self.0 {
            Words::Private(private) => &private.words,
            Words::Shared(shared) => &shared.words,
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
        if planted(Plant::OpenOverPoison) && self.session() == Session::Idle {
            self.store(STATE_PLACE, OPEN);
        }
        let found = word.compare_exchange(IDLE, OPEN, Ordering::AcqRel, Ordering::Acquire);
        assert!(matches!(found, Ok(IDLE) | Err(OPEN | POISONED)), "the word was checked: {found:?}");
        assert_ne!(self.session(), Session::Idle, "an open session has not begun to rest");
    }

    /// Open becomes idle: the file has everything, durably. Poison stays.
    pub fn rest(&self) {
        let word = &self.words()[STATE_PLACE];
        let found = word.compare_exchange(OPEN, IDLE, Ordering::AcqRel, Ordering::Acquire);
        assert!(matches!(found, Ok(OPEN) | Err(IDLE | POISONED)), "the word was checked: {found:?}");
    }

    /// From now on no write or flush may succeed. `true` for the one caller that changed it.
    pub fn poison(&self) -> bool {
        self.words()[STATE_PLACE].swap(POISONED, Ordering::AcqRel) != POISONED
    }

    /// Completes fresh memory, whose slots are in place, as `owner`'s, whose file carries `current`.
    pub(super) fn complete(&self, owner: &Owner, current: Uuid) {
        assert_eq!(self.load(MAGIC_PLACE), 0, "memory is completed once");
        let place = &owner.place;
        self.store_guid(BOOT_PLACE, place.boot);
        self.store_all(FILE_PLACE, &[place.inode, place.device, place.file_system]);
        self.store_guid(DISK_PLACE, owner.disk_id);
        self.store_all(SHAPE_PLACE, &owner.shape());
        self.store_path(&place.path);
        self.store(STATE_PLACE, IDLE);
        self.store_checked(CURRENT_PLACE, current);
        self.store_checked(NEXT_PLACE, current);
        self.store(VERSION_PLACE, VERSION);
        self.store(CHECKSUM_PLACE, self.checksum());
        self.store(MAGIC_PLACE, MAGIC);
        assert_eq!(self.check(owner, current), Ok(()), "what was made can be taken over");
    }

    /// Whether this is memory of the layout that this program knows, complete and undamaged.
    ///
    /// # Errors
    /// Why not.
    pub fn check_layout(&self) -> Result<(), Mismatch> {
        match self.load(MAGIC_PLACE) {
            0 => return Err(Mismatch::Incomplete),
            MAGIC => {}
            _ => return Err(Mismatch::Damaged("magic")),
        }
        let version = self.load(VERSION_PLACE);
        if version != VERSION && !planted(Plant::IgnoreVersion) {
            return Err(Mismatch::Version(version));
        }
        if self.load(CHECKSUM_PLACE) != self.checksum() && !planted(Plant::IgnoreChecksum) {
            return Err(Mismatch::Damaged("header"));
        }
        if ![IDLE, OPEN, POISONED].contains(&self.load(STATE_PLACE)) {
            return Err(Mismatch::Damaged("session word"));
        }
        Ok(())
    }

    /// Whether this is `owner`'s memory, whose file carries `file_write_guid`, since this start of the
    /// kernel.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, owner: &Owner, file_write_guid: Uuid) -> Result<(), Mismatch> {
        self.check_layout()?;
        if self.boot() != owner.place.boot && !planted(Plant::IgnoreBoot) {
            return Err(Mismatch::OtherBoot);
        }
        if self.load(FILE_PLACE) != owner.place.inode || self.disk_id() != owner.disk_id {
            return Err(Mismatch::Foreign);
        }
        let shape = [0, 1, 2].map(|word| self.load(SHAPE_PLACE + word));
        let has_grown = shape != owner.shape();
        if has_grown && !self.may_have_grown_to(owner, shape) {
            return Err(Mismatch::Changed);
        }
        let known = [CURRENT_PLACE, NEXT_PLACE].map(|place| self.load_checked(place));
        match known {
            _ if known.contains(&Some(file_write_guid)) => {
                if has_grown {
                    Err(Mismatch::Grown)
                } else {
                    Ok(())
                }
            }
            [Some(_), Some(_)] => Err(Mismatch::Changed),
            // A kill while one of them is stored leaves the other one, which is in the file.
            _ => Err(Mismatch::Damaged("FileWriteGuids")),
        }
    }

    /// Whether a disk of this `shape` may have become `owner`'s under this session: it grows while the
    /// session rests.
    fn may_have_grown_to(&self, owner: &Owner, shape: [u64; 3]) -> bool {
        let [virtual_size, block_size, sector_size] = shape;
        virtual_size < owner.virtual_size
            && [block_size, sector_size] == [owner.block_size, owner.sector_size]
            && self.session() != Session::Open
    }

    /// Size of the virtual disk that it was made for, bytes. Of memory whose layout was checked, as the next
    /// three.
    pub fn virtual_size(&self) -> u64 {
        self.load(SHAPE_PLACE)
    }

    /// The boot id of the kernel under which it was made.
    pub fn boot(&self) -> Uuid {
        self.load_guid(BOOT_PLACE)
    }

    /// The disk id of its image.
    pub fn disk_id(&self) -> Uuid {
        self.load_guid(DISK_PLACE)
    }

    /// Where its image was when it was made.
    pub fn place(&self) -> Place {
        let [inode, device, file_system] = [0, 1, 2].map(|word| self.load(FILE_PLACE + word));
        Place { boot: self.boot(), inode, device, file_system, path: self.load_path() }
    }

    /// Data of the disk goes through the host's page cache: what the host cannot write back, it may tell a
    /// process that is being killed, and no other.
    pub fn note_page_cache(&self) {
        self.store(CACHE_PLACE, CACHED);
    }

    /// Whether data of the disk has passed through the host's page cache.
    pub fn used_page_cache(&self) -> bool {
        self.load(CACHE_PLACE) != 0
    }

    /// The host answers once whether it has lost data of a file system, and its answer may go to another
    /// process than the one that has to know: one that is killed before it has noted it, or one that serves
    /// another image.
    pub fn leave_in_doubt(&self) {
        self.store(CACHE_PLACE, IN_DOUBT);
    }

    /// Whether an answer of the host may have gone to another process.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.load(CACHE_PLACE) == IN_DOUBT
    }

    /// A header is about to carry `next`.
    pub fn announce(&self, next: Uuid) {
        assert!(!next.is_nil(), "a file that was written has a GUID");
        self.store_checked(NEXT_PLACE, next);
        assert_eq!(self.load_checked(NEXT_PLACE), Some(next), "a successor finds it");
    }

    /// Every header that could be found carries `file_write_guid`.
    pub fn confirm_guid(&self, file_write_guid: Uuid) {
        self.store_checked(CURRENT_PLACE, file_write_guid);
        assert_eq!(self.load_checked(CURRENT_PLACE), Some(file_write_guid), "a successor finds it");
    }

    fn load(&self, place: usize) -> u64 {
        self.words()[place].load(Ordering::Acquire)
    }

    fn store(&self, place: usize, word: u64) {
        self.words()[place].store(word, Ordering::Release);
    }

    fn store_all(&self, place: usize, words: &[u64]) {
        (place..).zip(words).for_each(|(place, word)| self.store(place, *word));
    }

    fn load_guid(&self, place: usize) -> Uuid {
        Uuid::from_u64_pair(self.load(place), self.load(place + 1))
    }

    fn store_guid(&self, place: usize, guid: Uuid) {
        let (high, low) = guid.as_u64_pair();
        self.store_all(place, &[high, low]);
    }

    /// A GUID that is stored while others may look, unless it is torn or damaged.
    fn load_checked(&self, place: usize) -> Option<Uuid> {
        let guid = self.load_guid(place);
        (self.load(place + 2) == check_of(guid)).then_some(guid)
    }

    fn store_checked(&self, place: usize, guid: Uuid) {
        self.store_guid(place, guid);
        self.store(place + 2, check_of(guid));
    }

    fn store_path(&self, path: &Path) {
        let bytes = path.as_os_str().as_bytes();
        let bytes = if bytes.len() > MAX_PATH_BYTES { &[] } else { bytes };
        assert!(PATH_PLACE + 1 + bytes.len().div_ceil(size_of::<u64>()) <= HEADER_WORDS, "it fits");
        self.store(PATH_PLACE, bytes.len() as u64);
        for (place, part) in (PATH_PLACE + 1..).zip(bytes.chunks(size_of::<u64>())) {
            let mut word = [0; size_of::<u64>()];
            word[..part.len()].copy_from_slice(part);
            self.store(place, u64::from_le_bytes(word));
        }
    }

    fn load_path(&self) -> PathBuf {
        let length = usize::try_from(self.load(PATH_PLACE)).map_or(0, |length| length.min(MAX_PATH_BYTES));
        let words = (PATH_PLACE + 1..HEADER_WORDS).map(|place| self.load(place));
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).take(length).collect();
        OsString::from_vec(bytes).into()
    }

    /// Over what does not change as long as the memory is used.
    fn checksum(&self) -> u64 {
        let constant = (BOOT_PLACE..STATE_PLACE).chain(PATH_PLACE..HEADER_WORDS);
        let places = std::iter::once(VERSION_PLACE).chain(constant);
        places.fold(0, |sum, place| crc32c::crc32c_append(sum, &self.load(place).to_le_bytes())).into()
    }
}

/// Stored behind a GUID. Not zero, so that zeros are no GUID.
fn check_of(guid: Uuid) -> u64 {
    u64::from(crc32c::crc32c(guid.as_bytes())) | 1 << 63
}

/// The word with which the sector bitmaps begin.
fn bitmaps_place(geometry: &Geometry) -> usize {
    SessionMemory::reserved_words(geometry).next_multiple_of(HEADER_WORDS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner() -> Owner {
        let path = "/images/a long name \u{e4} that is no multiple of eight.vhdx".into();
        let place = Place { boot: guid(9), inode: 2, device: 1, file_system: 7, path };
        Owner { place, disk_id: guid(8), virtual_size: 16 << 20, block_size: 1 << 20, sector_size: 512 }
    }

    fn guid(number: u128) -> Uuid {
        Uuid::from_u128(number << 64 | number)
    }

    fn memory() -> SessionMemory {
        SessionMemory::private(&Geometry::new(16 << 20, 1 << 20, 512, false))
    }

    /// Session files of every version that is read, as they were left.
    const LEFT: [(u64, &[u8]); 1] = [(1, include_bytes!("../../tests/formats/session-1.bin"))];

    fn left(bytes: &[u8]) -> SessionMemory {
        let words = bytes.chunks_exact(size_of::<u64>());
        let words = words.map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")).into());
        let none = Arc::new(|_| Err(std::io::ErrorKind::ReadOnlyFilesystem.into()));
        SessionMemory::shared(words.collect::<Vec<AtomicU64>>().into(), none, Arc::new(Some))
    }

    #[test]
    fn what_earlier_programs_have_left_is_read_as_they_meant_it() {
        use super::super::BlockMap;
        for (version, bytes) in LEFT {
            let memory = left(bytes);
            assert_eq!((memory.check_layout(), memory.load(VERSION_PLACE)), (Ok(()), version));
            let disk_id = "6d1d2f4a-9c3b-4e55-a1b2-c3d4e5f60718".parse().expect("a GUID");
            let place = memory.place();
            assert_eq!((place.inode, place.device, place.file_system), (4242, 2049, 77));
            assert_eq!(place.path, Path::new("/disks/ext4 \u{e4}.vhdx"));
            let owner =
                Owner { place, disk_id, virtual_size: 16 << 20, block_size: 1 << 20, sector_size: 512 };
            for guid in ["11111111-2222-4333-8444-555555555555", "66666666-7777-4888-9999-aaaaaaaaaaaa"] {
                assert_eq!(memory.check(&owner, guid.parse().expect("a GUID")), Ok(()));
            }
            assert_eq!(memory.session(), Session::Open);
            let map = BlockMap::over(memory, Geometry::new(16 << 20, 1 << 20, 512, false));
            let block = |block| (map.load(block).entry.offset(), map.load(block).durable);
            assert_eq!((block(3), block(7), block(9)), ((4 << 20, true), (5 << 20, false), (0, false)));
        }
        let last = LEFT.last().expect("the present one is there");
        assert_eq!(last.0, VERSION, "a new version has its sample, too");
    }

    #[test]
    fn only_complete_memory_of_the_same_image_in_the_same_state_matches() {
        let (memory, owner) = (memory(), owner());
        assert_eq!(memory.check(&owner, guid(1)), Err(Mismatch::Incomplete));
        memory.complete(&owner, guid(1));
        assert_eq!(memory.check(&owner, guid(1)), Ok(()));
        assert_eq!((memory.place(), memory.disk_id()), (owner.place.clone(), owner.disk_id));
        let at = |place| Owner { place, ..owner.clone() };
        let moved = at(Place { device: 5, path: "/mnt/b.vhdx".into(), ..owner.place.clone() });
        assert_eq!(memory.check(&moved, guid(1)), Ok(()), "mounted again elsewhere, it is the same image");
        let other_file = at(Place { inode: 3, ..owner.place.clone() });
        let other_disk = Owner { disk_id: guid(7), ..owner.clone() };
        for other in [other_file, other_disk] {
            assert_eq!(memory.check(&other, guid(1)), Err(Mismatch::Foreign));
        }
        let later = at(Place { boot: guid(10), ..owner.place.clone() });
        assert_eq!(memory.check(&later, guid(1)), Err(Mismatch::OtherBoot));
        let shrunk = Owner { virtual_size: 15 << 20, ..owner.clone() };
        let other_blocks = Owner { virtual_size: 17 << 20, block_size: 2 << 20, ..owner.clone() };
        for changed in [shrunk, other_blocks] {
            assert_eq!(memory.check(&changed, guid(1)), Err(Mismatch::Changed));
        }
        assert_eq!(memory.check(&owner, guid(2)), Err(Mismatch::Changed));
    }

    /// A disk grows while its session rests, and under a GUID that the session knows: whatever else is larger
    /// has been written by another program.
    #[test]
    fn a_disk_that_has_grown_under_its_session_is_its_own() {
        let (memory, owner) = (memory(), owner());
        memory.complete(&owner, guid(1));
        let grown = Owner { virtual_size: 17 << 20, ..owner };
        assert_eq!(memory.check(&grown, guid(2)), Err(Mismatch::Changed));
        memory.announce(guid(2));
        for in_file in [guid(1), guid(2)] {
            assert_eq!(memory.check(&grown, in_file), Err(Mismatch::Grown));
        }
        memory.open();
        assert_eq!(memory.check(&grown, guid(2)), Err(Mismatch::Changed), "it has what the image has not");
        memory.rest();
        assert_eq!(memory.check(&grown, guid(2)), Err(Mismatch::Grown));
    }

    /// Whatever one word of the header becomes: another version is named, damage is not taken for anything
    /// else, and what is believed is what was stored.
    #[test]
    fn a_damaged_header_is_never_taken_for_another_images_or_an_unfinished_one() {
        for place in 0..HEADER_WORDS {
            let (memory, owner) = (memory(), owner());
            memory.complete(&owner, guid(1));
            memory.open();
            memory.store(place, memory.load(place) ^ 1 << 17);
            let found = memory.check(&owner, guid(1));
            let expected = match place {
                VERSION_PLACE => found == Err(Mismatch::Version(VERSION ^ 1 << 17)),
                // One of the two GUIDs is enough, and there are words that nothing is stored in.
                CURRENT_PLACE..PATH_PLACE => found == Ok(()),
                _ => matches!(found, Err(Mismatch::Damaged(_))),
            };
            assert!(expected, "word {place}: {found:?}");
        }
        let (memory, owner) = (memory(), owner());
        memory.complete(&owner, guid(1));
        for place in [CURRENT_PLACE, NEXT_PLACE] {
            memory.store(place, memory.load(place) ^ 4);
        }
        assert_eq!(memory.check(&owner, guid(1)), Err(Mismatch::Damaged("FileWriteGuids")));
        memory.store(STATE_PLACE, 0);
        assert_eq!(memory.session(), Session::Poisoned, "nothing is written on the word of damaged memory");
    }

    #[test]
    fn a_path_that_is_too_long_is_left_out() {
        let (memory, mut owner) = (memory(), owner());
        owner.place.path = PathBuf::from("/".to_owned() + &"x".repeat(MAX_PATH_BYTES));
        memory.complete(&owner, guid(1));
        assert_eq!((memory.check(&owner, guid(1)), memory.place().path), (Ok(()), PathBuf::new()));
    }

    /// A process killed between any two stores leaves memory that still matches what the file carries.
    #[test]
    fn the_guid_in_the_file_is_known_at_every_moment() {
        let memory = memory();
        let owner = owner();
        memory.complete(&owner, guid(1));
        memory.store(NEXT_PLACE, guid(2).as_u64_pair().0);
        assert_eq!(memory.check(&owner, guid(1)), Ok(()), "half announced: no header carries it");
        memory.announce(guid(2));
        for in_file in [guid(1), guid(2)] {
            assert_eq!(memory.check(&owner, in_file), Ok(()), "the headers change one after the other");
        }
        memory.store(CURRENT_PLACE, guid(2).as_u64_pair().0);
        assert_eq!(memory.check(&owner, guid(2)), Ok(()), "half settled: every header carries the next");
        memory.confirm_guid(guid(2));
        memory.announce(guid(3));
        assert_eq!(memory.check(&owner, guid(2)), Ok(()));
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
