//! Moving a region of an image at rest: the BAT or the metadata.
//!
//! Order, each step durable before the next:
//!
//! 1. new FileWriteGuid in both headers;
//! 2. the new place has what the old one has. Nothing names it yet: a cut leaves free space;
//! 3. one [`Edit`] of both region tables: until it is durable the old place counts, from then on the new one.
//!    It ends with an empty log, so that no replay writes to the old place, which is free from then on.
//!
//! [Rules 22 and 103](crate::design::vhdx_rules#rule-103).

use uuid::Uuid;

use super::edit::Edit;
use super::headers::Headers;
use super::open::{Image, WritableImage, extent_of};
use super::room::{Provision, Room};
use super::space::Extent;
use super::view::sync;
use crate::disk::{Disk, PAGE_BYTES, ReadDisk};
use crate::error::{Error, Result};
use crate::format::{MIB, guid, index, region};

impl WritableImage {
    /// Moves the region `which`, the BAT or the metadata, to `to`, of which nothing is used and which is as
    /// long; the file grows if need be. The old place is free then, and still has its content.
    ///
    /// # Errors
    /// I/O errors, no space included: the image is then as it was, or as it is to be.
    ///
    /// # Panics
    /// If the image has no such region, or it does not fit there.
    pub async fn move_region<D: Disk>(
        self,
        disk: &D,
        which: Uuid,
        to: Extent,
        mut new_guid: impl FnMut() -> Uuid,
    ) -> Result<Self> {
        self.check_writable()?;
        let region = self.regions.table.entries().iter().find(|region| region.guid == which);
        let from = extent_of(*region.expect("the image has the region"));
        assert!([guid::REGION_BAT, guid::REGION_METADATA].contains(&which), "no other is understood");
        assert_eq!(from.length, to.length, "a region that only moves keeps its length");
        let mut edit = Edit::default();
        lay_tables(&self, disk, &mut edit, which, to).await?;
        let mut room = Room::of(&self, None);
        // Metadata has no holes: it must never lack the room for a change.
        let provision = if which == guid::REGION_METADATA { Provision::Now } else { Provision::Later };
        room.take_at(to, provision)?;
        edit.reserve(disk).await?;
        room.make(disk).await?;
        let mut headers = Headers::new(&self.header)?;
        let file_write = new_guid();
        sync(disk).await?; // a header is written only where the other one is durable
        headers.update(disk, |header| header.file_write_guid = file_write).await?;
        room.clear(disk).await?;
        copy_stored(disk, from, to.offset).await?;
        edit.write(disk, &mut headers, None, new_guid()).await?;
        Image::open_for_writing(disk, new_guid).await
    }
}

/// Has both region tables of `image` say that the region `which` is at `to`.
pub(super) async fn lay_tables<D: ReadDisk>(
    image: &Image,
    disk: &D,
    edit: &mut Edit,
    which: Uuid,
    to: Extent,
) -> Result<()> {
    let length = u32::try_from(to.length).expect("a region has less than 4 GiB");
    let table = image.regions.table.with_region_at(which, to.offset, length)?.encode();
    for offset in region::OFFSETS {
        edit.lay(disk, offset, &table).await?;
    }
    Ok(())
}

/// Copies what the host stores of `from` to `to`, which is zero.
async fn copy_stored<D: Disk>(disk: &D, from: Extent, to: u64) -> Result<()> {
    let mut at = from.offset;
    while at < from.end() {
        let copying = |error| Error::io("copying a region", error).at(at);
        let found = disk.next_data(at).await.map_err(copying)?;
        let Some(found) = found.filter(|found| *found < from.end()) else { break };
        let start = found - found % PAGE_BYTES as u64;
        let end = from.end().min(start + MIB);
        let bytes = disk.read(start, index(end - start)).await.map_err(copying)?;
        disk.write(to + (start - from.offset), bytes).await.map_err(copying)?;
        assert!(end > at, "the copy goes forward, from {at} to {end}");
        at = end;
    }
    Ok(())
}
