//! Blocks that have space and read as zeros.
//!
//! A block of which the host has stored nothing is not read. Of the others the first bytes are read first:
//! most blocks with data are known by them.

use std::cell::Cell;
use std::ops::Range;

use smol::LocalExecutor;

use crate::chain::Content;
use crate::disk::{ReadDisk, is_zero, read_sectors};
use crate::error::{Error, Result};
use crate::format::{MIB, index};
use crate::image::Location;
use crate::operations::Watch;

/// Blocks that are read at once.
const LANES: usize = 8;

/// Bytes of a block that are read first.
const FIRST: u64 = 64 << 10;

/// Those of `blocks` of the leaf that read as zeros.
///
/// # Errors
/// I/O errors.
pub async fn find<D: ReadDisk>(content: &Content<D>, blocks: &[u64], watch: &impl Watch) -> Result<Vec<u64>> {
    let block_size = content.layers()[0].map.geometry().block_size();
    let (next, done) = (Cell::new(0), Cell::new(0));
    let lane = async || {
        let mut found = Vec::new();
        while let Some(block) = blocks.get(next.replace(next.get() + 1)) {
            if watch.stop_requested() {
                break;
            }
            if reads_as_zero(content, *block).await? {
                found.push(*block);
            }
            done.set(done.get() + block_size);
            watch.progress(done.get(), blocks.len() as u64 * block_size);
        }
        Result::Ok(found)
    };
    let lanes = LocalExecutor::new();
    let tasks: Vec<_> = (0..LANES.min(blocks.len())).map(|_| lanes.spawn(lane())).collect();
    let ends = lanes.run(async {
        let mut ends = Vec::new();
        for task in tasks {
            ends.push(task.await);
        }
        ends
    });
    let mut found = Vec::new();
    for end in ends.await {
        found.append(&mut end?);
    }
    found.sort_unstable();
    Ok(found)
}

/// Whether what a reader sees of `block` is zero, wherever it lies.
async fn reads_as_zero<D: ReadDisk>(content: &Content<D>, block: u64) -> Result<bool> {
    let size = content.layers()[0].map.geometry().block_size();
    let (start, end) = (block * size, ((block + 1) * size).min(content.virtual_size()));
    let mut at = start;
    while at < end {
        let (location, past) = content.locate(at, end);
        if let Location::File { layer, offset } = location {
            let file = offset..offset + (past - at);
            let first = if at == start { FIRST } else { MIB };
            if !is_zero_in(&content.layers()[usize::from(layer)].disk, file, first).await? {
                return Ok(false);
            }
        }
        at = past;
    }
    Ok(true)
}

/// Whether `range` of a file is zero. `first` bytes are read first.
async fn is_zero_in<D: ReadDisk>(disk: &D, range: Range<u64>, first: u64) -> Result<bool> {
    let failed = |error| Error::io("reading a block", error).at(range.start);
    let mut at = range.start;
    while let Some(stored) = disk.next_data(at).await.map_err(failed)?.filter(|stored| *stored < range.end) {
        let most = if at == range.start { first } else { MIB };
        let mut bytes = vec![0; index(most.min(range.end - stored))];
        let read = read_sectors(disk, stored, &mut bytes).await;
        read.map_err(|error| Error::io("reading a block", error).at(stored))?;
        if !is_zero(&bytes) {
            return Ok(false);
        }
        at = stored + bytes.len() as u64;
    }
    Ok(true)
}
