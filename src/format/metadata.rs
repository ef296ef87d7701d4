//! The metadata region: a table of items, and the items that describe the virtual disk.
//!
//! Invariants:
//!
//! * No checksum protects this region, so what can be checked is checked: bounds, overlaps, repetitions, and
//!   every value against the format.
//! * A [`Table`] holds nothing that must be understood and is not. Unknown items are kept: their
//!   bytes and table entries stay as they are.
//! * Items lie anywhere in a region of up to 128 MiB. Reading is therefore two steps: the table says where
//!   the few known items are ([`Table::system_items`], together at most 1 MiB and 40 bytes), the caller reads
//!   those, and [`Metadata::from_table`] makes sense of them.
//!
//! [Rules 25 to 37](crate::design::vhdx_rules#rule-25).

use std::collections::BTreeSet;

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::locator::ParentLocator;
use super::{
    MAX_BLOCK_SIZE, MAX_ITEM_LENGTH, MAX_VIRTUAL_SIZE, MIB, MIN_BLOCK_SIZE, SECTOR_SIZES, first_overlap, guid,
};
use crate::error::{Error, Kind, Result, SALVAGE};

/// Bytes of the table, at the start of the region; items lie behind it.
pub const TABLE_SIZE: usize = 65536;

/// The most items of a table (MS-VHDX 2.6.1.1): as many as fit behind the table's own 32 bytes.
pub const MAX_ENTRIES: usize = 2047;

/// The most items of a table that belong to users (MS-VHDX 2.6.1.2).
pub const MAX_USER_ENTRIES: usize = 1024;

const SIGNATURE: [u8; 8] = *b"metadata";
const TABLE: &str = "metadata table";
const STRUCTURE: &str = "metadata";

const IS_USER: u32 = 1 << 0;
const IS_VIRTUAL_DISK: u32 = 1 << 1;
const IS_REQUIRED: u32 = 1 << 2;

const LEAVE_BLOCKS_ALLOCATED: u32 = 1 << 0;
const HAS_PARENT: u32 = 1 << 1;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawTable {
    signature: [u8; 8],
    reserved: U16,
    entry_count: U16,
    reserved_2: [u8; 20],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    item_id: [u8; 16],
    offset: U32,
    length: U32,
    flags: U32,
    reserved: U32,
}

/// Where in an entry of the table the item's offset is, bytes.
const OFFSET_FIELD: usize = std::mem::offset_of!(RawEntry, offset);

const _: () = assert!(size_of::<RawTable>() == 32);
const _: () = assert!(size_of::<RawEntry>() == 32);
const _: () = assert!(size_of::<RawTable>() + MAX_ENTRIES * size_of::<RawEntry>() == TABLE_SIZE);

/// An item this module understands.
struct Known {
    item_id: Uuid,
    name: &'static str,
    /// Bytes of the item, where they are fixed.
    length: Option<u32>,
    /// Whether a child inherits the item from its parent.
    is_virtual_disk: bool,
}

const FILE_PARAMETERS: Known = Known {
    item_id: guid::FILE_PARAMETERS,
    name: "File Parameters",
    length: Some(8),
    is_virtual_disk: false,
};
const VIRTUAL_DISK_SIZE: Known = Known {
    item_id: guid::VIRTUAL_DISK_SIZE,
    name: "Virtual Disk Size",
    length: Some(8),
    is_virtual_disk: true,
};
const VIRTUAL_DISK_ID: Known = Known {
    item_id: guid::VIRTUAL_DISK_ID,
    name: "Virtual Disk ID",
    length: Some(16),
    is_virtual_disk: true,
};
const LOGICAL_SECTOR_SIZE: Known = Known {
    item_id: guid::LOGICAL_SECTOR_SIZE,
    name: "Logical Sector Size",
    length: Some(4),
    is_virtual_disk: true,
};
const PHYSICAL_SECTOR_SIZE: Known = Known {
    item_id: guid::PHYSICAL_SECTOR_SIZE,
    name: "Physical Sector Size",
    length: Some(4),
    is_virtual_disk: true,
};
const PARENT_LOCATOR: Known =
    Known { item_id: guid::PARENT_LOCATOR, name: "Parent Locator", length: None, is_virtual_disk: false };

/// The items this module understands, in the order in which a new file holds them.
const KNOWN: [Known; 6] = [
    FILE_PARAMETERS,
    VIRTUAL_DISK_SIZE,
    VIRTUAL_DISK_ID,
    LOGICAL_SECTOR_SIZE,
    PHYSICAL_SECTOR_SIZE,
    PARENT_LOCATOR,
];

/// Items Windows writes that say nothing about content: kept, not read, and no reason to refuse a file.
const HARMLESS: [Uuid; 2] = [guid::CHS_GEOMETRY, guid::PMEM_LABEL];

/// Where one item lies, and whom it concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What the item is; unique among the user's items and among the system's.
    pub item_id: Uuid,
    /// Where the item starts, in bytes from the start of the region; 0 if it is empty.
    pub offset: u32,
    /// Bytes of the item, at most [`MAX_ITEM_LENGTH`].
    pub length: u32,
    /// Whether the item belongs to the user, else to the system.
    pub is_user: bool,
    /// Whether the item describes the virtual disk, so that children inherit it, else the file.
    pub is_virtual_disk: bool,
    /// Whether a program that does not know the item must refuse the file.
    pub is_required: bool,
}

