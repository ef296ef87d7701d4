//! A snapshot that is asked for, on its way from the control socket to the engine, and its answer back.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::path;
use super::registry::FileId;
use crate::error::Result;

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapped {
    /// The image that is served now.
    #[serde(with = "path::one")]
    pub image: PathBuf,
    /// Its parent, which was served before and does not change any more.
    #[serde(with = "path::one")]
    pub parent: PathBuf,
    /// How long requests had to wait, microseconds.
    pub pause_us: u64,
}

/// What is served from now on, for the device's entry.
pub struct NewLeaf {
    /// Its path, absolute, without symbolic links.
    pub image: PathBuf,
    /// The same, whatever it is called.
    pub image_file: FileId,
    /// Its parents' paths; its own first.
    pub parents: Vec<PathBuf>,
    /// The same files, whatever they are called.
    pub parent_files: Vec<FileId>,
    /// Its FileWriteGuid.
    pub file_write_guid: Uuid,
}

/// Makes the device's entry name the new leaf.
pub type Switch = Box<dyn FnOnce(NewLeaf) -> Result<()> + Send>;

/// A snapshot that shall be taken.
pub struct Order {
    /// Where the child shall be.
    pub(super) image: PathBuf,
    /// The number of the device.
    pub(super) device: u32,
    pub(super) switch: Switch,
    pub(super) answer: mpsc::Sender<Result<Snapped>>,
    /// Who waits for it.
    pub(super) caller: Arc<Caller>,
}

/// A snapshot that is asked for, and where the answer goes.
pub(super) struct Call {
    /// Where the new image shall be: absolute.
    pub(super) image: PathBuf,
    pub(super) answer: mpsc::Sender<Result<Snapped>>,
    pub(super) caller: Arc<Caller>,
}

/// Who waits for an answer, and may lose patience.
pub(super) struct Caller {
    stream: UnixStream,
    /// Set once: when it is given up, or when what it wants is being done for good.
    decided: AtomicBool,
}

impl Caller {
    pub(super) fn of(stream: &UnixStream) -> io::Result<Self> {
        Ok(Self { stream: stream.try_clone()?, decided: AtomicBool::new(false) })
    }

    /// Asked right before the step after which it is done. Whether it is to be done: not if nobody waits for it any
    /// more, because it took too long or because who asked has left. This process may have been stopped meanwhile.
    pub(super) fn claim(&self) -> bool {
        !self.decided.swap(true, Ordering::AcqRel) && self.is_there()
    }

    /// Gives it up. Whether there was still time to.
    pub(super) fn give_up(&self) -> bool {
        !self.decided.swap(true, Ordering::AcqRel)
    }

    /// Whether the other side still has its end open. One that only has said all it will say is still there.
    pub(super) fn is_there(&self) -> bool {
        let mut ends = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        let told = poll(&mut ends, PollTimeout::ZERO);
        let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
        told.is_ok() && !ends[0].revents().is_some_and(|events| events.intersects(gone))
    }
}
