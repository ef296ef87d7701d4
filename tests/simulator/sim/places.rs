//! Where the metadata of an image is, as far as it changes.

use std::collections::BTreeSet;
use std::ops::Range;

use vhdx_ublk::format::bat::BITMAP_BLOCK_SIZE;

use super::store::Store;

/// Everything up to the BAT's end, and the sector bitmaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    end: u64,
    bitmaps: BTreeSet<u64>,
}

impl Places {
    /// Those of an image whose BAT ends at byte `end`, and which has no bitmaps.
    pub fn below(end: u64) -> Self {
        Self { end, bitmaps: BTreeSet::new() }
    }

    /// There is a sector bitmap at byte `place`. Whether that is news.
    pub fn add_bitmap(&mut self, place: u64) -> bool {
        self.bitmaps.insert(place)
    }

    /// Whether byte `offset` is metadata.
    pub fn has(&self, offset: u64) -> bool {
        offset < self.end || self.is_bitmap(offset)
    }

    /// Whether byte `offset` is a sector bitmap's.
    pub fn is_bitmap(&self, offset: u64) -> bool {
        let before = self.bitmaps.range(..=offset).next_back();
        before.is_some_and(|place| offset < place + BITMAP_BLOCK_SIZE)
    }

    /// The metadata in `store`; its length stays.
    pub fn part_of(&self, store: &Store) -> Store {
        let bitmaps = self.bitmaps.iter().map(|place| *place..place + BITMAP_BLOCK_SIZE);
        let ranges: Vec<Range<u64>> = std::iter::once(0..self.end).chain(bitmaps).collect();
        store.only(&ranges)
    }
}
