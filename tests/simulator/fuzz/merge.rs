//! A hostile child that is merged into a hostile parent.
//!
//! * The merge ends, in a bounded number of steps, done or refused.
//! * Done or not, every sector that is looked at reads as the chain did before.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use fastrand::Rng;
use uuid::Uuid;
use vhdx_ublk::error::Result;
use vhdx_ublk::format::bat::PayloadState;
use vhdx_ublk::image::ReadImage;
use vhdx_ublk::operations::merge::{Files, Merge};

use super::chain::open_layer;
use super::corpus;
use super::target::{Case, Outcome, Target, no_bytes};
use super::trial::REFUSED;
use crate::sim::disk::SimDisk;
use crate::sim::store::Store;
use crate::sim::tasks::SimTasks;

pub const TARGET: Target = Target {
    name: "merge",
    seeds: || {
        let parents = [corpus::images().swap_remove(0)];
        let children = corpus::children().into_iter();
        children.map(|child| Case { files: vec![child, parents[0].clone()], bytes: Vec::new() }).collect()
    },
    change_bytes: no_bytes,
    run: |case, seed| run(&case.files, seed),
    endings: &[REFUSED, "merged"],
};

/// Larger disks are not merged: copying would take all the time.
const LARGEST: u64 = 64 << 20;

/// Sectors that are compared.
const COMPARED: usize = 64;

/// A merge of small images ends in far fewer.
const MOST_STEPS: usize = 200_000;

/// The files that are there.
#[derive(Clone)]
struct Folder(Rc<RefCell<BTreeMap<PathBuf, SimDisk>>>);

impl Files for Folder {
    type Disk = SimDisk;

    fn disk(&self, path: &Path) -> SimDisk {
        self.0.borrow()[path].clone()
    }

    async fn remove(&self, path: &Path) -> Result<()> {
        self.0.borrow_mut().remove(path);
        Ok(())
    }

    fn copied(&self, _: u64) -> vhdx_ublk::engine::Outcome {
        Ok(())
    }
}

const NAMES: [&str; 2] = ["/child", "/parent"];

/// The first eight bytes of a sector, as the chain has it.
fn says(chain: &[(ReadImage, Store)], offset: u64) -> u64 {
    for (image, file) in chain {
        let geometry = image.map.geometry();
        if offset >= geometry.virtual_size() {
            return 0;
        }
        let (block, within) = (geometry.block_of_offset(offset), geometry.offset_in_block(offset));
        let sector = within / u64::from(geometry.logical_sector_size());
        let entry = image.map.load(block).entry;
        let here = match entry.payload_state() {
            Some(PayloadState::FullyPresent) => true,
            Some(PayloadState::PartiallyPresent) => {
                image.map.bitmaps().has(geometry, block, sector..sector + 1)
            }
            Some(PayloadState::NotPresent) if geometry.is_differencing() => false,
            _ => return 0,
        };
        if here {
            let mut bytes = [0; 8];
            file.read(entry.offset() + within, &mut bytes);
            return u64::from_le_bytes(bytes);
        }
    }
    0
}

/// The chain as a reader finds it; nothing if an image does not open.
fn chain(files: &[Store]) -> Option<Vec<(ReadImage, Store)>> {
    files.iter().map(open_layer).collect()
}

fn run(files: &[Store], seed: u64) -> Outcome {
    let mut shape = DefaultHasher::new();
    let before = chain(files).filter(|chain| {
        let sector = |index: usize| chain[index].0.metadata.logical_sector_size;
        let small = chain.iter().all(|(image, _)| (1..=LARGEST).contains(&image.metadata.virtual_size));
        small && sector(0) == sector(1) && chain[0].0.metadata.has_parent && !chain[1].0.metadata.has_parent
    });
    let ending = before.map_or(REFUSED, |before| merge(files, &before, seed, &mut shape));
    ending.hash(&mut shape);
    Outcome { ending, signature: shape.finish(), peak: 0 }
}

fn merge(
    files: &[Store],
    before: &[(ReadImage, Store)],
    seed: u64,
    shape: &mut DefaultHasher,
) -> &'static str {
    let mut rng = Rng::with_seed(seed);
    let sector = before[0].0.metadata.logical_sector_size;
    let disks = files.iter().map(|file| SimDisk::new(file.clone(), true, true, sector));
    let folder = Folder(Rc::new(RefCell::new(NAMES.iter().map(PathBuf::from).zip(disks).collect())));
    let merge = Merge {
        layers: vec![NAMES[0].into()],
        target: NAMES[1].into(),
        below: Vec::new(),
        children: Vec::new(),
    };
    let guids = Rc::new(RefCell::new(rng.fork()));
    let tasks = Rc::new(SimTasks::default());
    let (on, spawn) = (folder.clone(), tasks.clone());
    let new_guid = move || Uuid::from_u128(guids.borrow_mut().u128(1..));
    let result = tasks.start(async move { merge.run(&on, spawn, new_guid).await });
    let mut steps = 0;
    while result.borrow().is_none() {
        assert!(tasks.ready() > 0 && steps < MOST_STEPS, "the merge does not end");
        tasks.run(0);
        steps += 1;
    }
    let result = result.take().expect("it has ended");
    let left: Vec<Store> = NAMES
        .iter()
        .filter_map(|name| folder.0.borrow().get(Path::new(name)).map(SimDisk::content))
        .collect();
    let after = chain(&left).expect("what opened before a merge opens afterwards");
    let size = before[0].0.metadata.virtual_size;
    assert_eq!(after[0].0.metadata.virtual_size, size);
    let sector = u64::from(sector);
    for _ in 0..COMPARED {
        let offset = rng.u64(..size) / sector * sector;
        assert_eq!(says(&after, offset), says(before, offset), "offset {offset}, then {result:?}");
    }
    match result {
        Ok(()) => {
            assert_eq!(left.len(), 1, "the child is gone");
            "merged"
        }
        Err(error) => {
            (format!("{:?}", error.kind()), error.structure()).hash(shape);
            REFUSED
        }
    }
}
