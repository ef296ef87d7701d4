//! Session files: memory in `/run/vhdx-ublk/` that outlives a killed daemon.
//!
//! One per image that is served for writing with recovery; its name is the image's identity, so whoever opens
//! the image for writing finds it. It is made when the image is opened and goes away when the image was closed
//! cleanly. One whose device is gone is an *orphan*: the next writable open takes it over.
//!
//! Room is reserved before it is touched, for the block map at the start: a store into memory that the file system
//! cannot provide would kill the daemon.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use nix::fcntl::{FallocateFlags, fallocate};

use super::registry::{FILE_MODE, FileId, RUN_DIRECTORY, Registry};
use super::sys;
use crate::disk::{ImageFile, PAGE_BYTES};
use crate::error::{Error, Kind, Result};
use crate::format::bat::Geometry;
use crate::image::{Image, Mismatch, Session, SessionMemory};

/// What a writable open does about sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Takes over an orphan. Without one, starts a session if `keep`.
    Fresh {
        /// The device shall be recoverable.
        keep: bool,
    },
    /// Goes on where a daemon was killed.
    Resume {
        /// Without the session, or with one that does not fit, starts anew: what was acknowledged and not
        /// flushed may be lost.
        accept_loss: bool,
    },
}

/// Where session files are.
#[derive(Clone, Debug)]
pub(super) struct Sessions {
    directory: PathBuf,
}

/// A session file.
#[derive(Debug)]
pub(super) struct SessionFile {
    path: PathBuf,
    /// By this process, which may give it up; not by one that was killed.
    made_here: bool,
}

/// A session file with its memory.
pub(super) type FoundSession = (SessionFile, SessionMemory);

impl Sessions {
    /// The machine's.
    pub(super) fn of_machine() -> Self {
        Self { directory: RUN_DIRECTORY.into() }
    }

    #[cfg(test)]
    pub(super) fn at(directory: &std::path::Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    fn path(&self, image: FileId) -> PathBuf {
        self.directory.join(format!("{:x}-{:x}.session", image.device, image.inode))
    }

    /// The session file of the image `image`, if there is one, and its memory. Who may not look sees none.
    pub(super) fn find(&self, image: FileId) -> Result<Option<FoundSession>> {
        let found = SessionFile { path: self.path(image), made_here: false };
        let file = match OpenOptions::new().read(true).write(true).open(&found.path) {
            Ok(file) => file,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => {
                return Ok(None);
            }
            Err(error) => return Err(Error::io("opening the session file", error).file(&found.path)),
        };
        let mapped = file.metadata().and_then(|metadata| {
            let count = usize::try_from(metadata.len()).unwrap_or(0) / size_of::<AtomicU64>();
            (metadata.len() > PAGE_BYTES as u64).then(|| sys::shared_words(&file, count)).transpose()
        });
        match mapped {
            Ok(Some(words)) => Ok(Some((found, memory(words, file)))),
            // Its maker has not made room yet, or was killed before it had.
            Ok(None) => Ok(None),
            Err(error) => Err(Error::io("mapping the session file", error).file(&found.path)),
        }
    }

    /// Makes a session file for a map of `geometry`, with all the room it needs.
    pub(super) fn create(&self, image: FileId, geometry: &Geometry) -> Result<FoundSession> {
        Registry::at(&self.directory)?;
        let made = SessionFile { path: self.path(image), made_here: true };
        // Whatever is there is of no use to anybody: its maker, which had the lock, was killed before it was done.
        made.unlink()?;
        let (reserved, count) = (SessionMemory::reserved_words(geometry), SessionMemory::words_for(geometry));
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).mode(FILE_MODE).open(&made.path);
        let file = file.map_err(|error| Error::io("making the session file", error).file(&made.path))?;
        let length = (count * size_of::<AtomicU64>()) as u64;
        let mapped = file
            .set_len(length)
            .and_then(|()| reserve(&file, 0..reserved))
            .and_then(|()| sys::shared_words(&file, count));
        match mapped {
            Ok(words) => Ok((made, memory(words, file))),
            Err(error) => {
                let error = Error::io("reserving room for the session", error).file(&made.path);
                made.remove()?;
                Err(error)
            }
        }
    }
}

impl SessionFile {
    /// Removes it: the image needs it no more.
    pub(super) fn remove(self) -> Result<()> {
        self.unlink()
    }

    /// Removes it if this process made it and has not used it.
    pub(super) fn abandon(self) -> Result<()> {
        if self.made_here { self.unlink() } else { Ok(()) }
    }

