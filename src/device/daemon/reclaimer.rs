//! A device that compacts its image by itself, when nothing has used it for some time (`add --reclaim`).
//!
//! It looks at the requests that have come once in that time, and not in between. The compaction ends at the
//! first request, and begins again when there have been none for as long. One that has done all there was to
//! do is not followed by another before blocks have lost their space.
//!
//! An image that was not written since it was opened is left alone: the first write changes its identifier,
//! which children that `add --force` has ignored would miss.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::device::job::{Job, Stop};
use crate::device::order::{Call, Shortened};
use crate::device::reclaim::Reclaim;
use crate::engine::port_counts::Requests;
use crate::error::Result;

/// What the device has had so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sight {
    pub(super) requests: Requests,
    /// The blocks that have lost their space.
    pub(super) unmapped: u64,
    /// Its image was written.
    pub(super) is_written: bool,
}

/// When to begin. See the module's head.
pub(super) struct Reclaimer {
    patience: Option<Duration>,
    due: Instant,
    seen: Option<Requests>,
    /// The blocks that had lost their space when a compaction began that has done all there was to do.
    done: Option<u64>,
    running: Option<(Arc<Job>, u64)>,
    /// What callers want of the image when that has ended.
    waiting: Vec<Call>,
}

impl Reclaimer {
    pub(super) fn new(reclaim: Reclaim, now: Instant) -> Self {
        let patience = reclaim.patience();
        let due = now + patience.unwrap_or_default();
        Self { patience, due, seen: None, done: None, running: None, waiting: Vec::new() }
    }

    /// When to look next, if ever.
    pub(super) fn due(&self) -> Option<Instant> {
        self.patience.filter(|_| self.running.is_none()).map(|_| self.due)
    }

    /// Whether to begin a compaction.
    pub(super) fn looks(&mut self, now: Instant, sight: &Sight) -> bool {
        let Some(patience) = self.patience.filter(|_| self.running.is_none() && now >= self.due) else {
            return false;
        };
        self.due = now + patience;
        let is_idle = self.seen.replace(sight.requests) == Some(sight.requests);
        is_idle && sight.is_written && self.done != Some(sight.unmapped)
    }

    /// The compaction has begun.
    pub(super) fn began(&mut self, job: Arc<Job>, sight: &Sight) {
        self.running = Some((job, sight.unmapped));
    }

    /// It has ended. What is to be done now for those who have waited for that.
    pub(super) fn ended(&mut self, outcome: &Result<Shortened>, now: Instant) -> Vec<Call> {
        let (_, unmapped) = self.running.take().expect("one at a time");
        if outcome.as_ref().map_or(true, |done| done.stopped.is_none()) {
            self.done = Some(unmapped);
        }
        // Requests of the time in which it was under way count as new.
        self.due = now + self.patience.unwrap_or_default();
        std::mem::take(&mut self.waiting)
    }

    /// Has what a caller wants come first, if a compaction is under way: it is called again when that has
    /// ended.
    pub(super) fn defer(&mut self, call: Call) -> Option<Call> {
        let Some((job, _)) = &self.running else { return Some(call) };
        job.stop(Stop::Caller);
        self.waiting.push(call);
        None
    }
}

#[cfg(test)]
mod tests {
    use crate::device::job::JobKind;
    use crate::error::{Error, Kind};

    use super::*;

    const AUTO: &str = "auto=60";
    const PATIENCE: Duration = Duration::from_secs(60);

    fn at(minutes: u32, start: Instant) -> Instant {
        start + PATIENCE * minutes
    }

    fn sight(reads: u64, unmapped: u64) -> Sight {
        Sight { requests: Requests { read: reads, ..Requests::default() }, unmapped, is_written: true }
    }

    #[test]
    fn a_device_is_idle_that_had_no_request_between_two_looks() {
        let start = Instant::now();
        let mut reclaimer = Reclaimer::new(AUTO.parse().expect("a choice"), start);
        assert_eq!(reclaimer.due(), Some(at(1, start)));
        assert!(!reclaimer.looks(start, &sight(0, 0)), "it is early");
        assert!(!reclaimer.looks(at(1, start), &sight(5, 0)), "requests may have come just now");
        assert!(!reclaimer.looks(at(2, start), &sight(6, 0)), "one has come");
        assert!(
            !reclaimer.looks(at(3, start), &Sight { is_written: false, ..sight(6, 0) }),
            "it was only read"
        );
        assert!(reclaimer.looks(at(4, start), &sight(6, 0)));
        assert_eq!(Reclaimer::new(Reclaim::OFF, start).due(), None);
        assert!(!Reclaimer::new(Reclaim::OFF, start).looks(at(1, start), &sight(0, 0)));
    }

    #[test]
    fn one_that_was_stopped_begins_again_and_one_that_is_done_waits_for_free_blocks() {
        let start = Instant::now();
        let mut reclaimer = Reclaimer::new(AUTO.parse().expect("a choice"), start);
        let begin = |reclaimer: &mut Reclaimer, minutes, sight: Sight| {
            let begins = reclaimer.looks(at(minutes, start), &sight);
            if begins {
                reclaimer.began(Job::new(JobKind::Compact), &sight);
                assert_eq!(reclaimer.due(), None, "one at a time");
            }
            begins
        };
        begin(&mut reclaimer, 1, sight(1, 7));
        assert!(begin(&mut reclaimer, 2, sight(1, 7)));
        let stopped = Shortened { stopped: Some(Stop::Requests), ..Shortened::default() };
        assert!(reclaimer.ended(&Ok(stopped), at(3, start)).is_empty());
        assert!(!begin(&mut reclaimer, 4, sight(2, 7)), "requests have stopped it");
        assert!(begin(&mut reclaimer, 5, sight(2, 7)), "it is idle again");
        reclaimer.ended(&Ok(Shortened::default()), at(6, start));
        assert!(!begin(&mut reclaimer, 7, sight(2, 7)), "there is nothing to be won");
        assert!(!begin(&mut reclaimer, 8, sight(3, 8)));
        assert!(begin(&mut reclaimer, 9, sight(3, 8)), "a block was freed");
        let failed = Err(Error::new(Kind::NoSpace, "no room"));
        reclaimer.ended(&failed, at(10, start));
        assert!(!begin(&mut reclaimer, 11, sight(3, 8)), "it would fail again");
    }
}
