//! A disk at rest that grows: what its image needs, and what comes into the disk.
//!
//! What comes into the disk is zero to every reader:
//!
//! * the rest of the last block: its bytes in the file are zeroed. In a child whose parent goes further, its
//!   sectors there are present; a block that has no space yet gets some;
//! * new blocks of a dynamic image have no entry, as those of a new image. Every known reader takes that for
//!   zeros, and a table of 512 MiB stays a hole of the file;
//! * new blocks of a child are ZERO where the parent has a disk: without an entry they would show it. Behind
//!   the parent's end there is nothing to show;
//! * new blocks of a fixed image are present, on space that is zero.
//!
//! A BAT that has no room gets more space behind it, or a new place, which is written before anything names
//! it. What is in pages of the BAT that the disk as it was has no slot in is written in place: nothing reads
//! them before the size is in the metadata. All else is one [`Edit`] together with the size.
//!
//! [Rule 103](crate::design::vhdx_rules#rule-103).

use std::ops::Range;

use super::bat_reader::{BAT_CHUNK_BYTES, payload_extent};
use super::edit::Edit;
use super::open::Image;
use super::region_move::lay_tables;
use super::room::{Provision, Room, zero_stored};
use super::space::Extent;
use super::view::file_length;
use crate::disk::{Buffer, Disk, PAGE_BYTES, ReadDisk, is_zero};
use crate::error::{Error, Result};
use crate::format::bat::{BITMAP_BLOCK_SIZE, BatEntry, ENTRY_SIZE, Geometry, PayloadState};
use crate::format::metadata::{DiskType, Metadata};
use crate::format::{MIB, guid, index};
use crate::simulation::{Plant, planted};

/// Slots of a page.
const PER_PAGE: u64 = (PAGE_BYTES / ENTRY_SIZE) as u64;

/// See the module's head.
pub(super) struct Growth<'a> {
    image: &'a Image,
    /// As it will be.
    geometry: Geometry,
    /// Where the BAT will be.
    bat: Extent,
    room: Room,
    /// The space of new blocks of a fixed image, by the first block of each piece.
    blocks: Vec<(u64, Extent)>,
    /// Blocks that come before this one are ZERO.
    zero_until: u64,
    border: Option<Border>,
}

/// A child's last block, into which a part of the parent's disk would come.
struct Border {
    block: u64,
    /// Its entry.
    entry: BatEntry,
    /// Where the sector bitmap of its chunk is.
    bitmap: Extent,
    is_new_bitmap: bool,
}

impl<'a> Growth<'a> {
    /// What `image` needs for a disk of `virtual_size` bytes, more than it has, over a parent whose disk has
    /// `parent_bytes`. The end of its file reads as zero from `zero_from` on.
    pub(super) fn plan(
        image: &'a Image,
        virtual_size: u64,
        parent_bytes: u64,
        zero_from: Option<u64>,
    ) -> Result<Self> {
        let Metadata { block_size, logical_sector_size, has_parent, .. } = image.metadata;
        assert!(virtual_size > image.metadata.virtual_size, "the disk grows");
        let geometry = Geometry::new(virtual_size, block_size, logical_sector_size, has_parent);
        let (mut room, mut bat) = (Room::of(image, zero_from), image.layout.bat);
        let parent_bytes = if planted(Plant::ShowParentsEnd) { 0 } else { parent_bytes };
        let wanted = geometry.bat_length().next_multiple_of(MIB);
        if wanted > bat.length {
            let more = Extent { offset: bat.end(), length: wanted - bat.length };
            if image.space.is_used(more.offset..more.end()) {
                bat = room.take(wanted, Provision::Later)?;
            } else {
                room.take_at(more, Provision::Later)?;
                bat.length = wanted;
            }
        }
        let mut growth = Self { image, geometry, bat, room, blocks: Vec::new(), zero_until: 0, border: None };
        match image.metadata.kind() {
            DiskType::Fixed => growth.provision_blocks()?,
            DiskType::Differencing => {
                growth.zero_until = parent_bytes.div_ceil(block_size.into()).min(geometry.block_count());
                growth.border = growth.plan_border(parent_bytes)?;
            }
            DiskType::Dynamic => {}
        }
        Ok(growth)
    }

