//! Which blocks move where, so that the file can end earlier. Arithmetic, no I/O.
//!
//! 1. *Lower*: the last block of the file goes to the lowest free run that is long enough, and the next one,
//!    until what is last does not fit below.
//! 2. *Slide*: free runs between blocks that are each too short, and together are not, are joined: the blocks
//!    between them slide down. Then the last block fits, and lowering continues.
//! 3. *Settle*: when what is free is less than a block, the last blocks slide down over it.
//!
//! What is slid is copied to win less than was copied: not more than [`MOST_COPIED`] bytes are, for each byte
//! that the file becomes shorter. A block that slides by less than its length is put behind the end of the
//! file first, so that no copy overlaps its source.
//!
//! It ends: a slide brings blocks to lower places and is made only if the file becomes shorter by it.
//!
//! The log and unknown regions stay where they are. A BAT or metadata region that lies last goes to a lower
//! free run, too ([`Plan::lower_region`]), which is made for it if need be; then what is below it is last.

mod order;

use std::collections::BTreeMap;

use crate::engine::relocate::{Move, Occupant};
use crate::image::{Content, Extent, Space};

/// Bytes that are copied for each byte that the file becomes shorter, at most, where free runs are joined.
pub const MOST_COPIED: u64 = 64;

/// Something that has a place in the file and can move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Item {
    /// Where it is.
    pub place: Extent,
    /// What it is.
    pub what: Occupant,
}

/// A move, and where its item is before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The item as it is before.
    pub item: Item,
    /// Where its place starts then.
    pub to: u64,
}

impl Step {
    /// The place that it takes.
    pub fn target(&self) -> Extent {
        Extent { offset: self.to, ..self.item.place }
    }
}

impl From<&Step> for Move {
    fn from(step: &Step) -> Self {
        Self { what: step.item.what, from: step.item.place.offset, to: step.to }
    }
}

/// The move of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionMove {
    /// Where it is.
    pub from: Extent,
    /// Where it is to be.
    pub to: Extent,
}

/// A free run, and how many things that stay lie below it.
#[derive(Clone, Copy)]
struct Hole {
    run: Extent,
    gap: usize,
}

/// A stretch of the file that begins with a free run and ends with one, and what is between them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Window {
    used: u64,
    range: Extent,
}

/// The file as the moves so far leave it.
pub struct Plan {
    space: Space,
    /// Ascending.
    items: Vec<Item>,
    /// What stays where it is, ascending.
    fixed: Vec<Extent>,
    steps: Vec<Step>,
    most_copied: u64,
}

impl Plan {
    /// No moves, in a file in which `items` can move and `fixed` stay; all of them are used in `space`.
    pub fn new(space: Space, mut items: Vec<Item>, mut fixed: Vec<Extent>, most_copied: u64) -> Self {
        items.sort_unstable();
        fixed.sort_unstable();
        assert!(
            items.windows(2).all(|pair| pair[0].place.end() <= pair[1].place.offset),
            "no two items share space"
        );
        let mut plan = Self { space, items, fixed, steps: Vec::new(), most_copied };
        plan.space.extend(plan.space.used_end());
        plan
    }

    /// Moves what lies last, until the file cannot end earlier.
    pub fn shorten(&mut self) {
        loop {
            self.lower();
            if !self.slide() {
                break;
            }
        }
        self.settle();
    }

    /// Moves what lies last if it is one of `regions`, which can move although blocks cannot pass them. The
    /// steps so far, to which some are added to make room, come before it.
    pub fn lower_region(&mut self, regions: &[Extent]) -> Option<RegionMove> {
        let from = self.fixed.last().copied().filter(|last| last.end() == self.end())?;
        if !regions.contains(&from) {
            return None;
        }
        let mut to = self.take_below(from);
        if to.is_none() {
            let windows = self.windows(from.length).into_iter();
            let worth = |window: &Window| window.used <= from.length.saturating_mul(self.most_copied);
            let window = windows.filter(worth).filter(|window| window.range.end() <= from.offset).min()?;
            self.pack(window.range);
            to = self.take_below(from);
        }
        let to = Extent { offset: to.expect("the free runs were joined"), length: from.length };
        self.space.free(from, Content::Recycled);
        self.fixed.pop();
        self.fixed.push(to);
        self.fixed.sort_unstable();
        Some(RegionMove { from, to })
    }

