//! What occupies the file, MiB by MiB, and what is known of the rest.
//!
//! Every object after the header section lies on a 1 MiB border and is a whole number of MiB long, so one bit
//! per MiB says whether it is used and one whether it is known to read as zero *after a power cut*:
//!
//! * bytes past the length found at open that this process has added and never granted are known zero;
//! * space that was punched is known zero once a sync issued after the punch has completed;
//! * everything else that is free is *recycled*: it must be zeroed before it is granted, and that zeroing
//!   must be durable before any log entry names it.

use std::ops::Range;

use fixedbitset::FixedBitSet;

use super::runs::Runs;
use crate::error::{Error, Kind, Result};
use crate::format::{MIB, index};
use crate::simulation::{Plant, planted};

/// The longest file whose space is mapped: twice the largest virtual disk, 2 bits per MiB, 32 MiB of memory.
pub const MAX_FILE_BYTES: u64 = 128 << 40;

/// A run of whole MiB in the file, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Extent {
    /// Where it starts.
    pub offset: u64,
    /// How long it is.
    pub length: u64,
}

impl Extent {
    /// First byte past it.
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }

    fn units(&self) -> Range<usize> {
        assert!(self.offset.is_multiple_of(MIB), "{self:?} starts on a MiB");
        assert!(self.length.is_multiple_of(MIB), "{self:?} is whole MiB long");
        index(self.offset / MIB)..index(self.end() / MIB)
    }

    fn of_units(units: Range<usize>) -> Self {
        assert!(units.start <= units.end, "{units:?} runs forward");
        Self { offset: units.start as u64 * MIB, length: units.len() as u64 * MIB }
    }
}

/// What free space reads as after a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Zeros.
    KnownZero,
    /// Anything: it must be zeroed first, and that must be synced before an entry names it.
    Recycled,
}

/// Space handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Where.
    pub extent: Extent,
    /// What it reads as.
    pub content: Content,
}

/// The map; see the module's head.
#[derive(Clone, Debug)]
pub struct Space {
    used: FixedBitSet,
    /// Free MiB that read as zero after a power cut: never a used one. As long as `used`.
    known_zero: FixedBitSet,
    /// MiB the file holds, a partial last one included.
    units: usize,
    /// No unit below is free.
    lowest_free: usize,
    runs: Box<Runs>,
}

impl Space {
    /// A file of `file_length` bytes in which only the header section is used.
    ///
    /// # Errors
    /// Unsupported if the file is longer than [`MAX_FILE_BYTES`].
    pub fn new(file_length: u64) -> Result<Self> {
        if file_length > MAX_FILE_BYTES {
            let message = format!("the file is {file_length} bytes long, this program maps {MAX_FILE_BYTES}");
            return Err(Error::new(Kind::Unsupported, message));
        }
        let units = index(file_length.div_ceil(MIB).max(1));
        let bits = FixedBitSet::with_capacity(units);
        let runs = Runs::new(units).into();
        let mut space = Self { used: bits.clone(), known_zero: bits, units, lowest_free: 1, runs };
        space.used.insert(0);
        if planted(Plant::TrustTail) {
            space.known_zero.insert_range(1..units);
        }
        Ok(space)
    }

    /// Marks `extent` as used by `what`.
    ///
    /// # Errors
    /// Corrupt if any of it is used already, is not on 1 MiB borders, or lies past the map's limit.
    #[inline]
    pub fn occupy(&mut self, extent: Extent, what: &'static str) -> Result<()> {
        if !extent.offset.is_multiple_of(MIB) || !extent.length.is_multiple_of(MIB) {
            return Err(Error::corrupt(what, "is not on 1 MiB borders").at(extent.offset));
        }
        if extent.offset.checked_add(extent.length).is_none_or(|end| end > MAX_FILE_BYTES) {
            return Err(Error::corrupt(what, "lies beyond any file this program maps").at(extent.offset));
        }
        match self.claim(extent) {
            None => Ok(()),
            Some(offset) => Err(shared(what, offset, extent)),
        }
    }

