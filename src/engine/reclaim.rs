//! Bringing the space that blocks have lost back to the free map.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::message::ToFront;
use super::quarantine::Quarantine;
use super::waiting::{Bell, Turnstile};
use super::{Engine, Outcome, probes};
use crate::disk::Disk;
use crate::image::{Content, Extent};

/// Space that blocks have lost, and the work of giving it back.
#[derive(Default)]
pub(super) struct Reclaim {
    quarantine: RefCell<Quarantine>,
    /// Releases in progress: what they took out of quarantine is not free yet.
    releasing: Cell<usize>,
    progress: Bell,
    /// Rung when all fronts have answered a barrier.
    fenced: Bell,
    turn: Turnstile,
    /// Rung when there is space that no cycle has taken up.
    lost: Rc<Bell>,
    /// A cycle is to take it up, whether a task waits for one or not.
    is_due: Cell<bool>,
}

impl Reclaim {
    /// A block has just lost `extent`.
    pub(super) fn lost(&self, extent: Extent) {
        self.quarantine.borrow_mut().add(extent);
        self.lost.ring();
    }

    /// Whether a cycle is due for the space that blocks have lost.
    pub(super) fn is_due(&self) -> bool {
        self.is_due.get()
    }

    /// A commit cycle closes its set. The batch whose unmappings it logs, if there is one.
    pub(super) fn close_batch(&self) -> Option<u64> {
        self.is_due.set(false);
        self.quarantine.borrow_mut().close_batch()
    }

    /// The cycle has ended; `durable` if it has succeeded. Whether there may be something to release.
    pub(super) fn end_batch(&self, batch: Option<u64>, durable: bool) -> bool {
        match batch {
            Some(batch) if durable => self.quarantine.borrow_mut().batch_durable(batch),
            Some(batch) => {
                self.quarantine.borrow_mut().reopen_batch(batch);
                self.lost.ring();
            }
            None => {}
        }
        if !durable {
            // A task that waits for the batch would wait for ever: it looks again, and finds why.
            self.progress.ring();
        }
        durable && batch.is_some()
    }

    /// Space in quarantine, bytes.
    pub(super) fn quarantined_bytes(&self) -> u64 {
        self.quarantine.borrow().bytes()
    }

    /// A front has answered the barrier.
    pub(super) fn barrier_answered(&self) {
        self.quarantine.borrow_mut().barrier_answered();
        self.fenced.ring();
    }

    /// Whether a barrier is to be sent to each of `fronts` fronts.
    #[must_use]
    fn start_barrier(&self, fronts: usize) -> bool {
        self.quarantine.borrow_mut().start_barrier(fronts)
    }

    /// Takes out what may be used again; [`Self::released`] follows when it is free.
    #[must_use]
    fn begin_release(&self) -> Vec<Extent> {
        self.releasing.update(|count| count + 1);
        self.quarantine.borrow_mut().release()
    }

    fn released(&self) {
        let others = self.releasing.get().checked_sub(1).expect("a release that ends has begun");
        self.releasing.set(others);
        self.progress.ring();
    }

    /// Whether all of the batches up to `newest` are back in the free map.
    fn is_free(&self, newest: Option<u64>) -> bool {
        let held = newest.is_some_and(|newest| self.quarantine.borrow().holds_batch_until(newest));
        !held && self.releasing.get() == 0
    }
}

impl<D: Disk + 'static> Engine<D> {
    /// Sends a barrier if a batch waits for one and none is outstanding.
    pub(super) fn send_barrier(self: &Rc<Self>) {
        let fronts = self.fronts.count();
        if self.reclaim.start_barrier(fronts) {
            probes::barrier_start(fronts);
            self.count(|counters| counters.barriers.add(1));
            (0..fronts).for_each(|front| self.fronts.send(front, ToFront::Barrier));
        }
    }

    /// Takes out of quarantine what may leave it: punched at once, which gives the host its space back, and
    /// known zero after the next sync.
    pub(super) async fn release_quarantine(self: &Rc<Self>) {
        self.send_barrier();
        for extent in self.reclaim.begin_release() {
            self.count(|counters| counters.released.add(1));
            self.give_back(extent).await;
        }
        self.reclaim.released();
        self.note_levels();
    }

    /// Punches space that belongs to nothing and is not free yet, and frees it.
    pub(super) async fn give_back(self: &Rc<Self>, extent: Extent) {
        let in_use = self.space.borrow().is_used(extent.offset..extent.end());
        assert!(in_use, "space is not granted to a block while it is punched");
        let punched = if self.shared.can_punch() {
            self.disk.punch(extent.offset, extent.length).await
        } else {
            Ok(false)
        };
        match punched {
            Ok(true) => {
                self.shared.unlogged.set();
                self.durability.punched(extent);
            }
            Ok(false) => {
                self.shared.forget_punch();
                self.space.borrow_mut().free(extent, Content::Recycled);
            }
            // The space stays what it is: free, with old bytes in it.
            Err(error) => {
                tracing::warn!("giving space back to the host failed: {error}");
                self.space.borrow_mut().free(extent, Content::Recycled);
            }
        }
    }

    /// Waits until every piece that a front has looked up by now has ended. One caller at a time.
    pub(super) async fn await_pieces(self: &Rc<Self>) {
        let fence = self.reclaim.quarantine.borrow_mut().add_fence();
        self.release_quarantine().await;
        while !self.reclaim.quarantine.borrow().is_fenced(fence) {
            self.reclaim.fenced.wait().await;
        }
    }

    /// The bell that rings when blocks have lost space that no commit cycle has taken up: a flush takes it
    /// up, or [`Self::commit_lost_space`].
    pub fn lost_space(&self) -> Rc<Bell> {
        self.reclaim.lost.clone()
    }

    /// Has a commit cycle take up what blocks have lost, if none has by now. A guest that discards need not
    /// flush: its space would stay with the file until something else did.
    pub fn commit_lost_space(&self) {
        if self.reclaim.quarantine.borrow().has_fresh() {
            self.reclaim.is_due.set(true);
            self.commits.ring();
        }
    }

    /// Brings back to the free map everything that is in quarantine now.
    pub(super) async fn reclaim(self: &Rc<Self>) -> Outcome {
        let _turn = self.reclaim.turn.enter().await;
        self.flush().await?;
        let newest = self.reclaim.quarantine.borrow().newest_batch();
        while !self.reclaim.is_free(newest) {
            self.check_poison()?;
            self.reclaim.progress.wait().await;
        }
        self.flush().await
    }
}
