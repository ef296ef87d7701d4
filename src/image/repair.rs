//! Repairing an image: what an examination says can be mended without guessing.
//!
//! Order, each step durable before the next:
//!
//! 1. the log is replayed, or declared empty if it was never written. This writes both headers, the damaged
//!    one first, and gives the file its new FileWriteGuid;
//! 2. metadata changes in batches of one log entry ([`Edit`]): a batch is there as a whole or not at all;
//! 3. with the log empty, and only if nothing is beyond repair, leaked space is given back and the unused
//!    tail is cut off: nothing names either;
//! 4. a signature that is missing is written last, as when an image is made.
//!
//! A cut anywhere leaves an image that opens and reads as before; repairing it again ends what was begun.

use uuid::Uuid;

use super::Headers;
use super::check::{Examination, MAX_PATCHES, Report, check, examine};
use super::edit::Edit;
use super::replay;
use super::room::{cut, punch_free_runs};
use super::view::sync;
use crate::disk::{Disk, PAGE_BYTES};
use crate::error::{Error, Kind, Result};
use crate::format::bat::ENTRY_SIZE;
use crate::format::file_id::FileId;
use crate::format::log::MAX_DESCRIPTORS_WRITTEN;
use crate::format::region;

/// Pages of the longest patch, a region table.
const LONGEST_PATCH: usize = region::SIZE / PAGE_BYTES;

const _: () = assert!(LONGEST_PATCH < MAX_DESCRIPTORS_WRITTEN, "an entry holds the longest patch");

/// Pages at which a batch is full: one more patch still fits its entry.
const FULL_BATCH: usize = MAX_DESCRIPTORS_WRITTEN - LONGEST_PATCH;

/// Examinations that the largest BAT needs if all its entries are to be mended, and one for the rest.
const MAX_ROUNDS: usize = region::MAX_BAT_LENGTH as usize / ENTRY_SIZE / MAX_PATCHES + 2;

/// What a repair found and what it left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repair {
    /// The image as it was.
    pub before: Report,
    /// The image as it is now.
    pub after: Report,
}

/// Mends what can be mended without guessing; see the module's head. An image with nothing to mend is not
/// changed by one byte.
///
/// # Errors
/// As [`check`]; no space and other I/O errors, after which the image is as sound as before.
pub async fn repair<D: Disk>(disk: &D, mut new_guid: impl FnMut() -> Uuid) -> Result<Repair> {
    let Examination { report: before, header, log, .. } = examine(disk).await?;
    if before.repairable == 0 {
        return Ok(Repair { after: before.clone(), before });
    }
    let header = header.expect("an image with repairs has a header");
    let positions = log.expect("an image with repairs has a log that is understood");
    let mut headers = Headers::new(&header)?;
    replay::in_place(disk, &mut headers, &positions, new_guid()).await?;
    let mended = mend(disk, &mut headers, &mut new_guid).await?;
    assert!(!headers.current().needs_replay(), "no log is left whose replay could miss what is given back");
    if mended.report.beyond_repair == 0 {
        reclaim(disk, &mended).await?;
    }
    if mended.lacks_signature {
        restore_signature(disk).await?;
    }
    Ok(Repair { before, after: check(disk).await? })
}

/// Patches until nothing is left to patch.
async fn mend<D: Disk>(
    disk: &D,
    headers: &mut Headers,
    new_guid: &mut impl FnMut() -> Uuid,
) -> Result<Examination> {
    for _ in 0..MAX_ROUNDS {
        let mut found = examine(disk).await?;
        if found.patches.is_empty() {
            return Ok(found);
        }
        // A stable order: of two patches for one place the later one counts.
        found.patches.sort_by_key(|patch| patch.offset);
        let mut batch = Edit::default();
        for patch in &found.patches {
            batch.lay(disk, patch.offset, &patch.bytes).await?;
            assert!(batch.page_count() <= MAX_DESCRIPTORS_WRITTEN, "a batch fits its entry");
            if batch.page_count() > FULL_BATCH {
                std::mem::take(&mut batch).write(disk, headers, None, new_guid()).await?;
            }
        }
        if batch.page_count() > 0 {
            batch.write(disk, headers, None, new_guid()).await?;
        }
    }
    Err(Error::new(Kind::InUse, "the image keeps changing while it is repaired"))
}

/// Makes the file say that it is a VHDX. Not by way of the log, which may not change what lies before the
/// region tables.
async fn restore_signature<D: Disk>(disk: &D) -> Result<()> {
    let failed = |error| Error::io("writing the signature", error).at(0);
    let mut page = disk.read(0, PAGE_BYTES).await.map_err(failed)?;
    FileId::restore(&mut page);
    disk.write(0, page).await.map_err(failed)?;
    sync(disk).await
}

/// Gives back what nothing names. The log is empty, and durably so: no replay misses it.
async fn reclaim<D: Disk>(disk: &D, mended: &Examination) -> Result<()> {
    let space = mended.space.as_ref().expect("an image with repairs was examined whole");
    if mended.report.leaks > 0 {
        punch_free_runs(disk, space).await?;
    }
    if let Some(length) = mended.trimmed_length {
        cut(disk, space, length).await?;
    }
    sync(disk).await
}
