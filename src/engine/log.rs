//! Where log entries go: arithmetic, no I/O.
//!
//! A *round* is what one sync makes durable: some entries, one after the other, all carrying the same Tail.
//!
//! * The log is filled from its start towards its end and never wraps. When a round no longer fits, it starts
//!   again from the beginning under a new LogGuid, once everything in it is durable in place. (Readers must
//!   accept logs that wrap. QEMU reads some of them wrongly, without a word, and never ends with others.)
//! * Its last two sectors stay free: QEMU loses the first entry of a log that is exactly full, and searches
//!   one that is full but for one sector for ever.
//! * A round's Tail is the start of the oldest round whose pages are not known to be durable in place.
//! * A round takes at most a third of the log, so that three of them, and the first entry, fit.
//! * Rounds stay in it until their pages are in place, which is due when they fill half of it, or 1 MiB.
//!
//! [Rules 75 to 84](crate::design::vhdx_rules#rule-75).

use std::collections::VecDeque;

use uuid::Uuid;

use crate::format::log::{SECTOR, max_descriptors_written};

/// Sectors at the end that stay free; see the module's head.
const FREE_SECTORS: u64 = 2;

/// The most of a log that rounds fill before their pages are due in their places, bytes. Those pages are in
/// memory until then, and a power cut has them replayed.
const MOST_WAITING: u64 = 1 << 20;

/// Sectors that no round takes: the initial entry's, and those.
const SPARE_SECTORS: u64 = 1 + FREE_SECTORS;

/// The log of an open session, from its initial entry on.
#[derive(Debug)]
pub struct LogSpace {
    /// The LogGuid.
    pub guid: Uuid,
    /// Where the log lies in the file, bytes.
    pub offset: u64,
    length: u64,
    head: u64,
    next_sequence: u64,
    /// The Tail that the newest *synced* round carries: nothing from here to the head may be overwritten.
    stable_tail: u64,
    /// Rounds whose pages are not known to be durable in place, oldest first.
    live: VecDeque<Round>,
    next_round: u64,
}

#[derive(Debug)]
struct Round {
    id: u64,
    start: u64,
    first_sequence: u64,
    tail: u64,
    synced: bool,
    applied: bool,
}

/// Where one entry goes and how many pages it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Byte offset inside the log.
    pub position: u64,
    /// Number of data pages, 1 to 126.
    pub pages: usize,
    /// The entry's sequence number.
    pub sequence: u64,
}

impl LogSpace {
    /// The log right after its initial empty entry, at position 0 with sequence number 1, was synced.
    pub fn after_initial_entry(guid: Uuid, offset: u64, length: u64) -> Self {
        let sector = SECTOR as u64;
        assert!(length >= 8 * sector && length.is_multiple_of(sector), "a log of {length} bytes");
        let first = Round { id: 0, start: 0, first_sequence: 1, tail: 0, synced: true, applied: true };
        let live = VecDeque::from([first]);
        Self { guid, offset, length, head: sector, next_sequence: 2, stable_tail: 0, live, next_round: 1 }
    }

    /// The Tail of the round about to be placed.
    pub fn tail(&self) -> u64 {
        self.live.front().map_or(self.head, |round| round.start)
    }

    /// How far it is filled, bytes.
    pub fn used_bytes(&self) -> u64 {
        self.head
    }

    /// Whether a round of `pages` pages has room.
    pub fn fits(&self, pages: usize) -> bool {
        let entries = pages.div_ceil(max_descriptors_written());
        let sectors = (pages + entries) as u64 + FREE_SECTORS;
        self.head + sectors * SECTOR as u64 <= self.length
    }

