//! The region table: where the BAT and the metadata lie, in two copies.
//!
//! Invariants:
//!
//! * A [`RegionTable`] has exactly one BAT and one metadata region; its regions are aligned, lie behind the
//!   header section, and do not overlap. Unknown regions are kept: their space is never reused.
//! * The first copy decides. The second is read only if the first is damaged. Both change through the log, in
//!   one entry, so they differ only in files that others wrote.
//!
//! [Rules 19 to 24](crate::design::vhdx_rules#rule-19).

use std::collections::BTreeSet;

use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::{self, Damage};
use super::{HEADER_SECTION, MIB, first_overlap, guid, index, range_end};
use crate::error::{Error, Kind, Result};

/// Where the two copies lie in the file, in bytes.
pub const OFFSETS: [u64; 2] = [196_608, 262_144];

/// Bytes of one copy, all under its checksum.
pub const SIZE: usize = 65536;

/// The most regions a table holds (MS-VHDX 2.2.3.1): as many as fit behind the table's own 16 bytes.
pub const MAX_ENTRIES: usize = 2047;

/// The largest BAT region in bytes: 513 MiB, what 64 TiB in blocks of 1 MiB need.
pub const MAX_BAT_LENGTH: u32 = 513 << 20;

/// The largest metadata region in bytes: 128 MiB, as Microsoft's own parser.
pub const MAX_METADATA_LENGTH: u32 = 128 << 20;

const SIGNATURE: [u8; 4] = *b"regi";
const NAMES: [&str; 2] = ["region table 1", "region table 2"];
/// The one bit of an entry's last field that has a meaning.
const REQUIRED: u32 = 1;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawTable {
    signature: [u8; 4],
    checksum: U32,
    entry_count: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEntry {
    guid: [u8; 16],
    file_offset: U64,
    length: U32,
    required: U32,
}

const _: () = assert!(size_of::<RawTable>() == 16);
const _: () = assert!(size_of::<RawEntry>() == 32);
const _: () = assert!(size_of::<RawTable>() + (MAX_ENTRIES + 1) * size_of::<RawEntry>() > SIZE);
const _: () = assert!(size_of::<RawTable>() + MAX_ENTRIES * size_of::<RawEntry>() <= SIZE);

/// One region of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// What the region holds.
    pub guid: Uuid,
    /// Where it starts in the file, in bytes; a multiple of 1 MiB.
    pub offset: u64,
    /// Its bytes; a multiple of 1 MiB.
    pub length: u32,
    /// Whether a program that does not know the region must refuse the file.
    pub required: bool,
}

impl Region {
    /// Where the region ends in the file, in bytes.
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.length)
    }

    /// What people call the region.
    fn name(&self) -> String {
        match self.guid {
            guid::REGION_BAT => "the BAT region".into(),
            guid::REGION_METADATA => "the metadata region".into(),
            unknown => format!("region {}", guid::print(unknown)),
        }
    }

    /// Checks what can be said about a region alone.
    fn check(&self) -> Result<()> {
        let Self { offset, length, .. } = *self;
        let known = matches!(self.guid, guid::REGION_BAT | guid::REGION_METADATA);
        if self.required && !known {
            let message = format!("{} is required to read this file, and not known here", self.name());
            return Err(Error::new(Kind::Unsupported, message));
        }
        let corrupt = |what: String| Err(Error::new(Kind::Corrupt, format!("{} {what}", self.name())));
        if !offset.is_multiple_of(MIB) || !u64::from(length).is_multiple_of(MIB) {
            return corrupt(format!("has {length} bytes at {offset}, multiples of 1 MiB expected"));
        }
        if offset < HEADER_SECTION || range_end(offset, length.into()).is_none() {
            return corrupt(format!("cannot lie at byte {offset}"));
        }
        if self.guid == guid::REGION_METADATA && length == 0 {
            return corrupt("is empty".into());
        }
        let limit = match self.guid {
            guid::REGION_BAT => MAX_BAT_LENGTH,
            guid::REGION_METADATA => MAX_METADATA_LENGTH,
            _ => u32::MAX,
        };
        if length > limit {
            let message = format!("{} has {length} bytes; at most {limit} are supported", self.name());
            return Err(Error::new(Kind::Unsupported, message));
        }
        Ok(())
    }
}

