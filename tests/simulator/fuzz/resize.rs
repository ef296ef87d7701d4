//! Hostile images whose disk gets another size.
//!
//! * It ends, done or refused, and adds no damage.
//! * What opened before opens afterwards, and has its old size or the new one.
//! * What is in both disks stays; what comes into the disk is zero, whatever the parent has there.

use std::hash::{DefaultHasher, Hash, Hasher};

use fastrand::Rng;
use uuid::Uuid;
use vhdx_ublk::chain::locate_in_layers;
use vhdx_ublk::format::MAX_VIRTUAL_SIZE;
use vhdx_ublk::format::metadata::{DiskType, Metadata};
use vhdx_ublk::image::{Image, Location, Resize, check};

use super::corpus;
use super::target::{Case, Outcome, Target, no_bytes};
use super::trial::REFUSED;
use crate::sim::disk::SimDisk;
use crate::sim::layers::{Opened, read};
use crate::sim::store::Store;
use crate::sim::tasks::block_on;

pub const TARGET: Target = Target {
    name: "resize",
    seeds: || corpus::images().into_iter().chain(corpus::children()).map(Case::of).collect(),
    change_bytes: no_bytes,
    run: |case, seed| run(&case.files[0], seed),
    endings: &[REFUSED, LARGER, SMALLER],
};

const LARGER: &str = "larger";
const SMALLER: &str = "smaller";

/// By how much a disk grows whose new blocks all get an entry.
const MOST_BLOCKS: u64 = 1 << 14;

/// Places that are compared.
const COMPARED: usize = 64;

/// The size that the disk of `metadata` is to have.
fn new_size(metadata: &Metadata, rng: &mut Rng) -> u64 {
    let sector = u64::from(metadata.logical_sector_size);
    let most = match metadata.kind() {
        DiskType::Dynamic => MAX_VIRTUAL_SIZE,
        DiskType::Fixed | DiskType::Differencing => {
            metadata.virtual_size.saturating_add(MOST_BLOCKS * u64::from(metadata.block_size))
        }
    };
    let size = match rng.u32(0..4) {
        0 => rng.u64(..=metadata.virtual_size),
        1 => metadata.virtual_size.saturating_add(rng.u64(..4) * sector),
        _ => metadata.virtual_size.saturating_add(1 << rng.u32(9..47)),
    };
    size.min(most).min(MAX_VIRTUAL_SIZE) / sector * sector
}

/// The first eight bytes of a sector, by the image alone; nothing if they are its parent's.
fn found(Opened { image, store }: &Opened, at: u64) -> Option<u64> {
    let end = at + u64::from(image.metadata.logical_sector_size);
    match locate_in_layers(std::iter::once(&image.map), at, end).0 {
        Location::File { offset, .. } => {
            let mut bytes = [0; 8];
            store.read(offset, &mut bytes);
            Some(u64::from_le_bytes(bytes))
        }
        Location::Below if image.metadata.has_parent => None,
        Location::Below | Location::Zero | Location::Undefined => Some(0),
        Location::Lost => unreachable!("only a salvaged image has lost blocks"),
    }
}

fn beyond_repair(store: &Store) -> u64 {
    let report = block_on(check(&SimDisk::new(store.clone(), true, true, 512)));
    report.expect("what opens can be examined").beyond_repair
}

fn run(file: &Store, seed: u64) -> Outcome {
    let mut shape = DefaultHasher::new();
    let mut rng = Rng::with_seed(seed);
    let disk = SimDisk::new(file.clone(), true, rng.bool(), 512);
    let mut guids = rng.fork();
    let opening = block_on(Image::open_for_writing(&disk, || Uuid::from_u128(0xf11e)));
    let ending = opening.map_or(REFUSED, |image| {
        let before = disk.content();
        let size = new_size(&image.metadata, &mut rng);
        let bits = rng.u32(0..47);
        let parent_bytes = rng.u64(..=1 << bits);
        let metadata = Metadata { virtual_size: size, ..image.metadata.clone() };
        let data_write = Some(Uuid::from_u128(7));
        let to = Resize { metadata, parent_bytes, data_write, zero_from: None };
        let resized = block_on(image.resize(&disk, &to, || Uuid::from_u128(guids.u128(1..)))).map(|_| size);
        let done = resized.is_ok();
        if let Err(error) = &resized {
            (format!("{:?}", error.kind()), error.structure()).hash(&mut shape);
        }
        assert!(beyond_repair(&disk.content()) <= beyond_repair(&before), "it adds no damage");
        let Some(old_size) = judge(&before, &disk.content(), (size, parent_bytes), &mut rng) else {
            return REFUSED;
        };
        match (done, size > old_size) {
            (false, _) => REFUSED,
            (true, true) => LARGER,
            (true, false) => SMALLER,
        }
    });
    ending.hash(&mut shape);
    Outcome { ending, signature: shape.finish(), peak: 0 }
}

/// Compares an image with what it was; the size of its disk before, unless its bitmaps cannot be read.
fn judge(before: &Store, after: &Store, (size, parent_bytes): (u64, u64), rng: &mut Rng) -> Option<u64> {
    let old = read(before).ok()?;
    let new = read(after).unwrap_or_else(|error| panic!("it opened before: {error}"));
    let [old_size, new_size] = [&old, &new].map(|opened| opened.image.metadata.virtual_size);
    assert!([old_size, size].contains(&new_size), "{old_size} bytes became {new_size}, not {size}");
    let sector = u64::from(old.image.metadata.logical_sector_size);
    for _ in 0..COMPARED {
        let end = if rng.bool() { new_size } else { old_size.saturating_add(1 << 21).min(new_size) };
        if end == 0 {
            break;
        }
        let at = rng.u64(..end) / sector * sector;
        let expected = if at < old_size { found(&old, at) } else { Some(0) };
        let seen = found(&new, at);
        let shows_nothing = at >= old_size && at >= parent_bytes && seen.is_none();
        assert!(seen == expected || shows_nothing, "byte {at} is {seen:?}, not {expected:?}");
    }
    Some(old_size)
}