    /// Places a round of `pages` pages, which fits; returns its entries in order. The round before it is
    /// durable.
    pub fn place_round(&mut self, pages: usize) -> Vec<Placement> {
        assert!((1..=round_pages(self.length)).contains(&pages), "{pages} pages are no round");
        assert!(self.fits(pages), "a round of {pages} pages leaves the log");
        assert!(self.live.iter().all(|round| round.synced), "the round before is durable in the log");
        let (start, first_sequence, tail) = (self.head, self.next_sequence, self.tail());
        let mut left = pages;
        let mut placements = Vec::new();
        while left > 0 {
            let pages = left.min(max_descriptors_written());
            placements.push(Placement { position: self.head, pages, sequence: self.next_sequence });
            self.next_sequence = self.next_sequence.checked_add(1).expect("2^64 entries outlast the disk");
            self.head += (1 + pages as u64) * SECTOR as u64;
            left -= pages;
        }
        let id = self.next_round;
        self.live.push_back(Round { id, start, first_sequence, tail, synced: false, applied: false });
        self.next_round += 1;
        self.check();
        placements
    }

    /// The round placed last, of which no sync has made anything durable, is given up. The next round
    /// overwrites what the file has of it: its pages are among that round's, so that one is at least as long.
    pub fn withdraw_round(&mut self) {
        let round = self.live.pop_back().expect("a round was placed");
        assert!(!round.synced && !round.applied, "what is durable in the log is not given up");
        (self.head, self.next_sequence) = (round.start, round.first_sequence);
        self.check();
    }

    /// The newest round and with it its Tail are durable.
    pub fn round_synced(&mut self) {
        let round = self.live.back_mut().expect("a round was placed");
        assert!(!std::mem::replace(&mut round.synced, true), "a round becomes durable once");
        assert!(self.stable_tail <= round.tail, "the Tail goes forward");
        self.stable_tail = round.tail;
        self.check();
    }

    /// The newest round that is durable in the log.
    pub fn newest_synced(&self) -> u64 {
        let synced = self.live.iter().rev().find(|round| round.synced);
        synced.expect("what is to be applied has been synced").id
    }

    /// Whether the rounds that are not in place fill so much of the log that they should get there.
    pub fn is_apply_due(&self) -> bool {
        let oldest = self.live.iter().find(|round| !round.applied);
        oldest.is_some_and(|round| self.head - round.start >= (self.length / 2).min(MOST_WAITING))
    }

    /// The rounds up to `newest` have been written in place, not yet synced there.
    pub fn applied(&mut self, newest: u64) {
        for round in self.live.iter_mut().take_while(|round| round.id <= newest) {
            assert!(round.synced, "pages go in place once their entry is durable");
            round.applied = true;
        }
        self.check();
    }

    /// The newest round that is in place now, all older ones included; a sync issued now confirms them.
    pub fn newest_applied(&self) -> Option<u64> {
        self.live.iter().take_while(|round| round.applied).last().map(|round| round.id)
    }

    /// A sync issued after round `newest` was applied has completed.
    pub fn confirm_applied(&mut self, newest: u64) {
        assert!(newest < self.next_round, "round {newest} was placed");
        while self.live.front().is_some_and(|round| round.id <= newest) {
            let round = self.live.pop_front().expect("just seen");
            assert!(round.applied, "only rounds in place are confirmed");
        }
        self.check();
    }

    /// What holds whenever the log has changed.
    fn check(&self) {
        let sector = SECTOR as u64;
        assert!(self.head.is_multiple_of(sector) && self.head <= self.length - FREE_SECTORS * sector);
        assert!(self.stable_tail <= self.tail() && self.tail() <= self.head, "the Tail lies in the log");
        let mut newer = (self.next_round, self.head, self.next_sequence);
        for round in self.live.iter().rev() {
            assert!(round.id < newer.0 && round.start < newer.1 && round.first_sequence < newer.2);
            assert!(round.tail <= round.start, "a round's Tail is no newer than the round");
            newer = (round.id, round.start, round.first_sequence);
        }
        assert!(self.live.iter().is_sorted_by_key(|round| !round.applied), "older rounds get there first");
    }

    /// Whether the newest synced entry can do without the first sector, where the next log begins: until a
    /// header names that one, a power cut brings this one back.
    pub fn spares_first_sector(&self) -> bool {
        self.stable_tail > 0
    }

    /// Whether everything in the log is durable in place.
    pub fn is_settled(&self) -> bool {
        self.live.is_empty()
    }
}

/// The most pages one round takes in a log of `length` bytes: a third of what is not spare, less the sectors
/// that entries' headers take.
pub fn round_pages(length: u64) -> usize {
    let sectors =
        usize::try_from((length / SECTOR as u64 - SPARE_SECTORS) / 3).expect("at most 2^18 sectors");
    sectors - sectors.div_ceil(max_descriptors_written() + 1)
}

