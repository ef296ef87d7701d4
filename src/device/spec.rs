//! What a device is made of: its image, its engine, and what is reported once it is ready.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::leaf_handover::LeafHandover;
use super::options::{Parameters, Salvage};
use super::order::{CompactOrder, GrowOrder, MergeOrder, SnapshotOrder};
use super::path;
use super::spare_buffers::SpareBuffers;
use crate::disk::tally::Histogram;
use crate::disk::{HostFile, ImageFile, Sparse};
use crate::engine::shared::Shared;
use crate::error::Result;

/// An open image, as a device serves it.
pub struct DeviceSpec {
    /// The image's path: absolute, without symbolic links.
    pub path: PathBuf,
    /// The open file descriptions that carry the locks of the image and its parents, nearest first; all rings
    /// use them.
    pub images: Arc<[File]>,
    /// The image's file.
    pub leaf: Arc<ImageFile>,
    /// The image, independent of its path.
    pub image_file: HostFile,
    /// The parents' paths, absolute, without symbolic links, nearest first.
    pub parents: Vec<PathBuf>,
    /// The same files, independent of their paths.
    pub parent_files: Vec<HostFile>,
    /// What the fronts and the engine share, as long as one of them has it: the memory of a disk that has
    /// grown is given back.
    pub shared: Weak<Shared>,
    /// The disk as the kernel sees it.
    pub parameters: Parameters,
    /// The image's FileWriteGuid.
    pub file_write_guid: Uuid,
    /// The identifier of the disk, which a snapshot does not change.
    pub disk_id: Uuid,
    /// Whether the image's file may get holes.
    pub sparse: Sparse,
    /// Whether another daemon could continue if this one is killed.
    pub recoverable: bool,
    /// What is left of a damaged image is shown.
    pub salvage: Option<Salvage>,
    /// How long syncs of the image take.
    pub sync_times: Arc<Histogram>,
    /// Buffers for its queues, as far as they were made before.
    pub spare: SpareBuffers,
}

/// The engine of a device, once started. It is dropped without [`EngineHandle::close`] only when the process
/// is about to end: dropping it must not wait.
pub trait EngineHandle {
    /// Closes the image and waits for the engine's end. The fronts are idle, and still answer barriers.
    ///
    /// # Errors
    ///
    /// When the image could not be left clean.
    fn close(self) -> Result<()>;

    /// Where the queues find the leaf that they serve after a snapshot.
    fn handover(&self) -> LeafHandover;

    /// Makes the disk larger, and gives the outcome to the order's end.
    fn grow(&self, order: GrowOrder);

    /// Merges a layer of the chain into its parent, and answers through the order's reply.
    fn merge(&self, order: MergeOrder);

    /// Makes the file of the image shorter, and answers through the order's reply.
    fn compact(&self, order: CompactOrder);

    /// Takes a snapshot, and answers through the order's reply.
    fn snapshot(&self, order: SnapshotOrder);

    /// Commits what is dirty, and with `hold` then has the fronts serve nothing from then on: the process is
    /// about to end, and another one to take over. Waits up to `patience`.
    ///
    /// # Errors
    ///
    /// If that has failed, or takes longer: the fronts continue.
    fn settle(&self, hold: bool, patience: Duration) -> Result<()>;
}

/// A device that is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The N of `/dev/ublkbN`.
    pub id: u32,
    /// `/dev/ublkbN`.
    pub device: PathBuf,
    /// The image, as an absolute path without symbolic links.
    #[serde(default, with = "path::one")]
    pub image: PathBuf,
    /// Where warnings are written from now on, if the daemon has detached from its terminal.
    pub log: PathBuf,
    /// How long requests had to wait, if it was taken over in an upgrade: microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_us: Option<u64>,
}
