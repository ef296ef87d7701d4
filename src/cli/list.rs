//! `list`: our devices.

use std::path::PathBuf;
use std::thread;
use std::time::SystemTime;

use anyhow::Result;
use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::health::{Condition, Grade, Health};
use vhdx_ublk::device::job::Progress;
use vhdx_ublk::device::name::Name;
use vhdx_ublk::device::registry::{Listed, Registry, State, Survey, Unreadable};
use vhdx_ublk::device::warnings::Warning;
use vhdx_ublk::device::{DeviceInfo, KernelState, Recovery, claims, path};
use vhdx_ublk::engine::port_counts::Shortage;
use vhdx_ublk::printable::human_size;

use super::{FAILURE, SUCCESS, output};

/// List the devices of this program.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct List {
    /// As JSON: an array of objects, errors too
    #[arg(long)]
    pub json: bool,
    /// Show by the exit status whether all devices are healthy
    #[arg(long)]
    check: bool,
}

/// The most characters of a warning in a row.
const MAX_WARNING: usize = 60;

/// With `--check`: a device is dead.
const DEAD: u8 = 2;

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk list
  vhdx-ublk list --check || echo 'a device needs a look'

States: live (served), starting, stopping, quiesced (the daemon was killed: I/O waits for
`recover`), fail-io (the same, but I/O fails until `recover`), dead (the daemon was killed, and
I/O fails: `del` removes the device), failed (the device is removed, but its image could not be
closed cleanly: `del` shows why), unknown (the driver or the entry of the device cannot be read).

Health: ok, host-full (writes that need room fail, or wait, with `add --on-full wait`: then it says
how many, and for how long), poisoned (a sync or metadata write failed: writes fail until the
device is removed and added again), waiting (for `recover`), stopped (a signal stopped the daemon),
no-answer (the daemon did not answer within a second), dead, unknown.

JSON: id, device, name (null or a text), image, pid, state, health, short_of_room (null, or the
requests that wait for room: requests, since in seconds since 1970), last_error (null or a text),
last_warning (null, or time in seconds since 1970, and text, at most 200 characters), job (null,
or what is done on the image while it is served: job (compact, merge), done_bytes, total_bytes,
file_bytes), queues, depth, read_only, salvage (`add --salvage`), zero_copy, recovery, size
(bytes), version (of the program that serves it: `vhdx-ublk upgrade` replaces an old one), failure
(null, or why the image could not be closed or the entry could not be read), merging (null, or the
layer of its chain whose merge is under way or was interrupted). If only the kernel knows the
device, all but id, device, state, health are null. A path that is not UTF-8 is an object: lossy (a
text), hex (its bytes).
Exit status: 0 success, 1 failure, 2 wrong usage. With --check: 0 all devices are healthy, 1 some
are not, or it is unknown, 2 some are dead.";

/// A device as it is shown.
#[derive(Serialize, JsonSchema)]
pub struct Row {
    id: u32,
    device: PathBuf,
    name: Option<Name>,
    #[serde(with = "path::optional")]
    #[schemars(with = "Option<path::WrittenPath>")]
    image: Option<PathBuf>,
    pid: Option<u32>,
    state: State,
    health: Health,
    /// The requests that wait until the host has room, if any do.
    short_of_room: Option<Shortage>,
    last_error: Option<String>,
    /// The last warning of its daemon.
    last_warning: Option<Warning>,
    /// What its daemon does on the image beside serving it.
    job: Option<Progress>,
    queues: Option<u16>,
    depth: Option<u16>,
    read_only: Option<bool>,
    salvage: Option<bool>,
    zero_copy: Option<bool>,
    recovery: Option<Recovery>,
    size: Option<u64>,
    /// The version of the program that serves it.
    version: Option<String>,
    /// The layer of its chain that is being merged, or was when its daemon was killed.
    #[serde(with = "path::optional")]
    #[schemars(with = "Option<path::WrittenPath>")]
    merging: Option<PathBuf>,
    failure: Option<String>,
}

