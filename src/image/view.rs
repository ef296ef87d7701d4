//! A file as the readers of its structures see it: under the log that was replayed in memory, if there is
//! one.

use super::overlay::Overlay;
use crate::disk::{Buffer, Disk, PAGE_BYTES, ReadDisk};
use crate::error::{Doing, Locate, Result};

/// The one way out for a file that lacks its end.
pub(super) const CUT_SHORT: &str = "the file was cut short: if its source is whole, copy it again; \
     `vhdx-ublk salvage FILE COPY` copies what is left of the disk";

/// A file, and the replayed log over it.
pub(super) struct View<'a, D> {
    pub(super) disk: &'a D,
    pub(super) overlay: Option<&'a Overlay>,
}

impl<D: ReadDisk> View<'_, D> {
    pub(super) async fn read(&self, structure: &'static str, offset: u64, length: usize) -> Result<Buffer> {
        assert!(offset.is_multiple_of(PAGE_BYTES as u64), "{structure}: pages are read, at {offset}");
        assert!(length.is_multiple_of(PAGE_BYTES), "{structure}: pages are read, {length} bytes");
        let bytes = self.disk.read(offset, length).await;
        let mut bytes = bytes.doing("reading").in_structure(structure).at(offset)?;
        assert_eq!(bytes.len(), length, "a read ends whole or fails");
        if let Some(overlay) = self.overlay {
            overlay.patch(offset, &mut bytes);
        }
        Ok(bytes)
    }

    /// The file's length, bytes: what it will be once the log is replayed in place.
    pub(super) async fn length(&self) -> Result<u64> {
        match self.overlay {
            Some(overlay) => Ok(overlay.file_length()),
            None => file_length(self.disk).await,
        }
    }

    /// The first page at `offset` or behind it that may hold anything but zeros.
    pub(super) async fn next_stored(&self, offset: u64) -> Result<Option<u64>> {
        assert!(
            offset.is_multiple_of(PAGE_BYTES as u64),
            "holes are searched for from a page on, at {offset}"
        );
        let found = self.disk.next_data(offset).await.doing("looking for holes").at(offset)?;
        let found = found.map(|found| found - found % PAGE_BYTES as u64);
        let changed = self.overlay.and_then(|overlay| overlay.next_change(offset));
        Ok(found.into_iter().chain(changed).min())
    }
}

/// The file's length, bytes.
pub(super) async fn file_length<D: ReadDisk>(disk: &D) -> Result<u64> {
    disk.length().await.doing("asking for the file's length")
}

/// Makes everything durable that was written before.
pub(super) async fn sync<D: Disk>(disk: &D) -> Result<()> {
    disk.sync().await.doing("syncing the image")
}

/// How many of `wanted` bytes at `offset` a file of `file_length` bytes has.
pub(super) fn present(offset: u64, wanted: usize, file_length: u64) -> usize {
    usize::try_from(file_length.saturating_sub(offset)).unwrap_or(usize::MAX).min(wanted)
}
