//! `enable` and `disable`: which disks are served from boot on.

use std::ffi::{OsStr, OsString};
use std::path::{self, Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::claims;
use vhdx_ublk::device::name::Name;
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::error::{Doing, Error, Kind, Locate, Result};
use vhdx_ublk::operations::named_file;
use vhdx_ublk::system::table::{self, Disk, Table};
use vhdx_ublk::system::{program, units};

use super::{output, start};

/// Serve a disk from boot on: add a line to /etc/vhdxtab.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Enable {
    /// The name of the disk: its device is /dev/vhdx/NAME
    name: Name,
    /// The VHDX file
    image: PathBuf,
    /// Options of `add` without the dashes, and noauto, nofail, _netdev, separated by commas
    options: Option<OsString>,
    /// As JSON: one object, errors too
    #[arg(long)]
    json: bool,
}

/// Stop serving a disk from boot on: remove its line from /etc/vhdxtab.
///
/// A device that is there stays until it is removed.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP_OF_DISABLE)]
pub struct Disable {
    /// The name of the disk
    name: OsString,
    /// As JSON: one object, errors too
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk enable data /images/data.vhdx
  vhdx-ublk enable wsl /images/ext4.vhdx read-only,nofail

A line of /etc/fstab then mounts the disk, or a partition of it:
  /dev/vhdx/data-part2  /data  ntfs3  defaults,nofail

  noauto    do not serve it at boot, but when a mount needs it, or by `systemctl start`
  nofail    the boot does not wait for it
  _netdev   its image is reached over a network

In /etc/vhdxtab, \\040 stands for a blank in a path, and \\054 for a comma in an option.
JSON: table, name, image, next_command (what serves it now).
Exit status: 0 the line is in the table, 1 failure (the table is unchanged), 2 wrong usage.";

const AFTER_HELP_OF_DISABLE: &str = "\
Examples:
  vhdx-ublk disable data
  vhdx-ublk del data          remove its device, too

JSON: table, name, next_command (null, or what removes a device that is there).
Exit status: 0 the line is removed, 1 failure, 2 wrong usage.";

/// What `enable` prints as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Enabled {
    /// The table that has the line.
    table: &'static str,
    /// The name of the disk.
    name: Name,
    /// The image, an absolute path.
    image: WrittenPath,
    /// What serves the disk now.
    next_command: String,
}

/// What `disable` prints as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Disabled {
    /// The table that had the line.
    table: &'static str,
    /// The name of the disk.
    name: WrittenPath,
    /// What removes a device that is there.
    next_command: Option<String>,
}

impl Enable {
    /// Runs the command.
    pub fn run(&self) -> Result<()> {
        let image = path::absolute(&self.image).doing("finding the image").file(&self.image)?;
        let found = named_file::find(&image)?.metadata().doing("finding the image").file(&image)?;
        if !found.is_file() {
            return Err(Error::new(Kind::Unsupported, "it is not a regular file").file(&image));
        }
        let options = self.options.clone().unwrap_or_default();
        let disk = Disk::new(self.name.as_str().as_ref(), image.as_os_str(), &options)?;
        start::add_of(&disk)?;
        table_to_change()?.add(&disk)?;
        if !self.json {
            output::print_line(&format!("{}: added {} with {}", table::PATH, disk.name, image.display()))?;
        }
        let unit = reload(&self.name)?;
        let (read, next_command) = match &unit {
            None => ("", format!("vhdx-ublk start {}", self.name)),
            Some(unit) => ("systemd has read it; ", format!("systemctl start '{unit}'")),
        };
        if !self.json {
            return output::print_line(&format!("{read}serve it now: {next_command}"));
        }
        let (table, name, image) = (table::PATH, self.name.clone(), WrittenPath::of(image));
        output::print_json(&Enabled { table, name, image, next_command })
    }
}

impl Disable {
    /// Runs the command.
    pub fn run(&self) -> Result<()> {
        let (name, path) = (self.name.display(), Path::new(table::PATH));
        if !table_to_change()?.remove(&self.name)? {
            return Err(unnamed(&self.name).file(path));
        }
        if !self.json {
            output::print_line(&format!("{}: removed {name}", table::PATH))?;
        }
        let mut next_command = None;
        if let Some(name) = self.name.to_str().and_then(|name| name.parse::<Name>().ok()) {
            reload(&name)?;
            next_command = Some(format!("vhdx-ublk del {name}"));
        }
        match next_command {
            next_command if self.json => {
                let name = WrittenPath::of(&self.name);
                output::print_json(&Disabled { table: table::PATH, name, next_command })
            }
            Some(command) => output::print_line(&format!("a device that is there stays: {command}")),
            None => Ok(()),
        }
    }
}

/// The table, which no other process changes until it is dropped.
/// Why no line is removed.
fn unnamed(name: &OsStr) -> Error {
    let name = name.display();
    if Path::new(table::PATH).exists() {
        let remedy = format!("`cat {}` shows the names", table::PATH);
        return Error::new(Kind::NotFound, format!("no line names {name}")).remedy(remedy);
    }
    Error::new(Kind::NotFound, format!("there is no such table, and so no line names {name}"))
        .remedy("no disk is served at boot: `vhdx-ublk list` shows the devices that are served now")
}

fn table_to_change() -> Result<Table> {
    claims::require_root("only root can change the table of disks").file(Path::new(table::PATH))?;
    Table::read_to_change(Path::new(table::PATH), Path::new(table::LOCK))
}

/// Has systemd read the table again. The unit of the disk; none where systemd does not run the machine.
fn reload(name: &Name) -> Result<Option<String>> {
    if !units::has_systemd() {
        return Ok(None);
    }
    if !units::has_generator() {
        tracing::warn!(
            "systemd will not read {}: {} is not installed among its generators",
            table::PATH,
            units::GENERATOR
        );
        return Ok(None);
    }
    let status = program::command("systemctl").arg("daemon-reload").status().doing("running systemctl")?;
    if !status.success() {
        return Err(Error::new(Kind::Io, format!("`systemctl daemon-reload` failed ({status})"))
            .remedy("the table is changed; systemd reads it at the next boot"));
    }
    Ok(Some(units::service(name)))
}
