//! What is on the disk of an image, without locks that others would have to wait for.
//!
//! Only what is looked at is read, the sector bitmaps of a large chain included. Where the chain is broken,
//! what its layers have is shown.

use std::cell::RefCell;
use std::collections::BTreeSet;

use super::contents::{self, Contents, ReadAt};
use super::inspect::Opened;
use crate::chain::locate_in_layers;
use crate::disk::read_sectors;
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::index;
use crate::image::Location;

/// What is on the disk of the chain of these `layers`, the leaf first; `broken` is the fault if it ends
/// early.
///
/// # Panics
///
/// Without a leaf.
pub fn contents(layers: &[&Opened], broken: Option<String>) -> Contents {
    assert!(!layers.is_empty(), "a chain has a leaf");
    let mut found = smol::future::block_on(contents::find(&Disk { layers, known: RefCell::default() }));
    if let Some(fault) = broken {
        // One fact, one line.
        found.faults.retain(|fault| !fault.ends_with(MISSING));
        found.faults.insert(0, fault);
    }
    found
}

/// Why what a layer leaves to a parent is unknown.
const MISSING: &str = "a parent that is not there has it";

/// A disk as its chain shows it.
struct Disk<'a> {
    layers: &'a [&'a Opened],
    /// The layers and blocks whose sector bitmaps were read.
    known: RefCell<BTreeSet<(usize, u64)>>,
}

impl Disk<'_> {
    /// Reads the sector bitmaps that say where the bytes from `from` to `end` are.
    async fn learn(&self, from: u64, end: u64) -> Result<()> {
        assert!(from < end && end <= self.size(), "bytes {from} to {end} of the disk");
        for (number, layer) in self.layers.iter().enumerate() {
            let geometry = layer.inspected.image.map.geometry();
            let end = end.min(geometry.virtual_size());
            if from >= end {
                break;
            }
            for block in geometry.block_of_offset(from)..=geometry.block_of_offset(end - 1) {
                if self.known.borrow_mut().insert((number, block)) {
                    let read = layer.inspected.image.read_bitmaps_of(layer.disk(), block..block + 1).await;
                    read.file(&layer.inspected.path)?;
                }
            }
        }
        Ok(())
    }
}

impl ReadAt for Disk<'_> {
    fn size(&self) -> u64 {
        self.layers[0].inspected.image.metadata.virtual_size
    }

    fn sector_size(&self) -> u32 {
        self.layers[0].inspected.image.metadata.logical_sector_size
    }

    async fn read_at(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        let end = from + bytes.len() as u64;
        self.learn(from, end).await?;
        let maps = || self.layers.iter().map(|layer| &layer.inspected.image.map);
        let is_whole = maps().next_back().is_some_and(|map| !map.geometry().is_differencing());
        let mut at = from;
        while at < end {
            let (location, past) = locate_in_layers(maps(), at, end);
            assert!(at < past && past <= end, "a piece from {at} to {past}");
            let piece = &mut bytes[index(at - from)..index(past - from)];
            match location {
                Location::File { layer, offset } => {
                    let layer = self.layers[usize::from(layer)];
                    let read = read_sectors(layer.disk(), offset, piece).await;
                    read.doing("reading").at(offset).file(&layer.inspected.path)?;
                }
                Location::Below if !is_whole => {
                    return Err(Error::new(Kind::NotFound, MISSING));
                }
                Location::Zero | Location::Undefined | Location::Below => piece.fill(0),
                Location::Lost => unreachable!("only a salvaged image has lost blocks"),
            }
            at = past;
        }
        Ok(())
    }
}
