//! The *keeper* of a device: a process that serves it again whenever its daemon dies, where no service
//! manager does that.
//!
//! It watches the process that the device's entry names, whichever that is by now: an upgrade or a `recover`
//! by hand changes it. When that process has ended and the device waits, the keeper runs the program of that
//! process to recover the device. It ends with the device, or when that cannot be served again after several
//! attempts. After an upgrade it leaves the device to a keeper of the new program, which reads what that
//! writes.
//!
//! Invariants:
//!
//! * it does nothing while an upgrade or a removal is under way: each has a lock that the keeper takes before
//!   it looks again. Keepers share that of upgrades: none waits until another's device is served;
//! * it does nothing while the image lies on a device that waits, and holds no lock then: the keeper of that
//!   device needs the same lock;
//! * attempts are bounded, and each waits longer than the one before; a daemon that has lived for a while
//!   begins a new series;
//! * the keeper's program is in memory: the disk that it lies on may be the one that waits.

use std::ffi::OsString;
use std::fs::File;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::Flock;
use nix::sys::signal::{SigSet, Signal};

use super::confine;
use super::launch::{self, FirstArgument, Program};
use super::options::Recovery;
use super::registry::{Entry, Listed, Registry, Sight};
use super::service_manager::ServiceManager;
use super::spec::Ready;
use super::stop;
use super::sys::{self, ProcessHandle};
use crate::error::{Doing, Error, Kind, Result};

/// How long a new daemon may take, as with `recover`.
const READY_DEADLINE: Duration = Duration::from_secs(120);

/// A daemon that has lived this long did not die of how it began.
const STEADY: Duration = Duration::from_secs(10);

/// The pause after the first failure of a series; each further one doubles it.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// The longest pause after a daemon that had served.
const LONGEST_AFTER_DEATH: Duration = Duration::from_secs(1);

/// The longest pause after one that could not begin to.
const LONGEST_AFTER_FAILURE: Duration = Duration::from_secs(60);

/// How often to look whether a device below is served again.
const BELOW_INTERVAL: Duration = Duration::from_millis(50);

/// How many failures in a row are one too many.
pub const ATTEMPTS: u32 = 20;

/// See the module's head.
pub struct Keeper {
    /// Where the device has its entry.
    pub registry: Registry,
    /// The N of `/dev/ublkbN`.
    pub id: u32,
    /// Which device of this number it is.
    pub mark: u64,
    /// How a program is run to recover a device, whose number follows.
    pub recover: Vec<OsString>,
    /// How many failures in a row are one too many.
    pub attempts: u32,
}

/// Refuses a keeper where it would not help, or where something else does the same.
///
/// # Errors
///
/// [`Kind::Usage`].
pub fn refuse_useless(recovery: Option<Recovery>) -> Result<()> {
    if ServiceManager::socket().is_some() {
        let message = "a service manager has started this command, and starts the daemon again by itself";
        return Err(
            Error::new(Kind::Usage, message).remedy("omit --respawn; use Restart=on-failure in the unit")
        );
    }
    if recovery == Some(Recovery::None) {
        let message = "a device with --recovery none cannot be served again when its daemon dies";
        return Err(Error::new(Kind::Usage, message).remedy("omit --recovery, or --respawn"));
    }
    Ok(())
}

impl Keeper {
    /// The keeper of the device of `entry`.
    ///
    /// # Errors
    ///
    /// [`Kind::Unsupported`] if the device cannot be recovered.
    pub fn refuse_unrecoverable(entry: &Entry) -> Result<()> {
        if entry.recovery != Recovery::None {
            return Ok(());
        }
        let message = format!("{} cannot be served again when its daemon dies", entry.device.display());
        Err(Error::new(Kind::Unsupported, message)
            .remedy("see the warning above for the reason; omit --respawn to serve it all the same"))
    }

    /// What the keeper reports when it has begun.
    pub fn ready(&self) -> Ready {
        let device = format!("/dev/ublkb{}", self.id).into();
        let entry = self.registry.entry(self.id).ok().flatten();
        let image = entry.map(|entry| entry.image).unwrap_or_default();
        Ready { id: self.id, device, image, log: self.registry.log_path(self.id), pause_us: None }
    }

