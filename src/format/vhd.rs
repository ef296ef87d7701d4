//! VHD, the older format: its footer, the header and the table of a dynamic one, both ways.
//!
//! ```text
//!   fixed     data                                                           footer
//!   dynamic   copy of the footer   header   table   blocks in any order      footer
//! ```
//!
//! Invariants:
//!
//! * A [`Footer`], a [`DynamicHeader`] and a [`Table`] that were parsed cannot be wrong: sizes are bounded,
//!   the table has an entry for each block, and no block overlaps another structure.
//! * The size of the disk is the footer's `current_size`. The geometry in cylinders, heads and sectors can
//!   only say something smaller; QEMU believes it unless the creator is one of those that it knows, so that
//!   footers are written under the creator of Windows.
//!
//! Integers are big-endian. A block is a bitmap of its sectors, in whole sectors, and its data; a sector
//! whose bit is clear was never written and reads as zero.

use uuid::Uuid;
use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{first_overlap, index, range_end};
use crate::error::{Error, Kind, Result};

/// Bytes of a sector; the format has no other.
pub const SECTOR: u64 = 512;

/// Bytes of the footer.
pub const FOOTER_SIZE: usize = 512;

/// Bytes of the header of a dynamic image.
pub const HEADER_SIZE: usize = 1024;

/// The largest dynamic disk, and the largest disk that programs other than Azure take: 2040 GiB.
pub const MAX_DYNAMIC_SIZE: u64 = 2040 << 30;

/// The largest disk in a fixed VHD, bytes: the most that Azure takes.
pub const MAX_FIXED_SIZE: u64 = 32 << 40;

/// The block of a new dynamic image, bytes: what all programs write.
pub const DEFAULT_BLOCK_SIZE: u32 = 2 << 20;

/// Blocks that are read, bytes: a smaller one would make the table of a large disk huge.
const BLOCK_SIZES: std::ops::RangeInclusive<u32> = 512 << 10..=256 << 20;

/// The start of every footer.
pub const FOOTER_COOKIE: [u8; 8] = *b"conectix";
const HEADER_COOKIE: [u8; 8] = *b"cxsparse";

/// Version 1.0 of the footer, and of the header.
const VERSION: u32 = 0x0001_0000;
/// A bit that is always set.
const FEATURES: u32 = 2;
/// No structure follows.
const NOWHERE: u64 = u64::MAX;
/// The entry of a block that is not there.
const UNUSED: u32 = u32::MAX;

const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawFooter {
    cookie: [u8; 8],
    features: U32,
    version: U32,
    data_offset: U64,
    timestamp: U32,
    creator: [u8; 4],
    creator_version: U32,
    creator_host: [u8; 4],
    original_size: U64,
    current_size: U64,
    cylinders: U16,
    heads: u8,
    sectors_per_track: u8,
    disk_type: U32,
    checksum: U32,
    unique_id: [u8; 16],
    saved_state: u8,
    reserved: [u8; 427],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    cookie: [u8; 8],
    data_offset: U64,
    table_offset: U64,
    version: U32,
    entries: U32,
    block_size: U32,
    checksum: U32,
    parent_id: [u8; 16],
    parent_timestamp: U32,
    reserved: [u8; 4],
    parent_name: [u8; 512],
    parent_locators: [u8; 192],
    rest: [u8; 256],
}

const _: () = assert!(size_of::<RawFooter>() == FOOTER_SIZE);
const _: () = assert!(size_of::<RawHeader>() == HEADER_SIZE);
const _: () = assert!(std::mem::offset_of!(RawFooter, checksum) == FOOTER_CHECKSUM);
const _: () = assert!(std::mem::offset_of!(RawHeader, checksum) == HEADER_CHECKSUM);

/// Where the checksums lie in their structures, bytes.
const FOOTER_CHECKSUM: usize = 64;
const HEADER_CHECKSUM: usize = 36;

/// How an image holds its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// As it is, from byte 0 on.
    Fixed,
    /// In blocks; the header lies at this byte.
    Dynamic {
        /// Bytes from the start of the file.
        header: u64,
    },
}

