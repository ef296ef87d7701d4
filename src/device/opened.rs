//! An image opened to be served: what the fronts share, and the disk as the kernel shall see it.
//!
//! Order: the whole image is read and checked, its log replayed in memory; then the driver is asked for; only
//! then is a dirty log replayed in place, and a path that leads nowhere renewed. So an image that cannot be served,
//! and one that nobody could serve, stay as they are, byte for byte.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use uuid::Uuid;

use super::control::Control;
use super::layers::{Parents, ReadLayer, choose_payload_io, look};
use super::leaf::NextLeaf;
use super::mailbox::EngineEnds;
use super::options::Parameters;
use super::order::Order;
use super::registry::{FileId, RUN_DIRECTORY};
use super::served::{EngineHandle, Served};
use super::session::{self, Plan, SessionFile, Sessions};
use crate::chain;
use crate::disk::{Disk, ImageFile, Reactor, UringDisk};
use crate::engine::shared::Shared;
use crate::error::{Error, Kind, Result};
use crate::format::metadata::{DiskType, Metadata};
use crate::image::{FoundLog, Image, Mode, Place, Session, SessionMemory};

/// An image ready to be served.
#[derive(Clone)]
pub struct Opened {
    /// What the fronts and the engine share.
    pub shared: Arc<Shared>,
    /// The disk as the kernel shall see it.
    pub parameters: Parameters,
    /// The image's FileWriteGuid.
    pub file_write_guid: Uuid,
    /// Whether a successor can go on where this process is killed.
    pub recoverable: bool,
    /// The parents' files, locked as long as this lives; its own first.
    pub(super) parents: Arc<[Arc<ImageFile>]>,
}

impl Opened {
    /// Opens the image in `file` for reading, and its parents. Nothing is written, not even their logs.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the images; those of [`crate::chain::open_parents`]; [`Kind::InUse`] if a killed
    /// daemon left a session of one; those of [`Control::open`].
    pub fn read_only(file: Arc<ImageFile>, parents: &Parents) -> Result<Self> {
        let reactor = Reactor::new()?;
        file.read_anew();
        let leaf = ReadLayer::open(&reactor, file)?;
        let parents = parents.of(&leaf.image, leaf.file.path(), &reactor)?;
        Control::open()?;
        let fixed = leaf.image.metadata.kind() == DiskType::Fixed;
        let parameters = parameters(&leaf.file, &leaf.image.metadata, true, &parents)?;
        let file_write_guid = leaf.image.header.header.file_write_guid;
        let (_, leaf) = leaf.into_map()?;
        let parents = parents.into_iter().map(ReadLayer::into_map).collect::<Result<Vec<_>>>()?;
        let (parents, maps): (Vec<_>, Vec<_>) = parents.into_iter().unzip();
        let shared =
            Arc::new(Shared::of_chain(leaf.into(), maps.into_iter().map(Arc::new).collect(), true, fixed));
        Ok(Self { shared, parameters, file_write_guid, recoverable: true, parents: parents.into() })
    }

    /// Which files the parents are, as they were opened: another may be at such a path by now.
    pub(super) fn parent_files(&self) -> Result<Vec<FileId>> {
        self.parents.iter().map(|parent| FileId::of_image(parent)).collect()
    }

    /// What [`super::daemon::serve`] asks for.
    ///
    /// # Errors
    ///
    /// When the process has no file descriptor left.
    pub fn served(&self, file: &ImageFile) -> Result<Served> {
        let image_file = FileId::of_image(file)?;
        let files = std::iter::once(file).chain(self.parents.iter().map(Arc::as_ref));
        Ok(Served {
            path: file.path().to_owned(),
            images: files.map(same_description).collect::<Result<_>>()?,
            image_file,
            parents: self.parents.iter().map(|parent| parent.path().to_owned()).collect(),
            parent_files: self.parent_files()?,
            shared: self.shared.clone(),
            parameters: self.parameters,
            file_write_guid: self.file_write_guid,
            recoverable: self.recoverable,
        })
    }
}

/// Another descriptor of the same open file description: lock and flags are shared.
fn same_description(file: &ImageFile) -> Result<File> {
    let same = file.as_fd().try_clone_to_owned();
    let failed = |error| Error::io("duplicating the image's descriptor", error).file(file.path());
    same.map(File::from).map_err(failed)
}