/// Where everything in the file is that is neither header, log nor block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegionTable {
    entries: Vec<Region>,
}

impl RegionTable {
    /// A table of these regions. The BAT and the metadata are marked required, whatever the caller says.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] if the BAT or the metadata are missing, a region is listed twice, misplaced, or
    /// overlaps another; [`Kind::Unsupported`] if a region is too large or required and unknown.
    pub fn new(mut entries: Vec<Region>) -> Result<Self> {
        for region in &mut entries {
            region.check()?;
            region.required = matches!(region.guid, guid::REGION_BAT | guid::REGION_METADATA);
        }
        let corrupt = |message: String| Err(Error::new(Kind::Corrupt, message));
        if entries.len() > MAX_ENTRIES {
            return corrupt(format!("{} regions, at most {MAX_ENTRIES} expected", entries.len()));
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = entries.iter().find(|region| !seen.insert(region.guid)) {
            return corrupt(format!("{} is listed twice", twice.name()));
        }
        for (name, guid) in [("BAT", guid::REGION_BAT), ("metadata", guid::REGION_METADATA)] {
            if !seen.contains(&guid) {
                return corrupt(format!("the {name} region is missing"));
            }
        }
        if let Some((a, b)) = first_overlap(entries.iter().map(|region| region.offset..region.end())) {
            return corrupt(format!("{} and {} overlap", entries[a].name(), entries[b].name()));
        }
        Ok(Self { entries })
    }

    /// Reads copy `copy` (0 or 1) of the table.
    ///
    /// Tolerated: non-zero reserved fields and bits, since nothing depends on them; a BAT or metadata region
    /// that is not marked required, as QEMU writes them. Neither survives [`RegionTable::encode`].
    ///
    /// # Errors
    /// [`Kind::Corrupt`] if signature or checksum do not match; else those of [`RegionTable::new`].
    pub fn parse(bytes: &[u8], copy: usize) -> Result<Self> {
        match intact(bytes) {
            Ok(bytes) => Self::from_intact(bytes, copy),
            Err(damage) => Err(Error::corrupt(NAMES[copy], damage.to_string()).at(OFFSETS[copy])),
        }
    }

    /// Every region, in the table's order.
    pub fn entries(&self) -> &[Region] {
        &self.entries
    }

    /// The region of the BAT.
    pub fn bat(&self) -> Region {
        self.find(guid::REGION_BAT)
    }

    /// The region of the metadata.
    pub fn metadata(&self) -> Region {
        self.find(guid::REGION_METADATA)
    }

    /// The same table, in which the region `which` has `length` bytes at `offset`.
    ///
    /// # Errors
    /// As [`RegionTable::new`].
    pub fn with_region_at(&self, which: Uuid, offset: u64, length: u32) -> Result<Self> {
        let mut entries = self.entries.clone();
        let moved = entries.iter_mut().find(|region| region.guid == which);
        let moved = moved.expect("a region of this table moves");
        (moved.offset, moved.length) = (offset, length);
        Self::new(entries)
    }

    /// The bytes of one copy, sealed. Both copies have the same bytes.
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.entries.len() <= MAX_ENTRIES, "a table is checked when it is made");
        let entry_count = u32::try_from(self.entries.len()).expect("at most 2047");
        let head = RawTable {
            signature: SIGNATURE,
            checksum: U32::new(0),
            entry_count: U32::new(entry_count),
            reserved: U32::new(0),
        };
        let mut bytes = Vec::with_capacity(SIZE);
        bytes.extend_from_slice(head.as_bytes());
        for region in &self.entries {
            let entry = RawEntry {
                guid: guid::write(region.guid),
                file_offset: U64::new(region.offset),
                length: U32::new(region.length),
                required: U32::new(if region.required { REQUIRED } else { 0 }),
            };
            bytes.extend_from_slice(entry.as_bytes());
        }
        assert!(bytes.len() <= SIZE, "2047 entries fit");
        bytes.resize(SIZE, 0);
        checksum::seal(&mut bytes);
        debug_assert!(Self::parse(&bytes, 0).is_ok_and(|read| read == *self), "what is written reads back");
        bytes
    }

    fn find(&self, guid: Uuid) -> Region {
        *self.entries.iter().find(|region| region.guid == guid).expect("a table has a BAT and metadata")
    }

    /// Reads a copy whose seal is unbroken.
    fn from_intact(bytes: &[u8], copy: usize) -> Result<Self> {
        assert_eq!(bytes.len(), SIZE, "a copy is read whole");
        let place = |error: Error, at: usize| error.in_structure(NAMES[copy]).at(OFFSETS[copy] + at as u64);
        let (head, rest) = RawTable::ref_from_prefix(bytes).expect("SIZE bytes hold the head");
        let count = index(head.entry_count.get().into());
        if count > MAX_ENTRIES {
            let message = format!("{count} regions, at most {MAX_ENTRIES} expected");
            return Err(place(Error::new(Kind::Corrupt, message), 8));
        }
        let (raw, _) = <[RawEntry]>::ref_from_prefix_with_elems(rest, count).expect("2047 entries fit");
        let mut entries = Vec::with_capacity(count);
        for (index, raw) in raw.iter().enumerate() {
            let region = Region {
                guid: guid::read(&raw.guid),
                offset: raw.file_offset.get(),
                length: raw.length.get(),
                required: raw.required.get() & REQUIRED != 0,
            };
            let at = size_of::<RawTable>() + index * size_of::<RawEntry>();
            region.check().map_err(|error| place(error, at))?;
            entries.push(region);
        }
        Self::new(entries).map_err(|error| place(error, 0))
    }
}

