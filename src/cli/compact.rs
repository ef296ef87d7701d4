//! `compact`: makes the file of an image smaller.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::device::job::Stop;
use vhdx_ublk::device::order::Shortened;
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::device::registry::{Entry, Registry};
use vhdx_ublk::device::socket;
use vhdx_ublk::disk::{Reactor, Sparse};
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::format::metadata::DiskType;
use vhdx_ublk::operations::compact::{Compacted, Figures, Request, Steps};
use vhdx_ublk::printable::{counted, human_size, shell};

use super::parent_options::ParentOptions;
use super::progress::ProgressOptions;
use super::{FAILURE, SUCCESS, output, served, size, trim};

/// Make the file of an image smaller. Its disk does not change.
///
/// Blocks that hold only zeros give up their space, and blocks at the end of the file move into free space
/// before them, so that the file can be cut there. After a power cut or a kill at any moment the disk reads
/// as before; run the command again to continue. The image may be served meanwhile: see below.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Compact {
    /// The image; or its device: its number, its name or /dev/ublkbN
    #[arg(value_name = "TARGET")]
    image: PathBuf,
    /// Only produces an error that names the command which changes the size of the disk
    #[arg(long, hide = true, value_name = "SIZE")]
    size: Option<String>,
    #[command(flatten)]
    steps: StepOptions,
    /// Fill the holes of the file at last, and make none: for a file that goes to Windows, which refuses
    /// sparse ones. Its copy must have none either (`cp --sparse=never`)
    #[arg(long)]
    dense: bool,
    /// Show what would be done, and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Copy at most SIZE bytes per second, as in 100M (while the image is served: 64M if not given)
    #[arg(long, value_name = "SIZE", value_parser = parse_rate)]
    max_rate: Option<u64>,
    /// As JSON: one object, errors too
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    parents: ParentOptions,
    #[command(flatten)]
    progress: ProgressOptions,
}

/// The steps. None of `zeros`, `length` and `defragment` named: the first two.
#[derive(clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own on the command line")]
struct StepOptions {
    /// Before the other steps, have the kernel discard the free space of the file systems on the disk. As
    /// root, with the ublk driver; the kernel mounts the file systems for it, unless the image is served
    #[arg(long)]
    trim: bool,
    /// Only give up the space of blocks that hold only zeros, and take no other step that is not named
    #[arg(long)]
    zeros: bool,
    /// Only shorten the file, and take no other step that is not named
    #[arg(long)]
    length: bool,
    /// Put all blocks into the order of the disk, which shortens the file, too; taken only if named
    #[arg(long)]
    defragment: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk compact disk.vhdx                   take all steps but --trim and --defragment
  vhdx-ublk compact disk.vhdx --trim            before them, trim the file systems on the disk
  vhdx-ublk compact disk.vhdx --dry-run         show what would be done
  vhdx-ublk compact disk.vhdx --length          only shorten the file
  vhdx-ublk compact disk.vhdx --zeros --defragment
                                                in the order of the disk, as for a slow medium
  vhdx-ublk compact /dev/ublkb0 --trim          while it is served, with its file systems mounted

A parent can be compacted, and its children stay valid. A fixed image keeps the space of all its
blocks.
An image that is served is compacted by its daemon, as root. The only steps are --trim, which trims
what is mounted where it is mounted, and --length; for the others remove the device first. Requests
go on, and come first: while there are any, blocks are moved a sixth of the time. A snapshot, a
resize, an upgrade or the end of the device stops the command at its next safe point, and so does
Ctrl-C; run it again to continue. Sector bitmaps (of a child), the BAT, the metadata and the log
stay where they are, and the file cannot end before them. `vhdx-ublk list` shows how far it is.

Space that a file system on the disk has freed is given back only if it was discarded: run
`fstrim -a` in the guest before, or use --trim. That serves the image for a moment, mounts each
ext2, ext3, ext4, XFS, Btrfs, NTFS (ntfs3) and FAT where no other process sees it, trims it and
unmounts it. Files do not change. Left alone, and named with the reason: what was not shut down
cleanly, what is hibernated or encrypted, what uses other devices (a journal elsewhere, Btrfs on
several devices, F2FS), LVM, swap space, what is not recognised, and what the kernel cannot trim. If
none can be trimmed, the other steps are taken all the same. What an interrupted command has trimmed
is not trimmed again until the disk is written or the machine starts again. The drivers of the
kernel read the image: do not use --trim for an image that you do not trust.
For a block that is longer than each free run, blocks between the runs are moved to join them, as
long as at most 64 bytes are copied for each byte that the file becomes shorter.
Ctrl-C stops the command at the next safe point; what was freed until then stays free. Meanwhile the
file may be longer than before, with --defragment by 64 MiB and more.
JSON: image, device (null, or what serves it), dry_run, stopped (whether it ended early) and
stopped_by (null, or what ended it while it was served: caller, snapshot, resize, upgrade, end);
host_bytes_before and host_bytes_after (space on the host; null after a dry run), file_bytes_before
and file_bytes_after; zero_blocks and unmapped_blocks (blocks that held zeros; blocks without
content that named space) and given_up_bytes; moves and moved_bytes; filled_bytes (--dense);
free_bytes (free space that stays in the file) and free_before (the structure behind it that is not
moved), which are not told of an image that is served; unread_parents (why zeros of a child were not
searched for); trim (null without --trim, or volumes [{partition, type, trimmed_bytes, left_alone
(null, or why)}] and not_possible (null, or why nothing was trimmed)).
Exit status: 0 compacted, 1 failure or stopped (the disk reads as before), or --trim was not
possible; 2 wrong usage.";

impl Compact {
    /// Runs the command; returns the exit status.
    pub fn run(self) -> Result<u8> {
        if let Some(size) = &self.size {
            let (image, size) = (shell(&self.image), shell(Path::new(size)));
            let message = "compact shortens the file of an image, and its disk keeps its size";
            let remedy = format!("for the disk: vhdx-ublk resize {image} --size {size}");
            return Err(Error::new(Kind::Usage, message).remedy(remedy));
        }
        match served::find(self.image.as_os_str())? {
            Some(entry) => self.compact_served(&entry),
            None => self.compact_at_rest(),
        }
    }

