//! Log entries: what a torn one looks like, what a whole one changes, and which of them count.
//!
//! Invariants:
//!
//! * An entry is valid or it is not; an invalid one is what a power cut leaves and never an error by itself.
//!   [`Entry::parse`] therefore returns [`Rejected`], and only [`find_active`] finding nothing may fail an
//!   open.
//! * A valid entry changes nothing below the region tables and nothing in the log itself.
//! * Two valid entries never overlap: every sector of an entry but its first begins with `data`, `desc` or
//!   `zero`, and an entry begins with `loge`.
//! * Replay starts at the tail of the last entry of the active sequence. Older entries may still be whole and
//!   must not be replayed: what they changed may since have become payload.
//! * What is written has at most [`MAX_DESCRIPTORS_WRITTEN`] descriptors and changes each page once.
//!
//! [Rules 60 to 68](crate::design::vhdx_rules#rule-60) for reading,
//! [rules 73 to 84](crate::design::vhdx_rules#rule-73) for writing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

use uuid::Uuid;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{MIB, PAGE, checksum, guid, range_end, region};
use crate::simulation::{Plant, descriptors_per_entry, planted};

/// Bytes of a log sector: entries start on one and consist of whole ones.
pub const SECTOR: usize = 4096;

/// The most descriptors of an entry we write: what fits its first sector. QEMU up to and including 11.1
/// cannot read an entry with a second sector of descriptors. Any number the format allows is read.
pub const MAX_DESCRIPTORS_WRITTEN: usize = 126;

/// Where the log may first change the file, in bytes: the region tables. The file identifier never changes
/// and the headers change by a protocol of their own.
pub const LOWEST_TARGET: u64 = region::OFFSETS[0];

/// [`MAX_DESCRIPTORS_WRITTEN`], unless a simulation wants entries of another length.
pub fn max_descriptors_written() -> usize {
    descriptors_per_entry(MAX_DESCRIPTORS_WRITTEN)
}

const SIGNATURE: [u8; 4] = *b"loge";
const DATA_DESCRIPTOR: [u8; 4] = *b"desc";
const ZERO_DESCRIPTOR: [u8; 4] = *b"zero";
const DATA_SECTOR: [u8; 4] = *b"data";

/// [`SECTOR`] as lengths and offsets have it.
const SECTOR_BYTES: u32 = 4096;
const _: () = assert!(SECTOR_BYTES as usize == SECTOR && SECTOR == PAGE);

/// Bytes of a page that its descriptor holds, at the page's start and end.
const LEADING: usize = 8;
const TRAILING: usize = 4;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    signature: [u8; 4],
    checksum: U32,
    entry_length: U32,
    tail: U32,
    sequence_number: U64,
    descriptor_count: U32,
    reserved: U32,
    log_guid: [u8; 16],
    flushed_file_offset: U64,
    last_file_offset: U64,
}

/// Both kinds of descriptor: `trailing` is reserved and `leading` is the length in one of zeros.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawDescriptor {
    signature: [u8; 4],
    trailing: [u8; TRAILING],
    leading: [u8; LEADING],
    file_offset: U64,
    sequence_number: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawData {
    signature: [u8; 4],
    sequence_high: U32,
    bytes: [u8; PAGE - LEADING - TRAILING],
    sequence_low: U32,
}

const _: () = assert!(size_of::<RawHeader>() == 64);
const _: () = assert!(size_of::<RawDescriptor>() == 32);
const _: () = assert!(size_of::<RawData>() == SECTOR);
const _: () =
    assert!(size_of::<RawHeader>() + MAX_DESCRIPTORS_WRITTEN * size_of::<RawDescriptor>() == SECTOR);

/// What an entry says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryHeader {
    /// Bytes of the entry, a multiple of 4096.
    pub entry_length: u32,
    /// Where the oldest entry lies that must be replayed with this one, in bytes from the start of the log.
    pub tail: u32,
    /// One more than the entry's before; never 0.
    pub sequence_number: u64,
    /// Changes in the entry.
    pub descriptor_count: u32,
    /// The log this entry belongs to; entries of another are garbage.
    pub log_guid: Uuid,
    /// Bytes of the file that were durable when the entry was written: a shorter file has lost something. A
    /// multiple of 1 MiB by the format, but QEMU writes any length.
    pub flushed_file_offset: u64,
    /// Bytes the file must have once the entry is replayed. As above.
    pub last_file_offset: u64,
}

impl EntryHeader {
    /// The header of the entry that may start with this sector: every check that its first 64 bytes allow.
    /// None if there is none, or if it is not of the log `log_guid`, which has `log_length` bytes.
    pub fn peek(sector: &[u8], log_guid: Uuid, log_length: u32) -> Option<Self> {
        let (raw, _) = RawHeader::ref_from_prefix(sector).ok()?;
        if raw.signature != SIGNATURE || log_guid.is_nil() || guid::read(&raw.log_guid) != log_guid {
            return None;
        }
        let header = Self {
            entry_length: raw.entry_length.get(),
            tail: raw.tail.get(),
            sequence_number: raw.sequence_number.get(),
            descriptor_count: raw.descriptor_count.get(),
            log_guid,
            flushed_file_offset: raw.flushed_file_offset.get(),
            last_file_offset: raw.last_file_offset.get(),
        };
        let aligned =
            header.entry_length.is_multiple_of(SECTOR_BYTES) && header.tail.is_multiple_of(SECTOR_BYTES);
        let inside = (SECTOR_BYTES..=log_length).contains(&header.entry_length) && header.tail < log_length;
        let holds_its_descriptors = descriptor_bytes(header.descriptor_count) <= header.entry_length.into();
        (aligned && inside && holds_its_descriptors && header.sequence_number > 0).then_some(header)
    }

    /// Whether this sector carries `log_guid` where an entry does, whatever else it holds. If no sector of a
    /// log does, no entry of that log ever reached the disk, and nothing can have been applied from one.
    pub fn carries(sector: &[u8], log_guid: Uuid) -> bool {
        RawHeader::ref_from_prefix(sector).is_ok_and(|(raw, _)| guid::read(&raw.log_guid) == log_guid)
    }
}

/// Bytes of an entry's header and this many descriptors, rounded up to sectors.
fn descriptor_bytes(count: u32) -> u64 {
    let bytes = size_of::<RawHeader>() as u64 + u64::from(count) * size_of::<RawDescriptor>() as u64;
    bytes.next_multiple_of(SECTOR_BYTES.into())
}