    /// Makes this process the keeper.
    ///
    /// # Errors
    ///
    /// If it cannot say so in the registry.
    pub fn begin(&self) -> Result<()> {
        confine::get_memory_without_io();
        if let Err(error) = sys::load_program() {
            tracing::warn!("the program may have to be read while its disk waits: {error}");
        }
        // Logs are reopened by daemons.
        SigSet::from(Signal::SIGHUP).thread_block().doing("blocking signals")?;
        self.registry.announce_keeper(self.id)
    }

    /// Serves the device again whenever its daemon dies, until the device is gone.
    ///
    /// # Errors
    ///
    /// The last failure, if there were too many: the device waits for `recover`.
    pub fn keep(&self) -> Result<()> {
        let mut series = Series { failures: 0, most: self.attempts };
        let mut program = Program::this();
        loop {
            if let Some(of_daemon) = self.program_of_daemon() {
                if !of_daemon.is_this() && self.is_left_to(&of_daemon) {
                    return Ok(());
                }
                program = of_daemon;
            }
            let outcome = match self.look() {
                Ok(None) => return Ok(()),
                Ok(Some(listed)) if listed.entry.daemon.is_alive() => {
                    await_end(&listed.entry).map(|lived| series.after_death(lived))
                }
                Ok(Some(listed)) => self.serve_again(&listed.entry, &program),
                Err(error) if error.kind() == Kind::Unsupported => return Err(self.not_kept(&error)),
                Err(error) => Err(error),
            };
            let (pause, error) = match outcome {
                Ok(pause) => (pause, Error::new(Kind::Io, "its daemons die as soon as they serve")),
                Err(error) => (series.after_failure(), error),
            };
            let Some(pause) = pause else { return Err(self.give_up(&error)) };
            thread::sleep(pause);
        }
    }

    /// The device, unless it is gone or nothing can serve it again.
    fn look(&self) -> Result<Option<Listed>> {
        let entry = self.registry.entry(self.id)?.filter(|entry| entry.mark == self.mark);
        let Some(entry) = entry else { return Ok(None) };
        let state = Sight::open()?.state_of(&entry)?;
        let listed = state.map(|state| Listed { entry, state });
        Ok(listed.filter(|listed| listed.entry.daemon.is_alive() || listed.is_abandoned()))
    }

    /// The program that serves the device, also if its entry cannot be read.
    fn program_of_daemon(&self) -> Option<Program> {
        let daemon = self.registry.daemon(self.id, self.mark)?;
        let program = Program::of_process(daemon.pid).ok()?;
        // Otherwise it may be the program of a later process with this number.
        daemon.is_alive().then_some(program)
    }

    /// Whether a keeper of `program` has the device from now on.
    fn is_left_to(&self, program: &Program) -> bool {
        let left = self.leave_to(program);
        left.inspect_err(|error| tracing::debug!("the daemon's program does not keep the device: {error:#}"))
            .is_ok()
    }

    fn leave_to(&self, program: &Program) -> Result<()> {
        let words =
            ["respawn".into(), format!("--mark={}", self.mark), format!("--attempts={}", self.attempts)];
        let arguments = words.into_iter().chain(["--".into(), self.id.to_string()]).map(OsString::from);
        let launched = launch::launch_program(program, FirstArgument::USUAL, arguments, READY_DEADLINE);
        launched.map(drop).map_err(|failed| failed.error)
    }

    /// Why there is no keeper from now on: another attempt would read the same entry.
    fn not_kept(&self, unread: &Error) -> Error {
        let device = format!("/dev/ublkb{}", self.id);
        let message = format!("{device} is not served again when its daemon dies: {unread:#}");
        let remedy =
            format!("when that happens: `recover {device}`, with the vhdx-ublk that wrote the entry");
        Error::new(Kind::Unsupported, message).remedy(remedy)
    }

