//! What goes over the port of one front, counted, and shown to the probes that may be attached.
//!
//! The loop that hosts a front counts, on its own thread; nothing is measured for a hit. How long an ask
//! waits is measured by the loop, since neither a front nor the engine looks at a clock.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::front::{Op, Request};
use super::message::Ask;
use super::port::{FileIo, FileOp, errno};
use super::{Outcome, probes};
use crate::chain::MAX_DEPTH;
use crate::disk::tally::{Histogram, Tally, Times};

/// What a tag may wait for, by the names that reports use.
const REASONS: [&str; 5] = ["session", "space", "unmap", "zero", "flush"];

/// What probes show as the epoch of a front's sync, which ends none.
const OF_A_FRONT: u64 = 0;

/// What an ask waits for, of those that reports name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reason(usize);

impl Reason {
    /// The reason of `ask`.
    pub fn of(ask: Ask) -> Self {
        Self(match ask {
            Ask::OpenSession => 0,
            Ask::Allocate { .. } => 1,
            Ask::Unmap { .. } => 2,
            Ask::ZeroAbsent { .. } => 3,
            Ask::Flush | Ask::Fence => 4,
        })
    }
}

/// See the module's head.
#[derive(Debug)]
pub struct PortCounts {
    requests: Requests<Tally>,
    /// Bytes read, by the layer's place above the lowest one, which no snapshot changes.
    read: Box<[Tally]>,
    zero_filled: Tally,
    written: Tally,
    zeroed: Tally,
    retries: Tally,
    late_registrations: Tally,
    wakes: Tally,
    syncs: Histogram,
    asks: [Tally; REASONS.len()],
    waits: [Histogram; REASONS.len()],
    short_of_room: Tally,
    /// Seconds since 1970.
    short_since: Tally,
}

impl Default for PortCounts {
    /// Nothing yet.
    fn default() -> Self {
        Self {
            requests: Requests::default(),
            read: (0..MAX_DEPTH).map(|_| Tally::default()).collect(),
            zero_filled: Tally::default(),
            written: Tally::default(),
            zeroed: Tally::default(),
            retries: Tally::default(),
            late_registrations: Tally::default(),
            wakes: Tally::default(),
            syncs: Histogram::default(),
            asks: Default::default(),
            waits: Default::default(),
            short_of_room: Tally::default(),
            short_since: Tally::default(),
        }
    }
}

impl PortCounts {
    /// A request has come.
    #[inline]
    pub fn begins(&self, tag: u16, request: Request) {
        let requests = &self.requests;
        let (kind, count) = match request.op {
            Op::Read => (0, &requests.read),
            Op::Write { durable: false } => (1, &requests.write),
            Op::Write { durable: true } => (2, &requests.durable_write),
            Op::Flush => (3, &requests.flush),
            Op::Discard => (4, &requests.discard),
            Op::WriteZeroes { .. } => (5, &requests.write_zeroes),
        };
        probes::request_start(tag, kind, request.offset, request.length);
        count.add(1);
    }

    /// A request ends.
    #[inline]
    pub fn ends(&self, tag: u16, result: Outcome<u32>) {
        probes::request_end(tag, result);
        if result.is_err() {
            self.requests.failed.add(1);
        }
    }

    /// File I/O is submitted, on a chain of so many `layers`.
    #[inline]
    pub fn submits(&self, io: FileIo, layers: usize) {
        let bytes = match io.op {
            FileOp::Read => &self.read[layers - 1 - usize::from(io.layer)],
            FileOp::FillZero => &self.zero_filled,
            FileOp::Write { .. } => &self.written,
            FileOp::WriteZeros | FileOp::ZeroRange | FileOp::PunchHole => &self.zeroed,
            FileOp::Sync => return,
        };
        bytes.add(u64::from(io.length));
    }

    /// File I/O that is about to be submitted is the rest of a piece, or all of it, again.
    pub fn submits_again(&self) {
        self.retries.add(1);
    }

    /// The kernel has not registered the pages of a request by itself.
    pub fn registers_late(&self) {
        self.late_registrations.add(1);
    }

    /// The thread of the queue has woken the engine's, or was woken by it.
    pub fn wakes(&self) {
        self.wakes.add(1);
    }

    /// The front syncs for a flush.
    pub fn sync_starts(&self) {
        probes::sync_start(OF_A_FRONT);
    }

    /// The sync has ended after so long, with 0 or a negative `errno`.
    pub fn sync_ends(&self, result: i32, took: Duration) {
        probes::sync_end(OF_A_FRONT, if result < 0 { Err(errno(-result)) } else { Ok(()) });
        self.syncs.record(took);
    }

    /// How long the front's syncs have taken.
    pub fn syncs(&self) -> Times {
        self.syncs.times()
    }

