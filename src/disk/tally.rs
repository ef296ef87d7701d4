//! Numbers that one thread counts and others read.
//!
//! A [`Tally`] has one writer. To count is one plain load and one plain store: no lock, no locked
//! instruction. A reader sees a value that was true a moment ago, and two tallies that are read together
//! need not be from the same moment.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The first bucket of a histogram has the durations up to so many microseconds; each further one reaches
/// twice as far.
const FIRST_BOUND_US: u64 = 16;

/// The buckets with a bound: up to 33 seconds. One more has what is longer.
const BOUNDED: usize = 22;

/// See the module's head.
#[derive(Debug, Default)]
pub struct Tally(AtomicU64);

impl Tally {
    /// Counts `count` more. For the one thread that writes.
    #[inline]
    pub fn add(&self, count: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(count), Ordering::Relaxed);
    }

    /// Replaces the number, for one that also goes down. For the one thread that writes.
    #[inline]
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// The number as it was a moment ago.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Durations, counted by their length.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Tally; BOUNDED + 1],
    sum_us: Tally,
}

impl Histogram {
    /// Counts a duration. For the one thread that writes.
    pub fn record(&self, duration: Duration) {
        let micros = u64::try_from(duration.as_nanos().div_ceil(1000)).unwrap_or(u64::MAX);
        self.buckets[bucket(micros)].add(1);
        self.sum_us.add(micros);
    }

    /// What has been counted so far.
    pub fn times(&self) -> Times {
        let buckets: Vec<u64> = self.buckets.iter().map(Tally::get).collect();
        Times { count: buckets.iter().sum(), sum_us: self.sum_us.get(), buckets }
    }
}

/// The bucket of a duration.
fn bucket(micros: u64) -> usize {
    let doublings = micros.max(1).div_ceil(FIRST_BOUND_US).next_power_of_two().ilog2();
    (doublings as usize).min(BOUNDED)
}

/// What a [`Histogram`] has counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Times {
    /// Durations.
    pub count: u64,
    /// Their sum, microseconds.
    pub sum_us: u64,
    /// How many lie in each bucket: up to 16 microseconds, up to 32, and so on; in the last one those that
    /// are longer than every bound.
    pub buckets: Vec<u64>,
}

impl Times {
    /// Adds what another histogram has counted.
    pub fn add(&mut self, other: &Self) {
        self.count = self.count.saturating_add(other.count);
        self.sum_us = self.sum_us.saturating_add(other.sum_us);
        if self.buckets.len() < other.buckets.len() {
            self.buckets.resize(other.buckets.len(), 0);
        }
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine = mine.saturating_add(*theirs);
        }
    }

    /// What was counted since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let earlier = before.buckets.iter().copied().chain(std::iter::repeat(0));
        let buckets: Vec<u64> =
            self.buckets.iter().zip(earlier).map(|(now, then)| now.saturating_sub(then)).collect();
        Self {
            count: self.count.saturating_sub(before.count),
            sum_us: self.sum_us.saturating_sub(before.sum_us),
            buckets,
        }
    }

    /// The mean, if anything was counted.
    pub fn mean(&self) -> Option<Duration> {
        (self.count > 0).then(|| Duration::from_micros(self.sum_us / self.count))
    }

    /// A bound that so many in a hundred do not exceed: `None` if nothing was counted, or if there is no such
    /// bound.
    pub fn bound_of(&self, percent: u64) -> Option<Duration> {
        let wanted = u128::from(self.count) * u128::from(percent);
        let mut seen = 0;
        let place = self.buckets.iter().position(|count| {
            seen += u128::from(*count);
            seen > 0 && seen * 100 >= wanted
        })?;
        self.bounds().nth(place)?
    }

    /// The upper bound of each bucket; `None` for the last one, which has none.
    pub fn bounds(&self) -> impl Iterator<Item = Option<Duration>> {
        let last = self.buckets.len().saturating_sub(1);
        (0..self.buckets.len()).map(move |place| {
            let shift = u32::try_from(place).ok().filter(|_| place < last)?;
            Some(Duration::from_micros(FIRST_BOUND_US.checked_shl(shift)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(micros: &[u64]) -> Times {
        let histogram = Histogram::default();
        for micros in micros {
            histogram.record(Duration::from_micros(*micros));
        }
        histogram.times()
    }

    #[test]
    fn a_duration_lies_in_the_first_bucket_that_reaches_it() {
        for (micros, expected) in
            [(0, 0), (1, 0), (16, 0), (17, 1), (32, 1), (33, 2), (1000, 6), (33_554_432, 21)]
        {
            assert_eq!(bucket(micros), expected, "{micros}");
            let times = recorded(&[micros]);
            let bound = times.bounds().nth(expected).flatten().expect("bounded");
            assert!(Duration::from_micros(micros) <= bound, "{micros}: {bound:?}");
        }
        assert_eq!(bucket(33_554_433), BOUNDED);
        assert_eq!(bucket(u64::MAX), BOUNDED);
        let histogram = Histogram::default();
        histogram.record(Duration::from_nanos(16_001));
        assert_eq!(histogram.times().buckets[1], 1, "16 microseconds do not reach it");
    }

    #[test]
    fn counts_sums_means_and_bounds_agree() {
        let times = recorded(&[10, 10, 20, 1000]);
        assert_eq!((times.count, times.sum_us), (4, 1040));
        assert_eq!(times.mean(), Some(Duration::from_micros(260)));
        assert_eq!(times.bound_of(50), Some(Duration::from_micros(16)));
        assert_eq!(times.bound_of(75), Some(Duration::from_micros(32)));
        assert_eq!(times.bound_of(100), Some(Duration::from_micros(1024)));
        assert_eq!(recorded(&[60_000_000]).bound_of(99), None, "longer than every bound");
        assert_eq!((recorded(&[]).mean(), recorded(&[]).bound_of(99)), (None, None));
    }

    #[test]
    fn histograms_add_up_and_show_what_is_new() {
        let mut sum = recorded(&[10, 20]);
        let before = sum.clone();
        sum.add(&recorded(&[20, 5000]));
        assert_eq!(sum, recorded(&[10, 20, 20, 5000]));
        assert_eq!(sum.since(&before), recorded(&[20, 5000]));
        let mut none = Times::default();
        none.add(&before);
        assert_eq!(none, before);
        assert_eq!(before.since(&sum).count, 0, "a daemon that is new has counted less");
    }
}
