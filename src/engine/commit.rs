//! The commit cycle: how a flush becomes durable.
//!
//! One cycle at a time; a flush that arrives after a cycle closed its set joins the next one. A flush always
//! ends in a sync, dirty or not. Per round:
//!
//! 1. clear the pages' dirty marks, then copy the pages: the copy is what is logged and what is applied;
//! 2. if recycled space was granted since the last sync, or space by which the file has grown since, or if
//!    sectors of partially present blocks were written, sync: zeros, length and data must be durable before
//!    an entry names them. Later rounds are copied before the sync of the round before them, which serves
//!    them as this one;
//! 3. write the round's entries; a log without room for them starts again first;
//! 4. sync. The last round's sync makes durable everything acknowledged before the cycle closed its set;
//! 5. leave the copies to be written in place ([`super::apply`]).
//!
//! A host without room for an entry fails the requests that wait for the cycle and nothing else: the pages
//! get their marks back, the round gives its place in the log back, and the next cycle does all of it again.

use std::collections::VecDeque;
use std::rc::Rc;

use super::log::{LogSpace, Placement, cycle_threshold, round_pages};
use super::round::{PageCopy, Round};
use super::{Engine, Outcome, probes};
use crate::disk::{Buffer, Disk, PAGE_BYTES};
use crate::format::bat::BITMAP_BLOCK_SIZE;
use crate::format::log::{Change, NewEntry};
use crate::image::{Extent, Page};
use crate::simulation::{Plant, planted};