impl Entry {
    fn known(&self) -> Option<&'static Known> {
        KNOWN.iter().find(|known| !self.is_user && known.item_id == self.item_id)
    }

    fn name(&self) -> String {
        let whose = if self.is_user { "user item" } else { "item" };
        self.known()
            .map_or_else(|| format!("{whose} {}", guid::print(self.item_id)), |known| known.name.into())
    }

    /// Checks what can be said about an entry alone.
    fn check(&self, region_length: u32) -> Result<()> {
        if !self.is_user && self.item_id == guid::INCOMPLETE_FILE {
            let message = "the file says itself that its creation or conversion never finished";
            return Err(Error::new(Kind::Corrupt, message).remedy(SALVAGE));
        }
        let harmless = !self.is_user && HARMLESS.contains(&self.item_id);
        if self.is_required && self.known().is_none() && !harmless {
            let message = format!("{} is required to read this file, and not known here", self.name());
            return Err(Error::new(Kind::Unsupported, message));
        }
        let Self { offset, length, .. } = *self;
        let corrupt = |what: String| Err(Error::new(Kind::Corrupt, format!("{} {what}", self.name())));
        if length == 0 {
            return if offset == 0 { Ok(()) } else { corrupt(format!("is empty and yet at byte {offset}")) };
        }
        if length > MAX_ITEM_LENGTH {
            return corrupt(format!("has {length} bytes, at most {MAX_ITEM_LENGTH} expected"));
        }
        let inside = offset.checked_add(length).is_some_and(|end| end <= region_length);
        if offset < TABLE_BYTES || !inside {
            return corrupt(format!(
                "has {length} bytes at {offset}, outside the region's {TABLE_BYTES} to {region_length}"
            ));
        }
        Ok(())
    }
}

/// [`TABLE_SIZE`] as offsets in the region have it.
const TABLE_BYTES: u32 = 65536;
const _: () = assert!(TABLE_BYTES as usize == TABLE_SIZE);

/// What the region holds and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    entries: Vec<Entry>,
}

impl Table {
    /// A table of these entries, for a region of `region_length` bytes.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] if an item lies outside the region or on the table, overlaps another, is listed
    /// twice or too long, if there are too many, or if an item says that the file was never finished;
    /// [`Kind::Unsupported`] if one is required and unknown.
    pub fn new(entries: Vec<Entry>, region_length: u32) -> Result<Self> {
        let place = |error: Error| error.in_structure(TABLE);
        let corrupt = |message: String| Err(Error::corrupt(TABLE, message));
        if entries.len() > MAX_ENTRIES {
            return corrupt(format!("{} items, at most {MAX_ENTRIES} expected", entries.len()));
        }
        let users = entries.iter().filter(|entry| entry.is_user).count();
        if users > MAX_USER_ENTRIES {
            return corrupt(format!("{users} user items, at most {MAX_USER_ENTRIES} expected"));
        }
        let mut seen = BTreeSet::new();
        for entry in &entries {
            entry.check(region_length).map_err(place)?;
            if !seen.insert((entry.item_id, entry.is_user)) {
                return corrupt(format!("{} is listed twice", entry.name()));
            }
        }
        let range =
            |entry: &Entry| u64::from(entry.offset)..u64::from(entry.offset) + u64::from(entry.length);
        if let Some((a, b)) = first_overlap(entries.iter().map(range)) {
            return corrupt(format!("{} and {} overlap", entries[a].name(), entries[b].name()));
        }
        Ok(Self { entries })
    }

    /// Reads the table from the first [`TABLE_SIZE`] bytes of a region of `region_length` bytes.
    ///
    /// Tolerated: any bytes behind the last entry, where Windows leaves stale ones; non-zero reserved fields
    /// and bits; known items with unusual flags, as early images mark the Physical Sector Size not required;
    /// the two items Windows adds that say nothing about content.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] without the signature, and as [`Table::new`]; [`Kind::Truncated`] with fewer bytes.
    pub fn parse(table: &[u8], region_length: u32) -> Result<Self> {
        let Some(table) = table.get(..TABLE_SIZE) else {
            let message = format!("{} bytes found, {TABLE_SIZE} expected", table.len());
            return Err(Error::new(Kind::Truncated, message).in_structure(TABLE));
        };
        let (head, rest) = RawTable::ref_from_prefix(table).expect("TABLE_SIZE bytes hold the head");
        if head.signature != SIGNATURE {
            return Err(Error::corrupt(TABLE, "the signature \"metadata\" is not there"));
        }
        let count = usize::from(head.entry_count.get());
        if count > MAX_ENTRIES {
            return Err(Error::corrupt(TABLE, format!("{count} items, at most {MAX_ENTRIES} expected")));
        }
        let (raw, _) = <[RawEntry]>::ref_from_prefix_with_elems(rest, count).expect("2047 entries fit");
        Self::new(raw.iter().map(Entry::from_raw).collect(), region_length)
    }

    /// The known items that the first [`TABLE_SIZE`] bytes of a region of `region_length` bytes still list,
    /// in places where items can be, whatever else is wrong with the table: those behind its end, which may
    /// be stale, come last.
    pub fn remains(table: &[u8], region_length: u32) -> Vec<Entry> {
        let Some(table) = table.get(..TABLE_SIZE) else { return Vec::new() };
        let (_, rest) = RawTable::ref_from_prefix(table).expect("TABLE_SIZE bytes hold the head");
        let (raw, _) = <[RawEntry]>::ref_from_prefix_with_elems(rest, MAX_ENTRIES).expect("2047 entries fit");
        let entries = raw.iter().map(Entry::from_raw).filter(|entry| entry.length > 0);
        let known = |entry: &Entry| entry.known().is_some_and(|known| known.fits(entry.length));
        entries.filter(|entry| known(entry) && entry.check(region_length).is_ok()).collect()
    }