    /// The moves, in order. Each is possible once those before it are made.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// Where the file ends when all of them are made, bytes.
    pub fn end(&self) -> u64 {
        self.space.used_end()
    }

    /// Free bytes below the end.
    pub fn free_bytes(&self) -> u64 {
        self.end() - self.space.used_bytes()
    }

    /// Step 1 of the module's head.
    fn lower(&mut self) {
        let mut lowered = Vec::new();
        let mut stays = self.fixed.last().map_or(0, Extent::end);
        while let Some(item) = self.items.last().copied() {
            if item.place.end() < stays {
                break;
            }
            let Some(to) = self.take_below(item.place) else { break };
            self.items.pop();
            self.space.free(item.place, Content::Recycled);
            self.steps.push(Step { item, to });
            let place = Extent { offset: to, ..item.place };
            stays = stays.max(place.end());
            lowered.push(Item { place, ..item });
        }
        self.items.append(&mut lowered);
        self.items.sort_unstable();
    }

    /// Takes the lowest free run that is as long as `place` and lies below it.
    fn take_below(&mut self, place: Extent) -> Option<u64> {
        let taken = self.space.take(place.length)?.extent;
        if taken.offset < place.offset {
            return Some(taken.offset);
        }
        self.space.free(taken, Content::Recycled);
        None
    }

    /// Step 2. Returns whether anything was moved.
    fn slide(&mut self) -> bool {
        let Some(last) = self.last() else { return false };
        let mut windows = self.windows(last.place.length);
        windows.retain(|window| window.used <= last.place.length.saturating_mul(self.most_copied));
        windows.sort_unstable();
        let mut chosen: BTreeMap<u64, Extent> = BTreeMap::new();
        for Window { range, .. } in windows {
            // The last block, or the one that is last when the chosen windows have taken those behind it.
            let Some(next) = self.items.len().checked_sub(chosen.len() + 1) else { break };
            let next = self.items[next].place;
            let before = chosen.range(..range.end()).next_back();
            let apart = before.is_none_or(|(_, before)| before.end() <= range.offset);
            if apart && range.end() <= next.offset && next.length == last.place.length {
                chosen.insert(range.offset, range);
            }
        }
        for range in chosen.values() {
            self.pack(*range);
        }
        !chosen.is_empty()
    }

    /// Step 3: the stretch that wins most, of those that are worth their copies.
    fn settle(&mut self) {
        let Some(last) = self.last() else { return };
        let gap = self.fixed.partition_point(|fixed| fixed.offset < last.place.offset);
        let (mut won, mut chosen) = (0, None);
        let holes = self.holes();
        for hole in holes.iter().rev().take_while(|hole| hole.gap == gap) {
            won += hole.run.length;
            let used = last.place.end() - hole.run.offset - won;
            if used <= won.saturating_mul(self.most_copied) {
                chosen = Some(hole.run.offset);
            }
        }
        if let Some(offset) = chosen {
            self.pack(Extent { offset, length: last.place.end() - offset });
        }
    }

    /// What lies last, if it can move.
    fn last(&self) -> Option<Item> {
        self.items.last().copied().filter(|item| item.place.end() == self.end())
    }

    fn holes(&self) -> Vec<Hole> {
        let gap = |run: &Extent| self.fixed.partition_point(|fixed| fixed.offset < run.offset);
        self.space.free_runs().map(|run| Hole { run, gap: gap(&run) }).collect()
    }

    /// The shortest stretches, from each hole on, in which `wanted` bytes are free and nothing stays.
    fn windows(&self, wanted: u64) -> Vec<Window> {
        let holes = self.holes();
        let (mut windows, mut past, mut free) = (Vec::new(), 0, 0);
        for first in &holes {
            while free < wanted && past < holes.len() && holes[past].gap == first.gap {
                free += holes[past].run.length;
                past += 1;
            }
            if free >= wanted {
                let end = holes[past - 1].run.end();
                let range = Extent { offset: first.run.offset, length: end - first.run.offset };
                windows.push(Window { used: range.length - free, range });
            }
            free -= first.run.length;
        }
        windows
    }