    fn provision_blocks(&mut self) -> Result<()> {
        let mut first = self.old().block_count();
        let (count, size) = (self.geometry.block_count() - first, self.geometry.block_size());
        for piece in self.room.take_blocks(count, size, Provision::Now)? {
            self.blocks.push((first, piece));
            first += piece.length / size;
        }
        assert_eq!(first, self.geometry.block_count(), "every new block has its space");
        Ok(())
    }

    fn plan_border(&mut self, parent_bytes: u64) -> Result<Option<Border>> {
        let (old, end) = (*self.old(), self.old().virtual_size());
        if old.offset_in_block(end) == 0 || parent_bytes <= end {
            return Ok(None);
        }
        let block = old.block_of_offset(end);
        let found = self.image.map.load(block).entry;
        let entry = match found.payload_state() {
            Some(PayloadState::PartiallyPresent) => found,
            Some(PayloadState::NotPresent) => {
                let space = self.room.take(old.block_size(), Provision::Later)?;
                BatEntry::partially_present(space.offset)
            }
            // Nothing of the parent shows in the others.
            _ => return Ok(None),
        };
        let found = self.image.map.bitmap_place(old.chunk_of_block(block));
        let bitmap = match found {
            Some(offset) => Extent { offset, length: BITMAP_BLOCK_SIZE },
            // A write to a bitmap never lacks the room.
            None => self.room.take(BITMAP_BLOCK_SIZE, Provision::Now)?,
        };
        Ok(Some(Border { block, entry, bitmap, is_new_bitmap: found.is_none() }))
    }

    /// The disk as it was.
    fn old(&self) -> &Geometry {
        self.image.map.geometry()
    }

    /// What the host must have room for at once.
    pub(super) fn room(&self) -> &Room {
        &self.room
    }

    /// The block where the old disk ends, if it will be partially present, and where its sector bitmap is.
    pub(super) fn border(&self) -> Option<(u64, Extent)> {
        self.border.as_ref().map(|border| (border.block, border.bitmap))
    }

    /// Whether the BAT leaves its place.
    pub(super) fn moves_bat(&self) -> bool {
        self.bat.offset != self.image.layout.bat.offset
    }

    /// The slots of the blocks and bitmaps that come.
    fn new_slots(&self) -> Range<u64> {
        let old = self.old();
        let first = old.payload_slot(old.block_count()).min(old.slot_count());
        assert!(self.geometry.slot_count() >= old.slot_count(), "a disk that grows keeps its slots");
        first..self.geometry.slot_count()
    }

    /// The first slot of the pages that are written in place.
    fn own_pages(&self) -> u64 {
        if self.moves_bat() { 0 } else { self.old().slot_count().next_multiple_of(PER_PAGE) }
    }

    /// The entry of a slot as it will be.
    fn entry(&self, slot: u64) -> BatEntry {
        let bitmap = |border: &Border| self.geometry.bitmap_slot(self.geometry.chunk_of_block(border.block));
        if let Some(border) = &self.border {
            if slot == self.geometry.payload_slot(border.block) {
                return border.entry;
            }
            if slot == bitmap(border) {
                return BatEntry::present(border.bitmap.offset);
            }
        }
        let is_begun = slot < self.old().slot_count() && self.geometry.is_bitmap_slot(slot);
        if slot < self.new_slots().start || is_begun {
            return self.image.map.load_slot(slot).entry;
        }
        match self.geometry.block_of_slot(slot) {
            Some(block) => self.new_entry(block),
            None => BatEntry::not_present(),
        }
    }

    /// The entry of a block that comes.
    fn new_entry(&self, block: u64) -> BatEntry {
        let behind = self.blocks.partition_point(|(first, _)| *first <= block);
        if let Some((first, piece)) = behind.checked_sub(1).map(|piece| self.blocks[piece]) {
            let place = piece.offset + (block - first) * self.geometry.block_size();
            assert!(place < piece.end(), "block {block} has its place");
            return BatEntry::present(place);
        }
        if block < self.zero_until { BatEntry::zero() } else { BatEntry::not_present() }
    }

