//! Making a new image.
//!
//! Order: everything else is written and synced first, the file identifier last: a file that was cut short
//! while it was made is never taken for an image.
//!
//! [Rules 107 and 108](crate::design::vhdx_rules#rule-107).

use std::ops::Range;

use uuid::Uuid;

use super::bat_reader::BAT_CHUNK_BYTES;
use super::space::{Extent, MAX_FILE_BYTES};
use super::view::sync;
use crate::disk::{Buffer, Disk, PAGE_BYTES};
use crate::error::{Error, Kind, Result};
use crate::format::bat::{BatEntry, ENTRY_SIZE, Geometry, Role};
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
}

/// A new image whose blocks get their space, and are written by the caller, before anything else is.
///
/// It takes 8 bytes of memory for each block that has space, unless it is fixed.
pub struct Draft {
    new: NewImage,
    /// Where the BAT lies; behind the blocks if that is not known yet.
    bat: Option<Extent>,
    /// Where the first block lies.
    payload: u64,
    /// Where the last block ends.
    end: u64,
    /// The blocks that have space, in the order of the file, and of the disk: their numbers, and where they
    /// lie in MiB.
    placed: Vec<(u32, u32)>,
}

impl NewImage {
    /// Writes the image to an empty file.
    ///
    /// # Errors
    /// Usage if the numbers are not those of a legal image; no space and other I/O errors, after which the
    /// file is no image.
    pub async fn write<D: Disk>(&self, disk: &D, new_guid: impl FnMut() -> Uuid) -> Result<()> {
        let draft = self.draft()?;
        let grown = disk.grow(draft.end).await;
        grown.map_err(|error| Error::io("making the file of the new image", error))?;
        if self.fixed {
            let provisioned = disk.reserve(draft.payload, draft.end - draft.payload).await;
            provisioned.map_err(|error| Error::io("provisioning the space of the new image", error))?;
        }
        draft.finish(disk, new_guid).await
    }

    /// The image as a draft.
    ///
    /// # Errors
    /// Usage if the numbers are not those of a legal image.
    pub fn draft(&self) -> Result<Draft> {
        self.check()?;
        let length = self.geometry().bat_length().next_multiple_of(MIB);
        let bat = Extent { offset: self.metadata_offset() + METADATA_BYTES, length };
        let mut draft = Draft {
            new: self.clone(),
            bat: Some(bat),
            payload: bat.end(),
            end: bat.end(),
            placed: Vec::new(),
        };
        draft.reach(self.virtual_size);
        Ok(draft)
    }

    /// The image as a draft whose disk has a size that is known only when it is finished, of all blocks that
    /// have content then.
    ///
    /// # Errors
    /// Usage if the numbers are not those of a legal image.
    pub fn draft_of_unknown_size(&self) -> Result<Draft> {
        let new = Self { virtual_size: self.logical_sector_size.into(), ..self.clone() };
        new.check()?;
        let payload = self.metadata_offset() + METADATA_BYTES;
        Ok(Draft { new, bat: None, payload, end: payload, placed: Vec::new() })
    }

    fn metadata_offset(&self) -> u64 {
        MIB + u64::from(self.log_length).next_multiple_of(MIB)
    }

