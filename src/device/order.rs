//! A snapshot on its way from the control socket to the engine.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::path;
use super::reply::Reply;
use crate::disk::HostFile;
use crate::error::Result;

/// A snapshot that was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapped {
    /// The image that is served now.
    #[serde(with = "path::one")]
    pub image: PathBuf,
    /// Its parent, which was served before and no longer changes.
    #[serde(with = "path::one")]
    pub parent: PathBuf,
    /// How long requests had to wait, microseconds.
    pub pause_us: u64,
}

/// The new leaf, as the device's entry names it.
pub struct NewLeaf {
    /// Its path, absolute, without symbolic links.
    pub image: PathBuf,
    /// The same file, independent of its path.
    pub image_file: HostFile,
    /// The paths of its parents, nearest first.
    pub parents: Vec<PathBuf>,
    /// The same files, independent of their paths.
    pub parent_files: Vec<HostFile>,
    /// Its FileWriteGuid.
    pub file_write_guid: Uuid,
}

/// Makes the device's entry name the new leaf.
pub type Switch = Box<dyn FnOnce(NewLeaf) -> Result<()> + Send>;

/// A snapshot as a caller requests it.
pub(super) struct Call {
    /// The path of the new image: absolute.
    pub(super) image: PathBuf,
    pub(super) reply: Reply<Snapped>,
}

/// A snapshot as the engine takes it.
pub struct Order {
    /// The path of the new image: absolute.
    pub(super) image: PathBuf,
    /// The number of the device.
    pub(super) device: u32,
    pub(super) switch: Switch,
    pub(super) reply: Reply<Snapped>,
}
