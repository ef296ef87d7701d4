//! The one place that syncs the image file, and what a completed sync proves.
//!
//! A front's durable write is a sync of its own, and its failure may be all that the host tells of a device that has
//! lost its cache: a sync right behind it succeeds. The failure may have been posted and not been seen by its thread
//! yet. So a sync proves nothing before every durable write that was in flight at its end has been seen to end.

use std::rc::Rc;

use super::log::LogSpace;
use super::message::ToFront;
use super::{Engine, Outcome};
use crate::disk::Disk;
use crate::simulation::{Plant, planted};

impl<D: Disk + 'static> Engine<D> {
    /// Makes everything that has completed so far durable. A failure poisons: a sync is never retried, since
    /// the host may have dropped what it could not write.
    pub(super) async fn sync(self: &Rc<Self>) -> Outcome {
        self.check_poison()?;
        let length = self.file_length.get();
        let settling = std::mem::take(&mut *self.settling.borrow_mut());
        let applied = self.log.borrow().as_ref().and_then(LogSpace::newest_applied);
        let payloads = self.payloads.get();
        self.count(|counters| counters.syncs += 1);
        if let Err(error) = self.disk.sync().await {
            return Err(self.poison("syncing the image", &error));
        }
        self.await_durable_writes().await;
        self.check_poison()?;
        self.stable_length.update(|stable| stable.max(length));
        self.payloads_synced.update(|synced| synced.max(payloads));
        for extent in settling {
            self.space.borrow_mut().free(extent, true);
        }
        if let (Some(log), Some(round)) = (&mut *self.log.borrow_mut(), applied) {
            log.settle(round);
        }
        Ok(())
    }

    /// Waits until the end has been seen of every durable write that is in flight now. There is none, as a rule, and
    /// then nobody is asked.
    async fn await_durable_writes(self: &Rc<Self>) {
        if self.shared.durable_writes() == 0 || planted(Plant::UnseenFailure) {
            return;
        }
        let turn = self.fence_turn.enter().await;
        let fronts = self.fronts.count();
        self.fences_owed.set(fronts);
        (0..fronts).for_each(|front| self.fronts.send(front, ToFront::Fence));
        while self.fences_owed.get() > 0 {
            self.fenced_bell.wait().await;
        }
        drop(turn);
    }

    /// A front has seen the end of the durable writes that it was asked about.
    pub(super) fn fence_answered(&self) {
        let owed = self.fences_owed.get().checked_sub(1).expect("no front answers unasked");
        self.fences_owed.set(owed);
        if owed == 0 {
            self.fenced_bell.ring();
        }
    }

    /// Whether an entry must not be written yet: payload that it relies on, or the length of the file that holds the
    /// space it names, is covered by no completed sync. (Replay restores a lost length; QEMU's does not.)
    pub(super) fn unsynced_payload(&self) -> bool {
        let payload = self.payloads_synced.get() < self.payloads.get();
        let grown = self.stable_length.get() < self.space.borrow().used_end().min(self.file_length.get());
        payload && !planted(Plant::SkipRecyclingSync) || grown && !planted(Plant::SkipGrowthSync)
    }
}