    fn unlink(&self) -> Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::io("removing the session file", error).file(&self.path))
            }
            _ => Ok(()),
        }
    }

    /// What is wrong with going on with it, and the way out.
    pub(super) fn explain(&self, error: Error) -> Error {
        error.remedy(format!(
            "rm {} gives up what was acknowledged and not flushed; what was flushed is safe in the image",
            self.path.display()
        ))
    }
}

/// Refuses the image in `file`, which is locked, if a killed daemon left a session of it: that has to be taken over
/// first. A session that does not fit `image`, as it was opened, does not count; one at rest has nothing that the
/// image has not, and is removed.
///
/// # Errors
///
/// [`Kind::InUse`] if there is one; what the host says.
pub fn refuse_orphan(file: &ImageFile, image: Option<&Image>) -> Result<()> {
    let id = FileId::of_image(file)?;
    let Some((session, memory)) = Sessions::of_machine().find(id)? else { return Ok(()) };
    if memory.session() == Session::Idle {
        return session.remove();
    }
    if image.is_some() && obstacle(&memory, image, id).is_some() {
        return Ok(());
    }
    let message = "a daemon was killed, and not everything it acknowledged is in the image";
    let path = file.path();
    let remedy = format!("`vhdx-ublk add {}` takes it over, `vhdx-ublk del` then closes it", path.display());
    Err(Error::new(Kind::InUse, message).file(path).remedy(remedy))
}

fn memory(words: &'static [AtomicU64], file: File) -> SessionMemory {
    SessionMemory::shared(words, Arc::new(move |range| reserve(&file, range)))
}

/// Makes room for a range of words.
fn reserve(file: &File, words: Range<usize>) -> io::Result<()> {
    let bytes = |words: usize| i64::try_from(words * size_of::<AtomicU64>()).expect("17 GiB at most");
    Ok(fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, bytes(words.start), bytes(words.len()))?)
}

/// The session to go on with, of those that were `found`, for an image that is not open for writing yet;
/// `image` is how it looks. A session that cannot be gone on with is removed, or the reason for refusing.
pub(super) fn choose(
    plan: Plan,
    found: Option<FoundSession>,
    image: Option<&Image>,
    file: FileId,
) -> Result<Option<FoundSession>> {
    let obstacle = match &found {
        None => Some(Obstacle::Missing),
        Some((_, memory)) => obstacle(memory, image, file),
    };
    let Some(obstacle) = obstacle else { return Ok(found) };
    match plan {
        Plan::Resume { accept_loss: false } => return Err(obstacle.error()),
        Plan::Resume { accept_loss: true } => tracing::warn!("starting without the session: {obstacle}"),
        Plan::Fresh { .. } => match obstacle {
            Obstacle::Missing | Obstacle::Unfit(Mismatch::Incomplete | Mismatch::Foreign) => {}
            _ => tracing::warn!("a session of this image is given up, what was flushed is safe: {obstacle}"),
        },
    }
    found.map_or(Ok(()), |(file, _)| file.remove()).map(|()| None)
}

fn obstacle(memory: &SessionMemory, image: Option<&Image>, file: FileId) -> Option<Obstacle> {
    // A log that only a replay in place can read is none of ours, so somebody else has written the image.
    let Some(image) = image else { return Some(Obstacle::Unfit(Mismatch::Changed)) };
    if !memory.fits(image.map.geometry()) {
        return Some(Obstacle::Unfit(Mismatch::Incomplete));
    }
    let owner = image.owner(file.device, file.inode);
    match memory.check(&owner, image.header.header.file_write_guid) {
        Err(mismatch) => Some(Obstacle::Unfit(mismatch)),
        Ok(()) if memory.session() == Session::Poisoned => Some(Obstacle::Poisoned),
        Ok(()) => None,
    }
}

/// Why a session cannot be gone on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Obstacle {
    Missing,
    Unfit(Mismatch),
    Poisoned,
}

impl Obstacle {
    fn error(self) -> Error {
        let kind = if self == Self::Poisoned { Kind::Poisoned } else { Kind::NotFound };
        Error::new(kind, self.to_string()).in_structure("session").remedy(
            "`vhdx-ublk del` takes the device away; `vhdx-ublk recover --accept-loss` goes on with what the image holds, which is what was flushed: a mounted file system may be damaged by that",
        )
    }
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Missing => "there is no session file of this image",
            Self::Unfit(Mismatch::Incomplete) => "the session file was never completed",
            Self::Unfit(Mismatch::Foreign) => "the session file is another image's",
            Self::Unfit(Mismatch::Changed) => {
                "somebody else has written the image since the daemon was killed"
            }
            Self::Poisoned => "writing to the image failed before the daemon was killed",
        })
    }
}
