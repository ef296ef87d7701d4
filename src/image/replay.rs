//! Replaying the log: in place for a writable open, in memory for a read-only one.
//!
//! In place, the order is: sync → new FileWriteGuid in both headers (LogGuid unchanged) → the entries'
//! changes → the length they need → sync → LogGuid zero in both headers. A cut anywhere leaves the same log
//! to be replayed again; nothing in the log is overwritten before the headers have dropped it. The first sync
//! is for what a killed process wrote and the host has not: its newest header may be one of two that a cut
//! would tear.
//!
//! [Rules 66 to 72](crate::design::vhdx_rules#rule-66).

use super::headers::Headers;
use super::log_scan::Log;
use super::overlay::Overlay;
use super::space::MAX_FILE_BYTES;
use super::view::{file_length, sync};
use crate::disk::{Buffer, Disk, ReadDisk};
use crate::error::{Error, Result};
use crate::format::MIB;
use crate::format::header::Header;
use crate::format::log::{Change, Entry, LOWEST_TARGET};
use crate::simulation::{Plant, planted};

/// Lays the entries at `positions` over the file, in memory.
///
/// # Errors
/// I/O errors, and an entry that changed since the scan.
pub async fn in_memory<D: ReadDisk>(
    disk: &D,
    header: &Header,
    positions: &[u32],
    file_length: u64,
) -> Result<Overlay> {
    let log = Log::new(disk, header);
    let mut overlay = Overlay::new(file_length);
    let mut last_file_offset = 0;
    for &position in positions {
        let entry = log.entry(position).await?;
        last_file_offset = checked_length(entry.header.last_file_offset)?;
        entry.changes.into_iter().for_each(|change| overlay.apply(change));
    }
    overlay.extend(last_file_offset);
    Ok(overlay)
}

/// Writes the entries at `positions` in place and empties the log. `positions` is empty for a log that was
/// never written: then only the headers change.
///
/// # Errors
/// I/O errors, no space, and an entry that changed since the scan. The image can be opened again afterwards.
pub async fn in_place<D: Disk>(
    disk: &D,
    headers: &mut Headers,
    positions: &[u32],
    file_write_guid: uuid::Uuid,
) -> Result<()> {
    assert!(headers.current().needs_replay() || positions.is_empty(), "an empty log has no entries");
    if !planted(Plant::TrustKilled) {
        sync(disk).await?;
    }
    headers.update(disk, |header| header.file_write_guid = file_write_guid).await?;
    let header = headers.current().clone();
    let log = Log::new(disk, &header);
    let mut length = file_length(disk).await?;
    // A file that ends inside a page is completed first: changes are whole pages.
    let whole = checked_length(length)?;
    reach(disk, &mut length, whole).await?;
    for (index, &position) in positions.iter().enumerate() {
        let entry = log.entry(position).await?;
        apply(disk, &entry, &mut length).await?;
        if index + 1 == positions.len() && !planted(Plant::NoExtension) {
            let needed = checked_length(entry.header.last_file_offset)?;
            reach(disk, &mut length, needed).await?;
        }
    }
    sync(disk).await?;
    headers.update(disk, |header| header.log_guid = uuid::Uuid::nil()).await?;
    assert!(!headers.current().needs_replay(), "a replayed log is empty");
    Ok(())
}

async fn apply<D: Disk>(disk: &D, entry: &Entry, length: &mut u64) -> Result<()> {
    for change in &entry.changes {
        let range = change.range();
        assert!(range.start >= LOWEST_TARGET, "a parsed change spares the headers, not {range:?}");
        let result = match change {
            Change::Data { file_offset, page } => {
                reach(disk, length, checked_length(range.end)?).await?;
                disk.write(*file_offset, Buffer::copy_of(&**page)).await
            }
            // What lies past the end reads as zero already, however far a log would have it zeroed.
            Change::Zero { .. } if range.start >= *length => Ok(()),
            Change::Zero { .. } => disk.zero(range.start, range.end.min(*length) - range.start).await,
        };
        result.map_err(|error| Error::io("replaying the log", error).at(range.start))?;
    }
    Ok(())
}

/// Extends the file to at least `needed` bytes.
async fn reach<D: Disk>(disk: &D, length: &mut u64, needed: u64) -> Result<()> {
    assert!(needed.is_multiple_of(MIB) && needed <= MAX_FILE_BYTES, "a checked length, not {needed}");
    if needed > *length {
        let result = disk.grow(needed).await;
        result.map_err(|error| {
            Error::io(format!("extending the file to {needed} bytes for the log replay"), error)
        })?;
        *length = needed;
    }
    assert!(*length >= needed, "the file is as long as the log asks for");
    Ok(())
}

/// A file length that the log asks for, in whole MiB.
fn checked_length(length: u64) -> Result<u64> {
    if length > MAX_FILE_BYTES {
        let message = format!("asks for a file of {length} bytes, this program maps {MAX_FILE_BYTES}");
        return Err(Error::corrupt("log entry", message));
    }
    Ok(length.next_multiple_of(MIB))
}
