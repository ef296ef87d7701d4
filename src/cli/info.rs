//! `info`: shows the properties of an image.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::chain;
use vhdx_ublk::device::claims;
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::error::{Error, Result};
use vhdx_ublk::format::guid;
use vhdx_ublk::format::locator::{ABSOLUTE_WIN32_PATH, RELATIVE_PATH, VOLUME_PATH};
use vhdx_ublk::format::metadata::DiskType;
use vhdx_ublk::format::region::Region;
use vhdx_ublk::image::{FoundLog, Image, SessionMemory};
use vhdx_ublk::operations::block_counts::BlockCounts;
use vhdx_ublk::operations::contents::{Contents, Journal, Partition, TableKind, Volume};
use vhdx_ublk::operations::inside;
use vhdx_ublk::operations::inspect::{self, Inspected, Opened};
use vhdx_ublk::printable::{both_sizes, human_size};

use super::output::{self, Failure, Fields};
use super::parent_options::AnswerOptions;
use super::{FAILURE, SUCCESS};

/// Show the properties of images, and what is on their disks, without changing them.
///
/// A dirty log is replayed in memory only. If another process is writing to the image, `info` shows a recent
/// state of it, and that it is in use.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Info {
    /// The VHDX files
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<PathBuf>,
    /// Show the parents of a differencing image too, nearest first
    #[arg(short, long)]
    chain: bool,
    /// Show one line for each image
    #[arg(short, long, conflicts_with_all = ["chain", "json"])]
    brief: bool,
    #[command(flatten)]
    pub answer: AnswerOptions,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk info disk.vhdx                      all that is known of an image
  vhdx-ublk info --chain child.avhdx            and of its parents
  vhdx-ublk info --brief *.vhdx *.avhdx         one line each

The minimum size is what the disk needs to keep its last partition, or the volume that it holds
as a whole. Fragmentation is the percentage of allocated blocks that do not directly follow the
previous one in the file. Free inside is what the file has between its blocks and does not use.

JSON: sizes and offsets are bytes, GUIDs lower case. Keys: image, format, type, virtual_size,
block_size, logical_sector_size, physical_sector_size, disk_id, file_write_guid,
data_write_guid, creator, header_sequence, log {state, size, offset, entries}, blocks {total,
allocated, partial, zero, not_present, undefined, unmapped}, fragmentation, regions [{name,
guid, offset, size, required}], file_size, host_bytes (space used on the host), free_bytes (free
inside), parent (null, or the entries of the parent locator), minimum_size (null if nothing is
recognised), contents {table {kind (gpt, mbr), id, backup_bytes, backup_at_end, partitions
[{number, start, length, type, name, volume}]}, volume {kind, version, label, uuid, size, journal
(clean, dirty, unknown)}, faults}, attached (null, or the device), attached_salvage (that device
is one of `add --salvage`), in_use, used_by, session_bytes (the most memory under /run that a
writable device of the image uses), warnings.
With --chain: chain, a list of such objects; contents are those of the first.
With several images: images, a list of objects; of an image that cannot be read: image, error.
Exit status: 0 success, 1 failure, 2 wrong usage.";

#[derive(Serialize, JsonSchema)]
struct Report {
    image: WrittenPath,
    format: &'static str,
    r#type: &'static str,
    virtual_size: u64,
    block_size: u32,
    logical_sector_size: u32,
    physical_sector_size: u32,
    disk_id: String,
    file_write_guid: String,
    data_write_guid: String,
    creator: String,
    header_sequence: u64,
    log: Log,
    blocks: BlockCounts,
    fragmentation: u64,
    regions: Vec<RegionReport>,
    file_size: u64,
    host_bytes: u64,
    free_bytes: u64,
    parent: Option<BTreeMap<String, String>>,
    minimum_size: Option<u64>,
    contents: Option<Contents>,
    attached: Option<String>,
    /// That device shows what is left of the image.
    attached_salvage: bool,
    in_use: bool,
    used_by: Vec<String>,
    /// The most memory under `/run` that the session of a writable device of it takes, bytes.
    session_bytes: u64,
    warnings: Vec<&'static str>,
}

/// Every layer, from the one that was named to the one without a parent.
#[derive(Serialize, JsonSchema)]
struct Chain {
    chain: Vec<Report>,
}

