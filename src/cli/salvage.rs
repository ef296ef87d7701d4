//! `salvage`: copies what is left of a damaged image.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::disk::Reactor;
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::image::Note;
use vhdx_ublk::operations::contents::Partition;
use vhdx_ublk::operations::salvage::{Copy, Damaged, Form, PartitionTally, Tally, Totals};
use vhdx_ublk::printable::{both_sizes, human_size, printable};

use super::disk_source::FormatName;
use super::output::{self, Failure, Fields};
use super::parent_options::ParentOptions;
use super::progress::ProgressOptions;

/// Copy what is left of a damaged image into a raw disk or a new image.
///
/// The image may be cut short, overwritten in part, or on a disk that fails; it is only read. What is lost
/// reads as zeros in the copy, and is listed in the mapfile.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own on the command line")]
pub struct Salvage {
    /// The VHDX file
    image: PathBuf,
    /// The file that gets the content of the disk
    #[arg(required_unless_present = "dry_run")]
    target: Option<PathBuf>,
    /// What the copy is [default: vhdx if its name ends in that or avhdx, otherwise raw]
    #[arg(long, value_enum, value_name = "FORMAT")]
    to: Option<Form>,
    /// Write a mapfile of GNU ddrescue: which bytes of the disk came back, and which are lost
    #[arg(long, value_name = "FILE")]
    mapfile: Option<PathBuf>,
    /// Use what can only be guessed: where the regions are if no table names them, what the disk is like if
    /// the metadata are lost
    #[arg(long)]
    assume: bool,
    /// Replace images and empty files that are in the way
    #[arg(short, long)]
    force: bool,
    /// Only show what is damaged, and what would come back if all of the file can be read
    #[arg(long, conflicts_with_all = ["to", "mapfile", "force", "assume"])]
    dry_run: bool,
    #[command(flatten)]
    parents: ParentOptions,
    #[command(flatten)]
    progress: ProgressOptions,
    /// As JSON: one object, errors too
    #[arg(long)]
    pub json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk salvage --dry-run disk.vhdx
  vhdx-ublk salvage disk.vhdx copy.raw --mapfile copy.map
  ddrescuelog --show-status copy.map              the lost bytes in figures
  losetup --find --show --partscan copy.raw       the copy as a disk
  vhdx-ublk salvage disk.vhdx copy.vhdx           as a new dynamic image

Every structure is read as far as it is left: one of two headers or region tables is enough, and
none is needed with --assume. Lost are blocks whose entries are damaged, that lie beyond the end of
the file, or that share space with something else, and sectors that the host cannot read. In the
mapfile + marks bytes that came back, - lost ones, and ? those of which it is not known whether
they are complete, because a log or a parent is missing.
JSON: sizes are bytes. Keys: image, target and mapfile (null with --dry-run), virtual_size,
finished_bytes, lost_bytes, unknown_bytes, partitions [{number, start, length, type, name, volume
(null, or kind, version, label, uuid, size, journal) and the same three}], notes [{image, structure,
what, is_guess}], missing_parent and left_session (null, or an error).
Exit status: 0 all of the disk came back, 1 failure (no unfinished file is left), 2 wrong usage,
3 the copy is made, and bytes of the disk are lost or not known; with --dry-run, as they would be.";

/// Exit statuses, as the help text states them.
const WHOLE: u8 = 0;
const WITH_LOSSES: u8 = 3;

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Report<'a> {
    image: WrittenPath,
    target: Option<WrittenPath>,
    mapfile: Option<WrittenPath>,
    virtual_size: u64,
    #[serde(flatten)]
    tally: Tally,
    notes: Vec<NoteOf<'a>>,
    missing_parent: Option<Failure<'a>>,
    left_session: Option<Failure<'a>>,
}

#[derive(Serialize, JsonSchema)]
struct NoteOf<'a> {
    image: WrittenPath,
    #[serde(flatten)]
    note: &'a Note,
}

