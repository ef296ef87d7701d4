//! Space that nothing names.
//!
//! Free space between used ones is legal: writers use it first. It is leaked as far as it takes room on the
//! host; a hole costs nothing.

use super::super::space::{Extent, Space};
use super::{Examination, Finding};
use crate::disk::Disk;
use crate::error::{Error, Result};
use crate::format::MIB;
use crate::format::metadata::{DiskType, Metadata};

const SPACE: &str = "space";

impl Examination {
    /// Free space that takes room on the host.
    pub(super) async fn leaks<D: Disk>(&mut self, disk: &D, space: &Space, length: u64) -> Result<()> {
        let repairable = self.knows_free_space();
        for run in space.free_runs().take_while(|run| run.offset < length) {
            self.report.free_bytes += run.length;
            let leaked = stored_bytes(disk, run).await?;
            if leaked == 0 {
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
        Ok(())
    }

    /// The unused end of the file. A fixed image keeps what its missing blocks will need.
    pub(super) fn tail(&mut self, metadata: &Metadata, space: &Space, length: u64) {
        let end = space.used_end();
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

/// How many bytes of `run` lie in MiB that the host stores.
async fn stored_bytes<D: Disk>(disk: &D, run: Extent) -> Result<u64> {
    let (mut at, mut stored) = (run.offset, 0);
    while at < run.end() {
        let found = disk.next_data(at).await;
        let found = found.map_err(|error| Error::io("looking for holes", error).at(at))?;
        let Some(found) = found.filter(|found| *found < run.end()) else { break };
        at = found - found % MIB + MIB;
        stored += MIB;
    }
    Ok(stored)
}