    /// The engine is asked.
    pub fn asks(&self, tag: u16, reason: Reason) {
        probes::ask_start(tag, reason.0);
        self.asks[reason.0].add(1);
    }

    /// The engine has answered after so long.
    pub fn answered(&self, tag: u16, reason: Reason, waited: Duration) {
        probes::ask_end(tag, reason.0);
        self.waits[reason.0].record(waited);
    }

    /// So many requests wait for room, `now`, in seconds since 1970.
    pub fn short_of_room(&self, requests: u64, now: u64) {
        if self.short_of_room.get() == 0 {
            self.short_since.set(now);
        }
        self.short_of_room.set(requests);
    }

    /// The requests that wait for room, if any do.
    pub fn shortage(&self) -> Option<Shortage> {
        let (requests, since) = (self.short_of_room.get(), self.short_since.get());
        (requests > 0).then_some(Shortage { requests, since })
    }

    /// What has been counted, on a chain of so many `layers`.
    pub fn traffic(&self, layers: usize) -> Traffic {
        let wait = |(place, reason): (usize, &str)| {
            // First: what is answered was asked before.
            let times = self.waits[place].times();
            let waiting = self.asks[place].get().saturating_sub(times.count);
            Wait { reason: reason.into(), waiting, times }
        };
        Traffic {
            requests: self.requests.zip(&self.requests, |count, _| count.get()),
            read_bytes: self.read[..layers.min(MAX_DEPTH)].iter().rev().map(Tally::get).collect(),
            zero_filled_bytes: self.zero_filled.get(),
            written_bytes: self.written.get(),
            zeroed_bytes: self.zeroed.get(),
            retries: self.retries.get(),
            late_registrations: self.late_registrations.get(),
            wakes: self.wakes.get(),
            waits: REASONS.iter().enumerate().map(|(place, reason)| wait((place, reason))).collect(),
        }
    }
}

/// Requests that wait until the host has room for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Shortage {
    /// How many there are.
    pub requests: u64,
    /// Since when some have waited without a break, seconds since 1970.
    pub since: u64,
}

impl Shortage {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self { requests: self.requests.saturating_add(other.requests), since: self.since.min(other.since) }
    }
}

/// Requests by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(bound = "T: JsonSchema + Serialize + Default")]
pub struct Requests<T = u64> {
    /// Reads.
    pub read: T,
    /// Ordinary writes.
    pub write: T,
    /// Writes with FUA.
    pub durable_write: T,
    /// Flushes.
    pub flush: T,
    /// Discards.
    pub discard: T,
    /// Requests for zeros.
    pub write_zeroes: T,
    /// Those of any kind that have failed.
    pub failed: T,
}

impl<T> Requests<T> {
    /// `join` of each number and its twin.
    fn zip<U, V>(&self, other: &Requests<U>, join: impl Fn(&T, &U) -> V) -> Requests<V> {
        Requests {
            read: join(&self.read, &other.read),
            write: join(&self.write, &other.write),
            durable_write: join(&self.durable_write, &other.durable_write),
            flush: join(&self.flush, &other.flush),
            discard: join(&self.discard, &other.discard),
            write_zeroes: join(&self.write_zeroes, &other.write_zeroes),
            failed: join(&self.failed, &other.failed),
        }
    }
}

impl Requests {
    /// Both together.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        self.zip(other, |mine, theirs| mine.saturating_add(*theirs))
    }

    /// What was counted since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        self.zip(before, |now, then| now.saturating_sub(*then))
    }
}

/// What has gone over one port, or several together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Traffic {
    /// Requests.
    pub requests: Requests,
    /// Bytes read from each layer's file, the leaf first.
    pub read_bytes: Vec<u64>,
    /// Bytes of reads that no file has: zeros.
    pub zero_filled_bytes: u64,
    /// Bytes written to the image.
    pub written_bytes: u64,
    /// Bytes of the image that were made to read as zero, by writing or by `fallocate`.
    pub zeroed_bytes: u64,
    /// Pieces of file I/O that were submitted again: the host had not begun them, had cut them short, or
    /// knew another way only.
    pub retries: u64,
    /// With zero copy: requests whose pages had to be registered by a command of their own.
    pub late_registrations: u64,
    /// How often a queue's thread has woken the engine's, or was woken by it.
    pub wakes: u64,
    /// What requests have waited for.
    pub waits: Vec<Wait>,
}

/// Waits for the engine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Wait {
    /// What for.
    #[serde(rename = "for")]
    pub reason: String,
    /// Requests that wait now.
    pub waiting: u64,
    /// How long the others have waited.
    #[serde(flatten)]
    pub times: Times,
}

