//! The process that takes a device over from a daemon that serves it.

use std::path::Path;
use std::time::Duration;

use super::formats::Formats;
use crate::device::control::Control;
use crate::device::handover::{note, now_us};
use crate::device::launch;
use crate::device::order::HandedOver;
use crate::device::process::Life;
use crate::device::registry::{Entry, Listed, Registry, Reserved, State};
use crate::device::service_manager::GroupVisit;
use crate::device::session;
use crate::device::socket;
use crate::device::spare_buffers::SpareBuffers;
use crate::device::sys;
use crate::disk::{Access, ImageFile};
use crate::error::{Doing, Error, Kind, Result};
use crate::machine;

/// How long the daemon may take to end once it has agreed: its last I/O included.
const END_PATIENCE: Duration = Duration::from_secs(50);

/// How long a daemon that does not answer may take to be seen as ended.
const DEATH_PATIENCE: Duration = Duration::from_secs(1);

/// How often to look: I/O waits meanwhile.
const INTERVAL: Duration = Duration::from_millis(1);

/// A process that is ready to take a device over. Nothing has changed.
pub struct Successor {
    entry: Entry,
    image: ImageFile,
    parents: Vec<ImageFile>,
    room: Reserved,
    spare: SpareBuffers,
}

/// A device whose daemon has ended for this process.
pub struct TakenOver {
    /// What is known of it.
    pub entry: Entry,
    /// Its image, locked for this process.
    pub image: ImageFile,
    /// The image's parents, locked until they have been opened once more.
    pub parents: Vec<ImageFile>,
    /// Room for its new entry.
    pub room: Reserved,
    /// Buffers for its queues.
    pub spare: SpareBuffers,
    /// Since when requests wait.
    pub pause: Pause,
}

/// A pause of a device: since when requests wait at most, microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Pause(u64);

impl Successor {
    /// Opens what the device needs beside its daemon. `open` opens and locks a file.
    ///
    /// # Errors
    ///
    /// If the device is not served, or this program could not serve it.
    pub fn prepare(
        registry: &Registry,
        listed: &Listed,
        open: fn(&Path, Access) -> Result<ImageFile>,
    ) -> Result<Self> {
        refuse_unserved(listed)?;
        let entry = listed.entry.clone();
        // Before any session is mapped: it would be brought in too, with all the room that it has reserved.
        if let Err(error) = sys::load_program() {
            tracing::warn!("the program may have to be read while its disk waits: {error}");
        }
        Formats::ours().check(&entry)?;
        refuse_smb(&entry)?;
        let room = registry.reserve(&entry)?;
        let image = if entry.read_only {
            open(&entry.image, Access::ReadOnly)
        } else {
            ImageFile::open_beside(&entry.image)
        };
        let image = image.map_err(|error| entry.explain(error))?;
        image.set_sparse(entry.sparse);
        refuse_another(&entry, &entry.image, image.identity() == entry.image_file)?;
        let mut parents = Vec::new();
        for (path, file) in entry.parents.iter().zip(&entry.parent_files) {
            let parent = open(path, Access::ReadOnly).map_err(|error| entry.explain(error))?;
            refuse_another(&entry, path, parent.identity() == *file)?;
            parents.push(parent);
        }
        let info = Control::open()?.info(entry.id)?;
        let spare = info.map(|info| SpareBuffers::of(&info)).transpose()?.unwrap_or_default();
        if let Err(error) = sys::keep_in_memory() {
            tracing::warn!("the daemon may be swapped out: {error}");
        }
        refuse_ended(&entry)?;
        Ok(Self { entry, image, parents, room, spare })
    }

