//! Space that nothing names.
//!
//! Free space between used ones is legal: writers use it first. It is leaked as far as it takes room on the
//! host; a hole costs nothing. A host that takes no space back makes no difference between the two: there it
//! is free space, and no leak.

use super::super::space::{Extent, Space};
use super::{Examination, Finding};
use crate::disk::ReadDisk;
use crate::error::{Error, Result};
use crate::format::metadata::{DiskType, Metadata};
use crate::format::{HEADER_SECTION, MIB};

const SPACE: &str = "space";

impl Examination {
    /// Free space that takes room on the host.
    pub(super) async fn leaks<D: ReadDisk>(&mut self, disk: &D, space: &Space, length: u64) -> Result<()> {
        let repairable = self.knows_free_space();
        let (mut kept, takes_back) = (None, disk.takes_space_back());
        for run in space.free_runs().take_while(|run| run.offset < length) {
            self.report.free_bytes += run.length;
            let leaked = stored_bytes(disk, run).await?;
            assert!(leaked <= run.length, "the host stores {leaked} of the {} bytes of a run", run.length);
            if leaked == 0 {
                continue;
            }
            if !takes_back {
                let (_, bytes) = kept.get_or_insert((run.offset, 0));
                *bytes += leaked;
                continue;
            }
            self.report.leaked_bytes += leaked;
            let what = format!(
                "nothing names the {} bytes from here on, and {leaked} of them take room on the host",
                run.length
            );
            let finding = Finding::leak(SPACE, run.offset, what);
            self.report.add(if repairable {
                finding.mended_by("is given back to the host; writers use it in any case")
            } else {
                finding
            });
        }
        if let Some((at, bytes)) = kept {
            let what = format!(
                "{bytes} bytes between used ones are free and take room on the host, which takes no space \
                 back: later writes use them first"
            );
            self.report.add(Finding::note(SPACE, at, what));
        }
        Ok(())
    }

    /// Blocks at the file's end of which the host stores nothing. They read as zeros, as they would if the
    /// file had been cut short and made longer again.
    pub(super) async fn hollow_end<D: ReadDisk>(
        &mut self,
        disk: &D,
        metadata: &Metadata,
        space: &Space,
        length: u64,
    ) -> Result<()> {
        let end = space.used_end().min(length).div_ceil(MIB);
        let first = first_hollow(disk, end).await?;
        let named = |unit: &u64| {
            let inside = |extent: &Extent| (extent.offset..extent.end()).contains(&(unit * MIB));
            space.is_used(unit * MIB..(unit + 1) * MIB)
                && !self.fixtures.iter().any(|(extent, _)| inside(extent))
        };
        let blocks = (first..end).filter(named).count() as u64 * MIB / u64::from(metadata.block_size);
        // A fixed image has all its blocks from the start.
        if blocks > 0 && metadata.kind() != DiskType::Fixed {
            let what = format!(
                "{blocks} blocks at the end of the file take no room on the host and read as zeros: if the \
                 file was ever cut short and made longer again, their data is lost"
            );
            self.report.add(Finding::note(SPACE, first * MIB, what));
        }
        Ok(())
    }

    /// The unused end of the file. A fixed image keeps what its missing blocks will need.
    pub(super) fn tail(&mut self, metadata: &Metadata, space: &Space, length: u64) {
        let end = space.used_end();
        assert!(end >= HEADER_SECTION, "the header section is always used");
        if end >= length {
            return;
        }
        self.report.unused_tail_bytes = length - end;
        let finding = Finding::note(SPACE, end, format!("the last {} bytes are unused", length - end));
        let kept = metadata.kind() == DiskType::Fixed && self.report.allocated_blocks < self.report.blocks;
        if kept || !self.knows_free_space() {
            return self.report.add(finding);
        }
        self.trimmed_length = Some(end);
        self.report.add(finding.mended_by("is cut off, as at every clean end"));
    }
}

/// The first MiB below `end` from which on the host stores nothing of the file; `end` if its last one is
/// stored.
async fn first_hollow<D: ReadDisk>(disk: &D, end: u64) -> Result<u64> {
    let (mut low, mut high) = (0, end);
    while low < high {
        let middle = low.midpoint(high);
        let found = disk.next_data(middle * MIB).await;
        let found = found.map_err(|error| Error::io("looking for holes", error).at(middle * MIB))?;
        if found.is_some_and(|found| found < end * MIB) { low = middle + 1 } else { high = middle }
    }
    assert!(low <= end, "the search ends where the file does");
    Ok(low)
}

/// How many bytes of `run` lie in MiB that the host stores.
async fn stored_bytes<D: ReadDisk>(disk: &D, run: Extent) -> Result<u64> {
    let (mut at, mut stored) = (run.offset, 0);
    while at < run.end() {
        let found = disk.next_data(at).await;
        let found = found.map_err(|error| Error::io("looking for holes", error).at(at))?;
        let Some(found) = found.filter(|found| *found < run.end()) else { break };
        let next = found - found % MIB + MIB;
        assert!(next > at, "the search goes forward, from {at} to {next}");
        at = next;
        stored += MIB;
    }
    Ok(stored)
}
