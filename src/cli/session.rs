//! `session`: the session files of killed and of living daemons.

use std::path::PathBuf;

use anyhow::Result;
use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::claims;
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::device::registry::Listed;
use vhdx_ublk::device::session::{self, Kept, KeptState};
use vhdx_ublk::error::{Error, Kind};
use vhdx_ublk::printable::human_size;

use super::output;

/// List or discard sessions: the memory that outlives a killed daemon.
///
/// A session holds acknowledged writes that are not in the image yet. It is removed when its device is
/// removed cleanly, and is lost when the machine loses power.
#[derive(clap::Args)]
pub struct Sessions {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    List(List),
    Discard(Discard),
}

/// List the sessions.
#[derive(clap::Args)]
#[command(after_help = LIST_HELP)]
struct List {
    /// As JSON: an array of objects, errors too
    #[arg(long)]
    json: bool,
}

const LIST_HELP: &str = "\
Examples:
  vhdx-ublk session list

States: live (a daemon uses it), waiting (its device waits for `recover`), orphan (its device is
removed: `add` takes it over), idle (the image has everything), poisoned (a write failed),
outdated (from before the last boot), incomplete, other-version (created by another version of
vhdx-ublk), damaged.

JSON: name, state, device (null, or the device that uses it or waits), image (null, or its path
when the session was created), memory (bytes), version (null, or the version of the layout).
Exit status: 0 success, 1 failure, 2 wrong usage.";

/// Discard sessions: acknowledged writes that were not flushed are lost.
#[derive(clap::Args)]
#[command(after_help = DISCARD_HELP)]
struct Discard {
    /// The names of the sessions, as `vhdx-ublk session list` prints them
    #[arg(required = true)]
    names: Vec<String>,
    /// Discard sessions of devices that are served or wait: these cannot be recovered then
    #[arg(short, long)]
    force: bool,
    /// As JSON: an array of the discarded names, errors too
    #[arg(long)]
    json: bool,
}

const DISCARD_HELP: &str = "\
Examples:
  vhdx-ublk session discard NAME    as `vhdx-ublk session list` shows it

Flushed writes are in the image and stay there. Discard a session that is damaged, or whose image
was deleted. If another version of vhdx-ublk created the session, use that version to take it over.
JSON: an array of the discarded names.
Exit status: 0 all sessions are discarded, 1 some remain, 2 wrong usage.";

/// A session as it is shown.
#[derive(Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Row {
    name: String,
    state: State,
    device: Option<PathBuf>,
    image: Option<WrittenPath>,
    memory: u64,
    version: Option<u64>,
}

/// What a session is worth, as far as files and devices tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
enum State {
    /// Its device waits for its daemon to be replaced.
    Waiting,
    #[serde(untagged)]
    Kept(KeptState),
}

impl Row {
    fn of(kept: Kept, devices: &[Listed]) -> Self {
        let (device, inode) = kept.file;
        let is_its = |listed: &&Listed| {
            (listed.entry.image_file.device, listed.entry.image_file.inode) == (device, inode)
        };
        let listed = devices.iter().find(is_its);
        let waits = kept.state != KeptState::Live && listed.is_some_and(Listed::is_abandoned);
        Self {
            name: kept.name,
            state: if waits { State::Waiting } else { State::Kept(kept.state) },
            device: listed.map(|listed| listed.entry.device.clone()),
            image: kept.image.map(WrittenPath::of),
            memory: kept.memory_bytes,
            version: kept.version,
        }
    }
}

impl Sessions {
    /// Runs the command.
    pub fn run(&self) -> Result<()> {
        match &self.command {
            Command::List(list) => list.run(),
            Command::Discard(discard) => discard.run(),
        }
    }
}

fn rows() -> Result<Vec<Row>> {
    // Fails for a caller that may not read the registry.
    let devices = claims::devices()?;
    Ok(session::kept()?.into_iter().map(|kept| Row::of(kept, &devices)).collect())
}

impl List {
    fn run(&self) -> Result<()> {
        let rows = rows()?;
        if self.json {
            return Ok(output::print_json(&rows)?);
        }
        if rows.is_empty() {
            return Ok(());
        }
        let cells = rows.iter().map(cells).collect::<Result<Vec<_>>>()?;
        Ok(output::print(&output::table(["NAME", "STATE", "DEVICE", "MEMORY", "IMAGE"], &cells))?)
    }
}

fn cells(row: &Row) -> Result<[String; 5]> {
    let device = row.device.as_ref().map(|device| device.display().to_string());
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    Ok([
        row.name.clone(),
        output::word(&row.state)?,
        or_none(device),
        human_size(row.memory),
        or_none(row.image.as_ref().map(|image| image.text().to_owned())),
    ])
}

impl Discard {
    fn run(&self) -> Result<()> {
        let rows = rows()?;
        let mut gone = Vec::new();
        let outcomes = self.names.iter().map(|name| {
            self.discard(name, &rows)?;
            gone.push(name);
            Ok(())
        });
        output::last_failure(outcomes)?;
        if self.json {
            output::print_json(&gone)?;
        }
        Ok(())
    }

    fn discard(&self, name: &str, rows: &[Row]) -> vhdx_ublk::error::Result<()> {
        let row = rows.iter().find(|row| row.name == name);
        if let Some(row) = row.filter(|row| !self.force && row.state.is_needed()) {
            let whose = row.device.as_ref().map_or("a daemon".into(), |device| device.display().to_string());
            let message = format!("{whose} needs the session {name}");
            return Err(Error::new(Kind::InUse, message).remedy(
                "`vhdx-ublk del` removes the device and closes its image; with --force the session is \
                 discarded, and the device cannot be recovered",
            ));
        }
        session::discard(name)
    }
}

impl State {
    fn is_needed(self) -> bool {
        matches!(self, Self::Waiting | Self::Kept(KeptState::Live))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_shown_as_documented() {
        let kept = Kept {
            name: "2-00000000000000000000000000000001-3.session".into(),
            state: KeptState::OtherVersion,
            image: None,
            file: (3, 2),
            memory_bytes: 8192,
            version: Some(7),
        };
        let row = Row::of(kept, &[]);
        let json = serde_json::to_value(&row).expect("serialisable");
        let expected = serde_json::json!({
            "name": "2-00000000000000000000000000000001-3.session", "state": "other-version", "device": null,
            "image": null, "memory": 8192, "version": 7,
        });
        assert_eq!(json, expected);
        assert_eq!(output::word(&State::Waiting).expect("a word"), "waiting");
        assert!(State::Waiting.is_needed() && !row.state.is_needed());
    }
}
