//! Taking space away from blocks.

use std::rc::Rc;

use smol::future::yield_now;

use super::log::cycle_threshold;
use super::span::{shows_parents, to_unmap};
use super::{Engine, Outcome};
use crate::disk::Disk;
use crate::format::bat::{BatEntry, PayloadState};
use crate::simulation::{Plant, planted};

/// Blocks handled before other tasks get a turn.
const BLOCKS_PER_TURN: u64 = 512;

impl<D: Disk + 'static> Engine<D> {
    /// Makes whole blocks ZERO that do not read as zero. Those that do change only if `define_absent`: to
    /// others an absent block's content is undefined.
    pub(super) async fn unmap(self: &Rc<Self>, first: u64, count: u64, define_absent: bool) -> Outcome {
        assert!(!self.shared.fixed, "fixed images keep their space");
        let to_zero =
            |engine: &Self, block| to_unmap(&engine.shared, block, define_absent, &mut { u32::MAX });
        self.change_each(first, count, to_zero).await
    }

    /// Makes those blocks ZERO that have no data, and, unless the `whole` block is meant, no parent's data.
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
        self.check_range(first, count);
        for block in first..first + count {
            if to_zero(self, block) {
                let change = async {
                    self.check_poison()?;
                    let reveals = planted(Plant::RevealParents);
                    let zero = if reveals { BatEntry::not_present() } else { BatEntry::zero() };
                    // The task that had the block until now may have given it space, or a front may, and
                    // acknowledged data in it. What changes behind the look is seen by the replacement.
                    loop {
                        let seen = self.shared.map.load(block);
                        let changes = to_zero(self, block) || planted(Plant::TrustFirstLook);
                        if !changes || self.remap(block, seen, zero) {
                            return Outcome::Ok(());
                        }
                    }
                };
                self.turns.blocks.exclusively(block, change).await?;
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
        if self.dirty.count() >= cycle_threshold(self.layout.log.length) {
            return self.flush().await;
        }
        yield_now().await;
        Ok(())
    }
}
