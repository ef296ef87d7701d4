//! Partially present blocks: a block of a differencing image that has some sectors itself, and the others
//! from its parents, as the sector bitmap of its chunk says.
//!
//! * A front sets a sector's bit when its data is in the file ([`super::marks`]); the commit
//!   cycle copies the bitmap's page, syncs, and only then writes the entry that has it. So a durable bit has
//!   durable data.
//! * An absent block becomes partially present with all its bits cleared *in the file*: bits that a power cut
//!   has left there, logged before the block's entry was, would show what the new space happens to hold.
//! * A chunk's bitmap is named by a durable entry before any of the chunk's blocks becomes partially present:
//!   their entries may be in other pages, which a power cut may keep without it.
//!
//! * A block that moves gets no bits at its new place before a durable entry has it ([`super::relocate`]).
//!
//! With these four, pages may be logged in any order. A block becomes partially present from absent only,
//! and never twice: discarded it is ZERO, written again it is whole. A block with all its bits set becomes
//! fully present.
//!
//! [Rules 93 to 96](crate::design::vhdx_rules#rule-93).

use std::rc::Rc;

use nix::errno::Errno;

use super::{Engine, Outcome, errno};
use crate::disk::{Disk, PAGE_BYTES};
use crate::format::bat::{BITMAP_BLOCK_SIZE, BatEntry, PayloadState};
use crate::format::index;
use crate::image::{Content, Page, SectorBitmaps};
use crate::simulation::{Plant, planted};

impl<D: Disk + 'static> Engine<D> {
    /// Whether absent `block` can become partially present: there is room for its bits, and the file has none
    /// of its bits set. Its chunk has a bitmap then. (Otherwise the block is filled.)
    pub(super) async fn can_be_partial(self: &Rc<Self>, block: u64) -> Outcome<bool> {
        let geometry = self.shared.geometry();
        assert!(geometry.is_differencing(), "only a child's blocks are partially present");
        if let Err(error) = self.shared.map.bitmaps().make_room(geometry, block) {
            tracing::debug!("no room for the bits of block {block}, it is filled: {error}");
            return Ok(false);
        }
        if self.begin_bitmap(geometry.chunk_of_block(block)).await? || planted(Plant::KeepStaleBits) {
            return Ok(true);
        }
        self.has_no_bits(block).await
    }

    /// Gives `chunk` a bitmap, all clear, if it has none. Returns whether it did.
    async fn begin_bitmap(self: &Rc<Self>, chunk: u64) -> Outcome<bool> {
        let turn = self.turns.bitmaps.enter().await;
        let map = &self.shared.map;
        let begins = map.bitmap_place(chunk).is_none();
        if begins {
            let extent = self.find_zeros(BITMAP_BLOCK_SIZE).await?;
            // Once it is named its pages are written in place, for flushes that need no room.
            if !planted(Plant::UnreservedBitmap) {
                let free = |_: &Errno| self.space.borrow_mut().free(extent, Content::Recycled);
                self.reserve(extent).await.inspect_err(free)?;
            }
            self.check_poison()?;
            self.count(|counters| counters.bitmaps.add(1));
            self.mark(Page::Bat(map.page_of_bitmap(chunk)));
            map.publish_bitmap(chunk, extent.offset);
            self.dirty.bitmap_begun(chunk);
        }
        if self.dirty.is_bitmap_unnamed(chunk) && !planted(Plant::EarlyReliance) {
            self.flush().await?;
            self.dirty.bitmap_named(chunk);
        }
        assert!(map.bitmap_place(chunk).is_some(), "the chunk has a bitmap from now on");
        drop(turn);
        Ok(begins)
    }

    /// Whether the file has no bit of absent `block`. What of its chunk's bitmap is logged and not in place
    /// yet has none of them either: in memory they are clear.
    async fn has_no_bits(self: &Rc<Self>, block: u64) -> Outcome<bool> {
        let geometry = self.shared.geometry();
        let place = self.shared.map.bitmap_place(geometry.chunk_of_block(block));
        let place = place.expect("the chunk has a bitmap");
        let pages = SectorBitmaps::pages(geometry, block);
        assert!(pages.end * PAGE_BYTES as u64 <= BITMAP_BLOCK_SIZE, "{pages:?} of a bitmap");
        let start = pages.start * PAGE_BYTES as u64;
        let length = index(pages.end - pages.start) * PAGE_BYTES;
        let bytes = self.disk.read(place + start, length).await.map_err(|error| errno(&error))?;
        let slice = geometry.bitmap_slice(block);
        Ok(bytes[index(slice.start - start)..index(slice.end - start)].iter().all(|byte| *byte == 0))
    }

    /// The cycle closes its set: pages that fronts have changed belong to it, and blocks of which all sectors
    /// have come to be there.
    pub(super) fn take_marks(&self) {
        for page in self.dirty.take_marked() {
            if let Page::Bitmap { chunk, page } = page {
                self.promote_blocks(chunk, page);
            }
        }
    }

    /// A page with these bits goes to the log: the data of its sectors has to be synced before. That includes
    /// sectors whose bits were set after the set was closed.
    pub(super) fn copy_bits(&self, chunk: u64, page: u64) -> Box<[u8; PAGE_BYTES]> {
        if !planted(Plant::SkipBitsSync) {
            self.durability.payload_written();
        }
        self.shared.map.bitmaps().copy_page(chunk, page)
    }

    /// Makes those blocks fully present that have bits in this page, and all of them.
    fn promote_blocks(&self, chunk: u64, page: u64) {
        let (geometry, map) = (self.shared.geometry(), &self.shared.map);
        let slice_bytes = BITMAP_BLOCK_SIZE / geometry.chunk_ratio();
        let first = chunk * geometry.chunk_ratio();
        let from = page * PAGE_BYTES as u64;
        let blocks = from / slice_bytes..(from + PAGE_BYTES as u64).div_ceil(slice_bytes);
        for block in
            (first + blocks.start..first + blocks.end).take_while(|block| *block < geometry.block_count())
        {
            let entry = map.load(block).entry;
            let partial = entry.payload_state() == Some(PayloadState::PartiallyPresent);
            if partial && (map.bitmaps().is_full(geometry, block) || planted(Plant::EarlyPromotion)) {
                self.count(|counters| counters.promotions.add(1));
                self.durability.payload_written();
                let whole = BatEntry::present(entry.offset());
                assert_eq!(self.space_of(whole), self.space_of(entry), "a block made whole keeps its space");
                self.mark(Page::Bat(map.page_of(block)));
                map.publish(block, whole);
            }
        }
    }
}
