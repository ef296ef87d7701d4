//! `check`: checks an image and its chain.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::disk::SPARSE_FOR_WINDOWS;
use vhdx_ublk::error::{Error, Result};
use vhdx_ublk::image::{Finding, LogFound, Report, Severity};
use vhdx_ublk::operations::check::{Checked, CheckedChain, check, repair};
use vhdx_ublk::printable::{human_size, printable, shell};

use super::output::{self, Failure};
use super::parent_options::AnswerOptions;

/// Check the structure of an image: every header, table, log entry and block; for a differencing image, those
/// of its parents too.
///
/// Without --repair, nothing is changed, not even a timestamp. A dirty log is not a fault: everything else is
/// checked as if the log had been replayed.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Check {
    /// The VHDX file
    image: PathBuf,
    /// Replay the log, and repair what can be repaired without guessing. Parents are never changed
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    pub answer: AnswerOptions,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk check disk.vhdx             check it, and show what --repair would repair
  vhdx-ublk check --repair disk.vhdx    repair it

A corruption contradicts the format: data may be lost. A leak is space on the host that no block
uses: no data is in danger, and later writes may use it. A note is not a fault. Blocks that
overlap, reserved states and blocks beyond the end of the file are never repaired: their correct
values are unknown.
A chain is broken if a parent is missing, is another image, was written since its child was
created, has another sector size, or is its own ancestor.

JSON: offsets and sizes are bytes. Keys: image, is_sparse_for_windows (its file has holes for which
Windows refuses it), complete (everything could be checked),
corruptions, leaks, notes, beyond_repair (corruptions that --repair cannot repair), repairable
(findings that it can repair), log (clean, dirty, virgin, torn, unknown), log_entries (to replay),
blocks, allocated_blocks, free_bytes, leaked_bytes, unused_tail_bytes, findings [{severity,
structure, offset, what, remedy, repairable}] (at most 1000 of each severity), before (null, or
the same before --repair), done (what --repair did, a list of texts), parents (a list of the
same: parents, nearest first, up to the first broken link), chain_fault (null, or the error of
that link).
Exit status: 0 sound, 1 unknown (not readable, not a VHDX image, in use; wrong usage too), or the
image is sound but a parent has corruptions or the chain is broken, 2 corruptions, 3 leaks and no
corruption. After --repair, the exit status describes the repaired image.";

/// Exit statuses, as the help text states them.
const SOUND: u8 = 0;
const UNSOUND_CHAIN: u8 = 1;
const CORRUPT: u8 = 2;
const LEAKING: u8 = 3;

impl Check {
    /// Runs the command; returns the exit status.
    pub fn run(self) -> Result<u8> {
        let search = self.answer.parents.search();
        let examine = if self.repair { repair } else { check };
        let mut checked = examine(&self.image, &search, &Claims)?;
        name_in_advice(&mut checked);
        if self.answer.json {
            output::print_json(&Json::of(&checked))?;
        } else {
            output::print(&text(&checked))?;
        }
        Ok(status(&checked))
    }
}

/// Has the advice for each finding name the image.
fn name_in_advice(Checked { path, report, before, chain, .. }: &mut Checked) {
    let own = [Some(report), before.as_mut()].into_iter().flatten().map(|report| (&*path, report));
    for (path, report) in own.chain(chain.parents.iter_mut().map(|(path, report)| (&*path, report))) {
        for advice in report.findings.iter_mut().filter_map(|finding| finding.remedy.as_mut()) {
            *advice = output::about(advice, path);
        }
    }
}

fn status(Checked { report, chain, .. }: &Checked) -> u8 {
    match report.verdict() {
        Some(Severity::Corruption) => CORRUPT,
        _ if !chain.is_sound() => UNSOUND_CHAIN,
        Some(Severity::Leak) => LEAKING,
        _ if chain.has(Severity::Leak) => LEAKING,
        None | Some(Severity::Note) => SOUND,
    }
}

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Json<'a> {
    #[serde(flatten)]
    image: Examined<'a>,
    is_sparse_for_windows: bool,
    before: Option<&'a Report>,
    done: Vec<String>,
    parents: Vec<Examined<'a>>,
    chain_fault: Option<Failure<'a>>,
}

#[derive(Serialize, JsonSchema)]
struct Examined<'a> {
    image: WrittenPath,
    #[serde(flatten)]
    report: &'a Report,
}