    /// Has `program` serve the device of `entry`, if that still waits when nothing else is under way. How
    /// long to wait then.
    fn serve_again(&self, entry: &Entry, program: &Program) -> Result<Option<Duration>> {
        if stop::waits_below(&self.registry, entry)?.is_some() {
            return Ok(Some(BELOW_INTERVAL));
        }
        let _locks = match self.lock() {
            // That is no failure of the device.
            Err(error) if error.kind() == Kind::InUse => return Ok(Some(BELOW_INTERVAL)),
            locks => locks?,
        };
        if self.look()?.is_none_or(|listed| listed.entry.daemon.is_alive()) {
            return Ok(Some(Duration::ZERO));
        }
        let number = ["--".into(), self.id.to_string().into()];
        let arguments = self.recover.iter().cloned().chain(number);
        let launched = launch::launch_program(program, FirstArgument::USUAL, arguments, READY_DEADLINE);
        launched.map(|_| Some(Duration::ZERO)).map_err(|failed| failed.error)
    }

    /// Keeps an upgrade and a removal of the device out, and waits for one that is under way.
    fn lock(&self) -> Result<(Flock<File>, Option<Flock<File>>)> {
        Ok((self.registry.keep_upgrades_out()?, self.registry.hold_keeper(self.id)?))
    }

    fn give_up(&self, error: &Error) -> Error {
        let (id, attempts) = (self.id, self.attempts);
        let message = format!(
            "/dev/ublkb{id} is not served again: {attempts} attempts in a row have failed: {error:#}"
        );
        Error::new(error.kind(), message)
            .remedy(format!("its I/O waits for `vhdx-ublk recover /dev/ublkb{id}`"))
    }
}

/// Waits for the end of the daemon; how long that took.
fn await_end(entry: &Entry) -> Result<Duration> {
    let began = Instant::now();
    let Ok(handle) = ProcessHandle::open(entry.daemon.pid) else { return Ok(Duration::ZERO) };
    // The handle may be on a later process of this number.
    if entry.daemon.is_alive() {
        handle.await_end().doing(format!("waiting for the end of process {}", entry.daemon.pid))?;
    }
    Ok(began.elapsed())
}

/// A series of failures.
struct Series {
    failures: u32,
    most: u32,
}

impl Series {
    /// How long to wait after the death of a daemon that `lived` that long; none if there were too many.
    fn after_death(&mut self, lived: Duration) -> Option<Duration> {
        if lived >= STEADY {
            self.failures = 0;
            return Some(Duration::ZERO);
        }
        self.next(LONGEST_AFTER_DEATH)
    }

    /// The same after one that could not begin to serve.
    fn after_failure(&mut self) -> Option<Duration> {
        self.next(LONGEST_AFTER_FAILURE)
    }

    fn next(&mut self, longest: Duration) -> Option<Duration> {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.failures.min(16));
        self.failures += 1;
        (self.failures < self.most).then(|| pause.min(longest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::registry::entry;

    #[test]
    fn failures_in_a_row_are_bounded_and_each_is_waited_for_longer() {
        let mut series = Series { failures: 0, most: ATTEMPTS };
        let pauses: Vec<Duration> = std::iter::from_fn(|| series.after_failure()).collect();
        assert_eq!(pauses.len(), ATTEMPTS as usize - 1);
        assert!(pauses.is_sorted() && pauses[0] == FIRST_PAUSE);
        assert_eq!(pauses.last(), Some(&LONGEST_AFTER_FAILURE));
    }

    #[test]
    fn a_daemon_that_has_lived_begins_a_new_series_and_deaths_are_not_waited_for_long() {
        let mut series = Series { failures: 0, most: ATTEMPTS };
        for _ in 0..3 * ATTEMPTS {
            assert_eq!(series.after_death(STEADY), Some(Duration::ZERO));
            for _ in 1..ATTEMPTS {
                assert!(series.after_death(Duration::ZERO).is_some_and(|pause| pause <= LONGEST_AFTER_DEATH));
            }
        }
        assert_eq!(series.after_death(Duration::ZERO), None, "it is the last of a series");
    }

    #[test]
    fn a_device_that_cannot_be_recovered_has_no_keeper() {
        Keeper::refuse_unrecoverable(&entry(3)).expect("it can");
        let error = Keeper::refuse_unrecoverable(&Entry { recovery: Recovery::None, ..entry(3) });
        assert_eq!(error.expect_err("refused").kind(), Kind::Unsupported);
        assert_eq!(refuse_useless(Some(Recovery::None)).expect_err("refused").kind(), Kind::Usage);
        refuse_useless(None).expect("no service manager has started this test");
    }
}
