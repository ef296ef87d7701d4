//! Which session is taken over, and what happens to one that cannot be.
//!
//! A session that no program can ever use again (of an earlier start of the kernel, of an image that another
//! program has written since, or poisoned) is given up with a warning. One that this program cannot read
//! (damaged or of another version) may hold everything that was acknowledged: it is refused and kept, until
//! the user discards it.
//!
//! One that was made under another device number is taken over if it fits, as after a new mount of its file
//! system. If it does not fit, it may belong to another image on another file system, and stays.

use std::time::Duration;

use uuid::Uuid;

use super::file::{Found, FoundSession, SessionFile, Sessions};
use super::obstacle::Obstacle;
use super::origin::place_of;
use crate::device::errands::Errands;
use crate::device::registry::Listed;
use crate::disk::{HostFile, ImageFile};
use crate::error::{Error, Kind, Locate, Result};
use crate::image::{Image, Mismatch, Place, Session, SessionMemory};
use crate::machine;
use crate::printable::shell;

/// How long a process may hold a session whose image it has not locked, and how often to look.
const HOLDER_PATIENCE: Duration = Duration::from_secs(2);
const HOLDER_INTERVAL: Duration = Duration::from_millis(5);

/// What an opening for writing does about sessions.
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
    /// Continues to serve where a daemon was killed.
    Resume {
        /// Without the session, or with one that does not fit, starts anew: acknowledged data that was not
        /// flushed may be lost.
        accept_loss: bool,
    },
}

/// Refuses the image in `file`, which is locked, if a killed daemon left a session of it: that must be taken
/// over first. A session that does not fit `image`, as it was opened, does not count; one at rest holds
/// nothing that the image does not, and is removed.
///
/// # Errors
///
/// [`Kind::InUse`] if there is one, or one that cannot be read; the host's.
pub fn refuse_orphan(file: &ImageFile, image: Option<&Image>) -> Result<()> {
    refuse_orphan_among(&Sessions::of_machine(), file, image)
}

pub(super) fn refuse_orphan_among(
    sessions: &Sessions,
    file: &ImageFile,
    image: Option<&Image>,
) -> Result<()> {
    let (place, path) = (place_of(file)?, file.path());
    let may_have_more = |memory: &SessionMemory| memory.session() != Session::Idle;
    let (session, memory) = match find_left(sessions, image, &place, may_have_more)? {
        Some(Found::Free(session, memory)) => (session, memory),
        Some(Found::Short(session)) => return Err(unreadable(&session, Mismatch::Damaged("length"))),
        Some(Found::Held(Some(memory))) if is_at(&memory, &place) && may_have_more(&memory) => {
            return Err(held(&place));
        }
        // The process that holds it has another image, or no longer writes this one.
        Some(Found::Held(_)) | None => return Ok(()),
    };
    match memory.check_layout() {
        Err(Mismatch::Incomplete) => return session.remove_own(&place),
        Err(mismatch) => return Err(unreadable(&session, mismatch)).file(path),
        Ok(()) if memory.session() == Session::Idle => return session.remove_own(&place),
        Ok(()) => {}
    }
    match image.and_then(|_| Obstacle::of(&memory, image, &place)) {
        Some(Obstacle::Unfit(mismatch @ Mismatch::Damaged(_))) => {
            return Err(unreadable(&session, mismatch)).file(path);
        }
        Some(_) => return Ok(()),
        None => {}
    }
    let message = "a daemon was killed, and not everything that it acknowledged is in the image";
    let remedy = format!("`vhdx-ublk add {}` takes it over, `vhdx-ublk del` then closes it", shell(path));
    Err(Error::new(Kind::InUse, message).file(path).remedy(remedy))
}

/// The session of the image at `place`, which this process has locked. One that another process holds is
/// waited for if that is worth while: a process that was killed lets go of the image and of the session one
/// after the other, and others look at sessions.
fn find_left(
    sessions: &Sessions,
    image: Option<&Image>,
    place: &Place,
    is_worth_while: impl Fn(&SessionMemory) -> bool,
) -> Result<Option<Found>> {
    let until = machine::now() + HOLDER_PATIENCE;
    loop {
        match sessions.find(place, image)? {
            Some(Found::Held(Some(memory)))
                if is_at(&memory, place) && is_worth_while(&memory) && machine::now() < until =>
            {
                machine::pause(HOLDER_INTERVAL);
            }
            found => return Ok(found),
        }
    }
}

/// Whether the session is of the image at `place`, and not of a copy of its file system.
fn is_at(memory: &SessionMemory, place: &Place) -> bool {
    memory.check_layout().is_ok() && memory.place().device == place.device
}

fn unreadable(session: &SessionFile, mismatch: Mismatch) -> Error {
    let message = format!(
        "the image has a session of a killed daemon that cannot be read: {}",
        Obstacle::Unfit(mismatch)
    );
    session.with_remedy(Error::new(Kind::InUse, message))
}

/// The session to take over, of the image at `place`, which is not open for writing yet; `image` is the image
/// as it was read, if it could be.
pub(in crate::device) fn choose(
    (plan, errands): (Plan, &Errands),
    sessions: &Sessions,
    image: Option<&Image>,
    place: &Place,
) -> Result<Option<FoundSession>> {
    let disk_id: Option<Uuid> = image.map(|image| image.metadata.disk_id);
    let (session, obstacle) = match find_left(sessions, image, place, |_| true)? {
        None => (None, Obstacle::Missing),
        Some(Found::Held(_)) => return Err(held(place)),
        Some(Found::Short(session)) => (Some(session), Obstacle::Unfit(Mismatch::Damaged("length"))),
        Some(Found::Free(session, memory)) => match Obstacle::of(&memory, image, place) {
            None => {
                refuse_waiting((plan, errands), sessions, &session, place)?;
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

/// Refuses a session of a device that waits for its next daemon. Such a device is known by the image's device
/// number, which a new mount of its file system has changed.
fn refuse_waiting(
    (plan, errands): (Plan, &Errands),
    sessions: &Sessions,
    session: &SessionFile,
    place: &Place,
) -> Result<()> {
    let Some(name) = session.name().filter(|name| name.device != place.device) else { return Ok(()) };
    let was = HostFile { device: name.device, inode: name.inode };
    let waits = |listed: &Listed| listed.entry.image_file == was && listed.may_be_abandoned();
    if !matches!(plan, Plan::Fresh { .. }) {
        return Ok(());
    }
    let registry = sessions.registry()?;
    let Some(listed) = errands.run(move || registry.list())?.into_iter().find(waits) else {
        return Ok(());
    };
    let device = listed.entry.device.display();
    let message = format!("the image belongs to {device}, whose daemon was killed");
    let remedy = format!("`vhdx-ublk recover {device}` serves it again, `vhdx-ublk del {device}` removes it");
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
            return Err(error.remedy("flushed data is in the image: `vhdx-ublk check` examines it"));
        }
        (Plan::Fresh { .. }, Some(session)) if session.is_elsewhere(place) => {}
        (Plan::Fresh { .. }, _) => {
            tracing::warn!("a session of this image is given up, flushed data is safe: {obstacle}");
        }
    }
    session.map_or(Ok(()), |session| session.remove_own(place))
}

/// This process holds the image's lock, so the session belongs to another file: to a copy of its file system.
fn held(place: &Place) -> Error {
    let message = "a running daemon has a session of an image with the same disk id, inode and device number";
    Error::new(Kind::InUse, message).file(&place.path).remedy("`vhdx-ublk session list` shows it")
}
