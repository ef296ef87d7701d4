//! Closing the image: the file that is left needs no replay and has no unused tail.
//!
//! Order: everything committed and in place → synced → the headers drop the LogGuid → space that nothing
//! names goes back to the host, and the tail is cut off.

use std::rc::Rc;

use nix::errno::Errno;

use super::shared::Session;
use super::{Engine, Outcome, errno};
use crate::disk::Disk;
use crate::image::Extent;
use crate::simulation::{Plant, planted};

impl<D: Disk + 'static> Engine<D> {
    /// Closes the image. Every request to the engine has been answered and no front makes another; the fronts
    /// still answer barriers.
    ///
    /// An image that was neither modified nor recovered stays untouched. A poisoned one keeps its LogGuid and
    /// its length: the next open replays what is durable.
    ///
    /// No request may follow, nor any other call: the commit cycles have ended.
    ///
    /// # Errors
    /// If the image could not be closed clean; its content is safe in the log.
    pub async fn close(self: &Rc<Self>) -> Outcome {
        let modified = self.shared.session() != Session::Idle || self.recovered;
        let mut outcome = self.freeze().await;
        if outcome.is_ok() && modified {
            outcome = self.trim().await;
        }
        self.end().await;
        outcome
    }

    /// Makes the image whole on the medium, as [`Self::close`] does, except for its unused space, which
    /// stays. [`Self::retire`] or more requests may follow.
    ///
    /// # Errors
    /// Those of [`Self::close`].
    pub async fn freeze(self: &Rc<Self>) -> Outcome {
        assert_eq!(self.open_tasks.get(), 0, "the fronts have stopped");
        match self.shared.session() {
            Session::Idle => Ok(()),
            Session::Open => self.close_session().await,
            Session::Poisoned => Err(Errno::EIO),
        }
    }

    /// Ends the engine of a frozen image that is not written again, and gives the image's unused space back.
    ///
    /// Nothing may follow, as after [`Self::close`].
    ///
    /// # Errors
    /// If the file keeps its tail, which does no harm.
    pub async fn retire(self: &Rc<Self>) -> Outcome {
        let outcome = self.trim().await;
        self.end().await;
        outcome
    }

    /// Ends the engine of a frozen image that another engine writes from now on. Nothing may follow.
    pub async fn leave(self: &Rc<Self>) {
        assert_eq!(self.shared.session(), Session::Idle, "nothing is left to be written");
        self.end().await;
    }

    async fn end(self: &Rc<Self>) {
        self.commits.close().wait().await;
    }

    async fn close_session(self: &Rc<Self>) -> Outcome {
        self.reclaim().await?;
        assert!(self.dirty.count() == 0, "no page changes while the image is closed");
        self.end_log().await?;
        self.empty_pool();
        assert!(!self.commits.has_waiters(), "no task waits for a cycle of a closed image");
        Ok(())
    }

    /// Gives unused space back. The log is empty, and durably so: no replay misses the length, or what was
    /// there.
    async fn trim(self: &Rc<Self>) -> Outcome {
        let punched = !planted(Plant::KeepLeaks) && self.give_leaks_back().await;
        let cut = self.cut_end().await?;
        if punched || cut { self.sync().await } else { Ok(()) }
    }

    /// Cuts the unused end of the file off, and says whether there was one. The image is frozen.
    ///
    /// # Errors
    /// If the file keeps its end, which does no harm.
    pub async fn cut_end(&self) -> Outcome<bool> {
        assert!(!self.journal.is_active(), "the file is shortened once no log needs it");
        let end = self.space.borrow().used_end();
        assert!(self.layout.bat.end() <= end, "the BAT is in use to the end");
        let longer = end < self.durability.file_length();
        if longer {
            self.shorten_file(end).await.map_err(|error| errno(&error))?;
        }
        Ok(longer)
    }

    /// Gives the host the space that a power cut has left without an owner: granted and never logged, or
    /// unmapped and not punched yet. Returns whether there was any.
    async fn give_leaks_back(self: &Rc<Self>) -> bool {
        let runs: Vec<Extent> = self.space.borrow().unknown_runs().collect();
        let mut any = false;
        for run in runs {
            let stored = match self.disk.next_data(run.offset).await {
                Ok(found) => found.is_some_and(|found| found < run.end()),
                Err(_) => false,
            };
            if stored {
                if !self.shared.can_punch() {
                    return any;
                }
                any = true;
                // In use while it is punched, so that no block gets it: the punch would zero what is written
                // there.
                let shared = self.space.borrow_mut().claim(run);
                assert_eq!(shared, None, "a free run is free");
                self.give_back(run).await;
            }
        }
        any
    }
}