    /// The bytes of a table with its reserved fields and bits zeroed; none if they are zero already. Nothing
    /// else changes: what lies behind the last entry stays.
    ///
    /// # Panics
    /// If the bytes are not a table that [`Table::parse`] has accepted.
    pub fn without_reserved(table: &[u8]) -> Option<Vec<u8>> {
        let mut bytes = table[..TABLE_SIZE].to_vec();
        let (head, rest) = RawTable::mut_from_prefix(&mut bytes).expect("TABLE_SIZE bytes hold the head");
        (head.reserved, head.reserved_2) = (U16::new(0), [0; 20]);
        let count = usize::from(head.entry_count.get());
        let (entries, _) = <[RawEntry]>::mut_from_prefix_with_elems(rest, count).expect("2047 entries fit");
        for entry in entries {
            entry.flags = U32::new(entry.flags.get() & (IS_USER | IS_VIRTUAL_DISK | IS_REQUIRED));
            entry.reserved = U32::new(0);
        }
        (bytes != table[..TABLE_SIZE]).then_some(bytes)
    }

    /// Every item, in the table's order.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The system's item `item_id`, if it is there.
    pub fn find(&self, item_id: Uuid) -> Option<&Entry> {
        self.entries.iter().find(|entry| !entry.is_user && entry.item_id == item_id)
    }

    /// Where in the region `length` bytes of item `item_id`, which is listed, have room, what the item takes
    /// now counted as free: where it is if possible. Nothing if there is no room.
    pub fn place_for(&self, item_id: Uuid, length: u32, region_length: u32) -> Option<u32> {
        assert!(length > 0 && length <= MAX_ITEM_LENGTH, "an item of {length} bytes");
        assert!(region_length >= TABLE_BYTES, "the region holds its table");
        let old = self.find(item_id).expect("the item is listed");
        let others = self.entries.iter().filter(|entry| *entry != old && entry.length > 0);
        let mut taken: Vec<(u32, u32)> = others.map(|entry| (entry.offset, entry.length)).collect();
        taken.push((region_length, 0));
        taken.sort_unstable();
        let mut from = TABLE_BYTES;
        let mut first = None;
        for (offset, taken) in taken {
            if (from..offset).contains(&old.offset) && offset - old.offset >= length {
                return Some(old.offset);
            }
            if offset - from >= length {
                first = first.or(Some(from));
            }
            from = offset + taken;
        }
        first
    }

    /// Where in the table item `item_id`, which is listed, has its offset, and behind that its length.
    pub fn place_field(&self, item_id: Uuid) -> u64 {
        let index = self.entries.iter().position(|entry| !entry.is_user && entry.item_id == item_id);
        let index = index.expect("the item is listed");
        assert!(index < MAX_ENTRIES, "a table is checked when it is made");
        (size_of::<RawTable>() + index * size_of::<RawEntry>() + OFFSET_FIELD) as u64
    }

    /// The items that [`Metadata::from_table`] asks for: at most six, each of its fixed length or at most
    /// [`MAX_ITEM_LENGTH`] bytes, none empty. One of another length is left out here and refused there.
    pub fn system_items(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| entry.known().is_some_and(|known| known.fits(entry.length)))
    }

    /// The bytes of the table. Reserved fields are zero, whatever they were when this table was read.
    pub fn encode(&self) -> Vec<u8> {
        let head = RawTable {
            signature: SIGNATURE,
            reserved: U16::new(0),
            entry_count: U16::new(u16::try_from(self.entries.len()).expect("at most 2047")),
            reserved_2: [0; 20],
        };
        let mut bytes = Vec::with_capacity(TABLE_SIZE);
        bytes.extend_from_slice(head.as_bytes());
        for entry in &self.entries {
            bytes.extend_from_slice(entry.to_raw().as_bytes());
        }
        assert!(self.entries.len() <= MAX_ENTRIES, "a table is checked when it is made");
        assert!(bytes.len() <= TABLE_SIZE, "2047 entries fit");
        bytes.resize(TABLE_SIZE, 0);
        bytes
    }
}

impl Entry {
    fn from_raw(raw: &RawEntry) -> Self {
        let flags = raw.flags.get();
        Self {
            item_id: guid::read(&raw.item_id),
            offset: raw.offset.get(),
            length: raw.length.get(),
            is_user: flags & IS_USER != 0,
            is_virtual_disk: flags & IS_VIRTUAL_DISK != 0,
            is_required: flags & IS_REQUIRED != 0,
        }
    }

    fn to_raw(self) -> RawEntry {
        let flag = |set: bool, bit: u32| if set { bit } else { 0 };
        let flags = flag(self.is_user, IS_USER)
            | flag(self.is_virtual_disk, IS_VIRTUAL_DISK)
            | flag(self.is_required, IS_REQUIRED);
        RawEntry {
            item_id: guid::write(self.item_id),
            offset: U32::new(self.offset),
            length: U32::new(self.length),
            flags: U32::new(flags),
            reserved: U32::new(0),
        }
    }
}

impl Known {
    fn fits(&self, length: u32) -> bool {
        self.length.map_or(length > 0, |fixed| fixed == length)
    }

