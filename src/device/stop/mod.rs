//! Removing devices, from another process than the one that serves them.
//!
//! The kernel stops the device; its daemon, which serves until then, notices that and leaves the image clean.
//! A device whose daemon is dead is removed here, and its image closed with what its session holds.
//!
//! Where the kernel can refuse to stop a device that is open (7.0), it decides whether the device is in use;
//! elsewhere the result of [`usage`] does, and a process may open the device between that check and the stop.
//!
//! The stop itself waits for I/O that a hung daemon never completes, and a process cannot end while a command
//! of its own waits in the kernel. So another process issues it, which may be left behind.

mod daemon;
mod image;
mod kernel;
mod nesting;
mod target;

use std::path::Path;
use std::time::Duration;

pub use daemon::end_when_unused;
pub use kernel::{Openers, refuse_used, stop_here};
pub use nesting::{lies_on, lies_on_waiting, nested_first, waits_below};
pub use target::{Target, find};

use super::control::{Control, DeviceInfo};
use super::leftovers;
use super::node::await_node_gone;
use super::registry::{Entry, Registry, Sight, State};
use super::session;
use super::sys::ProcessHandle;
use super::usage;
use crate::error::{Doing, Error, Kind, Result};
use crate::machine;
use crate::simulation::{Plant, planted};
use daemon::end_daemon;
use image::{Closed, close_image, unclean};
use kernel::{stop_apart, stop_device};
use nesting::not_closed;
use target::{find_in, unknown_image};

/// How long a daemon may take by default: it writes back file systems and closes the image.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// How devices are removed.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// Also those in use; a daemon that does not end is killed.
    pub force: bool,
    /// How long each daemon may take.
    pub timeout: Duration,
}

/// Removes the device that `target` names, also one without an entry.
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
        // The kernel has no device of this program with this number: only the entry is left.
        return leftovers::sweep(registry, &Control::open()?);
    }
    stop(registry, &find_in(survey, target)?.entry, how)
}

/// Removes a device that only the kernel knows.
///
/// # Errors
///
/// That it is one, unless `how` forces it; [`Kind::InUse`] if it does not stop, and the process that the
/// kernel names is not its daemon; the kernel's.
pub fn stop_orphan(registry: &Registry, orphan: &DeviceInfo, how: &How) -> Result<()> {
    if !how.force {
        return Err(unknown_image(orphan));
    }
    let control = Control::open()?;
    let until = machine::now() + how.timeout;
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
        // The handle is on the process that has the number now. Some kernels take the number unchecked from
        // the process that starts the device, and ignore its namespace: only a process that has the device
        // open is the server.
        if !usage::has_device_open(pid, &machine::node(Path::new(&format!("/dev/ublkc{}", orphan.id)))) {
            let stranger = not_the_server(orphan.id, pid);
            stopped.map_err(|_| stranger)?;
        } else if server()? == Some(pid) {
            process.kill().doing(format!("killing the daemon (pid {pid})"))?;
        }
    }
    // It may have removed the device itself, and another one may have the number.
    remove_remains(&control, orphan.id, orphan.mark)?;
    leftovers::tidy(registry, &control);
    Ok(())
}

/// The error for a device that does not stop, if the process that the kernel names must not be killed.
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

/// Removes the device of `entry`, and waits until it is gone.
///
/// # Errors
///
/// [`Kind::InUse`] if it is in use, unless `how` forces it; [`Kind::Poisoned`] if it is gone but its image
/// could not be closed cleanly; what went wrong otherwise.
pub fn stop(registry: &Registry, entry: &Entry, how: &How) -> Result<()> {
    let _keeper = match registry.hold_keeper(entry.id) {
        Err(error) if how.force => {
            tracing::warn!("{error:#}");
            None
        }
        held => held?,
    };
    machine::turn("is about to stop a device");
    let sight = Sight::open()?;
    let below = waits_below(registry, entry)?;
    if let Some(below) = &below
        && !how.force
    {
        return Err(lies_on_waiting(entry, below));
    }
    let Some(last) = end_servers(registry, &sight, entry, how)? else { return await_node_gone(entry) };
    if let Sight::Kernel(control) = &sight {
        remove_remains(control, entry.id, entry.mark)?;
    }
    await_node_gone(entry)?;
    if let Some(below) = &below
        && !last.read_only
    {
        registry.remove(entry.id, entry.mark)?;
        return Err(not_closed(&last, below));
    }
    close_and_forget(registry, &last)
}

