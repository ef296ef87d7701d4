//! An image opened to be served: what the fronts share, and the disk as the kernel shall see it.
//!
//! Order: the whole image is read and checked, its log replayed in memory; then the driver is asked for; only
//! then is a dirty log replayed in place. So an image that cannot be served, and one that nobody could serve,
//! stay as they are, byte for byte.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;

use uuid::Uuid;

use super::control::Control;
use super::daemon::{EngineHandle, Served};
use super::mailbox::EngineEnds;
use super::options::Parameters;
use super::registry::FileId;
use super::session::{self, Plan, SessionFile, Sessions};
use crate::disk::{ImageFile, PayloadIo, Reactor, UringDisk};
use crate::engine::shared::Shared;
use crate::error::{Error, Kind, Result};
use crate::format::metadata::{DiskType, Metadata};
use crate::image::{FoundLog, Image, Mode, SessionMemory};

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
}

impl Opened {
    /// Opens the image in `file` for reading. Nothing is written, not even its log.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the image; [`Kind::Unsupported`] if it has a parent; [`Kind::InUse`] if a
    /// killed daemon left a session of it; those of [`Control::open`].
    pub fn read_only(file: &Arc<ImageFile>) -> Result<Self> {
        let reactor = Reactor::new()?;
        let disk = reactor.disk(file.clone());
        let image = reactor.block_on(look(&disk)).map_err(|error| error.file(file.path()))?;
        session::refuse_orphan(file, Some(&image))?;
        Control::open()?;
        choose_payload_io(file, &image.metadata)?;
        let fixed = image.metadata.kind() == DiskType::Fixed;
        let parameters = parameters(file, &image.metadata, true)?;
        let file_write_guid = image.header.header.file_write_guid;
        let shared = Arc::new(Shared::new(image.map, true, fixed));
        Ok(Self { shared, parameters, file_write_guid, recoverable: true })
    }

    /// What [`super::daemon::serve`] asks for.
    ///
    /// # Errors
    ///
    /// When the process has no file descriptor left.
    pub fn served(&self, file: &ImageFile) -> Result<Served> {
        let image_file = FileId::of_image(file)?;
        // Another descriptor of the same open file description: lock and flags are shared.
        let same = file.as_fd().try_clone_to_owned();
        let same =
            same.map_err(|error| Error::io("duplicating the image's descriptor", error).file(file.path()))?;
        Ok(Served {
            path: file.path().to_owned(),
            image: Arc::new(File::from(same)),
            image_file,
            shared: self.shared.clone(),
            parameters: self.parameters,
            file_write_guid: self.file_write_guid,
            recoverable: self.recoverable,
        })
    }
}

/// Stands in for the engine of a read-only device, whose fronts never ask for anything. Keeps its ends of the
/// mailboxes.
pub struct NoEngine(pub EngineEnds);

impl EngineHandle for NoEngine {
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
}

/// What was found before anything is written.
struct Examined {
    /// The image, if it can be used as it is.
    clean: Option<Image>,
    /// The session to go on with, and the FileWriteGuid that the file carries.
    session: Option<(SessionFile, SessionMemory, Uuid)>,
}

impl WritableOpen {
    /// Opens the image on `disk`, which carries its lock: every write of a dead holder has ended.
    pub(super) async fn open(&self, disk: &UringDisk) -> Result<(Image, Option<SessionFile>)> {
        let named = |error: Error| error.file(disk.file().path());
        let file = FileId::of_image(disk.file())?;
        let examined = self.examine(disk, file).await.map_err(named)?;
        (self.may_write)()?;
        self.take(disk, file, examined).await.map_err(named)
    }

    /// Looks at the image, and chooses the session to go on with. Nothing is written.
    async fn examine(&self, disk: &UringDisk, file: FileId) -> Result<Examined> {
        let image = match look(disk).await {
            Ok(image) => {
                image.check_writable()?;
                Some(image)
            }
            // A log that cannot be replayed in memory can still be replayed in place.
            Err(error) if error.kind() == Kind::Unsupported && error.structure() == Some("log") => None,
            Err(error) => return Err(error),
        };
        let session = session::choose(self.plan, self.sessions.find(file)?, image.as_ref(), file)?;
        let carried = image.as_ref().map(|image| image.header.header.file_write_guid);
        let session = session.zip(carried).map(|((file, memory), carried)| (file, memory, carried));
        Ok(Examined { clean: image.filter(|image| image.found_log == FoundLog::Clean), session })
    }

    async fn take(
        &self,
        disk: &UringDisk,
        file: FileId,
        Examined { clean, session }: Examined,
    ) -> Result<(Image, Option<SessionFile>)> {
        let mut image = match (&session, clean) {
            (Some((session, memory, carried)), _) => {
                let resumed = Image::resume(disk, memory.clone(), *carried, Uuid::new_v4).await;
                resumed.map_err(|error| session.explain(error))?
            }
            (None, Some(image)) => image,
            (None, None) => Image::open(disk, Mode::Writable, Uuid::new_v4).await?,
        };
        if let FoundLog::Dirty(entries) = image.found_log {
            tracing::info!("the image was not closed cleanly: replayed {entries} log entries");
        }
        refuse_chain(&image)?;
        choose_payload_io(disk.file(), &image.metadata)?;
        let session = session.map(|(session, ..)| session).or_else(|| self.start_session(&mut image, file));
        Ok((image, session))
    }

    fn start_session(&self, image: &mut Image, file: FileId) -> Option<SessionFile> {
        if self.plan == (Plan::Fresh { keep: false }) {
            return None;
        }
        match self.sessions.create(file, image.map.geometry()) {
            Ok((session, memory)) => {
                let owner = image.owner(file.device, file.inode);
                image.start_session(memory, &owner);
                Some(session)
            }
            Err(error) => {
                tracing::warn!("the device cannot be recovered if its daemon is killed: {error}");
                None
            }
        }
    }
}

pub(super) fn parameters(file: &ImageFile, metadata: &Metadata, read_only: bool) -> Result<Parameters> {
    Ok(Parameters {
        size_bytes: metadata.virtual_size,
        logical_sector_bytes: metadata.logical_sector_size,
        physical_sector_bytes: metadata.physical_sector_size,
        read_only,
        memory_alignment_bytes: file.memory_alignment(metadata.logical_sector_size)?,
    })
}

async fn look(disk: &UringDisk) -> Result<Image> {
    let image = Image::open(disk, Mode::ReadOnly, Uuid::new_v4).await?;
    refuse_chain(&image)?;
    if image.metadata.virtual_size == 0 {
        return Err(Error::new(Kind::Unsupported, "the disk has no bytes, and the kernel no such devices")
            .in_structure("metadata"));
    }
    Ok(image)
}

fn refuse_chain(image: &Image) -> Result<()> {
    if !image.metadata.has_parent {
        return Ok(());
    }
    Err(Error::new(Kind::Unsupported, "the image is a differencing one, and chains are not supported yet")
        .in_structure("metadata")
        .remedy("merge it into its parent where it was made (Merge-VHD); `vhdx-ublk info` shows the parent"))
}

/// Takes direct I/O for the payload where the host has it, and says so where it has not.
fn choose_payload_io(file: &ImageFile, metadata: &Metadata) -> Result<()> {
    if let PayloadIo::Buffered { reason } = file.enable_direct(metadata.logical_sector_size)? {
        let path = file.path().display();
        tracing::warn!("{path}: no direct I/O, the disk's data goes through the host's page cache: {reason}");
    }
    Ok(())
}
