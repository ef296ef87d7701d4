//! Which session is taken over, and what becomes of one that cannot be.
//!
//! One that no program can ever use again, of an earlier start of the kernel, of an image that another
//! program has written since, or poisoned, is given up with a word. One that this program cannot read,
//! damaged or of another version, may hold all that was acknowledged: it is refused and kept, until the user
//! discards it.
//!
//! One that was made under another device number is taken over if it fits, as after its file system was mounted
//! anew. If it does not, it may be another image's on another file system, and stays.

use uuid::Uuid;

use super::super::registry::{FileId, Listed, Registry};
use super::{Found, FoundSession, SessionFile, Sessions, place_of};
use crate::disk::ImageFile;
use crate::error::{Error, Kind, Result};
use crate::image::{Image, Mismatch, Place, Session, SessionMemory, VERSION};
use crate::printable::shell;

/// What a writable open does about sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Takes over an orphan. Without one, starts a session if `keep`.
    Fresh {
        /// The device is to be recoverable.
        keep: bool,
    },
    /// Takes over an orphan, to close the image. One that cannot be taken over is an error, even if nothing
    /// of it can be saved.
    Close,
    /// Serves on where a daemon was killed.
    Resume {
        /// Without the session, or with one that does not fit, starts anew: what was acknowledged and not
        /// flushed may be lost.
        accept_loss: bool,
    },
}

/// Refuses the image in `file`, which is locked, if a killed daemon left a session of it: that has to be
/// taken over first. A session that does not fit `image`, as it was opened, does not count; one at rest has
/// nothing that the image has not, and is removed.
///
/// # Errors
///
/// [`Kind::InUse`] if there is one, or one that cannot be read; what the host says.
pub fn refuse_orphan(file: &ImageFile, image: Option<&Image>) -> Result<()> {
    let place = place_of(file)?;
    let found = Sessions::of_machine().find(&place, image)?;
    let path = file.path();
    let (session, memory) = match found {
        Some(Found::Free(session, memory)) => (session, memory),
        Some(Found::Short(session)) => return Err(unreadable(&session, Mismatch::Damaged("length"))),
        // Whoever serves with it has the image, or does not write it any longer.
        Some(Found::Held(_)) | None => return Ok(()),
    };
    match memory.check_layout() {
        Err(Mismatch::Incomplete) => return session.remove_own(&place),
        Err(mismatch) => return Err(unreadable(&session, mismatch).file(path)),
        Ok(()) if memory.session() == Session::Idle => return session.remove_own(&place),
        Ok(()) => {}
    }
    match image.and_then(|_| obstacle(&memory, image, &place)) {
        Some(Obstacle::Unfit(mismatch @ Mismatch::Damaged(_))) => {
            return Err(unreadable(&session, mismatch).file(path));
        }
        Some(_) => return Ok(()),
        None => {}
    }
    let message = "a daemon was killed, and not everything it acknowledged is in the image";
    let remedy = format!("`vhdx-ublk add {}` takes it over, `vhdx-ublk del` then closes it", shell(path));
    Err(Error::new(Kind::InUse, message).file(path).remedy(remedy))
}

fn unreadable(session: &SessionFile, mismatch: Mismatch) -> Error {
    let message =
        format!("a killed daemon's session of the image cannot be read: {}", Obstacle::Unfit(mismatch));
    session.with_remedy(Error::new(Kind::InUse, message))
}

/// The session to take over, of the image at `place`, which is not open for writing yet; `image` is how it
/// looks.
pub(in crate::device) fn choose(
    plan: Plan,
    sessions: &Sessions,
    image: Option<&Image>,
    place: &Place,
) -> Result<Option<FoundSession>> {
    let disk_id: Option<Uuid> = image.map(|image| image.metadata.disk_id);
    let (session, obstacle) = match sessions.find(place, image)? {
        None => (None, Obstacle::Missing),
        Some(Found::Held(_)) => return Err(held(place)),
        Some(Found::Short(session)) => (Some(session), Obstacle::Unfit(Mismatch::Damaged("length"))),
        Some(Found::Free(session, memory)) => match obstacle(&memory, image, place) {
            None => {
                refuse_waiting(plan, sessions, &session, place)?;
                return Ok(Some((session, memory)));
            }
            Some(obstacle) => (Some(session), obstacle),
        },
    };
    give_up(plan, session, obstacle, place)?;
    if let (Some(disk_id), Plan::Fresh { .. }) = (disk_id, plan) {
        sessions.give_up_replaced(place, disk_id)?;
    }
    Ok(None)
}

/// A device that waits is known by the image's device number, which another mount of its file system has
/// changed.
fn refuse_waiting(plan: Plan, sessions: &Sessions, session: &SessionFile, place: &Place) -> Result<()> {
    let Some(name) = session.name().filter(|name| name.device != place.device) else { return Ok(()) };
    let was = FileId { device: name.device, inode: name.inode };
    let waits = |listed: &Listed| listed.entry.image_file == was && listed.may_be_abandoned();
    if !matches!(plan, Plan::Fresh { .. }) {
        return Ok(());
    }
    let Some(listed) = Registry::at(&sessions.directory)?.list()?.into_iter().find(waits) else {
        return Ok(());
    };
    let device = listed.entry.device.display();
    let message = format!("the image belongs to {device}, whose daemon was killed");
    let remedy =
        format!("`vhdx-ublk recover {device}` serves it again, `vhdx-ublk del {device}` takes it away");
    Err(Error::new(Kind::InUse, message).file(&place.path).remedy(remedy))
}

