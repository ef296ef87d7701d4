//! How many blocks of an image are in which state, and how they lie in the file.

use std::fmt::{self, Write};
use std::ops::Range;

use schemars::JsonSchema;
use serde::Serialize;

use crate::format::bat::{BatEntry, PayloadState};
use crate::image::{BlockMap, Image};

/// Payload blocks by state.
#[derive(Default, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct BlockCounts {
    /// All blocks of the disk.
    pub total: u64,
    /// With all their data in this file.
    pub allocated: u64,
    /// With some of their data in this file, the rest in the parent.
    pub partial: u64,
    /// That read as zero.
    pub zero: u64,
    /// That are not there.
    pub not_present: u64,
    /// Whose content is undefined.
    pub undefined: u64,
    /// That were unmapped.
    pub unmapped: u64,
    /// Allocated or partial, and not behind their predecessor in the file.
    #[serde(skip)]
    misplaced: u64,
}

impl BlockCounts {
    /// Counts the blocks of `image`.
    pub fn of(image: &Image) -> Self {
        Self::count(&image.map, &image.stored_slots)
    }

    /// Counts the blocks; those outside the `stored` slots are not there.
    fn count(map: &BlockMap, stored: &[Range<u64>]) -> Self {
        let geometry = map.geometry();
        let mut blocks = Self { total: geometry.block_count(), ..Self::default() };
        let mut expected = None;
        let mut counted = 0;
        let stored = stored.iter().cloned().flatten();
        for block in stored.filter_map(|slot| geometry.block_of_slot(slot)) {
            counted += 1;
            let entry = map.load(block).entry;
            *blocks.of_state(entry) += 1;
            if matches!(
                entry.payload_state(),
                Some(PayloadState::FullyPresent | PayloadState::PartiallyPresent)
            ) {
                blocks.misplaced += u64::from(expected.is_some_and(|expected| expected != entry.offset()));
                expected = Some(entry.offset() + geometry.block_size());
            }
        }
        blocks.not_present += geometry.block_count() - counted;
        blocks
    }

    fn of_state(&mut self, entry: BatEntry) -> &mut u64 {
        match entry.payload_state().expect("an opened image has no reserved states") {
            PayloadState::NotPresent => &mut self.not_present,
            PayloadState::Undefined => &mut self.undefined,
            PayloadState::Zero => &mut self.zero,
            PayloadState::Unmapped => &mut self.unmapped,
            PayloadState::FullyPresent => &mut self.allocated,
            PayloadState::PartiallyPresent => &mut self.partial,
        }
    }

    /// The share of allocated and partial blocks, in percent, that do not follow their predecessor in the
    /// file.
    pub fn fragmentation(&self) -> u64 {
        let steps = (self.allocated + self.partial).saturating_sub(1);
        (self.misplaced * 100).checked_div(steps).unwrap_or(0)
    }
}

impl fmt::Display for BlockCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = format!("{} in total: {} allocated", self.total, self.allocated);
        let rest = [
            (self.partial, "partial"),
            (self.zero, "zero"),
            (self.not_present, "not present"),
            (self.undefined, "undefined"),
            (self.unmapped, "unmapped"),
        ];
        for (count, name) in rest.into_iter().filter(|(count, _)| *count > 0) {
            write!(text, ", {count} {name}")?;
        }
        f.write_str(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::MIB;
    use crate::format::bat::Geometry;

    fn count(map: &BlockMap) -> BlockCounts {
        BlockCounts::count(map, std::slice::from_ref(&(0..map.geometry().slot_count())))
    }

    fn map(entries: &[BatEntry]) -> BlockMap {
        let map = BlockMap::empty(Geometry::new(entries.len() as u64 * MIB, 1 << 20, 512, false));
        for (block, entry) in (0..).zip(entries) {
            map.restore(map.geometry().payload_slot(block), &[entry.write()]);
        }
        map
    }

    #[test]
    fn every_block_is_counted_once() {
        let at = |mib: u64| BatEntry::present(mib * MIB);
        let blocks = count(&map(&[at(5), BatEntry::zero(), at(6), BatEntry::unmapped(), at(9), at(2)]));
        let expected = BlockCounts {
            total: 6,
            allocated: 4,
            zero: 1,
            unmapped: 1,
            misplaced: 2,
            ..BlockCounts::default()
        };
        assert_eq!(blocks, expected);
        assert_eq!(blocks.fragmentation(), 66, "of three steps two go elsewhere");
        assert_eq!(blocks.to_string(), "6 in total: 4 allocated, 1 zero, 1 unmapped");
    }

    #[test]
    fn nothing_and_a_single_block_are_not_fragmented() {
        assert_eq!(count(&map(&[BatEntry::zero()])).fragmentation(), 0);
        assert_eq!(count(&map(&[BatEntry::present(9 * MIB)])).fragmentation(), 0);
    }
}
