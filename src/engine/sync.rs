//! The one place that syncs the image file, and what a completed sync proves.

use std::rc::Rc;

use super::log::LogSpace;
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

    /// Whether an entry must not be written yet: payload that it relies on, or the length of the file that holds the
    /// space it names, is covered by no completed sync. (Replay restores a lost length; QEMU's does not.)
    pub(super) fn unsynced_payload(&self) -> bool {
        let payload = self.payloads_synced.get() < self.payloads.get();
        let grown = self.stable_length.get() < self.space.borrow().used_end().min(self.file_length.get());
        payload && !planted(Plant::SkipRecyclingSync) || grown && !planted(Plant::SkipGrowthSync)
    }
}
