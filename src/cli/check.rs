//! `check`: whether an image is sound, and the chain it is in.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use uuid::Uuid;

use vhdx_ublk::chain::{Known, Search};
use vhdx_ublk::device::session;
use vhdx_ublk::disk::{Access, ImageFile, Reactor, ReadDisk};
use vhdx_ublk::error::{Error, Kind, Locate, Result};
use vhdx_ublk::image::{self, Finding, Identity, LogFound, Repair, Report, Severity};
use vhdx_ublk::printable::{printable, shell};

use super::ancestors::{self, Ancestors};
use super::parents::ParentOptions;
use super::{holders, look, output, rest, size};

/// Examine the structure of an image: every header, table, log entry and block; of a differencing image its
/// parents' too.
///
/// Nothing is changed, not even a time, unless --repair is given. A dirty log is no fault: everything else is
/// examined as if it had been replayed.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Check {
    /// The VHDX file
    image: PathBuf,
    /// Replay the log, and mend what can be mended without guessing; data is never guessed at, and parents are
    /// never changed
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    parents: ParentOptions,
    /// As JSON: one object, errors too
    #[arg(long)]
    pub json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk check disk.vhdx             examine it; says what --repair would mend
  vhdx-ublk check --repair disk.vhdx    mend it

A corruption contradicts the format: data may be lost. A leak is room on the host that nothing
names: no data is in danger, and writers use it in the end. A note is no fault. Two blocks in
one place, reserved states and what lies behind the end of the file are never repaired: what
they should say cannot be told.
A chain is broken where a parent is nowhere, is another image or was written since its child was
made, has other sectors, or is its own ancestor.

JSON: offsets and sizes are bytes. Keys: image, complete (everything could be examined),
corruptions, leaks, notes, beyond_repair (corruptions that --repair does not mend), repairable
(findings that it does), log (clean, dirty, virgin, torn, unknown), log_entries (to replay),
blocks, allocated_blocks, free_bytes, leaked_bytes, unused_tail_bytes, findings [{severity,
structure, offset, what, remedy, repairable}] (at most 1000 of each severity), before (null, or
the same as it was before --repair), parents (a list of the same, the image's own parent first,
as far as the chain leads), chain_fault (null, or as an error: why it leads no further).
Exit status: 0 sound, 1 it cannot be told (not readable, no VHDX, in use; wrong usage too), or
the image is sound and a parent has corruptions or the chain is broken, 2 corruptions, 3 leaks
and no corruption. After --repair it is that of the image as it is then.";

/// Exit statuses, as the help text states them.
const SOUND: u8 = 0;
const UNSOUND_CHAIN: u8 = 1;
const CORRUPT: u8 = 2;
const LEAKING: u8 = 3;

impl Check {
    /// Runs the command; returns the exit status.
    pub fn run(self) -> Result<u8> {
        let search = self.parents.search();
        let checked = if self.repair { repair(&self.image, &search) } else { check(&self.image, &search) };
        let checked = checked.map_err(|error| holders::explain(error, &self.image))?;
        if self.json {
            output::print_json(&checked)?;
        } else {
            output::print(&checked.to_string())?;
        }
        Ok(checked.status())
    }
}

fn check(path: &Path, search: &Search) -> Result<Checked> {
    let (disk, lock) = look::lock_for_reading(path)?;
    let report = smol::future::block_on(image::check(&disk)).file(path)?;
    let leaf = smol::future::block_on(leaf(&disk, lock.path()))?;
    let ancestors = Ancestors::examine(leaf.as_ref(), search)?;
    Ok(Checked { image: lock.path().to_string_lossy().into_owned(), report, before: None, ancestors })
}

fn repair(path: &Path, search: &Search) -> Result<Checked> {
    let file = Arc::new(rest::lock(path, Access::ReadWrite)?);
    let reactor = Reactor::new()?;
    let disk = reactor.disk(Arc::clone(&file));
    session::refuse_orphan(&file, None).map_err(|error| match reactor.block_on(image::check(&disk)) {
        Ok(found) if found.complete && found.beyond_repair == 0 => error,
        _ => no_takeover(&file),
    })?;
    let Repair { before, after } = reactor.block_on(image::repair(&disk, Uuid::new_v4)).file(path)?;
    let leaf = reactor.block_on(leaf(&disk, file.path()))?;
    let ancestors = Ancestors::examine(leaf.as_ref(), search)?;
    let image = file.path().to_string_lossy().into_owned();
    Ok(Checked { image, report: after, before: Some(before), ancestors })
}

/// A killed daemon's session is there, and `add`, which takes it over, refuses the image.
fn no_takeover(file: &ImageFile) -> Error {
    let path = shell(file.path());
    let message = "a daemon was killed, not everything it acknowledged is in the image, and the image is damaged, so \
                   that no command takes over what is missing";
    let remedy = format!(
        "`vhdx-ublk check {path}` names the damage; take the device away with `vhdx-ublk del {path}`, if it is still \
         there, and restore the image from a backup"
    );
    Error::new(Kind::InUse, message).file(file.path()).remedy(remedy)
}