    /// Lays what must change together with the size.
    pub(super) async fn lay<D: ReadDisk>(&self, disk: &D, edit: &mut Edit) -> Result<()> {
        if self.bat != self.image.layout.bat {
            lay_tables(self.image, disk, edit, guid::REGION_BAT, self.bat).await?;
        }
        if !self.moves_bat() {
            let new = self.new_slots();
            let border = self.border.iter().flat_map(|border| {
                let chunk = self.geometry.chunk_of_block(border.block);
                [self.geometry.payload_slot(border.block), self.geometry.bitmap_slot(chunk)]
            });
            for slot in border.chain(new.start..new.end.min(self.own_pages())) {
                edit.lay(disk, self.place(slot), &self.entry(slot).write()).await?;
            }
        }
        if let Some(border) = self.border.as_ref().filter(|border| !border.is_new_bitmap) {
            let place = border.bitmap.offset + self.geometry.bitmap_slice(border.block).start;
            edit.lay(disk, place, &self.border_bits(disk, border).await?).await?;
        }
        Ok(())
    }

    /// Writes what nothing names yet, or reads.
    pub(super) async fn prepare<D: Disk>(&self, disk: &D) -> Result<()> {
        self.room.clear(disk).await?;
        if !planted(Plant::KeepOldEnd) {
            self.zero_last_block(disk).await?;
        }
        if let Some(border) = self.border.as_ref().filter(|border| border.is_new_bitmap) {
            self.write_bitmap(disk, border).await?;
        }
        if !self.moves_bat() && !planted(Plant::KeepOldSlots) {
            let end = self.place(self.geometry.slot_count()).next_multiple_of(PAGE_BYTES as u64);
            // Behind the region as it was there is space that is zero.
            let end = end.min(self.image.layout.bat.end());
            zero_stored(disk, self.place(self.own_pages()).min(end), end).await?;
        }
        self.write_own_pages(disk).await
    }

    /// The slots that may have an entry, whole pages of them, ascending.
    fn filled(&self) -> Vec<Range<u64>> {
        let new = self.new_slots();
        let mut filled = self.image.stored_slots.clone();
        if !self.blocks.is_empty() {
            filled.push(new.clone());
        }
        if self.zero_until > self.old().block_count() {
            filled.push(new.start..self.geometry.payload_slot(self.zero_until - 1) + 1);
        }
        if let Some(border) = &self.border {
            let chunk = self.geometry.chunk_of_block(border.block);
            let slots = [self.geometry.payload_slot(border.block), self.geometry.bitmap_slot(chunk)];
            filled.extend(slots.map(|slot| slot..slot + 1));
        }
        let own = self.own_pages();
        let pages = filled.into_iter().map(|slots| {
            let start = (slots.start / PER_PAGE * PER_PAGE).max(own);
            start..slots.end.next_multiple_of(PER_PAGE)
        });
        let mut pages: Vec<Range<u64>> = pages.filter(|slots| slots.start < slots.end).collect();
        pages.sort_by_key(|slots| slots.start);
        let mut merged: Vec<Range<u64>> = Vec::new();
        for slots in pages {
            match merged.last_mut() {
                Some(last) if slots.start <= last.end => last.end = last.end.max(slots.end),
                _ => merged.push(slots),
            }
        }
        merged
    }

    /// Writes the pages of the BAT that are not read yet, as far as they are not zero.
    async fn write_own_pages<D: Disk>(&self, disk: &D) -> Result<()> {
        for slots in self.filled() {
            let mut slot = slots.start;
            while slot < slots.end {
                let past = slots.end.min(slot + BAT_CHUNK_BYTES / ENTRY_SIZE as u64);
                let known = past.min(self.geometry.slot_count());
                let mut chunk = Buffer::zeroed(index((past - slot) * ENTRY_SIZE as u64));
                for (slot, word) in (slot..known).zip(chunk.as_chunks_mut::<ENTRY_SIZE>().0) {
                    *word = self.entry(slot).write();
                }
                let place = self.place(slot);
                assert!(place.is_multiple_of(PAGE_BYTES as u64), "slot {slot} begins a page");
                assert!(place + chunk.len() as u64 <= self.bat.end(), "the pages lie in the BAT");
                let written = disk.write(place, chunk).await;
                written.map_err(|error| Error::io("writing the BAT", error).at(place))?;
                slot = past;
            }
        }
        Ok(())
    }

