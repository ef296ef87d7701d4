//! Having the kernel stop a device.

use std::ffi::OsString;
use std::time::{Duration, Instant};

use super::How;
use crate::device::control::{Control, POLL_INTERVAL};
use crate::device::launch;
use crate::device::process::Life;
use crate::device::registry::{Entry, Registry};
use crate::device::socket;
use crate::device::usage;
use crate::error::{Error, Kind, Result};
use crate::machine;
use crate::simulation::{Plant, planted};

/// How long users that leave by themselves are waited for.
const PASSING_PATIENCE: Duration = Duration::from_secs(3);

/// Has the kernel stop the device, which its daemon then notices. Does nothing if only the death of the
/// daemon helps, or it is dead.
pub(super) fn stop_device(
    registry: &Registry,
    control: Option<&Control>,
    entry: &Entry,
    how: &How,
    until: Instant,
) -> Result<()> {
    let life = entry.daemon.life();
    if !how.force {
        if life == Life::Stopped {
            return Err(is_stopped(entry));
        }
        return stop_unused(registry, control, entry, until);
    }
    if matches!(life, Life::Runs | Life::Hidden) {
        end_waits(registry, entry);
        if let Err(error) = stop_apart(entry.id, entry.mark, Openers::Any, until) {
            tracing::warn!("{error:#}");
        }
    }
    Ok(())
}

/// The kernel's stop waits for the requests that are served: those that wait for room are to fail.
fn end_waits(registry: &Registry, entry: &Entry) {
    if entry.on_full.is_fail() {
        return;
    }
    let device = entry.device.display();
    match socket::end_waits(&registry.socket_path(entry.id)) {
        Ok(0) => {}
        Ok(requests) => {
            tracing::warn!("{device} ends, and requests that wait for room on the host fail: {requests}");
        }
        Err(error) => tracing::warn!("{device}: requests may still wait for room on the host: {error:#}"),
    }
}

fn is_stopped(entry: &Entry) -> Error {
    let (device, pid) = (entry.device.display(), entry.daemon.pid);
    let message = format!("the daemon of {device} (pid {pid}) was stopped by a signal or a debugger");
    Error::new(Kind::InUse, message).remedy(format!(
        "`kill -CONT {pid}` continues it; `vhdx-ublk del --force {device}` kills it and removes the device"
    ))
}

/// Stops a device that is not in use. Waits for users that leave by themselves.
fn stop_unused(registry: &Registry, control: Option<&Control>, entry: &Entry, until: Instant) -> Result<()> {
    let decides = control.is_some_and(Control::has_safe_stop);
    let patience = machine::now() + PASSING_PATIENCE;
    loop {
        let users = if decides { usage::named(entry.id) } else { usage::of_device(entry.id) };
        if !users.lasting.is_empty() {
            return Err(in_use(entry, &users.lasting));
        }
        let openers = if decides { Openers::None } else { Openers::Any };
        if openers == Openers::Any && users.passing.is_empty() {
            end_waits(registry, entry);
        }
        if (decides || users.passing.is_empty()) && stop_apart(entry.id, entry.mark, openers, until)? {
            return Ok(());
        }
        if machine::now() >= patience {
            let unnamed = vec![usage::UNNAMED.to_owned()];
            return Err(in_use(entry, if users.passing.is_empty() { &unnamed } else { &users.passing }));
        }
        machine::pause(POLL_INTERVAL);
    }
}

/// Refuses a device that is in use, before anything is done because it is not.
///
/// # Errors
///
/// [`Kind::InUse`], with its users.
pub fn refuse_used(entry: &Entry) -> Result<()> {
    let users = usage::of_device(entry.id).lasting;
    if users.is_empty() {
        return Ok(());
    }
    let message = format!("{} is in use: {}", entry.device.display(), users.join(", "));
    Err(Error::new(Kind::InUse, message).remedy("end its use first: unmount it, or what has it open"))
}

fn in_use(entry: &Entry, users: &[String]) -> Error {
    let message = format!("{} is in use: {}", entry.device.display(), users.join(", "));
    Error::new(Kind::InUse, message).remedy("end its use first, or remove it with --force")
}

/// Which openers of a device keep it from being stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Openers {
    /// None of them.
    Any,
    /// All of them: it is stopped only if there is none.
    None,
}

/// Has another process issue the kernel's command, see the folder's head. `false`: the device is open.
pub(super) fn stop_apart(id: u32, mark: u64, openers: Openers, until: Instant) -> Result<bool> {
    let mut arguments: Vec<OsString> = vec!["del".into(), "--stop-device".into(), mark.to_string().into()];
    arguments.extend((openers == Openers::Any).then(|| "--force".into()));
    arguments.extend(["--".into(), id.to_string().into()]);
    let left = until.saturating_duration_since(machine::now());
    launch::run_child(arguments, left)?.ok_or_else(|| {
        let message =
            format!("/dev/ublkb{id} has not stopped: its daemon does not complete the I/O in flight");
        Error::new(Kind::InUse, message).remedy(format!(
            "check dmesg and the host's storage; `vhdx-ublk del --force {id}` kills the daemon after a while"
        ))
    })
}

/// In that process: stops the device with this number and mark. `false`: the device is open.
///
/// # Errors
///
/// The kernel's.
pub fn stop_here(id: u32, mark: u64, openers: Openers) -> Result<bool> {
    let control = Control::open()?;
    if control.info(id)?.is_none_or(|info| info.mark != mark) {
        return Ok(true);
    }
    match openers {
        Openers::Any => control.stop(id).map(|()| true),
        Openers::None if planted(Plant::StopUsed) => control.stop(id).map(|()| true),
        Openers::None => control.stop_if_unused(id),
    }
}
