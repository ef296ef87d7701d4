//! Where log entries go: the ring's arithmetic, no I/O.
//!
//! A *round* is what one sync makes durable: some entries, one after the other, all carrying the same Tail.
//!
//! * An entry never wraps: it ends at the ring's end at the latest, and a single sector left there is filled
//!   with an empty entry. (Readers must accept wrapped entries; some do not.)
//! * A round's Tail is the start of the oldest round whose pages are not known to be durable in place. The
//!   space before that Tail is free as soon as the round's own sync has completed, and not earlier: until
//!   then a torn entry in it would leave the newest surviving entry with a Tail that points at ruins.
//! * A round takes at most a third of the ring less two spare sectors. With one round unapplied at most when
//!   the next is synced, the ring never runs full and no sync is spent on moving the Tail.

use std::collections::VecDeque;

use uuid::Uuid;

use crate::format::log::{MAX_DESCRIPTORS_WRITTEN, SECTOR, max_descriptors_written};

/// Always free: an empty entry that moves the Tail fits, and head never meets tail.
const SPARE_SECTORS: u64 = 2;

/// The log of an open session.
#[derive(Debug)]
pub struct Ring {
    /// The LogGuid of this session.
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
    tail: u64,
    applied: bool,
}

/// Where one entry goes and how many pages it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Byte offset inside the log.
    pub position: u64,
    /// Number of data pages, at most 126; 0 for a filler.
    pub pages: usize,
    /// The entry's sequence number.
    pub sequence: u64,
}

impl Ring {
    /// The ring right after its initial empty entry, at position 0 with sequence number 1, was synced.
    pub fn after_initial_entry(guid: Uuid, offset: u64, length: u64) -> Self {
        let sector = SECTOR as u64;
        assert!(length >= 8 * sector && length.is_multiple_of(sector), "a log of {length} bytes");
        let live = VecDeque::from([Round { id: 0, start: 0, tail: 0, applied: true }]);
        Self { guid, offset, length, head: sector, next_sequence: 2, stable_tail: 0, live, next_round: 1 }
    }

    /// The Tail of the round about to be placed.
    pub fn tail(&self) -> u64 {
        self.live.front().map_or(self.head, |round| round.start)
    }

    /// Places a round of `pages` pages, at most [`round_pages`]; returns its entries in ring order. The round
    /// before it is durable.
    pub fn place_round(&mut self, pages: usize) -> Vec<Placement> {
        assert!((1..=round_pages(self.length)).contains(&pages), "{pages} pages are no round");
        assert!(self.live.len() <= 1, "one round at most is not durable in place when the next is placed");
        let (start, tail) = (self.head, self.tail());
        let mut left = pages;
        let mut sectors_used = (start + self.length - self.stable_tail) % self.length / SECTOR as u64;
        let mut placements = Vec::new();
        while left > 0 {
            let to_end = usize::try_from((self.length - self.head) / SECTOR as u64).expect("at most 2^18");
            let count = if to_end == 1 { 0 } else { left.min(to_end - 1).min(max_descriptors_written()) };
            placements.push(Placement { position: self.head, pages: count, sequence: self.next_sequence });
            let sectors = 1 + count as u64;
            self.next_sequence = self.next_sequence.checked_add(1).expect("2^64 entries outlast the disk");
            self.head = (self.head + sectors * SECTOR as u64) % self.length;
            sectors_used += sectors;
            left -= count;
        }
        let free = (self.length / SECTOR as u64).checked_sub(sectors_used);
        assert!(free.is_some_and(|free| free >= SPARE_SECTORS), "a round overwrote live log space");
        self.live.push_back(Round { id: self.next_round, start, tail, applied: false });
        self.next_round += 1;
        placements
    }

    /// The newest round and with it its Tail are durable.
    pub fn round_synced(&mut self) {
        self.stable_tail = self.live.back().expect("a round was placed").tail;
    }

    /// The newest synced round has been written in place, not yet synced there.
    pub fn round_applied(&mut self) {
        let round = self.live.iter_mut().find(|round| !round.applied).expect("a round was placed");
        round.applied = true;
    }

    /// The newest round that is in place now, all older ones included; a sync issued now settles until there.
    pub fn newest_applied(&self) -> Option<u64> {
        self.live.iter().take_while(|round| round.applied).last().map(|round| round.id)
    }

    /// A sync issued after round `newest` was applied has completed.
    pub fn settle(&mut self, newest: u64) {
        while self.live.front().is_some_and(|round| round.id <= newest) {
            let round = self.live.pop_front().expect("just seen");
            assert!(round.applied, "only applied rounds settle");
        }
    }
}

/// The most pages one round takes in a log of `length` bytes: a third of what is not spare, less the sectors
/// that headers and a filler at the ring's end can take.
pub fn round_pages(length: u64) -> usize {
    let sectors =
        usize::try_from((length / SECTOR as u64 - SPARE_SECTORS) / 3).expect("at most 2^18 sectors");
    let headers = sectors.div_ceil(MAX_DESCRIPTORS_WRITTEN + 1) + 2;
    sectors - headers
}

/// Dirty pages at which a cycle starts by itself: a quarter of the log.
pub fn cycle_threshold(log_length: u64) -> usize {
    usize::try_from(log_length / SECTOR as u64 / 4).expect("a log has at most 2^18 sectors")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the rounds' sizes, no round overwrites what the newest synced entry still needs (the ring
    /// asserts it), every entry ends inside the ring, and sequence numbers have no gap.
    #[test]
    fn rounds_of_any_size_never_run_over_live_log_space() {
        for length in [1_u64 << 20, 3 << 20, 32 << 20] {
            let mut ring = Ring::after_initial_entry(Uuid::from_u128(1), 1 << 20, length);
            let mut sequence = 2;
            for step in 0_usize..20_000 {
                let pages =
                    if step % 3 == 0 { round_pages(length) } else { 1 + step * 7919 % round_pages(length) };
                let placements = ring.place_round(pages);
                assert_eq!(placements.iter().map(|placement| placement.pages).sum::<usize>(), pages);
                for placement in placements {
                    assert_eq!(placement.sequence, sequence);
                    sequence += 1;
                    let end = placement.position + (1 + placement.pages as u64) * 4096;
                    assert!(end <= length, "{placement:?} wraps");
                }
                let settled = ring.newest_applied();
                ring.round_synced();
                if let Some(round) = settled {
                    ring.settle(round);
                }
                ring.round_applied();
            }
        }
    }

    /// A round placed before the one before it is durable would need a fourth part of the ring.
    #[test]
    #[should_panic(expected = "one round at most")]
    fn a_round_is_not_placed_before_the_last_one_is_settled() {
        let mut ring = Ring::after_initial_entry(Uuid::from_u128(1), 1 << 20, 1 << 20);
        ring.place_round(80);
        ring.place_round(80);
    }

    #[test]
    fn a_round_takes_about_a_third_of_the_log() {
        assert_eq!(round_pages(1 << 20), 81);
        assert_eq!(round_pages(1 << 30), 86_689);
    }
}
