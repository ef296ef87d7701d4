//! `recover`: serves devices again whose daemon was killed.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;
use vhdx_ublk::device::claims;
use vhdx_ublk::device::confine;
use vhdx_ublk::device::daemon;
use vhdx_ublk::device::engine_thread::EngineThread;
use vhdx_ublk::device::launch::{self, Lives};
use vhdx_ublk::device::layers::Parents;
use vhdx_ublk::device::open_image::{NoEngine, OpenImage};
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::device::private_mounts;
use vhdx_ublk::device::registry::{Entry, Listed, Registry, Reserved, State};
use vhdx_ublk::device::salvaged;
use vhdx_ublk::device::session::Plan;
use vhdx_ublk::device::spare_buffers::SpareBuffers;
use vhdx_ublk::device::spec::{DeviceSpec, Ready};
use vhdx_ublk::device::stop::{self, Target};
use vhdx_ublk::device::usage;
use vhdx_ublk::disk::{Access, HostFile, ImageFile};
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::machine;
use vhdx_ublk::printable::shell;

use super::output::{self, Failure};
use super::{FAILURE, SUCCESS, add, detached, logging};

/// How long a killed daemon may take to be gone.
const END_WAIT: Duration = Duration::from_secs(2);

/// How long a new daemon may take: it waits half a minute for the dead one's last I/O, and as long for the
/// kernel, and reads the image, which may lie on a device that is being recovered meanwhile.
const READY_DEADLINE: Duration = Duration::from_secs(120);

/// Serve devices again whose daemon was killed.
///
/// No acknowledged write is lost, flushed or not, and waiting I/O continues. Prints the paths of the devices.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own on the command line")]
pub struct Recover {
    /// The device: its number, its name, /dev/ublkbN or a partition of it, or the path of its image
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    target: Vec<OsString>,
    /// Recover all devices of this program whose daemon was killed
    #[arg(short, long)]
    all: bool,
    /// If the session does not match the image, serve what was flushed: this may damage a mounted file system
    #[arg(long)]
    accept_loss: bool,
    /// As JSON: an array of objects, errors too
    #[arg(long)]
    json: bool,
    /// This process is the daemon
    #[arg(long, hide = true, conflicts_with = "all")]
    serve: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk recover /dev/ublkb0
  vhdx-ublk recover --all

All devices are recovered at the same time, because the image of one may lie on another.
JSON: target (as it was named), device (null if it is not served), error (null, or why not).
Exit status: 0 all devices are served again, 1 some are not (their I/O still waits), 2 wrong
usage.";

/// What is printed as JSON of one target.
#[derive(Serialize, JsonSchema)]
pub struct Answer<'a> {
    /// The target, as it was named.
    target: WrittenPath,
    /// `/dev/ublkbN`; null if it is not served.
    device: Option<PathBuf>,
    /// Why it is not served.
    error: Option<Failure<'a>>,
}

impl Recover {
    /// Runs the command; returns the exit status. Every target is tried; the last failure is returned,
    /// earlier ones are reported at once.
    pub fn run(self) -> Result<u8> {
        confine::get_memory_without_io();
        if self.serve {
            return detached::run(None, Lives::OnItsOwn, |ready| self.serve(ready)).map(|()| SUCCESS);
        }
        let (mut outcomes, mut devices) = (Vec::new(), Vec::new());
        for (target, found) in self.targets()? {
            match found {
                Ok(listed) => devices.push((target, listed)),
                Err(error) => outcomes.push((target, Err(error))),
            }
        }
        outcomes.extend(self.recover_all(&devices));
        if !self.json {
            let outcomes = outcomes.into_iter().map(|(_, outcome)| outcome.map(drop));
            return output::last_failure(outcomes).map(|()| SUCCESS);
        }
        output::print_json(&outcomes.iter().map(Answer::of).collect::<Vec<_>>())?;
        Ok(if outcomes.iter().all(|(_, outcome)| outcome.is_ok()) { SUCCESS } else { FAILURE })
    }

    /// The devices, each with the name by which it is meant.
    fn targets(&self) -> Result<Vec<(OsString, Result<Listed>)>> {
        if self.all {
            let abandoned = claims::devices()?.into_iter().filter(Listed::is_abandoned);
            return Ok(abandoned.map(|listed| (listed.entry.device.clone().into(), Ok(listed))).collect());
        }
        let find = |text: &OsString| {
            let target = Target::parse(text)?;
            claims::find(&target).map_err(|error| nothing_to_recover(error, &target))
        };
        Ok(self.target.iter().map(|text| (text.clone(), find(text))).collect())
    }