impl Traffic {
    /// Adds what has gone over another port of the same device.
    pub fn add(&mut self, other: &Self) {
        self.requests = self.requests.plus(&other.requests);
        self.read_bytes.resize(self.read_bytes.len().max(other.read_bytes.len()), 0);
        for (mine, theirs) in self.read_bytes.iter_mut().zip(&other.read_bytes) {
            *mine = mine.saturating_add(*theirs);
        }
        for (mine, theirs) in [
            (&mut self.zero_filled_bytes, other.zero_filled_bytes),
            (&mut self.written_bytes, other.written_bytes),
            (&mut self.zeroed_bytes, other.zeroed_bytes),
            (&mut self.retries, other.retries),
            (&mut self.late_registrations, other.late_registrations),
            (&mut self.wakes, other.wakes),
        ] {
            *mine = mine.saturating_add(theirs);
        }
        if self.waits.is_empty() {
            self.waits.clone_from(&other.waits);
            return;
        }
        for (mine, theirs) in self.waits.iter_mut().zip(&other.waits) {
            mine.waiting = mine.waiting.saturating_add(theirs.waiting);
            mine.times.add(&theirs.times);
        }
    }

    /// Bytes read from all layers.
    pub fn read_in_all(&self) -> u64 {
        self.read_bytes.iter().fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;
    use crate::engine::shared::LEAF;

    fn io(op: FileOp, layer: u8, length: u32) -> FileIo {
        FileIo { op, layer, file_offset: 0, buffer_offset: 0, length }
    }

    #[test]
    fn bytes_stay_with_their_image_when_a_snapshot_puts_another_on_top() {
        let counts = PortCounts::default();
        counts.submits(io(FileOp::Read, LEAF, 4096), 1);
        counts.submits(io(FileOp::Read, 1, 512), 2);
        counts.submits(io(FileOp::Read, LEAF, 1024), 2);
        assert_eq!(counts.traffic(2).read_bytes, [1024, 4096 + 512]);
        assert_eq!(counts.traffic(2).read_in_all(), 4096 + 512 + 1024);
    }

    #[test]
    fn kinds_are_counted_apart_and_queues_add_up() {
        let counts = PortCounts::default();
        for op in [Op::Read, Op::Write { durable: true }, Op::Flush, Op::WriteZeroes { keep_space: true }] {
            counts.begins(0, Request { op, offset: 0, length: 4096 });
        }
        counts.ends(0, Ok(4096));
        counts.ends(0, Err(Errno::EIO));
        counts.submits(io(FileOp::Write { durable: true }, LEAF, 4096), 1);
        counts.submits(io(FileOp::PunchHole, LEAF, 1 << 20), 1);
        counts.submits(io(FileOp::FillZero, LEAF, 512), 1);
        let traffic = counts.traffic(1);
        let expected = Requests {
            read: 1,
            durable_write: 1,
            flush: 1,
            write_zeroes: 1,
            failed: 1,
            ..Requests::default()
        };
        assert_eq!(traffic.requests, expected);
        assert_eq!(
            (traffic.written_bytes, traffic.zeroed_bytes, traffic.zero_filled_bytes),
            (4096, 1 << 20, 512)
        );
        let mut both = Traffic::default();
        both.add(&traffic);
        both.add(&traffic);
        assert_eq!((both.requests.read, both.written_bytes, both.read_bytes.len()), (2, 8192, 1));
        assert_eq!(both.requests.since(&traffic.requests), traffic.requests);
    }

    #[test]
    fn a_shortage_lasts_as_long_as_any_request_waits() {
        let (counts, others) = (PortCounts::default(), PortCounts::default());
        assert_eq!(counts.shortage(), None);
        for (requests, now) in [(2, 100), (1, 200), (3, 300)] {
            counts.short_of_room(requests, now);
        }
        others.short_of_room(1, 150);
        let (one, other) = (counts.shortage().expect("three"), others.shortage().expect("one"));
        assert_eq!(
            (one, other.plus(one)),
            (Shortage { requests: 3, since: 100 }, Shortage { requests: 4, since: 100 })
        );
        counts.short_of_room(0, 400);
        assert_eq!(counts.shortage(), None);
        counts.short_of_room(1, 500);
        assert_eq!(counts.shortage(), Some(Shortage { requests: 1, since: 500 }));
    }

    #[test]
    fn a_wait_is_counted_by_its_reason_and_shown_while_it_lasts() {
        let counts = PortCounts::default();
        let (space, flush) = (Reason::of(Ask::Allocate { first: 0, count: 1 }), Reason::of(Ask::Flush));
        for reason in [space, space, flush] {
            counts.asks(0, reason);
        }
        counts.answered(0, space, Duration::from_millis(1));
        let waits = counts.traffic(1).waits;
        let shown = |name: &str| {
            let wait = waits.iter().find(|wait| wait.reason == name).expect("listed");
            (wait.waiting, wait.times.count, wait.times.sum_us)
        };
        assert_eq!((shown("space"), shown("flush"), shown("unmap")), ((1, 1, 1000), (1, 0, 0), (0, 0, 0)));
    }
}
