//! Taking devices away, from another process than the one that serves them.
//!
//! A living daemon is asked to do it: only it can leave the image clean. A dead one's device is removed here, and
//! its image closed with what its session holds.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::control::{Control, POLL_INTERVAL};
use super::daemon::EngineHandle;
use super::engine_thread::EngineThread;
use super::layers::Parents;
use super::registry::{Entry, FileId, Listed, Registry, State, state_of};
use super::session::{Plan, Sessions};
use super::sys::ProcessHandle;
use super::usage;
use crate::disk::{Access, ImageFile};
use crate::error::{Error, Kind, Result};
use crate::image::Session;

/// How long a daemon may take: it writes back file systems and closes the image.
const DAEMON_DEADLINE: Duration = Duration::from_secs(60);

/// How long the I/O of a daemon that was killed may take to end, which ends its lock.
const LOCK_DEADLINE: Duration = Duration::from_secs(30);

/// How long the device node may stay after the device has gone.
const NODE_DEADLINE: Duration = Duration::from_secs(5);

/// Which device is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The N of `/dev/ublkbN`.
    Id(u32),
    /// The device that serves this image.
    Image(PathBuf),
}

impl Target {
    /// `3`, `/dev/ublkb3`, a link to it, or an image's path.
    pub fn parse(text: &OsStr) -> Self {
        let path = Path::new(text);
        let resolved = fs::canonicalize(path);
        let id = |path: &Path| path.to_str()?.strip_prefix("/dev/ublkb")?.parse().ok();
        let number = text.to_str().and_then(|text| text.parse().ok());
        let id = number.or_else(|| id(path)).or_else(|| id(resolved.as_deref().ok()?));
        match (id, resolved) {
            (Some(id), _) => Self::Id(id),
            (None, Ok(resolved)) => Self::Image(resolved),
            (None, Err(_)) => Self::Image(path.to_owned()),
        }
    }

    fn names(&self, entry: &Entry) -> bool {
        match self {
            Self::Id(id) => entry.id == *id,
            Self::Image(path) => match fs::metadata(path) {
                Ok(found) => FileId::of(&found) == entry.image_file,
                Err(_) => *path == entry.image,
            },
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Id(id) => write!(f, "/dev/ublkb{id}"),
            Self::Image(path) => write!(f, "{}", path.display()),
        }
    }
}

/// The device that `target` names.
///
/// # Errors
///
/// [`Kind::NotFound`] when it is none of ours; [`Kind::Usage`] when several serve the image, read-only.
pub fn find(registry: &Registry, target: &Target) -> Result<Listed> {
    let mut found = registry.list()?;
    found.retain(|listed| target.names(&listed.entry));
    if let [first, second, ..] = &found[..] {
        let (first, second) = (first.entry.device.display(), second.entry.device.display());
        let message = format!("{target} is served by several devices, {first} and {second} among them");
        return Err(Error::new(Kind::Usage, message).remedy("name the device instead of the image"));
    }
    found.pop().ok_or_else(|| {
        let message = match target {
            Target::Id(id) => format!("/dev/ublkb{id} is no device of this program"),
            Target::Image(path) => format!("no device serves {}", path.display()),
        };
        Error::new(Kind::NotFound, message).remedy("vhdx-ublk list")
    })
}

/// Takes the device of `entry` away, and waits until it is gone.
///
/// # Errors
///
/// [`Kind::InUse`] when somebody uses it, unless `force`; [`Kind::Poisoned`] when it is gone but its image
/// could not be closed cleanly; what went wrong otherwise.
pub fn stop(registry: &Registry, entry: &Entry, force: bool) -> Result<()> {
    let control = match Control::open() {
        Ok(control) => Some(control),
        Err(error) if error.kind() == Kind::NoDriver => None,
        Err(error) => return Err(error),
    };
    let state = state_of(control.as_ref(), entry)?;
    if matches!(state, Some(State::Live | State::Quiesced | State::FailIo)) && !force {
        refuse_if_used(entry)?;
    }
    if entry.daemon.is_alive() {
        ask_daemon(registry, entry)?;
    }
    // A daemon that has done all it should has removed its entry. One of a new device of this number is not
    // ours to touch.
    let last = registry.entry(entry.id)?.filter(|last| last.mark == entry.mark);
    let Some(last) = last else { return await_node_gone(entry) };
    if let Some(control) = &control {
        remove_remains(control, entry)?;
    }
    await_node_gone(entry)?;
    registry.remove(entry.id, entry.mark)?;
    // A snapshot may have changed the image since the entry was looked at.
    match (close_image(registry, &last)?, &last.failure) {
        (Closed::Untouched, Some(failure)) => Err(unclean(&last, failure)),
        _ => Ok(()),
    }
}

fn refuse_if_used(entry: &Entry) -> Result<()> {
    let users = usage::of_device(entry.id);
    if users.is_empty() {
        return Ok(());
    }
    let message = format!("{} is in use: {}", entry.device.display(), users.join(", "));
    Err(Error::new(Kind::InUse, message).remedy("end its use first, or take it away with --force"))
}

