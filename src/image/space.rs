//! What occupies the file, MiB by MiB, and what is known of the rest.
//!
//! Every object after the header section lies on a 1 MiB border and is a whole number of MiB long, so one bit
//! per MiB says whether it is used and one whether it is known to read as zero *after a power cut*:
//!
//! * bytes past the length found at open that this process has added and never granted are known zero;
//! * space that was punched is known zero once a sync issued after the punch has completed;
//! * everything else that is free is *recycled*: it must be zeroed before it is granted, and that zeroing must
//!   be durable before any log entry names it.

use crate::error::{Error, Kind, Result};
use crate::format::MIB;
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

    fn units(&self) -> std::ops::Range<u64> {
        assert!(
            self.offset.is_multiple_of(MIB) && self.length.is_multiple_of(MIB),
            "{self:?} is not whole MiB"
        );
        self.offset / MIB..self.end() / MIB
    }
}

/// Space handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// Where.
    pub extent: Extent,
    /// Not known to be zero: zero it first, and sync before an entry names it.
    pub recycled: bool,
}

/// The map; see the module's head.
#[derive(Clone, Debug)]
pub struct Space {
    used: Bits,
    known_zero: Bits,
    /// MiB the file holds, a partial last one included.
    units: u64,
    /// No unit below is free.
    lowest_free: u64,
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
        let units = file_length.div_ceil(MIB).max(1);
        let mut space = Self { used: Bits::new(units), known_zero: Bits::new(units), units, lowest_free: 1 };
        space.used.set(0, true);
        if planted(Plant::TrustTail) {
            (1..units).for_each(|unit| space.known_zero.set(unit, true));
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
        for unit in extent.units() {
            if self.used.get(unit) {
                return Err(shared(what, unit, extent));
            }
            self.used.set(unit, true);
        }
        Ok(())
    }

    /// Marks all of `extent` as used, whatever was there; returns the first byte that was used already.
    /// It starts in the file: past the map's limit it reaches by a block at most.
    pub fn claim(&mut self, extent: Extent) -> Option<u64> {
        assert!(extent.offset <= MAX_FILE_BYTES, "the file was measured before");
        let mut shared = None;
        for unit in extent.units() {
            if self.used.get(unit) {
                shared.get_or_insert(unit * MIB);
            }
            self.used.set(unit, true);
        }
        shared
    }

    /// The runs of free MiB between used ones, ascending.
    pub fn free_runs(&self) -> impl Iterator<Item = Extent> {
        let end = self.used_end() / MIB;
        let mut from = 1;
        std::iter::from_fn(move || {
            let start = self.used.next_clear(from, end)?;
            from = self.used.next_set(start)?;
            Some(Extent { offset: start * MIB, length: (from - start) * MIB })
        })
    }

    /// Those of the free runs that may hold something: not all of them is known to be zero.
    pub fn unknown_runs(&self) -> impl Iterator<Item = Extent> {
        self.free_runs().filter(|run| !run.units().all(|unit| self.known_zero.get(unit)))
    }

    /// Takes the lowest free run of `length` bytes, if the file has one.
    pub fn take(&mut self, length: u64) -> Option<Grant> {
        let count = length / MIB;
        assert!(count > 0 && length.is_multiple_of(MIB), "space is granted in whole MiB");
        let first = self.find_run(count)?;
        let recycled = (first..first + count).any(|unit| !self.known_zero.get(unit));
        for unit in first..first + count {
            self.used.set(unit, true);
            self.known_zero.set(unit, false);
        }
        if first == self.lowest_free {
            self.lowest_free = first + count;
        }
        Some(Grant { extent: Extent { offset: first * MIB, length }, recycled })
    }

    /// Gives `extent` back; `known_zero` only if it reads as zero after any power cut from now on.
    pub fn free(&mut self, extent: Extent, known_zero: bool) {
        for unit in extent.units() {
            assert!(self.used.get(unit), "MiB {unit} was free already");
            self.used.set(unit, false);
            self.known_zero.set(unit, known_zero);
        }
        self.lowest_free = self.lowest_free.min(extent.offset / MIB);
    }

    /// The file has been extended to `file_length` bytes by this process; the new part is known zero.
    pub fn extend(&mut self, file_length: u64) {
        assert!(file_length.is_multiple_of(MIB), "files grow in whole MiB");
        let units = file_length / MIB;
        for unit in self.units..units {
            // A tolerated partial last block is used beyond the end of the file it was found in.
            if !self.used.get(unit) {
                self.known_zero.set(unit, true);
            }
        }
        self.units = self.units.max(units);
    }

    /// End of the last used MiB, bytes.
    pub fn used_end(&self) -> u64 {
        self.used.last_set().map_or(MIB, |unit| (unit + 1) * MIB)
    }

    /// Used bytes, the header section included.
    pub fn used_bytes(&self) -> u64 {
        self.used.count() * MIB
    }

    /// Whether any MiB of `range` (bytes) is used.
    pub fn is_used(&self, range: std::ops::Range<u64>) -> bool {
        (range.start / MIB..range.end.div_ceil(MIB)).any(|unit| self.used.get(unit))
    }