impl<D: Disk + 'static> Engine<D> {
    /// Makes everything acknowledged before this call durable.
    ///
    /// # Errors
    /// If the host has failed or refused a write. Unless it has refused one, the device is poisoned then.
    pub async fn flush(self: &Rc<Self>) -> Outcome {
        self.commits.join().wait().await
    }

    /// Enough dirty pages start a cycle of their own, so that a later flush stays bounded.
    pub(super) fn start_cycle_if_due(&self) {
        if self.cycle_is_due() {
            self.commits.ring();
        }
    }

    fn cycle_is_due(&self) -> bool {
        self.dirty.count() >= cycle_threshold(self.layout.log.length) || self.reclaim.is_due()
    }

    /// Runs a cycle whenever a task waits for one or one is due, until the engine closes.
    pub(super) async fn commit_loop(self: Rc<Self>) {
        loop {
            // A failed cycle that no task waits for is not repeated before the next ring: it would fail again
            // at once.
            let mut succeeds = true;
            while self.commits.has_waiters()
                || (succeeds && self.cycle_is_due() && self.check_poison().is_ok())
            {
                succeeds = self.cycle().await.is_ok();
            }
            if let Some(ended) = self.commits.closing() {
                return ended.keep(());
            }
            self.commits.rung().await;
        }
    }

    async fn cycle(self: &Rc<Self>) -> Outcome {
        let mut waiters = self.commits.take_waiters();
        let closed = self.durability.epoch();
        self.shared.unlogged.set();
        self.take_marks();
        let set = self.dirty.close();
        if planted(Plant::EarlyClear) {
            self.shared.unlogged.clear();
        }
        let batch = self.reclaim.close_batch();
        if planted(Plant::EarlyFlush) {
            waiters.drain(..).for_each(|waiter| waiter.keep(Ok(())));
        }
        self.send_barrier();
        probes::commit_start(set.len(), waiters.len());
        let cut = self.commits.take_cut();
        let outcome = self.commit(set).await;
        probes::commit_end(outcome);
        if outcome.is_err() {
            self.dirty.give_back();
        } else {
            assert!(self.durability.is_durable(closed), "a flush ends in a sync issued after it");
            self.clear_unlogged();
        }
        if self.reclaim.end_batch(batch, outcome.is_ok()) {
            self.start(|engine| async move { engine.release_quarantine().await });
        }
        for waiter in waiters {
            waiter.keep(outcome);
        }
        if let Some(done) = cut {
            done.keep(match outcome {
                Ok(()) => self.cut_committed().await,
                Err(errno) => Err(errno),
            });
        }
        self.fill_pool();
        self.note_levels();
        outcome
    }

    /// A cycle has succeeded: if nothing has changed since it closed its set, fronts sync for themselves.
    fn clear_unlogged(&self) {
        let logged = self.dirty.is_logged() && !self.durability.has_punched();
        if logged && self.disk.reports_losses_to_all() {
            self.shared.unlogged.clear();
        }
    }

    /// Logs the pages of `set` and syncs.
    async fn commit(self: &Rc<Self>, mut set: VecDeque<Page>) -> Outcome {
        self.check_poison()?;
        if set.is_empty() {
            return self.sync().await;
        }
        self.resolve_headers_in_doubt().await?;
        if !self.journal.is_active() {
            self.begin_log().await?;
        }
        self.count(|counters| counters.commits.add(1));
        let mut next = self.copy_round(&mut set);
        if next.as_ref().is_some_and(|round| self.must_sync_before(round)) {
            self.sync().await?;
        }
        while let Some(round) = next {
            self.make_room(&round).await?;
            self.log_round(&round).await?;
            let logged = self.durability.epoch();
            next = self.copy_round(&mut set);
            if !planted(Plant::ApplyBeforeLog) {
                self.sync().await?;
            }
            assert!(self.durability.is_durable(logged), "pages go in place once their entry is durable");
            self.round_is_durable(round);
        }
        Ok(())
    }

    /// Clears the marks of as many pages as a round surely takes, then copies them.
    fn copy_round(&self, set: &mut VecDeque<Page>) -> Option<Round> {
        let count = set.len().min(round_pages(self.layout.log.length));
        let pages = set.drain(..count).map(|page| {
            self.dirty.begin_logging(page);
            PageCopy { page, bytes: self.copy_page(page) }
        });
        let pages: Vec<PageCopy> = pages.collect();
        assert!(pages.len() == count, "every page of the set is copied once");
        let relies_on = self.durability.reliance(self.space.borrow().used_end());
        (!pages.is_empty()).then_some(Round { pages, relies_on })
    }

    /// Whether the round's entries would name what a power cut may take: old bytes would show in a block, or
    /// the file would end before it.
    fn must_sync_before(&self, round: &Round) -> bool {
        let payload = self.durability.covers_payload(round.relies_on) || planted(Plant::SkipRecyclingSync);
        let length = self.durability.covers_length(round.relies_on) || planted(Plant::SkipGrowthSync);
        !(payload && length)
    }

    /// A log without room for the round starts again, once everything in it is in place.
    async fn make_room(self: &Rc<Self>, round: &Round) -> Outcome {
        if self.journal.has_room(round.pages.len()) {
            return Ok(());
        }
        // The sync in `begin_log` confirms only what is in place when it is issued. A power cut after the
        // headers name the new log would lose a page that was still on its way: the log that has it is not
        // read again.
        if !planted(Plant::StartAgainEarly) {
            self.await_applied().await?;
        }
        self.begin_log().await?;
        assert!(self.journal.has_room(round.pages.len()), "a new log has room for any round");
        Ok(())
    }

    /// Writes the round's entries.
    async fn log_round(self: &Rc<Self>, round: &Round) -> Outcome {
        let outcome = self.write_entries(round).await;
        if outcome.is_err() {
            self.journal.active(LogSpace::withdraw_round);
        }
        outcome
    }

    /// Places the round's entries and writes them. Only after the sync of the round before it has completed
    /// is the space that this round may take known to be free.
    async fn write_entries(self: &Rc<Self>, round: &Round) -> Outcome {
        assert!(
            self.durability.covers_payload(round.relies_on),
            "an entry names payload that is not durable"
        );
        assert!(self.durability.covers_length(round.relies_on), "an entry names space past a stable length");
        let (tail, placements) = self.journal.active(|log| (log.tail(), log.place_round(round.pages.len())));
        let mut pages = round.pages.iter();
        for placement in &placements {
            let changes = pages.by_ref().take(placement.pages).map(|copy| Change::Data {
                file_offset: self.page_place(copy.page),
                page: self.page_to_log(copy),
            });
            let changes: Vec<Change> = changes.collect();
            let (position, entry) = self.encode_entry(tail, placement, &changes);
            self.count(|counters| {
                counters.entries.add(1);
                counters.pages.add(changes.len() as u64);
            });
            self.write_metadata("writing a log entry", position, entry).await?;
        }
        assert!(pages.next().is_none(), "a round places all its pages");
        Ok(())
    }

    fn page_to_log(&self, copy: &PageCopy) -> Box<[u8; PAGE_BYTES]> {
        if planted(Plant::LogLivePage) { self.copy_page(copy.page) } else { copy.bytes.clone() }
    }

    fn encode_entry(&self, tail: u64, placement: &Placement, changes: &[Change]) -> (u64, Buffer) {
        let (guid, log) = self.journal.active(|log| (log.guid, log.offset));
        let entry = NewEntry {
            sequence_number: placement.sequence,
            tail: u32::try_from(tail).expect("a log has at most 1 GiB"),
            log_guid: guid,
            flushed_file_offset: self.flushed_file_offset(),
            last_file_offset: self.last_file_offset(),
            changes,
        };
        (log + placement.position, Buffer::copy_of(&entry.encode()))
    }

    fn round_is_durable(self: &Rc<Self>, round: Round) {
        self.journal.active(LogSpace::round_synced);
        self.count(|counters| counters.rounds.add(1));
        for copy in &round.pages {
            self.dirty.logged(copy.page);
            if let Page::Bat(page) = copy.page {
                self.shared.map.mark_durable(page, &copy.bytes);
            }
        }
        self.journal.put_off(round.pages);
        self.apply_if_due();
    }

    fn copy_page(&self, page: Page) -> Box<[u8; PAGE_BYTES]> {
        match page {
            Page::Bat(page) => self.shared.map.copy_page(page),
            Page::Bitmap { chunk, page } => self.copy_bits(chunk, page),
        }
    }

    /// Where a page lies in the file.
    pub(super) fn page_place(&self, page: Page) -> u64 {
        let (region, page) = match page {
            Page::Bat(page) => (self.layout.bat, page),
            Page::Bitmap { chunk, page } => {
                let offset = self.shared.map.bitmap_place(chunk).expect("blocks rely on it");
                (Extent { offset, length: BITMAP_BLOCK_SIZE }, page)
            }
        };
        let place = region.offset + page * PAGE_BYTES as u64;
        assert!(place + PAGE_BYTES as u64 <= region.end(), "a page lies in the BAT or in a bitmap");
        place
    }
}
