//! A disk at rest that shrinks: what its image gives up.
//!
//! Order, each step durable before the next:
//!
//! 1. one [`Edit`]: the size, the dropped slots that share a page with those that stay, and, if fewer MiB are
//!    enough, both region tables with a shorter BAT. A cut before it leaves the disk as it was;
//! 2. dropped slots in pages of their own are zeroed in place: nothing reads them, and what is there must not
//!    mislead a program that makes the disk larger again;
//! 3. the space of the dropped blocks goes back to the host, and the file is cut. The log is empty by then:
//!    no replay brings a block back whose space is gone.
//!
//! The last block keeps what it has behind the end of the disk: that is zeroed when the disk grows.
//!
//! [Rules 82 and 104](crate::design::vhdx_rules#rule-104).

use super::edit::Edit;
use super::open::Image;
use super::region_move::lay_tables;
use super::room::{cut, punch_free_runs, zero_stored};
use super::space::Extent;
use super::view::sync;
use crate::disk::{Disk, PAGE_BYTES, ReadDisk};
use crate::error::Result;
use crate::format::bat::{BatEntry, ENTRY_SIZE, Geometry, PayloadState, Role};
use crate::format::metadata::{DiskType, Metadata};
use crate::format::{MIB, guid};

/// See the module's head.
pub(super) struct Shrink<'a> {
    image: &'a Image,
    /// As it will be.
    geometry: Geometry,
    /// The BAT region as it will be: in its place, and perhaps shorter.
    bat: Extent,
}

impl<'a> Shrink<'a> {
    /// What `image` gives up for a disk of `virtual_size` bytes, fewer than it has.
    pub(super) fn plan(image: &'a Image, virtual_size: u64) -> Self {
        let Metadata { block_size, logical_sector_size, has_parent, .. } = image.metadata;
        assert!(virtual_size < image.metadata.virtual_size, "the disk shrinks");
        let geometry = Geometry::new(virtual_size, block_size, logical_sector_size, has_parent);
        let bat = image.layout.bat;
        let length = geometry.bat_length().next_multiple_of(MIB).clamp(MIB, bat.length);
        Self { image, geometry, bat: Extent { length, ..bat } }
    }

    /// Lays what must change together with the size.
    pub(super) async fn lay<D: ReadDisk>(&self, disk: &D, edit: &mut Edit) -> Result<()> {
        if self.bat != self.image.layout.bat {
            lay_tables(self.image, disk, edit, guid::REGION_BAT, self.bat).await?;
        }
        let blocks = self.geometry.block_count();
        let first = self.geometry.payload_slot(blocks).min(self.geometry.slot_count());
        let old = self.image.map.geometry();
        let shared = self.own_pages().min(old.slot_count());
        for (slot, role) in self.geometry.walk(first..shared) {
            // The bitmap of a chunk that keeps blocks stays.
            let stays = matches!(role, Role::Bitmap(chunk) if chunk < self.geometry.bitmap_block_count());
            if !stays && self.image.map.load_slot(slot).entry.0 != 0 {
                edit.lay(disk, self.place(slot), &BatEntry::not_present().write()).await?;
            }
        }
        Ok(())
    }

    /// The first slot of the pages in which no slot stays.
    fn own_pages(&self) -> u64 {
        self.geometry.slot_count().next_multiple_of((PAGE_BYTES / ENTRY_SIZE) as u64)
    }

    /// Step 2, once the size is durable.
    pub(super) async fn finish<D: Disk>(&self, disk: &D) -> Result<()> {
        let old_end = self.place(self.image.map.geometry().slot_count()).next_multiple_of(PAGE_BYTES as u64);
        let end = old_end.min(self.bat.end());
        zero_stored(disk, self.place(self.own_pages()).min(end), end).await?;
        sync(disk).await
    }

    fn place(&self, slot: u64) -> u64 {
        self.bat.offset + slot * ENTRY_SIZE as u64
    }
}

/// Gives the host back what nothing names any longer in `image`, and cuts the unused end of its file; a fixed
/// image keeps what its missing blocks will need. The log is empty, and durably so.
pub(super) async fn give_back<D: Disk>(image: &Image, disk: &D) -> Result<()> {
    punch_free_runs(disk, &image.space).await?;
    let length = image.space.used_end() + missing_bytes(image);
    if length < image.layout.file_length {
        cut(disk, &image.space, length).await?;
    }
    sync(disk).await
}

/// What the blocks of a fixed image take that have no space.
fn missing_bytes(image: &Image) -> u64 {
    if image.metadata.kind() != DiskType::Fixed {
        return 0;
    }
    let geometry = image.map.geometry();
    let slots = image.stored_slots.iter().flat_map(|slots| geometry.walk(slots.clone()));
    let is_present = |role: &Role| match role {
        Role::Block(block) => {
            image.map.load(*block).entry.payload_state() == Some(PayloadState::FullyPresent)
        }
        Role::Bitmap(_) | Role::Nothing => false,
    };
    let present = slots.filter(|(_, role)| is_present(role)).count() as u64;
    assert!(present <= geometry.block_count(), "no block is there twice");
    (geometry.block_count() - present) * geometry.block_size()
}