    /// The item's bytes, as the caller has read them; none if the table does not list it.
    fn fetch(
        &self,
        table: &Table,
        item: &mut impl FnMut(&Entry) -> Option<Vec<u8>>,
    ) -> Result<Option<Vec<u8>>> {
        let Some(entry) = table.find(self.item_id) else { return Ok(None) };
        if !self.fits(entry.length) {
            let expected = self.length.map_or_else(|| "some".into(), |length| length.to_string());
            let message = format!("{} has {} bytes, {expected} expected", self.name, entry.length);
            return Err(Error::corrupt(STRUCTURE, message));
        }
        match item(entry) {
            Some(bytes) if bytes.len() == entry.length as usize => Ok(Some(bytes)),
            _ => {
                let message =
                    format!("{} could not be read at byte {} of its region", self.name, entry.offset);
                Err(Error::new(Kind::Truncated, message).in_structure(STRUCTURE))
            }
        }
    }

    /// The bytes of an item without which there is no disk.
    fn demand<const N: usize>(
        &self,
        table: &Table,
        item: &mut impl FnMut(&Entry) -> Option<Vec<u8>>,
    ) -> Result<[u8; N]> {
        assert_eq!(
            self.length.map(|length| length as usize),
            Some(N),
            "the length of {} is known",
            self.name
        );
        let bytes = self.fetch(table, item)?;
        let bytes = bytes.ok_or_else(|| Error::corrupt(STRUCTURE, format!("{} is missing", self.name)))?;
        Ok(bytes.try_into().expect("fetch checked the length"))
    }
}

/// The three kinds of image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskType {
    /// Every block has its space from the start, and keeps it.
    Fixed,
    /// Blocks get space when they are written.
    Dynamic,
    /// As dynamic, over a parent that shows where nothing was written.
    Differencing,
}

/// What the metadata says about the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata {
    /// Bytes of a payload block; a power of two from 1 to 256 MiB.
    pub block_size: u32,
    /// Whether blocks keep their space whatever is written; without meaning if there is a parent.
    pub leave_blocks_allocated: bool,
    /// Whether the image is a child.
    pub has_parent: bool,
    /// Bytes of the virtual disk; a multiple of the logical sector, at most 64 TiB.
    pub virtual_size: u64,
    /// The disk's identity, the same in parent and children.
    pub disk_id: Uuid,
    /// Bytes of a logical sector: 512 or 4096.
    pub logical_sector_size: u32,
    /// Bytes of a physical sector: 512 or 4096; images exist where it is the smaller of the two.
    pub physical_sector_size: u32,
    /// Where the parent is; there if and only if `has_parent`.
    pub parent_locator: Option<ParentLocator>,
}

impl Metadata {
    /// Makes sense of the items. `item` returns the bytes of an item that [`Table::system_items`] named.
    ///
    /// Tolerated: physical sectors smaller than logical ones. Unknown bits in the File Parameters are not:
    /// they may change what blocks mean.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] if an item is missing, of a wrong length, or says what the format does not allow, or
    /// if there is a parent without a locator or the other way round (a lost parent would read as zeros);
    /// [`Kind::Truncated`] if `item` has not all bytes; [`Kind::Unsupported`] for unknown File Parameters;
    /// and the errors of [`ParentLocator::parse`].
    pub fn from_table(table: &Table, mut item: impl FnMut(&Entry) -> Option<Vec<u8>>) -> Result<Self> {
        let [b0, b1, b2, b3, f0, f1, f2, f3] = FILE_PARAMETERS.demand(table, &mut item)?;
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let unknown = flags & !(LEAVE_BLOCKS_ALLOCATED | HAS_PARENT);
        if unknown != 0 {
            let message = format!("File Parameters have unknown bits {unknown:#x} set");
            return Err(Error::new(Kind::Unsupported, message).in_structure(STRUCTURE));
        }
        let locator = PARENT_LOCATOR.fetch(table, &mut item)?;
        let metadata = Self {
            block_size: u32::from_le_bytes([b0, b1, b2, b3]),
            leave_blocks_allocated: flags & LEAVE_BLOCKS_ALLOCATED != 0,
            has_parent: flags & HAS_PARENT != 0,
            virtual_size: u64::from_le_bytes(VIRTUAL_DISK_SIZE.demand(table, &mut item)?),
            disk_id: guid::read(&VIRTUAL_DISK_ID.demand(table, &mut item)?),
            logical_sector_size: u32::from_le_bytes(LOGICAL_SECTOR_SIZE.demand(table, &mut item)?),
            physical_sector_size: u32::from_le_bytes(PHYSICAL_SECTOR_SIZE.demand(table, &mut item)?),
            parent_locator: locator.map(|bytes| ParentLocator::parse(&bytes)).transpose()?,
        };
        metadata.check()?;
        Ok(metadata)
    }

    /// The kind of image.
    pub fn kind(&self) -> DiskType {
        match (self.has_parent, self.leave_blocks_allocated) {
            (true, _) => DiskType::Differencing,
            (false, true) => DiskType::Fixed,
            (false, false) => DiskType::Dynamic,
        }
    }

