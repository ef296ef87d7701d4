//! Giving a block its space: no sync, no log write.

use std::rc::Rc;

use nix::errno::Errno;

use super::{Engine, Outcome, errno, for_guest, too_long_is_full};
use crate::disk::Disk;
use crate::format::MIB;
use crate::format::bat::{BatEntry, PayloadState};
use crate::image::{Content, Extent, Grant, Mapping, Page};
use crate::simulation::{Plant, planted};

/// How far the file is extended beyond what is needed: an eighth of its length, within these bounds. Each
/// step costs the next commit a sync, so steps must be rare. The tail takes no space and is trimmed at close.
pub(super) const MIN_GROW_STEP_BYTES: u64 = 32 * MIB;
const MAX_GROW_STEP_BYTES: u64 = 1024 * MIB;

/// Blocks that a step has room for, where it takes no space and is not longer for that than any step may be.
const BLOCKS_PER_STEP: u64 = 32;

impl<D: Disk + 'static> Engine<D> {
    /// Gives every block of `first..first + count` space; an allocation in progress is joined.
    pub(super) async fn allocate(self: &Rc<Self>, first: u64, count: u64) -> Outcome {
        self.check_range(first, count);
        for block in first..first + count {
            self.turns.blocks.exclusively(block, self.allocate_block(block)).await?;
        }
        self.fill_pool();
        self.start_cycle_if_due();
        Ok(())
    }

    async fn allocate_block(self: &Rc<Self>, block: u64) -> Outcome {
        if self.shared.map.load(block).moving {
            self.end_move(block).await?;
        }
        let old = self.shared.map.load(block).entry;
        if self.has_space(old) {
            return Ok(());
        }
        let by_sectors = self.needs_parents(old) && self.can_be_partial(block).await?;
        let extent = if by_sectors {
            // Only sectors whose bits are set are read from here: the space need not read as zero.
            self.find_space(self.shared.geometry().block_size()).await?.extent
        } else {
            self.find_zeros(self.shared.geometry().block_size()).await?
        };
        if !by_sectors && self.needs_parents(old) {
            self.count(|counters| counters.fills.add(1));
            self.fill(block, extent)
                .await
                .inspect_err(|_| self.space.borrow_mut().free(extent, Content::Recycled))?;
            if !planted(Plant::SkipFillSync) {
                self.durability.payload_written();
            }
        }
        self.check_poison()?;
        let offset = extent.offset;
        let new = if by_sectors { BatEntry::partially_present(offset) } else { BatEntry::present(offset) };
        let now = self.shared.map.load(block);
        if self.has_space(now.entry) || !self.remap(block, now, new) {
            // A front was faster. What was zeroed here is no zeros before a sync.
            self.space.borrow_mut().free(extent, Content::Recycled);
            return Ok(());
        }
        self.count(|counters| counters.grants.add(1));
        Ok(())
    }

    /// Whether a block with this entry can be written as it is.
    pub(super) fn has_space(&self, entry: BatEntry) -> bool {
        let partial = Some(PayloadState::PartiallyPresent);
        entry.payload_state() == Some(PayloadState::FullyPresent)
            || self.shared.geometry().is_differencing() && entry.payload_state() == partial
    }

    /// Space that reads as zero, durably so before an entry names it.
    pub(super) async fn find_zeros(self: &Rc<Self>, length: u64) -> Outcome<Extent> {
        let grant = self.find_space(length).await?;
        if grant.content == Content::Recycled {
            self.count(|counters| counters.recycled_grants.add(1));
            if !planted(Plant::SkipZeroFill) {
                self.zero_grant(grant.extent).await?;
            }
            self.durability.payload_written();
        }
        Ok(grant.extent)
    }

    async fn zero_grant(self: &Rc<Self>, extent: Extent) -> Outcome {
        self.disk.zero(extent.offset, extent.length).await.map_err(|error| {
            self.space.borrow_mut().free(extent, Content::Recycled);
            for_guest(errno(&error))
        })
    }

    /// Marks a page dirty and publishes a mapping in it, in one step: visible means committable. (A cycle
    /// between the two would answer a flush, and a power cut would take what was written there.) Space that
    /// the old entry names goes to quarantine. Nothing of that if the block is no longer as it was `seen`:
    /// a front has given it space. Whether it was.
    pub(super) fn remap(self: &Rc<Self>, block: u64, seen: Mapping, new: BatEntry) -> bool {
        self.check_change(seen.entry, new);
        self.mark(Page::Bat(self.shared.map.page_of(block)));
        let replaced = self.shared.map.replace(block, seen, new);
        if let Some(extent) = self.space_of(seen.entry).filter(|_| replaced) {
            self.count(|counters| counters.unmapped.add(1));
            self.reclaim.lost(extent);
        }
        replaced
    }

    /// `page` is about to change. A front that sees the change must find the flag: the write that it makes
    /// possible is acknowledged, and a flush follows.
    pub(super) fn mark(&self, page: Page) {
        if !planted(Plant::LateFlag) {
            self.shared.unlogged.set();
        }
        self.dirty.mark(page);
    }

    /// What every change of a mapping must satisfy. The new space is in use, so that no grant can hand it out
    /// again; and a block becomes partially present from absent only, with clear bits: old bits would show
    /// old data.
    fn check_change(&self, old: BatEntry, new: BatEntry) {
        let (state, before) = (new.payload_state(), self.space_of(old));
        if let Some(extent) = self.space_of(new) {
            let space = self.space.borrow();
            assert!(space.is_used(extent.offset..extent.end()), "a block gets space that is taken for it");
            let file = self.durability.file_length().next_multiple_of(MIB);
            assert!(extent.end() <= file, "a block gets space that the file has");
            assert_ne!(before, Some(extent), "a mapping that keeps its space needs no change");
        }
        if state == Some(PayloadState::PartiallyPresent) {
            assert!(self.shared.geometry().is_differencing(), "only a child's blocks are partially present");
            assert!(before.is_none(), "a block becomes partially present from absent only");
        }
    }

    /// The range that a message names was admitted by a front.
    pub(super) fn check_range(&self, first: u64, count: u64) {
        let blocks = self.shared.geometry().block_count();
        assert!(first + count <= blocks, "blocks {first} and {count} more are not on the disk");
    }

    /// The space that an entry occupies: a present block's, or the old contents that an undefined or unmapped
    /// one still names.
    pub(super) fn space_of(&self, entry: BatEntry) -> Option<Extent> {
        crate::image::payload_extent(entry, self.shared.geometry())
    }

    /// Free space first, that of the pool included, then a longer file, then what quarantine holds: one cycle
    /// and one barrier before it is "no space".
    async fn find_space(self: &Rc<Self>, length: u64) -> Outcome<Grant> {
        if let Some(grant) = self.take_space(length) {
            return Ok(grant);
        }
        let turn = self.turns.growth.enter().await;
        if let Some(grant) = self.take_space(length) {
            return Ok(grant);
        }
        if let Err(refused) = self.grow_for(length).await {
            if too_long_is_full(refused) != Errno::ENOSPC {
                return Err(refused);
            }
            self.reclaim().await?;
            return self.take_space(length).ok_or(refused);
        }
        let grant = self.take_space(length).ok_or(Errno::ENOSPC);
        drop(turn);
        grant
    }

    fn take_space(&self, length: u64) -> Option<Grant> {
        let free = self.space.borrow_mut().take(length);
        let grant = free.or_else(|| {
            self.empty_pool();
            self.space.borrow_mut().take(length)
        })?;
        assert_eq!(grant.extent.length, length, "a grant is as long as it was asked for");
        Some(grant)
    }

    /// Extends the file generously, or at least by `length`.
    async fn grow_for(self: &Rc<Self>, length: u64) -> Outcome {
        assert!(length > 0 && length.is_multiple_of(MIB), "space is granted in whole MiB");
        let end = self.durability.file_length().next_multiple_of(MIB);
        // Without holes every step is written, while the guest waits. With them a step has room for large
        // blocks, too, that are written after this one.
        let (least, longest) = if self.disk.may_have_holes() {
            (length.max((BLOCKS_PER_STEP * length).min(MAX_GROW_STEP_BYTES)), MAX_GROW_STEP_BYTES)
        } else {
            (length, MIN_GROW_STEP_BYTES)
        };
        let step = (end / 8).clamp(MIN_GROW_STEP_BYTES, longest).next_multiple_of(MIB).max(least);
        match self.grow_to(end + step).await {
            Err(Errno::ENOSPC | Errno::EFBIG) if length < step => self.grow_to(end + length).await,
            outcome => outcome,
        }
    }

    /// Extends the file to `length` bytes.
    pub(super) async fn grow_to(self: &Rc<Self>, length: u64) -> Outcome {
        assert!(length.is_multiple_of(MIB), "growing to {length}");
        // The one that waited before may have grown a dense file, and failed to sync it.
        self.check_poison()?;
        if length > crate::image::MAX_FILE_BYTES {
            return Err(Errno::EFBIG);
        }
        self.disk.grow(length).await.map_err(|error| for_guest(errno(&error)))?;
        if !self.disk.may_have_holes() && !planted(Plant::EarlyGrowth) {
            // Zeros that were written are no zeros after a power cut before they are durable.
            self.sync().await?;
        }
        self.count(|counters| counters.grows.add(1));
        self.durability.grown(length);
        self.shared.map.set_file_bytes(length);
        self.space.borrow_mut().extend(length);
        Ok(())
    }
}