/// One thing an entry does to the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Write this page.
    Data {
        /// Where, in bytes; a multiple of 4096.
        file_offset: u64,
        /// What.
        page: Box<[u8; PAGE]>,
    },
    /// Write zeros.
    Zero {
        /// Where, in bytes; a multiple of 4096.
        file_offset: u64,
        /// How many bytes; a multiple of 4096, never 0.
        length: u64,
    },
}

impl Change {
    /// The bytes of the file that change.
    pub fn range(&self) -> Range<u64> {
        match *self {
            Self::Data { file_offset, .. } => file_offset..file_offset + PAGE as u64,
            Self::Zero { file_offset, length } => file_offset..file_offset + length,
        }
    }
}

/// Why bytes are not a valid entry. Numbers count descriptors and data sectors from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// The first 64 bytes are not those of an entry of this log.
    Header,
    /// The entry does not have as many bytes as it says.
    Length,
    /// The checksum does not match: a torn write.
    Checksum,
    /// A descriptor is of no known kind, of another entry, or not aligned.
    Descriptor(usize),
    /// A descriptor would change what the log must not, or bytes no file has.
    Target(usize),
    /// A data sector is not one, or of another entry.
    DataSector(usize),
    /// There are more or fewer data sectors than the descriptors ask for.
    DataCount,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => write!(f, "no entry of this log starts here"),
            Self::Length => write!(f, "the entry's length field does not match its size"),
            Self::Checksum => write!(f, "the checksum does not match"),
            Self::Descriptor(index) => write!(f, "descriptor {index} is not one of this entry"),
            Self::Target(index) => write!(f, "descriptor {index} would change what the log must not"),
            Self::DataSector(index) => write!(f, "data sector {index} is not one of this entry"),
            Self::DataCount => write!(f, "descriptors and data sectors do not match in number"),
        }
    }
}

impl std::error::Error for Rejected {}

/// A valid entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it says about itself.
    pub header: EntryHeader,
    /// What it does, in this order. A later change may cover an earlier one.
    pub changes: Vec<Change>,
}

impl Entry {
    /// Reads an entry from exactly its bytes, the end of the ring joined to its start. `log` is where the log
    /// lies in the file, in bytes.
    ///
    /// Tolerated: any number of descriptors that fits; zero descriptors without length, which are dropped;
    /// file lengths that are no multiples of 1 MiB; non-zero reserved fields.
    ///
    /// # Errors
    /// The first check that fails.
    ///
    /// # Panics
    /// If `log` is longer than a header can say.
    pub fn parse(bytes: &[u8], log_guid: Uuid, log: Range<u64>) -> Result<Self, Rejected> {
        let log_length = log.end.checked_sub(log.start).and_then(|length| u32::try_from(length).ok());
        let log_length = log_length.expect("a header's log length has 32 bits");
        let header = EntryHeader::peek(bytes, log_guid, log_length).ok_or(Rejected::Header)?;
        if header.entry_length as usize != bytes.len() {
            return Err(Rejected::Length);
        }
        if checksum::verify(bytes, bytes.len(), SIGNATURE).is_err() && !planted(Plant::SkipChecksum) {
            return Err(Rejected::Checksum);
        }
        let split =
            usize::try_from(descriptor_bytes(header.descriptor_count)).map_err(|_| Rejected::Length)?;
        let (head, data) = bytes.split_at_checked(split).ok_or(Rejected::Length)?;
        let count = header.descriptor_count as usize;
        let descriptors = &head[size_of::<RawHeader>()..];
        let (descriptors, _) = <[RawDescriptor]>::ref_from_prefix_with_elems(descriptors, count)
            .expect("the split leaves room for the descriptors");
        let data = <[RawData]>::ref_from_bytes(data).expect("an entry is whole sectors");
        let changes = read_changes(descriptors, data, header.sequence_number, &log)?;
        Ok(Self { header, changes })
    }
}

/// The changes of an entry with this sequence number, in the order of its descriptors.
fn read_changes(
    descriptors: &[RawDescriptor],
    data: &[RawData],
    sequence: u64,
    log: &Range<u64>,
) -> Result<Vec<Change>, Rejected> {
    let mut changes = Vec::with_capacity(descriptors.len());
    let mut used = 0;
    for (index, descriptor) in descriptors.iter().enumerate() {
        if descriptor.sequence_number.get() != sequence {
            return Err(Rejected::Descriptor(index));
        }
        let file_offset = descriptor.file_offset.get();
        let change = match descriptor.signature {
            DATA_DESCRIPTOR => {
                let sector = data.get(used).ok_or(Rejected::DataCount)?;
                let page = join_page(descriptor, sector, sequence).ok_or(Rejected::DataSector(used))?;
                used += 1;
                Change::Data { file_offset, page }
            }
            ZERO_DESCRIPTOR => Change::Zero { file_offset, length: u64::from_le_bytes(descriptor.leading) },
            _ => return Err(Rejected::Descriptor(index)),
        };
        let length = match change {
            Change::Data { .. } => PAGE as u64,
            Change::Zero { length, .. } => length,
        };
        if !file_offset.is_multiple_of(PAGE as u64) || !length.is_multiple_of(PAGE as u64) {
            return Err(Rejected::Descriptor(index));
        }
        if length == 0 {
            continue;
        }
        let end = range_end(file_offset, length).ok_or(Rejected::Target(index))?;
        let on_log = file_offset.max(log.start) < end.min(log.end);
        if file_offset < LOWEST_TARGET || on_log {
            return Err(Rejected::Target(index));
        }
        changes.push(change);
    }
    assert!(used <= data.len() && changes.len() <= descriptors.len(), "each change has its descriptor");
    if used == data.len() { Ok(changes) } else { Err(Rejected::DataCount) }
}

/// The page that a descriptor and its data sector hold, if the sector is of the same entry.
fn join_page(descriptor: &RawDescriptor, sector: &RawData, sequence: u64) -> Option<Box<[u8; PAGE]>> {
    let found = u64::from(sector.sequence_high.get()) << 32 | u64::from(sector.sequence_low.get());
    if sector.signature != DATA_SECTOR || found != sequence {
        return None;
    }
    let mut page = Box::new([0; PAGE]);
    page[..LEADING].copy_from_slice(&descriptor.leading);
    page[LEADING..PAGE - TRAILING].copy_from_slice(&sector.bytes);
    page[PAGE - TRAILING..].copy_from_slice(&descriptor.trailing);
    Some(page)
}

