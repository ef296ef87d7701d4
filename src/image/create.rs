//! Making a new image.
//!
//! Order: everything else is written and synced first, the file identifier last: a file that was cut short
//! while it was made is never taken for an image.
//!
//! [Rules 107 and 108](crate::design::vhdx_rules#rule-107).

use uuid::Uuid;

use super::open::BAT_CHUNK_BYTES;
use super::space::{Extent, MAX_FILE_BYTES};
use super::view::sync;
use crate::disk::{Buffer, Disk, PAGE_BYTES};
use crate::error::{Error, Kind, Result};
use crate::format::bat::{BatEntry, ENTRY_SIZE, Geometry};
use crate::format::file_id::FileId;
use crate::format::header::{self, Header};
use crate::format::locator::ParentLocator;
use crate::format::metadata::Metadata;
use crate::format::region::{self, Region, RegionTable};
use crate::format::{MAX_VIRTUAL_SIZE, MIB, guid};
use crate::simulation::log_unit;

/// The default size of a block of a new image, bytes: file systems stay small in it.
pub const DEFAULT_BLOCK_SIZE: u32 = 2 << 20;

/// The default length of the log of a new image, bytes.
pub const DEFAULT_LOG_LENGTH: u32 = 1 << 20;

/// The length of the metadata region of a new image, bytes.
const METADATA_BYTES: u64 = MIB;

/// The initial state of the blocks of a dynamic image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InitialState {
    /// As Windows makes them: content undefined to others, zero to this program.
    NotPresent,
    /// Defined to be zero for every reader.
    Zero,
}

/// The properties of a new image.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Bytes of the virtual disk; a multiple of the logical sector size, at most 64 TiB.
    pub virtual_size: u64,
    /// All space is provisioned and stays so.
    pub fixed: bool,
    /// Bytes of a block: a power of two, 1 MiB to 256 MiB.
    pub block_size: u32,
    /// Bytes of the log: a multiple of 1 MiB, at most 1 GiB.
    pub log_length: u32,
    /// 512 or 4096.
    pub logical_sector_size: u32,
    /// 512 or 4096.
    pub physical_sector_size: u32,
    /// Of a dynamic image's blocks.
    pub initial_state: InitialState,
    /// Makes it a differencing image: no block is there, and all content is the parent's.
    pub parent: Option<ParentRef>,
}

/// What a child has from its parent, besides the sizes of disk and sectors.
#[derive(Clone, Debug)]
pub struct ParentRef {
    /// How the child finds its parent.
    pub locator: ParentLocator,
    /// They are the same virtual disk.
    pub disk_id: Uuid,
}

struct Plan {
    geometry: Geometry,
    metadata: Metadata,
    header: Header,
    regions: RegionTable,
    bat: Extent,
    /// Where the payload of a fixed image starts; the file's length for others.
    payload: u64,
    file_length: u64,
}

impl NewImage {
    /// Writes the image to an empty file.
    ///
    /// # Errors
    /// Usage if the numbers are not those of a legal image; no space and other I/O errors, after which the
    /// file is no image.
    pub async fn write<D: Disk>(&self, disk: &D, mut new_guid: impl FnMut() -> Uuid) -> Result<()> {
        self.check()?;
        let plan = self.plan(&mut new_guid)?;
        let doing = |what: &str| format!("{what} of the new image");
        let grown = disk.grow(plan.file_length).await;
        grown.map_err(|error| Error::io(doing("making the file"), error))?;
        if self.fixed {
            let provisioned = disk.reserve(plan.payload, plan.file_length - plan.payload).await;
            provisioned.map_err(|error| Error::io(doing("provisioning the space"), error))?;
        }
        self.write_bat(disk, &plan).await?;
        let metadata = plan.metadata.encode_region();
        assert_eq!(metadata.len() as u64, METADATA_BYTES, "the metadata fills its region");
        write(disk, plan.regions.metadata().offset, &metadata).await?;
        for offset in region::OFFSETS {
            write(disk, offset, &plan.regions.encode()).await?;
        }
        let mut header = plan.header;
        for offset in header::OFFSETS {
            write(disk, offset, &header.encode()).await?;
            header.sequence_number += 1;
        }
        sync(disk).await?;
        let creator = concat!("vhdx-ublk ", env!("CARGO_PKG_VERSION"));
        write(disk, 0, &FileId::encode(creator)).await?;
        sync(disk).await
    }

