//! Searching a file for the regions that no table names: the metadata by their signature, the BAT by its
//! shape.
//!
//! Every object starts on a MiB, so one look at each MiB that the host has stored is enough. A BAT is a run
//! of MiB in which every word is one that a BAT can hold; hardly a page of anything else is. Of several runs
//! the one counts that names the most blocks of this file, each of them once.
//!
//! Memory is bounded: a bit for each MiB of the file, and [`MOST_CANDIDATES`] MiB that look like a BAT.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use fixedbitset::FixedBitSet;

use super::source::Source;
use crate::disk::{PAGE_BYTES, ReadDisk};
use crate::error::{Doing, Locate, Result};
use crate::format::bat::{BatEntry, ENTRY_SIZE, PayloadState};
use crate::format::region::MAX_BAT_LENGTH;
use crate::format::{HEADER_SECTION, MIB, index};
use crate::image::space::{Extent, MAX_FILE_BYTES};

/// The most MiB of a BAT that are remembered, of several files' worth of them.
const MOST_CANDIDATES: usize = 1 << 16;

/// The longest BAT, MiB.
const LONGEST: u64 = MAX_BAT_LENGTH as u64 / MIB;

/// What the metadata region begins with.
const SIGNATURE: &[u8] = b"metadata";

/// The most places of metadata that are remembered: those of images inside the image.
const MOST_METADATA: usize = 64;

/// What was found in a file.
#[derive(Default)]
pub(super) struct Traces {
    /// Where there is the signature of the metadata, ascending.
    pub(super) metadata: Vec<u64>,
    /// MiB that look like a part of a BAT with entries, and how many blocks of the file they name.
    counts: BTreeMap<u64, i64>,
    /// MiB that are no part of a BAT.
    others: FixedBitSet,
}

/// What may be the BAT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Likeness {
    pub(super) extent: Extent,
    /// Blocks of the file that it names, each of them once.
    pub(super) blocks: i64,
}

/// What one MiB looks like.
#[derive(Clone, Copy)]
enum Look {
    Metadata,
    Bat(i64),
    Other,
}

impl Traces {
    /// Searches the whole file.
    pub(super) async fn search<D: ReadDisk>(source: &Source<'_, D>) -> Result<Self> {
        let end = source.length.min(MAX_FILE_BYTES).div_ceil(MIB);
        let mut traces = Self { others: FixedBitSet::with_capacity(index(end)), ..Self::default() };
        let logged = source.overlay.iter().flat_map(|overlay| overlay.ranges());
        let logged: BTreeSet<u64> = logged.map(|range| range.start / MIB).collect();
        let mut at = HEADER_SECTION / MIB;
        while at < end {
            let stored = source.disk.next_data(at * MIB).await.doing("looking for holes").at(at * MIB)?;
            let next = stored.map(|offset| (offset / MIB).max(at));
            let next = next.into_iter().chain(logged.range(at..).next().copied()).min();
            let Some(found) = next.filter(|found| *found < end) else { break };
            traces.take(found, look(source, found).await?);
            at = found + 1;
        }
        Ok(traces)
    }

    fn take(&mut self, at: u64, look: Look) {
        match look {
            Look::Bat(0) => {}
            Look::Bat(count) if self.counts.len() < MOST_CANDIDATES => drop(self.counts.insert(at, count)),
            Look::Bat(_) | Look::Other => self.others.insert(index(at)),
            Look::Metadata => {
                self.others.insert(index(at));
                if self.metadata.len() < MOST_METADATA {
                    self.metadata.push(at * MIB);
                }
            }
        }
    }

    /// What may be the BAT, of `length` bytes if that is known, likeliest first.
    pub(super) fn bats(&self, length: Option<u64>) -> Vec<Likeness> {
        let known = length.map(|length| length.div_ceil(MIB).clamp(1, LONGEST));
        let mut found: Vec<Likeness> = Vec::new();
        for &start in self.counts.keys() {
            let run = start..start + known.unwrap_or(LONGEST).min(self.free_run(start));
            let parts = || self.counts.range(run.clone());
            let last = parts().next_back().map_or(start, |(at, _)| *at);
            if known.is_some_and(|known| run.end - run.start < known) {
                continue;
            }
            let end = known.map_or(last + 1, |known| start + known);
            let extent = Extent { offset: start * MIB, length: (end - start) * MIB };
            let blocks = parts().map(|(_, count)| count).sum();
            found.push(Likeness { extent, blocks });
        }
        found.retain(|likeness| likeness.blocks > 0);
        found.sort_by_key(|likeness| (-likeness.blocks, likeness.extent.offset));
        found
    }

    /// How many MiB from `start` on may be of a BAT, [`LONGEST`] at most.
    fn free_run(&self, start: u64) -> u64 {
        let end = self.others.len() as u64;
        let Range { start: first, end: last } = start..end.min(start + LONGEST);
        (first..last).find(|at| self.others.contains(index(*at))).unwrap_or(last) - start
    }
}