    /// Brings the items in `range`, in which nothing stays, together at its start: in order, but for those
    /// that have to wait behind the end of the file.
    fn pack(&mut self, range: Extent) {
        let first = self.items.partition_point(|item| item.place.offset < range.offset);
        let past = self.items.partition_point(|item| item.place.offset < range.end());
        let (mut to, mut waiting) = (range.offset, Vec::new());
        for index in first..past {
            let item = self.items[index];
            assert!(item.place.offset >= to && item.place.end() <= range.end(), "an item of the stretch");
            if item.place.offset - to >= item.place.length {
                self.put(index, to);
                to += item.place.length;
            } else if item.place.offset == to {
                to = item.place.end();
            } else {
                let end = self.end();
                self.space.extend(end + item.place.length);
                self.put(index, end);
                waiting.push(index);
            }
        }
        for index in waiting {
            self.put(index, to);
            to += self.items[index].place.length;
        }
        assert!(to <= range.end(), "what was in the stretch has room there");
        self.items[first..past].sort_unstable();
    }

    /// Moves one item to a free place.
    fn put(&mut self, index: usize, to: u64) {
        let item = self.items[index];
        let step = Step { item, to };
        let granted = self.space.take_at(step.target());
        assert!(granted.is_some(), "an item moves to a free place");
        self.space.free(item.place, Content::Recycled);
        self.items[index].place = step.target();
        self.steps.push(step);
    }
}