impl Row {
    fn of(Listed { entry, state }: Listed, condition: Condition) -> Self {
        Self {
            id: entry.id,
            device: entry.device,
            name: entry.name,
            image: Some(entry.image),
            pid: Some(entry.daemon.pid),
            state,
            health: condition.health,
            short_of_room: condition.short_of_room,
            last_error: condition.last_error,
            last_warning: condition.last_warning,
            job: condition.job,
            queues: Some(entry.queues),
            depth: Some(entry.depth),
            read_only: Some(entry.read_only),
            salvage: Some(entry.salvage.is_some()),
            zero_copy: Some(entry.zero_copy),
            recovery: Some(entry.recovery),
            size: Some(entry.size_bytes),
            version: Some(entry.version),
            merging: entry.merging.map(|merging| merging.layer),
            failure: entry.failure,
        }
    }

    /// A device of which nothing is known but its number.
    fn unknown(id: u32, failure: String) -> Self {
        Self {
            id,
            device: format!("/dev/ublkb{id}").into(),
            name: None,
            image: None,
            pid: None,
            state: State::Unknown,
            health: Health::Unknown,
            short_of_room: None,
            last_error: None,
            last_warning: None,
            job: None,
            queues: None,
            depth: None,
            read_only: None,
            salvage: None,
            zero_copy: None,
            recovery: None,
            size: None,
            version: None,
            merging: None,
            failure: Some(failure),
        }
    }

    fn orphan(info: DeviceInfo) -> Self {
        let (state, health) = match info.state {
            KernelState::Live => (State::Live, Health::Unknown),
            KernelState::Dead => (State::Dead, Health::Dead),
            KernelState::Quiesced => (State::Quiesced, Health::Waiting),
            KernelState::FailIo => (State::FailIo, Health::Waiting),
            KernelState::Unknown => (State::Unknown, Health::Unknown),
        };
        let unknown = Self::unknown(info.id, "no entry names its image".into());
        Self {
            pid: info.server,
            state,
            health,
            queues: Some(info.queues),
            depth: Some(info.depth),
            ..unknown
        }
    }
}

impl List {
    /// Runs the command; returns the exit status.
    pub fn run(self) -> Result<u8> {
        let devices = match claims::registry()? {
            Some(registry) => rows(&registry, registry.survey()?),
            None => Vec::new(),
        };
        if self.json {
            output::print_json(&devices)?;
        } else if !devices.is_empty() {
            let rows = devices.iter().map(row).collect::<Result<Vec<_>>>()?;
            output::print(&output::table(
                [
                    "DEVICE", "NAME", "STATE", "HEALTH", "MODE", "SIZE", "QUEUES", "DEPTH", "PID", "VERSION",
                    "IMAGE", "WARNING",
                ],
                &rows,
            ))?;
        }
        Ok(if self.check { status(&devices) } else { SUCCESS })
    }
}

/// The worst decides.
fn status(devices: &[Row]) -> u8 {
    match devices.iter().map(|device| device.health.grade()).max() {
        None | Some(Grade::Well) => SUCCESS,
        Some(Grade::Degraded) => FAILURE,
        Some(Grade::Dead) => DEAD,
    }
}

/// Everything that is known, in the order of the devices' numbers. All daemons are asked at once.
fn rows(registry: &Registry, survey: Survey) -> Vec<Row> {
    let Survey { devices, orphans, unreadable } = survey;
    let conditions: Vec<Condition> = thread::scope(|scope| {
        let ask = |listed| scope.spawn(move || Condition::of(registry, listed));
        let asked: Vec<_> = devices.iter().map(ask).collect();
        asked.into_iter().map(|thread| thread.join().expect("a panic ends the process")).collect()
    });
    let mut rows: Vec<Row> =
        devices.into_iter().zip(conditions).map(|(listed, condition)| Row::of(listed, condition)).collect();
    rows.extend(orphans.into_iter().map(Row::orphan));
    for Unreadable { id, error } in unreadable {
        match rows.iter_mut().find(|row| row.id == id) {
            Some(row) => row.failure = Some(format!("{error:#}")),
            None => rows.push(Row::unknown(id, format!("{error:#}"))),
        }
    }
    rows.sort_by_key(|row| row.id);
    rows
}

