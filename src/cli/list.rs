//! `list`: our devices.

use std::path::PathBuf;

use serde::Serialize;

use vhdx_ublk::device::registry::{Listed, State};
use vhdx_ublk::error::{Error, Result};

use super::{holders, output, size};

/// List the devices of this program.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct List {
    /// As JSON: an array of objects, errors too
    #[arg(long)]
    pub json: bool,
}

const AFTER_HELP: &str = "\
States: live (served), starting, stopping, quiesced (its daemon was killed: I/O waits for
`recover`), dead (its daemon was killed, and its I/O has failed: `del` removes it), failed (it
is gone, but its image could not be closed cleanly: `del` tells why).

JSON: id, device, image, pid, state, queues, depth, read_only, zero_copy, size (bytes), failure
(null or a text).
Exit status: 0 success, 1 failure, 2 wrong usage.";

/// A device as it is shown.
#[derive(Serialize)]
struct Row {
    id: u32,
    device: PathBuf,
    image: PathBuf,
    pid: u32,
    state: State,
    queues: u16,
    depth: u16,
    read_only: bool,
    zero_copy: bool,
    size: u64,
    failure: Option<String>,
}

impl From<Listed> for Row {
    fn from(Listed { entry, state }: Listed) -> Self {
        Self {
            id: entry.id,
            device: entry.device,
            image: entry.image,
            pid: entry.daemon.pid,
            state,
            queues: entry.queues,
            depth: entry.depth,
            read_only: entry.read_only,
            zero_copy: entry.zero_copy,
            size: entry.size_bytes,
            failure: entry.failure,
        }
    }
}

impl List {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let devices: Vec<Row> = holders::devices()?.into_iter().map(Row::from).collect();
        if self.json {
            return output::print_json(&devices);
        }
        if devices.is_empty() {
            return Ok(());
        }
        let rows = devices.iter().map(row).collect::<Result<Vec<_>>>()?;
        output::print(&output::table(
            ["DEVICE", "STATE", "MODE", "SIZE", "QUEUES", "DEPTH", "PID", "IMAGE"],
            &rows,
        ))
    }
}

fn row(device: &Row) -> Result<[String; 8]> {
    Ok([
        device.device.display().to_string(),
        word(device.state)?,
        if device.read_only { "read-only" } else { "read-write" }.into(),
        size::human(device.size),
        device.queues.to_string(),
        device.depth.to_string(),
        device.pid.to_string(),
        device.image.display().to_string(),
    ])
}

/// The state's name, the same as in JSON.
fn word(state: State) -> Result<String> {
    let value = serde_json::to_value(state).map_err(|error| Error::io("naming a state", error.into()))?;
    Ok(value.as_str().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use vhdx_ublk::device::Recovery;
    use vhdx_ublk::device::registry::{Entry, FileId, ProcessId};

    use super::*;

    fn listed() -> Listed {
        let entry = Entry {
            id: 3,
            device: "/dev/ublkb3".into(),
            image: "/images/disk.vhdx".into(),
            parents: Vec::new(),
            image_file: FileId { device: 1, inode: 2 },
            daemon: ProcessId { pid: 1234, start_time: 5678 },
            queues: 2,
            depth: 64,
            size_bytes: 1 << 30,
            read_only: true,
            recovery: Recovery::None,
            zero_copy: true,
            file_write_guid: uuid::Uuid::nil(),
            mark: 0,
            version: "0.1.0".into(),
            started: true,
            failure: None,
        };
        Listed { entry, state: State::FailIo }
    }

    #[test]
    fn json_has_the_documented_keys() {
        let json = serde_json::to_value([Row::from(listed())]).expect("serialisable");
        let expected = serde_json::json!([{
            "id": 3, "device": "/dev/ublkb3", "image": "/images/disk.vhdx", "pid": 1234, "state": "fail-io",
            "queues": 2, "depth": 64, "read_only": true, "zero_copy": true, "size": 1_073_741_824,
            "failure": null,
        }]);
        assert_eq!(json, expected);
    }

    #[test]
    fn a_row_says_the_same() {
        let row = row(&Row::from(listed())).expect("every state has a name");
        assert_eq!(row.join(" "), "/dev/ublkb3 fail-io read-only 1 GiB 2 64 1234 /images/disk.vhdx");
    }
}
