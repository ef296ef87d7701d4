//! Space on its way from a block to the free map.
//!
//! Unmapped space may be used again only when (a) the entry that unmaps it is durable, or a power cut would
//! bring the old mapping back onto another block's data; and (b) every front has answered a barrier sent
//! after the unmapping, or a piece looked up earlier would still read or write there.
//!
//! [Rule 100](crate::design::vhdx_rules#rule-100).

use std::collections::VecDeque;

use super::probes;
use crate::image::Extent;
use crate::simulation::{Plant, planted};

/// What is wrong when a batch has left before a cycle has ended that logs it.
const NOT_DURABLE: &str = "space stays in quarantine until its unmapping is durable";

/// The most bytes that leave as one extent, unless a single block is longer: a host may keep others from the
/// file while it punches one.
const MOST_AT_ONCE: u64 = 64 << 20;

/// The batches and their two conditions; see the module's head.
#[derive(Debug, Default)]
pub struct Quarantine {
    fresh: Vec<Extent>,
    batches: VecDeque<Batch>,
    next_id: u64,
    /// Fronts that still owe an answer to the outstanding barrier.
    owed: usize,
    /// All of the space.
    bytes: u64,
}

#[derive(Debug)]
struct Batch {
    id: u64,
    extents: Vec<Extent>,
    durable: bool,
    fence: Fence,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fence {
    Wanted,
    Sent,
    Answered,
}

impl Quarantine {
    /// A block has just lost `extent`.
    pub fn add(&mut self, extent: Extent) {
        assert!(extent.length > 0, "a block that loses space had some");
        self.fresh.push(extent);
        self.bytes += extent.length;
    }

    /// How much space is here, bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether there is space here whose unmapping no cycle has taken up yet.
    pub fn has_fresh(&self) -> bool {
        !self.fresh.is_empty()
    }

    /// The batch closed last, if any is still here.
    pub fn newest_batch(&self) -> Option<u64> {
        self.batches.back().map(|batch| batch.id)
    }

    /// Whether a batch closed no later than batch `id` is still here.
    pub fn holds_batch_until(&self, id: u64) -> bool {
        self.batches.iter().any(|batch| batch.id <= id)
    }

    /// The commit cycle closes its set: what was added until now becomes the batch whose unmappings it logs.
    pub fn close_batch(&mut self) -> Option<u64> {
        if self.fresh.is_empty() {
            return None;
        }
        let id = self.next_id;
        self.next_id += 1;
        let extents = std::mem::take(&mut self.fresh);
        let durable = planted(Plant::ReuseBeforeDurable);
        self.batches.push_back(Batch { id, extents, durable, fence: Fence::Wanted });
        Some(id)
    }

    /// A batch of nothing, which waits for the next barrier only.
    pub fn add_fence(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.batches.push_back(Batch { id, extents: Vec::new(), durable: true, fence: Fence::Wanted });
        id
    }

    /// Whether every front has answered a barrier that was sent after batch `id` was closed.
    pub fn is_fenced(&self, id: u64) -> bool {
        let batch = self.batches.iter().find(|batch| batch.id == id);
        batch.is_none_or(|batch| batch.fence == Fence::Answered)
    }

    /// The entries that unmap batch `id` were not written: the next cycle logs its unmappings with later
    /// ones.
    pub fn reopen_batch(&mut self, id: u64) {
        let place = self.batches.iter().position(|batch| batch.id == id).expect(NOT_DURABLE);
        let batch = self.batches.remove(place).expect("just found");
        assert!(!batch.durable, "a batch whose unmappings are durable does not come back");
        self.fresh.extend(batch.extents);
    }

    /// The entries that unmap batch `id` are durable.
    pub fn batch_durable(&mut self, id: u64) {
        let batch = self.batches.iter_mut().find(|batch| batch.id == id).expect(NOT_DURABLE);
        batch.durable = true;
    }

