//! Taking devices away, from another process than the one that serves them.
//!
//! The kernel is asked to stop the device: its daemon, which goes on serving meanwhile, then finds that done and
//! leaves the image clean. A dead one's device is removed here, and its image closed with what its session holds.
//!
//! Where the kernel can refuse to stop a device that is open (7.0), it decides whether the device is in use;
//! elsewhere what [`usage`] finds does, and something may open the device between the look and the stop.
//!
//! The stop itself waits for I/O that a hung daemon never ends, and a process cannot end while a command of its
//! own waits in the kernel. So a process of its own gives it, which may be left behind.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::control::{Control, DeviceInfo, POLL_INTERVAL};
use super::engine_thread::EngineThread;
use super::launch;
use super::layers::Parents;
use super::registry::{Entry, FileId, Life, Listed, Registry, Sight, State, Survey};
use super::session::{Found, Plan, Sessions};
use super::spec::EngineHandle;
use super::sys::ProcessHandle;
use super::usage;
use crate::disk::{Access, ImageFile, folder_of};
use crate::error::{Error, Kind, Result};
use crate::image::Session;
use crate::printable::shell;

/// How long a daemon may take by default: it writes back file systems and closes the image.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a process may take to end once it was killed: longer only if it waits for its host's storage.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// How long users that leave by themselves are waited for.
const PASSING_PATIENCE: Duration = Duration::from_secs(3);

/// How long the I/O of a daemon that was killed may take to end, which ends its lock.
const LOCK_DEADLINE: Duration = Duration::from_secs(30);

/// How long the device node may stay after the device has gone.
const NODE_DEADLINE: Duration = Duration::from_secs(5);

/// How devices are taken away.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// Also those in use; a daemon that does not end is killed.
    pub force: bool,
    /// How long each daemon may take.
    pub timeout: Duration,
}

/// Which device is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// The N of `/dev/ublkbN`.
    Id(u32),
    /// The device that serves this image.
    Image(PathBuf),
}

