//! Cutting the unused end off the file of an image that is served.
//!
//! A log entry says how long the file surely is, and a reader refuses one that is shorter. So the log ends
//! before the file does: everything that it has is in place and synced, then the headers drop its LogGuid.
//! The next commit begins a new log, whose entries know the new length. A power cut in between leaves a file
//! that is longer than it need be.
//!
//! It is done at the end of a commit cycle. No other cycle runs meanwhile, which could have copied pages that
//! rely on the length that goes. No task extends the file either, and none is granted space behind the cut:
//! what is granted, or in quarantine, lies before it.

use std::io;
use std::rc::Rc;

use super::shared::Session;
use super::{Engine, Outcome, errno, for_guest, is_refusal};
use crate::disk::Disk;
use crate::simulation::{Plant, planted};

impl<D: Disk + 'static> Engine<D> {
    /// Cuts the file where what is used ends. When it returns, that is durable. The session must be open.
    ///
    /// Returns by how many bytes the file has become shorter.
    ///
    /// # Errors
    /// A positive `errno`; the file has its old length, or the session is poisoned.
    pub async fn cut(self: &Rc<Self>) -> Outcome<u64> {
        assert_ne!(self.shared.session(), Session::Idle, "the session opens before the first change");
        let turn = self.turns.growth.enter().await;
        let cut = self.commits.join_to_cut().wait().await;
        drop(turn);
        cut
    }

    /// How many bytes [`Self::cut`] would take off now.
    pub fn unused_end(&self) -> u64 {
        self.empty_pool();
        self.durability.file_length().saturating_sub(self.space.borrow().used_end())
    }

    /// The end of a cycle that has succeeded.
    pub(super) async fn cut_committed(self: &Rc<Self>) -> Outcome<u64> {
        let cut = self.unused_end();
        if cut == 0 {
            return Ok(0);
        }
        if !planted(Plant::EarlyCut) {
            self.end_log().await?;
        }
        self.empty_pool();
        let (length, end) = (self.durability.file_length(), self.space.borrow().used_end());
        if end >= length {
            return Ok(0);
        }
        if let Err(error) = self.shorten_file(end).await {
            if !is_refusal(errno(&error)) {
                return Err(self.poison("cutting the file", &error));
            }
            return Err(for_guest(errno(&error)));
        }
        self.sync().await?;
        Ok(length - end)
    }

    /// Shortens the file to `end` bytes, behind which nothing is used.
    ///
    /// # Errors
    /// If it keeps its length. What its end holds then is unknown, and is not taken for zeros.
    pub(super) async fn shorten_file(&self, end: u64) -> io::Result<()> {
        let length = self.durability.file_length();
        self.space.borrow_mut().shorten(end);
        self.durability.shortened(end);
        self.shared.map.set_file_bytes(end);
        let Err(error) = self.disk.truncate(end).await else { return Ok(()) };
        // Not every host that reports a failure has left the length as it was.
        match self.disk.length().await {
            Ok(now) if now == end => return Ok(()),
            Ok(now) if now == length => {
                self.space.borrow_mut().lengthen(length);
                self.durability.grown(length);
                self.shared.map.set_file_bytes(length);
            }
            _ => {
                self.poison("finding the length of the file", &error);
            }
        }
        Err(error)
    }

    /// Ends the log, if there is one: what it has is durable in place, and no header names it.
    pub(super) async fn end_log(self: &Rc<Self>) -> Outcome {
        self.await_applied().await?;
        self.sync().await?;
        if self.journal.is_active() {
            self.update_headers(|header| header.log_guid = uuid::Uuid::nil()).await?;
            self.journal.end();
        }
        Ok(())
    }
}
