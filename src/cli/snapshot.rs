//! `snapshot`: freezes the image of a device as the parent of a new one.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use vhdx_ublk::device::claims;
use vhdx_ublk::device::freeze::{self, Frozen, Unfrozen, without};
use vhdx_ublk::device::registry::{Entry, Registry};
use vhdx_ublk::device::socket;
use vhdx_ublk::device::stop::Target;
use vhdx_ublk::device::usage;
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::printable::shell;

use super::snapshot_target::{absolute, warn_of_table};
use super::{output, served, snapshot_list, snapshot_revert};

/// Freeze the image of a device as the parent of a new image, which is served from then on.
///
/// Mounted file systems stay mounted; requests wait for some milliseconds. The frozen image holds what the
/// device held at that moment, is closed cleanly, and no longer changes: it can be copied, checked, or served
/// again.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Snapshot {
    #[command(subcommand)]
    command: Option<Command>,
    /// The device: its number, its name, /dev/ublkbN, or the path of its image
    #[arg(required_unless_present = "hold_frozen")]
    target: Option<OsString>,
    /// The new image; the file must not exist
    #[arg(required_unless_present = "hold_frozen")]
    image: Option<PathBuf>,
    /// Only produces an error that says how a snapshot is taken
    #[arg(hide = true)]
    misplaced: Option<PathBuf>,
    /// Freeze the mounted file systems of the device meanwhile, so that every file is as its writer left it.
    /// If one cannot be frozen, no snapshot is taken; `try` warns, and takes it
    #[arg(long, value_enum, value_name = "HOW", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "all")]
    freeze: Option<Freeze>,
    /// This process freezes file systems until its standard input ends
    #[arg(long, hide = true, num_args = 1.., value_name = "POINT", conflicts_with_all = ["target", "freeze"])]
    hold_frozen: Vec<PathBuf>,
    /// As JSON: one object, errors too
    #[arg(long)]
    pub json: bool,
}

/// What is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Freeze {
    /// All file systems, or nothing is done.
    All,
    /// Those that can be.
    Try,
}

#[derive(clap::Subcommand)]
enum Command {
    List(snapshot_list::List),
    Revert(snapshot_revert::Revert),
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk snapshot 0 monday.vhdx
  vhdx-ublk snapshot disk.vhdx /snapshots/monday.vhdx --json
  vhdx-ublk snapshot --freeze 0 tuesday.vhdx
  vhdx-ublk snapshot list 0

The new image names its parent by a relative path: move both or neither. The frozen image lacks
what the file system has not written yet: use --freeze, or run `sync` first. Writers to a frozen
file system wait, 30 seconds at most; it is thawed also if the command fails or is killed. File
systems on a mapper, an array or a loop device on the device, and in other mount namespaces only,
cannot be frozen, nor can types without support for it (vfat).
A device with the name `list` or `revert` is written /dev/vhdx/list or /dev/vhdx/revert here, and
an image of that name ./list or ./revert.
A line of /etc/vhdxtab that names the frozen image is warned of: it must name the new one.
JSON: image (the new one), parent (the frozen one), pause_us (how long requests had to wait,
microseconds).
Exit status: 0 the new image is served, 1 failure (`vhdx-ublk list` shows what is served), 2
wrong usage.";

impl Snapshot {
    /// Runs the command.
    pub fn run(&self) -> Result<()> {
        match (&self.command, &self.target, &self.image) {
            (Some(Command::List(list)), ..) => list.run(),
            (Some(Command::Revert(revert)), ..) => revert.run(),
            (None, Some(target), Some(image)) => match &self.misplaced {
                Some(more) => Err(one_too_many(target, image, more)),
                None => self.take(target, image),
            },
            (None, ..) => freeze::hold(&self.hold_frozen),
        }
    }

