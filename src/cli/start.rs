//! `start`: serves a disk of `/etc/vhdxtab`, as the unit `vhdx-ublk@NAME.service` does.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use clap::Parser;
use schemars::JsonSchema;
use serde::Serialize;
use vhdx_ublk::device::claims;
use vhdx_ublk::device::name::Name;
use vhdx_ublk::device::registry::Listed;
use vhdx_ublk::device::spec::Ready;
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::system::table::{self, Disk, Table};

use super::add::Add;
use super::recover::Recover;
use super::{SUCCESS, logging, notify, output};

/// The exit status if the device waits for a daemon: another attempt may be successful.
const WAITING: u8 = 3;

/// Serve a disk of /etc/vhdxtab.
///
/// If the device of this name waits for a daemon, because the one before was killed, it is recovered.
/// Otherwise it is added, with the image and the options of its line.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Start {
    /// The name of the disk
    name: Name,
    /// Serve from this process until it is asked to end, as a unit of systemd does (Type=notify)
    #[arg(short, long)]
    foreground: bool,
    /// As JSON: one object, errors too
    #[arg(long, conflicts_with = "foreground")]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk enable data /images/data.vhdx
  vhdx-ublk start data

Where systemd runs the machine, use `systemctl start vhdx-ublk@NAME`: it starts the daemon again
if that is killed.
JSON: name, device, recovered (whether the device was there, and waited for a daemon).
Exit status: 0 the device can be used (with --foreground: it has ended), 1 failure, 2 wrong usage,
3 the device waits for a daemon, and this one could not serve it.";

/// What a line of the table says after its name and image.
#[derive(Parser)]
#[command(no_binary_name = true)]
struct Words {
    #[command(flatten)]
    add: Add,
}

/// The command that serves `disk`.
///
/// # Errors
///
/// [`Kind::Usage`] if an option of its line is not one of `add`.
pub fn add_of(disk: &Disk) -> Result<Add> {
    let words = Words::try_parse_from(disk.arguments()).map_err(|error| {
        let text = error.to_string();
        let reason = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        Error::new(Kind::Usage, format!("its options: {reason}")).remedy("`vhdx-ublk add --help` lists them")
    })?;
    Ok(words.add)
}

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Answer {
    /// The name of the disk.
    name: Name,
    /// `/dev/ublkbN`.
    device: PathBuf,
    /// Whether the device was there, and waited for a daemon.
    recovered: bool,
}

impl Start {
    /// Runs the command; returns the exit status.
    pub fn run(&self) -> Result<u8> {
        // A device that waits is recovered whatever the table says by now: it may be in use.
        if let Some(listed) = waiting(&self.name)? {
            let here =
                |ready: &dyn Fn(&Ready) -> Result<()>| Recover::of_device(listed.entry.id).serve_here(ready);
            return self.serve(true, here, || Recover::of_device(listed.entry.id).launch(&listed));
        }
        let disk = Table::read(Path::new(table::PATH))?.find(self.name.as_str().as_ref())?;
        self.serve(false, |ready| add_of(&disk)?.serve_here(ready), || add_of(&disk)?.launch())
    }

    /// Serves from this process by `here`, or has a daemon do it by `apart`.
    fn serve(
        &self,
        is_waiting: bool,
        here: impl FnOnce(&dyn Fn(&Ready) -> Result<()>) -> Result<()>,
        apart: impl FnOnce() -> Result<Ready>,
    ) -> Result<u8> {
        if !self.foreground {
            return self.print(apart()?.device, is_waiting).map(|()| SUCCESS);
        }
        let is_up = Cell::new(is_waiting);
        let ready = |ready: &Ready| {
            is_up.set(true);
            logging::serving(ready);
            notify::ready(ready);
            Ok(())
        };
        match here(&ready) {
            // The process ends although the device is there: whoever started it may start it again.
            Err(error) if is_up.get() && has_device(&self.name) => {
                output::report(&error, false);
                Ok(WAITING)
            }
            outcome => outcome.map(|()| SUCCESS),
        }
    }
}

impl Start {
    fn print(&self, device: PathBuf, recovered: bool) -> Result<()> {
        if !self.json {
            return output::print(&device.display().to_string());
        }
        output::print_json(&Answer { name: self.name.clone(), device, recovered })
    }
}

/// The device of that name, if its daemon was killed.
fn waiting(name: &Name) -> Result<Option<Listed>> {
    let named = |listed: &Listed| listed.entry.name.as_ref() == Some(name);
    Ok(claims::devices()?.into_iter().find(|listed| named(listed) && listed.is_abandoned()))
}

/// Whether there is a device of that name still, which was not taken down.
fn has_device(name: &Name) -> bool {
    let named = |listed: &Listed| listed.entry.name.as_ref() == Some(name) && listed.entry.failure.is_none();
    claims::devices().is_ok_and(|devices| devices.iter().any(named))
}
