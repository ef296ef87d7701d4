//! The log of the open session, and its newest round on the way to its place.

use std::cell::RefCell;

use uuid::Uuid;

use super::Outcome;
use super::log::LogSpace;
use super::round::Round;
use super::waiting::Promise;

/// See the module's head.
pub(super) struct Journal {
    /// None before the first commit, and after the last one.
    log: RefCell<Option<LogSpace>>,
    /// Kept when the newest round is in place, or could not be written there.
    applied: RefCell<Promise<Outcome>>,
    /// The newest round, if the host had no room for it in place.
    refused: RefCell<Option<Round>>,
}

impl Default for Journal {
    /// No log, and nothing on its way.
    fn default() -> Self {
        Self {
            log: RefCell::default(),
            applied: RefCell::new(Promise::kept(Ok(()))),
            refused: RefCell::default(),
        }
    }
}

impl Journal {
    /// Whether the headers name a log.
    pub(super) fn is_active(&self) -> bool {
        self.log.borrow().is_some()
    }

    /// Whether the active log has this LogGuid.
    pub(super) fn is_under(&self, guid: Uuid) -> bool {
        self.log.borrow().as_ref().is_some_and(|log| log.guid == guid)
    }

    /// The headers name `log` from now on, and not the one before it.
    pub(super) fn begin(&self, log: LogSpace) {
        assert!(self.is_settled(), "the log starts again while it is needed");
        self.log.replace(Some(log));
    }

    /// The headers name no log from now on.
    pub(super) fn end(&self) {
        let log = self.log.take();
        assert!(log.is_some_and(|log| log.is_settled()), "a log ends that is needed");
        assert!(self.refused.borrow().is_none(), "a log ends, and its last round is not in place");
    }

    /// Works with the active log.
    pub(super) fn active<T>(&self, work: impl FnOnce(&mut LogSpace) -> T) -> T {
        work(self.log.borrow_mut().as_mut().expect("a commit cycle begins the log before it uses it"))
    }

    /// Whether the active log has room for a round of `pages` pages.
    pub(super) fn has_room(&self, pages: usize) -> bool {
        self.log.borrow().as_ref().is_some_and(|log| log.fits(pages))
    }

    /// How far the active log is filled, bytes.
    pub(super) fn used_bytes(&self) -> u64 {
        self.log.borrow().as_ref().map_or(0, LogSpace::used_bytes)
    }

    /// Whether a new log may be written over the first sector: see [`LogSpace::spares_first_sector`].
    pub(super) fn spares_first_sector(&self) -> bool {
        self.log.borrow().as_ref().is_none_or(LogSpace::spares_first_sector)
    }

    /// Whether everything that the log holds is durable in place.
    pub(super) fn is_settled(&self) -> bool {
        self.log.borrow().as_ref().is_none_or(LogSpace::is_settled)
    }

    /// The newest round that is in place, if a sync issued now confirms one, and the log that it is in.
    pub(super) fn newest_applied(&self) -> Option<(Uuid, u64)> {
        let log = self.log.borrow();
        log.as_ref().and_then(|log| log.newest_applied().map(|newest| (log.guid, newest)))
    }

    /// A sync has completed that was issued when [`Self::newest_applied`] was `newest`. It says nothing of a
    /// log that has begun since, whose rounds have the same numbers: a power cut could take them.
    pub(super) fn confirm_applied(&self, newest: Option<(Uuid, u64)>) {
        if let (Some(log), Some((guid, newest))) = (&mut *self.log.borrow_mut(), newest)
            && log.guid == guid
        {
            log.confirm_applied(newest);
        }
    }

    /// A round is on its way to its place from now on; the caller keeps the promise.
    pub(super) fn begin_applying(&self) -> Promise<Outcome> {
        let done = Promise::default();
        let before = self.applied.replace(done.clone());
        assert!(before.is_kept(), "one round at a time is on its way to its place");
        done
    }

    /// The host had no room for `round` in its place. It is in the log.
    pub(super) fn refuse(&self, round: Round) {
        let before = self.refused.replace(Some(round));
        assert!(before.is_none(), "one round at a time is on its way to its place");
    }

    /// Takes the newest round if it is not in place, and cannot be before it is tried again.
    pub(super) fn take_refused(&self) -> Option<Round> {
        self.refused.take()
    }

    /// Waits until the newest round is in place, or has failed to get there.
    pub(super) async fn applied(&self) -> Outcome {
        let applied = self.applied.borrow().clone();
        applied.wait().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_confirms_nothing_of_a_log_that_has_begun_since() {
        let log = |number| LogSpace::after_initial_entry(Uuid::from_u128(number), 1 << 20, 1 << 20);
        let journal = Journal::default();
        journal.begin(log(1));
        let early = journal.newest_applied();
        journal.confirm_applied(early);
        journal.end();
        journal.begin(log(2));
        journal.confirm_applied(early);
        assert!(!journal.is_settled(), "the sync was issued before the log was there");
        journal.confirm_applied(journal.newest_applied());
        assert!(journal.is_settled());
    }
}