/// Stands in for the engine of a read-only device, whose fronts never ask for anything. Keeps its ends of the
/// mailboxes.
pub struct NoEngine(pub EngineEnds);

impl EngineHandle for NoEngine {
    fn next_leaf(&self) -> NextLeaf {
        NextLeaf::default()
    }

    fn snapshot(&self, order: Order) {
        let message = "it is served read-only, and a snapshot would be no different";
        // Who asked may have lost patience.
        let _ = order.answer.send(Err(Error::new(Kind::Unsupported, message)));
    }

    fn close(self) -> Result<()> {
        Ok(())
    }
}

/// How an image is opened for writing.
pub(super) struct WritableOpen {
    /// Asked before anything is written.
    pub(super) may_write: fn() -> Result<()>,
    /// What to do about sessions.
    pub(super) plan: Plan,
    /// Where they are.
    pub(super) sessions: Sessions,
    /// How its parents are opened.
    pub(super) parents: Parents,
}

/// What was found before anything is written.
struct Examined {
    /// The image, if it can be used as it is.
    clean: Option<Image>,
    session: Option<Carried>,
}

/// The session to go on with, and the FileWriteGuid that the file carries.
type Carried = (SessionFile, SessionMemory, Uuid);

/// An image opened for writing.
pub(super) struct WritableImage {
    pub(super) image: Image,
    pub(super) session: Option<SessionFile>,
    /// Its parents, its own first.
    pub(super) parents: Vec<ReadLayer>,
}

impl WritableOpen {
    /// Opens the image in `file`, which carries its lock: every write of a dead holder has ended.
    pub(super) fn open(&self, reactor: &Reactor, file: &Arc<ImageFile>) -> Result<WritableImage> {
        let named = |error: Error| error.file(file.path());
        let (disk, place) = (reactor.disk(file.clone()), session::place_of(file)?);
        file.read_anew();
        let (seen, session) = reactor.block_on(self.examine(&disk, &place)).map_err(named)?;
        let seen = match seen {
            Some(image) => Some((self.parents.of(&image, file.path(), reactor)?, image)),
            None => None,
        };
        (self.may_write)()?;
        let (parents, clean) = match seen {
            Some((parents, image)) => (Some(parents), Some(image)),
            None => (None, None),
        };
        let examined = Examined { clean: clean.filter(|image| image.found_log == FoundLog::Clean), session };
        let (mut image, mut session) = reactor.block_on(self.take(&disk, examined)).map_err(named)?;
        let parents = match parents {
            Some(parents) => parents,
            None => self.parents.of(&image, file.path(), reactor)?,
        };
        if session.is_none() {
            let renewed = self.renew_paths(&disk, image, parents.first());
            image = reactor.block_on(renewed).map_err(named)?;
            session = reactor.block_on(self.begin(&disk, &place, &mut image)).map_err(named)?;
            if session.is_some() && image.map.memory().used_page_cache() {
                reactor.block_on(self.forget_losses(&disk, &place)).map_err(named)?;
            }
        }
        Ok(WritableImage { image, session, parents })
    }

    /// Looks at the image, and chooses the session to go on with. Nothing is written.
    async fn examine(&self, disk: &UringDisk, place: &Place) -> Result<(Option<Image>, Option<Carried>)> {
        let image = match look(disk).await {
            Ok(image) => {
                image.check_writable()?;
                Some(image)
            }
            // A log that cannot be replayed in memory can still be replayed in place.
            Err(error) if error.kind() == Kind::Unsupported && error.structure() == Some("log") => None,
            Err(error) => return Err(error),
        };
        let session = session::choose(self.plan, &self.sessions, image.as_ref(), place)?;
        let carried = image.as_ref().map(|image| image.header.header.file_write_guid);
        let session = session.zip(carried).map(|((file, memory), carried)| (file, memory, carried));
        Ok((image, session))
    }

    async fn take(
        &self,
        disk: &UringDisk,
        Examined { clean, mut session }: Examined,
    ) -> Result<(Image, Option<SessionFile>)> {
        let image = match (&mut session, clean) {
            (Some((session, memory, carried)), _) => {
                let resumed = Image::resume(disk, memory.clone(), *carried, Uuid::new_v4).await;
                if resumed.is_err() && memory.session() == Session::Poisoned && memory.used_page_cache() {
                    self.sessions.spread_doubt(&session::place_of(disk.file())?)?;
                }
                let resumed = resumed.map_err(|error| session.explain(error))?;
                session.publish()?;
                resumed
            }
            (None, Some(image)) => image,
            (None, None) => Image::open(disk, Mode::Writable, Uuid::new_v4).await?,
        };
        if let FoundLog::Dirty(entries) = image.found_log {
            tracing::info!("the image was not closed cleanly: replayed {entries} log entries");
        }
        if choose_payload_io(disk.file(), &image.metadata)? && session.is_some() {
            image.map.memory().note_page_cache();
        }
        tell_of_copying(disk.file());
        Ok((image, session.map(|(session, ..)| session)))
    }

