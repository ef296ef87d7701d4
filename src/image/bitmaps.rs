//! The sector bitmaps of an image in memory: which sectors of its partially present blocks are in its file.
//!
//! Only the bits of blocks that are partially present mean anything. A bit per sector, in the format's own
//! order, as atomic words: every thread reads them, and whoever has written a sector sets its bit. Bits are
//! only ever set: a block that leaves this state does not come back to it. Memory is touched where such
//! blocks are, and nowhere else.

use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use super::words::{Shared, SharedWords, WORD_BITS};
use crate::atomic::{AtomicU64, AtomicUsize, Ordering, zeroed};
use crate::disk::PAGE_BYTES;
use crate::format::bat::{BITMAP_BLOCK_SIZE, Geometry};
use crate::format::index;
use crate::simulation::{Plant, ordered};

/// The most memory that the bitmaps of one image may take, bytes: a bit per sector of every chunk that has
/// partially present blocks, so 32 TiB in 512-byte sectors.
pub const MAX_BITMAP_BYTES: u64 = 8 << 30;

/// Bytes of a page of a sector bitmap, by which it is logged.
const PAGE: u64 = PAGE_BYTES as u64;

/// Pages of a chunk's bitmap.
pub const PAGES_PER_CHUNK: u64 = BITMAP_BLOCK_SIZE / PAGE;

const _: () = assert!(BITMAP_BLOCK_SIZE.is_multiple_of(PAGE), "a bitmap is whole pages");

/// Words of a chunk's bitmap.
pub(super) const WORDS_PER_CHUNK: usize = (BITMAP_BLOCK_SIZE * 8 / WORD_BITS) as usize;

/// See the module's head.
pub struct SectorBitmaps {
    /// By chunk; of an image without parents there are none.
    chunks: Box<[OnceLock<Words>]>,
    /// How many of them have words.
    made: AtomicUsize,
    /// Where words come from, and the first one's place there; private memory if nowhere.
    shared: Option<(Shared, usize)>,
}

enum Words {
    Private(Box<[AtomicU64]>),
    /// Those from this place on.
    Shared(SharedWords, usize),
}

impl Words {
    #[inline]
    fn get(&self) -> &[AtomicU64] {
        match self {
            Self::Private(words) => words,
            Self::Shared(words, place) => &words[*place..][..WORDS_PER_CHUNK],
        }
    }
}

impl SectorBitmaps {
    /// Bitmaps in memory of this process.
    pub(super) fn private(geometry: &Geometry) -> Self {
        let chunks = if geometry.is_differencing() { geometry.bitmap_block_count() } else { 0 };
        let chunks = (0..chunks).map(|_| OnceLock::new()).collect();
        Self { chunks, made: AtomicUsize::new(0), shared: None }
    }

    /// Bitmaps in shared memory, from its word `place` on.
    pub(super) fn shared(geometry: &Geometry, memory: Shared, place: usize) -> Self {
        let words = index(geometry.bitmap_block_count()) * WORDS_PER_CHUNK;
        assert!(!geometry.is_differencing() || place + words <= memory.words.len(), "all bitmaps have words");
        Self { shared: Some((memory, place)), ..Self::private(geometry) }
    }

