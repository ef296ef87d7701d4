//! Amending an image at rest: what its metadata says of it changes, and nothing else.
//!
//! Order, each step durable before the next:
//!
//! 1. new FileWriteGuid in both headers, before any other modification;
//! 2. if the disk grows, what lies behind its end becomes zeros: the rest of its last block, and in the BAT
//!    whole pages of slots that no block has yet. They are not read before step 3;
//! 3. one [`Edit`]: the items, their entries in the table, and the slots that share a page with those of the
//!    disk as it was.
//!
//! A cut anywhere leaves the old metadata or the new metadata, whole. The DataWriteGuid stays: a child
//! recognises its parent by it, and a parent with another path, or a longer end, is the same.

use std::ops::Range;

use uuid::Uuid;

use super::edit::Edit;
use super::headers::Headers;
use super::open::{BAT_CHUNK_BYTES, Image, WritableImage, payload_extent, read_table};
use super::view::{View, sync};
use crate::disk::{Buffer, Disk, PAGE_BYTES, ReadDisk};
use crate::error::{Error, Kind, Result};
use crate::format::bat::{BatEntry, ENTRY_SIZE, Geometry};
use crate::format::log::MAX_DESCRIPTORS_WRITTEN;
use crate::format::metadata::{self, Metadata};

impl WritableImage {
    /// Gives the image on `disk`, which was not written since it was opened, this `metadata`; opens it
    /// again. If there is nothing to change, nothing is written. Blocks that come into the disk are zero.
    ///
    /// # Errors
    /// Before anything is written: [`Kind::Unsupported`] if the metadata region or the BAT has no room, or
    /// the image cannot be written; corrupt if the metadata contradicts the format. I/O errors.
    ///
    /// # Panics
    /// If it would be another kind of image.
    pub async fn amend<D: Disk>(
        self,
        disk: &D,
        metadata: &Metadata,
        mut new_guid: impl FnMut() -> Uuid,
    ) -> Result<Self> {
        if *metadata == self.metadata {
            return Ok(self);
        }
        assert_eq!(
            (metadata.kind(), metadata.block_size, metadata.logical_sector_size),
            (self.metadata.kind(), self.metadata.block_size, self.metadata.logical_sector_size),
            "what blocks mean does not change"
        );
        metadata.check()?;
        self.check_writable()?;
        let mut edit = self.items_edit(disk, metadata).await?;
        let growth = self.growth(metadata.virtual_size)?;
        if let Some(growth) = &growth {
            growth.edit_shared_pages(disk, &mut edit).await?;
        }
        assert!(edit.page_count() > 0, "what differs is in an item");
        if edit.page_count() > MAX_DESCRIPTORS_WRITTEN {
            return Err(Error::new(Kind::Unsupported, "the change is too long for one log entry")
                .in_structure("metadata")
                .remedy("copy the image into a new one"));
        }
        let mut headers = Headers::new(&self.header)?;
        sync(disk).await?;
        let file_write = new_guid();
        headers.update(disk, |header| header.file_write_guid = file_write).await?;
        for extent in [self.layout.log, self.layout.metadata] {
            let reserved = disk.reserve(extent.offset, extent.length).await;
            reserved.map_err(|error| Error::io("making room for the change", error).at(extent.offset))?;
        }
        if let Some(growth) = &growth {
            growth.zero_last_block(disk).await?;
            growth.write_own_pages(disk).await?;
        }
        edit.write(disk, &mut headers, &mut new_guid).await?;
        Image::open_for_writing(disk, new_guid).await
    }
}

impl Image {
    /// The items that `metadata` says otherwise, and where they are.
    async fn items_edit<D: ReadDisk>(&self, disk: &D, metadata: &Metadata) -> Result<Edit> {
        let region = self.regions.table.metadata();
        let table = read_table(&View { disk, overlay: None }, region).await?;
        let mut edit = Edit::default();
        for entry in table.system_items() {
            let item = metadata.item_bytes(entry.item_id).expect("of the same kind, with the same items");
            if self.metadata.item_bytes(entry.item_id).as_ref() == Some(&item) {
                continue;
            }
            let length = u32::try_from(item.len()).expect("an item has at most 1 MiB");
            let Some(place) = table.place_for(entry.item_id, length, region.length) else {
                let message = format!("there is no room for an item of {length} bytes");
                let error = Error::new(Kind::Unsupported, message).in_structure("metadata");
                return Err(error.at(region.offset).remedy("copy the image into a new one"));
            };
            assert!(u64::from(place) >= metadata::TABLE_SIZE as u64, "an item lies behind the table");
            assert!(place + length <= region.length, "an item lies in the region");
            let field = [place.to_le_bytes(), length.to_le_bytes()].concat();
            edit.lay(disk, region.offset + table.place_field(entry.item_id), &field).await?;
            edit.lay(disk, region.offset + u64::from(place), &item).await?;
        }
        Ok(edit)
    }

