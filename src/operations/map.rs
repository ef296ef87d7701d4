//! Where the content of a disk is: extents in disk order, over all layers of a chain.
//!
//! An extent says what `qemu-img map` says of other formats, by the same words: of VHDX, QEMU knows only that
//! all of a disk is data. What a file stores of a block is asked of its host, so that a hole in a block that
//! has space is data that reads as zero.
//!
//! Extents are made one at a time: a disk of 64 TiB in blocks of 1 MiB may have 64 million of them.

use std::io;
use std::path::Path;

use super::opened::{OpenChain, OpenLayer};
use crate::disk::{HostFile, ImageFile};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::bat::PayloadState;
use crate::image::{BlockMap, Location, locate};
use crate::printable::shell;

/// Consecutive bytes of a disk that are alike, and in one piece of a file if they are in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it starts on the disk.
    pub start: u64,
    /// How long it is, bytes.
    pub length: u64,
    /// The layer that has it, 0 for the leaf: if none has it, the last one that was asked.
    pub depth: usize,
    /// Whether a layer has it.
    pub present: bool,
    /// Whether it reads as zeros.
    pub zero: bool,
    /// Where its layer's file has space for it.
    pub offset: Option<u64>,
}

impl Extent {
    /// Where it ends on the disk.
    pub fn end(&self) -> u64 {
        self.start + self.length
    }

    /// Whether a file has space for it.
    pub fn is_data(&self) -> bool {
        self.offset.is_some()
    }

    /// Whether `next` continues it in every respect.
    fn continues_with(&self, next: &Self) -> bool {
        let offset = self.offset.map(|offset| offset + self.length);
        (self.end(), self.depth, self.present, self.zero, offset)
            == (next.start, next.depth, next.present, next.zero, next.offset)
    }
}

/// The extents of a chain in disk order.
pub struct Extents<'a> {
    chain: &'a OpenChain,
    /// The layers of which only changes count, and the size of the disk without them.
    since: Option<(usize, u64)>,
    at: u64,
    /// For each layer, where on the disk the first block is that may be set, from `at` on.
    set: Vec<u64>,
    /// For each layer, what was found last in its file.
    runs: Vec<Run>,
    /// What was found and not yet given out.
    found: Option<Extent>,
}

/// Consecutive bytes of a file: stored, or a hole.
#[derive(Clone, Copy, Default)]
struct Run {
    start: u64,
    end: u64,
    is_hole: bool,
}

impl<'a> Extents<'a> {
    /// All extents of the disk.
    pub fn all(chain: &'a OpenChain) -> Self {
        let layers = chain.layers().len();
        let (set, runs) = (vec![0; layers], vec![Run::default(); layers]);
        Self { chain, since: None, at: 0, set, runs, found: None }
    }

    /// The extents that the layers above the one in the file at `layer` have, and all of the disk behind the
    /// end of its disk: what has changed since it was the leaf.
    ///
    /// # Errors
    ///
    /// [`Kind::Usage`] if it is not one of the parents; what the operating system says.
    pub fn since(chain: &'a OpenChain, layer: &Path) -> Result<Self> {
        let wanted = HostFile::at(layer).doing("finding the layer").file(layer)?;
        let is_wanted = |found: &OpenLayer| found.file.identity() == wanted;
        let Some(depth) = chain.layers().iter().position(is_wanted).filter(|&depth| depth > 0) else {
            let leaf = chain.leaf().file.path();
            let error = Error::new(Kind::Usage, "it is not one of the parents of the image").file(layer);
            return Err(error.remedy(format!("vhdx-ublk info --chain {}", shell(leaf))));
        };
        let size = chain.layers()[depth].metadata.virtual_size;
        Ok(Self { since: Some((depth, size)), ..Self::all(chain) })
    }

