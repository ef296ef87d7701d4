//! Taking space away from blocks, and bringing it back to the free map.

use std::rc::Rc;

use super::local::yield_now;
use super::log::cycle_threshold;
use super::run::{shows_parents, to_unmap};
use super::{Engine, Outcome};
use crate::disk::Disk;
use crate::format::bat::{BatEntry, PayloadState};
use crate::image::Extent;
use crate::simulation::{Plant, planted};

/// Blocks handled before other tasks get a turn.
const BLOCKS_PER_TURN: u64 = 512;

impl<D: Disk + 'static> Engine<D> {
    /// Makes whole blocks ZERO that do not read as zero. Those that do change only if `define_absent`: to others an
    /// absent block's content is undefined.
    pub(super) async fn unmap(self: &Rc<Self>, first: u64, count: u64, define_absent: bool) -> Outcome {
        assert!(!self.shared.fixed, "fixed images keep their space");
        let to_zero =
            |engine: &Self, block| to_unmap(&engine.shared, block, define_absent, &mut { u32::MAX });
        self.change_each(first, count, to_zero).await
    }

    /// Makes those blocks ZERO that have no data, nor, unless the `whole` block is meant, a parent's.
    pub(super) async fn zero_absent(self: &Rc<Self>, first: u64, count: u64, whole: bool) -> Outcome {
        let to_zero = |engine: &Self, block| {
            let entry = engine.shared.map.load(block).entry;
            let parents = || shows_parents(&engine.shared, block, &mut { u32::MAX });
            entry.payload_state() != Some(PayloadState::Zero)
                && !engine.has_space(entry)
                && (whole || !parents())
        };
        self.change_each(first, count, to_zero).await
    }

    /// Makes the blocks ZERO of which `to_zero` is true. Most of a long range may be: those cost a look each.
    async fn change_each(
        self: &Rc<Self>,
        first: u64,
        count: u64,
        to_zero: impl Fn(&Self, u64) -> bool,
    ) -> Outcome {
        for block in first..first + count {
            if to_zero(self, block) {
                let change = async {
                    self.check_poison()?;
                    // Whoever had the block until now may have given it space.
                    if to_zero(self, block) || planted(Plant::TrustFirstLook) {
                        let reveals = planted(Plant::RevealParents);
                        self.remap(block, if reveals { BatEntry::not_present() } else { BatEntry::zero() });
                    }
                    Outcome::Ok(())
                };
                self.block_locks.exclusively(block, change).await?;
            }
            if (block - first + 1).is_multiple_of(BLOCKS_PER_TURN) {
                self.pause_for_commit().await?;
            }
        }
        self.start_cycle_if_due();
        Ok(())
    }

    /// A long range lets others run, and waits for a cycle rather than pile up dirty pages.
    async fn pause_for_commit(self: &Rc<Self>) -> Outcome {
        if self.dirty_pages() >= cycle_threshold(self.layout.log.length) {
            return self.flush().await;
        }
        yield_now().await;
        Ok(())
    }

    /// Sends a barrier if a batch waits for one and none is outstanding.
    pub(super) fn send_barrier(self: &Rc<Self>) {
        let fronts = self.fronts.count();
        if self.quarantine.borrow_mut().start_barrier(fronts) {
            self.count(|counters| counters.barriers += 1);
            for front in 0..fronts {
                self.fronts.send(front, super::message::ToFront::Barrier);
            }
        }
    }

    /// Takes out of quarantine what may leave it: punched at once, which gives the host its space back, and
    /// known zero after the next sync.
    pub(super) async fn release_quarantine(self: &Rc<Self>) {
        self.send_barrier();
        self.releasing.update(|count| count + 1);
        let released = self.quarantine.borrow_mut().release();
        for extent in released {
            self.count(|counters| counters.released += 1);
            self.give_back(extent).await;
        }
        self.releasing.update(|count| count - 1);
        self.released_bell.ring();
    }

    /// Punches space that nothing names and that is not free yet, and frees it.
    pub(super) async fn give_back(self: &Rc<Self>, extent: Extent) {
        let punched = if self.shared.can_punch() {
            self.disk.punch(extent.offset, extent.length).await
        } else {
            Ok(false)
        };
        match punched {
            Ok(true) => self.settling.borrow_mut().push(extent),
            Ok(false) => {
                self.shared.forget_punch();
                self.space.borrow_mut().free(extent, false);
            }
            // The space stays what it is: free, with old bytes in it.
            Err(error) => {
                tracing::warn!("giving space back to the host failed: {error}");
                self.space.borrow_mut().free(extent, false);
            }
        }
    }

    /// Brings back to the free map everything that is in quarantine now. One caller at a time.
    pub(super) async fn reclaim(self: &Rc<Self>) -> Outcome {
        self.flush().await?;
        let newest = self.quarantine.borrow().newest_batch();
        let held = || newest.is_some_and(|newest| self.quarantine.borrow().holds_batch_until(newest));
        while held() || self.releasing.get() > 0 {
            self.check_poison()?;
            self.released_bell.wait().await;
        }
        self.flush().await
    }
}