    fn find_run(&mut self, count: u64) -> Option<u64> {
        let mut start = self.used.next_clear(self.lowest_free, self.units)?;
        self.lowest_free = start;
        loop {
            if start + count > self.units {
                return None;
            }
            match (start..start + count).rev().find(|&unit| self.used.get(unit)) {
                None => return Some(start),
                Some(blocker) => start = self.used.next_clear(blocker + 1, self.units)?,
            }
        }
    }
}

#[cold]
fn shared(what: &'static str, unit: u64, extent: Extent) -> Error {
    let message = format!("shares the MiB at byte {} with another structure", unit * MIB);
    Error::corrupt(what, message).at(extent.offset).remedy(
        "two structures claim the same bytes: do not write to this image; restore it from a backup, or copy its data out with `add --read-only` of an undamaged copy",
    )
}

/// A growing set of bits; what was never reached is clear.
#[derive(Clone, Debug)]
struct Bits(Vec<u64>);

impl Bits {
    fn new(count: u64) -> Self {
        Self(vec![0; word_of(count + 63)])
    }

    #[inline]
    fn get(&self, bit: u64) -> bool {
        self.0.get(word_of(bit)).is_some_and(|word| word >> (bit % 64) & 1 == 1)
    }

    #[inline]
    fn set(&mut self, bit: u64, value: bool) {
        let (index, mask) = (word_of(bit), 1 << (bit % 64));
        if index >= self.0.len() {
            self.0.resize(index + 1, 0);
        }
        let word = &mut self.0[index];
        *word = if value { *word | mask } else { *word & !mask };
    }

    fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    fn last_set(&self) -> Option<u64> {
        let word = self.0.iter().rposition(|word| *word != 0)?;
        Some(word as u64 * 64 + 63 - u64::from(self.0[word].leading_zeros()))
    }

    /// The first set bit at `from` or behind it.
    fn next_set(&self, from: u64) -> Option<u64> {
        let first = *self.0.get(word_of(from))? >> (from % 64);
        if first != 0 {
            return Some(from + u64::from(first.trailing_zeros()));
        }
        let behind = word_of(from) + 1;
        let word = behind + self.0.get(behind..)?.iter().position(|word| *word != 0)?;
        Some(word as u64 * 64 + u64::from(self.0[word].trailing_zeros()))
    }

    /// The first clear bit in `from..end`.
    fn next_clear(&self, from: u64, end: u64) -> Option<u64> {
        let mut bit = from;
        while bit < end {
            let inverted = !self.0.get(word_of(bit)).copied().unwrap_or(0) >> (bit % 64);
            if inverted != 0 {
                let found = bit + u64::from(inverted.trailing_zeros());
                return (found < end).then_some(found);
            }
            bit = (bit / 64 + 1) * 64;
        }
        None
    }
}

fn word_of(bit: u64) -> usize {
    usize::try_from(bit / 64).expect("64-bit hosts only")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start_mib: u64, count: u64) -> Extent {
        Extent { offset: start_mib * MIB, length: count * MIB }
    }

    #[test]
    fn freed_space_comes_first_and_a_tail_found_at_open_is_recycled() {
        let mut space = Space::new(8 * MIB).expect("small");
        space.occupy(extent(1, 3), "region").expect("free");
        assert_eq!(space.take(2 * MIB), Some(Grant { extent: extent(4, 2), recycled: true }));
        space.extend(12 * MIB);
        assert_eq!(
            space.take(4 * MIB),
            Some(Grant { extent: extent(6, 4), recycled: true }),
            "half of it is old"
        );
        assert_eq!(space.take(2 * MIB), Some(Grant { extent: extent(10, 2), recycled: false }));
        assert_eq!(space.take(MIB), None);
        space.free(extent(4, 2), true);
        assert_eq!(space.take(MIB), Some(Grant { extent: extent(4, 1), recycled: false }));
        space.free(extent(7, 1), false);
        assert_eq!(space.take(MIB), Some(Grant { extent: extent(5, 1), recycled: false }));
        assert_eq!(space.take(MIB), Some(Grant { extent: extent(7, 1), recycled: true }));
    }

    #[test]
    fn known_zero_is_lost_by_a_grant() {
        let mut space = Space::new(MIB).expect("small");
        space.extend(2 * MIB);
        assert!(!space.take(MIB).expect("room").recycled);
        space.free(extent(1, 1), false);
        assert!(space.take(MIB).expect("room").recycled);
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
        for (run, known_zero) in [(extent(3, 1), true), (extent(640, 1), false)] {
            space.free(run, known_zero);
        }
        space.free(extent(641, 1), true);
        assert_eq!(space.claim(extent(999, 1)), None);
        let unknown: Vec<Extent> = space.unknown_runs().collect();
        assert_eq!(unknown, [extent(1, 3), extent(63, 1), extent(65, 934)]);
    }

    #[test]
    fn a_run_never_crosses_the_end_of_the_file() {
        let mut space = Space::new(70 * MIB).expect("small");
        space.occupy(extent(1, 66), "region").expect("free");
        assert_eq!(space.take(4 * MIB), None, "3 MiB are left");
        assert_eq!(space.take(3 * MIB), Some(Grant { extent: extent(67, 3), recycled: true }));
    }
}