/// Removes a session that cannot be taken over, or says why it is refused.
fn give_up(plan: Plan, session: Option<SessionFile>, obstacle: Obstacle, place: &Place) -> Result<()> {
    match (plan, &session) {
        (Plan::Resume { accept_loss: false }, _) => return Err(obstacle.error()),
        (Plan::Resume { accept_loss: true }, _) => tracing::warn!("starting without the session: {obstacle}"),
        _ if obstacle.is_nothing() => {}
        (_, Some(session)) if obstacle.may_be_of_use() => return Err(session.with_remedy(obstacle.error())),
        (Plan::Close, _) => {
            session.map_or(Ok(()), |session| session.remove_own(place))?;
            let error = Error::new(obstacle.error().kind(), obstacle.to_string()).in_structure("session");
            return Err(error.remedy("what was flushed is in the image: `vhdx-ublk check` examines it"));
        }
        (Plan::Fresh { .. }, Some(session)) if session.is_elsewhere(place) => {}
        (Plan::Fresh { .. }, _) => {
            tracing::warn!("a session of this image is given up, what was flushed is safe: {obstacle}");
        }
    }
    session.map_or(Ok(()), |session| session.remove_own(place))
}

/// The image is locked by this process, so it is another file: one on a copy of its file system.
fn held(place: &Place) -> Error {
    let message = "a living daemon has a session of an image with the same disk id, inode and device number";
    Error::new(Kind::InUse, message).file(&place.path).remedy("`vhdx-ublk session list` shows it")
}

/// Whether the session can be taken over by the image at `place`.
pub(super) fn fits(memory: &SessionMemory, image: Option<&Image>, place: &Place) -> bool {
    obstacle(memory, image, place).is_none()
}

fn obstacle(memory: &SessionMemory, image: Option<&Image>, place: &Place) -> Option<Obstacle> {
    if let Err(mismatch) = memory.check_layout() {
        return Some(Obstacle::Unfit(mismatch));
    }
    // A log that only a replay in place can read is none of ours, so another program has written the image.
    let Some(image) = image else { return Some(Obstacle::Unfit(Mismatch::Changed)) };
    match memory.check(&image.owner(place.clone()), image.header.header.file_write_guid) {
        Err(mismatch) => Some(Obstacle::Unfit(mismatch)),
        Ok(()) if !memory.fits(image.map.geometry()) => Some(Obstacle::Unfit(Mismatch::Damaged("length"))),
        Ok(()) if memory.session() == Session::Poisoned => Some(Obstacle::Poisoned),
        Ok(()) => None,
    }
}

/// Why a session cannot be taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Obstacle {
    Missing,
    Unfit(Mismatch),
    Poisoned,
}

impl Obstacle {
    /// Nothing was ever acknowledged on the word of it.
    fn is_nothing(self) -> bool {
        matches!(self, Self::Missing | Self::Unfit(Mismatch::Incomplete))
    }

    /// Another program, or a person, may get out of it what this one cannot.
    fn may_be_of_use(self) -> bool {
        matches!(self, Self::Unfit(Mismatch::Version(_) | Mismatch::Damaged(_)))
    }

    fn error(self) -> Error {
        let kind = match self {
            Self::Poisoned => Kind::Poisoned,
            Self::Unfit(Mismatch::Version(_)) => Kind::Unsupported,
            Self::Unfit(Mismatch::Damaged(_)) => Kind::Corrupt,
            Self::Missing | Self::Unfit(_) => Kind::NotFound,
        };
        let error = Error::new(kind, self.to_string()).in_structure("session");
        if self.may_be_of_use() {
            return error;
        }
        error.remedy(
            "`vhdx-ublk del` takes the device away; `vhdx-ublk recover --accept-loss` serves what the image holds, which is what was flushed: a mounted file system may be damaged by that",
        )
    }
}

impl std::fmt::Display for Obstacle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing => f.write_str("there is no session file of this image"),
            Self::Unfit(Mismatch::Incomplete) => f.write_str("the session file was never completed"),
            Self::Unfit(Mismatch::Version(version)) => {
                let ours = env!("CARGO_PKG_VERSION");
                write!(
                    f,
                    "the session file has layout version {version}, and vhdx-ublk {ours} reads version {VERSION}: use the vhdx-ublk that made it"
                )
            }
            Self::Unfit(Mismatch::Damaged(part)) => {
                write!(f, "the session file is damaged: its {part} is wrong")
            }
            Self::Unfit(Mismatch::OtherBoot) => f.write_str(
                "the session file is from before the machine was started: only what was flushed is left",
            ),
            Self::Unfit(Mismatch::Foreign) => f.write_str("the session file is another image's"),
            Self::Unfit(Mismatch::Changed) => {
                f.write_str("another program has written the image since the daemon was killed")
            }
            Self::Poisoned => f.write_str("writing to the image failed before the daemon was killed"),
        }
    }
}
