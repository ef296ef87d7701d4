//! The one place where the engine syncs the image file.
//!
//! A front's durable write is a sync of its own, and so is what it does for a flush when nothing has to be
//! logged ([`super::unlogged`]). The failure of one of them may be the only sign of a device that has lost
//! its cache: a sync right behind it succeeds. That failure may have been posted, and its thread may not have
//! seen it yet. So a sync, whoever issued it, proves nothing before the end of every durable write and every
//! other sync that was in flight at its end has been seen.

use std::rc::Rc;

use super::{Engine, Outcome, errno, probes};
use crate::disk::Disk;
use crate::image::Content;
use crate::simulation::{Plant, planted};

impl<D: Disk + 'static> Engine<D> {
    /// Makes everything that has completed so far durable. A failure poisons: a sync is never retried, since
    /// the host may have dropped what it could not write.
    pub(super) async fn sync(self: &Rc<Self>) -> Outcome {
        self.check_poison()?;
        let (issued, applied) = (self.durability.issue(), self.journal.newest_applied());
        self.count(|counters| counters.syncs.add(1));
        self.sync_disk(issued.epoch()).await?;
        self.await_unseen().await;
        self.check_poison()?;
        for extent in self.durability.completed(issued) {
            self.space.borrow_mut().free(extent, Content::KnownZero);
        }
        self.journal.confirm_applied(applied);
        Ok(())
    }

    /// A failure poisons before the end counts as seen.
    async fn sync_disk(self: &Rc<Self>, epoch: u64) -> Outcome {
        self.shared.unseen_begins();
        let parity = self.fences.sync_begins();
        probes::sync_start(epoch);
        let synced = self.disk.sync().await;
        probes::sync_end(epoch, synced.as_ref().copied().map_err(errno));
        let outcome = synced.map_err(|error| self.poison("syncing the image", &error));
        self.fences.sync_ended(parity);
        self.shared.unseen_ended();
        outcome
    }

    /// Waits until the end of every durable write and sync that is in flight now has been seen. As a rule
    /// there is none, and no front is asked.
    pub(super) async fn await_unseen(self: &Rc<Self>) {
        if self.shared.has_unseen() && !planted(Plant::UnseenFailure) {
            self.fences.pass(&*self.fronts).await;
        }
    }
}