    /// What a disk that grows to `virtual_size` needs; nothing if it does not grow.
    fn growth(&self, virtual_size: u64) -> Result<Option<Growth<'_>>> {
        if virtual_size <= self.metadata.virtual_size {
            return Ok(None);
        }
        let Metadata { block_size, logical_sector_size, has_parent, .. } = self.metadata;
        let geometry = Geometry::new(virtual_size, block_size, logical_sector_size, has_parent);
        let (wanted, found) = (geometry.bat_length(), self.layout.bat.length);
        if wanted > found {
            let message =
                format!("its BAT has {found} bytes, a disk of {virtual_size} bytes needs {wanted} of them");
            let error = Error::new(Kind::Unsupported, message).in_structure("BAT").at(self.layout.bat.offset);
            return Err(error.remedy("create an image of the larger size and copy the disk into it"));
        }
        Ok(Some(Growth { image: self, geometry }))
    }

    /// Whether its BAT has the slots of a disk of `virtual_size` bytes.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] if not.
    pub fn check_growth(&self, virtual_size: u64) -> Result<()> {
        self.growth(virtual_size).map(drop)
    }
}

/// An image whose disk grows.
struct Growth<'a> {
    image: &'a Image,
    /// As it will be.
    geometry: Geometry,
}

impl Growth<'_> {
    /// The slots of the blocks and bitmaps that come.
    fn new_slots(&self) -> Range<u64> {
        let old = self.image.map.geometry();
        let slots = old.payload_slot(old.block_count())..self.geometry.slot_count();
        assert!(slots.end >= old.slot_count(), "a disk that grows keeps its slots");
        slots
    }

    /// The slot at which the first page begins that the disk as it was has no slot in.
    fn own_pages(&self) -> u64 {
        let per_page = (PAGE_BYTES / ENTRY_SIZE) as u64;
        self.image.map.geometry().slot_count().next_multiple_of(per_page)
    }

    /// What comes into the disk is zero to every reader, whatever the slot held before. The bitmap of a chunk
    /// that was begun stays.
    fn new_entry(&self, slot: u64) -> Option<BatEntry> {
        let begun = self.image.map.geometry().slot_count();
        match self.geometry.block_of_slot(slot) {
            Some(_) => Some(BatEntry::zero()),
            None if self.geometry.is_bitmap_slot(slot) && slot < begun => None,
            None => Some(BatEntry::not_present()),
        }
    }

    async fn edit_shared_pages<D: ReadDisk>(&self, disk: &D, edit: &mut Edit) -> Result<()> {
        let slots = self.new_slots();
        for slot in slots.start..slots.end.min(self.own_pages()) {
            if let Some(entry) = self.new_entry(slot) {
                edit.lay(disk, self.place(slot), &entry.write()).await?;
            }
        }
        Ok(())
    }

    async fn write_own_pages<D: Disk>(&self, disk: &D) -> Result<()> {
        let (mut slot, end) = (self.own_pages(), self.new_slots().end);
        while slot < end {
            let past = end.min(slot + BAT_CHUNK_BYTES / ENTRY_SIZE as u64);
            let entries = (slot..past).map(|slot| self.new_entry(slot).unwrap_or(BatEntry::not_present()));
            let bytes: Vec<u8> = entries.flat_map(BatEntry::write).collect();
            let mut chunk = Buffer::zeroed(bytes.len().next_multiple_of(PAGE_BYTES));
            chunk[..bytes.len()].copy_from_slice(&bytes);
            let bat = self.image.layout.bat;
            assert!(self.place(slot).is_multiple_of(PAGE_BYTES as u64), "slot {slot} begins a page");
            assert!(self.place(slot) + chunk.len() as u64 <= bat.end(), "the pages lie in the BAT");
            let written = disk.write(self.place(slot), chunk).await;
            written.map_err(|error| Error::io("writing the BAT", error).at(self.place(slot)))?;
            slot = past;
        }
        Ok(())
    }

    /// What the last block holds behind the end of the disk is not part of the disk yet, and becomes so.
    async fn zero_last_block<D: Disk>(&self, disk: &D) -> Result<()> {
        let old = self.image.map.geometry();
        let within = old.offset_in_block(old.virtual_size());
        let block = old.block_of_offset(old.virtual_size());
        let Some(extent) =
            (within > 0).then(|| payload_extent(self.image.map.load(block).entry, old)).flatten()
        else {
            return Ok(());
        };
        let zeroing = |error| Error::io("zeroing the end of the last block", error).at(extent.offset);
        if extent.end() > self.image.layout.file_length {
            disk.grow(extent.end()).await.map_err(zeroing)?;
        }
        let from = extent.offset + within;
        assert!(from < extent.end(), "the disk ends in its last block");
        let page = from - from % PAGE_BYTES as u64;
        let mut bytes = disk.read(page, PAGE_BYTES).await.map_err(zeroing)?;
        bytes[usize::try_from(from - page).expect("below a page")..].fill(0);
        disk.write(page, bytes).await.map_err(zeroing)?;
        let rest = page + PAGE_BYTES as u64;
        if rest < extent.end() {
            disk.zero(rest, extent.end() - rest).await.map_err(zeroing)?;
        }
        Ok(())
    }

    fn place(&self, slot: u64) -> u64 {
        self.image.layout.bat.offset + slot * ENTRY_SIZE as u64
    }
}
