//! Everything but the BAT: identifier, headers, log, region tables, metadata.

use super::super::log_scan::{Log, LogState};
use super::super::open;
use super::super::overlay::Overlay;
use super::super::replay;
use super::super::space::{Extent, Space};
use super::super::view::View;
use super::{Examination, Finding, LOG, LogFound};
use crate::disk::ReadDisk;
use crate::error::{Kind, Result};
use crate::format::header::{self, Current, Header, Other};
use crate::format::locator::ParentLocator;
use crate::format::metadata::{self, DiskType, Metadata};
use crate::format::region::{self, Copies, CurrentTable, MAX_ENTRIES, Region, RegionTable};
use crate::format::{HEADER_SECTION, MIB, guid};

const HEADERS: [&str; 2] = ["header 1", "header 2"];
const REGION_TABLES: [&str; 2] = ["region table 1", "region table 2"];

/// Signature and checksum of a region table, which changes with the rest.
const SEAL_BYTES: usize = 8;

/// What is done about reserved bits, which others refuse.
const ZEROED: &str = "is set to zero, as the format demands: no reader looks at it";

impl Examination {
    /// Whether the file says it is a VHDX.
    pub(super) async fn file_identifier<D: ReadDisk>(
        &mut self,
        file: &View<'_, D>,
        length: u64,
    ) -> Result<bool> {
        let parsed = open::read_file_id(file, length).await;
        if !length.is_multiple_of(MIB) {
            let what =
                format!("its {length} bytes are no whole number of MiB; writers complete the last one");
            self.report.add(Finding::note("file", length, what));
        }
        if let Err(error) = &parsed
            && error.kind() == Kind::Corrupt
        {
            self.lacks_signature = true;
            let finding = Finding::refusal(error);
            self.report.add(finding.mended_by("gets its signature back: the rest says that it is a VHDX"));
            return Ok(true);
        }
        Ok(self.take(parsed)?.is_some())
    }

    /// Both headers.
    pub(super) async fn headers<D: ReadDisk>(
        &mut self,
        file: &View<'_, D>,
        length: u64,
    ) -> Result<Option<Current>> {
        let slots = open::read_header_slots(file, length).await?;
        let Some(current) = self.take(header::current([&slots[0], &slots[1]]))? else { return Ok(None) };
        let other = current.slot ^ 1;
        if current.other == Other::Identical {
            let number = current.header.sequence_number;
            let what = format!("both headers are the same, sequence number {number} included; either counts");
            self.report.add(Finding::note("headers", header::OFFSETS[0], what));
        } else if let Err(error) = Header::parse(&slots[other]) {
            let what = format!("{}; {} counts", error.message(), HEADERS[current.slot]);
            let finding = Finding::corruption(HEADERS[other], header::OFFSETS[other], what);
            self.report.add(finding.mended_by("is written anew, as every update of the headers does"));
        }
        Ok(Some(current))
    }

    /// The log, and what it lays over the file.
    pub(super) async fn log<D: ReadDisk>(
        &mut self,
        disk: &D,
        current: &Current,
        length: u64,
    ) -> Result<Option<Overlay>> {
        self.report.log = LogFound::Torn;
        let Header { log_offset, log_length, .. } = current.header;
        if self.take(open::check_log_place(current, length))?.is_none() {
            return Ok(None);
        }
        let taken = u64::from(log_length).next_multiple_of(MIB);
        self.fixtures.push((Extent { offset: log_offset, length: taken }, LOG));
        if log_length == 0 {
            let what = "the image has no log: it can be read, not written to";
            self.report.add(Finding::note("log", header::OFFSETS[current.slot], what));
        }
        match self.take(Log::new(disk, &current.header).scan(length).await)? {
            None => Ok(None),
            Some(LogState::Clean) => {
                (self.report.log, self.log) = (LogFound::Clean, Some(Vec::new()));
                Ok(None)
            }
            Some(LogState::Virgin) => {
                (self.report.log, self.log) = (LogFound::Virgin, Some(Vec::new()));
                let what = "the header announces entries, and none was ever written; others refuse that";
                let finding = Finding::corruption("log", log_offset, what);
                self.report.add(finding.mended_by("is declared empty: nothing can have come from it"));
                Ok(None)
            }
            Some(LogState::Dirty(positions)) => self.dirty_log(disk, current, positions, length).await,
        }
    }

    async fn dirty_log<D: ReadDisk>(
        &mut self,
        disk: &D,
        current: &Current,
        positions: Vec<u32>,
        length: u64,
    ) -> Result<Option<Overlay>> {
        let replayed = replay::in_memory(disk, &current.header, &positions, length).await;
        let Some(overlay) = self.take(replayed)? else { return Ok(None) };
        (self.report.log, self.report.log_entries) = (LogFound::Dirty, positions.len());
        let what = format!("{} entries to replay; all else was examined as replayed", positions.len());
        let finding = Finding::note("log", current.header.log_offset, what);
        self.report.add(finding.mended_by("is replayed, as by every open for writing"));
        self.log = Some(positions);
        Ok(Some(overlay))
    }

    /// Both region tables, and whether the regions lie in the file.
    pub(super) async fn regions<D: ReadDisk>(
        &mut self,
        file: &View<'_, D>,
        length: u64,
    ) -> Result<Option<RegionTable>> {
        let first = file.read(REGION_TABLES[0], region::OFFSETS[0], region::SIZE).await?;
        let second = file.read(REGION_TABLES[1], region::OFFSETS[1], region::SIZE).await?;
        let copies: [&[u8]; 2] = [&first, &second];
        let Some(current) = self.take(region::current(copies))? else { return Ok(None) };
        self.region_copies(copies, &current);
        for region in current.table.entries() {
            if region.end() > length {
                let error = open::truncated("region", region.offset, region.end(), length);
                self.report.add(Finding::refusal(&error));
            } else {
                self.fixtures.push((open::extent_of(*region), region_name(region)));
            }
        }
        Ok(Some(current.table))
    }

