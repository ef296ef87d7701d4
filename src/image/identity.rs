//! What an image is, without its blocks: enough to tell whose parent or child it is.

use uuid::Uuid;

use super::log_scan::LogState;
use super::open::{Found, read_metadata, read_regions};
use super::replay;
use super::view::View;
use crate::disk::ReadDisk;
use crate::error::Result;
use crate::format::header::Current;
use crate::format::metadata::Metadata;

/// What an image says of itself and of its parent, a dirty log replayed in memory.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Changes with the first visible write.
    pub data_write_guid: Uuid,
    /// The virtual disk, and the way to its parent.
    pub metadata: Metadata,
}

impl Identity {
    /// Reads it from `disk`. Nothing is written, and the BAT is not read: an image with damaged blocks has an
    /// identity all the same. A log longer than `longest_log` bytes is not looked into.
    ///
    /// # Errors
    /// Whatever contradicts the format, by structure and offset; I/O errors.
    pub async fn read<D: ReadDisk>(disk: &D, longest_log: u64) -> Result<Self> {
        let Found { header: Current { header, .. }, log, length, .. } = Found::on(disk, longest_log).await?;
        let overlay = match log {
            LogState::Clean | LogState::Virgin => None,
            LogState::Dirty(positions) => Some(replay::in_memory(disk, &header, &positions, length).await?),
        };
        let file = View { disk, overlay: overlay.as_ref() };
        let regions = read_regions(&file, file.length().await?).await?;
        let metadata = read_metadata(&file, regions.table.metadata()).await?;
        Ok(Self { data_write_guid: header.data_write_guid, metadata })
    }
}