    /// What the last block holds behind the end of the disk is not part of the disk yet, and becomes so.
    async fn zero_last_block<D: Disk>(&self, disk: &D) -> Result<()> {
        let old = self.old();
        let within = old.offset_in_block(old.virtual_size());
        let block = old.block_of_offset(old.virtual_size());
        let Some(extent) =
            (within > 0).then(|| payload_extent(self.image.map.load(block).entry, old)).flatten()
        else {
            return Ok(());
        };
        let zeroing = |error| Error::io("zeroing the end of the last block", error).at(extent.offset);
        if extent.end() > file_length(disk).await? {
            disk.grow(extent.end()).await.map_err(zeroing)?;
        }
        let from = extent.offset + within;
        assert!(from < extent.end(), "the disk ends in its last block");
        let page = from - from % PAGE_BYTES as u64;
        let mut bytes = disk.read(page, PAGE_BYTES).await.map_err(zeroing)?;
        let behind = &mut bytes[index(from - page)..];
        // A cut may tear sectors of the disk in this page: it is written only if something in it changes.
        if !is_zero(behind) {
            behind.fill(0);
            disk.write(page, bytes).await.map_err(zeroing)?;
        }
        zero_stored(disk, page + PAGE_BYTES as u64, extent.end()).await
    }

    /// The bits of the child's last block: those of the sectors that come are set.
    async fn border_bits<D: ReadDisk>(&self, disk: &D, border: &Border) -> Result<Vec<u8>> {
        let (old, slice) = (self.old(), self.geometry.bitmap_slice(border.block));
        let mut bits = vec![0; index(slice.end - slice.start)];
        let was_partial = self.image.map.load(border.block).entry == border.entry;
        if was_partial {
            assert!(!border.is_new_bitmap, "a partially present block has its bits in a bitmap");
            let at = border.bitmap.offset + slice.start;
            let page = at - at % PAGE_BYTES as u64;
            let length = (at - page + bits.len() as u64).next_multiple_of(PAGE_BYTES as u64);
            let read = disk.read(page, index(length)).await;
            let read = read.map_err(|error| Error::io("reading a sector bitmap", error).at(page))?;
            let length = bits.len();
            bits.copy_from_slice(&read[index(at - page)..][..length]);
        }
        let sector = u64::from(old.logical_sector_size());
        let start = border.block * old.block_size();
        let end = self.geometry.virtual_size().min(start + old.block_size());
        for bit in (old.virtual_size() - start) / sector..(end - start) / sector {
            bits[index(bit / 8)] |= 1 << (bit % 8);
        }
        Ok(bits)
    }

    /// Writes a bitmap that nothing names yet, whose space is zero.
    async fn write_bitmap<D: Disk>(&self, disk: &D, border: &Border) -> Result<()> {
        let bits = self.border_bits(disk, border).await?;
        let slice = self.geometry.bitmap_slice(border.block);
        let start = slice.start - slice.start % PAGE_BYTES as u64;
        let mut pages = Buffer::zeroed(index(slice.end - start).next_multiple_of(PAGE_BYTES));
        pages[index(slice.start - start)..][..bits.len()].copy_from_slice(&bits);
        let at = border.bitmap.offset + start;
        assert!(at + pages.len() as u64 <= border.bitmap.end(), "the bits lie in their bitmap");
        disk.write(at, pages).await.map_err(|error| Error::io("writing a sector bitmap", error).at(at))
    }

    /// Where `slot` will be.
    fn place(&self, slot: u64) -> u64 {
        self.bat.offset + slot * ENTRY_SIZE as u64
    }
}