    /// Has the daemon end, and waits for that.
    ///
    /// # Errors
    ///
    /// The daemon's refusal: nothing has changed. That it does not end in time.
    pub fn take_over(self, registry: &Registry) -> Result<TakenOver> {
        let Self { entry, image, parents, room, spare } = self;
        // From the daemon's end on this process must outlive its starter; after a refusal it ends by itself.
        launch::leave_parent()?;
        // What asks the daemon to end from now on, asks its successor.
        sys::block_requests().doing("blocking signals")?;
        let asked_at_us = now_us()?;
        let asked = socket::hand_over(&registry.socket_path(entry.id), entry.image_file);
        let paused_at_us = match asked {
            Ok(HandedOver { paused_at_us }) => paused_at_us,
            // It may have ended before its answer was written, or was killed.
            Err(error) if error.kind() == Kind::Io && has_ended(&entry, DEATH_PATIENCE) => asked_at_us,
            Err(error) => return Err(without_command(&entry, error)),
        };
        launch::take_over();
        note("the daemon has answered");
        if !has_ended(&entry, END_PATIENCE) {
            let message = format!(
                "the daemon of {} (pid {}) has not ended within {} s",
                entry.device.display(),
                entry.daemon.pid,
                END_PATIENCE.as_secs()
            );
            return Err(Error::new(Kind::InUse, message).remedy("check dmesg and the host's storage"));
        }
        note("the daemon has ended");
        if !entry.read_only {
            image.become_writer(END_PATIENCE)?;
            session::await_free(entry.image_file, END_PATIENCE)?;
        }
        note("the locks are here");
        Ok(TakenOver { entry, image, parents, room, spare, pause: Pause(paused_at_us) })
    }
}

impl Pause {
    /// How long requests have been waiting at most, microseconds.
    ///
    /// # Errors
    ///
    /// If there is no clock.
    pub fn until_now_us(self) -> Result<u64> {
        Ok(now_us()?.saturating_sub(self.0))
    }
}

/// Moves this process to the control group of the daemon of `entry`, and so to the service that it continues.
pub fn join_service(entry: &Entry) {
    match GroupVisit::of(entry.daemon.pid) {
        Ok(visit) => visit.stay(),
        Err(error) => tracing::debug!("this process stays in the control group of its starter: {error}"),
    }
}

/// Notes for the next daemon of the device of `entry` what this process was asked while it took the device
/// over, and has not taken up itself. Nothing if the daemon before still serves, which gets such requests
/// itself.
pub fn leave_requests(registry: &Registry, entry: &Entry) {
    if launch::takes_over() && sys::takes_end_request() {
        registry.request(entry.id, entry.mark).note();
    }
}

/// Whether the daemon ends within `patience`.
fn has_ended(entry: &Entry, patience: Duration) -> bool {
    let until = machine::now() + patience;
    while entry.daemon.life() != Life::Ended {
        if machine::now() >= until {
            return false;
        }
        machine::pause(INTERVAL);
    }
    true
}

fn refuse_unserved(listed: &Listed) -> Result<()> {
    let (device, pid) = (listed.entry.device.display(), listed.entry.daemon.pid);
    if listed.is_abandoned() {
        let message = format!("the daemon of {device} is gone");
        return Err(Error::new(Kind::NotFound, message).remedy(format!("vhdx-ublk recover {device}")));
    }
    let refused = |message: String, remedy: String| Err(Error::new(Kind::InUse, message).remedy(remedy));
    match (listed.state, listed.entry.daemon.life()) {
        (State::Live, Life::Runs) => Ok(()),
        (State::Live, Life::Stopped) => refused(
            format!("the daemon of {device} (pid {pid}) was stopped by a signal or a debugger"),
            format!("`kill -CONT {pid}` continues it"),
        ),
        (State::Live, Life::Hidden) => refused(
            format!("the daemon of {device} (pid {pid}) belongs to another PID namespace"),
            "run the command where the daemon was started".into(),
        ),
        _ => refused(format!("{device} is not served"), "`vhdx-ublk list` shows its state".into()),
    }
}

/// A client of SMB has one lock for all descriptions of a file: the two processes could not both have it, and
/// another program would get in between.
fn refuse_smb(entry: &Entry) -> Result<()> {
    for path in std::iter::once(&entry.image).chain(&entry.parents) {
        if ImageFile::is_on_smb(path).map_err(|error| entry.explain(error))? {
            return Err(on_smb(entry, path));
        }
    }
    Ok(())
}

fn on_smb(entry: &Entry, path: &Path) -> Error {
    let device = entry.device.display();
    let message = format!("the file lies on SMB: {device} cannot be taken over while it is in use");
    Error::new(Kind::Unsupported, message)
        .file(path)
        .remedy("end the use of the device, then remove and add it (`vhdx-ublk del`, `vhdx-ublk add`)")
}