/// The image as its parents' child, unless it is beyond reading: its own report says so then.
async fn leaf<D: ReadDisk>(disk: &D, path: &Path) -> Result<Option<Known>> {
    match Identity::read(disk, u64::MAX).await {
        Ok(identity) => Ok(Some(Known { identity, path: path.to_owned() })),
        Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Truncated) => Ok(None),
        Err(error) => Err(error.file(path)),
    }
}

/// What is printed.
#[derive(Serialize)]
struct Checked {
    image: String,
    #[serde(flatten)]
    report: Report,
    before: Option<Report>,
    #[serde(flatten)]
    ancestors: Ancestors,
}

impl Checked {
    fn status(&self) -> u8 {
        match self.report.verdict() {
            Some(Severity::Corruption) => CORRUPT,
            _ if !self.ancestors.are_sound() => UNSOUND_CHAIN,
            Some(Severity::Leak) => LEAKING,
            _ if self.ancestors.have(Severity::Leak) => LEAKING,
            None | Some(Severity::Note) => SOUND,
        }
    }
}

impl std::fmt::Display for Checked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { image, report, before, ancestors } = self;
        let image = &*printable(image);
        if let Some(before) = before.as_ref().filter(|before| *before != report) {
            writeln!(f, "{image} was repaired. Before: {}{}", summary(before), findings(before, true))?;
            writeln!(f)?;
            write!(f, "Now: ")?;
        } else {
            write!(f, "{image}: ")?;
        }
        write!(f, "{}{}", summary(report), findings(report, false))?;
        if before.is_none() {
            write!(f, "{}", mendable(report, image))?;
        }
        write!(f, "{}", chain(ancestors, before.is_some()))
    }
}

/// What `--repair` is good for.
fn mendable(report: &Report, image: &str) -> String {
    if report.repairable == 0 || report.verdict().is_none() {
        return String::new();
    }
    format!(
        "\n\n{} of these can be mended: vhdx-ublk check --repair {}",
        report.repairable,
        shell(image.as_ref())
    )
}

/// The parents, and where their chain breaks off.
fn chain(ancestors: &Ancestors, repaired: bool) -> String {
    let mut text = String::new();
    for parent in &ancestors.parents {
        let ancestors::Parent { image, report } = parent;
        let image = &*printable(image);
        let _ = write!(text, "\n\nparent {image}: {}{}", summary(report), findings(report, false));
        text += &mendable(report, image);
    }
    if let Some(fault) = &ancestors.chain_fault {
        let _ = write!(text, "\n\nthe chain is broken: {fault}");
    }
    if repaired && !text.is_empty() {
        text += "\n\nOnly the image itself was to be repaired: parents are never changed.";
    }
    text
}

/// `sound`, or how many there are of what, and the state of the log.
fn summary(report: &Report) -> String {
    let count = |count: u64, one: &str| match count {
        0 => None,
        1 => Some(format!("1 {one}")),
        count => Some(format!("{count} {one}s")),
    };
    let faults = [count(report.corruptions, "corruption"), count(report.leaks, "leak")];
    let faults: Vec<String> = faults.into_iter().flatten().collect();
    let mut text = if faults.is_empty() { "sound".to_owned() } else { faults.join(", ") };
    if report.log == LogFound::Dirty {
        let _ = write!(text, "; the log is dirty ({} entries to replay)", report.log_entries);
    }
    if report.leaked_bytes > 0 {
        let _ = write!(text, "; {} of free space taken on the host", size::human(report.leaked_bytes));
    }
    if !report.complete {
        text += "; what lies behind could not be examined";
    }
    text
}

/// The findings by structure, in the order of the examination; `mended` ones say what was done.
fn findings(report: &Report, mended: bool) -> String {
    let mut text = String::new();
    for group in report.findings.chunk_by(|a, b| a.structure == b.structure) {
        let _ = write!(text, "\n\n{}", group[0].structure);
        for finding in group {
            let _ = write!(text, "\n  {}", line(finding, mended));
        }
    }
    let kept = report.findings.len() as u64;
    let counted = report.corruptions + report.leaks + report.notes;
    if kept < counted {
        let _ = write!(text, "\n\n... and {} more", counted - kept);
    }
    text
}

fn line(finding: &Finding, mended: bool) -> String {
    let severity = match finding.severity {
        Severity::Corruption => "corruption",
        Severity::Leak => "leak",
        Severity::Note => "note",
    };
    let place = finding.offset.map_or_else(String::new, |offset| format!(" at byte {offset}"));
    let remedy = match (finding.remedy.as_deref().map(printable), finding.repairable, mended) {
        (None, ..) => String::new(),
        (Some(remedy), false, _) => format!("\n    try: {remedy}"),
        (Some(remedy), true, false) => format!("\n    --repair: {remedy}"),
        (Some(remedy), true, true) => format!("\n    repaired: {remedy}"),
    };
    format!("{severity}{place}: {}{remedy}", printable(&finding.what))
}