/// What the footer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Bytes of the disk: whole sectors.
    pub size: u64,
    /// How it is kept.
    pub kept: Kept,
    /// The identifier of the disk.
    pub unique_id: Uuid,
    /// Seconds since the start of the year 2000.
    pub timestamp: u32,
}

impl Footer {
    /// Reads a footer from its 512 bytes.
    ///
    /// Tolerated: any creator, features, geometry, saved state and reserved bytes.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] if cookie or checksum do not match, or what it says cannot be;
    /// [`Kind::Unsupported`] for a differencing image, another version, and a disk that is too large.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let corrupt = |message: String| Err(Error::corrupt("VHD footer", message));
        let Ok(raw) = RawFooter::read_from_bytes(bytes) else {
            return corrupt(format!("{} bytes found, {FOOTER_SIZE} expected", bytes.len()));
        };
        if raw.cookie != FOOTER_COOKIE {
            return corrupt("it does not begin with \"conectix\"".into());
        }
        check_sum(bytes, FOOTER_CHECKSUM, raw.checksum.get(), "VHD footer")?;
        let unsupported = |message: String| Error::new(Kind::Unsupported, message).in_structure("VHD footer");
        if raw.version.get() >> 16 != VERSION >> 16 {
            return Err(unsupported(format!("version {:#x}, {VERSION:#x} expected", raw.version.get())));
        }
        let size = raw.current_size.get();
        let (kept, most) = match raw.disk_type.get() {
            FIXED => (Kept::Fixed, MAX_FIXED_SIZE),
            DYNAMIC => (Kept::Dynamic { header: raw.data_offset.get() }, MAX_DYNAMIC_SIZE),
            DIFFERENCING => {
                let error = unsupported("a differencing VHD: its content is in its parents, too".into());
                return Err(error.remedy(
                    "merge it into its parent first (Merge-VHD under Windows), or convert the whole chain \
                     there: Convert-VHD -Path CHILD.vhd -DestinationPath NEW.vhdx",
                ));
            }
            other => return corrupt(format!("unknown type {other} of the disk")),
        };
        if size > most {
            return Err(unsupported(format!("a disk of {size} bytes; at most {most} are supported")));
        }
        if size == 0 || !size.is_multiple_of(SECTOR) {
            return corrupt(format!("a disk of {size} bytes is no whole number of sectors"));
        }
        let unique_id = Uuid::from_bytes(raw.unique_id);
        Ok(Self { size, kept, unique_id, timestamp: raw.timestamp.get() })
    }

    /// The bytes of this footer, sealed.
    ///
    /// # Panics
    /// If the footer breaks what [`Footer::parse`] demands.
    pub fn encode(&self) -> [u8; FOOTER_SIZE] {
        let (disk_type, data_offset) = match self.kept {
            Kept::Fixed => (FIXED, NOWHERE),
            Kept::Dynamic { header } => (DYNAMIC, header),
        };
        let (cylinders, heads, sectors_per_track) = geometry(self.size / SECTOR);
        let raw = RawFooter {
            cookie: FOOTER_COOKIE,
            features: U32::new(FEATURES),
            version: U32::new(VERSION),
            data_offset: U64::new(data_offset),
            timestamp: U32::new(self.timestamp),
            creator: *b"win ",
            creator_version: U32::new(0x000a_0000),
            creator_host: *b"Wi2k",
            original_size: U64::new(self.size),
            current_size: U64::new(self.size),
            cylinders: U16::new(cylinders),
            heads,
            sectors_per_track,
            disk_type: U32::new(disk_type),
            checksum: U32::new(0),
            unique_id: self.unique_id.into_bytes(),
            saved_state: 0,
            reserved: [0; 427],
        };
        let mut bytes: [u8; FOOTER_SIZE] = zerocopy::transmute!(raw);
        seal(&mut bytes, FOOTER_CHECKSUM);
        assert_eq!(Self::parse(&bytes).as_ref().ok(), Some(self), "what is written reads back");
        bytes
    }
}

