//! Which moves bring the blocks of a file into the order of the disk. Arithmetic, no I/O.
//!
//! Each item has its place in the end: one behind the other from the start of the file, around what stays. An
//! item moves there as soon as that place is free; the place that it leaves is another one's. Where all wait
//! for each other, some are put behind the end of the file: then a chain of moves begins at each of their
//! places. So an item is copied once, and a few of them twice, and many moves can be made at once.
//!
//! It ends: what is put behind the end lets at least one item go where it stays.

use std::collections::{BTreeMap, BTreeSet};

use super::{Item, Plan};
use crate::engine::relocate::Occupant;
use crate::format::MIB;
use crate::image::Extent;

/// Bytes that are put behind the end of the file at once, at least, if so much has to move.
const AT_ONCE: u64 = 64 << 20;

/// The items of a plan on the way to their places in the end.
struct Sorting<'a> {
    plan: &'a mut Plan,
    /// Where each item of the plan is to start, ascending.
    targets: Vec<u64>,
    /// Which item is where.
    places: BTreeMap<u64, usize>,
    /// Items whose place has become free, or a part of it.
    ready: BTreeSet<usize>,
}

impl Plan {
    /// Brings all blocks into the order of the disk, each sector bitmap before the blocks of its chunk, of
    /// which there are `chunk_ratio`.
    pub fn sort(&mut self, chunk_ratio: u64) {
        self.items.sort_unstable_by_key(|item| match item.what {
            Occupant::Bitmap(chunk) => (chunk * chunk_ratio, 0),
            Occupant::Block(block) => (block, 1),
        });
        let targets = self.targets();
        let places = (0..).zip(&self.items).map(|(index, item)| (item.place.offset, index)).collect();
        let ready = (0..self.items.len()).collect();
        Sorting { plan: self, targets, places, ready }.run();
        assert!(self.items.is_sorted(), "the order of the disk is the order of the file");
    }

    /// Where each item starts in the end, around what stays.
    fn targets(&self) -> Vec<u64> {
        let (mut at, mut fixed) = (MIB, self.fixed.iter().peekable());
        let target = |item: &Item| {
            while let Some(next) = fixed.next_if(|next| next.offset < at + item.place.length) {
                at = at.max(next.end());
            }
            at += item.place.length;
            at - item.place.length
        };
        self.items.iter().map(target).collect()
    }
}

impl Sorting<'_> {
    fn run(mut self) {
        let mut first = 0;
        loop {
            self.settle();
            while first < self.targets.len() && self.is_there(first) {
                first += 1;
            }
            if first == self.targets.len() {
                return;
            }
            self.unblock(first);
        }
    }

    /// Moves what can move to its place, in rounds: what a round leaves is free in the next one.
    fn settle(&mut self) {
        while !self.ready.is_empty() {
            let mut left = Vec::new();
            for index in std::mem::take(&mut self.ready) {
                let target = self.target(index);
                if !self.is_there(index) && !self.plan.space.is_used(target.offset..target.end()) {
                    // Around what stays, the order of the disk may be longer than the file.
                    self.plan.space.extend(target.end());
                    left.push(self.put(index, target.offset));
                }
            }
            for place in left {
                self.is_free(place);
            }
        }
    }

    /// Frees the place of item `first`, and those of items behind it until enough is on its way.
    fn unblock(&mut self, first: usize) {
        let mut moved = 0;
        for index in first..self.targets.len() {
            let target = self.target(index);
            if self.is_there(index) {
                continue;
            }
            for blocking in self.within(target) {
                let end = self.plan.end();
                let place = self.plan.items[blocking].place;
                self.plan.space.extend(end + place.length);
                self.put(blocking, end);
                self.is_free(place);
                moved += place.length;
            }
            self.ready.insert(index);
            if moved >= AT_ONCE {
                break;
            }
        }
        assert!(moved > 0, "something keeps item {first} from its place");
    }

    fn target(&self, index: usize) -> Extent {
        Extent { offset: self.targets[index], length: self.plan.items[index].place.length }
    }

    fn is_there(&self, index: usize) -> bool {
        self.plan.items[index].place.offset == self.targets[index]
    }

    /// The items that have a part of `place`.
    fn within(&self, place: Extent) -> Vec<usize> {
        let before = self.places.range(..place.offset).next_back();
        let reaches = |(_, index): &(&u64, &usize)| self.plan.items[**index].place.end() > place.offset;
        let inside = self.places.range(place.offset..place.end());
        before.filter(reaches).into_iter().chain(inside).map(|(_, index)| *index).collect()
    }

    /// The items that wait for a part of `place` may go there.
    fn is_free(&mut self, place: Extent) {
        let past = self.targets.partition_point(|target| *target < place.end());
        let first = self.targets.partition_point(|target| *target < place.offset);
        self.ready.extend(first.saturating_sub(1)..past);
    }

    /// Moves an item; returns where it was.
    fn put(&mut self, index: usize, to: u64) -> Extent {
        let place = self.plan.items[index].place;
        let known = self.places.remove(&place.offset);
        assert_eq!(known, Some(index), "an item is where it was put");
        self.plan.put(index, to);
        self.places.insert(to, index);
        place
    }
}