    /// Marks all of `extent` as used, whatever was there; returns the first byte that was used already.
    /// It starts in the file: past the map's limit it reaches by a block at most.
    #[inline]
    pub fn claim(&mut self, extent: Extent) -> Option<u64> {
        assert!(extent.offset <= MAX_FILE_BYTES, "{extent:?} starts in the file");
        let units = extent.units();
        self.reach(units.end);
        let shared = self.next(units.clone(), true);
        self.used.insert_range(units.clone());
        self.known_zero.remove_range(units.clone());
        self.runs.changed(units);
        shared.map(|unit| unit as u64 * MIB)
    }

    /// The runs of free MiB between used ones, ascending.
    pub fn free_runs(&self) -> impl Iterator<Item = Extent> {
        let end = index(self.used_end() / MIB);
        let mut from = 1;
        std::iter::from_fn(move || {
            let start = self.next(from..end, false)?;
            from = self.next(start..end, true).expect("the last MiB below the end is used");
            Some(Extent::of_units(start..from))
        })
    }

    /// Those of the free runs that may hold something: not all of them is known to be zero.
    pub fn unknown_runs(&self) -> impl Iterator<Item = Extent> {
        self.free_runs().filter(|run| !self.known_zero.contains_all_in_range(run.units()))
    }

    /// Takes the lowest free run of `length` bytes, if the file has one: space is used from its start, so
    /// that the unused end can be cut off.
    pub fn take(&mut self, length: u64) -> Option<Grant> {
        assert!(length > 0 && length.is_multiple_of(MIB), "{length} bytes are granted in whole MiB");
        let count = index(length / MIB);
        let first = self.find_run(count)?;
        Some(self.take_units(first..first + count))
    }

    /// Takes what [`Self::take`] would take, if that reads as zero.
    pub fn take_zeros(&mut self, length: u64) -> Option<Extent> {
        let first = self.find_run(index(length / MIB))?;
        let units = first..first + index(length / MIB);
        let known_zero = self.known_zero.contains_all_in_range(units.clone());
        known_zero.then(|| self.take_units(units).extent)
    }

    /// Takes `extent`, if the file has it and all of it is free.
    pub fn take_at(&mut self, extent: Extent) -> Option<Grant> {
        assert!(extent.length > 0, "{extent:?} is something");
        let units = extent.units();
        let free = units.end <= self.units && self.next(units.clone(), true).is_none();
        free.then(|| self.take_units(units))
    }

    fn take_units(&mut self, units: Range<usize>) -> Grant {
        assert!(units.start > 0 && units.end <= self.units, "{units:?} lies in the file, behind its headers");
        let known_zero = self.known_zero.contains_all_in_range(units.clone());
        self.used.insert_range(units.clone());
        self.known_zero.remove_range(units.clone());
        self.runs.changed(units.clone());
        if units.start == self.lowest_free {
            self.lowest_free = units.end;
        }
        let content = if known_zero { Content::KnownZero } else { Content::Recycled };
        Grant { extent: Extent::of_units(units), content }
    }

    /// Gives `extent` back; its content is known zero only if it reads as zero after any power cut from now
    /// on.
    pub fn free(&mut self, extent: Extent, content: Content) {
        let units = extent.units();
        assert!(units.start > 0, "the header section is always used");
        assert!(self.used.contains_all_in_range(units.clone()), "{extent:?} is freed once");
        assert!(!self.known_zero.contains_any_in_range(units.clone()), "used space is not known zero");
        self.used.remove_range(units.clone());
        self.known_zero.set_range(units.clone(), content == Content::KnownZero);
        self.lowest_free = self.lowest_free.min(units.start);
        self.runs.changed(units);
    }

