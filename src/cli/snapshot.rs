//! `snapshot`: freezes the image of a device as the parent of a new one.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use vhdx_ublk::device::claims;
use vhdx_ublk::device::socket;
use vhdx_ublk::device::stop::{self, Target};
use vhdx_ublk::disk::{folder_of, missing_folder};
use vhdx_ublk::error::{Doing, Error, Kind, Locate, Result};
use vhdx_ublk::system::table::{self, Table};

use super::output;

/// Freeze the image of a device as the parent of a new image, which is served from then on.
///
/// Mounted file systems stay mounted; requests wait for some milliseconds. The frozen image holds what the
/// device held at that moment, is closed cleanly, and no longer changes: it can be copied, checked, or served
/// again.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Snapshot {
    /// The device: its number, its name, /dev/ublkbN, or the path of its image
    target: OsString,
    /// The new image; the file must not exist
    image: PathBuf,
    /// As JSON: one object, errors too
    #[arg(long)]
    pub json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk snapshot 0 monday.vhdx
  vhdx-ublk snapshot disk.vhdx /snapshots/monday.vhdx --json

The new image names its parent by a relative path: move both or neither. The frozen image lacks
what the file system has not written yet: run `sync` first, or `fsfreeze` for consistent files.
A line of /etc/vhdxtab that names the frozen image is warned of: it must name the new one.
Exit status: 0 the new image is served, 1 failure (`vhdx-ublk list` shows what is served), 2
wrong usage.";

impl Snapshot {
    /// Runs the command.
    pub fn run(&self) -> Result<()> {
        let target = Target::parse(&self.target)?;
        let registry = claims::registry()?.ok_or_else(|| claims::no_devices(&target))?;
        let entry = stop::find(&registry, &target)?.entry;
        let device = entry.device.display();
        if !entry.daemon.is_alive() {
            let message = format!("the daemon of {device} is not running");
            return Err(Error::new(Kind::NotFound, message).remedy(format!("vhdx-ublk recover {}", entry.id)));
        }
        let image = absolute(&self.image)?;
        let snapped = socket::snapshot(&registry.socket_path(entry.id), image)?;
        warn_of_table(&snapped.parent, &snapped.image);
        if self.json {
            return output::print_json(&snapped);
        }
        let (image, parent) = (snapped.image.display(), snapped.parent.display());
        let pause = snapped.pause_us.div_ceil(1000);
        output::print_line(&format!(
            "{device} now serves {image}; its parent is {parent} (pause: {pause} ms)"
        ))
    }
}

/// A line of the table that names the frozen image serves an old state of the disk from the next boot on.
fn warn_of_table(frozen: &Path, image: &Path) {
    let numbers = Table::read(table::PATH.as_ref()).map(|table| table.lines_with(frozen));
    for number in numbers.unwrap_or_default() {
        tracing::warn!(
            "{}: line {number} names {}, which is frozen now: change it to {}, or the next boot serves the \
             disk as it was",
            table::PATH,
            frozen.display(),
            image.display()
        );
    }
}

/// The absolute path of a file that does not exist yet.
fn absolute(path: &Path) -> Result<PathBuf> {
    let folder = fs::canonicalize(folder_of(path)).doing("finding the folder").file(path);
    let folder = folder.map_err(|error| missing_folder(error, folder_of(path)))?;
    let name = path.file_name().ok_or_else(|| {
        Error::new(Kind::Usage, "the path of the new image ends in no file name").file(path)
    })?;
    Ok(folder.join(name))
}