    /// Makes room for the bits of `block`.
    ///
    /// # Errors
    /// Out of memory beyond [`MAX_BITMAP_BYTES`]; no space where the memory is shared.
    pub fn make_room(&self, geometry: &Geometry, block: u64) -> io::Result<()> {
        assert!(geometry.is_differencing(), "only a child has sector bitmaps");
        assert!(block < geometry.block_count(), "block {block} is on the disk");
        let chunk = index(geometry.chunk_of_block(block));
        if let Some((memory, place)) = &self.shared {
            let slice = geometry.bitmap_slice(block);
            let first = place + chunk * WORDS_PER_CHUNK;
            (memory.reserve)(first + index(slice.start / 8)..first + index(slice.end / 8))?;
        }
        if self.chunks[chunk].get().is_some() {
            return Ok(());
        }
        if (self.made.fetch_add(1, Ordering::Relaxed) as u64) >= MAX_BITMAP_BYTES / BITMAP_BLOCK_SIZE {
            self.made.fetch_sub(1, Ordering::Relaxed);
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.chunks[chunk].get_or_init(|| match &self.shared {
            Some((memory, place)) => Words::Shared(memory.words.clone(), place + chunk * WORDS_PER_CHUNK),
            None => Words::Private(zeroed(WORDS_PER_CHUNK)),
        });
        Ok(())
    }

    /// Takes over the `bits` of `block` as the file has them.
    ///
    /// # Errors
    /// Those of [`Self::make_room`].
    pub fn store(&self, geometry: &Geometry, block: u64, bits: &[u8]) -> io::Result<()> {
        self.make_room(geometry, block)?;
        let words = self.slice(geometry, block).expect("there is room now");
        assert_eq!(size_of_val(words), bits.len(), "the bits of one block");
        words.iter().zip(words_of(bits)).for_each(|(word, bits)| word.store(bits, Ordering::Release));
        Ok(())
    }

    /// Takes over the bits of `block` from `other`.
    pub(super) fn take_over(&self, other: &Self, geometry: &Geometry, block: u64) -> io::Result<()> {
        assert_eq!(self.chunks.len(), other.chunks.len(), "both are of one disk");
        self.make_room(geometry, block)?;
        let mine = self.slice(geometry, block).into_iter().flatten();
        let others = other.slice(geometry, block).into_iter().flatten();
        mine.zip(others).for_each(|(mine, word)| mine.store(word.load(Ordering::Relaxed), Ordering::Relaxed));
        Ok(())
    }

    /// The run of sectors of partially present `block` from its sector `from`, which lies below `end`:
    /// whether they are in the file, and the first sector that differs, `end` at most.
    #[inline]
    pub fn run(&self, geometry: &Geometry, block: u64, from: u64, end: u64) -> (bool, u64) {
        debug_assert!(from < end && end <= sectors_per_block(geometry), "sectors {from} to {end}");
        let Some(words) = self.slice(geometry, block) else { return (false, end) };
        let order = ordered(Plant::RelaxedFind, Ordering::Acquire);
        let load = |sector: u64| words[index(sector / WORD_BITS)].load(order);
        // Looked at once: a bit that is set meanwhile would end the run before its first sector.
        let mut word = load(from);
        let here = word >> (from % WORD_BITS) & 1 == 1;
        let mut sector = from;
        loop {
            let differing = if here { !word } else { word } >> (sector % WORD_BITS);
            if differing != 0 {
                return (here, end.min(sector + u64::from(differing.trailing_zeros())));
            }
            sector = (sector / WORD_BITS + 1) * WORD_BITS;
            if sector >= end {
                return (here, end);
            }
            word = load(sector);
        }
    }

    /// Whether all of `sectors` of partially present `block` are in the file.
    #[inline]
    pub fn has(&self, geometry: &Geometry, block: u64, sectors: Range<u64>) -> bool {
        self.run(geometry, block, sectors.start, sectors.end) == (true, sectors.end)
    }

    /// The data of `sectors` of partially present `block` is in the file.
    pub fn set(&self, geometry: &Geometry, block: u64, sectors: Range<u64>) {
        assert!(sectors.end <= sectors_per_block(geometry), "{sectors:?} are of one block");
        let words = self.slice(geometry, block).expect("a partially present block has bits");
        let mut sector = sectors.start;
        while sector < sectors.end {
            let next = ((sector / WORD_BITS + 1) * WORD_BITS).min(sectors.end);
            let bits = u64::MAX >> (WORD_BITS - (next - sector)) << (sector % WORD_BITS);
            let order = ordered(Plant::RelaxedBits, Ordering::AcqRel);
            words[index(sector / WORD_BITS)].fetch_or(bits, order);
            sector = next;
        }
    }

    /// Whether every sector of partially present `block` is in the file.
    pub fn is_full(&self, geometry: &Geometry, block: u64) -> bool {
        self.has(geometry, block, 0..sectors_per_block(geometry))
    }

    /// The pages of the chunk's bitmap that hold bits of `block`.
    pub fn pages(geometry: &Geometry, block: u64) -> Range<u64> {
        let slice = geometry.bitmap_slice(block);
        slice.start / PAGE..slice.end.div_ceil(PAGE)
    }

    /// A copy of page `page` of the bitmap of `chunk` as it is written to the file.
    pub fn copy_page(&self, chunk: u64, page: u64) -> Box<[u8; PAGE_BYTES]> {
        assert!(page < PAGES_PER_CHUNK, "page {page} is of one chunk");
        let mut bytes = Box::new([0; PAGE_BYTES]);
        if let Some(words) = self.chunks[index(chunk)].get() {
            let words = &words.get()[index(page) * PAGE_BYTES / 8..];
            for (target, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
                *target = word.load(Ordering::Acquire).to_le_bytes();
            }
        }
        bytes
    }

    /// How the bits of `block` relate to `bits`, which the file has of it: whether they are the same, and
    /// whether they have all that the file has.
    pub(super) fn compare(&self, geometry: &Geometry, block: u64, bits: &[u8]) -> (bool, bool) {
        let words = self.slice(geometry, block).unwrap_or_default();
        assert!(words.is_empty() || size_of_val(words) == bits.len(), "the bits of one block");
        let words = words.iter();
        let pairs = words.map(|word| word.load(Ordering::Relaxed)).zip(words_of(bits));
        pairs.fold((true, true), |(same, all), (mine, file)| (same && mine == file, all && file & !mine == 0))
    }

    #[inline]
    fn slice(&self, geometry: &Geometry, block: u64) -> Option<&[AtomicU64]> {
        let words = self.chunks.get(index(geometry.chunk_of_block(block)))?.get()?;
        let slice = geometry.bitmap_slice(block);
        Some(&words.get()[index(slice.start / 8)..index(slice.end / 8)])
    }
}

fn sectors_per_block(geometry: &Geometry) -> u64 {
    geometry.block_size() / u64::from(geometry.logical_sector_size())
}

fn words_of(bits: &[u8]) -> impl Iterator<Item = u64> {
    bits.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_those_of_the_bits_in_the_file(
            block_shift in 20_u32..24,
            sector in prop::sample::select(vec![512_u32, 4096]),
            block in 0_u64..20,
            bytes in prop::collection::vec(prop::sample::select(vec![0_u8, 0xff, 0xf0, 0x5a]), 1 << 16),
        ) {
            let geometry = Geometry::new(1 << 40, 1 << block_shift, sector, true);
            let slice = geometry.bitmap_slice(block);
            let mut image = vec![0xee; index(BITMAP_BLOCK_SIZE)];
            for (target, byte) in image[index(slice.start)..index(slice.end)].iter_mut().zip(&bytes) {
                *target = *byte;
            }
            let bitmaps = SectorBitmaps::private(&geometry);
            bitmaps.store(&geometry, block, &image[index(slice.start)..index(slice.end)]).expect("memory");
            let bit = |at: u64| image[index(slice.start + at / 8)] >> (at % 8) & 1 == 1;
            let sectors = geometry.block_size() / u64::from(sector);
            let mut at = 0;
            while at < sectors {
                let (here, next) = bitmaps.run(&geometry, block, at, sectors);
                prop_assert!(next > at && (at..next).all(|sector| bit(sector) == here));
                prop_assert!(next == sectors || bit(next) != here);
                prop_assert_eq!(bitmaps.run(&geometry, block, at, at + 1), (here, at + 1));
                at = next;
            }
        }
    }

    #[test]
    fn a_chunk_without_bits_has_nothing() {
        let geometry = Geometry::new(1 << 40, 2 << 20, 512, true);
        assert_eq!(SectorBitmaps::private(&geometry).run(&geometry, 9999, 5, 77), (false, 77));
    }
}