    fn compact_served(self, entry: &Entry) -> Result<u8> {
        self.refuse_steps(&entry.device)?;
        let shown = self.progress.start()?;
        let trimmed = self.steps.trim.then(|| trim::mounted(entry.id));
        let socket = Registry::open()?.socket_path(entry.id);
        let done = socket::compact(&socket, self.max_rate, &shown)?;
        drop(shown);
        let failed = trimmed.as_ref().is_some_and(|trimmed| trimmed.trimmed.is_err());
        if self.json {
            let trim = trimmed.as_ref().map(trim::Outcome::answer);
            output::print_json(&Answer { trim, ..answer_of_served(entry, &done) })?;
        } else {
            output::print(&text_of_served(&done, trimmed.as_ref()))?;
        }
        Ok(if done.stopped.is_some() || failed { FAILURE } else { SUCCESS })
    }

    /// What a daemon does not do.
    fn refuse_steps(&self, device: &Path) -> Result<()> {
        let StepOptions { zeros, defragment, .. } = self.steps;
        let options =
            [(zeros, "zeros"), (defragment, "defragment"), (self.dense, "dense"), (self.dry_run, "dry-run")];
        let Some((_, option)) = options.iter().find(|(given, _)| *given) else { return Ok(()) };
        let device = device.display();
        let message = format!("--{option} is for an image at rest, and {device} serves this one");
        Err(Error::new(Kind::Unsupported, message)
            .remedy(format!("leave the option out, or remove the device first: `vhdx-ublk del {device}`")))
    }

