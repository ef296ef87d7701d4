//! `info`: what an image is like.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::ops::Range;
use std::path::PathBuf;

use serde::Serialize;

use vhdx_ublk::chain;
use vhdx_ublk::error::Result;
use vhdx_ublk::format::bat::{BatEntry, PayloadState};
use vhdx_ublk::format::guid;
use vhdx_ublk::format::header::Other;
use vhdx_ublk::format::metadata::DiskType;
use vhdx_ublk::format::region::{Copies, Region};
use vhdx_ublk::image::{BlockMap, FoundLog, Image, SessionMemory};

use super::look::{self, Seen};
use super::output::{self, Fields};
use super::parents::ParentOptions;
use super::{holders, size};

/// Show what an image is like, without changing it.
///
/// A dirty log is replayed in memory only. An image that somebody writes to is shown as it was at some recent
/// moment, and said to be in use.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Info {
    /// The VHDX file
    image: PathBuf,
    /// Show a differencing image's parents too, its own first
    #[arg(short, long)]
    chain: bool,
    #[command(flatten)]
    parents: ParentOptions,
    /// As JSON: one object, errors too
    #[arg(long)]
    pub json: bool,
}

const AFTER_HELP: &str = "\
Fragmentation is the share of allocated blocks, in percent, that do not follow their predecessor
in the file.

JSON: sizes and offsets are bytes, GUIDs lower case. Keys: format, type, virtual_size,
block_size, logical_sector_size, physical_sector_size, disk_id, file_write_guid,
data_write_guid, creator, header_sequence, log {state, size, offset, entries}, blocks {total,
allocated, partial, zero, not_present, undefined, unmapped}, fragmentation, regions [{name,
guid, offset, size, required}], file_size, host_bytes (space taken on the host), parent (null,
or the parent locator's entries), attached (null, or the device), in_use, used_by,
session_bytes (the most memory under /run that a writable device of it takes), warnings.
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
    blocks: Blocks,
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
    /// To be replayed.
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

/// Payload blocks by state.
#[derive(Default, Debug, PartialEq, Eq, Serialize)]
struct Blocks {
    total: u64,
    /// With all their data in this file.
    allocated: u64,
    /// With some of their data in this file, the rest in the parent.
    partial: u64,
    zero: u64,
    not_present: u64,
    undefined: u64,
    unmapped: u64,
    /// Allocated or partial, and not behind their predecessor in the file.
    #[serde(skip)]
    misplaced: u64,
}

impl Info {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let seen = look::look(&self.image)?;
        if !self.chain {
            self.parents.refuse_without("--chain")?;
            let report = Report::of(&seen);
            return if self.json { output::print_json(&report) } else { output::print(&report.to_string()) };
        }
        let mut parents = Vec::new();
        let followed = chain::follow_parents(&seen, &self.parents.search(), &mut parents, look::look);
        let chain = Chain { chain: std::iter::once(&seen).chain(&parents).map(Report::of).collect() };
        if self.json {
            followed?;
            return output::print_json(&chain);
        }
        // As far as it leads: what is wrong with it follows.
        output::print(&chain.to_string())?;
        followed
    }
}