    /// The file has been extended to `file_length` bytes by this process; the new part is known zero.
    pub fn extend(&mut self, file_length: u64) {
        assert!(file_length.is_multiple_of(MIB), "files grow in whole MiB, not to {file_length} bytes");
        let units = index(file_length / MIB);
        self.reach(units);
        for unit in self.units..units {
            // A tolerated partial last block is used beyond the end of the file it was found in.
            self.known_zero.set(unit, !self.used.contains(unit));
        }
        self.runs.changed(self.units.min(units)..units);
        self.units = self.units.max(units);
        debug_assert!(self.used.is_disjoint(&self.known_zero), "used space is not known zero");
    }

    /// The file is about to be shortened to `file_length` bytes, behind which nothing is used.
    pub fn shorten(&mut self, file_length: u64) {
        assert!(self.used_end() <= file_length, "what is used stays in the file");
        assert!(file_length.is_multiple_of(MIB), "files are cut in whole MiB, not to {file_length} bytes");
        let gone = index(file_length / MIB)..self.units;
        self.known_zero.remove_range(gone.clone());
        self.units = gone.start;
        self.runs.changed(gone);
    }

    /// The file still has `file_length` bytes: nothing is known of those behind what it was thought to have.
    pub fn lengthen(&mut self, file_length: u64) {
        let back = self.units..index(file_length / MIB);
        self.units = back.end;
        self.runs.changed(back);
    }

    /// From where on the file's end, of which nothing is used, reads as zero after a power cut, bytes.
    pub fn zero_from(&self) -> u64 {
        let unknown = (0..self.units).rev().find(|unit| !self.known_zero.contains(*unit));
        (unknown.expect("the header section is used") as u64 + 1) * MIB
    }

    /// End of the last used MiB, bytes.
    pub fn used_end(&self) -> u64 {
        let last = self.used.maximum().expect("the header section is used");
        (last as u64 + 1) * MIB
    }

    /// Used bytes, the header section included.
    pub fn used_bytes(&self) -> u64 {
        self.used.count_ones(..) as u64 * MIB
    }

    /// Whether any MiB of `range` (bytes) is used.
    pub fn is_used(&self, range: Range<u64>) -> bool {
        let end = index(range.end.div_ceil(MIB)).min(self.used.len());
        self.next(index(range.start / MIB)..end, true).is_some()
    }

    /// Makes the map long enough for units below `end`.
    fn reach(&mut self, end: usize) {
        assert_eq!(self.used.len(), self.known_zero.len(), "both maps have one length");
        if end > self.used.len() {
            self.used.grow(end);
            self.known_zero.grow(end);
        }
    }

    /// The first of `units` that is used, or that is free; what was never reached is free.
    #[inline]
    fn next(&self, units: Range<usize>, used: bool) -> Option<usize> {
        const BITS: usize = usize::BITS as usize;
        let mut unit = units.start;
        while unit < units.end {
            let word = self.used.as_slice().get(unit / BITS).copied().unwrap_or(0);
            let wanted = if used { word } else { !word } >> (unit % BITS);
            if wanted != 0 {
                let found = unit + wanted.trailing_zeros() as usize;
                return (found < units.end).then_some(found);
            }
            unit = (unit / BITS + 1) * BITS;
        }
        None
    }

    fn find_run(&mut self, count: usize) -> Option<usize> {
        self.lowest_free = self.next(self.lowest_free..self.units, false)?;
        let mut runs = std::mem::take(&mut *self.runs);
        let place = runs.lowest(count, self.lowest_free, self.units, |units, used| self.next(units, used));
        *self.runs = runs;
        let mut start = self.next(place?..self.units, false)?;
        while let Some(blocker) = self.next(start..(start + count).min(self.units), true) {
            start = self.next(blocker + 1..self.units, false)?;
        }
        assert!(start + count <= self.units, "the run that was found lies in the file");
        Some(start)
    }
}

