//! `resize`: makes the disk of an image larger or smaller.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::device::order::Sizes;
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::device::registry::{Entry, Registry};
use vhdx_ublk::device::socket;
use vhdx_ublk::disk::Reactor;
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::operations::resize::{LockedImage, Request, Size};
use vhdx_ublk::printable::{both_sizes, human_size, shell};
use vhdx_ublk::system::device_disk::DeviceDisk;
use vhdx_ublk::system::grow::{Grown, Plan};

use super::grow::{self, Looked};
use super::parent_options::ParentOptions;
use super::{output, served, size};

/// Make the disk of an image larger or smaller. While a device serves the image, it can become larger.
///
/// What comes into the disk is zero. The disk gets the new size as a whole or not at all: after a power cut,
/// run the command again. A device that is served, and the file systems on it, stay in use; requests wait for
/// a moment.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own on the command line")]
pub struct Resize {
    /// The image, or the device that serves it: its number, its name, or /dev/ublkbN
    target: OsString,
    /// Only produces an error that names --size
    #[arg(hide = true, value_name = "SIZE", value_parser = misplaced)]
    _misplaced: Option<u64>,
    #[command(flatten)]
    wanted: Wanted,
    /// Resize even if the image is the parent of others, which become unreadable, or if something on the disk
    /// lies behind its new end, which is lost
    #[arg(short, long)]
    force: bool,
    /// Have the last partition and its file system (ext2, ext3, ext4, XFS, Btrfs), or that of a disk without
    /// partitions, grow to the end of the disk, too. As root, with the ublk driver; the kernel mounts the
    /// file system for it, unless it is mounted
    #[arg(long, conflicts_with_all = ["minimum", "force"])]
    grow_fs: bool,
    /// Show what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// As JSON: one object, errors too
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    parents: ParentOptions,
}

/// The new size.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
struct Wanted {
    /// The new size: 200G, or by how much the disk grows or shrinks: +50G, -50G
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size, allow_hyphen_values = true)]
    size: Option<Size>,
    /// Shrink the disk to what the partitions and volumes on it need
    #[arg(long)]
    minimum: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk resize disk.vhdx --size 200G
  vhdx-ublk resize disk.vhdx --size +50G
  vhdx-ublk resize disk.vhdx --size +50G --grow-fs   the last partition and its file system, too
  vhdx-ublk resize /dev/ublkb0 --size +50G --grow-fs   the same while they are in use
  vhdx-ublk resize disk.vhdx --minimum --dry-run   show how small the disk can be

An image that a device serves is resized by the daemon of the device, also if its path is given: it
can grow, from Linux 6.16 on, and does not shrink. If the daemon is killed meanwhile, `recover`
serves the disk with its old size or its new size; run the command again with the new size, not with
+SIZE.

Partitions and file systems do not shrink with the disk: shrink them before it. They grow with
it by --grow-fs, which serves the image for a moment, unless it is served, and runs sfdisk and
resize2fs, xfs_growfs or btrfs. It is refused, before anything is changed, if one of these is
missing, or if the file system was not shut down cleanly or uses other devices. If it was
interrupted, run the command again with the new size. The drivers of the kernel and these
programs read the image: do not use --grow-fs for an image that you do not trust.

A disk does not shrink below the end of its last partition, which `info` shows as its minimum size.
On a GPT disk the second copy of the table must then move to the end of the disk: add the image, and
run `sgdisk -e` or `sfdisk --relocate gpt-bak-std` on its device.
A fixed image needs the space of all new blocks at once. A differencing image may be larger than its
parent, of which nothing shows in the new part.
Children are found if devices use them, or in the folder of the image; make sure yourself that it
has none elsewhere.
JSON: image, device (null, or the device that serves it), dry_run, size_before, size, minimum_size
(null if nothing is recognised on the disk), backup_gpt_must_move, grown (null without --grow-fs, or
partition, type and volume_bytes), next_command (null, or what grows the file system), pause_us
(null, or how long requests had to wait, microseconds).
Exit status: 0 resized, 1 failure (the disk reads as before), 2 wrong usage.";

