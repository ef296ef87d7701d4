//! The session files that are kept, for those who look after them.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;

use super::file::{Found, Sessions};
use super::name::Name;
use super::origin::boot_id;
use crate::device::registry::{Entry, Registry};
use crate::disk::{HostFile, host_bytes};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::image::{Mismatch, Session, SessionMemory};
use crate::machine;
use crate::simulation::{Plant, planted};

/// The state of a kept session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum KeptState {
    /// A daemon uses it.
    Live,
    /// It holds what was acknowledged and may not be in the image.
    Orphan,
    /// The image has everything.
    Idle,
    /// Writing failed: it cannot be taken over.
    Poisoned,
    /// It is from before the machine was started: it cannot be taken over.
    Outdated,
    /// It was never completed.
    Incomplete,
    /// This program does not know its layout.
    OtherVersion,
    /// It is damaged.
    Damaged,
}

/// A session file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Its name in its folder.
    pub name: String,
    /// Its state.
    pub state: KeptState,
    /// The image's path when the session was made, if it can be read.
    pub image: Option<PathBuf>,
    /// `st_dev` and inode of the image then.
    pub file: (u64, u64),
    /// The memory that it takes, bytes.
    pub memory_bytes: u64,
    /// The version of its layout, if it can be read.
    pub version: Option<u64>,
}

/// All session files of this machine.
///
/// # Errors
///
/// If one of them cannot be read.
pub fn kept() -> Result<Vec<Kept>> {
    let sessions = Sessions::of_machine();
    let names = sessions.names()?.into_iter();
    names.filter_map(|name| describe(&sessions, name).transpose()).collect()
}

/// Removes the sessions that killed processes have left, that no device needs, and that hold nothing which
/// their images do not.
///
/// # Errors
///
/// If the folder of `registry`, or a session in it, cannot be read or changed.
pub(in crate::device) fn sweep(registry: &Registry) -> Result<()> {
    let sessions = Sessions::of(registry);
    for name in sessions.names()? {
        // What is in use is not looked at: it may be as large as any session.
        if sessions.is_held(&name)? {
            continue;
        }
        let Some(Found::Free(session, memory)) = sessions.open(&name)? else { continue };
        // Not before the session is locked: whoever held it until then has written the entry of its device.
        if is_at_rest(&memory) && !may_have_device(registry, &name)? {
            session.remove()?;
        }
    }
    Ok(())
}

/// Whether the device of `entry`, which is gone, has left a session that may hold what its image does not.
/// One that is in use is that of another device, if the image was added again.
pub(in crate::device) fn is_needed(registry: &Registry, entry: &Entry) -> Result<bool> {
    let HostFile { device, inode } = entry.image_file;
    Ok(match Sessions::of(registry).of_file(device, inode)? {
        None => false,
        _ if planted(Plant::TrustGone) => false,
        Some(Found::Free(_, memory)) => !is_at_rest(&memory),
        Some(Found::Held(_)) => !is_added_again(registry, entry)?,
        Some(Found::Short(_)) => true,
    })
}

/// Whether another entry has the image of `entry`.
fn is_added_again(registry: &Registry, entry: &Entry) -> Result<bool> {
    let has_it = |other: &Entry| other.id != entry.id && other.image_file == entry.image_file;
    Ok(registry.entries()?.0.iter().any(has_it))
}

/// Whether the image has everything that was acknowledged with the session.
fn is_at_rest(memory: &SessionMemory) -> bool {
    match memory.check_layout() {
        Ok(()) => memory.session() == Session::Idle,
        Err(mismatch) => mismatch == Mismatch::Incomplete,
    }
}

/// Whether a device may need the session to be recovered. Another mount may have changed the number of the
/// image's file system.
fn may_have_device(registry: &Registry, name: &Name) -> Result<bool> {
    let (entries, unreadable) = registry.entries()?;
    Ok(!unreadable.is_empty() || entries.iter().any(|entry| entry.image_file.inode == name.inode))
}

/// Removes the session file `name`, whatever it holds.
///
/// # Errors
///
/// [`Kind::NotFound`] if there is none; if it cannot be removed.
pub fn discard(name: &str) -> Result<()> {
    let sessions = Sessions::of_machine();
    let known = Name::parse(name).filter(|name| sessions.names().is_ok_and(|names| names.contains(name)));
    let Some(known) = known else {
        return Err(Error::new(Kind::NotFound, format!("there is no session {name}"))
            .remedy("vhdx-ublk session list"));
    };
    if let Some(Found::Free(session, _) | Found::Short(session)) = sessions.open(&known)? {
        return session.remove();
    }
    let path = sessions.path_of(&known);
    fs::remove_file(&path).doing("removing the session file").file(&path)
}

/// Waits until no process uses the session of the image `file`: one that has ended lets go of it a moment
/// later.
///
/// # Errors
///
/// [`Kind::InUse`] if one still uses it after `patience`; if the session cannot be read.
pub(in crate::device) fn await_free(file: HostFile, patience: Duration) -> Result<()> {
    let (sessions, until) = (Sessions::of_machine(), machine::now() + patience);
    let is_its = |name: &Name| (name.device, name.inode) == (file.device, file.inode);
    let Some(name) = sessions.names()?.into_iter().find(is_its) else { return Ok(()) };
    while sessions.is_held(&name)? {
        if machine::now() >= until {
            return Err(Error::new(Kind::InUse, "another process uses the session of the image")
                .remedy("vhdx-ublk session list"));
        }
        machine::pause(Duration::from_millis(1));
    }
    Ok(())
}

fn describe(sessions: &Sessions, name: Name) -> Result<Option<Kept>> {
    let path = sessions.path_of(&name);
    let Ok(found) = fs::metadata(&path) else { return Ok(None) };
    let kept = Kept {
        name: name.to_string(),
        state: KeptState::Live,
        image: None,
        file: (name.device, name.inode),
        memory_bytes: host_bytes(&found),
        version: None,
    };
    Ok(match sessions.open(&name)? {
        None => None,
        Some(Found::Held(None)) => Some(kept),
        Some(Found::Held(Some(memory))) => Some(with_layout(kept, &memory)),
        Some(Found::Short(_)) => Some(Kept { state: KeptState::Damaged, ..kept }),
        Some(Found::Free(_, memory)) => {
            Some(Kept { state: state_of(&memory)?, ..with_layout(kept, &memory) })
        }
    })
}

fn with_layout(kept: Kept, memory: &SessionMemory) -> Kept {
    match memory.check_layout() {
        Ok(()) => {
            let path = Some(memory.place().path).filter(|path| !path.as_os_str().is_empty());
            Kept { image: path, version: Some(crate::image::VERSION), ..kept }
        }
        Err(Mismatch::Version(version)) => Kept { version: Some(version), ..kept },
        Err(_) => kept,
    }
}

fn state_of(memory: &SessionMemory) -> Result<KeptState> {
    Ok(match memory.check_layout() {
        Err(Mismatch::Incomplete) => KeptState::Incomplete,
        Err(Mismatch::Version(_)) => KeptState::OtherVersion,
        Err(_) => KeptState::Damaged,
        Ok(()) if memory.boot() != boot_id()? => KeptState::Outdated,
        Ok(()) => match memory.session() {
            Session::Idle => KeptState::Idle,
            Session::Open => KeptState::Orphan,
            Session::Poisoned => KeptState::Poisoned,
        },
    })
}
