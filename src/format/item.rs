//! An item of the metadata by itself, for files whose metadata are damaged: what it says, if that is
//! something the format allows.

use uuid::Uuid;

use super::locator::ParentLocator;
use super::metadata::{Entry, TABLE_SIZE};
use super::{MAX_BLOCK_SIZE, MAX_ITEM_LENGTH, MAX_VIRTUAL_SIZE, MIN_BLOCK_SIZE, SECTOR_SIZES, guid};

/// What an item says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// File Parameters.
    File {
        /// Bytes of a payload block.
        block_size: u32,
        /// Whether blocks keep their space.
        leave_blocks_allocated: bool,
        /// Whether the image is a child.
        has_parent: bool,
    },
    /// Virtual Disk Size, bytes.
    Size(u64),
    /// Virtual Disk ID.
    DiskId(Uuid),
    /// Logical Sector Size, bytes.
    LogicalSector(u32),
    /// Physical Sector Size, bytes.
    PhysicalSector(u32),
    /// Parent Locator.
    Parent(ParentLocator),
}

/// The items of fixed length, in the order in which every known program puts them behind the table, and their
/// lengths in bytes. A locator follows.
const USUAL: [(Uuid, u32); 5] = [
    (guid::FILE_PARAMETERS, 8),
    (guid::VIRTUAL_DISK_SIZE, 8),
    (guid::VIRTUAL_DISK_ID, 16),
    (guid::LOGICAL_SECTOR_SIZE, 4),
    (guid::PHYSICAL_SECTOR_SIZE, 4),
];

impl Item {
    /// What the item `item_id` says whose bytes are `bytes`; nothing if that is not what such an item can
    /// say.
    pub fn parse(item_id: Uuid, bytes: &[u8]) -> Option<Self> {
        let word = || bytes.try_into().ok().map(u32::from_le_bytes);
        let long = || bytes.try_into().ok().map(u64::from_le_bytes);
        match item_id {
            guid::FILE_PARAMETERS => long().and_then(file_parameters),
            guid::VIRTUAL_DISK_SIZE => long()
                .filter(|&size| (1..=MAX_VIRTUAL_SIZE).contains(&size) && size % 512 == 0)
                .map(Self::Size),
            guid::VIRTUAL_DISK_ID => bytes.try_into().ok().map(|id| Self::DiskId(guid::read(id))),
            guid::LOGICAL_SECTOR_SIZE => {
                word().filter(|size| SECTOR_SIZES.contains(size)).map(Self::LogicalSector)
            }
            guid::PHYSICAL_SECTOR_SIZE => {
                word().filter(|size| SECTOR_SIZES.contains(size)).map(Self::PhysicalSector)
            }
            guid::PARENT_LOCATOR => ParentLocator::parse(bytes).ok().map(Self::Parent),
            _ => None,
        }
    }

    /// Where items usually lie in a region of `region_length` bytes, whatever its table says. That of the
    /// locator reaches to the end of what an item may have.
    pub fn usual_places(region_length: u32) -> Vec<Entry> {
        let mut offset = u32::try_from(TABLE_SIZE).expect("64 KiB");
        let mut places = Vec::new();
        let mut place = |item_id, length| {
            let (is_user, is_virtual_disk, is_required) = (false, false, true);
            if length > 0 && offset + length <= region_length {
                places.push(Entry { item_id, offset, length, is_user, is_virtual_disk, is_required });
            }
            offset += length;
            offset
        };
        let end = USUAL.map(|(item_id, length)| place(item_id, length))[USUAL.len() - 1];
        place(guid::PARENT_LOCATOR, region_length.saturating_sub(end).min(MAX_ITEM_LENGTH));
        places
    }
}

fn file_parameters(value: u64) -> Option<Item> {
    let [block_size, flags] =
        [value, value >> 32].map(|half| u32::try_from(half & 0xffff_ffff).expect("half"));
    let sound = block_size.is_power_of_two() && (MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&block_size);
    let [leave_blocks_allocated, has_parent] = [1, 2].map(|bit| flags & bit != 0);
    (sound && flags <= 3).then_some(Item::File { block_size, leave_blocks_allocated, has_parent })
}

#[cfg(test)]
mod tests {
    use super::super::metadata::{Metadata, Table};
    use super::*;

    fn metadata() -> Metadata {
        let mut locator = ParentLocator::default();
        locator.set("relative_path", "base.vhdx");
        Metadata {
            block_size: 1 << 21,
            leave_blocks_allocated: false,
            has_parent: true,
            virtual_size: 5 << 30,
            disk_id: Uuid::from_u128(7),
            logical_sector_size: 4096,
            physical_sector_size: 512,
            parent_locator: Some(locator),
        }
    }

    /// Both ways to the items lead to the same ones: the table, and the places where they usually are.
    #[test]
    fn items_are_found_with_and_without_their_table() {
        let metadata = metadata();
        let region = metadata.encode_region();
        let length = u32::try_from(region.len()).expect("1 MiB");
        let listed = Table::remains(&region, length);
        assert_eq!(listed.len(), 6);
        for entries in [listed, Item::usual_places(length)] {
            let bytes = |entry: &Entry| &region[entry.offset as usize..][..entry.length as usize];
            let found = entries.iter().filter_map(|entry| Item::parse(entry.item_id, bytes(entry)));
            let file = Item::File { block_size: 1 << 21, leave_blocks_allocated: false, has_parent: true };
            let expected = [
                file,
                Item::Size(5 << 30),
                Item::DiskId(Uuid::from_u128(7)),
                Item::LogicalSector(4096),
                Item::PhysicalSector(512),
                Item::Parent(metadata.parent_locator.clone().expect("a child")),
            ];
            assert_eq!(found.collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn what_no_item_can_say_is_nothing() {
        for (item_id, length) in USUAL {
            let [zeros, ones] = [0, 0xff].map(|byte| vec![byte; length as usize]);
            assert!(Item::parse(item_id, &zeros).is_none() || item_id == guid::VIRTUAL_DISK_ID);
            assert!(Item::parse(item_id, &ones).is_none() || item_id == guid::VIRTUAL_DISK_ID);
            assert!(Item::parse(item_id, &zeros[1..]).is_none());
        }
        assert!(Item::parse(guid::PARENT_LOCATOR, &[0; 20]).is_none());
        assert!(Item::usual_places(0).is_empty());
    }
}