/// An entry to be written.
#[derive(Clone, Copy, Debug)]
pub struct NewEntry<'a> {
    /// One more than the entry's before; never 0.
    pub sequence_number: u64,
    /// Where the oldest entry lies whose changes are not yet durable in place, in bytes from the start of the
    /// log; this entry's own place if there is none.
    pub tail: u32,
    /// The log it belongs to; never nil.
    pub log_guid: Uuid,
    /// Bytes of the file that are durable now; a multiple of 1 MiB. Too much makes the file unopenable.
    pub flushed_file_offset: u64,
    /// Bytes the file must have once this is replayed; a multiple of 1 MiB.
    pub last_file_offset: u64,
    /// What it does; each page at most once as data.
    pub changes: &'a [Change],
}

impl NewEntry<'_> {
    /// Bytes of the entry.
    pub fn length(&self) -> u32 {
        let data = self.changes.iter().filter(|change| matches!(change, Change::Data { .. })).count();
        let count = u32::try_from(self.changes.len()).expect("an entry is smaller than the log");
        let bytes = descriptor_bytes(count) + (data * SECTOR) as u64;
        u32::try_from(bytes).expect("an entry is smaller than the log")
    }

    /// The bytes of the entry, sealed, to be written at the head of the log, the ring's end joined to its
    /// start.
    ///
    /// # Panics
    /// If there are more than [`MAX_DESCRIPTORS_WRITTEN`] changes, a number is not a multiple of what its
    /// documentation says, a change is empty, below [`LOWEST_TARGET`] or past what a file can hold, or a page
    /// is there twice.
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.changes.len() <= max_descriptors_written(), "others cannot read longer entries");
        self.check();
        self.lay_out()
    }

    fn check(&self) {
        assert!(self.sequence_number > 0, "0 is no sequence number");
        assert!(!self.log_guid.is_nil(), "a nil GUID is an empty log");
        assert!(self.tail.is_multiple_of(SECTOR_BYTES), "entries start on sectors");
        assert!(self.flushed_file_offset.is_multiple_of(MIB) && self.last_file_offset.is_multiple_of(MIB));
        let mut pages = BTreeSet::new();
        for change in self.changes {
            let (file_offset, length) = match *change {
                Change::Data { file_offset, .. } => {
                    assert!(pages.insert(file_offset), "page {file_offset} is there twice");
                    (file_offset, PAGE as u64)
                }
                Change::Zero { file_offset, length } => (file_offset, length),
            };
            assert!(
                file_offset.is_multiple_of(PAGE as u64) && length.is_multiple_of(PAGE as u64) && length > 0
            );
            assert!(
                file_offset >= LOWEST_TARGET,
                "the log does not change the header section at {file_offset}"
            );
            assert!(range_end(file_offset, length).is_some(), "no file has {length} bytes at {file_offset}");
        }
    }

    /// The bytes, whatever the number of changes.
    fn lay_out(&self) -> Vec<u8> {
        let entry_length = self.length();
        let count = u32::try_from(self.changes.len()).expect("length checked it");
        let header = RawHeader {
            signature: SIGNATURE,
            checksum: U32::new(0),
            entry_length: U32::new(entry_length),
            tail: U32::new(self.tail),
            sequence_number: U64::new(self.sequence_number),
            descriptor_count: U32::new(count),
            reserved: U32::new(0),
            log_guid: guid::write(self.log_guid),
            flushed_file_offset: U64::new(self.flushed_file_offset),
            last_file_offset: U64::new(self.last_file_offset),
        };
        let mut bytes = Vec::with_capacity(entry_length as usize);
        bytes.extend_from_slice(header.as_bytes());
        for change in self.changes {
            bytes.extend_from_slice(self.descriptor(change).as_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
        for change in self.changes {
            if let Change::Data { page, .. } = change {
                self.put_data(&mut bytes, page);
            }
        }
        assert_eq!(bytes.len(), entry_length as usize, "an entry has the length it says");
        assert!(bytes.len().is_multiple_of(SECTOR), "an entry is whole sectors");
        checksum::seal(&mut bytes);
        debug_assert!(EntryHeader::peek(&bytes, self.log_guid, u32::MAX).is_some(), "it reads back");
        bytes
    }

    fn descriptor(&self, change: &Change) -> RawDescriptor {
        let (signature, trailing, leading, file_offset) = match change {
            Change::Data { file_offset, page } => {
                let (mut trailing, mut leading) = ([0; TRAILING], [0; LEADING]);
                trailing.copy_from_slice(&page[PAGE - TRAILING..]);
                leading.copy_from_slice(&page[..LEADING]);
                (DATA_DESCRIPTOR, trailing, leading, *file_offset)
            }
            Change::Zero { file_offset, length } => {
                (ZERO_DESCRIPTOR, [0; TRAILING], length.to_le_bytes(), *file_offset)
            }
        };
        RawDescriptor {
            signature,
            trailing,
            leading,
            file_offset: U64::new(file_offset),
            sequence_number: U64::new(self.sequence_number),
        }
    }

    /// Appends the data sector of `page`: the sequence number's halves frame what the descriptor does not
    /// hold.
    fn put_data(&self, bytes: &mut Vec<u8>, page: &[u8; PAGE]) {
        let sequence = self.sequence_number.to_le_bytes();
        assert!(bytes.len().is_multiple_of(SECTOR), "data sectors follow the descriptors'");
        bytes.extend_from_slice(&DATA_SECTOR);
        bytes.extend_from_slice(&sequence[4..]);
        bytes.extend_from_slice(&page[LEADING..PAGE - TRAILING]);
        bytes.extend_from_slice(&sequence[..4]);
    }
}

/// Finds the active sequence among the valid entries of a log of `log_length` bytes, given by their offset in
/// it.
///
/// A sequence is a run of entries, each starting where the one before ends (round the ring's end too) with
/// the next sequence number; it goes as far as it can, never once round the ring and on. It is valid if its
/// last entry's tail names an entry of it. The active one is the valid one with the greatest last sequence
/// number. Returned are its entries from that tail to the last, in replay order: those before the tail are
/// dropped.
///
/// MS-VHDX 2.3.3 ([rule 64](crate::design::vhdx_rules#rule-64)) searches from every sector anew,
/// which hostile logs make quadratic. Here every entry learns
/// its run's end from its successor, greatest sequence number first: sorting is the greatest cost. On entries
/// that do not overlap, as valid ones never do, the answer is the same.
pub fn find_active(entries: &BTreeMap<u32, EntryHeader>, log_length: u32) -> Option<Vec<u32>> {
    let runs = Runs::new(entries, log_length);
    // Ascending offsets of the tail, and only a greater number displaces: the search of MS-VHDX breaks ties
    // so.
    let mut best: Option<(u64, u32, u32)> = None;
    for (&tail, run) in &runs.by_offset {
        let last = &entries[&run.end];
        let lapped = run.bytes > log_length.into();
        let whole = last.tail == tail || planted(Plant::KeepLaterEntries);
        if whole && !lapped && best.is_none_or(|(number, ..)| last.sequence_number > number) {
            best = Some((last.sequence_number, tail, run.end));
        }
    }
    let (_, mut tail, end) = best?;
    while planted(Plant::ReplayBeforeTail)
        && let Some(earlier) = runs.before(tail)
    {
        tail = earlier;
    }
    let mut active = vec![tail];
    let mut at = tail;
    while at != end {
        at = runs.by_offset[&at].next.expect("only the end of a run has no successor");
        active.push(at);
        assert!(active.len() <= entries.len(), "sequence numbers rise along a run, so it never meets itself");
    }
    Some(active)
}

/// For every entry, the rest of the run it belongs to.
struct Runs {
    by_offset: BTreeMap<u32, Rest>,
}

/// The run from one entry on.
struct Rest {
    /// Where the next entry lies in the log; none for the last.
    next: Option<u32>,
    /// Where the run's last entry lies in the log.
    end: u32,
    /// Bytes of the run from here, end included.
    bytes: u64,
}

impl Runs {
    fn new(entries: &BTreeMap<u32, EntryHeader>, log_length: u32) -> Self {
        let mut newest_first: Vec<u32> = entries.keys().copied().collect();
        newest_first.sort_by_key(|offset| std::cmp::Reverse(entries[offset].sequence_number));
        let mut by_offset: BTreeMap<u32, Rest> = BTreeMap::new();
        for offset in newest_first {
            let entry = &entries[&offset];
            let next = successor(entries, log_length, offset, entry);
            let length = u64::from(entry.entry_length);
            let rest = match next.map(|next| &by_offset[&next]) {
                Some(rest) => Rest { next, end: rest.end, bytes: rest.bytes.saturating_add(length) },
                None => Rest { next, end: offset, bytes: length },
            };
            by_offset.insert(offset, rest);
        }
        Self { by_offset }
    }

    /// The entry that the one at `offset` continues.
    fn before(&self, offset: u32) -> Option<u32> {
        self.by_offset.iter().find(|(_, rest)| rest.next == Some(offset)).map(|(before, _)| *before)
    }
}

/// Where the entry lies that continues the run, if there is one. Its number is greater, so its rest is known.
fn successor(
    entries: &BTreeMap<u32, EntryHeader>,
    log_length: u32,
    offset: u32,
    entry: &EntryHeader,
) -> Option<u32> {
    let end = u64::from(offset) + u64::from(entry.entry_length);
    let next = u32::try_from(end.checked_rem(log_length.into())?).ok()?;
    let number = entry.sequence_number.checked_add(1)?;
    (entries.get(&next)?.sequence_number == number).then_some(next)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::testing::{noise, patch};
    use proptest::prelude::*;

    const GUID: Uuid = Uuid::from_u128(0x10c);
    const OTHER: Uuid = Uuid::from_u128(0x01d);
    /// A log of 4 MiB behind the header section.
    const LOG: Range<u64> = MIB..5 * MIB;
    const LOG_LENGTH: u32 = 4 << 20;
    const S: u32 = SECTOR_BYTES;

    fn data(file_offset: u64, seed: u64) -> Change {
        let page = noise(seed, PAGE).try_into().expect("a page");
        Change::Data { file_offset, page: Box::new(page) }
    }

    fn zero(file_offset: u64, length: u64) -> Change {
        Change::Zero { file_offset, length }
    }

    /// `count` pages side by side, none of them in the log.
    fn pages(count: u64) -> Vec<Change> {
        (0..count).map(|i| data(8 * MIB + i * PAGE as u64, i)).collect()
    }

    fn new_entry(changes: &[Change]) -> NewEntry<'_> {
        NewEntry {
            sequence_number: 0x1_0000_0002,
            tail: 0,
            log_guid: GUID,
            flushed_file_offset: 6 * MIB,
            last_file_offset: 9 * MIB,
            changes,
        }
    }

    fn parse(bytes: &[u8]) -> Result<Entry, Rejected> {
        Entry::parse(bytes, GUID, LOG)
    }

    /// The entry with some bytes changed and the checksum renewed, so that the check behind it is reached.
    fn patched(changes: &[Change], at: usize, with: &[u8]) -> Result<Entry, Rejected> {
        let mut bytes = new_entry(changes).lay_out();
        patch(&mut bytes, at, with);
        parse(&bytes)
    }

    #[test]
    fn every_field_lies_where_the_specification_puts_it() {
        let changes = [data(2 * 196_608, 1), zero(16 * MIB, MIB)];
        let entry = NewEntry { tail: 3 * S, ..new_entry(&changes) };
        let bytes = entry.encode();
        assert_eq!((bytes.len(), entry.length()), (2 * SECTOR, 2 * S));
        assert_eq!(&bytes[..4], b"loge");
        assert_eq!(bytes[8..16], [0, 0x20, 0, 0, 0, 0x30, 0, 0]);
        assert_eq!(bytes[16..24], [2, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(bytes[24..32], [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[32..48], guid::write(GUID));
        assert_eq!(bytes[48..56], (6 * MIB).to_le_bytes());
        assert_eq!(bytes[56..64], (9 * MIB).to_le_bytes());
        let page = noise(1, PAGE);
        assert_eq!(&bytes[64..68], b"desc");
        assert_eq!(bytes[68..72], page[4092..]);
        assert_eq!(bytes[72..80], page[..8]);
        assert_eq!(bytes[80..88], (2_u64 * 196_608).to_le_bytes());
        assert_eq!(bytes[88..96], 0x1_0000_0002_u64.to_le_bytes());
        assert_eq!(&bytes[96..104], b"zero\0\0\0\0");
        assert_eq!(bytes[104..112], MIB.to_le_bytes());
        assert_eq!(bytes[112..120], (16 * MIB).to_le_bytes());
        assert_eq!(bytes[120..128], 0x1_0000_0002_u64.to_le_bytes());
        assert!(bytes[128..4096].iter().all(|&byte| byte == 0));
        assert_eq!(&bytes[4096..4104], b"data\x01\0\0\0");
        assert_eq!(bytes[4104..8188], page[8..4092]);
        assert_eq!(bytes[8188..], [2, 0, 0, 0]);
    }

    #[test]
    fn entries_of_any_number_of_descriptors_are_read() {
        for (count, descriptor_sectors) in
            [(0, 1), (1, 1), (126, 1), (127, 2), (253, 2), (254, 2), (255, 3), (600, 5)]
        {
            let changes = pages(count);
            let bytes = new_entry(&changes).lay_out();
            assert_eq!(bytes.len() as u64, PAGE as u64 * (descriptor_sectors + count), "{count}");
            let entry = parse(&bytes).expect("an entry");
            assert_eq!(entry.changes, changes);
            assert_eq!(u64::from(entry.header.descriptor_count), count);
        }
        let zeros: Vec<Change> = (0..1000).map(|i| zero(8 * MIB + i * MIB, MIB)).collect();
        assert_eq!(parse(&new_entry(&zeros).lay_out()).expect("only zeros").changes, zeros);
    }

    #[test]
    fn an_entry_that_fills_the_whole_log_is_read() {
        let changes = pages(1024 - 8);
        let bytes = new_entry(&changes).lay_out();
        assert_eq!(bytes.len(), LOG_LENGTH as usize);
        assert_eq!(parse(&bytes).expect("a full log").changes.len(), 1016);
        assert_eq!(Entry::parse(&bytes, GUID, MIB..4 * MIB), Err(Rejected::Header), "longer than its log");
    }

    #[test]
    fn what_is_written_has_at_most_126_descriptors_in_one_sector() {
        let changes = pages(126);
        let bytes = new_entry(&changes).encode();
        assert_eq!(bytes.len(), 127 * SECTOR);
        assert_eq!(&bytes[SECTOR..SECTOR + 4], b"data");
    }

    #[test]
    #[should_panic(expected = "others cannot read longer entries")]
    fn an_entry_of_127_descriptors_is_never_written() {
        new_entry(&pages(127)).encode();
    }

    #[test]
    #[should_panic(expected = "does not change the header section")]
    fn a_header_is_never_changed_through_the_log() {
        new_entry(&[data(131_072, 0)]).encode();
    }

    #[test]
    #[should_panic(expected = "is there twice")]
    fn a_page_is_never_logged_twice_in_one_entry() {
        new_entry(&[data(8 * MIB, 0), data(8 * MIB, 1)]).encode();
    }

    #[test]
    #[should_panic(expected = "a nil GUID is an empty log")]
    fn an_entry_under_no_guid_is_never_written() {
        NewEntry { log_guid: Uuid::nil(), ..new_entry(&[]) }.encode();
    }

    #[test]
    fn zeros_then_a_page_over_them_come_back_in_that_order() {
        let changes = [zero(8 * MIB, MIB), data(8 * MIB, 4)];
        let entry = parse(&new_entry(&changes).encode()).expect("an entry");
        assert_eq!(entry.changes, changes);
        assert_eq!(entry.changes[0].range(), 8 * MIB..9 * MIB);
        assert_eq!(entry.changes[1].range(), 8 * MIB..8 * MIB + 4096);
    }

    #[test]
    fn an_entry_torn_in_any_512_bytes_is_rejected() {
        let changes = pages(3);
        let whole = new_entry(&changes).encode();
        let stale = NewEntry { sequence_number: 1, ..new_entry(&changes) }.encode();
        for at in (0..whole.len()).step_by(512) {
            for old in [&stale, &vec![0; whole.len()], &noise(at as u64, whole.len())] {
                let mut torn = whole.clone();
                torn[at..at + 512].copy_from_slice(&old[at..at + 512]);
                assert_eq!(torn == whole, parse(&torn).is_ok(), "torn at {at}");
            }
        }
        assert_eq!(parse(&whole[..whole.len() - SECTOR]), Err(Rejected::Length));
        let mut flipped = whole;
        flipped[3 * SECTOR + 17] ^= 1;
        assert_eq!(parse(&flipped), Err(Rejected::Checksum));
    }

    #[test]
    fn an_entry_of_another_log_or_of_none_is_not_seen() {
        let bytes = NewEntry { log_guid: OTHER, ..new_entry(&[]) }.encode();
        assert_eq!(parse(&bytes), Err(Rejected::Header));
        assert!(EntryHeader::peek(&bytes, OTHER, LOG_LENGTH).is_some());
        let nil = {
            let mut bytes = bytes.clone();
            patch(&mut bytes, 32, &[0; 16]);
            bytes
        };
        assert_eq!(EntryHeader::peek(&nil, Uuid::nil(), LOG_LENGTH), None, "an empty log has no entries");
        assert!(EntryHeader::carries(&bytes, OTHER) && !EntryHeader::carries(&bytes, GUID));
        assert!(!EntryHeader::carries(&bytes[..63], OTHER));
    }

    #[test]
    fn a_header_whose_numbers_cannot_be_is_not_seen() {
        let whole = new_entry(&[]).encode();
        assert!(EntryHeader::peek(&whole[..64], GUID, LOG_LENGTH).is_some(), "64 bytes are enough");
        assert_eq!(EntryHeader::peek(&whole[..63], GUID, LOG_LENGTH), None);
        let cases: [(usize, &[u8]); 10] = [
            (0, b"logf"),
            (8, &[0, 0, 0, 0]),              // no length
            (8, &[1, 0x10, 0, 0]),           // odd length
            (8, &[0, 0x10, 0x40, 0]),        // longer than the log
            (12, &[1, 0, 0, 0]),             // odd tail
            (12, &[0, 0, 0x40, 0]),          // tail behind the log
            (16, &[0; 8]),                   // sequence number 0
            (24, &[127, 0, 0, 0]),           // descriptors that do not fit
            (24, &[0xff, 0xff, 0xff, 0xff]), // descriptors that no entry holds
            (32, &[0; 16]),                  // no GUID
        ];
        for (at, with) in cases {
            let mut bytes = whole.clone();
            patch(&mut bytes, at, with);
            assert_eq!(EntryHeader::peek(&bytes, GUID, LOG_LENGTH), None, "{at}: {with:?}");
            assert_eq!(parse(&bytes), Err(Rejected::Header), "{at}: {with:?}");
        }
    }

    #[test]
    fn a_descriptor_that_is_not_one_of_its_entry_is_rejected() {
        let changes = [data(8 * MIB, 0), zero(16 * MIB, MIB)];
        assert_eq!(patched(&changes, 64, b"dasc"), Err(Rejected::Descriptor(0)));
        assert_eq!(patched(&changes, 88, &[3]), Err(Rejected::Descriptor(0)));
        assert_eq!(patched(&changes, 120, &[3]), Err(Rejected::Descriptor(1)));
        assert_eq!(patched(&changes, 80, &[0, 2]), Err(Rejected::Descriptor(0)), "a page off its grid");
        assert_eq!(patched(&changes, 112, &[0, 2]), Err(Rejected::Descriptor(1)), "zeros off their grid");
        assert_eq!(patched(&changes, 104, &[0, 2]), Err(Rejected::Descriptor(1)), "zeros of an odd length");
    }

    #[test]
    fn an_entry_that_would_change_headers_log_or_what_no_file_has_is_rejected() {
        let at = |offset: u64| patched(&[data(8 * MIB, 0)], 80, &offset.to_le_bytes());
        for offset in [0, 65536, 192_512, MIB, 5 * MIB - 4096, u64::MAX - 4095, 1 << 63] {
            assert_eq!(at(offset), Err(Rejected::Target(0)), "{offset}");
        }
        for offset in [196_608, MIB - 4096, 5 * MIB, MAX_FILE_PAGE] {
            at(offset).expect("a page the log may change");
        }
        let zeros = |offset: u64, length: u64| {
            patched(&[zero(8 * MIB, MIB)], 72, &[length.to_le_bytes(), offset.to_le_bytes()].concat())
        };
        for (offset, length) in
            [(0, MIB), (524_288, MIB), (5 * MIB - 4096, MIB), (8 * MIB, 1 << 63), (8 * MIB, u64::MAX - 4095)]
        {
            assert_eq!(zeros(offset, length), Err(Rejected::Target(0)), "{offset} {length}");
        }
        zeros(5 * MIB, 1 << 62).expect("long, but a file may be");
    }

    /// The last page that a file can have.
    const MAX_FILE_PAGE: u64 = (1 << 63) - 8192;

    #[test]
    fn a_data_sector_that_is_not_one_of_its_entry_is_rejected() {
        let changes = pages(2);
        assert_eq!(patched(&changes, 4096, b"dato"), Err(Rejected::DataSector(0)));
        assert_eq!(patched(&changes, 8192 + 4, &[2]), Err(Rejected::DataSector(1)), "upper half");
        assert_eq!(patched(&changes, 12284, &[3]), Err(Rejected::DataSector(1)), "lower half");
    }

    #[test]
    fn data_sectors_too_few_or_too_many_are_rejected() {
        let changes = pages(2);
        assert_eq!(patched(&changes, 24, &[1]), Err(Rejected::DataCount), "one descriptor, two sectors");
        assert_eq!(patched(&changes, 64, b"zero"), Err(Rejected::Descriptor(0)), "a page is no length");
        let mut bytes = new_entry(&changes).encode();
        bytes.truncate(2 * SECTOR);
        patch(&mut bytes, 8, &[0, 0x20]);
        assert_eq!(parse(&bytes), Err(Rejected::DataCount), "two descriptors, one sector");
    }

    #[test]
    fn zeros_without_length_are_tolerated_and_dropped() {
        let entry = patched(&[zero(8 * MIB, MIB), data(8 * MIB, 0)], 72, &[0; 8]).expect("nothing to zero");
        assert_eq!(entry.changes, [data(8 * MIB, 0)]);
        assert_eq!(entry.header.descriptor_count, 2);
    }

    #[test]
    fn file_lengths_off_the_grid_and_reserved_fields_are_tolerated() {
        let changes = [zero(8 * MIB, MIB)];
        assert_eq!(patched(&changes, 48, &[1]).expect("as QEMU").header.flushed_file_offset, 6 * MIB + 1);
        assert_eq!(patched(&changes, 56, &[1]).expect("as QEMU").header.last_file_offset, 9 * MIB + 1);
        patched(&changes, 28, &[1]).expect("the header's reserved field");
        patched(&changes, 68, &[1]).expect("a zero descriptor's reserved field");
    }

    #[test]
    fn a_rejection_says_which_check_failed() {
        assert_eq!(Rejected::Target(3).to_string(), "descriptor 3 would change what the log must not");
        for rejected in [
            Rejected::Header,
            Rejected::Length,
            Rejected::Checksum,
            Rejected::Descriptor(0),
            Rejected::DataSector(0),
            Rejected::DataCount,
        ] {
            assert!(!rejected.to_string().is_empty());
        }
    }

    prop_compose! {
        fn any_changes()(
            raw in prop::collection::btree_map(
                16_u64..(1 << 40), (any::<bool>(), 1_u64..4000, any::<u64>()), 0..12)
        ) -> Vec<Change> {
            raw.into_iter()
                .map(|(page, (zeros, length, seed))| if zeros {
                    zero(page * MIB, length * PAGE as u64)
                } else {
                    data(page * MIB, seed)
                })
                .collect()
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn an_entry_comes_back(
            changes in any_changes(), sequence_number in 1_u64.., tail in 0_u32..1024,
            files in (0_u64..1 << 43, 0_u64..1 << 43),
        ) {
            let new = NewEntry {
                sequence_number,
                tail: tail * S,
                log_guid: GUID,
                flushed_file_offset: files.0 * MIB,
                last_file_offset: files.1 * MIB,
                changes: &changes,
            };
            let bytes = new.encode();
            prop_assert_eq!(bytes.len(), new.length() as usize);
            let entry = parse(&bytes).expect("own entry");
            prop_assert_eq!(&entry.changes, &changes);
            let expected = EntryHeader {
                entry_length: new.length(),
                tail: new.tail,
                sequence_number,
                descriptor_count: u32::try_from(changes.len()).expect("few"),
                log_guid: GUID,
                flushed_file_offset: new.flushed_file_offset,
                last_file_offset: new.last_file_offset,
            };
            prop_assert_eq!(&entry.header, &expected);
            prop_assert_eq!(EntryHeader::peek(&bytes, GUID, LOG_LENGTH), Some(expected));
        }

        #[test]
        fn no_bytes_make_the_parser_panic(
            changes in any_changes(), seed: u64, len in 0_usize..=65536, at in 8_usize..400,
            some in 0_usize..24,
        ) {
            let bytes = noise(seed, len);
            prop_assert_eq!(parse(&bytes), Err(Rejected::Header));
            let mut near = new_entry(&changes).encode();
            patch(&mut near, at, &noise(seed, some));
            if let Ok(entry) = parse(&near) {
                for change in &entry.changes {
                    let range = change.range();
                    prop_assert!(range.start >= LOWEST_TARGET && range.start < range.end);
                    prop_assert!(range.end <= LOG.start || range.start >= LOG.end);
                }
            }
            let mut hostile = noise(seed, len.next_multiple_of(SECTOR).max(SECTOR));
            let head = new_entry(&[]).encode();
            hostile[..64].copy_from_slice(&head[..64]);
            let length = u32::try_from(hostile.len()).expect("small");
            patch(&mut hostile, 8, &length.to_le_bytes());
            // An entry without descriptors changes nothing, and is valid.
            let count = 1 + u32::try_from(at).expect("small") % (length / 32 - 1);
            patch(&mut hostile, 24, &count.to_le_bytes());
            prop_assert!(parse(&hostile).is_err());
        }
    }

    // From here on: the active sequence.

    /// A log as a map: offset, sectors, sequence number, tail; offsets in sectors.
    fn map(entries: &[(u32, u32, u64, u32)]) -> BTreeMap<u32, EntryHeader> {
        let header = |&(at, sectors, sequence_number, tail): &(u32, u32, u64, u32)| {
            let header = EntryHeader {
                entry_length: sectors * S,
                tail: tail * S,
                sequence_number,
                descriptor_count: 0,
                log_guid: GUID,
                flushed_file_offset: 0,
                last_file_offset: 0,
            };
            (at * S, header)
        };
        entries.iter().map(header).collect()
    }

    /// The active sequence of a ring of `sectors` sectors, in sectors.
    fn active(sectors: u32, entries: &[(u32, u32, u64, u32)]) -> Option<Vec<u32>> {
        let found = find_active(&map(entries), sectors * S)?;
        Some(found.into_iter().map(|offset| offset / S).collect())
    }

    /// The search as MS-VHDX 2.3.3 describes it, from every sector anew.
    fn searched(entries: &BTreeMap<u32, EntryHeader>, log_length: u32) -> Option<Vec<u32>> {
        let mut candidate: Option<Vec<u32>> = None;
        let mut start = 0;
        loop {
            let mut sequence: Vec<u32> = Vec::new();
            let (mut head, mut used) = (start, 0);
            while used < log_length {
                let Some(entry) = entries.get(&head) else { break };
                let follows = sequence
                    .last()
                    .is_none_or(|last| entry.sequence_number == entries[last].sequence_number + 1);
                if !follows || used + entry.entry_length > log_length {
                    break;
                }
                sequence.push(head);
                used += entry.entry_length;
                head = (head + entry.entry_length) % log_length;
            }
            let newest = |sequence: &[u32]| sequence.last().map(|last| entries[last].clone());
            let tail =
                newest(&sequence).and_then(|last| sequence.iter().position(|&offset| offset == last.tail));
            let next = if let Some(tail) = tail {
                let number = |sequence: &[u32]| newest(sequence).map(|last| last.sequence_number);
                let active = sequence.split_off(tail);
                if candidate.as_ref().is_none_or(|old| number(&active) > number(old)) {
                    candidate = Some(active);
                }
                head
            } else {
                (start + S) % log_length
            };
            if next <= start {
                return candidate;
            }
            start = next;
        }
    }

    #[test]
    fn a_log_without_entries_has_no_active_sequence() {
        assert_eq!(active(256, &[]), None);
        assert_eq!(active(0, &[(0, 1, 1, 0)]), None, "a log of no length holds nothing");
    }

    #[test]
    fn one_entry_that_is_its_own_tail_is_active() {
        assert_eq!(active(256, &[(5, 3, 1, 5)]), Some(vec![5]));
    }

    #[test]
    fn entries_from_the_tail_to_the_last_are_active_in_order() {
        assert_eq!(active(256, &[(0, 2, 1, 0), (2, 1, 2, 0), (3, 4, 3, 0)]), Some(vec![0, 2, 3]));
    }

    #[test]
    fn entries_before_the_tail_are_dropped() {
        assert_eq!(active(256, &[(0, 2, 1, 0), (2, 1, 2, 0), (3, 4, 3, 2)]), Some(vec![2, 3]));
        assert_eq!(active(256, &[(0, 2, 1, 0), (2, 1, 2, 0), (3, 4, 3, 3)]), Some(vec![3]));
    }

    #[test]
    fn a_tail_outside_the_sequence_makes_it_invalid() {
        assert_eq!(active(256, &[(0, 2, 1, 0), (2, 1, 2, 7)]), None);
        assert_eq!(active(256, &[(0, 2, 1, 0), (2, 1, 2, 1)]), None, "inside an entry is not at one");
        // The older sequence elsewhere in the ring is then the one that counts.
        assert_eq!(active(256, &[(0, 2, 9, 0), (2, 1, 10, 7), (20, 1, 3, 20)]), Some(vec![20]));
    }

    #[test]
    fn a_gap_in_sequence_numbers_or_in_the_ring_ends_a_sequence() {
        assert_eq!(active(256, &[(0, 2, 1, 0), (2, 1, 3, 2)]), Some(vec![2]));
        assert_eq!(active(256, &[(0, 2, 5, 0), (2, 1, 4, 2)]), Some(vec![0]));
        assert_eq!(active(256, &[(0, 2, 1, 0), (3, 1, 2, 3)]), Some(vec![3]));
        assert_eq!(
            active(256, &[(0, 2, 1, 0), (3, 1, 2, 0)]),
            Some(vec![0]),
            "its tail is in another sequence"
        );
    }

    #[test]
    fn the_last_sequence_number_does_not_wrap() {
        assert_eq!(active(8, &[(0, 1, u64::MAX, 0), (1, 1, 0, 1), (2, 1, 1, 2)]), Some(vec![0]));
    }

    #[test]
    fn of_two_sequences_the_one_with_the_greater_last_number_is_active() {
        let (old, new) = ((0, 2, 4, 0), (2, 2, 9, 2));
        assert_eq!(active(256, &[old, new]), Some(vec![2]));
        let (long, short) = ([(0, 1, 1, 0), (1, 1, 2, 0), (2, 1, 3, 0)], (9, 1, 8, 9));
        assert_eq!(active(256, &[long[0], long[1], long[2], short]), Some(vec![9]));
    }

    #[test]
    fn a_sequence_goes_on_round_the_rings_end() {
        assert_eq!(active(8, &[(6, 1, 1, 6), (7, 1, 2, 6), (0, 2, 3, 6)]), Some(vec![6, 7, 0]));
        assert_eq!(active(8, &[(6, 4, 1, 6), (2, 1, 2, 6)]), Some(vec![6, 2]), "an entry itself wraps");
        assert_eq!(
            active(8, &[(6, 1, 1, 6), (7, 1, 2, 6), (0, 2, 3, 0)]),
            Some(vec![0]),
            "the tail has moved on"
        );
        assert_eq!(active(8, &[(6, 1, 1, 6), (7, 1, 2, 6), (0, 2, 3, 7)]), Some(vec![7, 0]));
    }

    #[test]
    fn a_sequence_that_wraps_onto_its_own_older_entries_starts_at_its_tail() {
        // Two laps: 5 and 6 have overwritten 1 and 2; 3 and 4 are whole, but only 4 is still needed.
        let ring = [(0, 2, 5, 6), (2, 2, 6, 6), (4, 2, 3, 4), (6, 2, 4, 4)];
        assert_eq!(active(8, &ring), Some(vec![6, 0, 2]));
    }

    #[test]
    fn a_sequence_may_fill_the_ring_exactly() {
        assert_eq!(active(8, &[(0, 4, 1, 0), (4, 4, 2, 0)]), Some(vec![0, 4]));
        assert_eq!(active(8, &[(4, 4, 1, 4), (0, 4, 2, 4)]), Some(vec![4, 0]));
        assert_eq!(active(8, &[(3, 8, 1, 3)]), Some(vec![3]));
        let full: Vec<_> = (0..256).map(|i| ((i + 100) % 256, 1, 1 + u64::from(i), 100)).collect();
        assert_eq!(active(256, &full).map(|found| found.len()), Some(256));
    }

    #[test]
    fn entries_no_log_can_hold_are_survived() {
        // Overlapping, off the grid, of no length, beyond the ring: not what parse returns, but no reason to
        // fail.
        let mut odd =
            map(&[(0, 4, 1, 0), (1, 3, 1, 1), (4, 5, 2, 1), (1, 8, 3, 0), (7, 0, 4, 7), (900, 1, 5, 900)]);
        odd.insert(u32::MAX, odd[&0].clone());
        for log_length in [0, 1, S, 8 * S, u32::MAX] {
            let _ = find_active(&odd, log_length);
        }
        let lapped = [(0, 3, 1, 0), (3, 3, 2, 0), (6, 3, 3, 0)];
        assert_eq!(active(8, &lapped), None, "9 sectors do not fit a ring of 8");
    }

    #[test]
    fn hostile_logs_of_the_largest_size_are_searched_at_once() {
        let count = 262_144;
        let sorted = |tail: u32| -> Vec<_> { (0..count).map(|i| (i, 1, 1 + u64::from(i), tail)).collect() };
        let begun = std::time::Instant::now();
        assert_eq!(active(count, &sorted(0)).map(|found| found.len()), Some(262_144));
        assert_eq!(active(count, &sorted(count)), None);
        let pairs: Vec<_> = (0..count).map(|i| (i, 1, u64::from(i % 2) + 1, i ^ 1)).collect();
        assert_eq!(active(count, &pairs), Some(vec![0, 1]));
        assert!(begun.elapsed().as_secs() < 20, "a quadratic search takes hours");
    }

    #[test]
    fn a_ring_of_bytes_with_stale_and_torn_entries_yields_what_was_last_durable() {
        let length = 64 * S;
        let mut ring = vec![0_u8; length as usize];
        let mut put = |at: u32, sequence_number: u64, tail: u32, log_guid: Uuid, changes: &[Change]| {
            let entry = NewEntry { sequence_number, tail: tail * S, log_guid, ..new_entry(changes) };
            for (index, &byte) in entry.encode().iter().enumerate() {
                ring[((at * S) as usize + index) % length as usize] = byte;
            }
        };
        put(10, 90, 10, OTHER, &pages(5)); // another log's
        put(60, 7, 60, GUID, &pages(2)); // before the tail
        put(63, 8, 63, GUID, &pages(4)); // wraps
        put(4, 9, 63, GUID, &[]);
        put(5, 10, 63, GUID, &pages(3)); // torn below
        ring[8 * SECTOR + 9] ^= 1;
        let sector = |index: u32| {
            let at = (index * S) as usize;
            let unwrapped = [&ring[at..], &ring[..at]].concat();
            let header = EntryHeader::peek(&unwrapped, GUID, length)?;
            let bytes = &unwrapped[..header.entry_length as usize];
            let entry = Entry::parse(bytes, GUID, MIB..MIB + u64::from(length)).ok()?;
            Some((index * S, entry.header))
        };
        let entries: BTreeMap<u32, EntryHeader> = (0..64).filter_map(sector).collect();
        assert_eq!(entries.keys().map(|offset| offset / S).collect::<Vec<_>>(), [4, 60, 63]);
        assert_eq!(find_active(&entries, length), Some(vec![63 * S, 4 * S]));
    }

    /// One piece of a ring: sectors, whether an entry, whether it continues the one before, its number if
    /// not, and which entry (or, past the last, which sector) its tail names.
    type Piece = (u32, bool, bool, u64, u32);

    /// Lays pieces round a ring from sector `turn` on; entries never overlap.
    fn ring(pieces: &[Piece], spare: u32, turn: u32) -> (u32, Vec<(u32, u32, u64, u32)>) {
        let sectors = spare + pieces.iter().map(|piece| piece.0).sum::<u32>();
        let mut entries: Vec<(u32, u32, u64, u32)> = Vec::new();
        let (mut at, mut number) = (turn, 0);
        for &(length, is_entry, follows, fresh, tail) in pieces {
            if is_entry {
                number = if follows { number + 1 } else { fresh };
                entries.push((at % sectors, length, number, tail));
            }
            at += length;
        }
        let places: Vec<u32> = entries.iter().map(|entry| entry.0).collect();
        for entry in &mut entries {
            // Mostly an entry, and mostly one near it, so that valid sequences are common.
            let named = places.get(entry.3 as usize).copied();
            entry.3 = named.unwrap_or(entry.3 % sectors);
        }
        (sectors, entries)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn the_fast_search_finds_what_the_specifications_search_finds(
            pieces in prop::collection::vec(
                (1_u32..4, prop::bool::weighted(0.85), prop::bool::weighted(0.75), 1_u64..6, 0_u32..14),
                1..14),
            spare in 0_u32..3, turn in 0_u32..50,
        ) {
            let (sectors, entries) = ring(&pieces, spare, turn);
            let entries = map(&entries);
            prop_assert_eq!(find_active(&entries, sectors * S), searched(&entries, sectors * S));
        }

        #[test]
        fn an_active_sequence_is_always_a_run_from_its_tail(
            raw in prop::collection::vec((0_u32..12, 0_u32..5, 0_u64..5, 0_u32..13), 0..12),
            sectors in 0_u32..12,
        ) {
            let entries = map(&raw);
            if let Some(active) = find_active(&entries, sectors * S) {
                let last = &entries[active.last().expect("never empty")];
                prop_assert_eq!(last.tail, active[0]);
                for pair in active.windows(2) {
                    let (one, two) = (&entries[&pair[0]], &entries[&pair[1]]);
                    prop_assert_eq!((pair[0] + one.entry_length) % (sectors * S), pair[1]);
                    prop_assert_eq!(one.sequence_number + 1, two.sequence_number);
                }
            }
        }
    }
}
