//! Which pages of the leaf's sector bitmaps have changed since they were last copied for the log.
//!
//! Fronts set bits and mark; the engine takes the marks when a commit cycle closes its set, and copies the
//! pages then. A flush that follows the completion of a write must find the write's bits in that copy:
//!
//! * a front marks *after* it has set the bits, and before it reports the write as done;
//! * a front that finds the bits set already, by another front, cannot know whether that one has marked yet.
//!   So a front counts itself into the page before it sets bits, and out after it has marked. Bits that are
//!   set in a page without a mark and without a front in it are in a copy. Otherwise the front marks the page
//!   itself.

use std::ops::Range;

use crate::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use crate::disk::PAGE_BYTES;
use crate::format::bat::Geometry;
use crate::format::index;
use crate::image::{BlockMap, PAGES_PER_CHUNK, Page, WORD_BITS};
use crate::simulation::{Plant, ordered, planted};

/// The page has changed.
const MARKED: u32 = 1;

/// One front is about to change the page and has not marked it yet.
const INSIDE: u32 = 2;

/// Sectors whose bits are in one page.
const SECTORS_PER_PAGE: u64 = 8 * PAGE_BYTES as u64;

/// See the module's head.
pub struct DirtyBitmapPages {
    /// By page, chunk after chunk.
    pages: Box<[AtomicU32]>,
    /// A bit per chunk with marked pages.
    chunks: Box<[AtomicU64]>,
    count: AtomicUsize,
}

impl DirtyBitmapPages {
    /// No page is marked.
    pub(super) fn new(geometry: &Geometry) -> Self {
        let chunks = if geometry.is_differencing() { geometry.bitmap_block_count() } else { 0 };
        let pages = usize::try_from(chunks * PAGES_PER_CHUNK).expect("2^22 pages at most");
        let chunks = usize::try_from(chunks.div_ceil(WORD_BITS)).expect("2^8 words at most");
        Self {
            pages: (0..pages).map(|_| AtomicU32::default()).collect(),
            chunks: (0..chunks).map(|_| AtomicU64::new(0)).collect(),
            count: AtomicUsize::new(0),
        }
    }

    /// How many pages are marked.
    #[inline]
    pub(super) fn count(&self) -> usize {
        self.count.load(ordered(Plant::RelaxedCount, Ordering::Acquire))
    }

    /// Whether a page of the bitmap of `chunk` may be marked.
    pub(super) fn is_marked(&self, chunk: u64) -> bool {
        let chunks = self.chunks[index(chunk / WORD_BITS)].load(Ordering::Acquire);
        chunks >> (chunk % WORD_BITS) & 1 == 1
    }

    /// The data of `sectors` of `block`, which is partially present, is in the file.
    pub(super) fn set(&self, map: &BlockMap, block: u64, sectors: Range<u64>) {
        let geometry = map.geometry();
        let in_block = geometry.block_size() / u64::from(geometry.logical_sector_size());
        assert!(!sectors.is_empty() && sectors.end <= in_block, "{sectors:?} of a block");
        let (chunk, bitmaps) = (geometry.chunk_of_block(block), map.bitmaps());
        let first = geometry.bitmap_slice(block).start * 8;
        for page in (first + sectors.start) / SECTORS_PER_PAGE..=(first + sectors.end - 1) / SECTORS_PER_PAGE
        {
            let here = |page: u64| (page * SECTORS_PER_PAGE).saturating_sub(first);
            let part = sectors.start.max(here(page))..sectors.end.min(here(page + 1));
            let word = self.page(chunk, page);
            if !bitmaps.has(geometry, block, part.clone()) {
                word.fetch_add(INSIDE, Ordering::AcqRel);
                let marks_first = planted(Plant::MarkBeforeBits);
                if marks_first {
                    self.mark(chunk, page);
                }
                bitmaps.set(geometry, block, part);
                if !marks_first {
                    self.mark(chunk, page);
                }
                let before = word.fetch_sub(INSIDE, Ordering::AcqRel);
                assert!(before >= INSIDE, "a front leaves a page that it is in");
            } else if word.load(Ordering::Acquire) != 0 && !planted(Plant::TrustFoundBits) {
                self.mark(chunk, page);
            }
        }
    }

