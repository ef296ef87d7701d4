//! Closing the image: the file that is left needs no replay and has no unused tail.
//!
//! Order: everything committed and in place → synced → the headers drop the LogGuid → the tail is cut off.

use std::rc::Rc;

use super::local::Promise;
use super::shared::Session;
use super::{Engine, Outcome, errno};
use crate::disk::Disk;

impl<D: Disk + 'static> Engine<D> {
    /// Closes the image. Every ask has been answered and no front will ask again; the fronts still answer
    /// barriers.
    ///
    /// An image that was not modified is left untouched. A poisoned one keeps its LogGuid and its length: the
    /// next open replays what is durable.
    ///
    /// # Errors
    /// A positive `errno` if the image could not be closed clean; its content is safe in the log.
    pub async fn close(self: &Rc<Self>) -> Outcome {
        let modified = self.shared.session() != Session::Idle;
        let mut outcome = self.freeze().await;
        if outcome.is_ok() && modified {
            outcome = self.trim_tail().await;
        }
        self.end().await;
        outcome
    }

    /// Makes the image whole on the medium, as [`Self::close`] does, but for its unused tail, which stays. It may be
    /// gone on with: by [`Self::retire`], or by more asks.
    ///
    /// # Errors
    /// Those of [`Self::close`].
    pub async fn freeze(self: &Rc<Self>) -> Outcome {
        assert_eq!(self.open_tasks.get(), 0, "the fronts have stopped");
        match self.shared.session() {
            Session::Idle => Ok(()),
            Session::Open => self.close_session().await,
            Session::Poisoned => Err(libc::EIO),
        }
    }

    /// Ends the engine of a frozen image that nobody will write any more: cuts its tail off.
    ///
    /// # Errors
    /// A positive `errno` if the file keeps its tail, which does no harm.
    pub async fn retire(self: &Rc<Self>) -> Outcome {
        let outcome = self.trim_tail().await;
        self.end().await;
        outcome
    }

    async fn end(self: &Rc<Self>) {
        let ended = Promise::default();
        *self.closing.borrow_mut() = Some(ended.clone());
        self.commit_bell.ring();
        ended.wait().await;
    }

    async fn close_session(self: &Rc<Self>) -> Outcome {
        self.reclaim().await?;
        assert!(self.dirty_pages() == 0, "nobody dirties pages while closing");
        let applied = self.applied.borrow().clone();
        applied.wait().await?;
        self.sync().await?;
        if self.log.borrow().is_some() {
            self.update_headers(|header| header.log_guid = uuid::Uuid::nil()).await?;
            *self.log.borrow_mut() = None;
        }
        Ok(())
    }

    /// Gives the unused end of the file back. The log is empty, and durably so: no replay misses the length.
    async fn trim_tail(self: &Rc<Self>) -> Outcome {
        let end = self.space.borrow().used_end();
        if end < self.file_length.get() {
            self.disk.truncate(end).await.map_err(|error| errno(&error))?;
            self.file_length.set(end);
            self.sync().await?;
        }
        Ok(())
    }
}
