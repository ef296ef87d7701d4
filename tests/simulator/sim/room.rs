//! The room that a host has for a file with holes. While it has none left, what would fill a hole is refused;
//! on a host that copies on write, an overwrite is, too.

use std::collections::BTreeSet;
use std::ops::Range;

const PAGE: u64 = 4096;

/// What of the file has its place on the host; everything, until it is watched.
#[derive(Clone, Debug, Default)]
pub struct Room {
    stored: Option<BTreeSet<u64>>,
    copies: bool,
    full: bool,
    refusals: u64,
}

fn pages(offset: u64, length: u64) -> Range<u64> {
    offset / PAGE..(offset + length).div_ceil(PAGE)
}

impl Room {
    /// From now on holes count: `stored` are the places that are none.
    pub fn watch(&mut self, stored: impl Iterator<Item = u64>, copies: bool) {
        (self.stored, self.copies) = (Some(stored.map(|offset| offset / PAGE).collect()), copies);
    }

    /// The host has no room left, or has some again.
    pub fn set_full(&mut self, full: bool) {
        assert!(self.stored.is_some(), "room is watched from the start");
        self.full = full;
    }

    /// Whether there is no room left.
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// How often something was refused.
    pub fn refusals(&self) -> u64 {
        self.refusals
    }

    /// A write, or a reservation if it is not `data`, of this range: whether it finds room, which it takes.
    pub fn take(&mut self, offset: u64, length: u64, data: bool) -> bool {
        let Some(stored) = &mut self.stored else { return true };
        let holes = pages(offset, length).any(|page| !stored.contains(&page));
        if self.full && (holes || self.copies && data) {
            self.refusals += 1;
            return false;
        }
        stored.extend(pages(offset, length));
        true
    }

    /// Whether all of this range has its place.
    pub fn holds(&self, offset: u64, length: u64) -> bool {
        self.stored.as_ref().is_none_or(|stored| pages(offset, length).all(|page| stored.contains(&page)))
    }

    /// Whether all of this range is a hole.
    pub fn is_hole(&self, offset: u64, length: u64) -> bool {
        self.stored.as_ref().is_some_and(|stored| !pages(offset, length).any(|page| stored.contains(&page)))
    }

    /// This range is a hole now.
    pub fn give_back(&mut self, offset: u64, length: u64) {
        if let Some(stored) = &mut self.stored {
            for page in offset.div_ceil(PAGE)..(offset + length) / PAGE {
                stored.remove(&page);
            }
        }
    }
}