    fn mark(&self, chunk: u64, page: u64) {
        if planted(Plant::ForgetBits) {
            return;
        }
        let chunks = &self.chunks[index(chunk / WORD_BITS)];
        let mark_chunk = || chunks.fetch_or(1 << (chunk % WORD_BITS), Ordering::AcqRel);
        let chunk_first = planted(Plant::ChunkBeforePage);
        if chunk_first {
            mark_chunk();
        }
        // Counted first: the count must never be less than the marks that can be taken. Whoever takes the
        // mark finds it counted.
        self.count.fetch_add(1, Ordering::Relaxed);
        let order = ordered(Plant::RelaxedMark, Ordering::AcqRel);
        if self.page(chunk, page).fetch_or(MARKED, order) & MARKED != 0 {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
        // Marked last: whoever takes the chunk's mark finds the page's.
        if !chunk_first {
            mark_chunk();
        }
    }

    /// Takes the marks away; the pages that had one.
    pub fn take(&self) -> Vec<Page> {
        let mut taken = Vec::new();
        for (word, chunks) in (0..).zip(&self.chunks) {
            let mut chunks =
                if chunks.load(Ordering::Relaxed) == 0 { 0 } else { chunks.swap(0, Ordering::AcqRel) };
            while chunks != 0 {
                let chunk = word * WORD_BITS + u64::from(chunks.trailing_zeros());
                chunks &= chunks - 1;
                let order = ordered(Plant::RelaxedTake, Ordering::AcqRel);
                let marked = |page: &u64| self.page(chunk, *page).fetch_and(!MARKED, order) & MARKED != 0;
                taken.extend((0..PAGES_PER_CHUNK).filter(marked).map(|page| Page::Bitmap { chunk, page }));
            }
        }
        // Whoever finds them gone finds the flag that the caller has set.
        let order = ordered(Plant::RelaxedUncount, Ordering::Release);
        let before = self.count.fetch_sub(taken.len(), order);
        assert!(before >= taken.len(), "a mark is counted before it can be taken");
        taken
    }

    fn page(&self, chunk: u64, page: u64) -> &AtomicU32 {
        debug_assert!(page < PAGES_PER_CHUNK, "page {page} of a bitmap");
        &self.pages[index(chunk * PAGES_PER_CHUNK + page)]
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::thread;

    use super::*;
    use crate::format::bat::BatEntry;

    const SECTORS: u64 = 64;

    /// Threads set the same bits of one page while others take the marks. A thread that has set a bit, or has
    /// found it set, finds it in the copies that are made afterwards.
    #[test]
    fn a_bit_that_was_set_or_found_set_is_in_the_next_copy() {
        for _round in 0..300 {
            let map = BlockMap::empty(Geometry::new(1 << 30, 1 << 20, 512, true));
            map.bitmaps().make_room(map.geometry(), 0).expect("memory");
            map.publish(0, BatEntry::partially_present(1 << 20));
            let (marks, logged) = (DirtyBitmapPages::new(map.geometry()), Mutex::new(Vec::new()));
            let flush = || {
                let mut logged = logged.lock().expect("no panic holds it");
                for page in marks.take() {
                    let Page::Bitmap { chunk, page } = page else { panic!("only bitmaps are marked") };
                    *logged = map.bitmaps().copy_page(chunk, page)[..8].to_vec();
                }
                logged.clone()
            };
            thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| {
                        for sector in 0..SECTORS {
                            marks.set(&map, 0, sector..sector + 1);
                            let copy = flush();
                            let bit = copy.get(usize::try_from(sector / 8).expect("small"));
                            assert!(bit.is_some_and(|byte| byte >> (sector % 8) & 1 == 1), "sector {sector}");
                        }
                    });
                }
            });
            assert_eq!((marks.count(), marks.take()), (0, Vec::new()));
        }
    }
}