    fn region_copies(&mut self, bytes: [&[u8]; 2], current: &CurrentTable) {
        let bad = match current.copies {
            Copies::Equal => None,
            Copies::FirstInvalid => Some(0),
            Copies::SecondInvalid => Some(1),
            Copies::Different => {
                let what = "differs from the first, which counts; both are intact";
                let finding = Finding::corruption(REGION_TABLES[1], region::OFFSETS[1], what);
                let remedy = "either may be the right one; every reader uses the first";
                return self.report.add(finding.remedy(remedy));
            }
        };
        let good = bytes[bad.map_or(0, |bad| bad ^ 1)];
        if let Some(bad) = bad {
            let why = RegionTable::parse(bytes[bad], bad).err().map_or_else(String::new, |e| e.message());
            let what = format!("{why}; {} counts", REGION_TABLES[bad ^ 1]);
            let finding = Finding::corruption(REGION_TABLES[bad], region::OFFSETS[bad], what);
            self.report.add(finding.mended_by("is copied from its twin"));
            self.patch(region::OFFSETS[bad], good);
        }
        if let Some(mended) = region::without_reserved(good) {
            let at = region::OFFSETS[0] + first_difference(good, &mended, SEAL_BYTES);
            let finding = Finding::corruption("region tables", at, "a reserved field is set");
            self.report.add(finding.mended_by(ZEROED));
            for offset in region::OFFSETS {
                self.patch(offset, &mended);
            }
        }
    }

    /// The metadata table and its items.
    pub(super) async fn metadata<D: ReadDisk>(
        &mut self,
        file: &View<'_, D>,
        region: Region,
    ) -> Result<Option<Metadata>> {
        let Some(metadata) = self.take(open::read_metadata(file, region).await)? else { return Ok(None) };
        let table = file.read("metadata table", region.offset, metadata::TABLE_SIZE).await?;
        if let Some(mended) = metadata::Table::without_reserved(&table) {
            let at = region.offset + first_difference(&table, &mended, 0);
            let finding = Finding::corruption("metadata table", at, "a reserved field is set");
            self.report.add(finding.mended_by(ZEROED));
            self.patch(region.offset, &mended);
        }
        if metadata.kind() == DiskType::Differencing {
            let what = "the image has a parent, and reads from it what it does not hold itself";
            self.report.add(Finding::note("metadata", region.offset, what));
            self.parent_locator(file, region, &table).await?;
        }
        Ok(Some(metadata))
    }

    /// Strings that end in a NUL are other paths to some readers.
    async fn parent_locator<D: ReadDisk>(
        &mut self,
        file: &View<'_, D>,
        region: Region,
        table: &[u8],
    ) -> Result<()> {
        let table = metadata::Table::parse(table, region.length)?;
        let Some(entry) = table.find(guid::PARENT_LOCATOR) else { return Ok(()) };
        let item = open::read_item(file, region, entry).await?;
        if let Some(mended) = ParentLocator::without_excess(&item) {
            let at = region.offset + u64::from(entry.offset);
            let what = "a string ends in a NUL, or the reserved field is set";
            let finding = Finding::corruption("parent locator", at, what);
            self.report
                .add(finding.mended_by("is removed, as the format requires: the strings stay the same"));
            // Only lengths before the strings change. All of a long item would not fit a log entry.
            let last = mended.iter().zip(&item).rposition(|(new, old)| new != old).expect("it differs");
            self.patch(at, &mended[..=last]);
        }
        Ok(())
    }

    /// The space of everything that is no block.
    pub(super) fn fixed_space(&mut self, length: u64) -> Result<Space> {
        assert!(self.fixtures.len() <= 2 + MAX_ENTRIES, "a log and a table of regions");
        let mut space = Space::new(length)?;
        for (extent, name) in std::mem::take(&mut self.fixtures) {
            if let Some(shared) = space.claim(extent) {
                let what = format!("{name} shares byte {shared} with {}", self.rival(extent, shared));
                self.report.add(Finding::corruption("region tables", extent.offset, what));
            }
            self.fixtures.push((extent, name));
        }
        Ok(space)
    }

    /// A log that changes blocks was not written by the rules, and replaying it would change data.
    pub(super) fn logged_payload(&mut self, overlay: &Overlay, space: &Space) {
        for range in overlay.ranges().filter(|range| range.end > HEADER_SECTION) {
            let start = range.start.max(HEADER_SECTION);
            let fixed = |(extent, _): &(Extent, _)| extent.offset <= start && range.end <= extent.end();
            if !self.fixtures.iter().any(fixed) && space.is_used(start..range.end) {
                self.log_is_shared = true;
                let what =
                    format!("an entry changes bytes {start} to {}, which belong to a block", range.end);
                self.report.add(Finding::corruption("log", start, what));
            }
        }
    }
}

fn region_name(region: &Region) -> &'static str {
    match region.guid {
        guid::REGION_BAT => "the BAT region",
        guid::REGION_METADATA => "the metadata region",
        _ => "an unknown region",
    }
}

/// Where two structures of one length begin to differ, behind the first `skipped` bytes.
fn first_difference(a: &[u8], b: &[u8], skipped: usize) -> u64 {
    assert!(a.len() == b.len() && skipped < a.len(), "both are one structure");
    let equal = a[skipped..].iter().zip(&b[skipped..]).take_while(|(a, b)| a == b).count();
    (skipped + equal) as u64
}
