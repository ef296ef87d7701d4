//! Damaged session memory, beside an image that a killed daemon left.
//!
//! * Whatever the memory says, taking it over ends in an image or an error, and touches nothing outside of
//!   it.
//! * What the memory's checks refuse is not taken over.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use fastrand::Rng;
use uuid::Uuid;
use vhdx_ublk::format::bat::Geometry;
use vhdx_ublk::image::{Image, Place, SessionMemory, SharedWords, WritableImage};

use super::corpus;
use super::target::{Case, Outcome, Target};
use super::trial::REFUSED;
use crate::sim::disk::SimDisk;
use crate::sim::store::Store;
use crate::sim::tasks::block_on;

pub const TARGET: Target = Target {
    name: "session",
    seeds,
    change_bytes: change_words,
    run: |case, _| run(&case.files[0], &case.bytes),
    endings: &[REFUSED, "taken over"],
};

/// Where the image is, as far as anybody asks.
fn place() -> Place {
    Place { boot: Uuid::from_u128(1), inode: 2, device: 1, file_system: 0, path: "/image.vhdx".into() }
}

/// Words of the longest session here; larger images are refused.
const MOST_WORDS: usize = 1 << 19;

/// Words before the block map.
const HEADER_WORDS: usize = 512;

/// The memory that all trials use, one after the other: it must live as long as the program.
static MEMORY: Mutex<Option<&'static [AtomicU64]>> = Mutex::new(None);

/// Memory for this many words, with these bytes at its start, and zeros behind.
fn memory(count: usize, bytes: &[u8]) -> SessionMemory {
    let mut memory = MEMORY.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let all: &'static [AtomicU64] = memory
        .get_or_insert_with(|| Box::leak((0..MOST_WORDS).map(|_| AtomicU64::new(0)).collect::<Box<_>>()));
    let words = &all[..count];
    let mut given = bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    for word in words {
        word.store(given.next().unwrap_or(0), Ordering::Relaxed);
    }
    SessionMemory::shared(
        SharedWords::of(words, Arc::new(())),
        Arc::new(move |range| {
            assert!(range.end <= count, "room for {range:?} of {count} words");
            Ok(())
        }),
        Arc::new(Some),
    )
}

/// How many words a session of this image has, if it is one that is tried here.
fn words_for(geometry: &Geometry) -> Option<usize> {
    (geometry.virtual_size() <= 1 << 30)
        .then(|| SessionMemory::words_for(geometry))
        .filter(|count| *count <= MOST_WORDS)
}

fn seeds() -> Vec<Case> {
    let images = corpus::images().into_iter().chain(corpus::children());
    images.filter_map(begun).collect()
}

/// The image with the session of a daemon that was killed when it had just begun.
fn begun(file: Store) -> Option<Case> {
    let disk = SimDisk::new(file, true, true, 512);
    let mut image = block_on(Image::open_for_writing(&disk, || Uuid::from_u128(5))).ok()?;
    let count = words_for(image.map.geometry())?;
    block_on(image.read_bitmaps(&disk)).ok()?;
    let owner = image.owner(place());
    image.start_session(memory(count, &[]), &owner).expect("there is room");
    let memory = MEMORY.lock().expect("no trial has failed yet");
    let words = &memory.expect("it was just used")[..count];
    // Most of what lies behind is zeros, which need not be stored.
    let used = words.iter().rposition(|word| word.load(Ordering::Relaxed) != 0).map_or(0, |last| last + 1);
    let bytes = words[..used].iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
    Some(Case { files: vec![disk.content()], bytes })
}

/// Changes words of the header, of the map, or of the bitmaps.
fn change_words(bytes: &mut Vec<u8>, rng: &mut Rng) {
    let count = bytes.len() / 8;
    for _ in 0..rng.usize(1..5) {
        let at = match rng.u32(..4) {
            0 => rng.usize(..24),
            1 | 2 => HEADER_WORDS + rng.usize(..10),
            _ => rng.usize(..count.max(1) + 64),
        };
        if bytes.len() < (at + 1) * 8 {
            bytes.resize((at + 1) * 8, 0);
        }
        let place = at * 8..at * 8 + 8;
        let old = u64::from_le_bytes(bytes[place.clone()].try_into().expect("eight bytes"));
        let new = match rng.u32(..6) {
            0 => rng.u64(..),
            1 => rng.u64(..8),
            2 => (rng.u64(..40) << 20) | rng.u64(..16),
            3 => old.wrapping_add(1 << 20),
            _ => old ^ (1 << rng.u32(..64)),
        };
        bytes[place].copy_from_slice(&new.to_le_bytes());
    }
}

fn run(file: &Store, bytes: &[u8]) -> Outcome {
    let mut shape = DefaultHasher::new();
    let disk = SimDisk::new(file.clone(), true, true, 512);
    let looked = block_on(Image::read(&disk));
    let mut ending = REFUSED;
    if let Ok(image) = looked
        && let Some(count) = words_for(image.map.geometry())
    {
        let memory = memory(count, bytes);
        let carried = image.header.header.file_write_guid;
        let checked = memory.check(&image.owner(place()), carried);
        if memory.fits(image.map.geometry()) && checked.is_ok() {
            let resumed = block_on(WritableImage::resume(&disk, memory, carried, || Uuid::from_u128(6)));
            match resumed {
                Ok(_) => ending = "taken over",
                Err(error) => (format!("{:?}", error.kind()), error.structure()).hash(&mut shape),
            }
        }
        format!("{checked:?}").hash(&mut shape);
    }
    ending.hash(&mut shape);
    Outcome { ending, signature: shape.finish(), peak: 0 }
}