    /// Whether a barrier is to be sent to `fronts` fronts now. Every batch that needs one shares it.
    #[must_use]
    pub fn start_barrier(&mut self, fronts: usize) -> bool {
        if self.owed > 0 {
            return false;
        }
        assert!(
            self.batches.iter().all(|batch| batch.fence != Fence::Sent),
            "an answer is owed for a barrier"
        );
        let answered = if fronts == 0 { Fence::Answered } else { Fence::Sent };
        let mut wanted = false;
        for batch in self.batches.iter_mut().filter(|batch| batch.fence == Fence::Wanted) {
            batch.fence = answered;
            wanted = true;
        }
        self.owed = if wanted { fronts } else { 0 };
        wanted && fronts > 0
    }

    /// One front has answered the outstanding barrier.
    pub fn barrier_answered(&mut self) {
        assert!(self.owed > 0, "a front answers a barrier once");
        self.owed -= 1;
        if self.owed == 0 {
            probes::barrier_end();
            for batch in self.batches.iter_mut().filter(|batch| batch.fence == Fence::Sent) {
                batch.fence = Fence::Answered;
            }
        }
    }

    /// Takes out what may be used again, in file order, neighbours together.
    pub fn release(&mut self) -> Vec<Extent> {
        let mut released = Vec::new();
        self.batches.retain_mut(|batch| {
            let fenced = batch.fence == Fence::Answered || planted(Plant::SkipBarrier);
            let leaves = batch.durable && fenced;
            if leaves {
                released.append(&mut batch.extents);
            }
            !leaves
        });
        self.bytes -= released.iter().map(|extent| extent.length).sum::<u64>();
        merge(released)
    }
}

fn merge(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.sort_unstable();
    let mut merged: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents {
        match merged.last_mut() {
            Some(last) if last.end() == extent.offset && last.length + extent.length <= MOST_AT_ONCE => {
                last.length += extent.length;
            }
            last => {
                let end = last.map_or(0, |last| last.end());
                assert!(end <= extent.offset, "space is in quarantine once");
                merged.push(extent);
            }
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Extent = Extent { offset: 4 << 20, length: 1 << 20 };
    const B: Extent = Extent { offset: 5 << 20, length: 1 << 20 };

    #[test]
    fn space_leaves_only_when_durable_and_fenced() {
        let mut quarantine = Quarantine::default();
        quarantine.add(B);
        quarantine.add(A);
        let id = quarantine.close_batch().expect("two extents wait");
        assert!(quarantine.start_barrier(2));
        quarantine.batch_durable(id);
        quarantine.barrier_answered();
        assert!(quarantine.release().is_empty(), "one front has not answered");
        assert_eq!(quarantine.bytes(), 2 << 20);
        quarantine.barrier_answered();
        assert!(quarantine.holds_batch_until(id));
        assert_eq!(quarantine.release(), [Extent { offset: A.offset, length: 2 << 20 }]);
        assert_eq!((quarantine.newest_batch(), quarantine.bytes()), (None, 0));
    }

    #[test]
    fn a_long_run_leaves_in_pieces() {
        let mut quarantine = Quarantine::default();
        (0..150).for_each(|at| quarantine.add(Extent { offset: at << 20, length: 1 << 20 }));
        let id = quarantine.close_batch().expect("they wait");
        quarantine.batch_durable(id);
        assert!(!quarantine.start_barrier(0), "there is no front");
        let lengths: Vec<u64> = quarantine.release().iter().map(|extent| extent.length).collect();
        assert_eq!(lengths, [64 << 20, 64 << 20, 22 << 20]);
    }

    #[test]
    fn a_later_unmapping_waits_for_the_next_barrier() {
        let mut quarantine = Quarantine::default();
        quarantine.add(A);
        let first = quarantine.close_batch().expect("one waits");
        assert!(quarantine.start_barrier(1));
        quarantine.add(B);
        let second = quarantine.close_batch().expect("one waits");
        assert!(!quarantine.start_barrier(1), "one barrier at a time");
        quarantine.batch_durable(first);
        quarantine.batch_durable(second);
        quarantine.barrier_answered();
        assert_eq!(quarantine.release(), [A], "B was unmapped after the barrier went out");
        assert!(quarantine.start_barrier(1));
        quarantine.barrier_answered();
        assert_eq!(quarantine.release(), [B]);
    }
}
