//! The health of a device, in one word, from the kernel, its process and its daemon.

use schemars::JsonSchema;
use serde::Serialize;

use super::job::Progress;
use super::options::Recovery;
use super::registry::{Life, Listed, Registry, State};
use super::socket::{self, Status};
use super::warnings::Warning;
use crate::engine::port_counts::Shortage;
use crate::error::{Kind, Result};

/// The worst that is true of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Health {
    /// All is well.
    Ok,
    /// The host has no room: writes that need some fail, or wait.
    HostFull,
    /// A sync or a metadata write has failed: every write and flush fails, reads work.
    Poisoned,
    /// Its daemon was killed: I/O waits, or fails, until it is recovered.
    Waiting,
    /// Its daemon was stopped by a signal or a debugger: I/O waits.
    Stopped,
    /// Its daemon does not answer: I/O may wait.
    NoAnswer,
    /// It no longer serves, or its image could not be closed cleanly.
    Dead,
    /// It cannot be seen from here.
    Unknown,
}

/// How bad the health of a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grade {
    /// It serves as it should.
    Well,
    /// It needs attention.
    Degraded,
    /// It no longer serves.
    Dead,
}

impl Health {
    /// How bad it is.
    pub fn grade(self) -> Grade {
        match self {
            Self::Ok => Grade::Well,
            Self::Dead => Grade::Dead,
            Self::HostFull
            | Self::Poisoned
            | Self::Waiting
            | Self::Stopped
            | Self::NoAnswer
            | Self::Unknown => Grade::Degraded,
        }
    }
}

/// The condition of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// In one word.
    pub health: Health,
    /// The last error of the host that its daemon saw, or why the daemon did not answer.
    pub last_error: Option<String>,
    /// The last warning of its daemon.
    pub last_warning: Option<Warning>,
    /// What its daemon does on the image beside serving it.
    pub job: Option<Progress>,
    /// The requests that wait until the host has room, if any do.
    pub short_of_room: Option<Shortage>,
}

impl Condition {
    /// The condition of the device of `listed`, from its daemon, which takes a second if it hangs.
    pub fn of(registry: &Registry, listed: &Listed) -> Self {
        let life = listed.entry.daemon.life();
        let asked = listed.state == State::Live && matches!(life, Life::Runs | Life::Hidden);
        judge(listed, life, asked.then(|| socket::status(&registry.socket_path(listed.entry.id))))
    }
}

fn judge(listed: &Listed, life: Life, answer: Option<Result<Status>>) -> Condition {
    let failure = listed.entry.failure.clone();
    let only = |health| Condition {
        health,
        last_error: failure.clone(),
        last_warning: None,
        job: None,
        short_of_room: None,
    };
    match (listed.state, life, answer) {
        (State::Dead | State::Failed, ..) => only(Health::Dead),
        (State::Unknown, ..) => only(Health::Unknown),
        (State::Live, Life::Ended, _) if listed.entry.recovery == Recovery::None => only(Health::Dead),
        (State::Quiesced | State::FailIo, ..) | (State::Live, Life::Ended, _) => only(Health::Waiting),
        (_, Life::Stopped, _) => only(Health::Stopped),
        (_, _, Some(Ok(status))) => {
            let health = of_status(&status);
            let Status { last_error, last_warning, job, short_of_room, .. } = status;
            Condition { health, last_error, last_warning, job, short_of_room }
        }
        // A daemon of an older version answers, but not this.
        (_, _, Some(Err(error))) if error.kind() == Kind::Unsupported => only(Health::Unknown),
        (_, _, Some(Err(error))) => {
            Condition { last_error: Some(format!("{error:#}")), ..only(Health::NoAnswer) }
        }
        (State::Live | State::Starting | State::Stopping, _, None) => only(Health::Ok),
    }
}

fn of_status(status: &Status) -> Health {
    match status {
        Status { poisoned: true, .. } => Health::Poisoned,
        Status { host_full: true, .. } | Status { short_of_room: Some(_), .. } => Health::HostFull,
        Status { .. } => Health::Ok,
    }
}

#[cfg(test)]
mod tests {
    use super::super::registry::Entry;
    use super::super::registry::entry;
    use super::*;
    use crate::error::Error;

    fn health(state: State, life: Life, answer: Option<Result<Status>>) -> Health {
        judge(&Listed { entry: entry(0), state }, life, answer).health
    }

    #[test]
    fn a_daemon_that_answers_tells_how_its_device_is() {
        let health_of = |status| health(State::Live, Life::Runs, Some(Ok(status)));
        let (poisoned, host_full) = (true, true);
        assert_eq!(health_of(Status::default()), Health::Ok);
        assert_eq!(health_of(Status { host_full, ..Status::default() }), Health::HostFull);
        let short_of_room = Some(Shortage { requests: 1, since: 0 });
        assert_eq!(health_of(Status { short_of_room, ..Status::default() }), Health::HostFull);
        assert_eq!(health_of(Status { poisoned, host_full, ..Status::default() }), Health::Poisoned);
    }

    #[test]
    fn a_daemon_that_hangs_or_is_gone_is_not_well() {
        let silent = || Some(Err(Error::new(Kind::Io, "no answer")));
        assert_eq!(health(State::Live, Life::Runs, silent()), Health::NoAnswer);
        assert_eq!(health(State::Live, Life::Stopped, None), Health::Stopped);
        assert_eq!(health(State::Stopping, Life::Stopped, None), Health::Stopped);
        assert_eq!(health(State::Live, Life::Ended, None), Health::Waiting);
        assert_eq!(health(State::Quiesced, Life::Ended, None), Health::Waiting);
        assert_eq!(health(State::Dead, Life::Ended, None), Health::Dead);
        assert_eq!(health(State::Failed, Life::Ended, None), Health::Dead);
        assert_eq!(health(State::Unknown, Life::Ended, None), Health::Unknown);
        let mortal = Listed { entry: Entry { recovery: Recovery::None, ..entry(0) }, state: State::Live };
        assert_eq!(judge(&mortal, Life::Ended, None).health, Health::Dead);
        let old = Some(Err(Error::new(Kind::Unsupported, "what?")));
        assert_eq!(health(State::Live, Life::Runs, old), Health::Unknown);
    }

    #[test]
    fn only_what_is_well_is_well() {
        assert_eq!(Health::Ok.grade(), Grade::Well);
        for health in [Health::HostFull, Health::Poisoned, Health::Waiting, Health::Stopped, Health::NoAnswer]
        {
            assert_eq!(health.grade(), Grade::Degraded, "{health:?}");
        }
        assert!(Health::Dead.grade() > Health::Unknown.grade());
    }
}
