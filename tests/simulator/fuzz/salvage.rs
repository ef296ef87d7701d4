//! Damaged images that are salvaged.
//!
//! * Any bytes end in a copy or an error, after a bounded number of operations.
//! * What is listed of the disk covers it without a gap.
//! * While the BAT, the headers and the blocks are whole, what is listed as right is what the disk had,
//!   whatever became of the rest; the guesses about the metadata aside.

use std::hash::{DefaultHasher, Hash, Hasher};

use fastrand::Rng;
use vhdx_ublk::image::Salvaged;

use super::corpus;
use super::probe::Probe;
use super::target::{Case, Outcome, Target, no_bytes};
use super::trial::REFUSED;
use crate::craft::{Craft, LOG, METADATA, MIB, REGION_TABLE_BYTES, REGION_TABLES};
use crate::salvage::{Scratched, assert_true, original, salvage};
use crate::sim::store::Store;
use crate::sim::tasks::block_on;

pub const TARGET: Target = Target {
    name: "salvage",
    seeds: || corpus::images().into_iter().chain(corpus::children()).map(Case::of).collect(),
    change_bytes: no_bytes,
    run: |case, seed| run(&case.files[0], seed),
    endings: &[REFUSED, SALVAGED, GUESSED],
};

const SALVAGED: &str = "salvaged";
const GUESSED: &str = "guessed";

/// Larger disks are only looked at: copying would take all the time.
const LARGEST: u64 = 1 << 30;

/// Reading ends after far fewer operations: a small multiple of the file's MiB, and of the BAT's pages.
const OPERATIONS: u64 = 1 << 20;

thread_local! {
    /// Images without a log to replay, and what their disks have.
    static GOOD: Vec<(Store, Store)> = {
        let images = corpus::images().into_iter().take(4);
        images.map(|image| (image.clone(), original(&[image]))).collect()
    };
}

fn run(file: &Store, seed: u64) -> Outcome {
    let mut shape = DefaultHasher::new();
    let mut rng = Rng::with_seed(seed);
    let ending = match block_on(Salvaged::read(&Probe::new(file.clone(), OPERATIONS))) {
        Err(error) => {
            (format!("{:?}", error.kind()), error.structure()).hash(&mut shape);
            REFUSED
        }
        Ok(image) => {
            let structures: Vec<_> =
                image.notes().iter().map(|note| (note.structure, note.is_guess)).collect();
            structures.hash(&mut shape);
            if image.metadata().virtual_size <= LARGEST {
                let unreadable = scratches(file, &mut rng);
                let copied = salvage(vec![Scratched { store: file.clone(), unreadable }]);
                copied.is_ok().hash(&mut shape);
            }
            if image.notes().iter().any(|note| note.is_guess) { GUESSED } else { SALVAGED }
        }
    };
    if rng.u32(..8) == 0 {
        with_its_bat(&mut rng);
    }
    ending.hash(&mut shape);
    Outcome { ending, signature: shape.finish(), peak: 0 }
}

/// Some sectors of the file that cannot be read.
fn scratches(file: &Store, rng: &mut Rng) -> Vec<std::ops::Range<u64>> {
    let mut scratch = || {
        let start = rng.u64(..file.length.max(1));
        start..start + 1 + rng.u64(..1 << 16)
    };
    (0..3).map(|_| scratch()).collect()
}

/// Damages a good image in what is neither BAT nor block, and holds it to what it had.
fn with_its_bat(rng: &mut Rng) {
    let (file, disk) = GOOD.with(|images| images[rng.usize(..images.len())].clone());
    let mut image = Craft { file };
    let places = [
        0..4096,
        REGION_TABLES[0]..REGION_TABLES[0] + REGION_TABLE_BYTES as u64,
        REGION_TABLES[1]..REGION_TABLES[1] + REGION_TABLE_BYTES as u64,
        LOG..LOG + MIB,
        METADATA..METADATA + 65536,
    ];
    let mut unreadable = Vec::new();
    for place in places {
        if rng.bool() {
            continue;
        }
        let start = rng.u64(place.clone());
        let length = rng.u64(1..=(place.end - start).min(8192));
        if rng.bool() {
            unreadable.push(start..start + 1);
        } else {
            let noise: Vec<u8> = (0..length).map(|_| rng.u8(..)).collect();
            image.write(start, &noise);
        }
    }
    let found = salvage(vec![Scratched { store: image.file, unreadable }]);
    if let Some(outcome) = found.ok().filter(|outcome| outcome.copy.length == disk.length) {
        assert_true(&disk, &outcome, "the BAT is whole");
    }
}
