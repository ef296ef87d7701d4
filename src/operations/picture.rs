//! A picture of an image: how its disk is filled, how its file is, and in which order.
//!
//! All are divided into equal cells. A cell of the disk shows the layer that has most of what is there, and
//! is empty only if no layer has any of it. A cell of the file shows what takes most of it; an empty one is a
//! hole, which other blocks could fill. A cell of the order shows from which part of the disk most of its
//! blocks are.

use std::ops::Range;

use super::inspect::Inspected;
use super::map::Extents;
use super::opened::OpenChain;
use crate::error::Result;
use crate::format::index;
use crate::image::{Extent, payload_extent};

/// The layers that have a colour of their own; those below them look like the last of these.
pub const LAYERS: usize = 8;

/// The parts of the disk that the order shows. The file's blocks are spread over all
/// of them, however few they are.
pub const PARTS: usize = 26;

/// What a cell shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// Nothing.
    Empty,
    /// Blocks of this layer.
    Layer(usize),
    /// Blocks of this part of the disk.
    Part(usize),
    /// What describes the image: headers, log, block allocation table, metadata, sector bitmaps.
    Structures,
}

/// Bytes in equal cells.
pub struct Strip {
    /// What there is, bytes.
    pub bytes: u64,
    /// How much of it a cell shows, bytes.
    pub per_cell: u64,
    /// From the start to the end.
    pub cells: Vec<Cell>,
}

/// The picture.
pub struct Picture {
    /// The disk, over all layers.
    pub disk: Strip,
    /// The file of the leaf.
    pub file: Strip,
    /// The file of the leaf again, by the places that its blocks have on the disk.
    pub order: Strip,
}

impl Picture {
    /// A picture of the image `leaf`, which is the leaf of `chain`, each part with at most `cells` cells.
    ///
    /// # Errors
    ///
    /// Those of [`Extents`].
    pub fn of(chain: &OpenChain, leaf: &Inspected, cells: usize) -> Result<Self> {
        let file = file(leaf, cells);
        Ok(Self { disk: disk(chain, cells)?, order: order(leaf, &file, cells), file })
    }
}

/// How many bytes of each kind are in each cell.
struct Weights<const N: usize> {
    per_cell: u64,
    cells: Vec<[u64; N]>,
}

impl<const N: usize> Weights<N> {
    fn new(bytes: u64, cells: usize) -> Self {
        assert!(cells > 0, "a picture has cells");
        let per_cell = bytes.div_ceil(cells as u64).next_multiple_of(512).max(512);
        Self { per_cell, cells: vec![[0; N]; index(bytes.div_ceil(per_cell))] }
    }

    /// Adds the bytes of `range` to `kind`; what lies behind the last cell is left out.
    fn add(&mut self, kind: usize, range: Range<u64>) {
        let mut at = range.start;
        while at < range.end {
            let cell = at / self.per_cell;
            let past = range.end.min((cell + 1) * self.per_cell);
            let Some(weights) = self.cells.get_mut(index(cell)) else { break };
            weights[kind] += past - at;
            at = past;
        }
    }
}

fn disk(chain: &OpenChain, cells: usize) -> Result<Strip> {
    let bytes = chain.content().virtual_size();
    let mut weights = Weights::<LAYERS>::new(bytes, cells);
    for extent in Extents::all(chain) {
        let extent = extent?;
        if extent.is_data() {
            weights.add(extent.depth.min(LAYERS - 1), extent.start..extent.end());
        }
    }
    let cell = |weights: &[u64; LAYERS]| {
        let most = (0..LAYERS).rev().max_by_key(|&layer| weights[layer]).expect("there are layers");
        if weights[most] == 0 { Cell::Empty } else { Cell::Layer(most) }
    };
    Ok(Strip { bytes, per_cell: weights.per_cell, cells: weights.cells.iter().map(cell).collect() })
}

fn file(leaf: &Inspected, cells: usize) -> Strip {
    const FREE: usize = 0;
    const BLOCKS: usize = 1;
    let (bytes, image) = (leaf.file_size, &leaf.image);
    let mut weights = Weights::<2>::new(bytes, cells);
    let used_end = image.space.used_end().min(bytes);
    let free = image.space.free_runs().map(|run| run.offset..run.end());
    free.chain(std::iter::once(used_end..bytes)).for_each(|range| weights.add(FREE, range));
    extents(leaf).for_each(|extent| weights.add(BLOCKS, extent.offset..extent.end()));
    let cells = (0..).zip(&weights.cells).map(|(number, weights_here)| {
        let length = weights.per_cell.min(bytes - number * weights.per_cell);
        let structures = length.saturating_sub(weights_here[FREE] + weights_here[BLOCKS]);
        match weights_here[FREE] {
            free if free > weights_here[BLOCKS].max(structures) => Cell::Empty,
            _ if structures > weights_here[BLOCKS] => Cell::Structures,
            _ => Cell::Layer(0),
        }
    });
    Strip { bytes, per_cell: weights.per_cell, cells: cells.collect() }
}

/// Where in the file the blocks are, in the order of the disk.
fn extents(leaf: &Inspected) -> impl Iterator<Item = Extent> {
    let (map, geometry) = (&leaf.image.map, leaf.image.map.geometry());
    let slots = leaf.image.stored_slots.iter().cloned().flatten();
    let blocks = slots.filter_map(|slot| geometry.block_of_slot(slot));
    blocks.filter_map(|block| payload_extent(map.load(block).entry, geometry))
}

/// The cells of `file` that show blocks, by the part of the disk that most of them are from.
fn order(leaf: &Inspected, file: &Strip, cells: usize) -> Strip {
    let mut weights = Weights::<PARTS>::new(file.bytes, cells);
    let count = extents(leaf).count();
    for (number, extent) in extents(leaf).enumerate() {
        // The first block is in the first part, and the last one in the last.
        weights.add(number * (PARTS - 1) / (count - 1).max(1), extent.offset..extent.end());
    }
    let cell = |(shown, weights): (&Cell, &[u64; PARTS])| match shown {
        Cell::Layer(_) => Cell::Part((0..PARTS).max_by_key(|&part| weights[part]).expect("there are parts")),
        other => *other,
    };
    let cells = file.cells.iter().zip(&weights.cells).map(cell).collect();
    Strip { cells, ..*file }
}