/// Looks at MiB number `at`. The first page is enough for most.
async fn look<D: ReadDisk>(source: &Source<'_, D>, at: u64) -> Result<Look> {
    let first = source.read(at * MIB, PAGE_BYTES).await?.bytes;
    if first.starts_with(SIGNATURE) {
        return Ok(Look::Metadata);
    }
    let mut offsets = Vec::new();
    if !collect(first.as_chunks().0, source.length, &mut offsets) {
        return Ok(Look::Other);
    }
    let rest = source.read(at * MIB + PAGE_BYTES as u64, index(MIB) - PAGE_BYTES).await?.bytes;
    if !collect(rest.as_chunks().0, source.length, &mut offsets) {
        return Ok(Look::Other);
    }
    let all = offsets.len();
    offsets.sort_unstable();
    offsets.dedup();
    // Each that is named again speaks against it as much as another speaks for it.
    let count = |count: usize| i64::try_from(count).expect("a MiB has 131072 words");
    Ok(Look::Bat(2 * count(offsets.len()) - count(all)))
}

/// Whether a BAT can hold all of `words`; gathers the places in a file of `length` bytes that they name.
fn collect(words: &[[u8; ENTRY_SIZE]], length: u64, offsets: &mut Vec<u64>) -> bool {
    for entry in words.iter().map(|word| BatEntry::read(*word)).filter(|entry| entry.0 != 0) {
        let offset = entry.offset();
        let possible = match entry.payload_state() {
            _ if entry.reserved_bits() != 0 => false,
            Some(PayloadState::NotPresent | PayloadState::Zero) => offset == 0,
            Some(PayloadState::Undefined | PayloadState::Unmapped) => offset < MAX_FILE_BYTES,
            Some(PayloadState::FullyPresent | PayloadState::PartiallyPresent) => {
                (MIB..MAX_FILE_BYTES).contains(&offset)
            }
            None => false,
        };
        if !possible {
            return false;
        }
        if (MIB..length).contains(&offset) {
            offsets.push(offset);
        }
    }
    true
}

/// How often the blocks that start at `starts`, below MiB `end` of the file, are so many MiB apart, by powers
/// of two.
fn distances(starts: &FixedBitSet, end: usize) -> [u64; 9] {
    let mut often = [0; 9];
    let starts = || starts.ones().take_while(|start| *start < end);
    for (one, next) in starts().zip(starts().skip(1)) {
        often[(next - one).ilog2().min(8) as usize] += 1;
    }
    often
}

/// The shape of a disk by its BAT alone.
pub(super) struct Shape {
    /// Bytes of a block, if anything shows them.
    pub(super) block_size: Option<u32>,
    /// The last slot that is set, if any is.
    pub(super) last_slot: Option<u64>,
    /// Whether a block is partially present.
    pub(super) has_partial: bool,
    /// Where the first block lies.
    pub(super) first_block: Option<u64>,
}

impl Shape {
    /// The shape that the BAT at `bat` shows: blocks are as large as the smallest distance between two of
    /// them, of a child as the most frequent one, or as what is left of the file behind a single one. Blocks
    /// beyond the end of the file count if nothing else does.
    pub(super) async fn of<D: ReadDisk>(source: &Source<'_, D>, bat: Extent) -> Result<Self> {
        let mut starts = FixedBitSet::with_capacity(index(MAX_FILE_BYTES / MIB));
        let mut shape = Self { block_size: None, last_slot: None, has_partial: false, first_block: None };
        for (first, offset) in (0..)
            .step_by(PAGE_BYTES / ENTRY_SIZE)
            .zip((bat.offset..bat.end().min(source.length)).step_by(PAGE_BYTES))
        {
            let page = source.read(offset, PAGE_BYTES).await?.bytes;
            for (slot, word) in (first..).zip(page.as_chunks::<ENTRY_SIZE>().0) {
                shape.take(slot, BatEntry::read(*word), &mut starts);
            }
        }
        let end = index(source.length.min(MAX_FILE_BYTES).div_ceil(MIB));
        let mut often = distances(&starts, end);
        if often == [0; 9] {
            often = distances(&starts, starts.len());
        }
        let single = starts.maximum().filter(|last| *last < end);
        let single = single.map(|last| (end - last).ilog2().min(8) as usize);
        // Sector bitmaps lie between blocks that may be larger.
        let powers = (0..often.len()).filter(|power| often[*power] > 0);
        let power =
            if shape.has_partial { powers.rev().max_by_key(|power| often[*power]) } else { powers.min() };
        shape.block_size = power.or(single).map(|power| 1 << (20 + power));
        Ok(shape)
    }

    fn take(&mut self, slot: u64, entry: BatEntry, starts: &mut FixedBitSet) {
        let state = entry.payload_state();
        if entry.0 == 0 || state.is_none() || entry.reserved_bits() != 0 {
            return;
        }
        self.last_slot = Some(slot);
        let partial = state == Some(PayloadState::PartiallyPresent);
        self.has_partial |= partial;
        if partial || state == Some(PayloadState::FullyPresent) {
            if slot == 0 {
                self.first_block = Some(entry.offset());
            }
            if index(entry.offset() / MIB) < starts.len() {
                starts.insert(index(entry.offset() / MIB));
            }
        }
    }
}