/// Reads a size, or a change of one.
fn parse_size(text: &str) -> std::result::Result<Size, String> {
    let nothing = |bytes: u64| match bytes {
        0 => Err("a change must be of at least one sector".to_owned()),
        bytes => Ok(bytes),
    };
    match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(more), _) => size::parse(more).and_then(nothing).map(Size::More),
        (_, Some(fewer)) => size::parse(fewer).and_then(nothing).map(Size::Fewer),
        (None, None) => size::parse_disk(text).map(Size::To),
    }
}

/// Takes no word: one that stands behind the image's name is often meant as the size.
fn misplaced(text: &str) -> std::result::Result<u64, String> {
    match parse_size(text) {
        Ok(_) => Err(format!("give the size of the disk with --size {text}")),
        Err(_) => Err("one image is resized at a time; everything else is an option: see --help".into()),
    }
}

/// The answer.
#[derive(Serialize, JsonSchema)]
pub struct Answer {
    image: WrittenPath,
    /// `/dev/ublkbN`, if a device serves the image.
    device: Option<PathBuf>,
    /// Whether the disk keeps its size, because this is only shown.
    dry_run: bool,
    size_before: u64,
    size: u64,
    minimum_size: Option<u64>,
    /// Whether the second copy of a GPT must move to the end of the disk.
    backup_gpt_must_move: bool,
    /// What has grown on the disk.
    grown: Option<Grown>,
    /// What has it grow, if something on the disk can.
    next_command: Option<String>,
    /// How long requests to the device had to wait, microseconds.
    pause_us: Option<u64>,
}

impl Resize {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        match served::find(&self.target)? {
            Some(entry) => self.resize_served(&entry),
            None => self.resize_at_rest(),
        }
    }

    fn size(&self) -> Size {
        let Wanted { size, minimum } = self.wanted;
        assert_ne!(size.is_some(), minimum, "the parser takes one of them");
        size.unwrap_or(Size::Minimum)
    }

    fn resize_served(&self, entry: &Entry) -> Result<()> {
        let (device, before) = (&entry.device, entry.size_bytes);
        let disk = DeviceDisk::open(device)?;
        let contents = disk.contents();
        let after = self.size().of_disk(before, disk.sector_bytes(), contents.minimum_size())?;
        drop(disk);
        if after < before {
            return Err(served_shrinks(entry, after));
        }
        let plan = Plan::of(&contents, Some(device));
        let plan = if self.grow_fs { Some(plan?) } else { plan.ok() };
        let mut answer = Answer {
            image: WrittenPath::of(&entry.image),
            device: Some(device.clone()),
            dry_run: self.dry_run,
            size_before: before,
            size: after,
            minimum_size: contents.minimum_size(),
            backup_gpt_must_move: after != before && contents.has_gpt(),
            grown: None,
            next_command: None,
            pause_us: None,
        };
        if self.dry_run {
            return answer.print(self.json);
        }
        let registry = Registry::open()?;
        let sizes = Sizes { from_bytes: before, to_bytes: after };
        answer.pause_us = Some(socket::grow(&registry.socket_path(entry.id), sizes)?.pause_us);
        match plan {
            Some(plan) if self.grow_fs => {
                answer.grown = Some(plan.grow(device)?);
                answer.backup_gpt_must_move = false;
            }
            Some(_) if after > before => answer.next_command = Some(next_command(device, after)),
            _ => {}
        }
        answer.print(self.json)
    }

    fn resize_at_rest(self) -> Result<()> {
        let size = self.size();
        let Self { target, force, grow_fs, dry_run, json, parents, .. } = self;
        let image = PathBuf::from(target);
        let request = Request { image, size, search: parents.search(), force };
        let reactor = Reactor::new()?;
        let open = || LockedImage::open(&request, &reactor, &Claims);
        let mut locked = open()?;
        let plan = Plan::of(locked.contents(), None);
        let seen = Looked { path: &request.image, file: locked.file() };
        let plan = if grow_fs {
            refuse_shrinking(&locked)?;
            drop(locked);
            let plan = plan?;
            grow::check(&plan, seen, &parents)?;
            locked = open()?;
            seen.require(locked.file())?;
            Some(plan)
        } else {
            plan.ok()
        };
        let mut answer = Answer::of(&locked, dry_run);
        if !dry_run {
            locked.resize(&reactor)?;
        }
        match plan {
            Some(plan) if grow_fs && !dry_run => {
                answer.grown = Some(grow::grow(&plan, seen, &parents)?);
                answer.backup_gpt_must_move = false;
            }
            Some(_) if !grow_fs && answer.size > answer.size_before => {
                answer.next_command = Some(next_command(&request.image, answer.size));
            }
            _ => {}
        }
        answer.print(json)
    }
}

