//! A child and a parent, both hostile: the chain is read, and the child is written to.
//!
//! * No read asks a file for what cannot be in it, and every read ends once, with all its bytes.
//! * A child that opens for writing obeys the front's contract over a good parent.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use fastrand::Rng;
use vhdx_ublk::engine::front::{Front, Op, Request};
use vhdx_ublk::engine::message::ToEngine;
use vhdx_ublk::engine::port::{FileIo, FileOp, PieceId, Port, Ticket};
use vhdx_ublk::engine::shared::Shared;
use vhdx_ublk::image::{Image, ReadImage};

use super::corpus;
use super::target::{Case, Outcome, Target, no_bytes};
use super::trial::{self, Opening, READ_ONLY, REFUSED, WRITTEN};
use crate::craft::Craft;
use crate::sim::disk::SimDisk;
use crate::sim::store::Store;
use crate::sim::tasks::block_on;

pub const TARGET: Target = Target {
    name: "chain",
    seeds,
    change_bytes: no_bytes,
    run: |case, seed| run(&case.files, seed),
    endings: &[REFUSED, WRITTEN],
};

/// Reads that are made of a chain.
const READS: usize = 24;

/// The longest read, bytes.
const LONGEST: u64 = 1 << 20;

/// Larger disks are only read: their bitmaps, and the good parent's map, would take all the time.
const LARGEST_WRITTEN: u64 = 1 << 36;

/// The most of an image's bits that are looked at, for the same reason.
const LARGEST_BITMAPS: u64 = 1 << 40;

fn seeds() -> Vec<Case> {
    let parents = corpus::images();
    let pairs = corpus::children().into_iter().zip(parents.iter().cycle());
    pairs.map(|(child, parent)| Case { files: vec![child, parent.clone()], bytes: Vec::new() }).collect()
}

/// An image of a chain as a reader has it, with its bits.
pub fn open_layer(file: &Store) -> Option<(ReadImage, Store)> {
    with_bits(trial::open_read_only(&Craft { file: file.clone() }))
}

fn with_bits<T: Into<ReadImage>>((opened, content, _): Opening<T>) -> Option<(ReadImage, Store)> {
    let image: ReadImage = opened.ok()?.into();
    if image.metadata.virtual_size > LARGEST_BITMAPS {
        return None;
    }
    let disk = SimDisk::new(content.clone(), true, true, image.metadata.logical_sector_size);
    block_on(image.read_bitmaps(&disk)).ok()?;
    Some((image, content))
}

fn run(files: &[Store], seed: u64) -> Outcome {
    let mut shape = DefaultHasher::new();
    let layers: Option<Vec<_>> = files.iter().map(open_layer).collect();
    let sectors = |image: &Image| image.metadata.logical_sector_size;
    let ending = match layers {
        Some(layers)
            if layers[0].0.map.geometry().block_count() > 0
                && layers.iter().all(|(image, _)| sectors(image) == sectors(&layers[0].0)) =>
        {
            let is_child = layers[0].0.metadata.has_parent;
            read(layers.into_iter().map(|(image, _)| image).collect(), seed, &mut shape);
            if is_child && write(&files[0], seed, &mut shape) { WRITTEN } else { READ_ONLY }
        }
        _ => REFUSED,
    };
    ending.hash(&mut shape);
    Outcome { ending, signature: shape.finish(), peak: 0 }
}

/// What files are asked for, and how far requests are.
#[derive(Default)]
struct Files {
    layers: usize,
    length: u64,
    live: Vec<(PieceId, i32)>,
    result: Option<i32>,
    kinds: [u64; 3],
}

impl Port for Files {
    fn change_leaf(&mut self) -> Option<Arc<Shared>> {
        None
    }

    fn submit(&mut self, piece: PieceId, io: FileIo) {
        let end = u64::from(io.buffer_offset) + u64::from(io.length);
        assert!(io.length > 0 && end <= self.length, "{io:?} of a request of {} bytes", self.length);
        match io.op {
            FileOp::FillZero => self.kinds[0] += 1,
            FileOp::Read => {
                assert!(usize::from(io.layer) < self.layers, "{io:?} of {} layers", self.layers);
                let end = io.file_offset.checked_add(io.length.into());
                assert!(end.is_some_and(|end| i64::try_from(end).is_ok()), "{io:?} is in no file");
                self.kinds[1 + usize::from(io.layer).min(1)] += 1;
            }
            op => panic!("{op:?} on a chain that is only read"),
        }
        self.live.push((piece, io.length.cast_signed()));
    }

    fn send(&mut self, message: ToEngine) {
        panic!("a read asks the engine nothing: {message:?}");
    }

    fn complete(&mut self, _: Ticket, result: vhdx_ublk::engine::Outcome<u32>) {
        let result = result.map_or_else(|errno| -(errno as i32), u32::cast_signed);
        assert!(self.result.replace(result).is_none(), "completed once");
    }
}

fn read(layers: Vec<ReadImage>, seed: u64, shape: &mut DefaultHasher) {
    let mut rng = Rng::with_seed(seed);
    let geometry = *layers[0].map.geometry();
    let (size, sector) = (geometry.virtual_size(), u64::from(geometry.logical_sector_size()));
    let count = layers.len();
    let mut maps = layers.into_iter().map(|image| Arc::new(image.into_map()));
    let leaf = maps.next().expect("a child");
    let mut front = Front::new(Arc::new(Shared::of_chain(leaf, maps.collect(), true, false)), 1);
    let mut files = Files { layers: count, ..Files::default() };
    for _ in 0..READS {
        let block = rng.u64(..geometry.block_count().min(8));
        let start = if rng.bool() { block * geometry.block_size() } else { rng.u64(..size) };
        let offset = start.min(size - 1) / sector * sector;
        let length = (rng.u64(..LONGEST) / sector * sector + sector).min(size - offset) / sector * sector;
        if length == 0 {
            continue;
        }
        files.length = length;
        front.start(0, Request { op: Op::Read, offset, length }, &mut files);
        while !files.live.is_empty() {
            let (piece, result) = files.live.swap_remove(rng.usize(..files.live.len()));
            front.io_done(piece, result, &mut files);
        }
        assert_eq!(files.result.take().map(i64::from), i64::try_from(length).ok());
    }
    files.kinds.map(u64::checked_ilog2).hash(shape);
}

/// Writes to the child over a good parent, if it opens for that.
fn write(child: &Store, seed: u64, shape: &mut DefaultHasher) -> bool {
    let opened = trial::open_writable(&Craft { file: child.clone() });
    let Some((image, content)) = with_bits(opened) else { return false };
    let geometry = *image.map.geometry();
    let fits = geometry.virtual_size() <= LARGEST_WRITTEN && image.check_writable().is_ok();
    drop(image);
    if fits {
        trial::serve(&geometry, content, seed, shape);
    }
    fits
}
