//! Closing the image of a device that is gone.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::device::engine_thread::EngineThread;
use crate::device::layers::Parents;
use crate::device::registry::{Entry, Listed, Registry};
use crate::device::session::{Found, Plan, Sessions};
use crate::device::spec::EngineHandle;
use crate::disk::{Access, HostFile, ImageFile};
use crate::error::{Error, Kind, Result};
use crate::image::Session;
use crate::printable::shell;

/// How long the I/O of a daemon that was killed may take to end, which releases its lock.
const LOCK_DEADLINE: Duration = Duration::from_secs(30);

/// What was done with the image of a device that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closed {
    /// It was closed, with everything that was acknowledged.
    Now,
    /// There was nothing to close.
    Untouched,
}

/// Closes the image of a device that is gone and whose daemon did not close it: commits what was acknowledged
/// and is in the session only.
pub(super) fn close_image(registry: &Registry, entry: &Entry) -> Result<Closed> {
    if entry.read_only {
        return Ok(Closed::Untouched);
    }
    let HostFile { device, inode } = entry.image_file;
    let found = Sessions::of_machine().of_file(device, inode)?;
    // Without the session a device does not serve the image: one that has failed keeps its entry, too. This
    // device is gone: a process that was about to take it over holds the session only until it notices.
    let is_held = matches!(found, Some(Found::Held(_)));
    let has_it = |listed: &Listed| {
        listed.entry.mark != entry.mark
            && listed.entry.image_file == entry.image_file
            && (is_held || listed.may_be_abandoned())
    };
    if found.is_none() || registry.list()?.iter().any(has_it) {
        return Ok(Closed::Untouched);
    }
    // If it is held, the last I/O of the killed daemon has not ended. Locking the image waits for that, too.
    // One that is free is given back here.
    if let Some(Found::Free(session, memory)) = found
        && memory.check_layout().is_ok()
        && memory.session() == Session::Poisoned
    {
        session.remove()?;
        return Err(unclean(entry, "writing to it had failed"));
    }
    let file = ImageFile::open(&entry.image, Access::ReadWrite, LOCK_DEADLINE);
    let closed = file.and_then(|file| {
        // A new mount of its file system may have changed the device's number; the session identifies the
        // image.
        if file.identity().inode != entry.image_file.inode {
            return Err(Error::new(Kind::NotFound, "another file has its path").file(&entry.image));
        }
        let parents =
            Parents::of_device(entry, |path| ImageFile::open(path, Access::ReadOnly, LOCK_DEADLINE));
        EngineThread::open(Arc::new(file), Plan::Close, parents)?.close()
    });
    closed.map(|()| Closed::Now).map_err(|error| entry.explain(error)).map_err(|error| {
        let message = format!(
            "{} is gone, but not everything that was acknowledged is in its image yet: {error:#}",
            entry.device.display()
        );
        Error::new(Kind::Io, message).remedy(remedy_for(&error, &entry.image))
    })
}

/// What to do about an image that could not be closed. One that was damaged under its device cannot be added
/// either, so that remedy would send the user in a circle.
fn remedy_for(error: &Error, image: &Path) -> String {
    let image = shell(image);
    match error.kind() {
        // That error names the session.
        _ if error.structure() == Some("session") && error.remedy_text().is_some() => {
            error.remedy_text().unwrap_or_default().to_owned()
        }
        Kind::Truncated | Kind::Corrupt | Kind::NotVhdx | Kind::Mismatch => format!(
            "the file was changed or cut while it was served: `vhdx-ublk check {image}` shows the damage, \
             `vhdx-ublk salvage {image} COPY` copies what is left of it"
        ),
        Kind::NotFound => format!(
            "{}; then `vhdx-ublk add {image}` and `vhdx-ublk del {image}`",
            error.remedy_text().unwrap_or("put the image back at its path")
        ),
        _ => format!("remove the cause, then `vhdx-ublk add {image}` and `vhdx-ublk del {image}`"),
    }
}

pub(super) fn unclean(entry: &Entry, failure: &str) -> Error {
    let message =
        format!("{} is gone, but its image could not be closed cleanly: {failure}", entry.device.display());
    Error::new(Kind::Poisoned, message).file(&entry.image).remedy(format!(
        "look for the cause (dmesg, free space), then `vhdx-ublk add {}`",
        shell(&entry.image)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_does_not_send_the_user_in_a_circle() {
        let image = Path::new("/a.vhdx");
        let cut = remedy_for(&Error::new(Kind::Truncated, "cut"), image);
        assert!(cut.contains("vhdx-ublk salvage /a.vhdx") && !cut.contains(" add "), "{cut}");
        let full = remedy_for(&Error::new(Kind::NoSpace, "full"), image);
        assert!(full.contains("vhdx-ublk add /a.vhdx"), "{full}");
    }
}