    /// The bytes of system item `item_id`, as this metadata has it; none for an item not known here, and for
    /// a locator that is not there.
    pub fn item_bytes(&self, item_id: Uuid) -> Option<Vec<u8>> {
        let flag = |set: bool, bit: u32| if set { bit } else { 0 };
        let flags =
            flag(self.leave_blocks_allocated, LEAVE_BLOCKS_ALLOCATED) | flag(self.has_parent, HAS_PARENT);
        match item_id {
            guid::FILE_PARAMETERS => Some([self.block_size.to_le_bytes(), flags.to_le_bytes()].concat()),
            guid::VIRTUAL_DISK_SIZE => Some(self.virtual_size.to_le_bytes().into()),
            guid::VIRTUAL_DISK_ID => Some(guid::write(self.disk_id).into()),
            guid::LOGICAL_SECTOR_SIZE => Some(self.logical_sector_size.to_le_bytes().into()),
            guid::PHYSICAL_SECTOR_SIZE => Some(self.physical_sector_size.to_le_bytes().into()),
            guid::PARENT_LOCATOR => self.parent_locator.as_ref().map(ParentLocator::encode),
            _ => None,
        }
    }

    /// The first MiB of the metadata region of a new file, table and items; the locator comes last, so that
    /// it has room to grow.
    ///
    /// # Panics
    /// If a value is one the format does not allow, or the locator exceeds what is left of the MiB.
    pub fn encode_region(&self) -> Vec<u8> {
        if let Err(error) = self.check() {
            panic!("metadata about to be written breaks the format: {error}");
        }
        let region_length = u32::try_from(MIB).expect("1 MiB fits");
        let mut offset = TABLE_BYTES;
        let mut entries = Vec::new();
        let mut items = Vec::new();
        for known in &KNOWN {
            let Some(bytes) = self.item_bytes(known.item_id) else { continue };
            let length = u32::try_from(bytes.len()).expect("an item has at most 1 MiB");
            entries.push(Entry {
                item_id: known.item_id,
                offset,
                length,
                is_user: false,
                is_virtual_disk: known.is_virtual_disk,
                is_required: true,
            });
            offset += length;
            items.extend(bytes);
        }
        let table = Table::new(entries, region_length).expect("known items, one behind the other, in 1 MiB");
        let mut region = table.encode();
        region.extend(items);
        assert!(region.len() <= region_length as usize, "the items fit the region");
        region.resize(region_length as usize, 0);
        debug_assert!(Table::parse(&region, region_length).is_ok_and(|read| read == table), "it reads back");
        region
    }