/// What the header of a dynamic image says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DynamicHeader {
    /// Where the table lies, bytes.
    pub table_offset: u64,
    /// Entries of the table.
    pub entries: u32,
    /// Bytes of a block's data: a power of two.
    pub block_size: u32,
}

impl DynamicHeader {
    /// Reads the header of a disk of `size` bytes.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] if cookie or checksum do not match, or what it says cannot be;
    /// [`Kind::Unsupported`] for another version, and for blocks of a size that is not supported.
    pub fn parse(bytes: &[u8], size: u64) -> Result<Self> {
        let corrupt = |message: String| Err(Error::corrupt("VHD header", message));
        let Ok(raw) = RawHeader::read_from_bytes(bytes) else {
            return corrupt(format!("{} bytes found, {HEADER_SIZE} expected", bytes.len()));
        };
        if raw.cookie != HEADER_COOKIE {
            return corrupt("it does not begin with \"cxsparse\"".into());
        }
        check_sum(bytes, HEADER_CHECKSUM, raw.checksum.get(), "VHD header")?;
        let unsupported =
            |message: String| Err(Error::new(Kind::Unsupported, message).in_structure("VHD header"));
        if raw.version.get() >> 16 != VERSION >> 16 {
            return unsupported(format!("version {:#x}, {VERSION:#x} expected", raw.version.get()));
        }
        let (block_size, entries) = (raw.block_size.get(), raw.entries.get());
        if !block_size.is_power_of_two() || !BLOCK_SIZES.contains(&block_size) {
            let message =
                format!("a block of {block_size} bytes; powers of two from 512 KiB to 256 MiB are supported");
            return unsupported(message);
        }
        let blocks = size.div_ceil(block_size.into());
        if u64::from(entries) < blocks {
            return corrupt(format!("the table has {entries} entries, and the disk {blocks} blocks"));
        }
        let table_offset = raw.table_offset.get();
        if !table_offset.is_multiple_of(SECTOR) || range_end(table_offset, 4 * blocks).is_none() {
            return corrupt(format!("the table lies at {table_offset}, a multiple of 512 expected"));
        }
        Ok(Self { table_offset, entries, block_size })
    }

    /// The bytes of this header, sealed.
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        assert!(BLOCK_SIZES.contains(&self.block_size) && self.table_offset.is_multiple_of(SECTOR));
        let raw = RawHeader {
            cookie: HEADER_COOKIE,
            data_offset: U64::new(NOWHERE),
            table_offset: U64::new(self.table_offset),
            version: U32::new(VERSION),
            entries: U32::new(self.entries),
            block_size: U32::new(self.block_size),
            checksum: U32::new(0),
            parent_id: [0; 16],
            parent_timestamp: U32::new(0),
            reserved: [0; 4],
            parent_name: [0; 512],
            parent_locators: [0; 192],
            rest: [0; 256],
        };
        let mut bytes: [u8; HEADER_SIZE] = zerocopy::transmute!(raw);
        seal(&mut bytes, HEADER_CHECKSUM);
        bytes
    }

    /// Bytes of the bitmap in front of a block's data.
    pub fn bitmap_bytes(&self) -> u64 {
        bitmap_bytes(self.block_size)
    }
}

/// Bytes of the bitmap in front of the data of a block of `block_size` bytes.
pub fn bitmap_bytes(block_size: u32) -> u64 {
    (u64::from(block_size) / SECTOR / 8).next_multiple_of(SECTOR)
}

/// Where the blocks of a dynamic image are.
#[derive(Debug)]
pub struct Table {
    /// The sector of each block's bitmap.
    blocks: Vec<u32>,
}

impl Table {
    /// Bytes of the part of the table that a disk of `size` bytes uses.
    pub fn length(header: &DynamicHeader, size: u64) -> u64 {
        4 * size.div_ceil(header.block_size.into())
    }

