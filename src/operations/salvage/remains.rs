//! A chain of damaged images, and where what is left of its content is.

use std::ops::Range;

use schemars::JsonSchema;
use serde::Serialize;

use crate::disk::ReadDisk;
use crate::error::{Error, Kind, Result};
use crate::format::index;
use crate::image::{Salvaged, Trace};
use crate::operations::contents::ReadAt;

/// What is known of bytes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// They are what the disk had.
    Finished,
    /// They are lost.
    Lost,
    /// It is not known what the disk had there: a log or a parent is missing.
    Unknown,
}

/// A salvaged image, and the file that it is in.
pub struct RemainsLayer<D> {
    /// Its file.
    pub disk: D,
    /// What is left of it.
    pub image: Salvaged,
}

/// What is left of a chain: the leaf, and its parents as far as they were found, its own first.
pub struct Remains<D> {
    layers: Vec<RemainsLayer<D>>,
}

/// Consecutive bytes of the disk.
struct Extent {
    place: Place,
    past: u64,
    /// What is there is what the disk had; otherwise a layer above may have had something newer.
    is_certain: bool,
}

/// Where bytes are.
enum Place {
    File { layer: usize, offset: u64 },
    Zero,
    Nowhere(Status),
}

/// A part of the disk that was read.
pub(super) struct Window {
    /// Where its bytes lie on the disk; a whole page.
    pub(super) start: u64,
    /// Zeros where they are not known; whole pages.
    pub(super) bytes: Vec<u8>,
    /// What is known of them.
    pub(super) runs: Vec<(Range<u64>, Status)>,
}

/// How many bytes of the disk are what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Totals {
    /// Known to be what the disk had.
    pub finished_bytes: u64,
    /// Lost.
    pub lost_bytes: u64,
    /// Not known, or not for sure.
    pub unknown_bytes: u64,
}

impl Totals {
    /// Counts `bytes` of this `status`.
    pub fn add(&mut self, bytes: u64, status: Status) {
        *match status {
            Status::Finished => &mut self.finished_bytes,
            Status::Lost => &mut self.lost_bytes,
            Status::Unknown => &mut self.unknown_bytes,
        } += bytes;
    }
}

impl<D: ReadDisk> ReadAt for Remains<D> {
    fn size(&self) -> u64 {
        self.virtual_size()
    }

    fn sector_size(&self) -> u32 {
        self.leaf().metadata().logical_sector_size
    }

    async fn read_at(&self, from: u64, bytes: &mut [u8]) -> Result<()> {
        let Window { start, bytes: found, runs } = self.read(from..from + bytes.len() as u64).await?;
        if runs.iter().any(|(_, status)| *status == Status::Lost) {
            return Err(Error::new(Kind::Io, "bytes of the disk are lost").at(from));
        }
        bytes.copy_from_slice(&found[index(from - start)..][..bytes.len()]);
        Ok(())
    }
}

/// How many runs are gathered at a time. Bounds memory.
const MOST_RUNS: usize = 1 << 12;

/// A page in bytes, by which files are written.
const PAGE: u64 = crate::disk::PAGE_BYTES as u64;

impl<D> Remains<D> {
    /// What is left of the chain of these `layers`.
    ///
    /// # Panics
    /// Without a leaf.
    pub fn new(layers: Vec<RemainsLayer<D>>) -> Self {
        assert!(!layers.is_empty(), "a chain has a leaf");
        Self { layers }
    }

    /// The leaf.
    pub fn leaf(&self) -> &Salvaged {
        &self.layers[0].image
    }

    /// The images and their files, the leaf first.
    pub fn into_layers(self) -> Vec<RemainsLayer<D>> {
        self.layers
    }

    /// The size of the virtual disk, bytes.
    pub fn virtual_size(&self) -> u64 {
        self.leaf().metadata().virtual_size
    }

    /// The images, the leaf first.
    pub fn images(&self) -> impl Iterator<Item = &Salvaged> {
        self.layers.iter().map(|layer| &layer.image)
    }

