//! `convert`: converts a disk into another format.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::disk::{BlockDevice, Sparse};
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::operations::convert::{Conversion, Converted, Input, Output};
use vhdx_ublk::operations::source::{DiskFormat, TO_QCOW2};
use vhdx_ublk::printable::{both_sizes, human_size};

use super::disk_source::{self, FormatName};
use super::output::{self, Fields};
use super::parent_options::ParentOptions;
use super::progress::ProgressOptions;
use super::target_shape::ShapeOptions;

/// Convert a disk: a VHDX with all its parents, a VHD, a raw file or a block device.
///
/// The target gets its name only when it is whole and synced. The source is locked and not changed; dirty
/// logs are replayed in memory.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Convert {
    /// The disk to read; - reads a raw disk from standard input
    source: PathBuf,
    /// The file to create, or with --existing what is overwritten; - writes a raw disk to standard output
    target: PathBuf,
    /// Format of the source [default: what its first and last bytes look like]
    #[arg(long, value_enum, value_name = "FORMAT")]
    from: Option<FormatName>,
    /// Format of the target [default: by the end of its name]
    #[arg(long, value_enum, value_name = "FORMAT")]
    to: Option<FormatName>,
    #[command(flatten)]
    shape: ShapeOptions,
    #[command(flatten)]
    parents: ParentOptions,
    /// Read the target back from the disk and compare it with the source
    #[arg(long)]
    verify: bool,
    /// Whether the file may have holes: Windows refuses an image whose file is sparse. `auto` makes none on
    /// NTFS and over SMB, where a hole marks the file as sparse
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto")]
    sparse: Sparse,
    #[command(flatten)]
    overwriting: Overwriting,
    /// Show what would be made, and make nothing
    #[arg(long)]
    dry_run: bool,
    /// As JSON: one object, errors too
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    progress: ProgressOptions,
}

/// What may be lost.
#[derive(clap::Args)]
struct Overwriting {
    /// Overwrite a block device or a raw file that exists, all of it: what lies beyond the end of
    /// the disk becomes zeros. It is not restored if the conversion fails
    #[arg(long, conflicts_with = "force")]
    existing: bool,
    /// Replace an existing image; with a raw target, any file. If the conversion fails, the old file stays
    #[arg(short, long)]
    force: bool,
    /// Begin although the file system may have too little room
    #[arg(long)]
    ignore_room: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk convert disk.vhdx disk.raw
  vhdx-ublk convert disk.raw disk.vhdx --block-size 32M
  vhdx-ublk convert checkpoint.avhdx flat.vhdx --verify   the chain becomes one image
  vhdx-ublk convert disk.vhdx upload.vhd --azure
  vhdx-ublk convert --existing disk.vhdx /dev/sdx
  curl https://example.org/disk.raw | vhdx-ublk convert - disk.vhdx

A raw disk can begin with anything its user writes: name its format (--from raw) if its content is
not trusted. A new VHDX is a disk of its own, with a new identifier.
The file of the target is readable by its owner only, or by those users of the file that it replaces
who can read the source.
Prints what was made, and how long it took.
JSON: target, format, virtual_size, required and fully_allocated (bytes of the file, as measure
shows them), written_bytes, shared_bytes (blocks that source and target share on their host), and
seconds (null after a dry run).
Exit status: 0 converted, 1 failure (no unfinished target is left), 2 wrong usage.";

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Json {
    target: Option<WrittenPath>,
    format: DiskFormat,
    virtual_size: Option<u64>,
    required: Option<u64>,
    fully_allocated: Option<u64>,
    written_bytes: u64,
    shared_bytes: u64,
    seconds: Option<f64>,
}

impl Convert {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let conversion = self.conversion()?;
        if self.dry_run {
            let planned = conversion.plan(&Claims)?;
            return if self.json {
                self.print_json(&conversion, planned, None)
            } else {
                self.print_plan(&conversion, planned)
            };
        }
        let (shown, started) = (self.progress.start()?, Instant::now());
        let converted = conversion.run(&Claims, &shown)?;
        let took = started.elapsed();
        drop(shown);
        match conversion.output {
            _ if self.json => self.print_json(&conversion, converted, Some(took)),
            Output::Stream => Ok(()),
            Output::File { .. } | Output::Existing(_) => {
                output::print_line(&self.closing_line(&conversion, converted, took))
            }
        }
    }