impl Target {
    /// `3`, `ublkb3`, `/dev/ublkb3`, a partition of it, a link or another node that leads to one of these, or an
    /// image's path.
    pub fn parse(text: &OsStr) -> Self {
        let path = Path::new(text);
        let resolved = fs::canonicalize(path).ok();
        let in_dev = |path: &Path| id_of_name(path.strip_prefix("/dev").ok()?.to_str()?);
        let number = text.to_str().and_then(|text| text.parse().ok());
        let by_path = || in_dev(path).or_else(|| in_dev(resolved.as_deref()?));
        let by_node = || id_of_node(resolved.as_deref()?);
        let by_name = || resolved.is_none().then(|| id_of_name(text.to_str()?)).flatten();
        match number.or_else(by_path).or_else(by_node).or_else(by_name) {
            Some(id) => Self::Id(id),
            None => Self::Image(resolved.unwrap_or_else(|| absolute(path))),
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

/// The N of `ublkbN` and of `ublkbNpM`.
fn id_of_name(name: &str) -> Option<u32> {
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let rest = name.strip_prefix("ublkb")?;
    let (id, partition) = rest.split_once('p').map_or((rest, None), |(id, part)| (id, Some(part)));
    (is_number(id) && partition.is_none_or(is_number)).then(|| id.parse().ok())?
}

/// The device of a node that has another name.
fn id_of_node(path: &Path) -> Option<u32> {
    let found = fs::metadata(path).ok().filter(|found| found.file_type().is_block_device())?;
    let (major, minor) = (libc::major(found.rdev()), libc::minor(found.rdev()));
    let device = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    id_of_name(device.file_name()?.to_str()?)
}

/// The path from the root of what is not there any more, as its folder is.
fn absolute(path: &Path) -> PathBuf {
    let folder = fs::canonicalize(folder_of(path)).ok();
    let found = folder.zip(path.file_name()).map(|(folder, name)| folder.join(name));
    found.unwrap_or_else(|| path.to_owned())
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
/// [`Kind::NotFound`] when it is none of ours; [`Kind::Usage`] when several serve the image, read-only; why its
/// entry cannot be read.
pub fn find(registry: &Registry, target: &Target) -> Result<Listed> {
    find_in(registry.survey()?, target)
}

fn find_in(survey: Survey, target: &Target) -> Result<Listed> {
    let Survey { mut devices, orphans, unreadable } = survey;
    devices.retain(|listed| target.names(&listed.entry));
    if let [first, second, ..] = &devices[..] {
        let (first, second) = (first.entry.device.display(), second.entry.device.display());
        let message = format!("{target} is served by several devices, {first} and {second} among them");
        return Err(Error::new(Kind::Usage, message).remedy("name the device instead of the image"));
    }
    if let Some(found) = devices.pop() {
        return Ok(found);
    }
    let Target::Id(id) = target else {
        let message = format!("no device serves {target}");
        return Err(Error::new(Kind::NotFound, message).remedy("vhdx-ublk list"));
    };
    if let Some(damaged) = unreadable.into_iter().find(|unreadable| unreadable.id == *id) {
        return Err(damaged.error);
    }
    if let Some(orphan) = orphans.iter().find(|orphan| orphan.id == *id) {
        return Err(unknown_image(orphan));
    }
    Err(Error::new(Kind::NotFound, format!("{target} is no device of this program")).remedy("vhdx-ublk list"))
}

/// Of a device of ours without an entry nobody knows which image it serves.
fn unknown_image(orphan: &DeviceInfo) -> Error {
    let id = orphan.id;
    let served = match orphan.server {
        Some(pid) => format!("process {pid} serves it"),
        None => "its daemon is gone".into(),
    };
    let message = format!("no entry in the registry tells which image /dev/ublkb{id} is of; {served}");
    let remedy = format!(
        "`vhdx-ublk del --force {id}` takes it away; the image may be left as after a crash: `add` repairs it"
    );
    Error::new(Kind::Unsupported, message).remedy(remedy)
}

/// Takes the device that `target` names away, also one without an entry.
///
/// # Errors
///
/// As [`find`] and [`stop`].
pub fn take_away(registry: &Registry, target: &Target, how: &How) -> Result<()> {
    let survey = registry.survey()?;
    let has_id = |id: u32| *target == Target::Id(id);
    let listed = survey.devices.iter().any(|listed| target.names(&listed.entry));
    if !listed && let Some(orphan) = survey.orphans.iter().find(|orphan| has_id(orphan.id)) {
        return stop_orphan(registry, orphan, how);
    }
    if !listed && survey.unreadable.iter().any(|unreadable| has_id(unreadable.id)) {
        // The kernel has no device of ours with this number: nothing but the entry is left.
        return registry.sweep(&Control::open()?);
    }
    stop(registry, &find_in(survey, target)?.entry, how)
}

/// Takes a device away of which only the kernel knows.
///
/// # Errors
///
/// That it is one, unless `how` forces it; [`Kind::InUse`] when it does not stop, and the process that the kernel
/// names is not its daemon; what the kernel says.
pub fn stop_orphan(registry: &Registry, orphan: &DeviceInfo, how: &How) -> Result<()> {
    if !how.force {
        return Err(unknown_image(orphan));
    }
    let control = Control::open()?;
    let until = Instant::now() + how.timeout;
    // What this does not stop, the death of the server does.
    let stopped = match orphan.server {
        Some(_) => stop_apart(orphan.id, orphan.mark, Openers::Any, until),
        None => Ok(true),
    };
    let server = || -> Result<Option<u32>> {
        let info = control.info(orphan.id)?;
        Ok(info.filter(|info| info.mark == orphan.mark).and_then(|info| info.server))
    };
    if let Some(pid) = server()?
        && let Ok(process) = ProcessHandle::open(pid)
    {
        // The handle is on whatever has the number now. Some kernels take the number unchecked from whoever starts
        // the device, and do not look at its namespace: only a process that has the device open is the server.
        if !usage::has_device_open(pid, Path::new(&format!("/dev/ublkc{}", orphan.id))) {
            let stranger = not_the_server(orphan.id, pid);
            stopped.map_err(|_| stranger)?;
        } else if server()? == Some(pid) {
            let killed = process.kill();
            killed.map_err(|error| Error::io(format!("killing the daemon (pid {pid})"), error))?;
        }
    }
    control.stop(orphan.id)?;
    control.delete(orphan.id, orphan.mark)?;
    registry.sweep(&control)
}

/// The kernel names a process that must not be killed for a device that does not stop.
fn not_the_server(id: u32, pid: u32) -> Error {
    let message = format!(
        "/dev/ublkb{id} has not stopped; the kernel names process {pid} as its daemon, which does not have \
         /dev/ublkc{id} open and is not killed"
    );
    let remedy = format!(
        "end the process that has /dev/ublkc{id} open (`fuser`, in every container), then run it again"
    );
    Error::new(Kind::InUse, message).remedy(remedy)
}

/// Takes the device of `entry` away, and waits until it is gone.
///
/// # Errors
///
/// [`Kind::InUse`] when somebody uses it, unless `how` forces it; [`Kind::Poisoned`] when it is gone but its image
/// could not be closed cleanly; what went wrong otherwise.
pub fn stop(registry: &Registry, entry: &Entry, how: &How) -> Result<()> {
    let sight = Sight::open()?;
    let state = sight.state_of(entry)?;
    let control = match sight {
        Sight::Kernel(control) => Some(control),
        Sight::NoDriver => None,
        Sight::Hidden => return Err(hidden(entry)),
    };
    let until = Instant::now() + how.timeout;
    let below = waits_below(registry, entry)?;
    if let Some(below) = &below
        && !how.force
    {
        return Err(lies_on_waiting(entry, below));
    }
    if matches!(state, Some(State::Live | State::Quiesced | State::FailIo)) {
        stop_device(control.as_ref(), entry, how, until)?;
    }
    end_daemon(registry, entry, state, how, until)?;
    // A daemon that has done all it should has removed its entry. One of a new device of this number is not
    // ours to touch.
    let last = registry.entry(entry.id)?.filter(|last| last.mark == entry.mark);
    let Some(last) = last else { return await_node_gone(entry) };
    if let Some(control) = &control {
        remove_remains(control, entry)?;
    }
    await_node_gone(entry)?;
    registry.remove(entry.id, entry.mark)?;
    if let Some(below) = &below
        && !last.read_only
    {
        return Err(not_closed(&last, below));
    }
    // A snapshot may have changed the image since the entry was looked at.
    match (close_image(registry, &last)?, &last.failure) {
        (Closed::Untouched, Some(failure)) => Err(unclean(&last, failure)),
        _ => Ok(()),
    }
}

fn hidden(entry: &Entry) -> Error {
    let message = format!("the driver of {} cannot be reached from here", entry.device.display());
    Error::new(Kind::NoDriver, message).remedy("run it where /dev/ublk-control is, outside of the container")
}

/// The device of ours, waiting for a daemon, that the image of `entry` lies on: whoever reads or writes the
/// image waits as well.
///
/// # Errors
///
/// When the registry cannot be read.
pub fn waits_below(registry: &Registry, entry: &Entry) -> Result<Option<Listed>> {
    let is_below = |listed: &Listed| {
        listed.entry.mark != entry.mark && listed.is_abandoned() && lies_on(entry, &listed.entry)
    };
    Ok(registry.list()?.into_iter().find(is_below))
}

/// Whether the image of `entry`, or one of its parents, is on a file system that is on the device of `below`.
pub fn lies_on(entry: &Entry, below: &Entry) -> bool {
    let mut files = std::iter::once(&entry.image_file).chain(&entry.parent_files);
    files.any(|file| usage::file_system_is_on(file.device, below.id))
}

/// The image of a device lies on one that waits.
pub fn lies_on_waiting(entry: &Entry, below: &Listed) -> Error {
    let (device, below) = (entry.device.display(), below.entry.device.display());
    let message = format!("the image of {device} lies on {below}, whose daemon was killed: its I/O waits");
    Error::new(Kind::InUse, message)
        .file(&entry.image)
        .remedy(format!("`vhdx-ublk recover {below}` first, then run the command again"))
}

/// A device was taken away by force while its image could not be read.
fn not_closed(entry: &Entry, below: &Listed) -> Error {
    let (device, below) = (entry.device.display(), below.entry.device.display());
    let message = format!(
        "{device} is gone, but not everything that was acknowledged is in its image, which lies on {below}, whose \
         I/O waits"
    );
    Error::new(Kind::Io, message).file(&entry.image).remedy(format!(
        "`vhdx-ublk recover {below}`, then `vhdx-ublk add {}` and `vhdx-ublk del` it",
        shell(&entry.image)
    ))
}

/// Has the kernel stop the device, which its daemon then finds. Nothing is done here where only the death of the
/// daemon helps, or it is dead.
fn stop_device(control: Option<&Control>, entry: &Entry, how: &How, until: Instant) -> Result<()> {
    let life = entry.daemon.life();
    if !how.force {
        if life == Life::Stopped {
            return Err(is_stopped(entry));
        }
        return stop_unused(control, entry, until);
    }
    if matches!(life, Life::Runs | Life::Hidden)
        && let Err(error) = stop_apart(entry.id, entry.mark, Openers::Any, until)
    {
        tracing::warn!("{error:#}");
    }
    Ok(())
}

fn is_stopped(entry: &Entry) -> Error {
    let (device, pid) = (entry.device.display(), entry.daemon.pid);
    let message = format!("the daemon of {device} (pid {pid}) was stopped by a signal or a debugger");
    Error::new(Kind::InUse, message).remedy(format!(
        "`kill -CONT {pid}` continues it; `vhdx-ublk del --force {device}` kills it and takes the device away"
    ))
}

/// Stops a device that nobody uses. Users that leave by themselves are waited for.
fn stop_unused(control: Option<&Control>, entry: &Entry, until: Instant) -> Result<()> {
    let decides = control.is_some_and(Control::has_safe_stop);
    let patience = Instant::now() + PASSING_PATIENCE;
    loop {
        let users = if decides { usage::named(entry.id) } else { usage::of_device(entry.id) };
        if !users.lasting.is_empty() {
            return Err(in_use(entry, &users.lasting));
        }
        let openers = if decides { Openers::None } else { Openers::Any };
        if (decides || users.passing.is_empty()) && stop_apart(entry.id, entry.mark, openers, until)? {
            return Ok(());
        }
        if Instant::now() >= patience {
            let unnamed = vec!["open in the kernel or in another namespace".to_owned()];
            return Err(in_use(entry, if users.passing.is_empty() { &unnamed } else { &users.passing }));
        }
        thread::sleep(POLL_INTERVAL);
    }
}

fn in_use(entry: &Entry, users: &[String]) -> Error {
    let message = format!("{} is in use: {}", entry.device.display(), users.join(", "));
    Error::new(Kind::InUse, message).remedy("end its use first, or take it away with --force")
}

/// Which openers of a device keep it from being stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Openers {
    /// None of them.
    Any,
    /// All of them: it is stopped only if there is none.
    None,
}

/// Has a process of its own give the kernel's command, see the module's head. `false`: the device is open.
fn stop_apart(id: u32, mark: u64, openers: Openers, until: Instant) -> Result<bool> {
    let mut arguments: Vec<OsString> = vec!["del".into(), "--stop-device".into(), mark.to_string().into()];
    arguments.extend((openers == Openers::Any).then(|| "--force".into()));
    arguments.extend(["--".into(), id.to_string().into()]);
    let left = until.saturating_duration_since(Instant::now());
    launch::ask_child(arguments, left)?.ok_or_else(|| {
        let message = format!("/dev/ublkb{id} has not stopped: its daemon does not end the I/O that is under way");
        Error::new(Kind::InUse, message).remedy(format!(
            "look at dmesg and at the host's storage; `vhdx-ublk del --force {id}` kills the daemon after a while"
        ))
    })
}

/// In that process: stops the device with this number and mark. `false`: the device is open.
///
/// # Errors
///
/// What the kernel says.
pub fn stop_here(id: u32, mark: u64, openers: Openers) -> Result<bool> {
    let control = Control::open()?;
    if control.info(id)?.is_none_or(|info| info.mark != mark) {
        return Ok(true);
    }
    match openers {
        Openers::Any => control.stop(id).map(|()| true),
        Openers::None => control.stop_if_unused(id),
    }
}

/// Waits until the daemon has ended: it finds its device stopped, or is asked to end while it brings it up.
fn end_daemon(
    registry: &Registry,
    entry: &Entry,
    state: Option<State>,
    how: &How,
    until: Instant,
) -> Result<()> {
    if state == Some(State::Starting) {
        signal(entry, "asking the daemon to end", ProcessHandle::terminate)?;
    }
    let is_over = || -> Result<bool> {
        Ok(match entry.daemon.life() {
            Life::Ended => true,
            // It removes its entry as the last thing that it does.
            Life::Hidden => registry.entry(entry.id)?.is_none_or(|last| last.mark != entry.mark),
            Life::Runs | Life::Stopped => false,
        })
    };
    while !is_over()? {
        let is_hopeless = how.force && entry.daemon.life() == Life::Stopped;
        if is_hopeless || Instant::now() >= until {
            return if how.force { kill_daemon(entry) } else { Err(has_not_ended(registry, entry, how)) };
        }
        thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

fn has_not_ended(registry: &Registry, entry: &Entry, how: &How) -> Error {
    let (device, pid, log) = (entry.device.display(), entry.daemon.pid, registry.log_path(entry.id));
    let seconds = how.timeout.as_secs();
    let message = format!("the daemon of {device} (pid {pid}) has not ended within {seconds} s");
    Error::new(Kind::InUse, message).remedy(format!(
        "it goes on trying, see {} and dmesg; `vhdx-ublk del --force {device}` kills it",
        log.display()
    ))
}

/// Kills a daemon that does not end. What it acknowledged is in its session, as after any other death.
fn kill_daemon(entry: &Entry) -> Result<()> {
    let (device, pid) = (entry.device.display(), entry.daemon.pid);
    if entry.daemon.life() == Life::Hidden {
        let message = format!("the daemon of {device} does not end, and belongs to another PID namespace");
        return Err(Error::new(Kind::InUse, message).remedy("run the command where the daemon was started"));
    }
    signal(entry, "killing the daemon", ProcessHandle::kill)?;
    tracing::warn!("the daemon of {device} (pid {pid}) did not end and was killed, as in a crash");
    let until = Instant::now() + KILL_DEADLINE;
    while entry.daemon.is_alive() {
        if Instant::now() >= until {
            let message =
                format!("the daemon of {device} (pid {pid}) was killed, and waits for the host's storage");
            return Err(Error::new(Kind::InUse, message)
                .remedy("look at dmesg; run the command again when the storage answers"));
        }
        thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

fn signal(
    entry: &Entry,
    doing: &str,
    send: impl FnOnce(&ProcessHandle) -> std::io::Result<()>,
) -> Result<()> {
    let pid = entry.daemon.pid;
    let outcome = ProcessHandle::open(pid).and_then(|process| {
        // The handle is on whatever has the number now; only if that is the daemon, it gets the signal.
        if entry.daemon.is_alive() { send(&process) } else { Ok(()) }
    });
    match outcome {
        Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
            Err(Error::io(format!("{doing} (pid {pid})"), error))
        }
        _ => Ok(()),
    }
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

/// `devices` in an order in which each comes before those that it lies on.
pub fn nested_first<T>(mut devices: Vec<T>, lies_on: impl Fn(&T, &T) -> bool) -> Vec<T> {
    let mut ordered = Vec::with_capacity(devices.len());
    while !devices.is_empty() {
        let carries_none = |at: &usize| {
            devices.iter().enumerate().all(|(other, device)| other == *at || !lies_on(device, &devices[*at]))
        };
        // In a circle, which cannot be, any order is as good.
        let next = (0..devices.len()).find(carries_none).unwrap_or(0);
        ordered.push(devices.remove(next));
    }
    ordered
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
    let FileId { device, inode } = entry.image_file;
    match Sessions::of_machine().of_file(device, inode)? {
        Some(Found::Free(session, memory))
            if memory.check_layout().is_ok() && memory.session() == Session::Poisoned =>
        {
            session.remove()?;
            return Err(unclean(entry, "writing to it had failed"));
        }
        // One that is held: the last I/O of the killed daemon has not ended. The image's lock waits for that, too.
        Some(_) => {}
        None => return Ok(Closed::Untouched),
    }
    let file = ImageFile::open(&entry.image, Access::ReadWrite, LOCK_DEADLINE);
    let closed = file.and_then(|file| {
        // Another mount of its file system may have changed the device's number; the session tells the rest.
        if file.inode() != entry.image_file.inode {
            return Err(Error::new(Kind::NotFound, "another file is in its place").file(&entry.image));
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
        Error::new(Kind::Io, message).remedy(way_out(&error, &entry.image))
    })
}

/// What to do about an image that could not be closed. One that was damaged under its device cannot be added
/// either, so that advice would lead in a circle.
fn way_out(error: &Error, image: &Path) -> String {
    let image = shell(image);
    match error.kind() {
        // It knows better which session that is.
        _ if error.structure() == Some("session") && error.remedy_text().is_some() => {
            error.remedy_text().unwrap_or_default().to_owned()
        }
        Kind::Truncated | Kind::Corrupt | Kind::NotVhdx | Kind::Mismatch => format!(
            "the file was changed or cut while it was served: restore it from a backup; `vhdx-ublk check {image}` \
             tells what is left of it"
        ),
        Kind::NotFound => format!(
            "{}; then `vhdx-ublk add {image}` and `vhdx-ublk del {image}`",
            error.remedy_text().unwrap_or("put the image back at its place")
        ),
        _ => format!("remove the cause, then `vhdx-ublk add {image}` and `vhdx-ublk del {image}`"),
    }
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
        shell(&entry.image)
    ))
}

#[cfg(test)]
mod tests {
    use super::super::registry::tests::entry;
    use super::*;

    #[test]
    fn a_device_is_named_in_every_way_that_people_name_it() {
        for text in ["3", "ublkb3", "/dev/ublkb3", "/dev/ublkb3p1", "ublkb3p12"] {
            assert_eq!(Target::parse(text.as_ref()), Target::Id(3), "{text}");
        }
        let place = tempfile::tempdir().expect("a directory");
        let image = place.path().join("disk.vhdx");
        fs::write(&image, "").expect("written");
        let image = image.canonicalize().expect("there");
        assert_eq!(Target::parse(image.as_os_str()), Target::Image(image));
        for text in ["/dev/ublkb", "/dev/ublkbp1", "/dev/ublkb1p", "/dev/ublkb1q1"] {
            assert_eq!(Target::parse(text.as_ref()), Target::Image(text.into()));
        }
        let here = fs::canonicalize(".").expect("there");
        for text in ["-1", "gone.vhdx"] {
            assert_eq!(Target::parse(text.as_ref()), Target::Image(here.join(text)), "from the root");
        }
    }

    #[test]
    fn what_lies_on_another_device_goes_first() {
        // A number lies on its half.
        let lies_on = |above: &u32, below: &u32| above / 2 == *below && above != below;
        assert_eq!(nested_first(vec![1, 2, 4, 3, 5], lies_on), [4, 3, 5, 2, 1]);
        assert_eq!(nested_first(vec![7, 6], |_, _| true), [7, 6], "it ends");
        assert!(nested_first(Vec::<u32>::new(), lies_on).is_empty());
    }

    #[test]
    fn the_way_out_does_not_lead_in_a_circle() {
        let image = Path::new("/a.vhdx");
        let cut = way_out(&Error::new(Kind::Truncated, "cut"), image);
        assert!(cut.contains("restore it from a backup") && !cut.contains(" add "), "{cut}");
        let full = way_out(&Error::new(Kind::NoSpace, "full"), image);
        assert!(full.contains("vhdx-ublk add /a.vhdx"), "{full}");
    }

    #[test]
    fn a_device_without_an_entry_is_named_with_its_way_out() {
        let orphan = DeviceInfo {
            id: 4,
            queues: 1,
            depth: 1,
            request_bytes: 4096,
            flags: 0,
            state: super::super::control::KernelState::Quiesced,
            mark: 0,
            server: None,
        };
        let survey = || Survey { orphans: vec![orphan], ..Survey::default() };
        let error = find_in(survey(), &Target::Id(4)).expect_err("no entry");
        assert!(error.remedy_text().is_some_and(|text| text.contains("del --force 4")), "{error}");
        assert_eq!(find_in(survey(), &Target::Id(5)).expect_err("no device").kind(), Kind::NotFound);
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
