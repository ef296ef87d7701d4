//! Which pages of metadata fronts have changed since they were last copied for the log: those of the leaf's
//! BAT in which they have given blocks space ([`super::pool`]), and those of its sector bitmaps.
//!
//! Fronts change and mark; the engine takes the marks when a commit cycle closes its set, and copies the
//! pages then. A flush that follows the end of a write must find in that copy what the write relies on:
//!
//! * a front marks *after* it has changed the page, and before it reports the write as done;
//! * a front that finds the change made already, by another front, cannot know whether that one has marked
//!   yet. So a front counts itself into the page before it changes it, and out after it has marked. What is
//!   found in a page without a front in it is in a copy, or the page has a mark, and whoever takes that sees
//!   the change. Otherwise the front marks the page itself.

use std::ops::Range;

use crate::atomic::{AtomicU64, AtomicUsize, Ordering, zeroed};
use crate::disk::PAGE_BYTES;
use crate::format::bat::Geometry;
use crate::format::index;
use crate::image::{BlockMap, PAGES_PER_CHUNK, Page, SLOTS_PER_PAGE, WORD_BITS};
use crate::simulation::{Plant, ordered, planted};

/// The page has changed.
const MARKED: u64 = 1;

/// One front is about to change the page and has not marked it yet.
const INSIDE: u64 = 2;

/// Sectors whose bits are in one page.
const SECTORS_PER_PAGE: u64 = 8 * PAGE_BYTES as u64;

/// Pages that one bit says of whether any of them is marked: those of a sector bitmap.
const GROUP: u64 = PAGES_PER_CHUNK;

/// See the module's head. Pages are numbered: the BAT's, up to the end of a group, then those of the bitmaps,
/// chunk after chunk.
pub struct Marks {
    pages: Box<[AtomicU64]>,
    /// A bit per group with marked pages.
    groups: Box<[AtomicU64]>,
    count: AtomicUsize,
    /// The groups of the BAT, before those of the bitmaps.
    bat_groups: u64,
}

impl Marks {
    /// No page is marked.
    pub(super) fn new(geometry: &Geometry) -> Self {
        let chunks = if geometry.is_differencing() { geometry.bitmap_block_count() } else { 0 };
        let bat_groups = geometry.slot_count().div_ceil(SLOTS_PER_PAGE).div_ceil(GROUP);
        let groups = bat_groups + chunks;
        Self {
            pages: zeroed(index(groups * GROUP)),
            groups: (0..groups.div_ceil(WORD_BITS)).map(|_| AtomicU64::new(0)).collect(),
            count: AtomicUsize::new(0),
            bat_groups,
        }
    }

    /// How many pages are marked.
    #[inline]
    pub(super) fn count(&self) -> usize {
        self.count.load(ordered(Plant::RelaxedCount, Ordering::Acquire))
    }

    /// Whether a page of the bitmap of `chunk` may be marked.
    pub(super) fn has_bits_of(&self, chunk: u64) -> bool {
        let group = self.bat_groups + chunk;
        let groups = self.groups[index(group / WORD_BITS)].load(Ordering::Acquire);
        groups >> (group % WORD_BITS) & 1 == 1
    }

    /// The data of `sectors` of `block`, which is partially present, is in the file.
    pub(super) fn set_bits(&self, map: &BlockMap, block: u64, sectors: Range<u64>) {
        let geometry = map.geometry();
        let in_block = geometry.block_size() / u64::from(geometry.logical_sector_size());
        assert!(!sectors.is_empty() && sectors.end <= in_block, "{sectors:?} of a block");
        let (chunk, bitmaps) = (geometry.chunk_of_block(block), map.bitmaps());
        let first = geometry.bitmap_slice(block).start * 8;
        for page in (first + sectors.start) / SECTORS_PER_PAGE..=(first + sectors.end - 1) / SECTORS_PER_PAGE
        {
            debug_assert!(page < PAGES_PER_CHUNK, "page {page} of a bitmap");
            let here = |page: u64| (page * SECTORS_PER_PAGE).saturating_sub(first);
            let part = sectors.start.max(here(page))..sectors.end.min(here(page + 1));
            let number = (self.bat_groups + chunk) * GROUP + page;
            if !bitmaps.has(geometry, block, part.clone()) {
                let marks = !planted(Plant::ForgetBits);
                self.change(number, marks, || bitmaps.set(geometry, block, part));
            } else if !planted(Plant::TrustFoundBits) {
                self.mark_found(number);
            }
        }
    }