#[derive(Serialize, JsonSchema)]
struct Log {
    state: &'static str,
    size: u64,
    offset: u64,
    /// The entries to replay.
    entries: usize,
}

#[derive(Serialize, JsonSchema)]
struct RegionReport {
    name: &'static str,
    guid: String,
    offset: u64,
    size: u32,
    required: bool,
}

/// What is known of one image.
#[derive(Serialize, JsonSchema)]
#[serde(untagged)]
enum Answer {
    Image(Box<Report>),
    Chain(Chain),
}

/// One of several images.
#[derive(Serialize, JsonSchema)]
#[serde(untagged)]
enum OneOfSeveral<'a> {
    Readable(&'a Answer),
    Unreadable { image: WrittenPath, error: Failure<'a> },
}

impl<'a> OneOfSeveral<'a> {
    fn of(image: &Path, answer: &'a Result<Answer>) -> Self {
        match answer {
            Ok(answer) => Self::Readable(answer),
            Err(error) => Self::Unreadable { image: WrittenPath::of(image), error: Failure::of(error) },
        }
    }
}

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
#[serde(untagged)]
#[expect(private_interfaces, reason = "it is public for its schema only")]
pub enum Printed<'a> {
    One(&'a Answer),
    Several { images: Vec<OneOfSeveral<'a>> },
}

impl Info {
    /// Runs the command; returns the exit status.
    pub fn run(self) -> Result<u8> {
        if !self.chain {
            let refused = self.answer.parents.refuse_without("--chain");
            refused.map_err(|error| error.remedy("vhdx-ublk info --help"))?;
        }
        if self.brief {
            return brief(&self.images);
        }
        match &self.images[..] {
            [image] if self.answer.json => {
                output::print_json(&Printed::One(&self.answer(image)?)).map(|()| SUCCESS)
            }
            images if self.answer.json => self.json(images),
            images => self.text(images),
        }
    }

    /// What is known of `image`; with the chain, an error is one if the chain is broken.
    fn answer(&self, image: &Path) -> Result<Answer> {
        let (answer, broken) = self.look(image)?;
        broken.filter(|_| self.chain).map_or(Ok(answer), Err)
    }

    /// What is known of `image`, and why its chain is broken, if it is.
    fn look(&self, image: &Path) -> Result<(Answer, Option<Error>)> {
        let leaf = inspect::open(image)?;
        let mut parents = Vec::new();
        let followed =
            chain::follow_parents(&leaf, &self.answer.parents.search(), &mut parents, inspect::open);
        let broken = followed.err();
        let layers: Vec<&Opened> = std::iter::once(&leaf).chain(&parents).collect();
        let fault = broken.as_ref().map(|error| {
            let fault = "what its parents have is unknown";
            // Of a chain that is shown, the error follows.
            if self.chain { fault.to_owned() } else { format!("{fault}: {error:#}") }
        });
        let contents = inside::contents(&layers, fault);
        let report = Report::of(&leaf.inspected, Some(contents));
        if !self.chain {
            return Ok((Answer::Image(report.into()), broken));
        }
        let parents = parents.iter().map(|parent| Report::of(&parent.inspected, None));
        Ok((Answer::Chain(Chain { chain: std::iter::once(report).chain(parents).collect() }), broken))
    }

    fn json(&self, images: &[PathBuf]) -> Result<u8> {
        let answers: Vec<_> = images.iter().map(|image| self.answer(image)).collect();
        let images =
            images.iter().zip(&answers).map(|(image, answer)| OneOfSeveral::of(image, answer)).collect();
        output::print_json(&Printed::Several { images })?;
        Ok(if answers.iter().all(Result::is_ok) { SUCCESS } else { FAILURE })
    }

    fn text(&self, images: &[PathBuf]) -> Result<u8> {
        let show = |(number, image): (usize, &PathBuf)| {
            let (answer, broken) = self.look(image)?;
            let blank = if number == 0 { "" } else { "\n" };
            // The parents that were found come first, then the error.
            output::print(&format!("{blank}{answer}"))?;
            broken.filter(|_| self.chain).map_or(Ok(()), Err)
        };
        output::last_failure(images.iter().enumerate().map(show)).map(|()| SUCCESS)
    }
}

/// One line for each of `images`.
fn brief(images: &[PathBuf]) -> Result<u8> {
    let mut rows = Vec::new();
    let looked = images.iter().map(|image| {
        let report = Report::of(&inspect::inspect(image)?, None);
        let parent = report.parent.as_ref().map(|parent| {
            let mut paths = [RELATIVE_PATH, ABSOLUTE_WIN32_PATH, VOLUME_PATH].into_iter();
            paths.find_map(|key| parent.get(key)).map_or("unknown", String::as_str)
        });
        let sizes = [report.virtual_size, report.host_bytes, report.free_bytes].map(human_size);
        let [size, on_host, free] = sizes;
        let name = image.to_string_lossy().into_owned();
        rows.push([name, report.r#type.to_owned(), size, on_host, free, parent.unwrap_or("-").to_owned()]);
        Ok(())
    });
    let outcome = output::last_failure(looked);
    if !rows.is_empty() {
        output::print(&output::table(["IMAGE", "TYPE", "SIZE", "ON HOST", "FREE", "PARENT"], &rows))?;
    }
    outcome.map(|()| SUCCESS)
}

impl Report {
    fn of(inspected: &Inspected, contents: Option<Contents>) -> Self {
        let Image { creator, header, regions, metadata, map, space, .. } = &*inspected.image;
        let blocks = BlockCounts::of(&inspected.image);
        let served = claims::served(&inspected.path);
        Self {
            image: WrittenPath::of(&inspected.path),
            format: "vhdx",
            r#type: match metadata.kind() {
                DiskType::Fixed => "fixed",
                DiskType::Dynamic => "dynamic",
                DiskType::Differencing => "differencing",
            },
            virtual_size: metadata.virtual_size,
            block_size: metadata.block_size,
            logical_sector_size: metadata.logical_sector_size,
            physical_sector_size: metadata.physical_sector_size,
            disk_id: metadata.disk_id.to_string(),
            file_write_guid: header.header.file_write_guid.to_string(),
            data_write_guid: header.header.data_write_guid.to_string(),
            creator: creator.clone(),
            header_sequence: header.header.sequence_number,
            log: Log::of(&inspected.image),
            fragmentation: blocks.fragmentation(),
            blocks,
            regions: regions.table.entries().iter().map(RegionReport::of).collect(),
            file_size: inspected.file_size,
            host_bytes: inspected.host_bytes,
            free_bytes: space.free_runs().map(|run| run.length).sum(),
            parent: metadata.parent_locator.as_ref().map(|locator| locator.entries.iter().cloned().collect()),
            minimum_size: contents.as_ref().and_then(Contents::minimum_size),
            contents,
            attached: served.as_ref().map(|entry| entry.device.display().to_string()),
            attached_salvage: served.is_some_and(|entry| entry.salvage.is_some()),
            in_use: inspected.in_use,
            used_by: claims::processes(&inspected.path),
            session_bytes: SessionMemory::most_bytes(map.geometry()),
            warnings: inspected.warnings(),
        }
    }
}

impl Log {
    fn of(image: &Image) -> Self {
        let (state, entries) = match image.found_log {
            FoundLog::Clean => ("clean", 0),
            FoundLog::Dirty(entries) => ("dirty", entries),
            FoundLog::Virgin => ("virgin", 0),
        };
        Self { state, size: image.layout.log.length, offset: image.layout.log.offset, entries }
    }
}

impl RegionReport {
    fn of(region: &Region) -> Self {
        let name = match region.guid {
            guid::REGION_BAT => "BAT",
            guid::REGION_METADATA => "metadata",
            _ => "unknown",
        };
        let Region { guid, offset, length, required } = *region;
        Self { name, guid: guid.to_string(), offset, size: length, required }
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut fields = Fields::default();
        fields.add("image", self.image.text());
        fields.add("format", format!("VHDX, {}", self.r#type));
        self.describe_use(&mut fields);
        fields.add("virtual size", both_sizes(self.virtual_size));
        fields.add(
            "file size",
            format!("{}, uses {} on its host", both_sizes(self.file_size), human_size(self.host_bytes)),
        );
        if self.free_bytes > 0 {
            fields.add("free inside", both_sizes(self.free_bytes));
        }
        fields.add("block size", both_sizes(self.block_size.into()));
        fields.add(
            "sectors",
            format!("{} logical, {} physical", self.logical_sector_size, self.physical_sector_size),
        );
        fields.add("blocks", self.blocks.to_string());
        fields.add("fragmentation", format!("{} %", self.fragmentation));
        fields.add("log", self.log.to_string());
        for (key, region) in ["regions"].into_iter().chain(std::iter::repeat("")).zip(&self.regions) {
            fields.add(
                key,
                format!("{}, {} at byte {}", region.name, both_sizes(region.size.into()), region.offset),
            );
        }
        fields.add("session", format!("uses up to {} of memory under /run", human_size(self.session_bytes)));
        fields.add("header sequence", self.header_sequence.to_string());
        fields.add("disk id", self.disk_id.as_str());
        fields.add("file write guid", self.file_write_guid.as_str());
        fields.add("data write guid", self.data_write_guid.as_str());
        fields.add("creator", self.creator.as_str());
        let parent = self.parent.iter().flatten();
        for (key, (name, value)) in ["parent"].into_iter().chain(std::iter::repeat("")).zip(parent) {
            fields.add(key, format!("{name} = {value:?}"));
        }
        if let Some(contents) = &self.contents {
            describe(contents, &mut fields);
        }
        for warning in &self.warnings {
            fields.add("warning", *warning);
        }
        fields.fmt(f)
    }
}

/// What is on the disk.
fn describe(contents: &Contents, fields: &mut Fields) {
    if let Some(table) = &contents.table {
        let kind = match table.kind {
            TableKind::Gpt => "GPT",
            TableKind::Mbr => "MBR",
        };
        let id = table.id.as_ref().map(|id| format!(", disk id {id}")).unwrap_or_default();
        fields.add("table", format!("{kind}{id}"));
        if !table.backup_at_end {
            fields.add("", "its backup is not at the end of the disk");
        }
    }
    let partitions = contents.partitions().iter();
    for (key, partition) in ["partitions"].into_iter().chain(std::iter::repeat("")).zip(partitions) {
        fields.add(key, partition_text(partition));
    }
    if let Some(volume) = &contents.volume {
        let size = volume.size.map(|size| format!(", {}", both_sizes(size))).unwrap_or_default();
        fields.add("volume", format!("{}{size}", volume_text(volume)));
    }
    if let Some(size) = contents.minimum_size() {
        fields.add("minimum size", both_sizes(size));
    }
    for fault in &contents.faults {
        fields.add("fault", fault.as_str());
    }
}

fn partition_text(partition: &Partition) -> String {
    let Partition { number, start, length, r#type, name, volume } = partition;
    let meant = partition.type_name().unwrap_or(r#type);
    let name = name.as_ref().map(|name| format!(" {name:?}")).unwrap_or_default();
    let volume = volume.as_ref().map(|volume| format!(": {}", volume_text(volume))).unwrap_or_default();
    format!("{number}, {} at byte {start}, {meant}{name}{volume}", human_size(*length))
}

fn volume_text(volume: &Volume) -> String {
    let mut text = volume.version.map_or_else(
        || volume.kind.name().to_owned(),
        |version| format!("{} ({version})", volume.kind.name()),
    );
    text += &volume.label.as_ref().map(|label| format!(" {label:?}")).unwrap_or_default();
    text += &volume.uuid.as_ref().map(|uuid| format!(", {uuid}")).unwrap_or_default();
    if volume.journal == Journal::Dirty {
        text += ", not unmounted cleanly";
    }
    text
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Image(report) => report.fmt(f),
            Self::Chain(chain) => chain.fmt(f),
        }
    }
}

impl std::fmt::Display for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let layers: Vec<String> = self.chain.iter().map(Report::to_string).collect();
        f.write_str(&layers.join("\n\n"))
    }
}

impl Report {
    fn describe_use(&self, fields: &mut Fields) {
        if let Some(device) = &self.attached {
            let how = if self.attached_salvage { " (salvage: what is left of the image)" } else { "" };
            fields.add("attached", format!("{device}{how}"));
        }
        let users = self.used_by.join(", ");
        if self.in_use {
            let by = if users.is_empty() { String::new() } else { format!(" ({users})") };
            fields.add("in use", format!("by a writer{by}; the figures may be out of date"));
        } else if !users.is_empty() {
            fields.add("in use", users);
        }
    }
}

impl std::fmt::Display for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = match (self.state, self.entries) {
            ("dirty", entries) => format!("dirty, {entries} entries to replay"),
            ("virgin", _) => "announced but never written".into(),
            (state, _) => state.into(),
        };
        write!(f, "{state}; {} at byte {}", both_sizes(self.size), self.offset)
    }
}
