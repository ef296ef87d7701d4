//! What is on a disk: its partition table, and what each partition, or the disk as a whole, holds.
//!
//! Everything comes from the disk, which may hold anything:
//!
//! * A damaged table or a structure that leads elsewhere is a line in [`Contents::faults`], never an error:
//!   what can be recognised is. A disk that cannot be read at some place is such a line, too.
//! * What is read is bounded: at most 1024 partitions of a GPT or 132 of an MBR, and of each at most 200 KiB.
//! * Nothing is interpreted but what distinguishes volumes, names them, and says how long they are and
//!   whether they were left in order.
//!
//! For those who change images by what is found:
//!
//! * [`Contents::minimum_size`] is what a disk must keep so that nothing that was recognised is cut. Nothing
//!   recognised is no statement: an unknown volume may reach to the end of the disk. With
//!   [`Contents::faults`] there may be more than was recognised.
//! * [`Volume::journal`] says whether a volume may be mounted without changing what it holds: only
//!   [`Journal::Clean`] is certain. [`Volume::kind`] says whether it can be, and [`Volume::other_devices`]
//!   whether the kernel would open more than this disk for it.
//! * [`Table::backup_at_end`] says whether the second copy of a GPT is where it belongs.
//!
//! ```no_run
//! # async fn show(disk: impl vhdx_ublk::operations::contents::ReadAt) {
//! let contents = vhdx_ublk::operations::contents::find(&disk).await;
//! for partition in contents.partitions() {
//!     println!("{} at {}: {:?}", partition.number, partition.start, partition.volume);
//! }
//! # }
//! ```

mod area;
mod fat;
mod gpt;
mod linux;
mod mbr;
mod ntfs;
mod partition;
mod volume;

use schemars::JsonSchema;
use serde::Serialize;

use crate::chain::Content;
use crate::disk::ReadDisk;
use crate::error::{Doing, Result};
use area::Area;

pub use partition::{Partition, Table, TableKind};
pub use volume::{Journal, Volume, VolumeKind};

/// A disk that can be read.
#[expect(async_fn_in_trait, reason = "one thread drives all of it: futures need not be Send")]
pub trait ReadAt {
    /// How long it is, bytes.
    fn size(&self) -> u64;

    /// Its logical sector, bytes.
    fn sector_size(&self) -> u32;

    /// Reads `bytes` at `from`: whole sectors, all of which the disk has.
    ///
    /// # Errors
    ///
    /// Any: what is there stays unknown.
    async fn read_at(&self, from: u64, bytes: &mut [u8]) -> Result<()>;
}

impl<D: ReadDisk> ReadAt for Content<D> {
    fn size(&self) -> u64 {
        self.virtual_size()
    }

    fn sector_size(&self) -> u32 {
        Self::sector_size(self)
    }

    async fn read_at(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        self.read(from, bytes).await.doing("reading the disk")
    }
}

/// How many bytes at its start show what a volume is: the superblock of btrfs ends there.
const HEAD: usize = 68 << 10;

/// What is on a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Contents {
    /// Its partition table.
    pub table: Option<Table>,
    /// What the disk as a whole holds, if it has no table.
    pub volume: Option<Volume>,
    /// What is damaged, or could not be read.
    pub faults: Vec<String>,
    #[serde(skip)]
    minimum_size: Option<u64>,
}

impl Contents {
    /// The partitions, in the order of their numbers.
    pub fn partitions(&self) -> &[Partition] {
        self.table.as_ref().map_or(&[], |table| &table.partitions)
    }

    /// A disk with these partitions, for tests of those who choose among them.
    #[cfg(test)]
    pub(crate) fn of_partitions(partitions: Vec<Partition>) -> Self {
        let table = Table {
            kind: TableKind::Gpt,
            id: None,
            backup_bytes: 0,
            backup_at_end: true,
            partitions,
            least_bytes: 0,
        };
        Self { table: Some(table), volume: None, faults: Vec::new(), minimum_size: None }
    }

    /// The size that the disk must keep, bytes, a multiple of its logical sector: up to the end of the last
    /// partition and the second copy of a GPT behind it, or of the volume that the disk holds as a whole. It
    /// is more than the disk's size if a partition ends behind the disk. `None` if nothing was recognised.
    pub fn minimum_size(&self) -> Option<u64> {
        self.minimum_size
    }

    /// Whether it has a GPT, whose second copy is at the end of the disk.
    pub fn has_gpt(&self) -> bool {
        self.table.as_ref().is_some_and(|table| table.kind == TableKind::Gpt)
    }
}