#[cold]
fn shared(what: &'static str, offset: u64, extent: Extent) -> Error {
    let message = format!("shares the MiB at byte {offset} with another structure");
    Error::corrupt(what, message).at(extent.offset).remedy(
        "two structures claim the same bytes: do not write to this image; `vhdx-ublk salvage FILE COPY` \
         copies what is not in doubt",
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn extent(start_mib: u64, count: u64) -> Extent {
        Extent { offset: start_mib * MIB, length: count * MIB }
    }

    #[test]
    fn freed_space_comes_first_and_a_tail_found_at_open_is_recycled() {
        let mut space = Space::new(8 * MIB).expect("small");
        space.occupy(extent(1, 3), "region").expect("free");
        assert_eq!(space.take(2 * MIB), Some(Grant { extent: extent(4, 2), content: Content::Recycled }));
        space.extend(12 * MIB);
        assert_eq!(
            space.take(4 * MIB),
            Some(Grant { extent: extent(6, 4), content: Content::Recycled }),
            "half of it is old"
        );
        assert_eq!(space.take(2 * MIB), Some(Grant { extent: extent(10, 2), content: Content::KnownZero }));
        assert_eq!(space.take(MIB), None);
        space.free(extent(4, 2), Content::KnownZero);
        assert_eq!(space.take(MIB), Some(Grant { extent: extent(4, 1), content: Content::KnownZero }));
        space.free(extent(7, 1), Content::Recycled);
        assert_eq!(space.take(MIB), Some(Grant { extent: extent(5, 1), content: Content::KnownZero }));
        assert_eq!(space.take(MIB), Some(Grant { extent: extent(7, 1), content: Content::Recycled }));
    }

    #[test]
    fn an_end_that_was_added_is_zero_and_can_be_cut_off() {
        let mut space = Space::new(4 * MIB).expect("small");
        space.occupy(extent(1, 1), "region").expect("free");
        assert_eq!(space.zero_from(), 4 * MIB, "what was found may hold anything");
        space.extend(8 * MIB);
        assert_eq!(space.take_at(extent(5, 1)).expect("free").content, Content::KnownZero);
        assert_eq!(space.zero_from(), 6 * MIB);
        space.shorten(6 * MIB);
        assert_eq!(space.take_at(extent(6, 1)), None, "the file has it no longer");
        space.extend(7 * MIB);
        assert_eq!(
            (space.zero_from(), space.take(2 * MIB).map(|grant| grant.extent)),
            (6 * MIB, Some(extent(2, 2)))
        );
    }

    #[test]
    fn zeros_are_taken_only_where_they_come_first() {
        let mut space = Space::new(3 * MIB).expect("small");
        space.extend(6 * MIB);
        assert_eq!(space.take_zeros(2 * MIB), None, "what was found comes first");
        assert_eq!(space.take(2 * MIB).expect("room").extent, extent(1, 2));
        assert_eq!(space.take_zeros(2 * MIB), Some(extent(3, 2)));
        assert_eq!(space.take_zeros(2 * MIB), None, "one is left");
        space.free(extent(3, 2), Content::KnownZero);
        assert_eq!(space.take(3 * MIB).expect("room").content, Content::KnownZero);
    }

    #[test]
    fn known_zero_is_lost_by_a_grant() {
        let mut space = Space::new(MIB).expect("small");
        space.extend(2 * MIB);
        assert_eq!(space.take(MIB).expect("room").content, Content::KnownZero);
        space.free(extent(1, 1), Content::Recycled);
        assert_eq!(space.take(MIB).expect("room").content, Content::Recycled);
    }

    #[test]
    fn double_use_is_found_wherever_it_is() {
        let mut space = Space::new(200 * MIB).expect("small");
        space.occupy(extent(100, 64), "payload block").expect("free");
        for start in [99, 100, 130, 163] {
            assert!(space.clone().occupy(extent(start, 2), "payload block").is_err(), "at MiB {start}");
        }
        space.occupy(extent(164, 36), "payload block").expect("free");
        assert!(space.occupy(extent(0, 1), "payload block").is_err(), "the header section is used");
        assert_eq!(space.used_end(), 200 * MIB);
    }

    #[test]
    fn a_claim_marks_everything_and_tells_what_it_shares() {
        let mut space = Space::new(300 * MIB).expect("small");
        assert_eq!(space.claim(extent(100, 10)), None);
        assert_eq!(space.claim(extent(90, 30)), Some(100 * MIB));
        assert_eq!(space.claim(extent(0, 1)), Some(0), "the header section is used");
        assert!(space.is_used(90 * MIB..91 * MIB) && space.is_used(119 * MIB..120 * MIB));
    }

    #[test]
    fn free_runs_lie_between_used_ones() {
        let mut space = Space::new(1000 * MIB).expect("small");
        assert_eq!(space.free_runs().count(), 0, "what lies behind the last used MiB is a tail");
        for used in [extent(3, 60), extent(64, 1), extent(640, 2)] {
            assert_eq!(space.claim(used), None);
        }
        let found: Vec<Extent> = space.free_runs().collect();
        assert_eq!(found, [extent(1, 2), extent(63, 1), extent(65, 575)]);
        for (run, content) in [(extent(3, 1), Content::KnownZero), (extent(640, 1), Content::Recycled)] {
            space.free(run, content);
        }
        space.free(extent(641, 1), Content::KnownZero);
        assert_eq!(space.claim(extent(999, 1)), None);
        let unknown: Vec<Extent> = space.unknown_runs().collect();
        assert_eq!(unknown, [extent(1, 3), extent(63, 1), extent(65, 934)]);
    }

    proptest! {
        /// Whatever is taken, freed and added: the lowest run that is long enough, whether in one stretch of
        /// the index, over its borders or over several.
        #[test]
        fn the_lowest_run_that_is_long_enough_is_taken(
            steps in prop::collection::vec((0..5_u8, 1..4000_u64, 1..3000_u64), 1..80)
        ) {
            let mut space = Space::new(3000 * MIB).expect("small");
            let (mut free, mut units) = (vec![true; 200_000], 3000);
            free[0] = false;
            let lowest = |free: &[bool], units: usize, count: usize| {
                let fits = |start: &usize| free[*start..start + count].iter().all(|free| *free);
                (1..(units + 1).saturating_sub(count)).find(fits)
            };
            for (step, place, count) in steps {
                let range = index(place)..index(place + count).min(units);
                match step {
                    0 if !range.is_empty() && free[range.clone()].iter().all(|free| *free) => {
                        space.take_at(extent(place, range.len() as u64)).expect("it is free");
                        free[range].fill(false);
                    }
                    1 if !range.is_empty() && !free[range.clone()].iter().any(|free| *free) => {
                        space.free(extent(place, range.len() as u64), Content::Recycled);
                        free[range].fill(true);
                    }
                    2 if units < 100_000 => {
                        units += index(count);
                        space.extend(units as u64 * MIB);
                    }
                    _ => {
                        let count = if step == 3 { count } else { place % 7 + 1 };
                        let expected = lowest(&free, units, index(count));
                        let taken = space.take(count * MIB).map(|grant| index(grant.extent.offset / MIB));
                        prop_assert_eq!(taken, expected);
                        if let Some(start) = taken {
                            free[start..start + index(count)].fill(false);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_run_never_crosses_the_end_of_the_file() {
        let mut space = Space::new(70 * MIB).expect("small");
        space.occupy(extent(1, 66), "region").expect("free");
        assert_eq!(space.take(4 * MIB), None, "3 MiB are left");
        assert_eq!(space.take(3 * MIB), Some(Grant { extent: extent(67, 3), content: Content::Recycled }));
    }
}
