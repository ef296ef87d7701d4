//! Amending an image at rest: what its metadata says of it changes, the size of its disk included.
//!
//! Order, each step durable before the next:
//!
//! 1. the host has room for what is new. Otherwise nothing has changed;
//! 2. new FileWriteGuid in both headers, before any other modification;
//! 3. what is new is written where nothing names it or reads it ([`super::growth`]);
//! 4. one [`Edit`]: the items, their entries in the table, the slots that share a page with those of the disk
//!    as it was, and both region tables, if the BAT has another place or length; together with it a new
//!    DataWriteGuid, if readers of the disk are to see the change;
//! 5. the log is empty: what nothing names now goes back to the host.
//!
//! A cut anywhere leaves the old metadata or the new metadata, whole; a cut before step 4 or 5 leaves leaked
//! space at most. Without a new DataWriteGuid a child still recognises the image as its parent: one with
//! another path, or a longer end, is the same.

use std::cmp::Ordering;

use uuid::Uuid;

use super::edit::Edit;
use super::growth::Growth;
use super::headers::Headers;
use super::open::{Image, WritableImage, read_table};
use super::shrink::{Shrink, give_back};
use super::space::Extent;
use super::view::{View, sync};
use crate::disk::{Disk, ReadDisk};
use crate::error::{Error, Kind, Result};
use crate::format::header::Header;
use crate::format::log::MAX_DESCRIPTORS_WRITTEN;
use crate::format::metadata::{self, Metadata};
use crate::simulation::{Plant, planted};

/// What an image at rest is to become.
pub struct Resize {
    /// Its metadata, the size of the disk included. Blocks mean the same as before.
    pub metadata: Metadata,
    /// How far the disk of its parent reaches, bytes: nothing of that comes into a disk that grows.
    pub parent_bytes: u64,
    /// The new DataWriteGuid, if readers of the disk are to see a change. Children do not recognise the image
    /// from then on.
    pub data_write: Option<Uuid>,
    /// From where on the file reads as zero after every power cut, if that is known of its end, bytes.
    pub zero_from: Option<u64>,
}

/// What becomes of the blocks.
enum Blocks<'a> {
    Stay,
    Grow(Growth<'a>),
    Shrink(Shrink<'a>),
}

impl Blocks<'_> {
    /// Step 3.
    async fn prepare<D: Disk>(&self, disk: &D) -> Result<()> {
        match self {
            Self::Grow(growth) => growth.prepare(disk).await,
            Self::Stay | Self::Shrink(_) => Ok(()),
        }
    }
}

/// A resize for which the host has room, and of which the image shows nothing yet.
pub struct PreparedResize<'a> {
    headers: Headers,
    blocks: Blocks<'a>,
    edit: Edit,
    data_write: Option<Uuid>,
}

impl PreparedResize<'_> {
    /// The block where the old disk ends, if it will be partially present, and where its sector bitmap is.
    pub fn border(&self) -> Option<(u64, Extent)> {
        match &self.blocks {
            Blocks::Grow(growth) => growth.border(),
            Blocks::Stay | Blocks::Shrink(_) => None,
        }
    }

    /// Changes nothing: the file is as long as it was before.
    pub async fn give_up<D: Disk>(self, disk: &D) {
        if let Blocks::Grow(growth) = &self.blocks {
            growth.room().give_up(disk).await;
        }
    }

    /// Steps 2 to 5, under the new FileWriteGuid `file_write`; opens the image again. The file carries no
    /// other FileWriteGuid in between.
    ///
    /// # Errors
    /// I/O errors: the image is as it was, or as it is to be with space that is still to be given back.
    pub async fn carry_out<D: Disk>(
        self,
        disk: &D,
        file_write: Uuid,
        mut new_guid: impl FnMut() -> Uuid,
    ) -> Result<WritableImage> {
        let Self { mut headers, blocks, edit, data_write } = self;
        sync(disk).await?;
        let data_write = data_write.filter(|_| !planted(Plant::SilentChange));
        let early = data_write.filter(|_| planted(Plant::EarlyOrphans));
        let change = |header: &mut Header| {
            header.file_write_guid = file_write;
            header.data_write_guid = early.unwrap_or(header.data_write_guid);
        };
        headers.update(disk, change).await?;
        if !planted(Plant::EarlyRegion) {
            blocks.prepare(disk).await?;
        }
        edit.write(disk, &mut headers, data_write, new_guid()).await?;
        let gives_back = match &blocks {
            Blocks::Stay => false,
            Blocks::Grow(growth) => growth.moves_bat(),
            Blocks::Shrink(shrink) => {
                shrink.finish(disk).await?;
                true
            }
        };
        let image = Image::open_for_writing(disk, &mut new_guid).await?;
        if !gives_back {
            return Ok(image);
        }
        give_back(&image, disk).await?;
        Image::open_for_writing(disk, new_guid).await
    }
}