/// Stops the device and waits until its daemon has ended, and any that has taken its place meanwhile. Returns
/// the entry that is left: a daemon that has ended in order has removed it. That of a new device with this
/// number stays.
///
/// The entry is read again before each step. The caller's may be minutes old, and the end of a daemon that an
/// upgrade has replaced says nothing: the one that serves now would still have to close the image.
fn end_servers(registry: &Registry, sight: &Sight, entry: &Entry, how: &How) -> Result<Option<Entry>> {
    let until = machine::now() + how.timeout;
    let present = || -> Result<Option<Entry>> {
        let present = registry.entry(entry.id)?.filter(|present| present.mark == entry.mark);
        Ok(if planted(Plant::TrustOldEntry) { present.and(Some(entry.clone())) } else { present })
    };
    let mut server = present().ok().flatten().unwrap_or_else(|| entry.clone());
    loop {
        let control = match sight {
            Sight::Kernel(control) => Some(control),
            Sight::NoDriver => None,
            Sight::Hidden => return Err(hidden(entry)),
        };
        let state = sight.state_of(&server)?;
        if matches!(state, Some(State::Live | State::Quiesced | State::FailIo)) {
            stop_device(registry, control, &server, how, until)?;
        }
        end_daemon(registry, &server, state, how, until)?;
        match present()? {
            Some(last) if last.daemon != server.daemon => server = last,
            last => return Ok(last),
        }
    }
}

/// Closes the image of a device that is gone, and removes the entry.
fn close_and_forget(registry: &Registry, last: &Entry) -> Result<()> {
    let closed = close_image(registry, last);
    // Not before: another `del` takes a device without an entry for one whose daemon has closed the image.
    registry.remove(last.id, last.mark)?;
    match (closed?, &last.failure) {
        (Closed::Untouched, Some(failure)) => Err(unclean(last, failure)),
        _ => Ok(()),
    }
}

/// Ends what a `del` that was killed had begun: closes the images of those devices which are gone, whose
/// images are not closed, and which are meant. Each with what came of it.
///
/// # Errors
///
/// If the registry or a session cannot be read, or the kernel does not answer.
pub fn complete(
    registry: &Registry,
    control: &Control,
    is_meant: impl Fn(&Entry) -> bool,
) -> Result<Vec<(Entry, Result<()>)>> {
    let mut completed = Vec::new();
    let (entries, _) = registry.entries()?;
    for entry in entries.into_iter().filter(|entry| !entry.read_only && is_meant(entry)) {
        if Registry::is_gone(control, &entry)? && session::is_needed(registry, &entry)? {
            let outcome = close_and_forget(registry, &entry);
            completed.push((entry, outcome));
        }
    }
    Ok(completed)
}

fn hidden(entry: &Entry) -> Error {
    let message = format!("the driver of {} cannot be reached from here", entry.device.display());
    Error::new(Kind::NoDriver, message).remedy("run it where /dev/ublk-control is, outside of the container")
}

/// Removes the device that a dead daemon has left in the kernel.
fn remove_remains(control: &Control, id: u32, mark: u64) -> Result<()> {
    match control.info(id)? {
        Some(info) if info.mark == mark => {
            control.stop(id)?;
            control.delete(id, mark).map(drop)
        }
        _ => Ok(()),
    }
}
