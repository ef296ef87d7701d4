//! `resize`: makes the disk of an image larger or smaller.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::disk::Reactor;
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::operations::resize::{LockedImage, Request, Size};
use vhdx_ublk::printable::{both_sizes, human_size, shell};
use vhdx_ublk::system::grow::{Grown, Plan};

use super::parent_options::ParentOptions;
use super::{grow, output, size};

/// Make the disk of an image larger or smaller. The image must not be in use.
///
/// What comes into the disk is zero. The disk gets the new size as a whole or not at all: after a power cut,
/// run the command again.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own on the command line")]
pub struct Resize {
    /// The image
    image: PathBuf,
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
    /// file system for it
    #[arg(long, conflicts_with_all = ["minimum", "force"])]
    grow_fs: bool,
    /// Show what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Print the result as JSON
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
  vhdx-ublk resize disk.vhdx --minimum --dry-run   show how small the disk can be

Partitions and file systems do not shrink with the disk: shrink them before it. They grow with it
by --grow-fs, which serves the image for a moment and runs sfdisk and resize2fs, xfs_growfs or
btrfs. It is refused, before anything is changed, if one of these is missing, or if the file system
was not shut down cleanly or uses other devices. If it was interrupted, run the command again with
the new size. The drivers of the kernel and these programs read the image: do not use --grow-fs for
an image that you do not trust.
A disk does not shrink below the end of its last partition, which `info` shows as its minimum size.
On a GPT disk the second copy of the table must then move to the end of the disk: add the image, and
run `sgdisk -e` or `sfdisk --relocate gpt-bak-std` on its device.
A fixed image needs the space of all new blocks at once. A differencing image may be larger than its
parent, of which nothing shows in the new part.
Children are found if devices use them, or in the folder of the image; make sure yourself that it
has none elsewhere.
JSON: image, dry_run, size_before, size, minimum_size (null if nothing is recognised on the disk),
backup_gpt_must_move, grown (null without --grow-fs, or partition, type and volume_bytes),
next_command (null, or what grows the file system).
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
}

impl Resize {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let Self { image, wanted, force, grow_fs, dry_run, json, parents, .. } = self;
        let Wanted { size, minimum } = wanted;
        assert_ne!(size.is_some(), minimum, "the parser takes one of them");
        let size = size.unwrap_or(Size::Minimum);
        let request = Request { image, size, search: parents.search(), force };
        let reactor = Reactor::new()?;
        let open = || LockedImage::open(&request, &reactor, &Claims);
        let mut locked = open()?;
        let plan = Plan::of(locked.contents());
        let plan = if grow_fs {
            refuse_shrinking(&locked)?;
            drop(locked);
            let plan = plan?;
            grow::check(&plan, &request.image, &parents)?;
            locked = open()?;
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
                answer.grown = Some(grow::grow(&plan, &request.image, &parents)?);
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
            dry_run,
            size_before: locked.before(),
            size: locked.after(),
            minimum_size: locked.minimum(),
            backup_gpt_must_move: locked.strands_gpt(),
            grown: None,
            next_command: None,
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
            tracing::warn!(
                "the second copy of the GPT must move to the end of the disk: add the image, and run `sgdisk \
                 -e DEVICE` or `sfdisk --relocate gpt-bak-std DEVICE` on its device"
            );
        }
        Ok(())
    }

    fn text(&self) -> String {
        let bytes = |size: u64| format!("{size} bytes ({})", human_size(size));
        let (before, after) = (bytes(self.size_before), bytes(self.size));
        let image = self.image.text();
        match (self.size_before == self.size, self.dry_run) {
            (true, _) => format!("{image}: the disk has {after}, and stays as it is"),
            (false, true) => format!("{image}: the disk would change from {before} to {after}"),
            (false, false) => format!("{image}: the disk changed from {before} to {after}"),
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
