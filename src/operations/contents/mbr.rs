//! The partition table in the first sector of a disk, and the extended partitions that it leads to.
//!
//! An extended partition holds a list of sectors, each with one logical partition and the way to the next:
//! the list ends where it comes back to a sector, and at its limit.

use super::ReadAt;
use super::area::{Area, has, le32};
use super::partition::{EXTENDED, Partition, Table, TableKind, mbr_type};
use crate::error::Result;

/// Where the table is in its sector, and how long one of its four entries.
const TABLE: usize = 446;
const ENTRY: usize = 16;

/// The type of a disk whose last MiB is the database of a Windows volume manager.
const DYNAMIC: u8 = 0x42;

/// What covers a disk with a GPT: if that is not found, it is not known what is where.
const PROTECTIVE: u8 = 0xee;

/// The number of the first logical partition.
const FIRST_LOGICAL: u32 = 5;

/// The most logical partitions.
const MAX_LOGICAL: usize = 128;

/// One of the four entries.
#[derive(Clone, Copy)]
struct Entry {
    flag: u8,
    kind: u8,
    first: u32,
    sectors: u32,
}

impl Entry {
    /// The entries of the table in `sector`, unless it is none.
    fn table(sector: &[u8]) -> Option<[Self; 4]> {
        let entry = |number: usize| {
            let bytes = sector.get(TABLE + number * ENTRY..)?;
            let (flag, kind) = (*bytes.first()?, *bytes.get(4)?);
            Some(Self { flag, kind, first: le32(bytes, 8)?, sectors: le32(bytes, 12)? })
        };
        has(sector, 510, &[0x55, 0xaa]).then_some([entry(0)?, entry(1)?, entry(2)?, entry(3)?])
    }

    fn is_used(self) -> bool {
        self.kind != 0 && self.sectors > 0
    }

    fn is_extended(self) -> bool {
        EXTENDED.contains(&self.kind)
    }

    /// The partition, with its start counted from sector `base`.
    fn partition(self, number: u32, base: u64, sector: u64) -> Partition {
        Partition {
            number,
            start: (base + u64::from(self.first)) * sector,
            length: u64::from(self.sectors) * sector,
            r#type: mbr_type(self.kind),
            name: None,
            volume: None,
        }
    }
}

/// The table on `disk`, if it has one with partitions; what is wrong with it goes to `faults`.
///
/// # Errors
///
/// Those of reading the disk.
pub(super) async fn read<R: ReadAt>(disk: &Area<'_, R>, faults: &mut Vec<String>) -> Result<Option<Table>> {
    let head = disk.read(0, 512).await?;
    let Some(entries) = Entry::table(&head) else { return Ok(None) };
    // The program that starts a system from a file system lies where the table would.
    let plausible = |entry: &Entry| matches!(entry.flag, 0 | 0x80) && (!entry.is_used() || entry.first > 0);
    if !entries.iter().all(plausible) || !entries.iter().any(|entry| entry.is_used()) {
        return Ok(None);
    }
    let sector = disk.sector_size();
    let used = (1..).zip(entries).filter(|(_, entry)| entry.is_used());
    let mut partitions: Vec<_> = used.map(|(number, entry)| entry.partition(number, 0, sector)).collect();
    if let Some(extended) = entries.iter().find(|entry| entry.is_used() && entry.is_extended()) {
        let (logical, fault) = logical(disk, extended.first.into()).await?;
        partitions.extend(logical);
        faults.extend(fault);
    }
    let has = |kind: u8| entries.iter().any(|entry| entry.is_used() && entry.kind == kind);
    let (is_dynamic, is_protective) = (has(DYNAMIC), has(PROTECTIVE));
    if is_protective {
        faults.push(
            "the MBR protects a GPT that is not found: it is damaged, or the disk had other sectors".into(),
        );
    }
    let id = le32(&head, 440).filter(|&id| id != 0);
    Ok(Some(Table {
        kind: TableKind::Mbr,
        id: id.map(|id| format!("{id:08x}")),
        backup_bytes: 0,
        backup_at_end: true,
        partitions,
        least_bytes: if is_dynamic || is_protective { disk.length() } else { sector },
    }))
}

/// The logical partitions of the extended one at sector `base`, and what is wrong with their list.
async fn logical<R: ReadAt>(disk: &Area<'_, R>, base: u64) -> Result<(Vec<Partition>, Option<String>)> {
    let (mut found, mut seen, mut at) = (Vec::new(), Vec::new(), base);
    let fault = loop {
        assert!(found.len() <= seen.len() && seen.len() <= MAX_LOGICAL, "a sector has one partition at most");
        if seen.contains(&at) {
            break Some("the list of logical partitions is a circle");
        }
        if seen.len() == MAX_LOGICAL {
            break Some("the list of logical partitions does not end");
        }
        seen.push(at);
        let bytes = disk.read(at * disk.sector_size(), 512).await?;
        let Some([here, next, ..]) = Entry::table(&bytes) else {
            break Some("the list of logical partitions breaks off");
        };
        if here.is_used() && !here.is_extended() {
            let number = FIRST_LOGICAL + u32::try_from(found.len()).expect("at most 128");
            found.push(here.partition(number, at, disk.sector_size()));
        }
        if !next.is_used() || !next.is_extended() {
            break None;
        }
        at = base + u64::from(next.first);
    };
    Ok((found, fault.map(str::to_owned)))
}
