//! What an image is, without its blocks: enough to tell whose parent or child it is.

use uuid::Uuid;

use super::log_scan::{Log, LogState};
use super::open::{check_log_place, read_file_id, read_headers, read_metadata, read_regions};
use super::overlay::Overlay;
use super::replay;
use super::view::{View, file_length};
use crate::disk::Disk;
use crate::error::Result;
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
    pub async fn read<D: Disk>(disk: &D, longest_log: u64) -> Result<Self> {
        let file = View { disk, overlay: None };
        let mut length = file_length(disk).await?;
        read_file_id(&file, length).await?;
        let current = read_headers(&file, length).await?;
        check_log_place(&current, length)?;
        let header = current.header;
        let log = if u64::from(header.log_length) <= longest_log {
            Log::new(disk, &header).scan(length).await?
        } else {
            LogState::Clean
        };
        let overlay = match log {
            LogState::Clean | LogState::Virgin => None,
            LogState::Dirty(positions) => Some(replay::in_memory(disk, &header, &positions, length).await?),
        };
        let file = View { disk, overlay: overlay.as_ref() };
        length = overlay.as_ref().map_or(length, Overlay::file_length);
        let regions = read_regions(&file, length).await?;
        let metadata = read_metadata(&file, regions.table.metadata()).await?;
        Ok(Self { data_write_guid: header.data_write_guid, metadata })
    }
}