/// Why a disk that is served does not become `after` bytes.
fn served_shrinks(entry: &Entry, after: u64) -> Error {
    let (device, image) = (entry.device.display(), shell(&entry.image));
    let message = format!("the disk of {device} can grow, and does not shrink, while it is served");
    Error::new(Kind::Unsupported, message).remedy(format!(
        "remove the device first: `vhdx-ublk del {device}`, then `vhdx-ublk resize {image} --size {after}`"
    ))
}

fn refuse_shrinking(locked: &LockedImage) -> Result<()> {
    if locked.after() >= locked.before() {
        return Ok(());
    }
    Err(Error::new(Kind::Usage, "--grow-fs has something grow, and the disk would shrink"))
}

fn next_command(image: &Path, size: u64) -> String {
    format!("vhdx-ublk resize {} --size {size} --grow-fs", shell(image))
}

impl Answer {
    fn of(locked: &LockedImage, dry_run: bool) -> Self {
        Self {
            image: WrittenPath::of(locked.path()),
            device: None,
            dry_run,
            size_before: locked.before(),
            size: locked.after(),
            minimum_size: locked.minimum(),
            backup_gpt_must_move: locked.strands_gpt(),
            grown: None,
            next_command: None,
            pause_us: None,
        }
    }

    fn print(&self, json: bool) -> Result<()> {
        if json {
            return output::print_json(self);
        }
        output::print_line(&self.text())?;
        if let Some(Grown { partition, r#type, volume_bytes }) = &self.grown {
            let place = partition.map_or_else(String::new, |number| format!(" on partition {number}"));
            let size = volume_bytes.map_or_else(String::new, |bytes| format!(" to {}", both_sizes(bytes)));
            output::print_line(&format!("{}: the {}{place} grew{size}", self.image.text(), r#type))?;
        }
        if let Some(command) = &self.next_command {
            output::print_line(&format!("To have the file system grow, too: {command}"))?;
        }
        if self.backup_gpt_must_move {
            let (how, device) = match &self.device {
                Some(device) => ("run", device.display().to_string()),
                None => ("add the image, and run", "DEVICE".into()),
            };
            tracing::warn!(
                "the second copy of the GPT must move to the end of the disk: {how} `sgdisk -e {device}` or \
                 `sfdisk --no-reread --relocate gpt-bak-std {device}`"
            );
        }
        Ok(())
    }

    fn text(&self) -> String {
        let bytes = |size: u64| format!("{size} bytes ({})", human_size(size));
        let (before, after) = (bytes(self.size_before), bytes(self.size));
        let image = match &self.device {
            Some(device) => device.display().to_string(),
            None => self.image.text().to_owned(),
        };
        let pause = self
            .pause_us
            .map_or_else(String::new, |pause_us| format!(" (pause: {} ms)", pause_us.div_ceil(1000)));
        match (self.size_before == self.size, self.dry_run) {
            (true, _) => format!("{image}: the disk has {after}, and stays as it is"),
            (false, true) => format!("{image}: the disk would change from {before} to {after}"),
            (false, false) => format!("{image}: the disk changed from {before} to {after}{pause}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_absolute_or_a_change() {
        assert_eq!(parse_size("200G"), Ok(Size::To(200 << 30)));
        assert_eq!(parse_size("+50M"), Ok(Size::More(50 << 20)));
        assert_eq!(parse_size("-512"), Ok(Size::Fewer(512)));
        for wrong in ["", "+", "-", "0", "+0", "-0", "--1", "+-1", "65T", "1.5G", "+1KB"] {
            assert!(parse_size(wrong).is_err(), "{wrong:?}");
        }
    }
}
