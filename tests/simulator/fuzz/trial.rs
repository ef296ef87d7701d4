//! What a hostile image is put through, and what must hold.
//!
//! * Opening it ends in an image or an error, after a bounded number of operations, in bounded memory.
//! * Opening it read-only changes nothing; what is then seen is what opening it for writing leaves.
//! * What opens for writing obeys the front's contract: every request ends once, reads see what was written,
//!   and what a power cut or a clean close leaves opens again.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Deref;

use fastrand::Rng;
use uuid::Uuid;
use vhdx_ublk::error::Error;
use vhdx_ublk::format::bat::Geometry;
use vhdx_ublk::image::{FoundLog, Image, ReadImage, WritableImage, check};

use super::corpus;
use super::probe::Probe;
use super::target::{Case, Outcome, Target, no_bytes};
use crate::craft::{Craft, HEADERS, REGION_TABLES};
use crate::memory::peak_of;
use crate::sim::lineage::descent;
use crate::sim::store::Store;
use crate::sim::tasks::block_on;
use crate::sim::world::{Config, World};

/// Requests that are made of an image that opens.
const REQUESTS: usize = 24;

/// The longest log that a header can name and have used, bytes.
const LONGEST_LOG: u64 = 1 << 30;

/// One image, opened and written to.
pub const TARGET: Target = Target {
    name: "image",
    seeds: || corpus::images().into_iter().map(Case::of).collect(),
    change_bytes: no_bytes,
    run: |case, seed| run(&case.files[0], seed),
    endings: &[REFUSED, READ_ONLY, WRITTEN, REPLAYED],
};

pub const REFUSED: &str = "refused";
pub const READ_ONLY: &str = "only read";
pub const WRITTEN: &str = "written to";
const REPLAYED: &str = "written to after its log was replayed";

/// The largest of the lengths at these places that the file is long enough for; 0 if there is none.
fn longest(image: &Craft, places: impl Iterator<Item = u64>) -> u64 {
    let word = |at: u64| u32::from_le_bytes(image.read(at, 4).try_into().expect("four bytes"));
    places.map(|at| u64::from(word(at))).filter(|&length| length <= image.file.length).max().unwrap_or(0)
}

fn log_length(image: &Craft) -> u64 {
    longest(image, HEADERS.into_iter().map(|header| header + 68)).min(LONGEST_LOG)
}

/// The stated bound: 64 MiB (the space map takes half of that for the longest file), the longest region (a
/// BAT has 513 MiB at most), and three times the log; once more for what the simulated disk keeps of the
/// replay.
fn memory_bound(image: &Craft) -> u64 {
    // The mutator changes the first few entries only.
    let lengths =
        REGION_TABLES.into_iter().flat_map(|table| (0..8).map(move |entry| table + 40 + 32 * entry));
    (64 << 20) + longest(image, lengths).min(513 << 20) + 4 * log_length(image)
}

/// Each sector of the log may be an entry that is read twice, and each 32 bytes of it a change.
fn operation_bound(image: &Craft) -> u64 {
    20_000 + log_length(image) / 16
}

/// An opened image, its file afterwards, and the most memory that opening took, bytes.
pub type Opening<T> = (Result<T, Error>, Store, u64);

/// Opens `image` for reading, and checks what that costs.
pub fn open_read_only(image: &Craft) -> Opening<ReadImage> {
    measure(image, |disk| block_on(Image::read(disk)))
}

/// Opens `image` for writing, and checks what that costs.
pub fn open_writable(image: &Craft) -> Opening<WritableImage> {
    measure(image, |disk| block_on(Image::open_for_writing(disk, || Uuid::from_u128(0xf11e))))
}

fn measure<T>(image: &Craft, open: impl FnOnce(&Probe) -> Result<T, Error>) -> Opening<T> {
    let disk = Probe::new(image.file.clone(), operation_bound(image));
    let (opened, peak) = peak_of(|| open(&disk));
    assert!(peak <= memory_bound(image), "opening takes {peak} bytes, the bound is {}", memory_bound(image));
    if let Err(error) = &opened {
        assert!(!error.to_string().is_empty());
    }
    (opened, disk.content(), peak)
}

