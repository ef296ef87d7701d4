//! How much of the kernel's devices this process can see, and what that means for a device.

use std::path::Path;

use schemars::JsonSchema;
use serde::Serialize;

use super::entry::Entry;
use crate::device::control::{Control, DeviceInfo, KernelState};
use crate::device::process::Life;
use crate::error::{Kind, Result};

/// Where the kernel lists drivers like ublk's, whatever `/dev` contains.
const DRIVERS: &str = "/sys/class/misc";

/// The state of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Its daemon is bringing it up.
    Starting,
    /// Served.
    Live,
    /// Its daemon is taking it down.
    Stopping,
    /// Its daemon is gone, and its requests have failed.
    Dead,
    /// Its daemon is gone; requests wait for the next one.
    Quiesced,
    /// Its daemon is gone; requests fail until the next one comes.
    FailIo,
    /// It is gone, but its image could not be closed cleanly.
    Failed,
    /// The kernel's devices cannot be seen from here, or the kernel reports a state that this program does
    /// not know.
    Unknown,
}

/// How much of the kernel's devices can be seen.
pub(in crate::device) enum Sight {
    /// All of them.
    Kernel(Control),
    /// The kernel has no driver, so there are none.
    NoDriver,
    /// The driver is there, but cannot be reached, as from a container with its own `/dev`.
    Hidden,
}

impl Sight {
    /// What this process can see.
    pub(in crate::device) fn open() -> Result<Self> {
        match Control::open() {
            Ok(control) => Ok(Self::Kernel(control)),
            Err(error) if error.kind() == Kind::NoDriver => Ok(Self::without_control(Path::new(DRIVERS))),
            // As where a container has the node but no right to open it.
            Err(error) if error.kind() == Kind::Permission && !Control::may_be_opened() => Ok(Self::Hidden),
            Err(error) => Err(error),
        }
    }

    fn without_control(drivers: &Path) -> Self {
        let is_loaded = drivers.join("ublk-control").exists();
        if drivers.exists() && !is_loaded { Self::NoDriver } else { Self::Hidden }
    }

    /// The state of the device of `entry`; `None` if it is gone and there is nothing to report.
    pub(in crate::device) fn state_of(&self, entry: &Entry) -> Result<Option<State>> {
        let seen = match self {
            Self::Kernel(control) => Seen::Answer(control.info(entry.id)?),
            Self::NoDriver => Seen::Answer(None),
            Self::Hidden => Seen::Nothing,
        };
        Ok(judge(entry, seen, entry.daemon.life()))
    }
}

/// What the kernel reports of a device.
#[derive(Clone, Copy, Debug)]
pub(super) enum Seen {
    /// It cannot be asked.
    Nothing,
    Answer(Option<DeviceInfo>),
}

/// The state of a device from its entry, the kernel's answer, and its daemon; `None` if it is gone and there
/// is nothing to report.
pub(super) fn judge(entry: &Entry, seen: Seen, life: Life) -> Option<State> {
    let Seen::Answer(kernel) = seen else { return Some(State::Unknown) };
    let runs = matches!(life, Life::Runs | Life::Stopped);
    let ours = kernel.filter(|info| info.mark == entry.mark);
    match ours.map(|info| info.state) {
        None if runs => Some(State::Stopping),
        None if entry.failure.is_some() => Some(State::Failed),
        None => None,
        Some(KernelState::Live) => Some(State::Live),
        Some(KernelState::Dead) if life == Life::Ended => Some(State::Dead),
        Some(KernelState::Dead) if entry.started => Some(State::Stopping),
        Some(KernelState::Dead) => Some(State::Starting),
        Some(KernelState::Quiesced) => Some(State::Quiesced),
        Some(KernelState::FailIo) => Some(State::FailIo),
        Some(KernelState::Unknown) => Some(State::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use super::super::entry::tests::entry;
    use super::*;

    fn seen(mark: u64, state: KernelState) -> Seen {
        let info = DeviceInfo {
            id: 0,
            queues: 1,
            depth: 64,
            request_bytes: 4096,
            flags: 0,
            state,
            mark,
            server: None,
        };
        Seen::Answer(Some(info))
    }

    const GONE: Seen = Seen::Answer(None);

    #[test]
    fn where_the_kernel_cannot_be_asked_no_device_is_taken_for_gone() {
        for life in [Life::Runs, Life::Ended, Life::Hidden] {
            assert_eq!(judge(&entry(0), Seen::Nothing, life), Some(State::Unknown));
        }
        let drivers = tempfile::tempdir().expect("a directory");
        assert!(matches!(Sight::without_control(drivers.path()), Sight::NoDriver));
        assert!(matches!(Sight::without_control(&drivers.path().join("none")), Sight::Hidden));
        std::fs::create_dir(drivers.path().join("ublk-control")).expect("made");
        assert!(matches!(Sight::without_control(drivers.path()), Sight::Hidden));
    }

    #[test]
    fn a_device_of_another_server_under_our_number_is_not_ours() {
        let ours = entry(0);
        assert_eq!(judge(&ours, seen(5, KernelState::Live), Life::Ended), None);
        for life in [Life::Runs, Life::Hidden] {
            assert_eq!(judge(&ours, seen(ours.mark, KernelState::Live), life), Some(State::Live));
        }
    }

    #[test]
    fn the_state_of_a_dead_device_depends_on_its_daemon() {
        let ours = entry(0);
        let dead = seen(ours.mark, KernelState::Dead);
        assert_eq!(judge(&ours, dead, Life::Ended), Some(State::Dead));
        assert_eq!(judge(&ours, dead, Life::Runs), Some(State::Stopping));
        assert_eq!(judge(&Entry { started: false, ..entry(0) }, dead, Life::Runs), Some(State::Starting));
    }

    #[test]
    fn a_failure_stays_until_it_was_reported() {
        let failed = Entry { failure: Some("poisoned".into()), ..entry(0) };
        assert_eq!(judge(&failed, GONE, Life::Ended), Some(State::Failed));
        assert_eq!(judge(&entry(0), GONE, Life::Ended), None);
        assert_eq!(judge(&entry(0), GONE, Life::Runs), Some(State::Stopping));
    }
}