/// How the two copies compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copies {
    /// Every byte agrees.
    Equal,
    /// Both are intact and differ; the first one was used.
    Different,
    /// The first is damaged; the second one was used.
    FirstInvalid,
    /// The second is damaged.
    SecondInvalid,
}

/// The region table that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CurrentTable {
    /// Its content.
    pub table: RegionTable,
    /// How its two copies compare.
    pub copies: Copies,
}

/// Chooses the table from both copies, fewer than [`SIZE`] bytes where the file ends.
///
/// Tolerated: one damaged copy; copies that differ, of which the first counts. A copy whose seal is unbroken
/// and whose content is impossible was written that way: its neighbour is then not asked.
///
/// # Errors
/// [`Kind::Corrupt`] if neither copy is intact ([`Kind::Truncated`] if the file ends before both); else those
/// of [`RegionTable::parse`].
pub fn current(copies: [&[u8]; 2]) -> Result<CurrentTable> {
    let (bytes, copy, copies) = match copies.map(intact) {
        [Ok(first), Ok(second)] if first == second => (first, 0, Copies::Equal),
        [Ok(first), Ok(_)] => (first, 0, Copies::Different),
        [Ok(first), Err(_)] => (first, 0, Copies::SecondInvalid),
        [Err(_), Ok(second)] => (second, 1, Copies::FirstInvalid),
        [Err(first), Err(second)] => return Err(neither(first, second)),
    };
    Ok(CurrentTable { table: RegionTable::from_intact(bytes, copy)?, copies })
}

/// An intact copy with its reserved fields and bits zeroed, sealed anew; none if they are zero already.
/// Nothing else changes: what lies behind the last entry stays.
///
/// # Panics
/// If the copy is not one that [`current`] has accepted.
pub fn without_reserved(copy: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = intact(copy).expect("the copy was accepted").to_vec();
    let (head, rest) = RawTable::mut_from_prefix(&mut bytes).expect("SIZE bytes hold the head");
    head.reserved = U32::new(0);
    let count = index(head.entry_count.get().into());
    let (entries, _) = <[RawEntry]>::mut_from_prefix_with_elems(rest, count).expect("2047 entries fit");
    for entry in entries {
        entry.required = U32::new(entry.required.get() & REQUIRED);
    }
    assert_eq!(bytes.len(), SIZE, "a copy has the length of a table");
    if bytes == copy {
        return None;
    }
    checksum::seal(&mut bytes);
    Some(bytes)
}