fn row(device: &Row) -> Result<[String; 12]> {
    fn text<T: ToString>(value: Option<T>) -> String {
        value.map_or_else(|| "?".into(), |value| value.to_string())
    }
    let mode = match (device.read_only, device.salvage) {
        (_, Some(true)) => Some("salvage"),
        (read_only, _) => read_only.map(|read_only| if read_only { "read-only" } else { "read-write" }),
    };
    let image = device.image.as_ref().map(|image| image.display().to_string());
    let failure = device.failure.clone().unwrap_or_default();
    Ok([
        device.device.display().to_string(),
        device.name.as_ref().map_or_else(|| "-".into(), Name::to_string),
        match device.job {
            Some(job) => format!("{} ({job})", output::word(&device.state)?),
            None => output::word(&device.state)?,
        },
        match device.short_of_room {
            Some(shortage) => format!("{} ({})", output::word(&device.health)?, waiting(shortage)),
            None => output::word(&device.health)?,
        },
        text(mode),
        text(device.size.map(human_size)),
        text(device.queues),
        text(device.depth),
        text(device.pid),
        text(device.version.clone()),
        image.unwrap_or_else(|| format!("? ({failure})")),
        device.last_warning.as_ref().map_or_else(|| "-".into(), |warning| short(&warning.text)),
    ])
}

/// How many requests wait for room, and for how long.
pub(super) fn waiting(Shortage { requests, since }: Shortage) -> String {
    let now = SystemTime::UNIX_EPOCH.elapsed().map_or(since, |now| now.as_secs());
    format!("{requests} wait for room, for {} s", now.saturating_sub(since))
}