    fn compact_at_rest(self) -> Result<u8> {
        let Self { image, steps, dense, dry_run, max_rate, json, parents, progress, .. } = self;
        let StepOptions { trim, zeros, length, defragment } = steps;
        let all = !zeros && !length && !defragment;
        let steps = Steps { zeros: zeros || all, length: length || all, defragment };
        let shown = progress.start()?;
        let trimmed = trim.then(|| {
            let sparse = if dense { Sparse::No } else { Sparse::Auto };
            trim::Request { image: &image, parents: &parents, sparse, dry_run }.run(&shown)
        });
        let request = Request { image, search: parents.search(), steps, dense, max_rate, dry_run };
        let reactor = Reactor::new()?;
        let mut compacted = request.run(&reactor, &Claims, &shown)?;
        drop(shown);
        if let Some(before) = trimmed.as_ref().and_then(|trimmed| trimmed.before) {
            compacted.before = before;
        }
        let stopped = compacted.done.stopped || trimmed.as_ref().is_some_and(trim::Outcome::stopped);
        let failed = trimmed.as_ref().is_some_and(|trimmed| trimmed.trimmed.is_err());
        if !stopped && !dry_run {
            trimmed.iter().for_each(trim::Outcome::forget);
        }
        if json {
            let trim = trimmed.as_ref().map(trim::Outcome::answer);
            output::print_json(&Answer { stopped, trim, ..answer(&compacted) })?;
        } else {
            let hint = || trim::hint(&request.image, &parents);
            output::print(&text(&compacted, steps, trimmed.as_ref(), hint))?;
        }
        Ok(if stopped || failed { FAILURE } else { SUCCESS })
    }
}

fn parse_rate(text: &str) -> std::result::Result<u64, String> {
    match size::parse(text)? {
        0 => Err("a rate must be at least one byte per second".into()),
        rate => Ok(rate),
    }
}

/// The answer as JSON has it. What would be done only has no figures of the file afterwards but its length.
#[derive(Serialize, JsonSchema)]
pub struct Answer {
    image: WrittenPath,
    /// `/dev/ublkbN`, if a device serves the image.
    device: Option<PathBuf>,
    dry_run: bool,
    stopped: bool,
    /// What ended it before all was done, while the image was served.
    stopped_by: Option<Stop>,
    host_bytes_before: u64,
    host_bytes_after: Option<u64>,
    file_bytes_before: u64,
    file_bytes_after: u64,
    zero_blocks: u64,
    unmapped_blocks: u64,
    given_up_bytes: u64,
    moves: u64,
    moved_bytes: u64,
    filled_bytes: u64,
    free_bytes: u64,
    free_before: Option<&'static str>,
    unread_parents: Option<String>,
    /// What became of the file systems, if that was asked for.
    trim: Option<trim::Answer>,
}

fn answer(compacted: &Compacted) -> Answer {
    let Compacted { path, before, after, done, filled_bytes, unread, .. } = compacted;
    Answer {
        filled_bytes: *filled_bytes,
        image: WrittenPath::of(path),
        device: None,
        dry_run: after.is_none(),
        stopped: done.stopped,
        stopped_by: None,
        host_bytes_before: before.host,
        host_bytes_after: after.map(|after| after.host),
        file_bytes_before: before.length,
        file_bytes_after: after.map_or(done.end, |after| after.length),
        zero_blocks: done.zero_blocks,
        unmapped_blocks: done.old_blocks,
        given_up_bytes: done.given_up_bytes,
        moves: done.moves,
        moved_bytes: done.moved_bytes,
        free_bytes: done.free_bytes,
        free_before: done.held_by.map(|held_by| held_by.name),
        unread_parents: unread.as_ref().map(|error| output::message(error)),
        trim: None,
    }
}

fn answer_of_served(entry: &Entry, done: &Shortened) -> Answer {
    let Shortened { before, after, moves, moved_bytes, stopped, .. } = *done;
    Answer {
        image: WrittenPath::of(&entry.image),
        device: Some(entry.device.clone()),
        dry_run: false,
        stopped: stopped.is_some(),
        stopped_by: stopped,
        host_bytes_before: before.host,
        host_bytes_after: Some(after.host),
        file_bytes_before: before.length,
        file_bytes_after: after.length,
        zero_blocks: 0,
        unmapped_blocks: 0,
        given_up_bytes: 0,
        moves,
        moved_bytes,
        filled_bytes: 0,
        free_bytes: 0,
        free_before: None,
        unread_parents: None,
        trim: None,
    }
}

fn text_of_served(done: &Shortened, trimmed: Option<&trim::Outcome>) -> String {
    let Shortened { before, after, moves, moved_bytes, stopped, .. } = done;
    let mut lines = vec![
        format!("On host    {}", change(before.host, after.host)),
        format!("File size  {}", change(before.length, after.length)),
    ];
    lines.extend(reserved(*before, *after));
    if *moves > 0 {
        lines.push(format!("{} made, {} copied", counted(*moves, "move"), human_size(*moved_bytes)));
    }
    lines.extend(trimmed.iter().flat_map(|trimmed| trimmed.lines(false)));
    if let Some(why) = stopped {
        let why = match why {
            Stop::Caller => "",
            Stop::Requests => " by requests",
            Stop::Snapshot => " by a snapshot",
            Stop::Resize => " by a resize",
            Stop::Upgrade => " by an upgrade",
            Stop::End => " by the end of the device",
        };
        lines.push(format!("Stopped{why} before all was done; run the command again to continue"));
    } else if after.host >= before.host && after.length >= before.length {
        lines.push(match trimmed {
            Some(_) => "Nothing to gain".into(),
            None => {
                "Nothing to gain: what files on the disk have freed is given back once it is trimmed: use \
                     --trim, or run `fstrim` where it is mounted"
                    .into()
            }
        });
    }
    lines.join("\n")
}

/// The answer for people. `hint` says what is not done yet.
fn text(
    compacted: &Compacted,
    steps: Steps,
    trimmed: Option<&trim::Outcome>,
    hint: impl FnOnce() -> Option<String>,
) -> String {
    let Compacted { kind, before, after, done, .. } = compacted;
    let mut text = String::new();
    let mut line = |line: String| {
        let _ = writeln!(text, "{line}"); // a string takes everything
    };
    match after {
        Some(after) => line(format!("On host    {}", change(before.host, after.host))),
        None => line(format!("On host    {}", human_size(before.host))),
    }
    let end = after.map_or(done.end, |after| after.length);
    line(format!(
        "File size  {}",
        change(before.length, if steps.length || steps.defragment { end } else { before.length })
    ));
    let (give, held) = if after.is_some() { ("gave", "held") } else { ("would give", "hold") };
    if done.given_up_bytes > 0 {
        let [blocks, bytes] = [done.zero_blocks + done.old_blocks, done.given_up_bytes];
        let (blocks, held) =
            (counted(blocks, "block"), if blocks == 1 && held == "hold" { "holds" } else { held });
        line(format!("{blocks} {held} only zeros and {give} up {}", human_size(bytes)));
    }
    if let Some(after) = after.filter(|_| compacted.filled_bytes == 0) {
        reserved(*before, after).into_iter().for_each(&mut line);
    }
    if done.moves > 0 {
        let made = if after.is_some() { "made" } else { "would be made" };
        line(format!("{} {made}, {} copied", counted(done.moves, "move"), human_size(done.moved_bytes)));
    }
    trimmed.iter().flat_map(|trimmed| trimmed.lines(after.is_none())).for_each(&mut line);
    notes(compacted, steps).into_iter().for_each(&mut line);
    if has_won_nothing(compacted, steps) {
        let hint = if *kind == DiskType::Fixed || trimmed.is_some() {
            None
        } else {
            missing_step(steps).or_else(hint)
        };
        line(hint.map_or_else(|| "Nothing to gain".into(), |hint| format!("Nothing to gain: {hint}")));
    }
    text.truncate(text.trim_end().len());
    text
}

/// Why a shorter file takes more space on its host than before.
fn reserved(before: Figures, after: Figures) -> Option<String> {
    (after.host > before.host).then(|| {
        "The host holds more of the file: the log and the tables before the blocks had holes, and have all \
         their space now"
            .into()
    })
}

/// What else the user must know.
fn notes(compacted: &Compacted, steps: Steps) -> Vec<String> {
    let Compacted { kind, after, done, filled_bytes, unread, .. } = compacted;
    let mut notes = Vec::new();
    if done.stopped {
        notes.push("Stopped before all was done; run the command again to continue".into());
    }
    if steps.zeros && *kind == DiskType::Fixed {
        notes.push("A fixed image keeps the space of all its blocks: zeros were not searched for".into());
    }
    if *filled_bytes > 0 {
        let filled = if after.is_some() { "were filled" } else { "would be filled" };
        notes.push(format!("{} of holes {filled}", human_size(*filled_bytes)));
    }
    if let Some(error) = unread {
        let why = output::message(error);
        notes.push(format!("Blocks with sectors of the parents were not searched for zeros: {why}"));
    }
    if !done.stopped && (steps.length || steps.defragment) && done.free_bytes > 0 {
        let free = human_size(done.free_bytes);
        notes.push(match done.held_by {
            Some(held_by) => format!("{free} stay free before the {}, which is not moved", held_by.name),
            None => format!("{free} stay free: no block fits there, or moving would copy too much for it"),
        });
    }
    notes
}

/// Whether all was done, and the file takes what it took.
fn has_won_nothing(compacted: &Compacted, steps: Steps) -> bool {
    let Compacted { before, after, done, filled_bytes, .. } = compacted;
    let won = |after: &Figures| after.host < before.host || after.length < before.length;
    !done.stopped
        && *filled_bytes == 0
        && (done.moves == 0 || !steps.defragment)
        && after.as_ref().is_some_and(|after| !won(after))
}

/// The step that may win something and was not taken.
fn missing_step(steps: Steps) -> Option<String> {
    match steps {
        Steps { zeros: false, .. } => Some("blocks of zeros were not searched for (--zeros)".into()),
        Steps { length: false, defragment: false, .. } => {
            Some("the file was not shortened (--length)".into())
        }
        _ => None,
    }
}

fn change(before: u64, after: u64) -> String {
    let [was, is] = [before, after].map(human_size);
    match before.checked_sub(after) {
        Some(0) => format!("{was}, as before"),
        Some(freed) => format!("{was} -> {is}, {} freed", human_size(freed)),
        None => format!("{was} -> {is}"),
    }
}
