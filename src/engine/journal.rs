//! The log of the open session, and what it has that is not in place.

use std::cell::RefCell;
use std::collections::BTreeMap;

use uuid::Uuid;

use super::Outcome;
use super::apply::Batch;
use super::log::LogSpace;
use super::round::PageCopy;
use super::waiting::Promise;
use crate::disk::PAGE_BYTES;
use crate::image::Page;
use crate::simulation::{Plant, planted};

/// See the module's head.
pub(super) struct Journal {
    /// None before the first commit, and after the last one.
    log: RefCell<Option<LogSpace>>,
    /// The newest durable copy of each page that is neither in place nor on its way.
    unapplied: RefCell<BTreeMap<Page, Box<[u8; PAGE_BYTES]>>>,
    /// Kept when the newest batch is in place, or could not be written there.
    applied: RefCell<Promise<Outcome>>,
}

impl Default for Journal {
    /// No log, and nothing on its way.
    fn default() -> Self {
        Self {
            log: RefCell::default(),
            unapplied: RefCell::default(),
            applied: RefCell::new(Promise::kept(Ok(()))),
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
        assert!(self.is_settled() && !self.has_unapplied(), "the log starts again while it is needed");
        self.log.replace(Some(log));
    }

    /// The headers name no log from now on.
    pub(super) fn end(&self) {
        let log = self.log.take();
        assert!(log.is_some_and(|log| log.is_settled()), "a log ends that is needed");
        assert!(!self.has_unapplied(), "a log ends, and pages of it are not in place");
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

    /// The log has these pages, durably, and their places have not.
    pub(super) fn put_off(&self, pages: Vec<PageCopy>) {
        let mut unapplied = self.unapplied.borrow_mut();
        for copy in pages {
            if planted(Plant::KeepOlderCopy) {
                unapplied.entry(copy.page).or_insert(copy.bytes);
            } else {
                unapplied.insert(copy.page, copy.bytes);
            }
        }
    }

    /// Whether pages wait for a batch.
    pub(super) fn has_unapplied(&self) -> bool {
        !self.unapplied.borrow().is_empty()
    }

    /// Whether a batch is under way.
    pub(super) fn is_applying(&self) -> bool {
        !self.applied.borrow().is_kept()
    }

    /// All pages that wait are on their way to their places from now on; the caller keeps the promise.
    pub(super) fn begin_applying(&self) -> (Batch, Promise<Outcome>) {
        assert!(!self.is_applying(), "one batch at a time is on its way to its place");
        let pages = self.unapplied.take().into_iter().map(|(page, bytes)| PageCopy { page, bytes });
        let batch = Batch { pages: pages.collect(), newest: self.active(|log| log.newest_synced()) };
        let done = Promise::default();
        self.applied.replace(done.clone());
        (batch, done)
    }

    /// The host had no room for `batch`. Rounds that became durable meanwhile have newer copies.
    pub(super) fn put_back(&self, batch: Batch) {
        let mut unapplied = self.unapplied.borrow_mut();
        for copy in batch.pages {
            unapplied.entry(copy.page).or_insert(copy.bytes);
        }
    }

    /// Waits until the newest batch is in place, or has failed to get there.
    pub(super) async fn applied(&self) -> Outcome {
        let applied = self.applied.borrow().clone();
        applied.wait().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The older copy in its place would be all that is left of the page when the log starts again.
    #[test]
    fn what_the_host_refused_gives_way_to_newer_copies() {
        let journal = Journal::default();
        journal.begin(LogSpace::after_initial_entry(Uuid::from_u128(1), 1 << 20, 1 << 20));
        let round = |pages: &[u64], value| {
            journal.active(|log| {
                log.place_round(pages.len());
                log.round_synced();
            });
            let copy = |page: &u64| PageCopy { page: Page::Bat(*page), bytes: Box::new([value; PAGE_BYTES]) };
            journal.put_off(pages.iter().map(copy).collect());
        };
        let values = |batch: &Batch| -> Vec<(Page, u8)> {
            batch.pages.iter().map(|copy| (copy.page, copy.bytes[0])).collect()
        };
        round(&[1, 2], 1);
        round(&[1, 3], 2);
        let (batch, done) = journal.begin_applying();
        assert_eq!(values(&batch), [(Page::Bat(1), 2), (Page::Bat(2), 1), (Page::Bat(3), 2)]);
        round(&[3, 4], 3);
        assert!(journal.is_applying() && journal.has_unapplied());
        journal.put_back(batch);
        done.keep(Err(nix::errno::Errno::ENOSPC));
        let (batch, done) = journal.begin_applying();
        assert_eq!(
            values(&batch),
            [(Page::Bat(1), 2), (Page::Bat(2), 1), (Page::Bat(3), 3), (Page::Bat(4), 3)]
        );
        journal.active(|log| log.applied(batch.newest));
        done.keep(Ok(()));
        journal.confirm_applied(journal.newest_applied());
        assert!(journal.is_settled() && !journal.has_unapplied());
    }

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
