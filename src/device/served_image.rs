//! The image that is served, with its engine and its session.

use std::path::Path;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use smol::Task;
use uuid::Uuid;

use super::fronts::Mailboxes;
use super::layers::EngineParents;
use super::open_image::OpenImage;
use super::options::Parameters;
use super::session::SessionFile;
use crate::chain::ReadLayer;
use crate::disk::{HostFile, ImageFile, Reactor, Ring, UringDisk};
use crate::engine::shared::Session;
use crate::engine::waiting::{Bell, Spawn};
use crate::engine::{Engine, Outcome, Setup};
use crate::error::{Error, Kind, Locate, Result};
use crate::format::locator::ParentLocator;
use crate::image::WritableImage;

/// How long after blocks have lost space it is committed, unless a flush does that before: then the host gets
/// the space. A guest that discards all the time costs a sync in so long.
const LOST_SPACE_DELAY: Duration = Duration::from_secs(1);

/// See the module's head.
pub(super) struct ServedImage {
    pub(super) engine: Rc<Engine<UringDisk>>,
    pub(super) opened: OpenImage,
    pub(super) session: Option<SessionFile>,
    pub(super) file: Arc<ImageFile>,
    /// What it says of its parent.
    pub(super) locator: Option<ParentLocator>,
    /// Ends with it.
    _returns: Task<()>,
}

/// Starts an engine for an image that was opened, and its parents.
pub(super) fn open_served(
    reactor: &Reactor,
    fronts: &Rc<Mailboxes>,
    file: Arc<ImageFile>,
    image: WritableImage,
    session: Option<SessionFile>,
    (parents, parent_files): EngineParents,
    parameters: Parameters,
) -> Result<ServedImage> {
    let (file_write_guid, disk_id) = (image.header.header.file_write_guid, image.metadata.disk_id);
    let locator = image.metadata.parent_locator.clone();
    let (disk, tasks): (_, Rc<dyn Spawn>) = (reactor.disk(file.clone()), reactor.executor().clone());
    let (fronts, guids) = (fronts.clone(), Box::new(Uuid::new_v4));
    let engine = Engine::new(Setup { image, disk, parents, tasks, fronts, guids });
    let engine = engine.file(file.path())?;
    let (shared, recoverable) = (engine.shared().clone(), session.is_some());
    let (sync_times, parents) = (reactor.sync_times().clone(), parent_files);
    let opened = OpenImage {
        shared,
        parameters,
        file_write_guid,
        disk_id,
        recoverable,
        salvage: None,
        sync_times,
        parents,
    };
    let returns =
        reactor.spawn(return_space(Rc::downgrade(&engine), engine.lost_space(), reactor.ring().clone()));
    Ok(ServedImage { engine, opened, session, file, locator, _returns: returns })
}

/// Has what blocks lose go back to the host although nothing is flushed.
async fn return_space(engine: Weak<Engine<UringDisk>>, lost: Rc<Bell>, ring: Rc<Ring>) {
    loop {
        lost.wait().await;
        if let Err(error) = ring.sleep(LOST_SPACE_DELAY).await {
            tracing::warn!("what is discarded goes back to the host with the next flush only: {error}");
            return;
        }
        let Some(engine) = engine.upgrade() else { return };
        engine.commit_lost_space();
    }
}

impl ServedImage {
    /// The files of the chain, its own first.
    pub(super) fn files(&self) -> Arc<[Arc<ImageFile>]> {
        std::iter::once(&self.file).chain(self.opened.parents.iter()).cloned().collect()
    }

    /// The image, independent of its path.
    pub(super) fn image_file(&self) -> HostFile {
        self.file.identity()
    }

    /// Ends the engine before it was started. A session of a killed daemon stays, and so does the image: the
    /// session may hold what is not in the image.
    pub(super) fn give_up(self, reactor: &Reactor) -> Result<()> {
        if self.engine.shared().session() == Session::Idle {
            // Nothing was modified since, but cutting off the tail of a replayed image may fail.
            if let Err(errno) = reactor.block_on(self.engine.close()) {
                tracing::warn!("{} keeps its unused tail: errno {errno}", self.file.path().display());
            }
        }
        self.session.map_or(Ok(()), SessionFile::abandon)
    }
}

impl ServedImage {
    /// The outcome of the engine's `doing` something.
    pub(super) fn check(&self, doing: &str, outcome: Outcome) -> Result<()> {
        let poisoned = self.engine.shared().session() == Session::Poisoned;
        outcome.map_err(|errno| unclean(doing, errno, poisoned, self.file.path()))
    }

    /// What an engine on `reactor` needs of its parents.
    pub(super) fn parents(&self, reactor: &Reactor) -> EngineParents {
        let files = self.opened.parents.clone();
        let layers = files.iter().zip(self.engine.shared().layers().skip(1));
        let layers =
            layers.map(|(file, map)| ReadLayer { disk: reactor.disk(file.clone()), map: map.clone() });
        (layers.collect(), files)
    }
}

/// The error of an engine that has failed while `doing` something.
pub(super) fn unclean(doing: &str, errno: Errno, poisoned: bool, path: &Path) -> Error {
    if poisoned {
        let message =
            "an earlier failure has stopped all writes, and the image was not closed; flushed data is safe";
        return Error::new(Kind::Poisoned, message).file(path).remedy(
            "look for the cause (dmesg, free space); the next `vhdx-ublk add` replays the image's log",
        );
    }
    Error::io(doing, errno.into()).file(path)
}
