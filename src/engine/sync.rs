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
        let recycled = self.recycled_grants.get();
        self.count(|counters| counters.syncs += 1);
        if let Err(error) = self.disk.sync().await {
            return Err(self.poison("syncing the image", &error));
        }
        self.check_poison()?;
        self.stable_length.update(|stable| stable.max(length));
        self.recycled_synced.update(|synced| synced.max(recycled));
        for extent in settling {
            self.space.borrow_mut().free(extent, true);
        }
        if let (Some(log), Some(round)) = (&mut *self.log.borrow_mut(), applied) {
            log.settle(round);
        }
        Ok(())
    }

    /// Whether space was granted that an entry must not name yet: its zeros, or the length of the file that holds
    /// it, are covered by no completed sync. (Replay restores a lost length; QEMU's does not.)
    pub(super) fn unsynced_space(&self) -> bool {
        let recycled = self.recycled_synced.get() < self.recycled_grants.get();
        let grown = self.stable_length.get() < self.space.borrow().used_end().min(self.file_length.get());
        let recycled = recycled && !planted(Plant::SkipRecyclingSync);
        recycled || grown && !planted(Plant::SkipGrowthSync)
    }
}