impl<'a> Json<'a> {
    fn of(Checked { path, is_sparse_for_windows, report, before, chain }: &'a Checked) -> Self {
        let examined = |path: &Path, report| Examined { image: WrittenPath::of(path), report };
        Self {
            image: examined(path, report),
            is_sparse_for_windows: *is_sparse_for_windows,
            before: before.as_ref(),
            done: before.as_ref().map(|before| mended(before, report)).unwrap_or_default(),
            parents: chain.parents.iter().map(|(path, report)| examined(path, report)).collect(),
            chain_fault: chain.fault.as_ref().map(|fault| Failure::of(fault)),
        }
    }
}

/// What is printed for people.
fn text(Checked { path, is_sparse_for_windows, report, before, chain }: &Checked) -> String {
    let path = path.to_string_lossy();
    let image = &*printable(&path);
    let repaired = before.is_some();
    let mut text = match before {
        Some(before) if before != report => {
            let (done, was) = (mended(before, report).join(", "), summary(before));
            format!("{image} was repaired: {done}. Before: {was}{}\n\nNow: ", findings(before, true))
        }
        Some(_) => format!("{image}: nothing to repair; "),
        None => format!("{image}: "),
    };
    text += &summary(report);
    text += &findings(report, false);
    if !repaired {
        text += &mendable(report, image);
    }
    if *is_sparse_for_windows {
        let _ = write!(text, "\n\nnote: {SPARSE_FOR_WINDOWS}");
    }
    text += &salvageable(report, image);
    text + &parents(chain, repaired)
}

/// What a repair has done to the image that was as `before`, and is as `after` now.
fn mended(before: &Report, after: &Report) -> Vec<String> {
    let log = match (before.log, after.log, before.log_entries) {
        (LogFound::Dirty, LogFound::Clean, 1) => Some("1 log entry replayed".to_owned()),
        (LogFound::Dirty, LogFound::Clean, count) => Some(format!("{count} log entries replayed")),
        (LogFound::Virgin, LogFound::Clean, _) => Some("the log declared empty".to_owned()),
        _ => None,
    };
    let repaired = match before.repairable.saturating_sub(after.repairable) {
        0 => None,
        1 => Some("1 finding repaired".to_owned()),
        count => Some(format!("{count} findings repaired")),
    };
    let bytes = |before: u64, after: u64, what: &str| {
        let fewer = before.saturating_sub(after);
        (fewer > 0).then(|| format!("{} {what}", human_size(fewer)))
    };
    let given = bytes(before.leaked_bytes, after.leaked_bytes, "given back to the host");
    let cut = bytes(before.unused_tail_bytes, after.unused_tail_bytes, "cut off the end of the file");
    [log, repaired, given, cut].into_iter().flatten().collect()
}

/// What can be done about an image that stays damaged.
fn salvageable(report: &Report, image: &str) -> String {
    if report.beyond_repair == 0 {
        return String::new();
    }
    let image = shell(image.as_ref());
    format!(
        "\n\nwhat is left of the disk can be read as a device: vhdx-ublk add --salvage {image}\n\
         what is left of the disk can be copied: vhdx-ublk salvage {image} COPY"
    )
}

/// What `--repair` would do.
fn mendable(report: &Report, image: &str) -> String {
    if report.repairable == 0 || report.verdict().is_none() {
        return String::new();
    }
    format!(
        "\n\n{} of these can be repaired: vhdx-ublk check --repair {}",
        report.repairable,
        shell(image.as_ref())
    )
}

/// The parents, and the first broken link.
fn parents(chain: &CheckedChain, repaired: bool) -> String {
    let mut text = String::new();
    for (path, report) in &chain.parents {
        let path = path.to_string_lossy();
        let image = &*printable(&path);
        let _ = write!(text, "\n\nparent {image}: {}{}", summary(report), findings(report, false));
        text += &mendable(report, image);
        text += &salvageable(report, image);
    }
    if let Some(fault) = &chain.fault {
        let _ = write!(text, "\n\nthe chain is broken: {}", with_advice(fault));
    }
    if repaired && !text.is_empty() {
        text += "\n\nOnly the image itself was repaired: `check` never changes parents.";
    }
    text
}

fn with_advice(fault: &Error) -> String {
    match output::remedy(fault) {
        Some(remedy) => format!("{fault:#}\n  try: {}", printable(&remedy)),
        None => format!("{fault:#}"),
    }
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
        let _ = write!(text, "; {} of free space allocated on the host", human_size(report.leaked_bytes));
    }
    if !report.complete {
        text += "; the rest could not be checked";
    }
    text
}

/// The findings by structure, in the order of the examination; `mended` ones show what was done.
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
