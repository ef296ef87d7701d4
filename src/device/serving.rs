//! The image that is served, with its engine and its session.

use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use uuid::Uuid;

use super::fronts::Mailboxes;
use super::layers::EngineParents;
use super::opened::Opened;
use super::options::Parameters;
use super::session::SessionFile;
use crate::disk::{ImageFile, Reactor, UringDisk};
use crate::engine::local::Spawn;
use crate::engine::shared::Session;
use crate::engine::{Engine, Setup};
use crate::error::{Error, Kind, Result};
use crate::image::Image;

/// The image that is served, and its engine.
pub(super) struct Serving {
    pub(super) engine: Rc<Engine<UringDisk>>,
    pub(super) opened: Opened,
    pub(super) session: Option<SessionFile>,
    pub(super) file: Arc<ImageFile>,
    pub(super) disk_id: Uuid,
}

/// An engine for an image that was opened, and its parents.
pub(super) fn open_served(
    reactor: &Reactor,
    fronts: &Rc<Mailboxes>,
    file: Arc<ImageFile>,
    image: Image,
    session: Option<SessionFile>,
    (parents, parent_files): EngineParents,
    parameters: Parameters,
) -> Result<Serving> {
    let (file_write_guid, disk_id) = (image.header.header.file_write_guid, image.metadata.disk_id);
    let (disk, tasks): (_, Rc<dyn Spawn>) = (reactor.disk(file.clone()), reactor.executor().clone());
    let (fronts, guids) = (fronts.clone(), Box::new(Uuid::new_v4));
    let engine = Engine::new(Setup { image, disk, parents, tasks, fronts, guids });
    let engine = engine.map_err(|error| error.file(file.path()))?;
    let (shared, recoverable) = (engine.shared().clone(), session.is_some());
    let opened = Opened { shared, parameters, file_write_guid, recoverable, parents: parent_files };
    Ok(Serving { engine, opened, session, file, disk_id })
}

impl Serving {
    /// Nobody will start the engine. What a session of a killed daemon holds still has to be served: it stays, and
    /// so does the image.
    pub(super) fn give_up(self, reactor: &Reactor) -> Result<()> {
        if self.engine.shared().session() == Session::Idle {
            let unchanged = reactor.block_on(self.engine.close());
            assert_eq!(unchanged, Ok(()), "nothing was modified");
        }
        self.session.map_or(Ok(()), SessionFile::abandon)
    }
}

pub(super) fn unclean(doing: &str, errno: i32, poisoned: bool, path: &Path) -> Error {
    if poisoned {
        let message = "writes were stopped by an earlier failure, and the image was not closed; what was flushed is safe";
        return Error::new(Kind::Poisoned, message).file(path).remedy(
            "look for the cause (dmesg, free space); the next `vhdx-ublk add` replays the image's log",
        );
    }
    Error::io(doing, io::Error::from_raw_os_error(errno)).file(path)
}
