//! The pages of metadata that memory has and the log has not.

use std::cell::RefCell;
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use super::marks::Marks;
use crate::image::Page;
use crate::simulation::{Plant, planted};

/// See the module's head. A page is in the set from the moment it changes until its copy is durable in the
/// log.
pub(super) struct DirtySet {
    /// Changed since they were last copied.
    dirty: RefCell<BTreeSet<Page>>,
    /// Copied by the cycle under way, and not durable yet.
    being_logged: RefCell<BTreeSet<Page>>,
    /// Pages that fronts have changed; they belong to the set once they are taken.
    marks: Arc<Marks>,
    /// Chunks whose sector bitmaps no durable entry names yet.
    begun_bitmaps: RefCell<BTreeSet<u64>>,
}

impl DirtySet {
    /// The set of a session that begins with `pages` and `begun_bitmaps` to be logged; fronts leave `marks`.
    pub(super) fn new(pages: BTreeSet<Page>, begun_bitmaps: BTreeSet<u64>, marks: Arc<Marks>) -> Self {
        Self {
            dirty: RefCell::new(pages),
            being_logged: RefCell::default(),
            marks,
            begun_bitmaps: RefCell::new(begun_bitmaps),
        }
    }

    /// `page` has changed.
    pub(super) fn mark(&self, page: Page) {
        self.dirty.borrow_mut().insert(page);
    }

    /// How many pages the next cycle logs, about.
    pub(super) fn count(&self) -> usize {
        self.dirty.borrow().len() + self.marks.count()
    }

    /// Whether the log has every page, apart from what fronts have marked and no cycle has taken.
    pub(super) fn is_logged(&self) -> bool {
        self.dirty.borrow().is_empty() && self.being_logged.borrow().is_empty()
    }

    /// Takes into the set what fronts have marked; returns those pages.
    pub(super) fn take_marked(&self) -> Vec<Page> {
        let marked = self.marks.take();
        self.dirty.borrow_mut().extend(&marked);
        marked
    }

    /// The pages that a cycle has to log, which begins now: those that have changed so far.
    pub(super) fn close(&self) -> VecDeque<Page> {
        assert!(self.being_logged.borrow().is_empty(), "one cycle at a time");
        self.dirty.borrow().iter().copied().collect()
    }

    /// `page` is about to be copied: what changes from now on is for the next cycle.
    pub(super) fn begin_logging(&self, page: Page) {
        assert!(self.dirty.borrow_mut().remove(&page), "{page:?} is copied without a reason");
        assert!(self.being_logged.borrow_mut().insert(page), "{page:?} is copied twice in one cycle");
    }

    /// The copy of `page` is durable in the log.
    pub(super) fn logged(&self, page: Page) {
        assert!(self.being_logged.borrow_mut().remove(&page), "{page:?} was not copied");
        if planted(Plant::LateMark) {
            self.dirty.borrow_mut().remove(&page);
        }
    }

    /// Whether bits of `chunk` have changed and no durable entry has them.
    pub(super) fn has_bits_of(&self, chunk: u64) -> bool {
        let pages = Page::Bitmap { chunk, page: 0 }..=Page::Bitmap { chunk, page: u64::MAX };
        let sets = [&self.dirty, &self.being_logged];
        self.marks.has_bits_of(chunk)
            || sets.into_iter().any(|set| set.borrow().range(pages.clone()).next().is_some())
    }

    /// The cycle has failed: what it copied and did not make durable is for the next one.
    pub(super) fn give_back(&self) {
        let unlogged = self.being_logged.take();
        if !planted(Plant::ForgetRefusedPages) {
            self.dirty.borrow_mut().extend(unlogged);
        }
    }

    /// `chunk` has got a sector bitmap, which no durable entry names yet.
    pub(super) fn bitmap_begun(&self, chunk: u64) {
        assert!(self.begun_bitmaps.borrow_mut().insert(chunk), "chunk {chunk} has a bitmap already");
    }

    /// Whether no durable entry names the bitmap of `chunk` yet.
    pub(super) fn is_bitmap_unnamed(&self, chunk: u64) -> bool {
        self.begun_bitmaps.borrow().contains(&chunk)
    }

    /// A durable entry names the bitmap of `chunk`.
    pub(super) fn bitmap_named(&self, chunk: u64) {
        assert!(
            self.begun_bitmaps.borrow_mut().remove(&chunk),
            "the bitmap of chunk {chunk} was named before"
        );
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::bat::Geometry;

    fn empty() -> DirtySet {
        let marks = Marks::new(&Geometry::new(1 << 30, 1 << 20, 512, false));
        DirtySet::new(BTreeSet::new(), BTreeSet::new(), marks.into())
    }

    proptest! {
        /// Whatever changes while cycles log, fail and succeed: the next cycle has every page that has
        /// changed since its last durable copy was made, and no other.
        #[test]
        fn a_page_stays_until_a_copy_of_its_last_change_is_durable(
            cycles in prop::collection::vec(
                (prop::collection::vec(0..6_u64, 0..8), 0..8_usize, any::<bool>()),
                0..8,
            )
        ) {
            let (set, mut expected) = (empty(), BTreeSet::new());
            for (changes, copied, succeeds) in cycles {
                let (before, during) = changes.split_at(changes.len() / 2);
                let change = |page: &u64| set.mark(Page::Bat(*page));
                before.iter().for_each(change);
                expected.extend(before.iter().copied().map(Page::Bat));
                let pages: Vec<Page> = set.close().into();
                prop_assert_eq!(pages.iter().copied().collect::<BTreeSet<_>>(), expected.clone());
                let copied = if succeeds { pages.len() } else { copied.min(pages.len()) };
                for page in &pages[..copied] {
                    set.begin_logging(*page);
                }
                during.iter().for_each(change);
                if succeeds {
                    for page in &pages {
                        set.logged(*page);
                    }
                    expected.clear();
                } else {
                    set.give_back();
                }
                expected.extend(during.iter().copied().map(Page::Bat));
                prop_assert_eq!(set.count(), expected.len());
            }
        }
    }
}