/// Dirty pages at which a cycle starts by itself: a quarter of the log.
pub fn cycle_threshold(log_length: u64) -> usize {
    usize::try_from(log_length / SECTOR as u64 / 4).expect("a log has at most 2^18 sectors")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the rounds' sizes, three fit, entries follow each other without a gap and stay inside the
    /// log, and when no more fit the log may start again.
    #[test]
    fn rounds_of_any_size_follow_each_other_until_the_log_starts_again() {
        for length in [1_u64 << 20, 3 << 20, 32 << 20] {
            let mut step = 0;
            for _lap in 0..50 {
                let mut log = LogSpace::after_initial_entry(Uuid::from_u128(1), 1 << 20, length);
                let (mut sequence, mut position, mut rounds) = (2, 4096, 0);
                loop {
                    step += 1;
                    let pages = if step % 3 == 0 {
                        round_pages(length)
                    } else {
                        1 + step * 7919 % round_pages(length)
                    };
                    if !log.fits(pages) {
                        break;
                    }
                    let placements = log.place_round(pages);
                    assert_eq!(placements.iter().map(|placement| placement.pages).sum::<usize>(), pages);
                    for placement in placements {
                        assert_eq!((placement.sequence, placement.position), (sequence, position));
                        sequence += 1;
                        position += (1 + placement.pages as u64) * 4096;
                        assert!(position + 8192 <= length, "the last sectors stay free");
                    }
                    let settled = log.newest_applied();
                    log.round_synced();
                    if let Some(round) = settled {
                        log.confirm_applied(round);
                    }
                    assert!(!log.is_settled(), "a round is not in place yet");
                    log.applied(log.newest_synced());
                    rounds += 1;
                }
                assert!(rounds >= 3, "{rounds} rounds in a log of {length} bytes");
                assert!(log.spares_first_sector());
                log.confirm_applied(log.newest_applied().expect("the last round is in place"));
                assert!(log.is_settled());
            }
        }
    }

    /// Small rounds wait in the log until they fill half of it.
    #[test]
    fn places_are_due_when_rounds_that_wait_fill_half_of_the_log() {
        let mut log = LogSpace::after_initial_entry(Uuid::from_u128(1), 1 << 20, 1 << 20);
        let place = |log: &mut LogSpace| {
            let newest = log.newest_applied();
            log.place_round(1);
            log.round_synced();
            if let Some(newest) = newest {
                log.confirm_applied(newest);
            }
        };
        for _ in 0..63 {
            place(&mut log);
            assert!(!log.is_apply_due() && !log.is_settled());
        }
        assert_eq!(log.tail(), 4096, "the oldest round that is not in place");
        place(&mut log);
        assert!(log.is_apply_due());
        let newest = log.newest_synced();
        place(&mut log);
        log.applied(newest);
        assert!(!log.is_apply_due(), "one waits");
        place(&mut log);
        assert_eq!(log.tail(), 4096 + 64 * 8192, "a sync has confirmed those in place");
    }

    /// Whoever made the image may have given it a log of a gigabyte.
    #[test]
    fn a_large_log_does_not_wait_for_its_half() {
        let mut log = LogSpace::after_initial_entry(Uuid::from_u128(1), 1 << 20, 1 << 30);
        for pages in [200, 53] {
            assert!(!log.is_apply_due());
            log.place_round(pages);
            log.round_synced();
        }
        assert!(log.is_apply_due(), "253 pages and the headers of their 3 entries are 1 MiB");
    }

    #[test]
    #[should_panic(expected = "the round before is durable")]
    fn a_round_is_not_placed_before_the_last_one_is_durable() {
        let mut log = LogSpace::after_initial_entry(Uuid::from_u128(1), 1 << 20, 1 << 20);
        log.place_round(80);
        log.place_round(80);
    }

    #[test]
    fn a_round_takes_about_a_third_of_the_log() {
        assert_eq!(round_pages(1 << 20), 83);
        assert_eq!(round_pages(1 << 30), 86_691);
    }
}
