//! What every thread of a device sees: the block maps of the chain, the session word, what the host's file
//! can do.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::activity::Activity;
use super::marks::Marks;
use super::pool::Pool;
use super::troubles::Troubles;
use super::unlogged::Unlogged;
use crate::atomic::{AtomicU32, Ordering};
use crate::format::bat::{BatEntry, Geometry, PayloadState};
pub use crate::image::Session;
use crate::image::{BlockMap, Mapping, payload_extent};
use crate::simulation::{Plant, ordered, planted};

/// The layer that is served itself; the others are its parents, each the parent of the one before it.
pub const LEAF: u8 = 0;

/// The state shared by the fronts and the engine.
pub struct Shared {
    /// Where each block lies.
    pub map: Arc<BlockMap>,
    /// Of a differencing image the parents, its own first; they are never written.
    parents: Box<[Arc<BlockMap>]>,
    /// Pages of metadata that fronts have changed.
    pub marks: Arc<Marks>,
    /// Space that fronts may give blocks.
    pub pool: Pool,
    /// Writes are refused before they reach the engine.
    pub read_only: bool,
    /// The image promises provisioned space (LeaveBlocksAllocated): nothing is ever unmapped.
    pub fixed: bool,
    can_zero_range: AtomicBool,
    can_punch: AtomicBool,
    troubles: Troubles,
    activity: Activity,
    /// That a file has lost its end was logged.
    cut_was_said: AtomicBool,
    /// What the engine has to log.
    pub unlogged: Unlogged,
    /// Durable writes of the fronts, and syncs of theirs and the engine's, whose end has not been seen.
    unseen: AtomicU32,
}

impl Shared {
    /// State over `map` and the session in its memory; the host is trusted until it refuses.
    pub fn new(map: BlockMap, read_only: bool, fixed: bool) -> Self {
        Self::of_chain(map.into(), Box::default(), read_only, fixed)
    }

    /// State over a chain and the session in the memory of its leaf.
    pub fn of_chain(
        leaf: Arc<BlockMap>,
        parents: Box<[Arc<BlockMap>]>,
        read_only: bool,
        fixed: bool,
    ) -> Self {
        assert!(parents.len() < usize::from(u8::MAX) + 1, "a layer's number has 8 bits");
        Self {
            marks: Marks::new(leaf.geometry()).into(),
            pool: Pool::default(),
            map: leaf,
            parents,
            read_only,
            fixed,
            can_zero_range: AtomicBool::new(true),
            can_punch: AtomicBool::new(true),
            troubles: Troubles::default(),
            activity: Activity::default(),
            cut_was_said: AtomicBool::new(false),
            unlogged: Unlogged::default(),
            unseen: AtomicU32::new(0),
        }
    }

    /// The geometry of the virtual disk.
    pub fn geometry(&self) -> &Geometry {
        self.map.geometry()
    }

    /// The image that the leaf's content comes from where it has none itself, and so on, with their numbers.
    pub(super) fn parents(&self) -> impl Iterator<Item = (u8, &BlockMap)> {
        (1..).zip(self.parents.iter().map(Arc::as_ref))
    }

    /// Where the content of every layer is, the leaf's first.
    pub fn layers(&self) -> impl Iterator<Item = &Arc<BlockMap>> {
        std::iter::once(&self.map).chain(&self.parents)
    }

    /// Virtual bytes `from..to` have been written into the space that their blocks have. Where a block is
    /// partially present they are read from there from now on, and committed by the next cycle.
    pub fn mark_written(&self, from: u64, to: u64) {
        let geometry = self.geometry();
        let sector = u64::from(geometry.logical_sector_size());
        assert!(from < to, "something was written");
        let mut at = from;
        while at < to {
            let block = geometry.block_of_offset(at);
            let within = geometry.offset_in_block(at);
            let end = to.min(at - within + geometry.block_size());
            if self.map.load(block).entry.payload_state() == Some(PayloadState::PartiallyPresent) {
                self.marks.set_bits(&self.map, block, within / sector..(within + end - at) / sector);
            }
            at = end;
        }
    }

    /// Gives `block`, which has no space, some of the pool. The session is open, and the caller starts what
    /// it has for the block before it takes a message. Whether the block is to be looked up again; otherwise
    /// the engine is to be asked.
    pub fn give_space(&self, block: u64) -> bool {
        let mut seen = self.map.load(block);
        if !self.needs_zeros_only(seen) {
            return false;
        }
        let Some(offset) = self.pool.take() else { return false };
        let given = self.marks.change_mapping(&self.map, block, || {
            while self.needs_zeros_only(seen) {
                if self.map.replace(block, seen, BatEntry::present(offset)) {
                    return true;
                }
                seen = self.map.load(block);
            }
            false
        });
        if given {
            self.activity().claimed();
            self.troubles().found_room();
        } else {
            self.pool.add(offset);
        }
        true
    }

