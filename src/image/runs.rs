//! How long the free runs of a file are, by stretches of its map: a run that is long enough is found without
//! a look at each of a million shorter ones.
//!
//! A stretch is summarised when it is asked for; whatever changes the map says where.

use std::ops::Range;

use fixedbitset::FixedBitSet;

/// Units of a stretch: of a file of 1 TiB, 1024 stretches.
pub(super) const STRETCH: usize = 1024;

/// The free runs of a stretch, in units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stretch {
    /// Free units at its start.
    first: usize,
    /// Free units at its end.
    last: usize,
    /// The longest free run in it.
    longest: usize,
}

/// See the module's head.
#[derive(Clone, Debug, Default)]
pub(super) struct Runs {
    stretches: Vec<Stretch>,
    /// Those whose summary is of before.
    stale: FixedBitSet,
}

impl Runs {
    /// Of a map in which nothing was summarised yet.
    pub(super) fn new(units: usize) -> Self {
        let mut runs = Self::default();
        runs.changed(0..units);
        runs
    }

    /// Something has changed in these units.
    #[inline]
    pub(super) fn changed(&mut self, units: Range<usize>) {
        let stretches = units.start / STRETCH..units.end.div_ceil(STRETCH);
        if stretches.end > self.stretches.len() {
            self.stretches.resize(stretches.end, Stretch::default());
            self.stale.grow(stretches.end);
        }
        self.stale.insert_range(stretches);
    }

    /// Where to look for the lowest run of `count` free units that starts at `from`, which is free, or behind
    /// it, and ends at `end` or before: the run starts there, or behind it in the same stretch. `next` is the
    /// first unit of a range that is used, or that is free.
    pub(super) fn lowest(
        &mut self,
        count: usize,
        from: usize,
        end: usize,
        next: impl Fn(Range<usize>, bool) -> Option<usize>,
    ) -> Option<usize> {
        assert!(count > 0 && from < end, "a run of {count} from {from} to {end}");
        // Free units that end where the stretch begins.
        let mut before = 0;
        for number in from / STRETCH..end.div_ceil(STRETCH) {
            let units = number * STRETCH..((number + 1) * STRETCH).min(end);
            if self.stale.contains(number) {
                self.stretches[number] = summarise(units.clone(), &next);
                self.stale.remove(number);
            }
            let Stretch { first, last, longest } = self.stretches[number];
            if before + first >= count {
                return Some(units.start - before);
            }
            if longest >= count {
                return Some(units.start);
            }
            before = if first == units.len() { before + first } else { last };
        }
        None
    }
}

fn summarise(units: Range<usize>, next: impl Fn(Range<usize>, bool) -> Option<usize>) -> Stretch {
    let mut stretch = Stretch::default();
    let mut at = units.start;
    while let Some(start) = next(at..units.end, false) {
        let past = next(start..units.end, true).unwrap_or(units.end);
        stretch.longest = stretch.longest.max(past - start);
        if start == units.start {
            stretch.first = past - start;
        }
        if past == units.end {
            stretch.last = past - start;
        }
        at = past;
    }
    assert!(stretch.longest <= units.len() && stretch.first.max(stretch.last) <= stretch.longest);
    stretch
}