    /// What the options mean together.
    fn conversion(&self) -> Result<Conversion> {
        let is_stream = |path: &Path| path == Path::new("-");
        let (from_stream, to_stream) = (is_stream(&self.source), is_stream(&self.target));
        if to_stream && (self.json || self.dry_run || self.overwriting.existing || self.overwriting.force) {
            return usage(
                "with - as the target, standard output carries the disk: leave the other options out",
            );
        }
        if to_stream && std::io::stdout().is_terminal() {
            return usage("a terminal is no target: redirect standard output");
        }
        if self.verify && (from_stream || to_stream) {
            return usage("--verify reads source and target again, which a stream does not allow");
        }
        let over_old = self.overwriting.existing;
        if !over_old && BlockDevice::is_at(&self.target) {
            return usage("the target is a block device: --existing overwrites all of it");
        }
        let format = self.target_format(to_stream || over_old)?;
        if (over_old || to_stream) && format != DiskFormat::Raw {
            return usage(
                "a block device, an existing target and standard output get the disk itself: --to raw",
            );
        }
        let input = if from_stream {
            if self.from.is_some_and(|from| from != FormatName::Raw) {
                return usage("standard input is read as a raw disk");
            }
            Input::Stream { any_content: self.from.is_some() }
        } else {
            Input::Disk(disk_source::request(self.source.clone(), self.from, self.parents.search())?)
        };
        let by_name = FormatName::of_name(&self.target).and_then(|name| name.format(TO_QCOW2).ok());
        if !over_old && by_name.is_some_and(|by_name| by_name != format) {
            let target = self.target.display();
            tracing::warn!("{target}: its name says another format than {format}, which it gets");
        }
        let path = self.target.clone();
        let output = match () {
            () if to_stream => Output::Stream,
            () if over_old => Output::Existing(path),
            () => Output::File { path, replace: self.overwriting.force },
        };
        Ok(Conversion {
            input,
            output,
            shape: self.shape.shape(format)?,
            sparse: self.sparse,
            verify: self.verify,
            ignore_room: self.overwriting.ignore_room,
        })
    }

    fn target_format(&self, raw: bool) -> Result<DiskFormat> {
        let by_default = match () {
            () if raw => Some(FormatName::Raw),
            () if self.shape.azure() => Some(FormatName::Vhd),
            () => FormatName::of_name(&self.target),
        };
        match self.to.or(by_default) {
            Some(name) => name.format(TO_QCOW2),
            None => usage("the name of the target does not say its format: use --to"),
        }
    }

    fn print_json(
        &self,
        conversion: &Conversion,
        converted: Converted,
        took: Option<Duration>,
    ) -> Result<()> {
        let Converted { size, measured, written, shared } = converted;
        output::print_json(&Json {
            target: Some(WrittenPath::of(&self.target)),
            format: conversion.shape.format,
            virtual_size: size,
            required: measured.map(|measured| measured.required),
            fully_allocated: measured.map(|measured| measured.fully_allocated),
            written_bytes: written,
            shared_bytes: shared,
            seconds: took.map(|took| took.as_secs_f64()),
        })
    }

    /// What was made, of what size, and what it took.
    fn closing_line(&self, conversion: &Conversion, converted: Converted, took: Duration) -> String {
        let Converted { size, written, shared, .. } = converted;
        let format = conversion.shape.format;
        let kind = match format {
            DiskFormat::Raw => String::new(),
            _ if conversion.shape.fixed => ", fixed".to_owned(),
            _ => ", dynamic".to_owned(),
        };
        let shared = if shared > 0 {
            format!(", {} shared with the source", human_size(shared))
        } else {
            String::new()
        };
        format!(
            "{}: {format}{kind}, a disk of {}; {} written{shared}, {:.1} s",
            self.target.display(),
            human_size(size.unwrap_or(0)),
            human_size(written),
            took.as_secs_f64()
        )
    }

    fn print_plan(&self, conversion: &Conversion, planned: Converted) -> Result<()> {
        let Converted { size, measured, .. } = planned;
        let format = conversion.shape.format;
        let shown = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".to_owned(), both_sizes);
        let mut fields = Fields::default();
        fields.add("target", self.target.display().to_string());
        fields.add("format", format.to_string());
        fields.add("virtual size", shown(size));
        fields.add("takes at most", shown(measured.map(|measured| measured.required)));
        output::print(&fields.to_string())
    }
}

fn usage<T>(message: &str) -> Result<T> {
    Err(Error::new(Kind::Usage, message).remedy("vhdx-ublk convert --help"))
}