    /// Recovers all `devices` at once: the image of one may lie on another, and cannot be read before that is
    /// back.
    fn recover_all(&self, devices: &[(OsString, Listed)]) -> Vec<(OsString, Result<PathBuf>)> {
        let all: Vec<&Listed> = devices.iter().map(|(_, listed)| listed).collect();
        thread::scope(|scope| {
            let threads: Vec<_> =
                all.iter().map(|listed| scope.spawn(|| self.recover_and_print(listed, &all))).collect();
            let joined = threads.into_iter().map(|thread| thread.join().expect("a panic ends the process"));
            devices.iter().map(|(target, _)| target.clone()).zip(joined).collect()
        })
    }

    fn recover_and_print(&self, listed: &Listed, all: &[&Listed]) -> Result<PathBuf> {
        let device = self.recover(listed, all)?.device;
        if !self.json {
            output::print(&device.display().to_string())?;
        }
        Ok(device)
    }

    /// Has a daemon of its own take the device over, as `all` of these are.
    fn recover(&self, listed: &Listed, all: &[&Listed]) -> Result<Ready> {
        await_end(listed);
        refuse_served(listed)?;
        if let Some(registry) = claims::registry()?
            && let Some(below) = stop::waits_below(&registry, &listed.entry)?
            && !all.iter().any(|other| other.entry.mark == below.entry.mark)
        {
            return Err(stop::lies_on_waiting(&listed.entry, &below));
        }
        if let Some(registry) = claims::registry()? {
            registry.forget_request(listed.entry.id)?;
        }
        let mut arguments: Vec<OsString> = vec!["recover".into(), "--serve".into()];
        arguments.extend(logging::arguments());
        arguments.extend(self.accept_loss.then(|| "--accept-loss".into()));
        arguments.extend(["--".into(), listed.entry.id.to_string().into()]);
        launch::launch_within(arguments, READY_DEADLINE)
    }

    /// The command for the device with this number.
    pub fn of_device(id: u32) -> Self {
        let target = vec![id.to_string().into()];
        Self { target, all: false, accept_loss: false, json: false, serve: false }
    }

    /// Has another process serve the device of `listed`.
    ///
    /// # Errors
    ///
    /// Whatever prevented it.
    pub fn launch(&self, listed: &Listed) -> Result<Ready> {
        self.recover(listed, &[])
    }

    /// Serves the device from this process until the device's end.
    pub fn serve_here(&self, ready: impl FnOnce(&Ready) -> Result<()>) -> Result<()> {
        confine::prepare();
        self.serve(ready)
    }

    fn serve(&self, ready: impl FnOnce(&Ready) -> Result<()>) -> Result<()> {
        let [text] = &self.target[..] else {
            return Err(Error::new(Kind::Usage, "a daemon serves one device"));
        };
        let listed = claims::find(&Target::parse(text)?)?;
        refuse_served(&listed)?;
        let entry = &listed.entry;
        if entry.private_mounts {
            private_mounts::leave()?;
        }
        let access = if entry.read_only { Access::ReadOnly } else { Access::ReadWrite };
        let image = self.open(entry, access)?;
        refuse_changed(entry)?;
        // With less room than that it may be enough to replace one entry.
        let room = Registry::open()?.reserve(entry).unwrap_or_default();
        serve_image(entry, (image, room, SpareBuffers::default()), self.accept_loss, ready)
    }
}

impl<'a> Answer<'a> {
    fn of((target, outcome): &'a (OsString, Result<PathBuf>)) -> Self {
        Self {
            target: WrittenPath::of(target),
            device: outcome.as_ref().ok().cloned(),
            error: outcome.as_ref().err().map(|error| Failure::of(error)),
        }
    }
}

/// Serves the device of `entry`, which has no daemon, with `image`, which is locked, and with `spare`
/// buffers; `room` is for its new entry.
pub fn serve_image(
    entry: &Entry,
    (image, room, spare): (ImageFile, Reserved, SpareBuffers),
    accept_loss: bool,
    ready: impl FnOnce(&Ready) -> Result<()>,
) -> Result<()> {
    let parents = Parents::of_device(entry, |path| add::open_locked(path, Access::ReadOnly));
    let file = Arc::new(image);
    if entry.read_only {
        let known = (!accept_loss).then_some(&entry.parent_files[..]);
        let opened = match entry.salvage {
            Some(salvage) => salvaged::open(file.clone(), &parents, salvage, known)?,
            None => OpenImage::read_only(file.clone(), &parents)?,
        };
        if opened.file_write_guid != entry.file_write_guid && !accept_loss {
            return Err(changed(entry));
        }
        if !accept_loss && !has_parents_of(entry, &opened.parent_files()) {
            return Err(replaced_parent(entry));
        }
        let served = DeviceSpec { spare, ..opened.spec(&file)? };
        let start = |ends| Ok(NoEngine::new(&opened, ends));
        return daemon::recover(&served, (entry, room), start, ready);
    }
    let engine = EngineThread::open(file.clone(), Plan::Resume { accept_loss }, parents)?;
    let served = DeviceSpec { spare, ..engine.opened().spec(&file)? };
    let entry = &Entry { image_file: served.image_file, ..entry.clone() };
    daemon::recover(&served, (entry, room), |ends| Ok(engine.start(ends)), ready)
}