    /// Reads the table of an image from its bytes; the structures and blocks of the image must lie in its
    /// first `end` bytes.
    ///
    /// # Errors
    /// [`Kind::Truncated`] if a block reaches past `end`; [`Kind::Corrupt`] if a block overlaps another one
    /// or a structure.
    pub fn parse(bytes: &[u8], footer: &Footer, header: &DynamicHeader, end: u64) -> Result<Self> {
        let Kept::Dynamic { header: header_offset } = footer.kept else {
            unreachable!("only a dynamic image has a table");
        };
        assert_eq!(bytes.len() as u64, Self::length(header, footer.size), "the table of this disk");
        let entries = bytes.as_chunks::<4>().0.iter().map(|entry| u32::from_be_bytes(*entry));
        let blocks: Vec<u32> = entries.collect();
        let length = header.bitmap_bytes() + u64::from(header.block_size);
        let used = blocks.iter().filter(|&&sector| sector != UNUSED);
        let mut taken: Vec<_> =
            used.map(|&sector| u64::from(sector) * SECTOR..u64::from(sector) * SECTOR + length).collect();
        if let Some(last) = taken.iter().map(|block| block.end).max().filter(|&last| last > end) {
            let message = format!("the image has {end} bytes, and a block ends at byte {last}");
            let error = Error::new(Kind::Truncated, message).in_structure("VHD block table");
            return Err(error.remedy("it was cut short: copy it again from its source"));
        }
        taken.push(0..FOOTER_SIZE as u64);
        taken.push(header_offset..header_offset.saturating_add(HEADER_SIZE as u64));
        taken.push(header.table_offset..header.table_offset + bytes.len() as u64);
        match first_overlap(taken.iter().cloned()) {
            None => Ok(Self { blocks }),
            Some((one, other)) => {
                let (one, other) = (taken[one].start, taken[other].start);
                let message = format!("what lies at byte {one} overlaps what lies at byte {other}");
                Err(Error::corrupt("VHD block table", message))
            }
        }
    }

    /// Where the bitmap of `block` lies, bytes; its data follows. Nowhere if the block is all zeros.
    pub fn block(&self, block: u64) -> Option<u64> {
        let sector = self.blocks[index(block)];
        (sector != UNUSED).then(|| u64::from(sector) * SECTOR)
    }

    /// The first block from `block` on that is there; the number of blocks if there is none.
    pub fn next_block(&self, block: u64) -> u64 {
        let rest = self.blocks[index(block)..].iter();
        rest.clone().position(|&sector| sector != UNUSED).map_or(self.blocks.len(), |at| index(block) + at)
            as u64
    }
}

/// The bytes of a table of `entries` entries in which the `placed` blocks lie at these bytes, in whole
/// sectors; what a sector does not need says that there is no block.
///
/// # Panics
/// If a block is not among the entries, or lies further than an entry can say.
pub fn encode_table(entries: u32, placed: impl Iterator<Item = (u64, u64)>) -> Vec<u8> {
    let length = 4 * u64::from(entries).next_multiple_of(SECTOR / 4);
    let mut table = vec![0xff; index(length)];
    for (block, offset) in placed {
        assert!(block < entries.into() && offset.is_multiple_of(SECTOR), "block {block} at {offset}");
        let sector = u32::try_from(offset / SECTOR).ok().filter(|&sector| sector != UNUSED);
        let sector = sector.expect("the largest dynamic disk ends before the last sector that has a number");
        table[index(4 * block)..][..4].copy_from_slice(&sector.to_be_bytes());
    }
    table
}

/// Cylinders, heads, and sectors of a track, of a disk of `sectors` sectors: at most the disk, and less where
/// it is larger than a geometry can say.
pub fn geometry(sectors: u64) -> (u16, u8, u8) {
    let sectors = sectors.min(65_535 * 16 * 255);
    if sectors >= 65_535 * 16 * 63 {
        return (narrow(sectors / 255 / 16), 16, 255);
    }
    let mut per_track = 17;
    let mut tracks = sectors / 17;
    let mut heads = tracks.div_ceil(1024).max(4);
    if tracks >= heads * 1024 || heads > 16 {
        (per_track, heads, tracks) = (31, 16, sectors / 31);
    }
    if tracks >= heads * 1024 {
        (per_track, heads, tracks) = (63, 16, sectors / 63);
    }
    let heads = u8::try_from(heads).expect("at most 16");
    (narrow(tracks / u64::from(heads)), heads, per_track)
}