/// Asks the daemon to end and waits until it has.
fn ask_daemon(registry: &Registry, entry: &Entry) -> Result<()> {
    let pid = entry.daemon.pid;
    let asked = ProcessHandle::open(pid).and_then(|process| {
        // The handle is on whatever has the number now; only if that is the daemon, it is asked.
        if entry.daemon.is_alive() { process.terminate() } else { Ok(()) }
    });
    match asked {
        Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
            return Err(Error::io(format!("asking the daemon (pid {pid}) to end"), error));
        }
        _ => {}
    }
    let until = Instant::now() + DAEMON_DEADLINE;
    while entry.daemon.is_alive() {
        if Instant::now() >= until {
            let (seconds, log) = (DAEMON_DEADLINE.as_secs(), registry.log_path(entry.id));
            let message = format!(
                "the daemon of {} (pid {pid}) has not ended within {seconds} s",
                entry.device.display()
            );
            return Err(Error::new(Kind::InUse, message)
                .remedy(format!("it goes on trying; see {} and dmesg", log.display())));
        }
        thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

/// Removes what a daemon that died has left in the kernel.
fn remove_remains(control: &Control, entry: &Entry) -> Result<()> {
    match control.info(entry.id)? {
        Some(info) if info.mark == entry.mark => {
            control.stop(entry.id)?;
            control.delete(entry.id, entry.mark).map(drop)
        }
        _ => Ok(()),
    }
}

/// What became of the image of a device that is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Closed {
    /// It was closed now, with everything that was acknowledged.
    Now,
    /// Nothing of it was left to be closed here.
    Untouched,
}

/// Closes the image of a device that is gone and whose daemon did not: what was acknowledged and is known to the
/// session alone is committed.
fn close_image(registry: &Registry, entry: &Entry) -> Result<Closed> {
    let served = |listed: Listed| listed.entry.image_file == entry.image_file;
    if entry.read_only || registry.list()?.into_iter().any(served) {
        return Ok(Closed::Untouched);
    }
    let Some((session, memory)) = Sessions::of_machine().find(entry.image_file)? else {
        return Ok(Closed::Untouched);
    };
    if memory.session() == Session::Poisoned {
        session.remove()?;
        return Err(unclean(entry, "writing to it had failed"));
    }
    let file = ImageFile::open(&entry.image, Access::ReadWrite, LOCK_DEADLINE);
    let closed = file.and_then(|file| {
        if FileId::of_image(&file)? != entry.image_file {
            return Err(Error::new(Kind::NotFound, "another file is in its place").file(&entry.image));
        }
        let parents =
            Parents::of_device(entry, |path| ImageFile::open(path, Access::ReadOnly, LOCK_DEADLINE));
        EngineThread::open(Arc::new(file), Plan::Fresh { keep: false }, parents)?.close()
    });
    closed.map(|()| Closed::Now).map_err(|error| {
        let message = format!(
            "{} is gone, but not everything that was acknowledged is in its image yet: {error}",
            entry.device.display()
        );
        Error::new(Kind::Io, message)
            .remedy(format!("`vhdx-ublk add {}`, then `vhdx-ublk del`", entry.image.display()))
    })
}

fn await_node_gone(entry: &Entry) -> Result<()> {
    let until = Instant::now() + NODE_DEADLINE;
    let block = PathBuf::from(format!("/sys/class/block/ublkb{}", entry.id));
    // A device of the same number may be made at any moment: then the kernel has one, and ours is gone.
    let is_there = || fs::metadata(&entry.device).is_ok_and(|found| found.file_type().is_block_device());
    while is_there() && !block.exists() {
        if Instant::now() >= until {
            let message = format!("{} is still there, though the device is gone", entry.device.display());
            return Err(Error::new(Kind::Io, message).remedy(format!("rm {}", entry.device.display())));
        }
        thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

fn unclean(entry: &Entry, failure: &str) -> Error {
    let message =
        format!("{} is gone, but its image could not be closed cleanly: {failure}", entry.device.display());
    Error::new(Kind::Poisoned, message).file(&entry.image).remedy(format!(
        "look for the cause (dmesg, free space), then `vhdx-ublk add {}`",
        entry.image.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::super::registry::tests::entry;
    use super::*;

    #[test]
    fn a_number_a_device_a_link_and_an_image_are_told_apart() {
        let place = tempfile::tempdir().expect("a directory");
        let image = place.path().join("disk.vhdx");
        fs::write(&image, "").expect("written");
        assert_eq!(Target::parse("3".as_ref()), Target::Id(3));
        assert_eq!(Target::parse("/dev/ublkb12".as_ref()), Target::Id(12));
        let image = image.canonicalize().expect("there");
        assert_eq!(Target::parse(image.as_os_str()), Target::Image(image));
        for text in ["/dev/ublkb", "/dev/ublkb1p1", "-1", "gone.vhdx"] {
            assert_eq!(Target::parse(text.as_ref()), Target::Image(text.into()));
        }
    }

    #[test]
    fn an_image_is_recognised_after_it_was_renamed() {
        let place = tempfile::tempdir().expect("a directory");
        let (before, after) = (place.path().join("a.vhdx"), place.path().join("b.vhdx"));
        fs::write(&before, "").expect("written");
        let image_file = FileId::of(&fs::metadata(&before).expect("there"));
        let served = Entry { image: before.clone(), image_file, ..entry(0) };
        assert!(Target::Image(before.clone()).names(&served));
        fs::rename(&before, &after).expect("renamed");
        assert!(Target::Image(after).names(&served));
        assert!(Target::Image(before).names(&served), "by its old path, as nothing else is there");
    }

    #[test]
    fn another_file_at_the_images_path_is_not_the_image() {
        let place = tempfile::tempdir().expect("a directory");
        let path = place.path().join("a.vhdx");
        fs::write(&path, "").expect("written");
        let served = Entry { image: path.clone(), ..entry(0) };
        assert!(!Target::Image(path).names(&served));
    }
}