/// Before the locks were taken beside a daemon that has ended, another program may have written the image.
fn refuse_ended(entry: &Entry) -> Result<()> {
    if entry.daemon.life() == Life::Runs {
        return Ok(());
    }
    let device = entry.device.display();
    let message =
        format!("the daemon of {device} (pid {}) has ended meanwhile, or was stopped", entry.daemon.pid);
    Err(Error::new(Kind::NotFound, message).remedy(format!("if it has ended: `vhdx-ublk recover {device}`")))
}

fn refuse_another(entry: &Entry, path: &Path, is_it: bool) -> Result<()> {
    if is_it {
        return Ok(());
    }
    let message = format!("this is not the file that {} uses", entry.device.display());
    Err(Error::new(Kind::NotFound, message).file(path).remedy("move the file back"))
}

/// A daemon that is too old for this has refused.
fn without_command(entry: &Entry, error: Error) -> Error {
    if error.kind() != Kind::Unsupported || !error.message().contains("does not know this command") {
        return error;
    }
    let (device, pid, version) = (entry.device.display(), entry.daemon.pid, &entry.version);
    let message = format!("the daemon of {device} (vhdx-ublk {version}) cannot hand its device over");
    Error::new(Kind::Unsupported, message).remedy(format!(
        "end the use of the device, then remove and add it; or `kill -9 {pid}`, then `vhdx-ublk recover \
         {device}`: I/O waits meanwhile, and nothing acknowledged is lost"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::process::ProcessId;
    use crate::device::registry::entry;

    fn refusal(listed: &Listed) -> Error {
        refuse_unserved(listed).expect_err("refused")
    }

    #[test]
    fn only_a_device_that_is_served_is_taken_over() {
        let daemon = ProcessId::this().expect("/proc");
        let served = Entry { daemon, ..entry(3) };
        let listed = |state| Listed { entry: served.clone(), state };
        refuse_unserved(&listed(State::Live)).expect("it is served");
        assert!(refusal(&listed(State::Quiesced)).remedy_text().is_some_and(|text| text.contains("recover")));
        for state in [State::Starting, State::Stopping, State::Dead, State::Failed, State::Unknown] {
            assert_eq!(refusal(&listed(state)).kind(), Kind::InUse, "{state:?}");
        }
        let hidden = Entry { daemon: ProcessId { namespace: 1, ..daemon }, ..entry(3) };
        assert!(refusal(&Listed { entry: hidden, state: State::Live }).to_string().contains("namespace"));
    }

    #[test]
    fn a_daemon_that_has_ended_while_the_files_were_opened_is_not_succeeded() {
        let daemon = ProcessId::this().expect("/proc");
        refuse_ended(&Entry { daemon, ..entry(3) }).expect("it runs");
        let daemon = ProcessId { start_time: daemon.start_time + 1, ..daemon };
        let error = refuse_ended(&Entry { daemon, ..entry(3) }).expect_err("refused");
        assert!(error.remedy_text().is_some_and(|text| text.contains("recover /dev/ublkb3")));
    }

    #[test]
    fn a_file_on_smb_is_named_with_what_to_do() {
        let error = on_smb(&entry(3), Path::new("/images/base.vhdx"));
        assert_eq!(
            (error.kind(), error.file_path()),
            (Kind::Unsupported, Some(Path::new("/images/base.vhdx")))
        );
        assert!(error.remedy_text().is_some_and(|text| text.contains("vhdx-ublk add")));
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let image = file.path().canonicalize().expect("there");
        refuse_smb(&Entry { image, ..entry(3) }).expect("it is a local file");
    }

    #[test]
    fn a_daemon_that_is_too_old_is_named_with_its_version_and_what_to_do() {
        let old = Error::new(Kind::Unsupported, "the daemon does not know this command: unknown variant");
        let error = without_command(&entry(3), old);
        assert!(error.to_string().contains("vhdx-ublk 0.1.0"), "{error}");
        assert!(error.remedy_text().is_some_and(|text| text.contains("kill -9 1234")));
        let other = without_command(&entry(3), Error::new(Kind::Unsupported, "requests would fail"));
        assert_eq!(other.to_string(), "requests would fail");
    }
}
