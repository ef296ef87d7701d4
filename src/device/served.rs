//! What a device is made of: the image, its engine, and what is told of it once it is ready.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::leaf::NextLeaf;
use super::options::Parameters;
use super::order::Order;
use super::registry::FileId;
use crate::engine::shared::Shared;
use crate::error::Result;

/// An opened image, ready to be served.
pub struct Served {
    /// Where it is: absolute, without symbolic links.
    pub path: PathBuf,
    /// The one open file description that carries its lock, and those of its parents; all rings use them.
    pub images: Arc<[File]>,
    /// The same, whatever it is called.
    pub image_file: FileId,
    /// The parents' paths, absolute, without symbolic links; its own first.
    pub parents: Vec<PathBuf>,
    /// The same files, whatever they are called.
    pub parent_files: Vec<FileId>,
    /// What the fronts and the engine share.
    pub shared: Arc<Shared>,
    /// The disk as the kernel shall see it.
    pub parameters: Parameters,
    /// The image's FileWriteGuid.
    pub file_write_guid: Uuid,
    /// Whether a successor could go on with it.
    pub recoverable: bool,
}

/// The engine of a device, once started. It is dropped without [`EngineHandle::close`] only when the process is
/// about to end: dropping it must not wait.
pub trait EngineHandle {
    /// Closes the image and waits for the engine's end. The fronts are idle, and still answer barriers.
    ///
    /// # Errors
    ///
    /// When the image could not be left clean.
    fn close(self) -> Result<()>;

    /// Where the queues find the leaf that they serve after a snapshot.
    fn next_leaf(&self) -> NextLeaf;

    /// Takes a snapshot, and answers to whom the order says.
    fn snapshot(&self, order: Order);
}

/// A device that is served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ready {
    /// The N of `/dev/ublkbN`.
    pub id: u32,
    /// `/dev/ublkbN`.
    pub device: PathBuf,
    /// Where warnings go from now on, if the daemon has detached from its terminal.
    pub log: PathBuf,
}