    fn geometry(&self) -> Geometry {
        Geometry::new(self.virtual_size, self.block_size, self.logical_sector_size, self.parent.is_some())
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

    fn plan(&self, bat: Extent, new_guid: &mut impl FnMut() -> Uuid) -> Result<Plan> {
        let metadata = Metadata {
            block_size: self.block_size,
            leave_blocks_allocated: self.fixed,
            has_parent: self.parent.is_some(),
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
        let offset = self.metadata_offset();
        let regions = RegionTable::new(vec![
            required(guid::REGION_BAT, bat),
            required(guid::REGION_METADATA, Extent { offset, length: METADATA_BYTES }),
        ])?;
        let geometry = self.geometry();
        for offset in [offset, bat.offset, bat.length] {
            assert!(offset.is_multiple_of(MIB), "everything is whole MiB, not {offset}");
        }
        assert!(bat.length >= geometry.bat_length(), "every slot has its place");
        Ok(Plan { geometry, metadata, header, regions, bat })
    }
}

impl Draft {
    /// Bytes of a block.
    pub fn block_size(&self) -> u64 {
        self.new.block_size.into()
    }

    /// The bytes of the file: all blocks that have space, and what lies before them.
    pub fn length(&self) -> u64 {
        self.end
    }

    /// Where byte `virtual_offset` of the disk lies in the file, in a block that gets space now if it has
    /// none.
    ///
    /// # Panics
    /// If an earlier block gets space after a later one.
    pub fn place(&mut self, virtual_offset: u64) -> u64 {
        let (block, within) = (virtual_offset / self.block_size(), virtual_offset % self.block_size());
        if self.new.fixed {
            self.reach(virtual_offset + 1);
            return self.payload + virtual_offset;
        }
        let number = u32::try_from(block).expect("64 TiB have fewer blocks");
        match self.placed.last() {
            Some(&(last, place)) if last == number => return u64::from(place) * MIB + within,
            last => assert!(last.is_none_or(|&(last, _)| last < number), "block {number} after {last:?}"),
        }
        let place = self.end;
        self.placed.push((number, u32::try_from(place / MIB).expect("a file has less than 2^32 MiB")));
        self.end += self.block_size();
        place + within
    }

    /// The disk is at least `size` bytes long: a fixed image has space for that.
    pub fn reach(&mut self, size: u64) {
        if self.new.fixed {
            self.end = self.end.max(self.payload + size.next_multiple_of(self.block_size()));
        }
    }

    /// The disk turned out to be `size` bytes long.
    ///
    /// # Errors
    /// Usage if no image can have that size.
    pub fn set_size(&mut self, size: u64) -> Result<()> {
        self.new.virtual_size = size;
        self.new.check()?;
        self.reach(size);
        Ok(())
    }

    /// Writes everything but the blocks to their file, which the caller has written.
    ///
    /// # Errors
    /// I/O errors, after which the file is no image.
    pub async fn finish<D: Disk>(mut self, disk: &D, mut new_guid: impl FnMut() -> Uuid) -> Result<()> {
        let length = self.new.geometry().bat_length().next_multiple_of(MIB);
        let bat = self.bat.unwrap_or(Extent { offset: self.end, length });
        self.end = self.end.max(bat.end());
        assert!(self.end <= MAX_FILE_BYTES, "the largest image is one that can be opened");
        let plan = self.new.plan(bat, &mut new_guid)?;
        let making = |error| Error::io("making the file of the new image", error);
        if disk.length().await.map_err(making)? < self.end {
            disk.grow(self.end).await.map_err(making)?;
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

    /// Writes the chunks of the BAT that have an entry; the others are holes, which read as absent blocks.
    async fn write_bat<D: Disk>(&self, disk: &D, plan: &Plan) -> Result<()> {
        let dense = self.new.fixed || self.new.initial_state == InitialState::Zero;
        let slots = plan.geometry.slot_count();
        let mut placed = &self.placed[..];
        let mut first = 0;
        while first < slots {
            let past = (first + BAT_CHUNK_BYTES / ENTRY_SIZE as u64).min(slots);
            let here =
                placed.partition_point(|(block, _)| plan.geometry.payload_slot((*block).into()) < past);
            let (of_chunk, rest) = placed.split_at(here);
            placed = rest;
            if dense || !of_chunk.is_empty() {
                let chunk = self.encode_bat(&plan.geometry, first..past, of_chunk);
                let offset = plan.bat.offset + first * ENTRY_SIZE as u64;
                assert!(offset + chunk.len() as u64 <= plan.bat.end(), "the BAT ends in its region");
                write(disk, offset, &chunk).await?;
            }
            first = past;
        }
        assert!(placed.is_empty(), "every block that has space is in the BAT");
        Ok(())
    }

    /// These slots of the BAT, of which the `placed` blocks have space.
    fn encode_bat(&self, geometry: &Geometry, slots: Range<u64>, placed: &[(u32, u32)]) -> Vec<u8> {
        let mut placed = placed.iter().peekable();
        let mut entry = |block: u64| match placed.next_if(|(placed, _)| u64::from(*placed) == block) {
            Some((_, place)) => BatEntry::present(u64::from(*place) * MIB),
            None if self.new.fixed => BatEntry::present(self.payload + block * self.block_size()),
            None if self.new.initial_state == InitialState::Zero => BatEntry::zero(),
            None => BatEntry::not_present(),
        };
        let entries = geometry.walk(slots).map(|(_, role)| match role {
            Role::Block(block) => entry(block),
            Role::Bitmap(_) | Role::Nothing => BatEntry::not_present(),
        });
        entries.flat_map(BatEntry::write).collect()
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
