//! The examination of an image: every structure, going on after a finding wherever it can.
//!
//! * Nothing is written. A dirty log is replayed in memory, and everything behind it examined as replayed.
//! * Memory is bounded by what opening takes, less the block map: the BAT streams by, holes are skipped.
//! * A finding is *repairable* only if no reader that accepts the structure today reads other data after the
//!   repair. What could be data is never guessed at: shared space, reserved states and blocks past the end
//!   of the file stay as they are.

mod bat;
mod leaks;
mod report;
mod structures;

pub use report::{Finding, KEPT_FINDINGS, LogFound, Report, Severity};

use super::space::{Extent, Space};
use super::view::View;
use crate::disk::ReadDisk;
use crate::error::{Kind, Result};
use crate::format::HEADER_SECTION;
use crate::format::header::Current;
use crate::format::log::LOWEST_TARGET;

/// The log's name as an owner of space.
const LOG: &str = "the log";

/// Patches kept of one examination; what is left over is found by the next one. Bounds memory.
pub(super) const MAX_PATCHES: usize = 1 << 18;

/// Examines the image on `disk` without changing it.
///
/// # Errors
/// If there is no answer: the file is no VHDX, or not one this program handles; I/O errors. What contradicts
/// the format is a finding and no error.
pub async fn check<D: ReadDisk>(disk: &D) -> Result<Report> {
    examine(disk).await.map(|examination| examination.report)
}

/// Bytes that a repair lays over a replayed file, through the log.
#[derive(Clone, Debug)]
pub(super) struct Patch {
    /// Where, in bytes; inside the metadata.
    pub offset: u64,
    pub bytes: Box<[u8]>,
}

/// A report, and what a repair needs.
#[derive(Default)]
pub(super) struct Examination {
    pub report: Report,
    pub patches: Vec<Patch>,
    /// The current header, if there is one.
    pub header: Option<Current>,
    /// Positions of the log entries to replay; none if the log cannot be understood.
    pub log: Option<Vec<u32>>,
    /// What is used, and by whom, as far as it was found out.
    pub space: Option<Space>,
    /// The length to which the file can be cut.
    pub trimmed_length: Option<u64>,
    /// The file does not say that it is a VHDX, and is one.
    pub lacks_signature: bool,
    /// Space with one owner by name; all other used space is blocks.
    fixtures: Vec<(Extent, &'static str)>,
    /// Something else has space of the log, or the log changes blocks: it is neither replayed nor written.
    log_is_shared: bool,
}

impl Examination {
    /// Whether free space is surely free: what no repair mends may hide the use of it.
    fn knows_free_space(&self) -> bool {
        self.report.complete && self.report.beyond_repair == 0
    }

    /// Whether changes can go through the log.
    fn has_usable_log(&self) -> bool {
        let has_room = self.header.as_ref().is_some_and(|current| current.header.log_length > 0);
        self.report.complete && has_room && self.log.is_some() && !self.log_is_shared
    }

    /// `extent` is claimed, and byte `at` of it was another's already: whose?
    fn rival(&mut self, extent: Extent, at: u64) -> &'static str {
        assert!((extent.offset..extent.end()).contains(&at), "byte {at} is of {extent:?}");
        let meet = |other: &Extent| other.offset < extent.end() && extent.offset < other.end();
        self.log_is_shared |= self.fixtures.iter().any(|(other, name)| *name == LOG && meet(other));
        let has = |other: &Extent| other.offset <= at && at < other.end();
        match self.fixtures.iter().find(|(other, _)| has(other)) {
            Some((_, name)) => name,
            None if at < HEADER_SECTION => "the header section",
            None => "another block",
        }
    }

    /// A structure that was read; one that contradicts the format becomes a finding.
    fn take<T>(&mut self, read: Result<T>) -> Result<Option<T>> {
        match read {
            Ok(value) => Ok(Some(value)),
            Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Truncated) => {
                self.report.add(Finding::refusal(&error));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn patch(&mut self, offset: u64, bytes: &[u8]) {
        assert!(offset >= LOWEST_TARGET, "a patch goes through the log, which spares the headers: {offset}");
        assert!(!bytes.is_empty(), "a patch changes something");
        if self.patches.len() < MAX_PATCHES {
            self.patches.push(Patch { offset, bytes: bytes.into() });
        }
    }
}

/// Examines everything.
pub(super) async fn examine<D: ReadDisk>(disk: &D) -> Result<Examination> {
    let mut found = Examination::default();
    found.walk(disk).await?;
    if !found.has_usable_log() {
        found.report.withdraw_repairs();
        found.patches.clear();
    }
    assert!(found.patches.len() <= MAX_PATCHES, "patches are bounded");
    assert!(found.report.repairable > 0 || found.patches.is_empty(), "each patch mends a finding");
    Ok(found)
}

impl Examination {
    /// Goes from structure to structure, as one leads to the next, and ends where none does.
    async fn walk<D: ReadDisk>(&mut self, disk: &D) -> Result<()> {
        let file = View { disk, overlay: None };
        let length = file.length().await?;
        if !self.file_identifier(&file, length).await? {
            return Ok(());
        }
        let Some(header) = self.headers(&file, length).await? else { return Ok(()) };
        let overlay = self.log(disk, &header, length).await?;
        self.header = Some(header);
        let file = View { disk, overlay: overlay.as_ref() };
        let length = file.length().await?;
        let Some(regions) = self.regions(&file, length).await? else { return Ok(()) };
        let Some(metadata) = self.metadata(&file, regions.metadata()).await? else { return Ok(()) };
        let mut space = self.fixed_space(length)?;
        let whole = self.bat(&file, &metadata, regions.bat(), length, &mut space).await?;
        // Of a differencing image the log changes sector bitmaps too.
        if let Some(overlay) = overlay.as_ref().filter(|_| !metadata.has_parent) {
            self.logged_payload(overlay, &space);
        }
        self.report.complete = whole && self.log.is_some();
        self.leaks(disk, &space, length).await?;
        self.hollow_end(disk, &metadata, &space, length).await?;
        self.tail(&metadata, &space, length);
        self.space = Some(space);
        Ok(())
    }
}