/// How many of the first `steps` can be made at once: none takes a place that one of the others leaves, and
/// together they copy not more than `most` bytes, but for the first.
pub fn batch(steps: &[Step], most: u64) -> usize {
    let mut bytes = 0;
    for (count, step) in steps.iter().enumerate() {
        bytes += step.item.place.length;
        let target = step.target();
        let leaves = |other: &Step| {
            let place = other.item.place;
            other.item.what == step.item.what || place.offset < target.end() && target.offset < place.end()
        };
        if count > 0 && (bytes > most || steps[..count].iter().any(leaves)) {
            return count;
        }
    }
    steps.len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::MIB;

    /// What follows what in a file, each with the MiB that are free before it: a block, a bitmap, or
    /// something that stays.
    fn stretch(block: u64) -> impl Strategy<Value = Vec<(u64, u64)>> {
        let kinds = prop_oneof![8 => Just(block), 1 => Just(1), 1 => Just(0)];
        prop::collection::vec((0..4_u64, kinds), 0..40)
    }

    fn extent(start: u64, count: u64) -> Extent {
        Extent { offset: start * MIB, length: count * MIB }
    }

    fn plan(stretch: &[(u64, u64)], most_copied: u64) -> Plan {
        let (mut at, mut items, mut fixed) = (1, Vec::new(), Vec::new());
        let mut space = Space::new(MIB).expect("small");
        for (number, &(free, length)) in (0..).zip(stretch) {
            let place = extent(at + free, length.max(2));
            let place = if length == 1 { extent(at + free, 1) } else { place };
            assert_eq!(space.claim(place), None);
            match length {
                0 => fixed.push(place),
                1 => items.push(Item { place, what: Occupant::Bitmap(number) }),
                _ => items.push(Item { place, what: Occupant::Block(number) }),
            }
            at = place.end() / MIB;
        }
        Plan::new(space, items, fixed, most_copied)
    }

    /// Makes the steps in a file of their own; each takes free space.
    fn made(start: &Plan, steps: &[Step]) -> Vec<Item> {
        let (mut space, mut items) = (start.space.clone(), start.items.clone());
        for step in steps {
            space.extend(space.used_end().max(step.target().end()));
            assert!(space.take_at(step.target()).is_some(), "{step:?} takes what is free");
            space.free(step.item.place, Content::Recycled);
            let item =
                items.iter_mut().find(|item| **item == step.item).expect("it is where the plan has it");
            item.place = step.target();
        }
        items.sort_unstable();
        items
    }

    /// The least end of a file with so many blocks of a length between what stays.
    fn least_end(fixed: &[Extent], blocks: u64, length: u64) -> u64 {
        let (mut at, mut left) = (MIB, blocks);
        for place in fixed {
            left -= left.min((place.offset - at) / length);
            at = place.end();
        }
        at + left * length
    }

    proptest! {
        /// Whatever lies where: everything is in order in the end, with nothing free where it fits.
        #[test]
        fn a_sorted_file_is_in_the_order_of_the_disk(
            choice in any::<prop::sample::Index>(),
            stretches in [stretch(2), stretch(4), stretch(32)],
            order in prop::collection::vec(any::<u64>(), 40),
        ) {
            let mut start = plan(&stretches[choice.index(3)], 0);
            for (item, number) in start.items.iter_mut().zip(&order) {
                item.what = match item.what {
                    Occupant::Block(block) => Occupant::Block(number / 64 * 64 + block),
                    Occupant::Bitmap(chunk) => Occupant::Bitmap(number / 64 * 64 + chunk),
                };
            }
            let mut sorted = Plan::new(start.space.clone(), start.items.clone(), start.fixed.clone(), 0);
            sorted.sort(1);
            let items = made(&start, sorted.steps());
            prop_assert_eq!(&items, &sorted.items);
            let key = |item: &Item| match item.what {
                Occupant::Bitmap(chunk) => (chunk, 0),
                Occupant::Block(block) => (block, 1),
            };
            prop_assert!(items.is_sorted_by_key(key));
            let mut again = Plan::new(sorted.space.clone(), items, start.fixed.clone(), 0);
            again.sort(1);
            prop_assert!(again.steps().is_empty(), "what is in order stays");
            if start.fixed.is_empty() {
                prop_assert_eq!(sorted.end(), sorted.space.used_bytes());
            }
        }

        /// Whatever lies where: a plan ends, its moves can be made, and the file does not become longer.
        #[test]
        fn a_plan_ends_and_never_makes_the_file_longer(
            choice in any::<prop::sample::Index>(),
            stretches in [stretch(2), stretch(4), stretch(8), stretch(32)],
            most_copied in prop::sample::select(vec![0, 1, MOST_COPIED, u64::MAX]),
        ) {
            let start = plan(&stretches[choice.index(4)], most_copied);
            let mut short = plan(&stretches[choice.index(4)], most_copied);
            short.shorten();
            let items = made(&start, short.steps());
            prop_assert_eq!(&items, &short.items);
            prop_assert!(short.end() <= start.end());
            prop_assert_eq!(short.space.used_bytes(), start.space.used_bytes());
        }

        /// Blocks of one length end as early as they can between what stays.
        #[test]
        fn blocks_of_one_length_end_as_early_as_they_can(
            length in 1..9_u64,
            stretch in prop::collection::vec((0..6_u64, prop::bool::weighted(0.9)), 0..40),
        ) {
            let block = |moves| u64::from(moves) * length.max(2);
            let stretch: Vec<_> = stretch.into_iter().map(|(free, moves)| (free, block(moves))).collect();
            let mut short = plan(&stretch, u64::MAX);
            short.shorten();
            let blocks = short.items.len() as u64;
            prop_assert_eq!(short.end(), least_end(&short.fixed, blocks, length.max(2) * MIB));
        }

        /// The moves of a batch can be made in any order.
        #[test]
        fn moves_of_a_batch_do_not_need_each_other(stretch in stretch(4), most in 1..40_u64) {
            let start = plan(&stretch, u64::MAX);
            let mut short = plan(&stretch, u64::MAX);
            short.shorten();
            let (mut steps, mut before) = (short.steps(), start.space.clone());
            while !steps.is_empty() {
                let (now, later) = steps.split_at(batch(steps, most * MIB));
                for step in now {
                    before.extend(before.used_end().max(step.target().end()));
                    prop_assert!(before.take_at(step.target()).is_some(), "free before the batch");
                }
                for step in now {
                    before.free(step.item.place, Content::Recycled);
                }
                steps = later;
            }
        }
    }
}