    /// Checks every value against the format.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] if one contradicts it, and those of [`ParentLocator::check`].
    pub fn check(&self) -> Result<()> {
        let corrupt = |message: String| Err(Error::corrupt(STRUCTURE, message));
        let block_size = self.block_size;
        if !block_size.is_power_of_two() || !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&block_size) {
            return corrupt(format!(
                "blocks of {block_size} bytes, a power of two from 1 to 256 MiB expected"
            ));
        }
        for (name, size) in [("logical", self.logical_sector_size), ("physical", self.physical_sector_size)] {
            if !SECTOR_SIZES.contains(&size) {
                return corrupt(format!("{name} sectors of {size} bytes, 512 or 4096 expected"));
            }
        }
        let (size, sector) = (self.virtual_size, u64::from(self.logical_sector_size));
        if size > MAX_VIRTUAL_SIZE || !size.is_multiple_of(sector) {
            return corrupt(format!(
                "a virtual disk of {size} bytes, a multiple of {sector} up to {MAX_VIRTUAL_SIZE} expected"
            ));
        }
        match (self.has_parent, &self.parent_locator) {
            (true, None) => corrupt("the image has a parent, but no Parent Locator".into()),
            (false, Some(_)) => corrupt("the image has a Parent Locator, but no parent".into()),
            (true, Some(locator)) => locator.check(),
            (false, None) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::locator;
    use crate::format::testing::noise;
    use proptest::prelude::*;

    const REGION: u32 = 1 << 20;

    fn dynamic() -> Metadata {
        Metadata {
            block_size: 2 << 20,
            leave_blocks_allocated: false,
            has_parent: false,
            virtual_size: 127 << 30,
            disk_id: Uuid::from_u128(5),
            logical_sector_size: 512,
            physical_sector_size: 4096,
            parent_locator: None,
        }
    }

    fn child() -> Metadata {
        let mut parent = ParentLocator::default();
        parent.set(locator::PARENT_LINKAGE, guid::print(Uuid::from_u128(6)));
        parent.set(locator::RELATIVE_PATH, ".\\parent.vhdx");
        Metadata { has_parent: true, parent_locator: Some(parent), ..dynamic() }
    }

    /// Where it is if there is room, else the first gap; other items stay whole.
    #[test]
    fn an_item_has_room_where_nothing_else_is() {
        let entry = |item_id: u128, offset, length| Entry {
            item_id: Uuid::from_u128(item_id),
            offset,
            length,
            is_user: false,
            is_virtual_disk: false,
            is_required: false,
        };
        let entries = vec![entry(3, 65800, 100), entry(1, 65536, 50), entry(2, 65600, 100), entry(4, 0, 0)];
        let table = Table::new(entries, REGION).expect("a good table");
        let place = |item_id: u128, length| table.place_for(Uuid::from_u128(item_id), length, REGION);
        assert_eq!((place(1, 64), place(1, 65)), (Some(65536), Some(65700)));
        assert_eq!((place(1, 100), place(1, 101)), (Some(65700), Some(65900)));
        assert_eq!((place(2, 200), place(2, 214), place(2, 215)), (Some(65600), Some(65586), Some(65900)));
        assert_eq!(place(3, REGION - 65800), Some(65800));
        assert_eq!(place(3, REGION - 65700), Some(65700));
        assert_eq!(place(3, REGION - 65699), None);
        assert_eq!((table.place_field(Uuid::from_u128(3)), table.place_field(Uuid::from_u128(2))), (48, 112));
    }

    /// Both steps of reading, from a region that is all in memory.
    fn read(region: &[u8]) -> Result<Metadata> {
        let table = Table::parse(region, u32::try_from(region.len()).expect("a small region"))?;
        Metadata::from_table(&table, |entry| {
            assert!(
                table.system_items().any(|named| named == entry),
                "only items that were named are asked for"
            );
            Some(region[entry.offset as usize..][..entry.length as usize].to_vec())
        })
    }

    /// The region of a child with `with` at byte `at`.
    fn patched(at: usize, with: &[u8]) -> Vec<u8> {
        let mut region = child().encode_region();
        region[at..at + with.len()].copy_from_slice(with);
        region
    }

    fn refusal(region: &[u8]) -> (Kind, String) {
        let error = read(region).expect_err("metadata to refuse");
        (error.kind(), error.to_string())
    }

    fn item(id: u128, offset: u32, length: u32) -> Entry {
        let item_id = Uuid::from_u128(id);
        Entry { item_id, offset, length, is_user: false, is_virtual_disk: false, is_required: false }
    }

    fn table_refusal(entries: &[Entry]) -> (Kind, String) {
        let error = Table::new(entries.to_vec(), REGION).expect_err("a table to refuse");
        (error.kind(), error.to_string())
    }

    #[test]
    fn every_field_lies_where_the_specification_puts_it() {
        let region = child().encode_region();
        assert_eq!(region.len(), 1 << 20);
        assert_eq!(&region[..8], b"metadata");
        assert_eq!(region[8..12], [0, 0, 6, 0]);
        assert!(region[12..32].iter().all(|&byte| byte == 0));
        assert_eq!(region[32..48], guid::write(guid::FILE_PARAMETERS));
        assert_eq!(region[48..64], [0, 0, 1, 0, 8, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(region[65536..65544], [0, 0, 0x20, 0, 2, 0, 0, 0]);
        assert_eq!(region[65544..65552], (127_u64 << 30).to_le_bytes());
        assert_eq!(region[65552..65568], guid::write(Uuid::from_u128(5)));
        assert_eq!(region[65568..65576], [0, 2, 0, 0, 0, 16, 0, 0]);
        assert_eq!(region[65576..65592], guid::write(guid::LOCATOR_TYPE_VHDX));
    }

    #[test]
    fn known_items_have_the_specifications_flags() {
        let table = Table::parse(&child().encode_region(), REGION).expect("own table");
        for entry in table.entries() {
            let file = [guid::FILE_PARAMETERS, guid::PARENT_LOCATOR].contains(&entry.item_id);
            assert_eq!((entry.is_user, entry.is_virtual_disk, entry.is_required), (false, !file, true));
        }
        assert_eq!(table.system_items().count(), 6);
        assert_eq!(table.find(guid::VIRTUAL_DISK_SIZE).map(|entry| entry.offset), Some(65544));
        assert_eq!(table.find(guid::CHS_GEOMETRY), None);
    }

    #[test]
    fn the_kind_follows_from_two_bits_and_a_parent_outweighs() {
        assert_eq!(dynamic().kind(), DiskType::Dynamic);
        assert_eq!(Metadata { leave_blocks_allocated: true, ..dynamic() }.kind(), DiskType::Fixed);
        assert_eq!(child().kind(), DiskType::Differencing);
        assert_eq!(Metadata { leave_blocks_allocated: true, ..child() }.kind(), DiskType::Differencing);
    }

    #[test]
    fn reserved_fields_are_zeroed_and_nothing_else() {
        let good = child().encode_region();
        assert_eq!(Table::without_reserved(&good), None);
        for at in [8, 12, 31, 32 + 27, 32 + 5 * 32 + 31] {
            let mended = Table::without_reserved(&patched(at, &[0x80])).expect("something to mend");
            assert!(mended == good[..TABLE_SIZE], "byte {at}");
        }
        let behind = patched(32 + 6 * 32 + 28, &[0x80]);
        assert_eq!(
            Table::without_reserved(&behind),
            None,
            "what lies behind the last entry is not part of it"
        );
    }

    #[test]
    fn a_table_without_signature_or_end_is_refused() {
        let (kind, message) = refusal(&patched(0, b"M"));
        assert_eq!(kind, Kind::Corrupt);
        assert!(message.contains("the signature \"metadata\" is not there"), "{message}");
        let error = Table::parse(&child().encode_region()[..65535], REGION).expect_err("one byte short");
        assert_eq!(error.kind(), Kind::Truncated);
    }

    #[test]
    fn a_table_holds_2047_items_1024_of_them_users_and_no_more() {
        let items = |system: u32, user: u32| -> Vec<Entry> {
            let all = (0..system + user).map(|i| item(1 + u128::from(i), 0, 0));
            all.enumerate().map(|(i, entry)| Entry { is_user: i >= system as usize, ..entry }).collect()
        };
        let full = Table::new(items(1023, 1024), REGION).expect("2047");
        assert_eq!(Table::parse(&full.encode(), REGION).expect("own table"), full);
        assert!(table_refusal(&items(1024, 1024)).1.contains("2048 items, at most 2047"));
        assert!(table_refusal(&items(0, 1025)).1.contains("1025 user items, at most 1024"));
        assert!(refusal(&patched(10, &[0, 8])).1.contains("2048 items"));
        assert!(refusal(&patched(10, &[0xff, 0xff])).1.contains("65535 items"));
    }

    #[test]
    fn an_item_outside_the_region_or_on_the_table_is_refused() {
        for (offset, length) in
            [(65535, 1), (0, 8), (REGION - 1, 2), (REGION, 1), (u32::MAX, 1), (u32::MAX, REGION)]
        {
            let message = table_refusal(&[item(1, offset, length)]).1;
            assert!(message.contains("outside the region's 65536 to 1048576"), "{message}");
        }
        Table::new(vec![item(1, REGION - 1, 1), item(2, 65536, 1)], REGION).expect("first and last byte");
        assert!(table_refusal(&[item(1, 8, 0)]).1.contains("is empty and yet at byte 8"));
    }

    #[test]
    fn an_item_of_more_than_one_mib_is_refused() {
        let entry = |length| vec![item(1, 65536, length)];
        Table::new(entry(MAX_ITEM_LENGTH), 2 << 20).expect("1 MiB");
        let error = Table::new(entry(MAX_ITEM_LENGTH + 1), 2 << 20).expect_err("a byte more");
        assert!(error.to_string().contains("at most 1048576"), "{error}");
    }

    #[test]
    fn items_that_overlap_or_repeat_are_refused_by_name() {
        let message = table_refusal(&[item(1, 70000, 10), item(2, 65536, 4465)]).1;
        assert!(message.contains("-000000000001} and item {") && message.contains("overlap"), "{message}");
        assert!(table_refusal(&[item(1, 70000, 1), item(1, 80000, 1)]).1.contains("listed twice"));
    }

    #[test]
    fn a_user_may_have_an_item_with_a_systems_id() {
        let mine = |item_id, offset| Entry { item_id, is_user: true, ..item(0, offset, 8) };
        let entries = vec![mine(guid::INCOMPLETE_FILE, 65536), mine(guid::FILE_PARAMETERS, 65544)];
        let table = Table::new(entries, REGION).expect("user items");
        assert_eq!(table.system_items().count(), 0);
        assert_eq!(table.find(guid::FILE_PARAMETERS), None);
    }

    #[test]
    fn a_required_item_nobody_knows_is_unsupported_and_another_kept() {
        for is_user in [false, true] {
            let entry = Entry { is_user, is_required: true, ..item(7, 65536, 1) };
            assert_eq!(table_refusal(&[entry]).0, Kind::Unsupported);
        }
        let stranger = item(7, 65536, 1);
        assert_eq!(Table::new(vec![stranger], REGION).expect("not required").entries(), [stranger]);
    }

    #[test]
    fn the_items_windows_adds_are_tolerated_and_an_unfinished_file_refused() {
        for item_id in [guid::CHS_GEOMETRY, guid::PMEM_LABEL] {
            let entry = Entry { item_id, is_required: true, ..item(0, 65536, 8) };
            assert_eq!(Table::new(vec![entry], REGION).expect("harmless").system_items().count(), 0);
        }
        for is_required in [false, true] {
            let entry = Entry { item_id: guid::INCOMPLETE_FILE, is_required, ..item(0, 0, 0) };
            let error = Table::new(vec![entry], REGION).expect_err("unfinished");
            assert!(error.to_string().contains("never finished") && error.remedy_text().is_some(), "{error}");
        }
    }

    #[test]
    fn reserved_bits_and_unusual_flags_are_tolerated_and_reserved_bits_not_written_again() {
        let mut region = patched(8, &[1, 1]);
        region[12..32].fill(0xff);
        for index in 0..6 {
            region[32 + 32 * index + 24..][..8].copy_from_slice(&[0xf8, 0xff, 0xff, 0xff, 1, 1, 1, 1]);
        }
        assert_eq!(read(&region).expect("odd bits"), child());
        let again = Table::parse(&region, REGION).expect("odd bits").encode();
        assert_eq!(again[8..10], [0, 0]);
        assert_eq!(again[56..64], [0; 8]);
    }

    #[test]
    fn a_stale_entry_behind_the_last_one_is_tolerated() {
        let mut region = dynamic().encode_region();
        region.copy_within(32 + 4 * 32..32 + 5 * 32, 32 + 5 * 32);
        assert_eq!(read(&region).expect("as Windows leaves it"), dynamic());
    }

    #[test]
    fn a_disk_without_one_of_its_items_is_refused() {
        for (index, known) in KNOWN[..5].iter().enumerate() {
            let message = refusal(&patched(32 + 32 * index, &[0; 4])).1;
            let unknown = message.contains("is required to read this file");
            assert!(unknown, "an item with another id is unknown: {message}");
            let mut region = patched(32 + 32 * index, &[0; 4]);
            region[32 + 32 * index + 24] = 0;
            assert!(refusal(&region).1.contains(&format!("{} is missing", known.name)));
        }
    }

    #[test]
    fn an_item_of_another_length_is_refused_and_never_named() {
        for (index, length) in [(0, 9), (1, 4), (2, 15), (3, 0), (4, 3), (5, 0)] {
            let mut region = patched(32 + 32 * index + 20, &[length, 0, 0, 0]);
            let offset = if length == 0 { [0; 4] } else { [0, 0, 2, 0] };
            region[32 + 32 * index + 16..][..4].copy_from_slice(&offset);
            let table = Table::parse(&region, REGION).expect("a good table");
            assert_eq!(table.system_items().count(), 5);
            let message = refusal(&region).1;
            assert!(message.contains(&format!("{} has {length} bytes", KNOWN[index].name)), "{message}");
        }
    }

    #[test]
    fn an_item_that_was_not_read_whole_is_truncated() {
        let table = Table::parse(&child().encode_region(), REGION).expect("own table");
        for bytes in [None, Some(vec![0; 7])] {
            let error = Metadata::from_table(&table, |_| bytes.clone()).expect_err("no bytes");
            assert_eq!(error.kind(), Kind::Truncated);
            assert!(error.to_string().contains("File Parameters could not be read at byte 65536"), "{error}");
        }
    }

    #[test]
    fn a_block_size_the_format_does_not_have_is_refused() {
        for size in [0_u32, 1, 512 << 10, 3 << 20, 512 << 20, u32::MAX] {
            assert!(refusal(&patched(65536, &size.to_le_bytes())).1.contains("from 1 to 256 MiB"), "{size}");
        }
        for shift in 20..=28 {
            let metadata = Metadata { block_size: 1 << shift, ..dynamic() };
            assert_eq!(read(&metadata.encode_region()).expect("a good size"), metadata);
        }
    }

    #[test]
    fn unknown_file_parameters_are_unsupported() {
        assert_eq!(refusal(&patched(65540, &[6])).0, Kind::Unsupported);
        assert_eq!(refusal(&patched(65543, &[0x80])).0, Kind::Unsupported);
    }

    #[test]
    fn a_virtual_size_the_format_does_not_have_is_refused() {
        for size in [1, 511, MAX_VIRTUAL_SIZE + 512, u64::MAX - 511] {
            assert!(refusal(&patched(65544, &size.to_le_bytes())).1.contains("multiple of 512"), "{size}");
        }
        for size in [0, 512, MAX_VIRTUAL_SIZE] {
            let region = patched(65544, &size.to_le_bytes());
            assert_eq!(read(&region).expect("a good size").virtual_size, size);
        }
        let half = Metadata { logical_sector_size: 4096, ..child() }.encode_region();
        let mut half_sector = half.clone();
        half_sector[65544..65552].copy_from_slice(&512_u64.to_le_bytes());
        assert!(refusal(&half_sector).1.contains("multiple of 4096"));
    }

    #[test]
    fn a_sector_size_the_format_does_not_have_is_refused() {
        for size in [0_u32, 1, 520, 1024, 8192, u32::MAX] {
            assert!(refusal(&patched(65568, &size.to_le_bytes())).1.contains("logical sectors of"), "{size}");
            assert!(
                refusal(&patched(65572, &size.to_le_bytes())).1.contains("physical sectors of"),
                "{size}"
            );
        }
    }

    #[test]
    fn physical_sectors_smaller_than_logical_ones_are_tolerated() {
        let metadata = Metadata { logical_sector_size: 4096, physical_sector_size: 512, ..dynamic() };
        assert_eq!(read(&metadata.encode_region()).expect("seen in the field"), metadata);
    }

    #[test]
    fn a_child_without_locator_and_a_locator_without_child_are_refused() {
        assert!(refusal(&patched(65540, &[0])).1.contains("a Parent Locator, but no parent"));
        let mut region = dynamic().encode_region();
        region[65540] = 2;
        assert!(refusal(&region).1.contains("has a parent, but no Parent Locator"));
        assert!(refusal(&patched(65576, &[0])).1.starts_with("parent locator: locator type {"));
    }

    #[test]
    #[should_panic(expected = "breaks the format")]
    fn metadata_that_could_not_be_read_is_never_written() {
        let _ = Metadata { block_size: 3 << 20, ..dynamic() }.encode_region();
    }

    prop_compose! {
        fn any_metadata()(
            block in 20_u32..=28, leave_blocks_allocated: bool, size in 0..=MAX_VIRTUAL_SIZE, id: u128,
            logical_sector_size in prop::sample::select(&SECTOR_SIZES[..]),
            physical_sector_size in prop::sample::select(&SECTOR_SIZES[..]),
            paths in prop::option::of(prop::collection::btree_map("[^\0]{1,20}", "[^\0]{1,60}", 0..9)),
        ) -> Metadata {
            Metadata {
                block_size: 1 << block,
                leave_blocks_allocated,
                has_parent: paths.is_some(),
                virtual_size: size - size % u64::from(logical_sector_size),
                disk_id: Uuid::from_u128(id),
                logical_sector_size,
                physical_sector_size,
                parent_locator: paths.map(|paths| ParentLocator { entries: paths.into_iter().collect() }),
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn metadata_comes_back(metadata in any_metadata()) {
            let region = metadata.encode_region();
            prop_assert_eq!(&read(&region).expect("own metadata"), &metadata);
            let table = Table::parse(&region, REGION).expect("own table");
            prop_assert_eq!(&table.encode()[..], &region[..TABLE_SIZE]);
        }

        #[test]
        fn no_bytes_make_the_parser_panic(
            metadata in any_metadata(), seed: u64, len in 0_usize..=65536, at in 0_usize..300,
            count in 0_u8..8,
        ) {
            let mut bytes = noise(seed, len);
            prop_assert!(Table::parse(&bytes, REGION).is_err());
            bytes.resize(TABLE_SIZE, 0);
            bytes[..8].copy_from_slice(&SIGNATURE);
            bytes[10..12].copy_from_slice(&[count, seed.to_le_bytes()[0] % 9]);
            let _ = Table::parse(&bytes, REGION);
            let mut region = metadata.encode_region();
            let near = noise(seed, usize::from(count));
            region[at..at + near.len()].copy_from_slice(&near);
            region[65536 + at..][..near.len()].copy_from_slice(&near);
            if let Ok(metadata) = read(&region) {
                prop_assert_eq!(read(&metadata.encode_region()).expect("own metadata"), metadata);
            }
        }
    }
}
