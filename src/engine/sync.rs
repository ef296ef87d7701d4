//! The one place that syncs the image file.
//!
//! A front's durable write is a sync of its own, and its failure may be the only sign of a device that has
//! lost its cache: a sync right behind it succeeds. That failure may have been posted, and its thread may not
//! have seen it yet. So a sync proves nothing before the end of every durable write that was in flight at its
//! end has been seen.

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
        probes::sync_start(issued.epoch());
        let synced = self.disk.sync().await;
        probes::sync_end(issued.epoch(), synced.as_ref().copied().map_err(errno));
        if let Err(error) = synced {
            return Err(self.poison("syncing the image", &error));
        }
        self.await_durable_writes().await;
        self.check_poison()?;
        for extent in self.durability.completed(issued) {
            self.space.borrow_mut().free(extent, Content::KnownZero);
        }
        self.journal.confirm_applied(applied);
        Ok(())
    }

    /// Waits until the end of every durable write that is in flight now has been seen. As a rule there is
    /// none, and no front is asked.
    async fn await_durable_writes(self: &Rc<Self>) {
        if self.shared.durable_writes() > 0 && !planted(Plant::UnseenFailure) {
            self.fences.pass(&*self.fronts).await;
        }
    }
}