/// What fits a line.
fn short(text: &str) -> String {
    match text.char_indices().nth(MAX_WARNING) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// A device for tests.
#[cfg(test)]
pub mod testing {
    use vhdx_ublk::device::OnFull;
    use vhdx_ublk::device::reclaim::Reclaim;
    use vhdx_ublk::device::registry::{ENTRY_FORMAT, Entry, ProcessId};
    use vhdx_ublk::disk::{HostFile, Sparse};

    use super::*;

    pub fn listed() -> Listed {
        let entry = Entry {
            format: ENTRY_FORMAT,
            id: 3,
            device: "/dev/ublkb3".into(),
            name: "data".parse().ok(),
            for_mount: false,
            private: false,
            image: "/images/disk.vhdx".into(),
            parents: Vec::new(),
            parent_files: Vec::new(),
            mount_namespace: 0,
            private_mounts: false,
            image_file: HostFile { device: 1, inode: 2 },
            daemon: ProcessId { pid: 1234, start_time: 5678, namespace: 0 },
            queues: 2,
            depth: 64,
            size_bytes: 1 << 30,
            read_only: true,
            salvage: None,
            no_partitions: false,
            recovery: Recovery::None,
            reclaim: Reclaim::OFF,
            on_full: OnFull::Fail,
            zero_copy: true,
            sparse: Sparse::Auto,
            file_write_guid: uuid::Uuid::nil(),
            disk_id: uuid::Uuid::nil(),
            disk_sequence: None,
            mark: 0,
            notify_socket: None,
            version: "0.1.0".into(),
            started: true,
            failure: None,
            merging: None,
        };
        Listed { entry, state: State::FailIo }
    }
}

#[cfg(test)]
mod tests {
    use vhdx_ublk::device::job::JobKind;
    use vhdx_ublk::error::{Error, Kind};

    use super::testing::listed;
    use super::*;

    fn condition() -> Condition {
        let last_warning = Some(Warning { time: 7, text: "w".repeat(61) });
        let job = Progress { job: JobKind::Compact, done_bytes: 1, total_bytes: 4, file_bytes: 9 };
        Condition {
            health: Health::Waiting,
            last_error: Some("no room".into()),
            last_warning,
            job: Some(job),
            short_of_room: None,
        }
    }

    #[test]
    fn json_has_the_documented_keys() {
        let json = serde_json::to_value([Row::of(listed(), condition())]).expect("serialisable");
        let expected = serde_json::json!([{
            "id": 3, "device": "/dev/ublkb3", "name": "data", "image": "/images/disk.vhdx", "pid": 1234,
            "state": "fail-io", "health": "waiting", "short_of_room": null, "last_error": "no room",
            "queues": 2, "depth": 64,
            "last_warning": {"time": 7, "text": "w".repeat(61)},
            "job": {"job": "compact", "done_bytes": 1, "total_bytes": 4, "file_bytes": 9},
            "read_only": true, "salvage": false, "zero_copy": true, "recovery": "none",
            "size": 1_073_741_824, "merging": null, "failure": null,
            "version": "0.1.0",
        }]);
        assert_eq!(json, expected);
        let json = serde_json::to_value(Row::unknown(1, "damaged".into())).expect("serialisable");
        assert_eq!((&json["image"], &json["state"]), (&serde_json::Value::Null, &"unknown".into()));
    }

    #[test]
    fn a_row_says_the_same() {
        let known = row(&Row::of(listed(), condition())).expect("every state has a name");
        let expected = "/dev/ublkb3 data fail-io (compacting, 25 %) waiting read-only 1 GiB 2 64 1234 0.1.0 \
                        /images/disk.vhdx";
        assert_eq!(known.join(" "), format!("{expected} {}...", "w".repeat(60)));
        let salvage = Row { salvage: Some(true), ..Row::of(listed(), condition()) };
        assert_eq!(row(&salvage).expect("every state has a name")[4], "salvage");
        let short_of_room = Some(Shortage { requests: 3, since: u64::MAX });
        let full = Row { health: Health::HostFull, short_of_room, ..Row::of(listed(), condition()) };
        assert_eq!(row(&full).expect("as well")[3], "host-full (3 wait for room, for 0 s)");
        let unknown = row(&Row::unknown(1, "damaged".into())).expect("as well");
        assert_eq!(unknown.join(" "), "/dev/ublkb1 - unknown unknown ? ? ? ? ? ? ? (damaged) -");
    }

    #[test]
    fn what_cannot_be_read_is_listed_once_and_hides_nothing() {
        let place = tempfile::tempdir().expect("a directory");
        std::fs::set_permissions(place.path(), std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .expect("ours");
        let registry = Registry::at(place.path()).expect("ours");
        let orphan = DeviceInfo {
            id: 5,
            queues: 1,
            depth: 8,
            request_bytes: 4096,
            flags: 0,
            state: KernelState::Quiesced,
            mark: 0,
            server: None,
        };
        let damaged = |id| Unreadable { id, error: Error::new(Kind::Corrupt, "damaged") };
        let survey = Survey {
            devices: vec![listed()],
            orphans: vec![orphan],
            unreadable: vec![damaged(1), damaged(5)],
        };
        let rows = rows(&registry, survey);
        assert_eq!(rows.iter().map(|row| row.id).collect::<Vec<_>>(), [1, 3, 5]);
        assert_eq!(rows[2].failure.as_deref(), Some("damaged"));
        assert_eq!(rows[2].state, State::Quiesced);
    }

    #[test]
    fn the_worst_device_decides_the_exit_status() {
        let with = |health| Row { health, ..Row::unknown(0, String::new()) };
        assert_eq!(status(&[]), 0);
        assert_eq!(status(&[with(Health::Ok)]), 0);
        assert_eq!(status(&[with(Health::Ok), with(Health::Poisoned)]), 1);
        assert_eq!(status(&[with(Health::Dead), with(Health::Ok), with(Health::Waiting)]), 2);
    }
}