impl Report {
    fn of(seen: &Seen) -> Self {
        let Image { creator, header, regions, metadata, map, .. } = &*seen.image;
        let blocks = Blocks::count(map, &seen.image.stored_slots);
        Self {
            image: seen.path.to_string_lossy().into_owned(),
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
            log: Log::of(&seen.image),
            fragmentation: blocks.fragmentation(),
            blocks,
            regions: regions.table.entries().iter().map(RegionReport::of).collect(),
            file_size: seen.file_size,
            host_bytes: seen.host_bytes,
            parent: metadata.parent_locator.as_ref().map(|locator| locator.entries.iter().cloned().collect()),
            attached: holders::device_of(&seen.path).map(|device| device.display().to_string()),
            in_use: seen.in_use,
            used_by: holders::processes(&seen.path),
            session_bytes: SessionMemory::most_bytes(map.geometry()),
            warnings: warnings(&seen.image),
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

impl Blocks {
    /// Counts the blocks; those outside the `stored` slots are not there.
    fn count(map: &BlockMap, stored: &[Range<u64>]) -> Self {
        let geometry = map.geometry();
        let mut blocks = Self { total: geometry.block_count(), ..Self::default() };
        let mut expected = None;
        let mut looked_at = 0;
        let stored = stored.iter().cloned().flatten();
        for block in stored.filter_map(|slot| geometry.block_of_slot(slot)) {
            looked_at += 1;
            let entry = map.load(block).entry;
            *blocks.of_state(entry) += 1;
            if matches!(
                entry.payload_state(),
                Some(PayloadState::FullyPresent | PayloadState::PartiallyPresent)
            ) {
                blocks.misplaced += u64::from(expected.is_some_and(|expected| expected != entry.offset()));
                expected = Some(entry.offset() + geometry.block_size());
            }
        }
        blocks.not_present += geometry.block_count() - looked_at;
        blocks
    }

    fn of_state(&mut self, entry: BatEntry) -> &mut u64 {
        match entry.payload_state().expect("an opened image has no reserved states") {
            PayloadState::NotPresent => &mut self.not_present,
            PayloadState::Undefined => &mut self.undefined,
            PayloadState::Zero => &mut self.zero,
            PayloadState::Unmapped => &mut self.unmapped,
            PayloadState::FullyPresent => &mut self.allocated,
            PayloadState::PartiallyPresent => &mut self.partial,
        }
    }

    fn fragmentation(&self) -> u64 {
        let steps = (self.allocated + self.partial).saturating_sub(1);
        (self.misplaced * 100).checked_div(steps).unwrap_or(0)
    }
}

/// What is odd, and no hindrance.
fn warnings(image: &Image) -> Vec<&'static str> {
    let mut warnings = Vec::new();
    match (image.header.other, image.header.slot) {
        (Other::Invalid, 0) => warnings.push("header 2 is damaged; header 1 is used"),
        (Other::Invalid, _) => warnings.push("header 1 is damaged; header 2 is used"),
        (Other::Older | Other::Identical, _) => {}
    }
    match image.regions.copies {
        Copies::Equal => {}
        Copies::Different => warnings.push("the two region tables differ; the first is used"),
        Copies::FirstInvalid => warnings.push("region table 1 is damaged; region table 2 is used"),
        Copies::SecondInvalid => warnings.push("region table 2 is damaged; region table 1 is used"),
    }
    warnings
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut fields = Fields::default();
        fields.add("image", self.image.as_str());
        fields.add("format", format!("VHDX, {}", self.r#type));
        self.describe_use(&mut fields);
        fields.add("virtual size", size::both(self.virtual_size));
        fields.add(
            "file size",
            format!("{}, takes {} on its host", size::both(self.file_size), size::human(self.host_bytes)),
        );
        fields.add("block size", size::both(self.block_size.into()));
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
                format!("{}, {} at byte {}", region.name, size::both(region.size.into()), region.offset),
            );
        }
        fields
            .add("session", format!("takes up to {} of memory under /run", size::human(self.session_bytes)));
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
            fields.add("in use", format!("by a writer{by}; figures may be stale"));
        } else if !users.is_empty() {
            fields.add("in use", users);
        }
    }
}

impl std::fmt::Display for Blocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = format!("{} in total: {} allocated", self.total, self.allocated);
        let rest = [
            (self.partial, "partial"),
            (self.zero, "zero"),
            (self.not_present, "not present"),
            (self.undefined, "undefined"),
            (self.unmapped, "unmapped"),
        ];
        for (count, name) in rest.into_iter().filter(|(count, _)| *count > 0) {
            write!(text, ", {count} {name}")?;
        }
        f.write_str(&text)
    }
}

impl std::fmt::Display for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let state = match (self.state, self.entries) {
            ("dirty", entries) => format!("dirty, {entries} entries to replay"),
            ("virgin", _) => "announced and never written".into(),
            (state, _) => state.into(),
        };
        write!(f, "{state}; {} at byte {}", size::both(self.size), self.offset)
    }
}

#[cfg(test)]
mod tests {
    use vhdx_ublk::format::MIB;
    use vhdx_ublk::format::bat::Geometry;

    use super::*;

    fn count(map: &BlockMap) -> Blocks {
        Blocks::count(map, std::slice::from_ref(&(0..map.geometry().slot_count())))
    }

    fn map(entries: &[BatEntry]) -> BlockMap {
        let map = BlockMap::empty(Geometry::new(entries.len() as u64 * MIB, 1 << 20, 512, false));
        for (block, entry) in (0..).zip(entries) {
            map.publish(block, *entry);
        }
        map
    }

    #[test]
    fn every_block_is_counted_once() {
        let at = |mib: u64| BatEntry::present(mib * MIB);
        let blocks = count(&map(&[at(5), BatEntry::zero(), at(6), BatEntry::unmapped(), at(9), at(2)]));
        let expected =
            Blocks { total: 6, allocated: 4, zero: 1, unmapped: 1, misplaced: 2, ..Blocks::default() };
        assert_eq!(blocks, expected);
        assert_eq!(blocks.fragmentation(), 66, "of three steps two go elsewhere");
        assert_eq!(blocks.to_string(), "6 in total: 4 allocated, 1 zero, 1 unmapped");
    }

    #[test]
    fn nothing_and_a_single_block_are_not_fragmented() {
        assert_eq!(count(&map(&[BatEntry::zero()])).fragmentation(), 0);
        assert_eq!(count(&map(&[BatEntry::present(9 * MIB)])).fragmentation(), 0);
    }
}
