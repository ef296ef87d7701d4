//! The GUID partition table, at the start of a disk and again at its end.
//!
//! The table at the start counts; where that is damaged, the one at the end. Both are checked by their
//! checksums, as the kernel does.

use super::ReadAt;
use super::area::{Area, array, has, le32, le64, wide_text};
use super::partition::{Partition, Table, TableKind};
use crate::error::Result;
use crate::format::{guid, index};

/// The fields of a header, bytes.
const HEADER: usize = 92;

/// The most entries of a table; all programs make 128.
const MAX_ENTRIES: u32 = 1024;

/// The lengths that an entry may have, bytes.
const ENTRY_LENGTHS: [u32; 4] = [128, 256, 512, 1024];

/// A header that was checked, and its entries.
struct Header {
    /// Where the other copy is, bytes.
    other: u64,
    first_usable: u64,
    entry_length: usize,
    id: String,
    entries: Vec<u8>,
}

/// One of the two places of a header.
enum Place {
    Whole(Header),
    /// With what is wrong.
    Damaged(&'static str),
    Empty,
}

/// The table on `disk`, if it has one; what is wrong with it goes to `faults`.
///
/// # Errors
///
/// Those of reading the disk.
pub(super) async fn read<R: ReadAt>(disk: &Area<'_, R>, faults: &mut Vec<String>) -> Result<Option<Table>> {
    let sector = disk.sector_size();
    assert!(sector.is_power_of_two(), "a logical sector of {sector} bytes");
    let last = (disk.length() / sector).saturating_sub(1) * sector;
    let first = look(disk, sector).await?;
    if let Place::Whole(header) = first {
        let at_end = header.other == last;
        let fault = match look(disk, header.other).await? {
            Place::Whole(_) => None,
            Place::Damaged(fault) => Some(fault),
            Place::Empty => Some("it is not there"),
        };
        faults.extend(fault.map(|fault| format!("the backup GPT at byte {}: {fault}", header.other)));
        return Ok(Some(header.into_table(sector, at_end)));
    }
    let backup = look(disk, last).await?;
    let fault = match (&first, &backup) {
        (Place::Damaged(fault), _) => format!("the GPT at byte {sector}: {fault}"),
        (_, Place::Whole(_)) => format!("the GPT at byte {sector}: it is not there"),
        (_, Place::Damaged(fault)) => format!("the backup GPT at byte {last}: {fault}"),
        _ => return Ok(None),
    };
    faults.push(fault);
    match backup {
        Place::Whole(header) => Ok(Some(header.into_table(sector, true))),
        Place::Damaged(_) | Place::Empty => Ok(None),
    }
}

/// What is at `place`.
async fn look<R: ReadAt>(disk: &Area<'_, R>, place: u64) -> Result<Place> {
    let sector = disk.sector_size();
    let bytes = disk.read(place, index(sector)).await?;
    if !has(&bytes, 0, b"EFI PART") {
        return Ok(Place::Empty);
    }
    let field = |at| le64(&bytes, at).and_then(|number| number.checked_mul(sector));
    let length = le32(&bytes, 12).map(|length| length as usize);
    let Some(fields) = length.filter(|&length| length >= HEADER).and_then(|length| bytes.get(..length))
    else {
        return Ok(Place::Damaged("its length is wrong"));
    };
    let checksum = crc32fast::hash(&[&fields[..16], &[0; 4], &fields[20..]].concat());
    if le32(fields, 16) != Some(checksum) {
        return Ok(Place::Damaged("its checksum is wrong"));
    }
    let (Some(other), Some(first_usable), Some(at)) = (field(32), field(40), field(72)) else {
        return Ok(Place::Damaged("it leads behind the end of every disk"));
    };
    let (count, entry_length) = (le32(fields, 80).unwrap_or(0), le32(fields, 84).unwrap_or(0));
    if field(24) != Some(place) || count > MAX_ENTRIES || !ENTRY_LENGTHS.contains(&entry_length) {
        return Ok(Place::Damaged("it contradicts itself"));
    }
    let entry_length = entry_length as usize;
    let entries = disk.read(at, count as usize * entry_length).await?;
    if entries.len() != count as usize * entry_length || le32(fields, 88) != Some(crc32fast::hash(&entries)) {
        return Ok(Place::Damaged("the checksum of its entries is wrong"));
    }
    let id = guid::read(&array(fields, 56).expect("a header has 92 bytes")).to_string();
    Ok(Place::Whole(Header { other, first_usable, entry_length, id, entries }))
}

impl Header {
    fn into_table(self, sector: u64, backup_at_end: bool) -> Table {
        assert!(self.entry_length >= 128, "a header that was checked");
        let entries = self.entries.chunks_exact(self.entry_length);
        let partitions = (1..).zip(entries).filter_map(|(number, entry)| partition(number, entry, sector));
        Table {
            kind: TableKind::Gpt,
            id: Some(self.id),
            backup_bytes: sector + (self.entries.len() as u64).next_multiple_of(sector),
            backup_at_end,
            partitions: partitions.collect(),
            least_bytes: self.first_usable,
        }
    }
}

/// The partition in an entry, unless that is empty.
fn partition(number: u32, entry: &[u8], sector: u64) -> Option<Partition> {
    let kind = guid::read(&array(entry, 0)?);
    if kind.is_nil() {
        return None;
    }
    let (first, last) = (le64(entry, 32)?, le64(entry, 40)?);
    // What ends before it starts is empty, and what no disk can hold ends where no disk can.
    let sectors = last.saturating_add(1).saturating_sub(first);
    Some(Partition {
        number,
        start: first.saturating_mul(sector),
        length: sectors.saturating_mul(sector),
        r#type: kind.to_string(),
        name: wide_text(entry, 56, 72),
        volume: None,
    })
}