/// Finds out what is on `disk`.
pub async fn find<R: ReadAt>(disk: &R) -> Contents {
    let whole = Area::whole(disk);
    let mut faults = Vec::new();
    let volume = noted(volume_in(&whole).await, "the disk", &mut faults).flatten();
    let mut table = noted(gpt::read(&whole, &mut faults).await, "the GPT", &mut faults).flatten();
    // The first sector of these has a program where an MBR has its table.
    let is_bootable = volume.as_ref().is_some_and(|volume| {
        use VolumeKind::{Bitlocker, Exfat, Ntfs, Refs, Vfat};
        matches!(volume.kind, Bitlocker | Exfat | Ntfs | Refs | Vfat)
    });
    if table.is_none() && !is_bootable {
        table = noted(mbr::read(&whole, &mut faults).await, "the MBR", &mut faults).flatten();
    }
    if let Some(table) = &mut table {
        fill(disk, table, &mut faults).await;
    }
    let minimum_size = least(disk, table.as_ref(), volume.as_ref());
    let volume = match &table {
        None => volume,
        Some(_) => None,
    };
    Contents { table, volume, faults, minimum_size }
}

/// See [`Contents::minimum_size`].
fn least<R: ReadAt>(disk: &R, table: Option<&Table>, volume: Option<&Volume>) -> Option<u64> {
    // Where a volume does not say how long it is, it may be all of the disk.
    let volume = volume.map(|volume| volume.size.unwrap_or(disk.size()));
    let end = match table {
        Some(table) if table.kind == TableKind::Gpt => Some(table.end().saturating_add(table.backup_bytes)),
        // A volume that the disk held before as a whole, or that still counts.
        Some(table) => Some(table.end().max(volume.unwrap_or(0))),
        None => volume,
    };
    let sector = u64::from(disk.sector_size());
    end.map(|end| end.checked_next_multiple_of(sector).unwrap_or(u64::MAX - (sector - 1)))
}

/// What is in the partitions of `table`.
async fn fill<R: ReadAt>(disk: &R, table: &mut Table, faults: &mut Vec<String>) {
    for partition in &mut table.partitions {
        let name = format!("partition {}", partition.number);
        if partition.length == 0 {
            faults.push(format!("{name} ends before it starts"));
            continue;
        }
        if partition.end() > disk.size() {
            faults.push(format!(
                "{name} ends at byte {}, behind the end of the disk at byte {}",
                partition.end(),
                disk.size()
            ));
        }
        if partition.is_extended() {
            continue;
        }
        let area = Area::part(disk, partition.start, partition.length);
        partition.volume = noted(volume_in(&area).await, &name, faults).flatten();
        let size = partition.volume.as_ref().and_then(|volume| volume.size);
        if let Some(size) = size.filter(|&size| size > partition.length) {
            faults.push(format!(
                "{name} has {} bytes, and the volume in it {size}: it does not fit",
                partition.length
            ));
        }
    }
    faults.extend(overlap(&table.partitions));
}

/// Two partitions that share bytes, if there are any. Logical ones lie in an extended one.
fn overlap(partitions: &[Partition]) -> Option<String> {
    let mut sorted: Vec<_> = partitions.iter().filter(|partition| !partition.is_extended()).collect();
    sorted.sort_by_key(|partition| (partition.start, partition.end()));
    let pair = sorted.windows(2).find(|pair| pair[1].start < pair[0].end())?;
    Some(format!("partitions {} and {} overlap", pair[0].number, pair[1].number))
}

/// What `area` holds.
async fn volume_in<R: ReadAt>(area: &Area<'_, R>) -> Result<Option<Volume>> {
    let head = area.read(0, HEAD).await?;
    // Formats that leave the first sectors alone come last: what was there before them may have stayed.
    let first = [linux::luks, ntfs::bitlocker, linux::xfs, ntfs::refs, linux::lvm2];
    if let Some(found) = first.iter().find_map(|probe| probe(&head)) {
        return Ok(Some(found));
    }
    if let Some(found) = ntfs::ntfs(area, &head).await? {
        return Ok(Some(found));
    }
    if let Some(found) = fat::exfat(area, &head).await? {
        return Ok(Some(found));
    }
    let rest = [linux::ext, linux::f2fs, linux::btrfs, linux::swap];
    match rest.iter().find_map(|probe| probe(&head)) {
        Some(found) => Ok(Some(found)),
        None => fat::vfat(area, &head).await,
    }
}

/// What was read at `place`; a failure goes to `faults`.
fn noted<T>(read: Result<T>, place: &str, faults: &mut Vec<String>) -> Option<T> {
    read.map_err(|error| faults.push(format!("{place} cannot be read: {error:#}"))).ok()
}
