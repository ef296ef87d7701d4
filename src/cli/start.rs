//! `start`: serves a disk of `/etc/vhdxtab`, as the unit `vhdx-ublk@NAME.service` does.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use clap::Parser;
use schemars::JsonSchema;
use serde::Serialize;
use vhdx_ublk::device::claims;
use vhdx_ublk::device::confine;
use vhdx_ublk::device::launch;
use vhdx_ublk::device::name::Name;
use vhdx_ublk::device::registry::{Listed, Registry, State};
use vhdx_ublk::device::service_manager;
use vhdx_ublk::device::spec::Ready;
use vhdx_ublk::device::stop::Target;
use vhdx_ublk::device::upgrade::leave_requests;
use vhdx_ublk::disk::HostFile;
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::system::table::{self, Disk, Table};

use super::add::Add;
use super::recover::Recover;
use super::{SUCCESS, WAITING, logging, notify, output, upgrade};

/// Serve a disk of /etc/vhdxtab.
///
/// If the device of this name waits for a daemon, because the one before was killed, it is recovered.
/// Otherwise it is added, with the image and the options of its line. With --foreground, a device that
/// another daemon serves is taken over while it is in use.
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
3 the device waits for a daemon, and this one could not serve it, or it has another daemon by now.";

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
        let found = device(&self.name)?;
        // A device that waits is recovered whatever the table says by now: it may be in use.
        if let Some(listed) = found.as_ref().filter(|listed| listed.is_abandoned()) {
            return self.recover(listed);
        }
        let disk = Table::read(Path::new(table::PATH))?.find(self.name.as_str().as_ref())?;
        if self.foreground && found.is_some_and(|listed| serves(&listed, &disk)) {
            return self.succeed();
        }
        if !self.foreground {
            return self.print(add_of(&disk)?.launch()?.device, false);
        }
        self.serve(&Cell::new(false), |ready| add_of(&disk)?.serve_here(ready))
    }

    fn recover(&self, listed: &Listed) -> Result<u8> {
        let recover = Recover::of_device(listed.entry.id);
        if !self.foreground {
            return self.print(recover.launch(listed)?.device, true);
        }
        Registry::open()?.forget_request(listed.entry.id)?;
        self.serve(&Cell::new(true), |ready| recover.serve_here(ready))
    }

    /// Takes the device over from a daemon that the unit does not watch. It may be one of this unit: the
    /// service manager does not learn of a process that has ended before the message about it was read.
    fn succeed(&self) -> Result<u8> {
        let registry = Registry::open()?;
        let alone = match registry.lock_upgrades() {
            Ok(alone) => alone,
            Err(error) => {
                output::report(&error, false);
                return Ok(WAITING);
            }
        };
        let listed = claims::find(&Target::Name(self.name.clone(), None))?;
        if listed.is_abandoned() {
            drop(alone);
            return self.recover(&listed);
        }
        refuse_other_service(&listed)?;
        let is_up = Cell::new(false);
        confine::prepare();
        self.serve(&is_up, |ready| {
            let id = listed.entry.id;
            let taken_over = upgrade::prepare(&registry, &listed).and_then(|next| next.take_over(&registry));
            let served = taken_over.and_then(|taken_over| {
                is_up.set(true);
                // What the daemon before was asked is older than this start.
                registry.forget_request(id)?;
                upgrade::continue_to_serve(taken_over, move |served| {
                    drop(alone);
                    ready(served)
                })
            });
            served.inspect_err(|_| leave_requests(&registry, &listed.entry))
        })
    }

    /// Serves from this process by `here`. If that fails while there is a device that `is_up`, another
    /// attempt may be successful.
    fn serve(
        &self,
        is_up: &Cell<bool>,
        here: impl FnOnce(&dyn Fn(&Ready) -> Result<()>) -> Result<()>,
    ) -> Result<u8> {
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
            Ok(()) if launch::has_handed_over() => Ok(WAITING),
            outcome => outcome.map(|()| SUCCESS),
        }
    }
}

impl Start {
    fn print(&self, device: PathBuf, recovered: bool) -> Result<u8> {
        if self.json {
            output::print_json(&Answer { name: self.name.clone(), device, recovered })?;
        } else {
            output::print(&device.display().to_string())?;
        }
        Ok(SUCCESS)
    }
}

/// The device of that name.
fn device(name: &Name) -> Result<Option<Listed>> {
    Ok(claims::devices()?.into_iter().find(|listed| listed.entry.name.as_ref() == Some(name)))
}

/// Whether the device serves the image of `disk`, or one that a snapshot has made of it.
fn serves(listed: &Listed, disk: &Disk) -> bool {
    listed.state == State::Live && HostFile::at(&disk.image).is_ok_and(|file| listed.entry.reads(file))
}

/// Another unit would start its daemon again as soon as this one has its device.
fn refuse_other_service(listed: &Listed) -> Result<()> {
    let (entry, device) = (&listed.entry, listed.entry.device.display());
    if entry.notify_socket.is_none() || !service_manager::is_elsewhere(entry.daemon.pid) {
        return Ok(());
    }
    let pid = entry.daemon.pid;
    let message = format!("{device} is served by another unit (its daemon is process {pid})");
    Err(Error::new(Kind::InUse, message).remedy(format!("`systemctl status {pid}` shows it: stop it first")))
}

/// Whether there is a device of that name still, which was not taken down.
fn has_device(name: &Name) -> bool {
    let named = |listed: &Listed| listed.entry.name.as_ref() == Some(name) && listed.entry.failure.is_none();
    claims::devices().is_ok_and(|devices| devices.iter().any(named))
}