    fn map_of(&self, layer: usize) -> &'a BlockMap {
        &self.chain.content().layers()[layer].map
    }

    /// The extent from `self.at` on, of the blocks that it is in.
    fn piece(&mut self) -> Result<Extent> {
        let (start, size) = (self.at, self.chain.content().virtual_size());
        assert!(start < size, "byte {start} of {size}");
        let layers = self.chain.layers().len();
        let mut end = size;
        let mut unset = size;
        // The layers that reach here: behind the end of a smaller one, nothing of those below it shows.
        let reaching = (0..layers).take_while(|&layer| start < self.map_of(layer).geometry().virtual_size());
        let reaching = reaching.count();
        for layer in 0..reaching {
            end = end.min(self.map_of(layer).geometry().virtual_size());
            unset = unset.min(self.first_set(layer));
        }
        if let Some((_, size)) = self.since.filter(|&(_, size)| start < size) {
            end = end.min(size);
        }
        let mut extent =
            Extent { start, length: 0, depth: reaching - 1, present: false, zero: true, offset: None };
        if unset > start {
            extent.length = unset.min(end) - start;
            return Ok(extent);
        }
        for layer in 0..reaching {
            let number = u8::try_from(layer).expect("a chain has at most 256 layers");
            let (location, length) = locate(number, self.map_of(layer), start, end);
            end = start + length;
            match location {
                Location::Below => continue,
                Location::File { offset, .. } => {
                    let run = self.run(layer, offset)?;
                    end = start + (end - start).min(run.end - offset);
                    (extent.zero, extent.offset, extent.present) = (run.is_hole, Some(offset), true);
                }
                Location::Zero => extent.present = true,
                Location::Undefined => extent.present = !is_absent(self.map_of(layer), start),
                Location::Lost => unreachable!("only a salvaged image has lost blocks"),
            }
            extent.depth = layer;
            break;
        }
        extent.length = end - start;
        assert!(extent.length > 0, "an extent at {start} has bytes");
        Ok(extent)
    }

    /// Where the first block is, from `self.at` on, that may be set in this layer.
    fn first_set(&mut self, layer: usize) -> u64 {
        if self.set[layer] <= self.at {
            let (map, geometry) = (self.map_of(layer), self.map_of(layer).geometry());
            let block = geometry.block_of_offset(self.at);
            let first = map.first_set(block..geometry.block_count());
            // Behind its last block, another layer's size ends what is unset.
            let is_past = first == geometry.block_count();
            self.set[layer] = if is_past { u64::MAX } else { first * geometry.block_size() }.max(self.at);
        }
        self.set[layer]
    }

    /// What is at `offset` of a layer's file.
    fn run(&mut self, layer: usize, offset: u64) -> Result<Run> {
        if !(self.runs[layer].start..self.runs[layer].end).contains(&offset) {
            let file = &self.chain.layers()[layer].file;
            let found = Run::of(file, offset).doing("looking for holes").at(offset).file(file.path())?;
            assert!(found.start <= offset && offset < found.end, "byte {offset} is in a run");
            self.runs[layer] = found;
        }
        Ok(self.runs[layer])
    }

    /// The next piece that counts.
    fn next_piece(&mut self) -> Result<Option<Extent>> {
        while self.at < self.chain.content().virtual_size() {
            let piece = self.piece()?;
            self.at = piece.end();
            let counts = self
                .since
                .is_none_or(|(layers, size)| piece.start >= size || piece.present && piece.depth < layers);
            if counts {
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }
}

impl Iterator for Extents<'_> {
    type Item = Result<Extent>;

    fn next(&mut self) -> Option<Result<Extent>> {
        loop {
            let piece = match self.next_piece() {
                Ok(Some(piece)) => piece,
                Ok(None) => return self.found.take().map(Ok),
                Err(error) => {
                    (self.at, self.found) = (self.chain.content().virtual_size(), None);
                    return Some(Err(error));
                }
            };
            match &mut self.found {
                Some(found) if found.continues_with(&piece) => found.length += piece.length,
                found => {
                    if let Some(whole) = found.replace(piece) {
                        return Some(Ok(whole));
                    }
                }
            }
        }
    }
}

impl Run {
    fn of(file: &ImageFile, offset: u64) -> io::Result<Self> {
        Ok(match file.next_data(offset)? {
            Some(data) if data <= offset => {
                // A hole that was punched between the two questions.
                let end = file.next_hole(offset)?.max(offset + 1);
                Self { start: offset, end, is_hole: false }
            }
            data => Self { start: offset, end: data.unwrap_or(u64::MAX), is_hole: true },
        })
    }
}

/// Whether the block at `at` was never there; others without content have lost it.
fn is_absent(map: &BlockMap, at: u64) -> bool {
    let state = map.load(map.geometry().block_of_offset(at)).entry.payload_state();
    state == Some(PayloadState::NotPresent)
}
