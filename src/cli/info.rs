//! `info`: shows the properties of an image.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use vhdx_ublk::chain;
use vhdx_ublk::device::claims;
use vhdx_ublk::error::Result;
use vhdx_ublk::format::guid;
use vhdx_ublk::format::metadata::DiskType;
use vhdx_ublk::format::region::Region;
use vhdx_ublk::image::{FoundLog, Image, SessionMemory};
use vhdx_ublk::operations::block_counts::BlockCounts;
use vhdx_ublk::operations::inspect::{Inspected, inspect};
use vhdx_ublk::printable::{both_sizes, human_size};

use super::output::{self, Fields};
use super::parent_options::ParentOptions;

/// Show the properties of an image, without changing it.
///
/// A dirty log is replayed in memory only. If another process is writing to the image, `info` shows a recent
/// state of it, and that it is in use.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Info {
    /// The VHDX file
    image: PathBuf,
    /// Show the parents of a differencing image too, nearest first
    #[arg(short, long)]
    chain: bool,
    #[command(flatten)]
    parents: ParentOptions,
    /// As JSON: one object, errors too
    #[arg(long)]
    pub json: bool,
}

const AFTER_HELP: &str = "\
Fragmentation is the percentage of allocated blocks that do not directly follow the previous one
in the file.

JSON: sizes and offsets are bytes, GUIDs lower case. Keys: format, type, virtual_size,
block_size, logical_sector_size, physical_sector_size, disk_id, file_write_guid,
data_write_guid, creator, header_sequence, log {state, size, offset, entries}, blocks {total,
allocated, partial, zero, not_present, undefined, unmapped}, fragmentation, regions [{name,
guid, offset, size, required}], file_size, host_bytes (space used on the host), parent (null, or
the entries of the parent locator), attached (null, or the device), in_use, used_by,
session_bytes (the most memory under /run that a writable device of the image uses), warnings.
With --chain: chain, a list of such objects.
Exit status: 0 success, 1 failure, 2 wrong usage.";

#[derive(Serialize)]
struct Report {
    image: String,
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
    parent: Option<BTreeMap<String, String>>,
    attached: Option<String>,
    in_use: bool,
    used_by: Vec<String>,
    /// The most memory under `/run` that the session of a writable device of it takes, bytes.
    session_bytes: u64,
    warnings: Vec<&'static str>,
}

/// Every layer, from the one that was named to the one without a parent.
#[derive(Serialize)]
struct Chain {
    chain: Vec<Report>,
}

#[derive(Serialize)]
struct Log {
    state: &'static str,
    size: u64,
    offset: u64,
    /// The entries to replay.
    entries: usize,
}

#[derive(Serialize)]
struct RegionReport {
    name: &'static str,
    guid: String,
    offset: u64,
    size: u32,
    required: bool,
}

impl Info {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let inspected = inspect(&self.image)?;
        if !self.chain {
            self.parents.refuse_without("--chain")?;
            let report = Report::of(&inspected);
            return if self.json { output::print_json(&report) } else { output::print(&report.to_string()) };
        }
        let mut parents = Vec::new();
        let followed = chain::follow_parents(&inspected, &self.parents.search(), &mut parents, inspect);
        let chain = Chain { chain: std::iter::once(&inspected).chain(&parents).map(Report::of).collect() };
        if self.json {
            followed?;
            return output::print_json(&chain);
        }
        // The parents that were found come first, then the error.
        output::print(&chain.to_string())?;
        followed
    }
}

impl Report {
    fn of(inspected: &Inspected) -> Self {
        let Image { creator, header, regions, metadata, map, .. } = &*inspected.image;
        let blocks = BlockCounts::of(&inspected.image);
        Self {
            image: inspected.path.to_string_lossy().into_owned(),
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
            parent: metadata.parent_locator.as_ref().map(|locator| locator.entries.iter().cloned().collect()),
            attached: claims::device_of(&inspected.path).map(|device| device.display().to_string()),
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
        fields.add("image", self.image.as_str());
        fields.add("format", format!("VHDX, {}", self.r#type));
        self.describe_use(&mut fields);
        fields.add("virtual size", both_sizes(self.virtual_size));
        fields.add(
            "file size",
            format!("{}, uses {} on its host", both_sizes(self.file_size), human_size(self.host_bytes)),
        );
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
        for warning in &self.warnings {
            fields.add("warning", *warning);
        }
        fields.fmt(f)
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
            fields.add("attached", device.as_str());
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