fn narrow(cylinders: u64) -> u16 {
    u16::try_from(cylinders).expect("at most 65535 by the limit above")
}

/// The one's complement of the sum of all bytes but the checksum's own.
fn sum(bytes: &[u8], field: usize) -> u32 {
    let without = bytes[..field].iter().chain(&bytes[field + 4..]);
    !without.fold(0_u32, |sum, &byte| sum.wrapping_add(byte.into()))
}

fn check_sum(bytes: &[u8], field: usize, stored: u32, structure: &'static str) -> Result<()> {
    let computed = sum(bytes, field);
    if stored == computed {
        return Ok(());
    }
    Err(Error::corrupt(structure, format!("checksum {stored:#010x} stored, {computed:#010x} computed")))
}

fn seal(bytes: &mut [u8], field: usize) {
    let sum = sum(bytes, field);
    bytes[field..field + 4].copy_from_slice(&sum.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::testing::noise;

    const GIB: u64 = 1 << 30;

    fn footer(size: u64, kept: Kept) -> Footer {
        Footer { size, kept, unique_id: Uuid::from_u128(7), timestamp: 9 }
    }

    fn dynamic(size: u64) -> (Footer, DynamicHeader) {
        let entries = u32::try_from(size.div_ceil(2 << 20)).expect("small");
        let header = DynamicHeader { table_offset: 1536, entries, block_size: DEFAULT_BLOCK_SIZE };
        (footer(size, Kept::Dynamic { header: 512 }), header)
    }

    fn resealed(mut bytes: Vec<u8>, at: usize, with: &[u8], field: usize) -> Vec<u8> {
        bytes[at..at + with.len()].copy_from_slice(with);
        seal(&mut bytes, field);
        bytes
    }

    #[test]
    fn what_is_written_reads_back() {
        for size in [512, GIB, MAX_DYNAMIC_SIZE] {
            let (footer, header) = dynamic(size);
            assert_eq!(Footer::parse(&footer.encode()).expect("own"), footer);
            assert_eq!(DynamicHeader::parse(&header.encode(), size).expect("own"), header);
        }
        let fixed = footer(MAX_FIXED_SIZE, Kept::Fixed);
        assert_eq!(Footer::parse(&fixed.encode()).expect("own"), fixed);
    }

    /// Worked out by hand along the specification's algorithm.
    #[test]
    fn the_geometry_is_that_of_the_specification() {
        let expected =
            [(2_048, (30, 4, 17)), (2 * GIB / 512, (4161, 16, 63)), (127 * GIB / 512, (65278, 16, 255))];
        for (sectors, expected) in expected {
            assert_eq!(geometry(sectors), expected, "{sectors} sectors");
        }
        assert_eq!(geometry(u64::MAX), (65535, 16, 255));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let fixed = footer(GIB, Kept::Fixed).encode().to_vec();
        let refusal = |at: usize, with: &[u8]| {
            Footer::parse(&resealed(fixed.clone(), at, with, FOOTER_CHECKSUM)).expect_err("damaged")
        };
        let differencing = refusal(60, &DIFFERENCING.to_be_bytes());
        assert_eq!(differencing.kind(), Kind::Unsupported);
        assert!(differencing.remedy_text().is_some_and(|remedy| remedy.contains("Merge-VHD")));
        assert_eq!(refusal(60, &9_u32.to_be_bytes()).kind(), Kind::Corrupt);
        assert_eq!(refusal(48, &513_u64.to_be_bytes()).kind(), Kind::Corrupt);
        assert_eq!(refusal(48, &0_u64.to_be_bytes()).kind(), Kind::Corrupt);
        assert_eq!(refusal(48, &(MAX_FIXED_SIZE + 512).to_be_bytes()).kind(), Kind::Unsupported);
        assert_eq!(refusal(12, &[0, 2]).kind(), Kind::Unsupported);
        let mut torn = fixed;
        torn[100] ^= 1;
        assert_eq!(Footer::parse(&torn).expect_err("torn").kind(), Kind::Corrupt);
        let (_, header) = dynamic(GIB);
        let header = header.encode().to_vec();
        let refusal = |at: usize, with: &[u8]| {
            let bytes = resealed(header.clone(), at, with, HEADER_CHECKSUM);
            DynamicHeader::parse(&bytes, GIB).expect_err("damaged").kind()
        };
        assert_eq!(refusal(28, &511_u32.to_be_bytes()), Kind::Corrupt, "too few entries");
        assert_eq!(refusal(32, &4096_u32.to_be_bytes()), Kind::Unsupported);
        assert_eq!(refusal(32, &(3_u32 << 20).to_be_bytes()), Kind::Unsupported);
        assert_eq!(refusal(16, &u64::MAX.to_be_bytes()), Kind::Corrupt);
        assert_eq!(refusal(16, &(u64::MAX - 511).to_be_bytes()), Kind::Corrupt);
    }

    #[test]
    fn blocks_neither_overlap_nor_reach_past_the_end() {
        let (footer, header) = dynamic(8 << 20);
        let block = 512 + (2 << 20);
        let parse = |blocks: &[(u64, u64)], end| {
            let bytes = encode_table(header.entries, blocks.iter().copied());
            Table::parse(&bytes[..16], &footer, &header, end).map_err(|error| error.kind())
        };
        let table = parse(&[(1, 2048), (3, 2048 + block)], 2048 + 2 * block).expect("in order");
        assert_eq!(
            (0..4).map(|at| table.block(at).unwrap_or(0)).collect::<Vec<_>>(),
            [0, 2048, 0, 2048 + block]
        );
        assert_eq!((table.next_block(0), table.next_block(2), table.next_block(3)), (1, 3, 3));
        assert_eq!(parse(&[(1, 2048)], 2048 + block - 1).expect_err("short"), Kind::Truncated);
        assert_eq!(parse(&[(1, 2048), (2, 2048 + 512)], GIB).expect_err("overlap"), Kind::Corrupt);
        for inside in [0, 512, 1024, 1536] {
            assert_eq!(parse(&[(0, inside)], GIB).expect_err("over a structure"), Kind::Corrupt);
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_parser_panic(seed: u64, at in 8_usize..508, word: u64, size in 1_u64..1 << 42) {
            let bytes = noise(seed, HEADER_SIZE);
            let _ = Footer::parse(&bytes[..FOOTER_SIZE]);
            let _ = DynamicHeader::parse(&bytes, size);
            let whole = footer(GIB, Kept::Fixed).encode().to_vec();
            let near = at.min(FOOTER_SIZE - 8);
            if let Ok(parsed) = Footer::parse(&resealed(whole, near, &word.to_be_bytes(), FOOTER_CHECKSUM)) {
                prop_assert!(parsed.size <= MAX_FIXED_SIZE && parsed.size.is_multiple_of(SECTOR));
                let (_, header) = dynamic(GIB);
                let near = resealed(header.encode().to_vec(), at, &word.to_be_bytes(), HEADER_CHECKSUM);
                if let Ok(header) = DynamicHeader::parse(&near, parsed.size) {
                    let length = Table::length(&header, parsed.size);
                    prop_assert!(length <= 16 << 20 || parsed.kept == Kept::Fixed);
                }
            }
        }

        #[test]
        fn any_table_is_parsed_or_refused(raw in prop::collection::vec(0_u32..40_000, 4)) {
            let (footer, header) = dynamic(8 << 20);
            let bytes: Vec<u8> = raw.iter().flat_map(|sector| sector.to_be_bytes()).collect();
            if let Ok(table) = Table::parse(&bytes, &footer, &header, GIB) {
                let mut starts: Vec<_> = (0..4).filter_map(|block| table.block(block)).collect();
                starts.sort_unstable();
                prop_assert!(starts.windows(2).all(|pair| pair[1] - pair[0] >= 512 + (2 << 20)));
            }
        }
    }
}