    /// Has `image` name its `parent` by where that was found, if it leads elsewhere by itself. Not while a session
    /// goes on, whose file the image has to stay.
    async fn renew_paths(&self, disk: &UringDisk, image: Image, parent: Option<&ReadLayer>) -> Result<Image> {
        let (Some(parent), Some(locator)) = (parent, &image.metadata.parent_locator) else {
            return Ok(image);
        };
        let (child, parent) = (disk.file().path(), parent.file.path());
        let stays = |error: &Error| {
            tracing::warn!("{}: it goes on naming another place for its parent: {error:#}", child.display());
        };
        let renewed = match chain::redirected(child, locator, parent, &self.parents.search) {
            Ok(Some(renewed)) => renewed,
            Ok(None) => return Ok(image),
            Err(error) => {
                stays(&error);
                return Ok(image);
            }
        };
        let metadata = Metadata { parent_locator: Some(renewed), ..image.metadata.clone() };
        match image.amend(disk, &metadata, Uuid::new_v4).await {
            // The locator is as it was.
            Err(error) if matches!(error.kind(), Kind::Unsupported | Kind::NoSpace) => {
                stays(&error);
                Image::open(disk, Mode::Writable, Uuid::new_v4).await
            }
            amended => amended,
        }
    }

    /// Reads what is left to be read of an image without a session, and starts one if that is planned.
    pub(super) async fn begin(
        &self,
        disk: &UringDisk,
        place: &Place,
        image: &mut Image,
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

    /// What the host's file system lost before the device was there is not the device's: it is asked now, so
    /// that it does not answer with that later.
    async fn forget_losses(&self, disk: &UringDisk, place: &Place) -> Result<()> {
        let Err(error) = disk.sync_host().await else { return Ok(()) };
        let path = disk.file().path().display();
        tracing::warn!("{path}: its file system has lost data of some file before: {error}");
        self.sessions.spread_doubt(place)
    }

    fn start_session(&self, image: &mut Image, place: &Place) -> Result<SessionFile> {
        let geometry = *image.map.geometry();
        let (mut session, memory) = self.sessions.create(place, image.metadata.disk_id, &geometry)?;
        image
            .start_session(memory, &image.owner(place.clone()))
            .map_err(|error| Error::io("reserving room for the sector bitmaps", error))?;
        session.publish()?;
        let most = SessionMemory::most_bytes(&geometry);
        if most > (SessionMemory::reserved_words(&geometry) * size_of::<u64>()) as u64 {
            tracing::info!("its session may take up to {most} bytes of memory under {RUN_DIRECTORY}");
        }
        Ok(session)
    }
}

/// The disk as the kernel shall see it, whose data comes from `file` and from `parents`.
pub(super) fn parameters(
    file: &ImageFile,
    metadata: &Metadata,
    read_only: bool,
    parents: &[ReadLayer],
) -> Result<Parameters> {
    let files = std::iter::once(file).chain(parents.iter().map(|parent| parent.file.as_ref()));
    let alignments = files.map(|file| file.memory_alignment(metadata.logical_sector_size));
    Ok(Parameters {
        size_bytes: metadata.virtual_size,
        logical_sector_bytes: metadata.logical_sector_size,
        physical_sector_bytes: metadata.physical_sector_size,
        read_only,
        memory_alignment_bytes: alignments.collect::<Result<Vec<_>>>()?.into_iter().max().unwrap_or(1),
    })
}

/// Says so where reserved room is not enough for what is written later.
fn tell_of_copying(file: &ImageFile) {
    match file.host_that_copies() {
        Ok(Some(host)) => tracing::info!(
            "{}: {host} needs room for overwrites, too: a write or flush fails while there is none, and works again \
             when there is some",
            file.path().display()
        ),
        Ok(None) => {}
        Err(error) => tracing::warn!("{}: looking at the host: {error:#}", file.path().display()),
    }
}