    /// Whether a block can be written once it has space that reads as zero: it has none, not even one with
    /// old content, and nothing of its parents.
    fn needs_zeros_only(&self, Mapping { entry, moving, .. }: Mapping) -> bool {
        let is_absent = match entry.payload_state() {
            Some(PayloadState::Zero | PayloadState::Undefined | PayloadState::Unmapped) => true,
            Some(PayloadState::NotPresent) => !self.geometry().is_differencing(),
            _ => false,
        };
        is_absent && !moving && payload_extent(entry, self.geometry()).is_none()
    }

    /// `from..to` is about to be written where it is, and the mapping of a block in it may be one that a
    /// front has given and not marked yet.
    pub fn found_mappings(&self, from: u64, to: u64) {
        let [first, last] = [from, to - 1].map(|offset| self.geometry().block_of_offset(offset));
        self.marks.found_mappings(&self.map, first..last + 1);
    }

    /// Whether any of these `bytes` of a layer's file, which are read and lie past the file's end, were there
    /// before. Another program has cut the file then, which is logged once; or it is damaged, and the device
    /// shows what is left.
    pub(super) fn has_lost(&self, layer: u8, bytes: Range<u64>) -> bool {
        let map = self.layers().nth(usize::from(layer)).expect("a layer of this chain");
        let offset = bytes.start;
        let is_cut = offset < map.file_bytes();
        if is_cut && !self.cut_was_said.swap(true, Ordering::Relaxed) {
            let whose =
                if layer == LEAF { "the image's file".into() } else { format!("the file of parent {layer}") };
            tracing::error!(
                "{whose} had {} bytes and ends before byte {offset}: another program has cut it; blocks that \
                 lie there can no longer be read",
                map.file_bytes()
            );
        }
        is_cut || bytes.end > map.lost_from()
    }

    /// The session word.
    #[inline]
    pub fn session(&self) -> Session {
        self.map.memory().session()
    }

    /// Idle becomes open; poison stays.
    pub fn open_session(&self) {
        self.map.memory().open();
    }

    /// From now on no write or flush may succeed. `true` for the one caller that changed it.
    pub fn poison(&self) -> bool {
        self.map.memory().poison()
    }

    /// What has gone wrong on the host.
    pub fn troubles(&self) -> &Troubles {
        &self.troubles
    }

    /// What the engine has done, and has before it.
    pub fn activity(&self) -> &Activity {
        &self.activity
    }

    /// Whether a sync of the file makes everything durable that was acknowledged: see `engine/unlogged` for
    /// the order of the two looks.
    #[inline]
    pub fn is_logged(&self) -> bool {
        let has_marks = self.marks.count() > 0 && !planted(Plant::SyncOverBits);
        !has_marks && !self.unlogged.is_set()
    }

    /// A durable write or a sync is about to be submitted.
    pub(super) fn unseen_begins(&self) {
        self.unseen.fetch_add(1, Ordering::SeqCst);
    }

    /// Its end has been seen; if it failed, the session is poisoned already.
    pub(super) fn unseen_ended(&self) {
        let before = self.unseen.fetch_sub(1, ordered(Plant::RelaxedEnd, Ordering::SeqCst));
        assert!(before > 0, "what is under way ends once");
    }

    /// Whether the end of a durable write or a sync has not been seen.
    pub fn has_unseen(&self) -> bool {
        self.unseen.load(ordered(Plant::RelaxedLook, Ordering::SeqCst)) > 0
    }

    /// Whether the host is believed to take `ZERO_RANGE`.
    pub fn can_zero_range(&self) -> bool {
        self.can_zero_range.load(Ordering::Relaxed)
    }

    /// The host has refused `ZERO_RANGE`: zeros are written from now on.
    pub fn forget_zero_range(&self) {
        self.can_zero_range.store(false, Ordering::Relaxed);
    }

    /// Whether the host is believed to take `PUNCH_HOLE`.
    pub fn can_punch(&self) -> bool {
        self.can_punch.load(Ordering::Relaxed)
    }

    /// The host has refused `PUNCH_HOLE`.
    pub fn forget_punch(&self) {
        self.can_punch.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the file had when it was opened, or has grown by since, must be there; what it never had reads as
    /// zeros.
    #[test]
    fn only_what_a_file_had_can_be_lost() {
        let geometry = Geometry::new(8 << 20, 1 << 20, 512, true);
        let map = || Arc::new(BlockMap::empty(geometry));
        let shared = Shared::of_chain(map(), vec![map()].into(), false, false);
        shared.map.set_file_bytes(5 << 20);
        let has_lost = |layer, offset| shared.has_lost(layer, offset..offset + 512);
        assert!(has_lost(LEAF, (5 << 20) - 1) && !has_lost(LEAF, 5 << 20));
        assert!(!has_lost(LEAF + 1, 0), "the parent's length is its own");
        shared.map.set_file_bytes(6 << 20);
        assert!(has_lost(LEAF, 5 << 20));
    }
}