impl Recover {
    /// Opens and locks the device's image, which must be the file it was. Another mount of its file system
    /// may have changed the device's number: its session, or its FileWriteGuid, decides then, unless the user
    /// wants neither.
    fn open(&self, entry: &Entry, access: Access) -> Result<ImageFile> {
        let file = match add::open_locked(&entry.image, access) {
            Err(error) if error.kind() == Kind::InUse && access == Access::ReadWrite => {
                open_past_readers(entry, error)?
            }
            outcome => outcome.map_err(|error| entry.explain(error))?,
        };
        file.set_sparse(entry.sparse);
        let (found, known) = (file.identity(), entry.image_file);
        if found == known || found.inode == known.inode && !self.accept_loss {
            return Ok(file);
        }
        let message = format!("this is not the file that {} serves", entry.device.display());
        let error = Error::new(Kind::NotFound, message).file(&entry.image);
        Err(entry.explain(error).remedy("move the image back"))
    }
}

/// Waits a little for the end of a daemon that was killed a moment ago and is not gone yet.
fn await_end(listed: &Listed) {
    let until = machine::now() + END_WAIT;
    while listed.entry.daemon.is_alive() && machine::now() < until {
        machine::pause(Duration::from_millis(10));
    }
}

fn refuse_served(listed: &Listed) -> Result<()> {
    if listed.is_abandoned() {
        return Ok(());
    }
    let device = listed.entry.device.display();
    let error = match listed.state {
        State::Dead | State::Failed => {
            let image = shell(&listed.entry.image);
            Error::new(Kind::Unsupported, format!("{device} cannot be recovered: its I/O has failed"))
                .remedy(format!("`vhdx-ublk del {device}`, then `vhdx-ublk add {image}`"))
        }
        State::Unknown => {
            Error::new(Kind::NoDriver, format!("{device} may have a daemon that is not visible here"))
                .remedy("run the command outside of the container, where /dev/ublk-control exists")
        }
        _ => Error::new(Kind::InUse, format!("{device} is served: there is nothing to recover"))
            .remedy("`vhdx-ublk list` shows its state"),
    };
    Err(error)
}

/// There is no such device, as after a reboot.
fn nothing_to_recover(error: Error, target: &Target) -> Error {
    if error.kind() != Kind::NotFound {
        return error;
    }
    let message = format!("{}: there is nothing to recover", error.message());
    let image = target.image().map_or_else(|| "IMAGE".into(), shell);
    Error::new(Kind::NotFound, message)
        .remedy(format!("after a reboot, `vhdx-ublk add {image}` serves the image again"))
}

/// Opens the image although it is locked, if only by those who read it: whoever may read it could keep the
/// device waiting for ever. The device had the image before they came; they see it change.
fn open_past_readers(entry: &Entry, refused: Error) -> Result<ImageFile> {
    let Some(readers) = usage::only_readers(entry.image_file) else { return Err(refused) };
    let Ok(file) = ImageFile::open_past_readers(&entry.image) else { return Err(refused) };
    let (image, readers) = (entry.image.display(), readers.join(", "));
    tracing::warn!("{image}: locked by readers, which will see it change: {readers}");
    Ok(file)
}

/// Between the look at the device and the lock on its image a snapshot may have changed that.
fn refuse_changed(entry: &Entry) -> Result<()> {
    let now = claims::find(&Target::Id(entry.id))?.entry;
    if now.image_file == entry.image_file && now.mark == entry.mark {
        return Ok(());
    }
    let message = format!("the image of {} has changed while it was being recovered", entry.device.display());
    Err(Error::new(Kind::InUse, message).remedy("run the command again"))
}

/// Whether the parents that were `found` are the files that the device had as parents, if its entry has
/// these: a path may lead elsewhere by now, also out of the folder to which an untrusted image is limited.
fn has_parents_of(entry: &Entry, found: &[HostFile]) -> bool {
    let known = &entry.parent_files;
    // Their file system may have another number by now.
    known.len() != entry.parents.len()
        || known.iter().map(|file| file.inode).eq(found.iter().map(|file| file.inode))
}

fn replaced_parent(entry: &Entry) -> Error {
    let message = format!("a parent of it is not the file that {} reads", entry.device.display());
    Error::new(Kind::NotFound, message)
        .file(&entry.image)
        .remedy("move the parent back; `vhdx-ublk recover --accept-loss` takes the file that is there")
}

fn changed(entry: &Entry) -> Error {
    let message = "another program has written the image since the daemon was killed";
    Error::new(Kind::NotFound, message).file(&entry.image).remedy(
        "`vhdx-ublk del` removes the device; `vhdx-ublk recover --accept-loss` serves the image as it is",
    )
}