impl Salvage {
    /// Runs the command.
    pub fn run(self) -> Result<u8> {
        let Self { image, target, to, mapfile, assume, force, parents, progress, .. } = self;
        let reactor = Reactor::new()?;
        let damaged = Damaged::open(&image, &parents.search(), &reactor, &Claims)?;
        let target = target.filter(|_| !self.dry_run);
        let tally = match target.clone() {
            None => damaged.plan(&reactor),
            Some(target) => {
                let form = to.map_or_else(|| form_of(&target), Ok)?;
                let copy = Copy { form, target, mapfile: mapfile.clone(), replace: force, assume };
                damaged.copy(&copy, &reactor, &progress.start()?, &Claims)?
            }
        };
        let report = Report::of(&damaged, tally, target.as_deref(), mapfile.as_deref());
        if self.json {
            output::print_json(&report)?;
        } else {
            output::print(&report.text())?;
        }
        let Totals { finished_bytes, .. } = report.tally.totals;
        Ok(if finished_bytes == report.virtual_size { WHOLE } else { WITH_LOSSES })
    }
}

impl<'a> Report<'a> {
    fn of(damaged: &'a Damaged, tally: Tally, target: Option<&Path>, mapfile: Option<&Path>) -> Self {
        Self {
            image: WrittenPath::of(damaged.path()),
            target: target.map(WrittenPath::of),
            mapfile: mapfile.map(WrittenPath::of),
            virtual_size: damaged.virtual_size(),
            tally,
            notes: damaged
                .notes()
                .map(|(path, note)| NoteOf { image: WrittenPath::of(path), note })
                .collect(),
            missing_parent: damaged.missing_parent().map(|error| Failure::of(error)),
            left_session: damaged.left_session().map(|error| Failure::of(error)),
        }
    }

    fn text(&self) -> String {
        let mut fields = Fields::default();
        fields.add("image", self.image.text());
        if let Some(target) = &self.target {
            fields.add("copy", target.text());
        }
        fields.add("disk", both_sizes(self.virtual_size));
        let Totals { finished_bytes, lost_bytes, unknown_bytes } = self.tally.totals;
        fields.add(
            if self.target.is_some() { "came back" } else { "can come back" },
            both_sizes(finished_bytes),
        );
        fields.add("lost", both_sizes(lost_bytes));
        if unknown_bytes > 0 {
            fields.add("not known", both_sizes(unknown_bytes));
        }
        for PartitionTally { partition, totals } in &self.tally.partitions {
            let Totals { finished_bytes, lost_bytes, unknown_bytes } = *totals;
            if lost_bytes + unknown_bytes > 0 {
                let name = format!("partition {}{}", partition.number, volume(partition));
                let lacks =
                    format!("{} lost, {} not known", human_size(lost_bytes), human_size(unknown_bytes));
                fields.add("", format!("{name}: {} back, {lacks}", human_size(finished_bytes)));
            }
        }
        let mut text = fields.to_string();
        for NoteOf { image, note } in &self.notes {
            let guess = if note.is_guess { " (a guess)" } else { "" };
            let place =
                if *image == self.image { String::new() } else { format!("{}: ", printable(image.text())) };
            let _ = write!(text, "\n{place}{}{guess}: {}", note.structure, printable(&note.what));
        }
        let failures =
            [("a parent is missing", &self.missing_parent), ("a session is left", &self.left_session)];
        for (what, failure) in failures {
            if let Some(failure) = failure {
                let _ = write!(text, "\n{what}: {}", failure.text());
            }
        }
        text
    }
}

/// The form that the name of a copy shows.
fn form_of(target: &Path) -> Result<Form> {
    match FormatName::of_name(target) {
        None | Some(FormatName::Raw) => Ok(Form::Raw),
        Some(FormatName::Vhdx) => Ok(Form::Vhdx),
        Some(FormatName::Vhd | FormatName::Qcow2) => {
            let message =
                "the name of the copy says a format that it cannot have: it is a raw disk or a VHDX image";
            let remedy =
                "give it another name, or say which with --to; `vhdx-ublk convert` makes a VHD of it";
            Err(Error::new(Kind::Usage, message).file(target).remedy(remedy))
        }
    }
}

/// What a partition holds, in parentheses, if that is known.
fn volume(partition: &Partition) -> String {
    let Some(volume) = &partition.volume else { return String::new() };
    match &volume.label {
        Some(label) => format!(" ({} {label:?})", volume.kind.name()),
        None => format!(" ({})", volume.kind.name()),
    }
}