/// The copy, if signature and checksum say there is one.
fn intact(copy: &[u8]) -> std::result::Result<&[u8], Damage> {
    checksum::verify(copy, SIZE, SIGNATURE)
}

/// The refusal of a file without any region table.
fn neither(first: Damage, second: Damage) -> Error {
    let short = |damage| matches!(damage, Damage::Short { .. });
    let kind = if short(first) && short(second) { Kind::Truncated } else { Kind::Corrupt };
    let message = format!("neither copy is valid: the first has {first}; the second has {second}");
    Error::new(kind, message).in_structure("region tables").at(OFFSETS[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::testing::{noise, patch};
    use proptest::prelude::*;

    const BAT: Region = Region { guid: guid::REGION_BAT, offset: 3 << 20, length: 1 << 20, required: true };
    const METADATA: Region =
        Region { guid: guid::REGION_METADATA, offset: 2 << 20, length: 1 << 20, required: true };
    const STRANGER: Region =
        Region { guid: Uuid::from_u128(77), offset: 9 << 20, length: 5 << 20, required: false };

    fn sample() -> RegionTable {
        RegionTable::new(vec![BAT, METADATA, STRANGER]).expect("a good table")
    }

    fn refusal(entries: &[Region]) -> (Kind, String) {
        let error = RegionTable::new(entries.to_vec()).expect_err("a table to refuse");
        (error.kind(), error.to_string())
    }

    /// The sample with some bytes changed and the checksum renewed.
    fn patched(at: usize, with: &[u8]) -> Vec<u8> {
        let mut bytes = sample().encode();
        patch(&mut bytes, at, with);
        bytes
    }

    #[test]
    fn reserved_fields_are_zeroed_and_nothing_else() {
        assert_eq!(without_reserved(&sample().encode()), None);
        for at in [12, 15, 16 + 29, 16 + 32 + 31, 16 + 64 + 30] {
            assert_eq!(without_reserved(&patched(at, &[0x80])), Some(sample().encode()), "byte {at}");
        }
        let behind = patched(16 + 3 * 32 + 28, &[0x80]);
        assert_eq!(without_reserved(&behind), None, "what lies behind the last entry is not part of it");
    }

    #[test]
    fn every_field_lies_where_the_specification_puts_it() {
        let bytes = sample().encode();
        assert_eq!(bytes.len(), SIZE);
        assert_eq!(&bytes[..4], b"regi");
        assert_eq!(bytes[8..16], [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..32], guid::write(guid::REGION_BAT));
        assert_eq!(bytes[32..40], (3_u64 << 20).to_le_bytes());
        assert_eq!(bytes[40..48], [0, 0, 16, 0, 1, 0, 0, 0]);
        assert_eq!(bytes[80..96], guid::write(STRANGER.guid));
        assert_eq!(bytes[108..112], [0; 4]);
        assert!(bytes[112..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_table_is_sealed_as_windows_seals_it() {
        let table = RegionTable::new(vec![BAT, METADATA]).expect("what New-VHD lays out");
        assert_eq!(table.encode()[4..8], 0xc66b_8cae_u32.to_le_bytes());
    }

    #[test]
    fn a_table_knows_its_bat_its_metadata_and_keeps_strangers() {
        let table = RegionTable::parse(&sample().encode(), 0).expect("own table");
        assert_eq!((table.bat(), table.metadata()), (BAT, METADATA));
        assert_eq!(table.entries(), [BAT, METADATA, STRANGER]);
        assert_eq!(STRANGER.end(), 14 << 20);
    }

    #[test]
    fn a_missing_or_repeated_region_is_refused() {
        assert!(refusal(&[METADATA]).1.contains("the BAT region is missing"));
        assert!(refusal(&[BAT]).1.contains("the metadata region is missing"));
        let again = Region { offset: 100 << 20, ..BAT };
        assert!(refusal(&[BAT, METADATA, again]).1.contains("the BAT region is listed twice"));
    }

    #[test]
    fn a_required_region_nobody_knows_is_unsupported() {
        let (kind, message) = refusal(&[BAT, METADATA, Region { required: true, ..STRANGER }]);
        assert_eq!(kind, Kind::Unsupported);
        assert!(message.contains("{00000000-0000-0000-0000-00000000004d} is required"), "{message}");
    }

    #[test]
    fn a_misplaced_region_is_refused() {
        let moved =
            |offset: u64, length: u32| refusal(&[BAT, METADATA, Region { offset, length, ..STRANGER }]).1;
        assert!(moved((9 << 20) + 512, 1 << 20).contains("multiples of 1 MiB"));
        assert!(moved(9 << 20, 4096).contains("multiples of 1 MiB"));
        assert!(moved(0, 1 << 20).contains("cannot lie at byte 0"));
        assert!(moved(1 << 63, 1 << 20).contains("cannot lie"));
        assert!(moved(!(MIB - 1), 1 << 20).contains("cannot lie"));
        assert!(refusal(&[BAT, Region { length: 0, ..METADATA }]).1.contains("the metadata region is empty"));
    }

    #[test]
    fn regions_that_overlap_are_refused_by_name() {
        let on_bat = Region { offset: 1 << 20, length: 3 << 20, ..STRANGER };
        let message = refusal(&[BAT, Region { offset: 50 << 20, ..METADATA }, on_bat]).1;
        assert!(message.contains("the BAT region and region {") && message.contains("overlap"), "{message}");
        refusal(&[BAT, Region { offset: BAT.offset, ..METADATA }]);
    }

    #[test]
    fn a_region_too_large_to_be_needed_is_unsupported_and_the_limit_is_not() {
        let bat = |length| [Region { length, ..BAT }, METADATA];
        assert_eq!(refusal(&bat(MAX_BAT_LENGTH + (1 << 20))).0, Kind::Unsupported);
        RegionTable::new(bat(MAX_BAT_LENGTH).to_vec()).expect("64 TiB in blocks of 1 MiB");
        let metadata = |length| [BAT, Region { offset: 4 << 20, length, ..METADATA }];
        assert_eq!(refusal(&metadata(MAX_METADATA_LENGTH + (1 << 20))).0, Kind::Unsupported);
        RegionTable::new(metadata(MAX_METADATA_LENGTH).to_vec()).expect("128 MiB");
    }

    #[test]
    fn a_table_holds_2047_regions_and_no_more() {
        let strangers = (0..2046_u32).map(|i| Region {
            guid: Uuid::from_u128(1000 + u128::from(i)),
            offset: (100 + u64::from(i)) << 20,
            length: 1 << 20,
            required: false,
        });
        let mut entries: Vec<Region> = [BAT, METADATA].into_iter().chain(strangers).collect();
        assert!(refusal(&entries).1.contains("2048 regions, at most 2047"));
        entries.pop();
        let full = RegionTable::new(entries).expect("2047");
        assert_eq!(RegionTable::parse(&full.encode(), 1).expect("own table"), full);
        for count in [2048_u32, u32::MAX] {
            let error = RegionTable::parse(&patched(8, &count.to_le_bytes()), 0).expect_err("too many");
            assert!(error.to_string().starts_with("region table 1 at byte 196616: "), "{error}");
        }
    }

    #[test]
    fn a_bad_entry_is_named_with_its_place_in_the_file() {
        let error = RegionTable::parse(&patched(16 + 32 + 16, &[1]), 1).expect_err("misaligned metadata");
        let start = "region table 2 at byte 262192: the metadata region has";
        assert!(error.to_string().starts_with(start), "{error}");
    }

    #[test]
    fn reserved_bits_and_a_forgotten_required_bit_are_tolerated_and_not_written_again() {
        let mut bytes = patched(12, &[0xff; 4]);
        patch(&mut bytes, 44, &[0xfe, 0xff, 0xff, 0xff]);
        patch(&mut bytes, 108, &[0xfe, 0, 0, 0]);
        let table = RegionTable::parse(&bytes, 0).expect("odd bits");
        assert_eq!(table, sample());
        assert_eq!(table.encode(), sample().encode());
    }

    #[test]
    fn an_empty_bat_is_tolerated_for_a_disk_of_no_size() {
        let empty = Region { length: 0, ..BAT };
        assert_eq!(RegionTable::new(vec![empty, METADATA]).expect("no BAT").bat(), empty);
    }

    #[test]
    fn the_first_intact_copy_decides() {
        let good = sample().encode();
        let other = RegionTable::new(vec![BAT, METADATA]).expect("a good table");
        let other_bytes = other.encode();
        let mut torn = good.clone();
        torn[65535] = 1;
        let found = |first: &[u8], second: &[u8]| {
            let found = current([first, second]).expect("a table");
            (found.table, found.copies)
        };
        assert_eq!(found(&good, &good), (sample(), Copies::Equal));
        assert_eq!(found(&good, &other_bytes), (sample(), Copies::Different));
        assert_eq!(found(&other_bytes, &good), (other, Copies::Different));
        assert_eq!(found(&torn, &good), (sample(), Copies::FirstInvalid));
        assert_eq!(found(&good, &torn), (sample(), Copies::SecondInvalid));
        assert_eq!(found(&good, &good[..4096]), (sample(), Copies::SecondInvalid));
    }

    #[test]
    fn no_intact_copy_is_corrupt_and_a_file_too_short_truncated() {
        let error = current([&vec![0; SIZE], &[]]).expect_err("none");
        assert_eq!(error.kind(), Kind::Corrupt);
        assert!(error.to_string().starts_with("region tables at byte 196608: neither"), "{error}");
        assert_eq!(current([&[], &[]]).expect_err("none").kind(), Kind::Truncated);
    }

    #[test]
    fn an_intact_first_copy_that_cannot_be_is_not_passed_over() {
        let error = current([&patched(32, &[1]), &sample().encode()]).expect_err("misaligned BAT");
        assert!(error.to_string().starts_with("region table 1 at byte 196624"), "{error}");
    }

    prop_compose! {
        /// Regions side by side with gaps, the BAT and the metadata somewhere among them.
        fn any_table()(
            strangers in prop::collection::vec((any::<u128>(), 0_u64..9, 1_u32..50), 0..40),
            gaps in (0_u64..9, 0_u64..9), lengths in (1_u32..=513, 1_u32..=128), turn: prop::sample::Index,
        ) -> RegionTable {
            let mut all: Vec<(Uuid, u64, u32)> =
                strangers.into_iter().map(|(id, gap, mib)| (Uuid::from_u128(id), gap, mib)).collect();
            all.push((guid::REGION_BAT, gaps.0, lengths.0));
            all.push((guid::REGION_METADATA, gaps.1, lengths.1));
            let turn = turn.index(all.len());
            all.rotate_left(turn);
            let mut at = 1_u64;
            let entries = all.into_iter().map(|(guid, gap, mib)| {
                let offset = (at + gap) << 20;
                at += gap + u64::from(mib);
                let required = [BAT.guid, METADATA.guid].contains(&guid);
                Region { guid, offset, length: mib << 20, required }
            });
            RegionTable::new(entries.collect()).expect("side by side")
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_table_comes_back(table in any_table(), copy in 0_usize..2) {
            prop_assert_eq!(RegionTable::parse(&table.encode(), copy).expect("own table"), table);
        }

        #[test]
        fn no_bytes_make_the_parser_panic(
            table in any_table(), seed: u64, len in 0_usize..=65536, at in 8_usize..600
        ) {
            let bytes = noise(seed, len);
            prop_assert!(RegionTable::parse(&bytes, 0).is_err());
            prop_assert!(current([&bytes, &bytes]).is_err());
            let mut sealed = table.encode();
            patch(&mut sealed, at, &noise(seed, len % 40));
            if let Ok(table) = RegionTable::parse(&sealed, 1) {
                prop_assert_eq!(RegionTable::parse(&table.encode(), 1).expect("own table"), table);
            }
            let mut hostile = noise(seed, SIZE);
            hostile[..4].copy_from_slice(&SIGNATURE);
            patch(&mut hostile, 8, &[len.to_le_bytes()[0], 7, 0, 0]);
            prop_assert!(RegionTable::parse(&hostile, 1).is_err());
        }
    }
}
