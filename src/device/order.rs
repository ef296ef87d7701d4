//! What callers request, on its way from the control socket to the engine.

use std::path::PathBuf;
use std::sync::{Arc, mpsc};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::job::{Job, Running, Stop};
use super::path;
use super::registry::MergeUnderWay;
use super::reply::Reply;
use crate::disk::HostFile;
use crate::engine::port_counts::Requests;
use crate::error::Result;
use crate::image::BlockMap;
use crate::operations::compact::Figures;
use crate::operations::merge::Link;

/// A snapshot that was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Snapped {
    /// The image that is served now.
    #[serde(with = "path::one")]
    #[schemars(with = "path::WrittenPath")]
    pub image: PathBuf,
    /// Its parent, which was served before and no longer changes.
    #[serde(with = "path::one")]
    #[schemars(with = "path::WrittenPath")]
    pub parent: PathBuf,
    /// How long requests had to wait, microseconds.
    pub pause_us: u64,
}

/// A disk that has become larger while it was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grown {
    /// Its size now, bytes.
    pub size_bytes: u64,
    /// How long requests had to wait, microseconds.
    pub pause_us: u64,
}

/// A layer of a served chain that was merged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Merged {
    /// The layer, whose file is gone.
    #[serde(with = "path::one")]
    pub layer: PathBuf,
    /// Its parent, which has its content now.
    #[serde(with = "path::one")]
    pub target: PathBuf,
    /// How many images the chain has now.
    pub layers: usize,
}

/// What has become of a file that was compacted while it was served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shortened {
    /// What the file took.
    pub before: Figures,
    /// What it takes now.
    pub after: Figures,
    /// Blocks moved.
    pub moves: u64,
    /// Their bytes.
    pub moved_bytes: u64,
    /// Bytes cut off the end of the file.
    pub cut_bytes: u64,
    /// Why not all was done, if it was not.
    pub stopped: Option<Stop>,
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

/// A device that was handed over to the process that asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandedOver {
    /// When requests began to wait, microseconds of the clock that all processes share (`CLOCK_MONOTONIC`).
    pub paused_at_us: u64,
}

/// A merge as the engine's thread begins it.
pub struct MergeOrder {
    /// The number of the device.
    pub(super) device: u32,
    /// The file of the layer.
    pub(super) layer: HostFile,
    /// A merge that was cut before, if the entry has one.
    pub(super) unfinished: Option<MergeUnderWay>,
    /// Makes the entry name the chain without the layer.
    pub(super) switch: Option<Switch>,
    /// Has the entry say which merge is under way.
    pub(super) note: Box<dyn Fn(Option<MergeUnderWay>) -> Result<()> + Send>,
    pub(super) running: Running,
    pub(super) reply: Reply<Merged>,
}

impl MergeOrder {
    pub(super) fn end(self, outcome: Result<Merged>) {
        // Who gets the answer may begin the next job.
        drop(self.running);
        self.reply.send(outcome);
    }
}

/// What a caller requests at the control socket.
pub(super) enum Call {
    /// A snapshot.
    Snapshot {
        /// The path of the new image: absolute.
        image: PathBuf,
        reply: Reply<Snapped>,
    },
    /// That the disk becomes larger.
    Grow { sizes: Sizes, reply: Reply<Grown> },
    /// The engine has an outcome of that: if the disk is larger, the kernel is to know.
    HasGrown { outcome: Result<Grown>, reply: Reply<Grown> },
    /// That a layer of the chain is merged into its parent.
    Merge {
        /// The file of the layer.
        layer: HostFile,
        job: Arc<Job>,
        reply: Reply<Merged>,
    },
    /// That the file of the image becomes shorter.
    Compact { max_rate: Option<u64>, job: Arc<Job>, reply: Reply<Shortened> },
    /// The device itself has compacted its image.
    Reclaimed(Result<Shortened>),
    /// That requests that wait for room fail, as the caller is about to have the device stopped. The answer
    /// is how many there are.
    EndWaits { reply: Reply<u64> },
    /// That this daemon ends, and leaves its device to the caller.
    HandOver {
        /// The image that the caller has opened.
        image_file: HostFile,
        /// The caller's process.
        successor: u32,
        reply: Reply<HandedOver>,
    },
}

/// How a disk is to grow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// The size that the caller has seen, bytes.
    pub from_bytes: u64,
    /// The size that it is to have, bytes.
    pub to_bytes: u64,
}

/// A growth of the disk as the engine carries it out.
pub struct GrowOrder {
    /// The number of the device.
    pub(super) device: u32,
    pub(super) sizes: Sizes,
    pub(super) reply: Reply<Grown>,
    /// Gets the outcome, and the reply that it is for.
    pub(super) ended: Box<dyn FnOnce(Result<Grown>, Reply<Grown>) + Send>,
}

/// A compaction as the engine carries it out.
pub struct CompactOrder {
    /// The number of the device.
    pub(super) device: u32,
    /// The most bytes that are copied in a second, if the caller has a limit.
    pub(super) max_rate: Option<u64>,
    /// The requests that the guest has made so far.
    pub(super) requests: Box<dyn Fn() -> Requests + Send>,
    /// The device has no requests, and compacts by itself: only if it is worth it, and until one comes.
    pub(super) while_idle: bool,
    pub(super) running: Running,
    /// Takes the outcome.
    pub(super) ended: Box<dyn FnOnce(Result<Shortened>) + Send>,
}

/// A snapshot as the engine takes it.
pub struct SnapshotOrder {
    /// The path of the new image: absolute.
    pub(super) image: PathBuf,
    /// The number of the device.
    pub(super) device: u32,
    pub(super) switch: Switch,
    pub(super) reply: Reply<Snapped>,
}

/// What a merge asks of the engine's thread: the leaf says something else of its parent, or a layer leaves
/// the chain.
pub(super) struct RelinkOrder {
    /// What the leaf is to say of its parent, if that changes.
    pub(super) link: Option<Link>,
    pub(super) dropped: Option<Dropped>,
    /// Takes the outcome.
    pub(super) done: mpsc::SyncSender<Result<()>>,
}

/// The layer that leaves the chain.
pub(super) struct Dropped {
    pub(super) layer: HostFile,
    /// Where the content of the target, which is below it, is now.
    pub(super) target: BlockMap,
    pub(super) switch: Switch,
}

/// What the engine is to do between requests.
pub(super) enum Order {
    Snapshot(SnapshotOrder),
    Grow(GrowOrder),
    Merge(MergeOrder),
    /// Of a merge that is under way.
    Relink(RelinkOrder),
    Compact(CompactOrder),
    /// Commit what is dirty, for a successor that has little to do then.
    Settle {
        /// Afterwards the fronts hold for good, and what is dirty since is committed: nothing is under way,
        /// and the process ends.
        hold: bool,
        /// Takes the outcome as a rendezvous. If nothing receives it, the fronts continue.
        settled: mpsc::SyncSender<Result<()>>,
    },
}
