//! Opening an image for writing.
//!
//! Order: the whole image is read and checked, its log replayed in memory; then the driver is opened;
//! only then is a dirty log replayed in place, and a wrong path to the parent replaced. So an image that
//! cannot be served, or for which there is no driver, stays as it is, byte for byte.

use std::sync::Arc;

use uuid::Uuid;

use super::errands::Errands;
use super::layers::{Parents, choose_payload_io, read_image};
use super::registry::RUN_DIRECTORY;
use super::session::{self, Plan, SessionFile, Sessions};
use crate::chain::{self, Member};
use crate::disk::{Disk, ImageFile, Reactor, UringDisk};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::metadata::Metadata;
use crate::image::{FoundLog, Image, Place, ReadImage, Session, SessionMemory, WritableImage};

/// How an image is opened for writing.
pub(super) struct WritableOpener {
    /// Called before anything is written.
    pub(super) may_write: fn() -> Result<()>,
    /// What to do about sessions.
    pub(super) plan: Plan,
    pub(super) sessions: Sessions,
    /// How the image's parents are found and opened.
    pub(super) parents: Parents,
    /// What asks the driver.
    pub(super) errands: Errands,
}

/// What was found before anything is written.
struct Precheck {
    /// The image, unless its log must be replayed in place to read it.
    image: Option<ReadImage>,
    session: Option<Resumable>,
}

/// A session to take over.
struct Resumable {
    file: SessionFile,
    memory: SessionMemory,
    /// The image's FileWriteGuid.
    file_write_guid: Uuid,
}

/// A chain whose first image is opened for writing.
pub(super) struct WritableChain {
    pub(super) image: WritableImage,
    pub(super) session: Option<SessionFile>,
    /// Its parents, nearest first.
    pub(super) parents: Vec<Member>,
}

impl WritableOpener {
    /// Opens the image in `file`, which carries its lock: every write of a dead holder has ended.
    pub(super) fn open(&self, reactor: &Reactor, file: &Arc<ImageFile>) -> Result<WritableChain> {
        let path = file.path();
        let (disk, place) = (reactor.disk(file.clone()), session::place_of(file)?);
        file.read_anew();
        let found = reactor.block_on(self.check(&disk, &place)).file(path)?;
        let parents_of = |image: &Image| self.parents.of(image, path, reactor, &self.errands);
        super::handover::note("the image is read");
        let early_parents = found.image.as_deref().map(parents_of).transpose()?;
        (self.may_write)()?;
        let (mut image, mut session) = reactor.block_on(self.load(&disk, found)).file(path)?;
        super::handover::note("the session is taken over");
        let parents = early_parents.map_or_else(|| parents_of(&image), Ok)?;
        if image.pending().grown {
            let rested = session.take().expect("the disk has grown in it");
            session = reactor.block_on(self.begin(&disk, &place, &mut image)).file(path)?;
            if session.is_none() {
                rested.remove()?;
            }
        } else if session.is_none() {
            image = reactor.block_on(self.redirect(&disk, image, parents.first())).file(path)?;
            session = reactor.block_on(self.begin(&disk, &place, &mut image)).file(path)?;
            if session.is_some() && image.map.memory().used_page_cache() {
                reactor.block_on(self.forget_losses(&disk, &place)).file(path)?;
            }
        }
        Ok(WritableChain { image, session, parents })
    }

    /// Reads the image, and chooses the session to take over. Nothing is written.
    async fn check(&self, disk: &UringDisk, place: &Place) -> Result<Precheck> {
        let image = match read_image(disk).await {
            Ok(image) => {
                image.check_writable()?;
                Some(image)
            }
            // A log that cannot be replayed in memory can still be replayed in place.
            Err(error) if error.kind() == Kind::Unsupported && error.structure() == Some("log") => None,
            Err(error) => return Err(error),
        };
        let session = session::choose((self.plan, &self.errands), &self.sessions, image.as_deref(), place)?;
        let session = session.zip(image.as_ref()).map(|((file, memory), image)| Resumable {
            file,
            memory,
            file_write_guid: image.header.header.file_write_guid,
        });
        Ok(Precheck { image, session })
    }

    /// The image as it is to be served: from the session, or from the file with its log replayed in place.
    async fn load(&self, disk: &UringDisk, found: Precheck) -> Result<(WritableImage, Option<SessionFile>)> {
        let clean = found.image.and_then(ReadImage::into_writable);
        let (image, session) = match (found.session, clean) {
            (Some(session), _) => {
                let (image, session) = self.resume(disk, session).await?;
                (image, Some(session))
            }
            (None, Some(image)) => (image, None),
            (None, None) => (Image::open_for_writing(disk, Uuid::new_v4).await?, None),
        };
        if let (FoundLog::Dirty(entries), None) = (image.found_log, &session) {
            tracing::info!("the image was not closed cleanly: replayed {entries} log entries");
        }
        if choose_payload_io(disk.file(), &image.metadata)? && session.is_some() {
            image.map.memory().note_page_cache();
        }
        warn_of_copying(disk.file());
        Ok((image, session))
    }

