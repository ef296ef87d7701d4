//! Writing pages in their places once the log has them.
//!
//! The log makes them durable, so their places can wait: a page that changes between any two flushes would
//! otherwise be written twice for each of them. They are written when half of the log is theirs, or 1 MiB of
//! it, and before the log starts again or ends. Of a page that several rounds have, the newest copy is
//! written.
//!
//! One batch at a time is on its way: of two, the older copy of a page could come last. It is written in the
//! background; the next sync that is issued once it is in place confirms it.
//!
//! A host that has no room for a page in its place fails no flush, since the log has the page. The pages wait
//! for the next batch, and only a log that has no room left fails what waits for it.

use std::rc::Rc;

use super::round::PageCopy;
use super::{Engine, Outcome};
use crate::disk::{Buffer, Disk, PAGE_BYTES};
use crate::simulation::{Plant, planted};

/// Pages on the way to their places.
pub(super) struct Batch {
    /// In order, each once.
    pub(super) pages: Vec<PageCopy>,
    /// The newest round that is in place with them, and all older ones.
    pub(super) newest: u64,
}

impl<D: Disk + 'static> Engine<D> {
    /// Starts a batch if enough of the log waits for one, and none is under way.
    pub(super) fn apply_if_due(self: &Rc<Self>) {
        if self.journal.active(|log| log.is_apply_due()) && !self.journal.is_applying() {
            self.start_applying();
        }
    }

    /// Waits until everything that the log has is in place. What the host refused is tried again, once.
    pub(super) async fn await_applied(self: &Rc<Self>) -> Outcome {
        // What failed has been put back.
        let _ = self.journal.applied().await;
        if self.journal.has_unapplied() {
            self.start_applying();
        }
        self.journal.applied().await
    }

    fn start_applying(self: &Rc<Self>) {
        let (batch, done) = self.journal.begin_applying();
        self.start(|engine| async move { done.keep(engine.apply(batch).await) });
    }

    async fn apply(self: &Rc<Self>, batch: Batch) -> Outcome {
        if let Err(errno) = self.write_in_place(&batch.pages).await
            && !planted(Plant::ForgetRefusedBatch)
        {
            self.journal.put_back(batch);
            return Err(errno);
        }
        self.journal.active(|log| log.applied(batch.newest));
        if planted(Plant::TailBeforeSync) {
            self.journal.confirm_applied(self.journal.newest_applied());
        }
        Ok(())
    }

    /// Writes copies in place, neighbouring pages together.
    async fn write_in_place(self: &Rc<Self>, pages: &[PageCopy]) -> Outcome {
        let follows = |a: &PageCopy, b: &PageCopy| {
            self.page_place(a.page) + PAGE_BYTES as u64 == self.page_place(b.page)
        };
        for run in pages.chunk_by(follows) {
            let mut bytes = Buffer::zeroed(run.len() * PAGE_BYTES);
            for (target, copy) in bytes.chunks_exact_mut(PAGE_BYTES).zip(run) {
                target.copy_from_slice(&*copy.bytes);
            }
            self.check_poison()?;
            self.write_metadata("writing metadata", self.page_place(run[0].page), bytes).await?;
        }
        Ok(())
    }
}
