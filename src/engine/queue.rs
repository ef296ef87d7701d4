//! The tasks that wait for a commit cycle, and the bell that wakes the loop that runs the cycles.

use std::cell::RefCell;

use super::Outcome;
use super::waiting::{Bell, Promise};

/// See the module's head.
#[derive(Default)]
pub(super) struct CommitQueue {
    /// Tasks that the next cycle answers.
    waiters: RefCell<Vec<Promise<Outcome>>>,
    /// The task for which a cycle cuts the file.
    cut: RefCell<Option<Promise<Outcome<u64>>>>,
    bell: Bell,
    /// Set to end the loop; kept when it has ended.
    closing: RefCell<Option<Promise<()>>>,
}

impl CommitQueue {
    /// Joins the next cycle, which keeps the promise.
    pub(super) fn join(&self) -> Promise<Outcome> {
        assert!(self.closing.borrow().is_none(), "no cycle follows");
        let done = Promise::default();
        self.waiters.borrow_mut().push(done.clone());
        self.bell.ring();
        done
    }

    /// Has a cycle cut the file when everything is in place, and keep the promise. One caller at a time.
    pub(super) fn join_to_cut(&self) -> Promise<Outcome<u64>> {
        assert!(self.closing.borrow().is_none(), "no cycle follows");
        let done = Promise::default();
        let before = self.cut.replace(Some(done.clone()));
        assert!(before.is_none(), "one cut at a time");
        self.bell.ring();
        done
    }

    /// The promise of [`Self::join_to_cut`], for the cycle that keeps it.
    pub(super) fn take_cut(&self) -> Option<Promise<Outcome<u64>>> {
        self.cut.take()
    }

    /// Wakes the loop: a cycle may be due.
    pub(super) fn ring(&self) {
        self.bell.ring();
    }

    /// Waits until the loop is woken.
    pub(super) async fn rung(&self) {
        self.bell.wait().await;
    }

    /// Whether a task waits for a cycle.
    pub(super) fn has_waiters(&self) -> bool {
        !self.waiters.borrow().is_empty() || self.cut.borrow().is_some()
    }

    /// A cycle closes its set: it answers these, and a task that joins from now on waits for the next cycle.
    pub(super) fn take_waiters(&self) -> Vec<Promise<Outcome>> {
        self.waiters.take()
    }

    /// Ends the loop once it has nothing to do; the promise is kept then.
    pub(super) fn close(&self) -> Promise<()> {
        let ended = Promise::default();
        let before = self.closing.replace(Some(ended.clone()));
        assert!(before.is_none(), "an engine ends once");
        self.bell.ring();
        ended
    }

    /// The promise of [`Self::close`], once the loop is to end.
    pub(super) fn closing(&self) -> Option<Promise<()>> {
        self.closing.borrow().clone()
    }
}
