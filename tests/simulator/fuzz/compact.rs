//! A hostile image that is compacted.
//!
//! * What opens for writing is compacted or refused, in a bounded number of steps.
//! * Done or not, every sector that is looked at reads as before, and the file is as long as was said.

use std::cell::RefCell;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::rc::Rc;

use fastrand::Rng;
use uuid::Uuid;
use vhdx_ublk::format::bat::PayloadState;
use vhdx_ublk::image::{Image, ReadImage};
use vhdx_ublk::operations::Watch;
use vhdx_ublk::operations::compact::{Compaction, Steps};

use super::chain::open_layer;
use super::corpus;
use super::target::{Case, Outcome, Target, no_bytes};
use super::trial::REFUSED;
use crate::sim::disk::SimDisk;
use crate::sim::store::Store;
use crate::sim::tasks::SimTasks;

pub const TARGET: Target = Target {
    name: "compact",
    seeds: || corpus::images().into_iter().chain(corpus::children()).map(Case::of).collect(),
    change_bytes: no_bytes,
    run: |case, seed| run(&case.files[0], seed),
    endings: &[REFUSED, "compacted"],
};

/// Files with more are not compacted: copying would take all the time.
const MOST_USED: u64 = 256 << 20;

/// Sectors that are compared.
const COMPARED: usize = 64;

/// A compaction of a small image ends in far fewer.
const MOST_STEPS: usize = 200_000;

struct Patient;

impl Watch for Patient {
    fn progress(&self, _: u64, _: u64) {}

    fn stop_requested(&self) -> bool {
        false
    }
}

/// The first eight bytes of a sector; nothing where the parents are to be asked.
fn says((image, file): &(ReadImage, Store), offset: u64) -> Option<u64> {
    let geometry = image.map.geometry();
    let (block, within) = (geometry.block_of_offset(offset), geometry.offset_in_block(offset));
    let sector = within / u64::from(geometry.logical_sector_size());
    let entry = image.map.load(block).entry;
    let has = || image.map.bitmaps().has(geometry, block, sector..sector + 1);
    match entry.payload_state() {
        Some(PayloadState::PartiallyPresent) if !has() => return None,
        Some(PayloadState::NotPresent) if geometry.is_differencing() => return None,
        Some(PayloadState::FullyPresent | PayloadState::PartiallyPresent) => {}
        _ => return Some(0),
    }
    let mut bytes = [0; 8];
    file.read(entry.offset() + within, &mut bytes);
    Some(u64::from_le_bytes(bytes))
}

fn run(file: &Store, seed: u64) -> Outcome {
    let mut shape = DefaultHasher::new();
    let before = open_layer(file).filter(|(image, _)| image.space.used_bytes() <= MOST_USED);
    let ending = before.map_or(REFUSED, |before| compact(file, &before, seed, &mut shape));
    ending.hash(&mut shape);
    Outcome { ending, signature: shape.finish(), peak: 0 }
}

fn compact(file: &Store, before: &(ReadImage, Store), seed: u64, shape: &mut DefaultHasher) -> &'static str {
    let mut rng = Rng::with_seed(seed);
    let sector = before.0.metadata.logical_sector_size;
    let disk = SimDisk::new(file.clone(), true, true, sector);
    let guids = Rc::new(RefCell::new(rng.fork()));
    let new_guid = move || Uuid::from_u128(guids.borrow_mut().u128(1..));
    let tasks = Rc::new(SimTasks::default());
    let (on, spawn) = (disk.clone(), tasks.clone());
    let steps = Steps { zeros: rng.bool(), length: rng.bool(), defragment: rng.bool() };
    let result = tasks.start(async move {
        let image = Image::open_for_writing(&on, new_guid.clone()).await?;
        let (disk, parents, max_rate) = (move || on.clone(), Vec::new(), None);
        let work = Compaction { image, disk, parents, max_rate, tasks: spawn, new_guid };
        work.run(steps, &Patient).await
    });
    let mut rounds = 0;
    while result.borrow().is_none() {
        assert!(tasks.ready() > 0 && rounds < MOST_STEPS, "the compaction does not end");
        tasks.run(0);
        rounds += 1;
    }
    let result = result.take().expect("it has ended");
    let left = disk.content();
    let after = open_layer(&left).expect("what opened before a compaction opens afterwards");
    let (size, sector) = (before.0.metadata.virtual_size, u64::from(sector));
    assert_eq!(after.0.metadata.virtual_size, size);
    for _ in 0..if size > 0 { COMPARED } else { 0 } {
        let offset = rng.u64(..size) / sector * sector;
        assert_eq!(says(&after, offset), says(before, offset), "offset {offset}, then {result:?}");
    }
    match result {
        Ok(done) => {
            assert!(!steps.length || left.length <= done.end, "{} bytes are left: {done:?}", left.length);
            "compacted"
        }
        Err(error) => {
            (format!("{:?}", error.kind()), error.structure()).hash(shape);
            REFUSED
        }
    }
}
