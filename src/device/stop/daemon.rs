//! Waiting for a daemon's end, or killing it.

use std::io;
use std::time::{Duration, Instant};

use super::How;
use crate::device::control::POLL_INTERVAL;
use crate::device::process::Life;
use crate::device::registry::{Entry, Registry, State};
use crate::device::sys::ProcessHandle;
use crate::error::{Error, Kind, Result};
use crate::machine;

/// How long a process may take to end once it was killed: longer only if it waits for the host's storage.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// Waits until the daemon has ended: it notices that its device was stopped, or gets a signal while it brings
/// it up.
pub(super) fn end_daemon(
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
            Life::Ended => entry.daemon.has_left(),
            // Removing its entry is the last thing that it does.
            Life::Hidden => registry.entry(entry.id)?.is_none_or(|last| last.mark != entry.mark),
            Life::Runs | Life::Stopped => false,
        })
    };
    let mut process = ProcessHandle::open(entry.daemon.pid).ok();
    while !is_over()? {
        let is_hopeless = how.force && entry.daemon.life() == Life::Stopped;
        if is_hopeless || machine::now() >= until {
            return if how.force { kill_daemon(entry) } else { Err(has_not_ended(registry, entry, how)) };
        }
        await_end(&mut process);
    }
    Ok(())
}

/// Waits until `process` ends, which may be the daemon, or for a moment. Behind that end only time is waited
/// for: it may have been another process, and the daemon one that cannot be seen from here.
fn await_end(process: &mut Option<ProcessHandle>) {
    match process {
        Some(handle) if machine::folder().is_none() => {
            if handle.has_ended_within(POLL_INTERVAL) {
                *process = None;
            }
        }
        _ => machine::pause(POLL_INTERVAL),
    }
}

/// Asks the daemon of a device in use to end when the use ends.
///
/// # Errors
///
/// The operating system's.
pub fn end_when_unused(entry: &Entry) -> Result<()> {
    signal(entry, "asking the daemon to end", ProcessHandle::terminate)
}

fn has_not_ended(registry: &Registry, entry: &Entry, how: &How) -> Error {
    let (device, pid, log) = (entry.device.display(), entry.daemon.pid, registry.log_path(entry.id));
    let seconds = how.timeout.as_secs();
    let message = format!("the daemon of {device} (pid {pid}) has not ended within {seconds} s");
    Error::new(Kind::InUse, message).remedy(format!(
        "it continues to try, see {} and dmesg; `vhdx-ublk del --force {device}` kills it",
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
    let mut process = ProcessHandle::open(pid).ok();
    signal(entry, "killing the daemon", ProcessHandle::kill)?;
    tracing::warn!("the daemon of {device} (pid {pid}) did not end and was killed, as in a crash");
    let until = machine::now() + KILL_DEADLINE;
    while entry.daemon.is_alive() {
        if machine::now() >= until {
            let message =
                format!("the daemon of {device} (pid {pid}) was killed, and waits for the host's storage");
            return Err(Error::new(Kind::InUse, message)
                .remedy("check dmesg; run the command again when the storage answers"));
        }
        await_end(&mut process);
    }
    Ok(())
}

fn signal(entry: &Entry, doing: &str, send: impl FnOnce(&ProcessHandle) -> io::Result<()>) -> Result<()> {
    let pid = entry.daemon.pid;
    let outcome = ProcessHandle::open(pid).and_then(|process| {
        // The handle is on the process that has the number now, which gets the signal only if it is the
        // daemon.
        if entry.daemon.is_alive() { send(&process) } else { Ok(()) }
    });
    match outcome {
        Err(error) if error.raw_os_error() != Some(libc::ESRCH) => {
            Err(Error::io(format!("{doing} (pid {pid})"), error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    /// Otherwise a wait for something else would take all of a CPU once the process has ended.
    #[test]
    fn behind_the_end_of_a_process_only_time_is_waited_for() {
        let mut own = ProcessHandle::open(std::process::id()).ok();
        await_end(&mut own);
        assert!(own.is_some(), "it runs");
        let mut child = Command::new("true").spawn().expect("every machine has it");
        let mut process = ProcessHandle::open(child.id()).ok();
        assert!(process.is_some(), "it is not waited for yet");
        while process.is_some() {
            await_end(&mut process);
        }
        await_end(&mut process);
        child.wait().expect("it has ended");
    }
}