    fn check(&self) -> Result<()> {
        let usage = |message: String| Err(Error::new(Kind::Usage, message));
        for sector in [self.logical_sector_size, self.physical_sector_size] {
            if !crate::format::SECTOR_SIZES.contains(&sector) {
                return usage(format!("a sector of {sector} bytes: the format has 512 and 4096"));
            }
        }
        let blocks = crate::format::MIN_BLOCK_SIZE..=crate::format::MAX_BLOCK_SIZE;
        if !self.block_size.is_power_of_two() || !blocks.contains(&self.block_size) {
            return usage(format!(
                "a block of {} bytes: the format has powers of two from 1 MiB to 256 MiB",
                self.block_size
            ));
        }
        if self.virtual_size > MAX_VIRTUAL_SIZE {
            return usage(format!("a disk of {} bytes: the format ends at 64 TiB", self.virtual_size));
        }
        if self.virtual_size == 0 || !self.virtual_size.is_multiple_of(self.logical_sector_size.into()) {
            return usage(format!(
                "a disk of {} bytes is no whole number of sectors of {} bytes",
                self.virtual_size, self.logical_sector_size
            ));
        }
        let dynamic = !self.fixed && self.initial_state == InitialState::NotPresent;
        if self.parent.is_some() && !dynamic {
            return usage("a differencing image begins with no blocks of its own".into());
        }
        let log = u64::from(self.log_length);
        if log == 0 || !log.is_multiple_of(log_unit(MIB)) || self.log_length > header::MAX_LOG_LENGTH {
            return usage(format!("a log of {log} bytes: the format has whole MiB, at most 1 GiB"));
        }
        Ok(())
    }

    fn plan(&self, new_guid: &mut impl FnMut() -> Uuid) -> Result<Plan> {
        let differencing = self.parent.is_some();
        let geometry =
            Geometry::new(self.virtual_size, self.block_size, self.logical_sector_size, differencing);
        let metadata = Metadata {
            block_size: self.block_size,
            leave_blocks_allocated: self.fixed,
            has_parent: differencing,
            virtual_size: self.virtual_size,
            disk_id: self.parent.as_ref().map_or_else(&mut *new_guid, |parent| parent.disk_id),
            logical_sector_size: self.logical_sector_size,
            physical_sector_size: self.physical_sector_size,
            parent_locator: self.parent.as_ref().map(|parent| parent.locator.clone()),
        };
        let header = Header {
            sequence_number: 1,
            file_write_guid: new_guid(),
            data_write_guid: new_guid(),
            log_guid: Uuid::nil(),
            log_version: 0,
            log_offset: MIB,
            log_length: self.log_length,
        };
        let metadata_offset = MIB + u64::from(self.log_length).next_multiple_of(MIB);
        let bat_length = geometry.bat_length().next_multiple_of(MIB);
        let bat = Extent { offset: metadata_offset + METADATA_BYTES, length: bat_length };
        let regions = RegionTable::new(vec![
            required(guid::REGION_BAT, bat),
            required(guid::REGION_METADATA, Extent { offset: metadata_offset, length: METADATA_BYTES }),
        ])?;
        let payload = bat.end();
        let blocks = if self.fixed { geometry.block_count() } else { 0 };
        let file_length = payload + blocks * geometry.block_size();
        for offset in [metadata_offset, bat.offset, bat.length, payload, file_length] {
            assert!(offset.is_multiple_of(MIB), "everything is whole MiB, not {offset}");
        }
        assert!(bat.length >= geometry.bat_length(), "every slot has its place");
        assert!(file_length <= MAX_FILE_BYTES, "the largest image is one that can be opened");
        Ok(Plan { geometry, metadata, header, regions, bat, payload, file_length })
    }

    async fn write_bat<D: Disk>(&self, disk: &D, plan: &Plan) -> Result<()> {
        if !self.fixed && self.initial_state == InitialState::NotPresent {
            return Ok(());
        }
        let mut done = 0;
        while done < plan.geometry.bat_length() {
            let length = (plan.geometry.bat_length() - done).min(BAT_CHUNK_BYTES);
            let mut chunk = vec![0; usize::try_from(length).expect("at most 1 MiB")];
            let first = done / ENTRY_SIZE as u64;
            for (slot, word) in (first..).zip(chunk.as_chunks_mut::<ENTRY_SIZE>().0) {
                *word = self.initial_entry(plan, slot).write();
            }
            assert!(done + length <= plan.bat.length, "the BAT ends in its region");
            write(disk, plan.bat.offset + done, &chunk).await?;
            done += length;
        }
        Ok(())
    }

    fn initial_entry(&self, plan: &Plan, slot: u64) -> BatEntry {
        match plan.geometry.block_of_slot(slot) {
            Some(block) if self.fixed => BatEntry::present(plan.payload + block * plan.geometry.block_size()),
            Some(_) => BatEntry::zero(),
            None => BatEntry::not_present(),
        }
    }
}

fn required(guid: Uuid, extent: Extent) -> Region {
    let length = u32::try_from(extent.length).expect("a BAT has at most 513 MiB");
    Region { guid, offset: extent.offset, length, required: true }
}

async fn write<D: Disk>(disk: &D, offset: u64, bytes: &[u8]) -> Result<()> {
    assert!(offset.is_multiple_of(PAGE_BYTES as u64), "pages are written, at {offset}");
    let mut buffer = Buffer::zeroed(bytes.len().next_multiple_of(PAGE_BYTES));
    buffer[..bytes.len()].copy_from_slice(bytes);
    disk.write(offset, buffer).await.map_err(|error| Error::io("writing the new image", error).at(offset))
}
