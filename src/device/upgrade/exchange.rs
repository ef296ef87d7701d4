//! The command's part: starts the successor, and the old program if that fails.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Serialize;

use super::formats::Formats;
use crate::device::launch::{self, Failed, FirstArgument, Program, Stage};
use crate::device::process::Life;
use crate::device::registry::{Entry, Listed, Registry};
use crate::device::service_manager::GroupVisit;
use crate::device::socket;
use crate::error::{Error, Kind, Result};
use crate::machine;
use crate::printable::printable;

/// How long a successor may take: it waits for the daemon's last I/O, and as long for the kernel.
const READY_DEADLINE: Duration = Duration::from_secs(180);

/// How long to watch whether the daemon ends, when its successor has not said how far it came.
const WATCH: Duration = Duration::from_secs(3);

/// How long the daemon may take to end, once it has begun to hand its device over.
const END_PATIENCE: Duration = Duration::from_secs(50);

/// The upgrade of devices to one program.
pub struct Exchange {
    /// The new program.
    pub program: Program,
    /// What it reads.
    pub formats: Formats,
    /// How it is run as the successor of a device, whose number follows.
    pub succeed: Vec<OsString>,
    /// How any program is run to recover a device, whose number follows.
    pub recover: Vec<OsString>,
}

/// A device that was taken over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Upgraded {
    /// The N of `/dev/ublkbN`.
    pub id: u32,
    /// `/dev/ublkbN`.
    pub device: PathBuf,
    /// The version of the program that served it before.
    pub from: String,
    /// The version of the program that serves it now.
    pub to: String,
    /// How long requests had to wait at most, microseconds.
    pub pause_us: u64,
}

impl Exchange {
    /// Has the new program take over the device of `listed`. The caller keeps other upgrades out.
    ///
    /// # Errors
    ///
    /// Why it did not, and who serves the device now.
    pub fn upgrade(&self, listed: &Listed) -> Result<Upgraded> {
        let entry = &listed.entry;
        self.formats.check(entry)?;
        let old = Program::of_process(entry.daemon.pid)?;
        let first = FirstArgument::of_process(entry.daemon.pid);
        let arguments = with_id(&self.succeed, entry);
        // Otherwise it may be the program of a later process with this number.
        if !entry.daemon.is_alive() {
            let message = format!("the daemon of {} is gone", entry.device.display());
            let remedy = format!("vhdx-ublk recover {}", entry.device.display());
            return Err(Error::new(Kind::NotFound, message).remedy(remedy));
        }
        // A service whose control group is empty for a moment is over.
        let visit = GroupVisit::of(entry.daemon.pid);
        if let Err(error) = &visit {
            tracing::debug!("this process stays in its control group: {error}");
        }
        match launch::launch_program(&self.program, first, arguments, READY_DEADLINE) {
            Ok(ready) => Ok(Upgraded {
                id: entry.id,
                device: entry.device.clone(),
                from: printable(&entry.version).into(),
                to: printable(&self.formats.version).into(),
                pause_us: ready.pause_us.unwrap_or_default(),
            }),
            Err(Failed { error, stage }) => Err(self.after_failure(entry, (&old, first), error, stage)),
        }
    }

    /// Sees to it that the device is served, and says by which program.
    fn after_failure(
        &self,
        entry: &Entry,
        (old, first): (&Program, FirstArgument),
        error: Error,
        stage: Stage,
    ) -> Error {
        if stage == Stage::Before {
            return error;
        }
        let device = entry.device.display();
        let (begun, mut is_leaving) = (machine::now(), stage == Stage::Begun);
        while entry.daemon.life() != Life::Ended {
            let patience = if is_leaving { END_PATIENCE } else { WATCH };
            if machine::now().saturating_duration_since(begun) >= patience {
                if !is_leaving && leaves(entry) {
                    is_leaving = true;
                    continue;
                }
                let message = format!("{error:#}; the program before has not ended");
                return Error::new(error.kind(), message)
                    .remedy(format!("`vhdx-ublk list` shows whether {device} is served"));
            }
            machine::pause(Duration::from_millis(10));
        }
        match launch::launch_program(old, first, with_id(&self.recover, entry), READY_DEADLINE) {
            Ok(_) => {
                let mut message = format!("{error:#}; the program before serves {device} again");
                if Registry::open().is_ok_and(|registry| registry.request(entry.id, entry.mark).is_noted()) {
                    message.push_str(", and ends as it was asked to when nothing uses that");
                }
                let unit = "; its service manager watches it only if its unit has NotifyAccess=all";
                let unit = entry.notify_socket.as_ref().map_or("", |_| unit);
                let remedy = format!("nothing was lost; see the log of the device{unit}");
                Error::new(error.kind(), message).remedy(remedy)
            }
            Err(second) => {
                let message =
                    format!("{error:#}; the program before cannot continue either: {:#}", second.error);
                Error::new(error.kind(), message)
                    .remedy(format!("the I/O of {device} waits for `vhdx-ublk recover {device}`"))
            }
        }
    }
}

/// Whether the daemon, which has not ended, has begun to hand its device over. One that does not answer may
/// have: only a daemon that serves on is certain to say so.
fn leaves(entry: &Entry) -> bool {
    let status = Registry::open().and_then(|registry| socket::status(&registry.socket_path(entry.id)));
    status.map_or(true, |status| status.leaving)
}

fn with_id(arguments: &[OsString], entry: &Entry) -> Vec<OsString> {
    arguments.iter().cloned().chain(["--".into(), entry.id.to_string().into()]).collect()
}