    fn take(&self, target: &OsStr, image: &Path) -> Result<()> {
        let entry = served_as(target).map_err(|error| unserved(target, image, error))?;
        let registry = Registry::open()?;
        let device = entry.device.display();
        if !entry.daemon.is_alive() {
            let message = format!("the daemon of {device} is not running");
            return Err(Error::new(Kind::NotFound, message).remedy(format!("vhdx-ublk recover {}", entry.id)));
        }
        let image = absolute(image)?;
        let frozen = self.freeze.map(|how| freeze_all(entry.id, how)).transpose()?.flatten();
        let snapped = socket::snapshot(&registry.socket_path(entry.id), image);
        let was_frozen = frozen.map_or(Ok(true), |(frozen, unfrozen)| {
            let ended = frozen.end();
            for unfrozen in &unfrozen {
                tracing::warn!("{}", refuses(unfrozen));
            }
            ended
        });
        let snapped = snapped?;
        if !was_frozen? {
            let message = "the file systems were thawed before the snapshot was taken, which took too long";
            return Err(Error::new(Kind::Io, message)
                .file(&snapped.parent)
                .remedy("the new image is served; what the frozen one has is as after a power cut"));
        }
        warn_of_table(&snapped.parent, &snapped.image, "frozen");
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

fn served_as(target: &OsStr) -> Result<Entry> {
    Ok(claims::find(&Target::parse(target)?)?.entry)
}

/// Why no snapshot is taken of what no device serves: an image at rest gets a child by another command.
fn unserved(target: &OsStr, image: &Path, error: Error) -> Error {
    let named = Path::new(target);
    if error.kind() != Kind::NotFound || !named.is_file() {
        return served::missing(named, error);
    }
    let remedy =
        format!("to make a child of it: vhdx-ublk create {} --parent {}", shell(image), shell(named));
    Error::new(Kind::NotFound, "no device serves this image").file(named).remedy(remedy)
}

/// Why three words are one too many: there is no word for the taking of a snapshot.
fn one_too_many(target: &OsStr, image: &Path, more: &Path) -> Error {
    let message = format!("the device and the new image are all that is named, and not {}", more.display());
    let error = Error::new(Kind::Usage, message);
    if target != "create" {
        return error.remedy("vhdx-ublk snapshot --help");
    }
    match served_as(image.as_os_str()) {
        Err(unserved) if unserved.kind() == Kind::NotFound && image.is_file() => {
            error.remedy(self::unserved(image.as_os_str(), more, unserved).remedy_text().unwrap_or_default())
        }
        _ => error.remedy(format!("vhdx-ublk snapshot {} {}", shell(image), shell(more))),
    }
}

fn refuses(Unfrozen { point, error }: &Unfrozen) -> String {
    format!("the file system at {} cannot be frozen: {error}", point.display())
}

/// Freezes the file systems of the device, if it has any; also those that could not be. What is to be said of
/// them may go to a file on one that is frozen: not before the thaw.
fn freeze_all(id: u32, how: Freeze) -> Result<Option<(Frozen, Vec<Unfrozen>)>> {
    let found = usage::file_systems(id);
    for other in &found.others {
        let message = format!("/dev/ublkb{id} is {other}: what is written there cannot be frozen");
        match how {
            Freeze::All => {
                let remedy = "end that use, or take the snapshot with --freeze=try";
                return Err(Error::new(Kind::Unsupported, message).remedy(remedy));
            }
            Freeze::Try => tracing::warn!("{message}"),
        }
    }
    if found.points.is_empty() {
        return Ok(None);
    }
    let mut arguments: Vec<OsString> = ["snapshot", "--hold-frozen"].map(Into::into).into();
    arguments.extend(found.points.iter().map(OsString::from));
    let (frozen, unfrozen) = Frozen::begin(&found.points, arguments)?;
    match unfrozen.first() {
        Some(first) if how == Freeze::All => {
            frozen.end()?;
            Err(Error::new(Kind::Unsupported, refuses(first)).remedy(without(&first.point)))
        }
        _ => Ok(Some((frozen, unfrozen))),
    }
}