    /// Makes a `change` to the mapping of `block`.
    pub(super) fn change_mapping(&self, map: &BlockMap, block: u64, change: impl FnOnce() -> bool) -> bool {
        self.change(map.page_of(block), !planted(Plant::ForgetClaim), change)
    }

    /// The mappings of `blocks` were found, and one of them at least is not known to be in the log.
    pub(super) fn found_mappings(&self, map: &BlockMap, blocks: Range<u64>) {
        if planted(Plant::TrustFoundMapping) {
            return;
        }
        (map.page_of(blocks.start)..=map.page_of(blocks.end - 1)).for_each(|page| self.mark_found(page));
    }

    /// Makes a `change` to a page and marks it.
    fn change<T>(&self, page: u64, marks: bool, change: impl FnOnce() -> T) -> T {
        let inside = if planted(Plant::StayOutside) { 0 } else { INSIDE };
        let word = &self.pages[index(page)];
        word.fetch_add(inside, Ordering::AcqRel);
        let marks_first = planted(Plant::MarkBeforeChange);
        if marks && marks_first {
            self.mark(page);
        }
        let changed = change();
        if marks && !marks_first {
            self.mark(page);
        }
        let before = word.fetch_sub(inside, Ordering::AcqRel);
        assert!(before >= inside, "a front leaves a page that it is in");
        changed
    }

    /// Marks a page in which a change was found, unless a copy has it or will.
    fn mark_found(&self, page: u64) {
        if self.pages[index(page)].load(Ordering::Acquire) >= INSIDE {
            self.mark(page);
        }
    }

    fn mark(&self, page: u64) {
        let group = page / GROUP;
        let groups = &self.groups[index(group / WORD_BITS)];
        let mark_group = || groups.fetch_or(1 << (group % WORD_BITS), Ordering::AcqRel);
        let group_first = planted(Plant::GroupBeforePage);
        if group_first {
            mark_group();
        }
        // Counted first: the count must never be less than the marks that can be taken. Whoever takes the
        // mark finds it counted.
        self.count.fetch_add(1, Ordering::Relaxed);
        let order = ordered(Plant::RelaxedMark, Ordering::AcqRel);
        if self.pages[index(page)].fetch_or(MARKED, order) & MARKED != 0 {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
        // Marked last: whoever takes the group's mark finds the page's.
        if !group_first {
            mark_group();
        }
    }

    /// Takes the marks away; the pages that had one.
    pub fn take(&self) -> Vec<Page> {
        let mut taken = Vec::new();
        for (word, groups) in (0..).zip(&self.groups) {
            let mut groups =
                if groups.load(Ordering::Relaxed) == 0 { 0 } else { groups.swap(0, Ordering::AcqRel) };
            while groups != 0 {
                let group = word * WORD_BITS + u64::from(groups.trailing_zeros());
                groups &= groups - 1;
                let order = ordered(Plant::RelaxedTake, Ordering::AcqRel);
                let marked = |page: &u64| self.pages[index(*page)].fetch_and(!MARKED, order) & MARKED != 0;
                let pages = (group * GROUP..(group + 1) * GROUP).filter(marked);
                taken.extend(pages.map(|page| self.page(page)));
            }
        }
        // Whoever finds them gone finds the flag that the caller has set.
        let order = ordered(Plant::RelaxedUncount, Ordering::Release);
        let before = self.count.fetch_sub(taken.len(), order);
        assert!(before >= taken.len(), "a mark is counted before it can be taken");
        taken
    }

    /// The page of this number.
    fn page(&self, number: u64) -> Page {
        match (number / GROUP).checked_sub(self.bat_groups) {
            Some(chunk) => Page::Bitmap { chunk, page: number % GROUP },
            None => Page::Bat(number),
        }
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
            let (marks, logged) = (Marks::new(map.geometry()), Mutex::new(Vec::new()));
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
                            marks.set_bits(&map, 0, sector..sector + 1);
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