/// Puts one image through everything.
fn run(file: &Store, seed: u64) -> Outcome {
    let image = Craft { file: file.clone() };
    let mut shape = DefaultHasher::new();
    let (read_only, _, read_peak) = open_read_only(&image);
    let (writable, content, write_peak) = open_writable(&image);
    let peak = read_peak.max(write_peak);
    describe(&read_only, &mut shape);
    describe(&writable, &mut shape);
    let replayed = read_only.as_ref().is_ok_and(|opened| matches!(opened.found_log, FoundLog::Dirty(_)));
    let ending = match (read_only, writable) {
        (Ok(in_memory), Ok(opened)) => {
            agree(&in_memory, &opened);
            write_to(opened, content, seed, &mut shape)
        }
        // A log that changes payload is not replayed in memory.
        (Err(_), Ok(opened)) => write_to(opened, content, seed, &mut shape),
        (Ok(_), Err(_)) => READ_ONLY,
        (Err(_), Err(_)) => REFUSED,
    };
    let ending = if replayed && ending == WRITTEN { REPLAYED } else { ending };
    Outcome { ending, signature: shape.finish(), peak }
}

/// What can be told from outside about the way an open went, numbers left out.
pub fn describe<T: Deref<Target = Image>>(opened: &Result<T, Error>, shape: &mut DefaultHasher) {
    match opened {
        Ok(image) => {
            let metadata = &image.metadata;
            let dirty = matches!(image.found_log, FoundLog::Dirty(_));
            (metadata.block_size, metadata.logical_sector_size, metadata.has_parent, dirty).hash(shape);
            (image.space.used_bytes().ilog2(), metadata.virtual_size.checked_ilog2()).hash(shape);
        }
        Err(error) => {
            let words = error.to_string().replace(|letter: char| letter.is_ascii_digit(), "");
            (format!("{:?}", error.kind()), error.structure(), words).hash(shape);
        }
    }
}

/// What is seen through a log replayed in memory is what its replay in place leaves.
fn agree(in_memory: &Image, opened: &Image) {
    assert_eq!(in_memory.found_log, opened.found_log);
    assert_eq!(in_memory.metadata, opened.metadata);
    assert_eq!(in_memory.layout.file_length.max(opened.layout.file_length), opened.layout.file_length);
    let blocks = in_memory.map.geometry().block_count().min(10_000);
    for block in 0..blocks {
        assert_eq!(in_memory.map.load(block), opened.map.load(block), "block {block}");
    }
}

/// Writes to an image that has been opened; its log has been replayed into `content`.
fn write_to(opened: WritableImage, content: Store, seed: u64, shape: &mut DefaultHasher) -> &'static str {
    let geometry = *opened.map.geometry();
    if geometry.is_differencing() || geometry.block_count() == 0 || opened.check_writable().is_err() {
        return READ_ONLY;
    }
    drop(opened);
    serve(&geometry, content, seed, shape);
    WRITTEN
}

/// Serves what opens for writing; what is left opens again.
pub fn serve(geometry: &Geometry, content: Store, seed: u64, shape: &mut DefaultHasher) {
    let damage = beyond_repair(&content);
    let mut rng = Rng::with_seed(seed);
    let mut config = Config { requests: REQUESTS, can_punch: rng.bool(), ..Config::small() };
    config.image.parent = geometry.is_differencing().then(descent);
    config.image.virtual_size = geometry.virtual_size();
    config.image.block_size = u32::try_from(geometry.block_size()).expect("at most 256 MiB");
    config.image.logical_sector_size = geometry.logical_sector_size();
    let last = geometry.block_count() - 1;
    config.blocks = vec![0, 1.min(last), rng.u64(..=last.min(8)), rng.u64(..=last), last];
    let mut world = World::open(config.clone(), content, config.oracle(), rng.fork());
    world.foreign = true;
    (0..rng.usize(..2000)).take_while(|_| world.step()).for_each(drop);
    opens_again(world.cut_file(), "a power cut");
    let left = world.close();
    assert!(beyond_repair(&left) <= damage, "our writing adds no damage");
    let counters = world.counters();
    for counter in [counters.grants, counters.recycled_grants, counters.grows, counters.unmapped] {
        counter.checked_ilog2().hash(shape);
    }
    let found = opens_again(left, "a clean close");
    assert_eq!(found, FoundLog::Clean, "a clean close leaves nothing to replay");
}

/// How much of an image that opens contradicts the format, and cannot be repaired.
fn beyond_repair(file: &Store) -> u64 {
    let disk = Probe::new(file.clone(), u64::MAX);
    let report = block_on(check(&disk)).expect("what opens can be examined");
    assert!(report.complete, "what opens is examined whole: {:?}", report.findings);
    report.beyond_repair
}

/// What we leave is an image, whatever it was made from.
fn opens_again(file: Store, after: &str) -> FoundLog {
    let (opened, ..) = open_writable(&Craft { file });
    opened.unwrap_or_else(|error| panic!("after {after}: {error}")).found_log
}
