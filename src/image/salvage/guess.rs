//! What the metadata said, if some of their items are lost: guessed from the BAT and from the partition
//! table.

use super::NOTHING_LEFT;
use super::items::Items;
use super::notes::Notes;
use super::search::Shape;
use super::source::Source;
use crate::disk::ReadDisk;
use crate::error::{Error, Kind, Result};
use crate::format::bat::{ENTRY_SIZE, Geometry};
use crate::format::metadata::Metadata;
use crate::format::{MAX_VIRTUAL_SIZE, SECTOR_SIZES};
use crate::image::space::Extent;

const METADATA: &str = "metadata";

/// What the header of a GPT begins with, in the disk's second sector.
const GPT: &[u8] = b"EFI PART";

/// Where in it the number of its last sector is: the place of its copy.
const LAST_SECTOR_FIELD: usize = 32;

/// What a partition table says of the disk.
#[derive(Clone, Copy, Default)]
struct Table {
    sector_size: Option<u32>,
    size: Option<u64>,
}

/// The metadata by the `items` that are left, and by what the BAT at `bat` shows of the others.
pub(super) async fn complete<D: ReadDisk>(
    source: &Source<'_, D>,
    items: Items,
    bat: Extent,
    notes: &mut Notes,
) -> Result<Metadata> {
    items.note_harmless(notes);
    let lacks = items.file.is_none() || items.size.is_none() || items.logical.is_none();
    let shape = if lacks { Some(Shape::of(source, bat).await?) } else { None };
    if items.size.is_none() && shape.as_ref().is_none_or(|shape| shape.last_slot.is_none()) {
        let message = "the metadata are lost, and no block is left in the BAT";
        return Err(Error::new(Kind::Corrupt, message).in_structure("metadata").remedy(NOTHING_LEFT));
    }
    let table = match &shape {
        Some(Shape { first_block: Some(offset), .. }) => Table::read(source, *offset).await?,
        _ => Table::default(),
    };
    let logical_sector_size = items.logical.unwrap_or_else(|| {
        let size = table.sector_size.unwrap_or(SECTOR_SIZES[0]);
        notes.guess(METADATA, format!("the Logical Sector Size is lost; {size} bytes are assumed"));
        size
    });
    let shown_child = items.locator.is_some() || shape.as_ref().is_some_and(|shape| shape.has_partial);
    let (block_size, leave_blocks_allocated, says_child) = if let Some(file) = items.file {
        file
    } else {
        let Some(size) = shape.as_ref().and_then(|shape| shape.block_size) else {
            let message = "the File Parameters are lost, and no block shows how large blocks are";
            return Err(Error::new(Kind::Corrupt, message).in_structure("metadata").remedy(NOTHING_LEFT));
        };
        let kind = if shown_child { "a child" } else { "an image without parent" };
        notes.guess(
            METADATA,
            format!("the File Parameters are lost; blocks of {size} bytes and {kind} are assumed"),
        );
        (size, false, shown_child)
    };
    let has_parent = says_child || items.locator.is_some();
    if has_parent && items.locator.is_none() {
        notes.add(METADATA, "the Parent Locator is lost: what only the parents have is missing");
    }
    let sector = u64::from(logical_sector_size);
    let virtual_size = items.size.unwrap_or_else(|| {
        let last = shape.as_ref().and_then(|shape| shape.last_slot);
        let size = size_by(last, block_size, logical_sector_size, has_parent, bat, table);
        notes.guess(METADATA, format!("the Virtual Disk Size is lost; {size} bytes are assumed"));
        size
    });
    Ok(Metadata {
        block_size,
        leave_blocks_allocated,
        has_parent,
        virtual_size: virtual_size.next_multiple_of(sector),
        disk_id: items.disk_id.unwrap_or_default(),
        logical_sector_size,
        physical_sector_size: items.physical.unwrap_or(SECTOR_SIZES[1]),
        parent_locator: items.locator,
    })
}

/// The size of a disk by its partition table if that agrees with the BAT at `bat`, otherwise by the last slot
/// that is set.
fn size_by(
    last: Option<u64>,
    block_size: u32,
    sector_size: u32,
    has_parent: bool,
    bat: Extent,
    table: Table,
) -> u64 {
    let largest = Geometry::new(MAX_VIRTUAL_SIZE, block_size, sector_size, has_parent);
    let blocks = |slot: u64| largest.first_block_from(slot).min(largest.block_count());
    let bytes = |blocks: u64| blocks * u64::from(block_size);
    // The last slot may be a bitmap's: all blocks in front of it are its own.
    let needed = last.map_or(0, |slot| largest.block_of_slot(slot).map_or(blocks(slot), |block| block + 1));
    let most = blocks(bat.length / ENTRY_SIZE as u64);
    let fits = |size: &u64| (bytes(needed.saturating_sub(1))..=bytes(most)).contains(size);
    let size = table.size.filter(fits).unwrap_or(bytes(needed));
    size.clamp(u64::from(sector_size), MAX_VIRTUAL_SIZE)
}

impl Table {
    /// What the GPT says of a disk whose first block lies at `offset` in the file.
    async fn read<D: ReadDisk>(source: &Source<'_, D>, offset: u64) -> Result<Self> {
        let front = source.read(offset, 2 * SECTOR_SIZES[1] as usize).await?.bytes;
        for sector_size in SECTOR_SIZES {
            let header = &front[sector_size as usize..];
            if header.starts_with(GPT) {
                let field = header[LAST_SECTOR_FIELD..].first_chunk().expect("a sector follows");
                let last = u64::from_le_bytes(*field);
                let size = last.checked_add(1).and_then(|count| count.checked_mul(sector_size.into()));
                return Ok(Self { sector_size: Some(sector_size), size });
            }
        }
        Ok(Self::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::MIB;

    /// A table counts only if the BAT can be one of a disk of that size.
    #[test]
    fn the_size_is_one_that_the_bat_can_have() {
        let bat = Extent { offset: 3 * MIB, length: MIB };
        let by = |last, size| size_by(last, 1 << 21, 512, false, bat, Table { sector_size: None, size });
        assert_eq!(by(Some(4), None), 5 << 21);
        assert_eq!(by(Some(4), Some((5 << 21) - 512)), (5 << 21) - 512);
        assert_eq!(by(Some(4), Some(1 << 30)), 1 << 30);
        assert_eq!(by(Some(4), Some(1 << 20)), 5 << 21, "a block lies behind it");
        assert_eq!(by(Some(4), Some(1 << 40)), 5 << 21, "no BAT of a MiB has as many blocks");
        assert_eq!(by(Some(4096), None), 4096 << 21, "a sector bitmap's");
        assert_eq!(by(None, None), 512);
    }
}