impl WritableImage {
    /// Gives the image on `disk`, which was not written since it was opened, this `metadata`; opens it
    /// again. If there is nothing to change, nothing is written.
    ///
    /// # Errors
    /// Those of [`WritableImage::resize`].
    ///
    /// # Panics
    /// If it would be another kind of image, or a disk of another size.
    pub async fn amend<D: Disk>(
        self,
        disk: &D,
        metadata: &Metadata,
        new_guid: impl FnMut() -> Uuid,
    ) -> Result<Self> {
        assert_eq!(metadata.virtual_size, self.metadata.virtual_size, "the disk keeps its size");
        let change =
            Resize { metadata: metadata.clone(), parent_bytes: 0, data_write: None, zero_from: None };
        self.resize(disk, &change, new_guid).await
    }

    /// Makes `to` of the image on `disk`, which was not written since it was opened; opens it again. If there
    /// is nothing to change, nothing is written. What comes into the disk is zero; blocks that leave it are
    /// given up.
    ///
    /// # Errors
    /// Before anything is written: [`Kind::Unsupported`] if the parent locator would exceed an item, the
    /// metadata region or the log has no room, the file would be too long, or the image cannot be written;
    /// corrupt if the metadata contradicts the format; [`Kind::NoSpace`] if the host has no room for what
    /// must have its space at once. I/O errors, after which the image is as it was, or as it is to be with
    /// space that is still to be given back.
    ///
    /// # Panics
    /// If it would be another kind of image.
    pub async fn resize<D: Disk>(
        self,
        disk: &D,
        to: &Resize,
        mut new_guid: impl FnMut() -> Uuid,
    ) -> Result<Self> {
        if to.metadata == self.metadata {
            return Ok(self);
        }
        let ready = self.prepare_resize(disk, to).await?;
        ready.carry_out(disk, new_guid(), new_guid).await
    }

    /// Step 1 of [`Self::resize`], for an image whose metadata differs from what is asked.
    ///
    /// # Errors
    /// Those of [`Self::resize`]: nothing has changed.
    pub async fn prepare_resize<D: Disk>(&self, disk: &D, to: &Resize) -> Result<PreparedResize<'_>> {
        let (blocks, edit) = self.plan_resize(disk, to).await?;
        edit.reserve(disk).await?;
        self.make_room(disk, &blocks).await?;
        Ok(PreparedResize { headers: Headers::new(&self.header)?, blocks, edit, data_write: to.data_write })
    }

    /// What changes, and the log entry that has all of it that must change at once. Nothing is written.
    async fn plan_resize<D: ReadDisk>(&self, disk: &D, to: &Resize) -> Result<(Blocks<'_>, Edit)> {
        let Metadata { virtual_size, .. } = to.metadata;
        let found = &self.metadata;
        assert_eq!(
            (to.metadata.kind(), to.metadata.block_size, to.metadata.logical_sector_size),
            (found.kind(), found.block_size, found.logical_sector_size),
            "what blocks mean does not change"
        );
        to.metadata.check()?;
        self.check_writable()?;
        let mut edit = self.items_edit(disk, &to.metadata).await?;
        let blocks = match virtual_size.cmp(&found.virtual_size) {
            Ordering::Greater => {
                let growth = Growth::plan(self, virtual_size, to.parent_bytes, to.zero_from)?;
                growth.lay(disk, &mut edit).await?;
                Blocks::Grow(growth)
            }
            Ordering::Less => {
                let shrink = Shrink::plan(self, virtual_size);
                shrink.lay(disk, &mut edit).await?;
                Blocks::Shrink(shrink)
            }
            Ordering::Equal => Blocks::Stay,
        };
        assert!(edit.page_count() > 0, "what differs is in an item");
        if edit.page_count() > MAX_DESCRIPTORS_WRITTEN {
            return Err(Error::new(Kind::Unsupported, "the change is too long for one log entry")
                .in_structure("metadata")
                .remedy("copy the image into a new one"));
        }
        Ok((blocks, edit))
    }

    /// Step 1.
    async fn make_room<D: Disk>(&self, disk: &D, blocks: &Blocks<'_>) -> Result<()> {
        for extent in [self.layout.log, self.layout.metadata] {
            let reserved = disk.reserve(extent.offset, extent.length).await;
            reserved.map_err(|error| Error::io("making room for the change", error).at(extent.offset))?;
        }
        match blocks {
            Blocks::Grow(growth) => growth.room().make(disk).await,
            Blocks::Stay | Blocks::Shrink(_) => Ok(()),
        }
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
}