    async fn resume(&self, disk: &UringDisk, session: Resumable) -> Result<(WritableImage, SessionFile)> {
        let Resumable { mut file, memory, file_write_guid } = session;
        let resumed = WritableImage::resume(disk, memory.clone(), file_write_guid, Uuid::new_v4).await;
        if resumed.is_err() && memory.session() == Session::Poisoned && memory.used_page_cache() {
            self.sessions.spread_doubt(&session::place_of(disk.file())?)?;
        }
        let image = resumed.map_err(|error| file.with_remedy(error))?;
        if image.pending().grown {
            tracing::info!("the disk has the size that it was being given when its daemon was killed");
            return Ok((image, file));
        }
        file.publish()?;
        Ok((image, file))
    }

    /// Makes `image` name the path where its `parent` was found, if its own paths lead elsewhere. Not while a
    /// session is taken over, to which the image's metadata must fit.
    async fn redirect(
        &self,
        disk: &UringDisk,
        image: WritableImage,
        parent: Option<&Member>,
    ) -> Result<WritableImage> {
        let (Some(parent), Some(locator)) = (parent, &image.metadata.parent_locator) else {
            return Ok(image);
        };
        let (child, parent) = (disk.file().path(), parent.file.path());
        let warn = |error: &Error| {
            tracing::warn!("{}: it keeps a wrong path to its parent: {error:#}", child.display());
        };
        let redirected = match chain::with_found_path(child, locator, parent, &self.parents.search) {
            Ok(Some(redirected)) => redirected,
            Ok(None) => return Ok(image),
            Err(error) => {
                warn(&error);
                return Ok(image);
            }
        };
        let metadata = Metadata { parent_locator: Some(redirected), ..image.metadata.clone() };
        match image.amend(disk, &metadata, Uuid::new_v4).await {
            // The locator is as it was.
            Err(error) if matches!(error.kind(), Kind::Unsupported | Kind::NoSpace) => {
                warn(&error);
                Image::open_for_writing(disk, Uuid::new_v4).await
            }
            amended => amended,
        }
    }

    /// Reads the rest of an image without a session, and starts a session if the plan says so.
    pub(super) async fn begin(
        &self,
        disk: &UringDisk,
        place: &Place,
        image: &mut WritableImage,
    ) -> Result<Option<SessionFile>> {
        image.read_bitmaps(disk).await?;
        if matches!(self.plan, Plan::Fresh { keep: false } | Plan::Close) {
            return Ok(None);
        }
        let started = self.start_session(image, place);
        if started.is_ok() && !disk.file().is_direct() {
            image.map.memory().note_page_cache();
        }
        Ok(started
            .inspect_err(|error| {
                tracing::warn!("the device cannot be recovered if its daemon is killed: {error:#}");
            })
            .ok())
    }

    /// Data that the host's file system lost before the device existed is not the device's: a sync reports
    /// such a loss now, so that it does not report it later.
    async fn forget_losses(&self, disk: &UringDisk, place: &Place) -> Result<()> {
        let Err(error) = disk.sync_host().await else { return Ok(()) };
        let path = disk.file().path().display();
        tracing::warn!("{path}: its file system has lost data of some file before: {error}");
        self.sessions.spread_doubt(place)
    }

    fn start_session(&self, image: &mut WritableImage, place: &Place) -> Result<SessionFile> {
        let geometry = *image.map.geometry();
        let (mut session, memory) = self.sessions.create(place, image.metadata.disk_id, &geometry)?;
        image
            .start_session(memory, &image.owner(place.clone()))
            .doing("reserving room for the sector bitmaps")?;
        session.publish()?;
        let most = SessionMemory::most_bytes(&geometry);
        if most > (SessionMemory::reserved_words(&geometry) * size_of::<u64>()) as u64 {
            tracing::info!("its session may take up to {most} bytes of memory under {RUN_DIRECTORY}");
        }
        Ok(session)
    }
}

/// Warns where reserved room is not enough for later writes.
fn warn_of_copying(file: &ImageFile) {
    match file.host_that_copies() {
        Ok(Some(host)) => tracing::info!(
            "{}: {host} needs room for overwrites, too: a write or flush fails while there is none, and \
             works again when there is some",
            file.path().display()
        ),
        Ok(None) => {}
        Err(error) => tracing::warn!("{}: looking at the host: {error:#}", file.path().display()),
    }
}