    /// What is known of all bytes of the disk as far as the images themselves say, in their order; returns
    /// how many bytes of files that takes to read.
    pub fn plan(&self, mut record: impl FnMut(Range<u64>, Status)) -> u64 {
        let (mut to_read, mut at) = (0, 0);
        while at < self.virtual_size() {
            let Extent { place, past, is_certain } = self.locate(at, self.virtual_size());
            record(at..past, status(&place, is_certain));
            to_read += if matches!(place, Place::File { .. }) { past - at } else { 0 };
            at = past;
        }
        to_read
    }

    fn locate(&self, from: u64, mut end: u64) -> Extent {
        let mut is_certain = true;
        let extent = |place, past, is_certain| Extent { place, past, is_certain };
        for (layer, RemainsLayer { image, .. }) in self.layers.iter().enumerate() {
            let size = image.metadata().virtual_size;
            if from >= size {
                return extent(Place::Zero, end, is_certain);
            }
            let (trace, past) = image.locate(from, end.min(size));
            assert!(from < past && past <= end, "an extent has bytes");
            match trace {
                Trace::File(offset) => return extent(Place::File { layer, offset }, past, is_certain),
                Trace::Zero => return extent(Place::Zero, past, is_certain),
                Trace::Lost => return extent(Place::Nowhere(Status::Lost), past, false),
                Trace::Unknown => return extent(Place::Nowhere(Status::Unknown), past, false),
                Trace::Below => (end, is_certain) = (past, is_certain && image.knows_absent_blocks()),
            }
        }
        extent(Place::Nowhere(Status::Unknown), end, false)
    }

    /// Where the next bytes from `from` on lie that some file has, and what is known of those before. The end
    /// of the disk if there are none; earlier if there is much to be known.
    pub(super) fn next_stored(&self, from: u64, runs: &mut Vec<(Range<u64>, Status)>) -> u64 {
        let mut at = from;
        while at < self.virtual_size() && runs.len() < MOST_RUNS {
            let extent = self.locate(at, self.virtual_size());
            if matches!(extent.place, Place::File { .. }) {
                break;
            }
            add(runs, at..extent.past, status(&extent.place, extent.is_certain));
            at = extent.past;
        }
        at
    }
}

impl<D: ReadDisk> Remains<D> {
    /// Reads `range` of the disk.
    ///
    /// # Errors
    /// Errors of the host that say nothing of its medium.
    pub(super) async fn read(&self, range: Range<u64>) -> Result<Window> {
        let start = range.start - range.start % PAGE;
        let mut bytes = vec![0; index((range.end - start).next_multiple_of(PAGE))];
        let mut runs = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let Extent { place, past, is_certain } = self.locate(at, range.end);
            let found = status(&place, is_certain);
            if let Place::File { layer, offset } = place {
                let RemainsLayer { disk, image } = &self.layers[layer];
                let target = &mut bytes[index(at - start)..index(past - start)];
                let mut next = at;
                for missing in image.read_file(disk, offset, target).await? {
                    add(&mut runs, next..at + missing.start, found);
                    add(&mut runs, at + missing.start..at + missing.end, Status::Lost);
                    next = at + missing.end;
                }
                add(&mut runs, next..past, found);
            } else {
                add(&mut runs, at..past, found);
            }
            at = past;
        }
        Ok(Window { start, bytes, runs })
    }
}

fn status(place: &Place, is_certain: bool) -> Status {
    match place {
        Place::Nowhere(status) => *status,
        Place::File { .. } | Place::Zero if is_certain => Status::Finished,
        Place::File { .. } | Place::Zero => Status::Unknown,
    }
}

/// Appends a run; neighbours of one status become one.
fn add(runs: &mut Vec<(Range<u64>, Status)>, range: Range<u64>, status: Status) {
    match runs.last_mut() {
        _ if range.is_empty() => {}
        Some((last, same)) if *same == status && last.end == range.start => last.end = range.end,
        _ => runs.push((range, status)),
    }
}
