//! Promise defended here: a layer of a chain that is served is merged while requests come, and nothing is
//! lost or torn: not for the guest, not when the daemon is killed at any step and another one takes over, and
//! not when the power is cut at any step. What was interrupted is done again, and the chain gets shorter.

use std::time::Instant;

use fastrand::Rng;

use crate::crash::number;
use crate::sim::layers::{Chain, MIB, Shape, data_write_guid, examined, open_chain, opened, shape};
use crate::sim::marks::Marks;
use crate::sim::served_chain::{Folder, Rates, ServedChain, fates_of};

/// Crash images that are judged in merges, at least.
const IMAGES: u64 = 10_000;

fn shapes(rng: &mut Rng) -> Vec<Shape> {
    let size = 3 * MIB + rng.u64(0..3) * 525_312;
    let depth = rng.usize(3..6);
    let any = |rng: &mut Rng, base: bool| Shape {
        virtual_size: if rng.u32(..4) == 0 { size - 512 * rng.u64(..3000) } else { size },
        fixed: base && rng.u32(..4) == 0,
        ..shape(0, 1 << rng.u32(..2))
    };
    let mut shapes: Vec<Shape> = (0..depth).map(|number| any(rng, number + 1 == depth)).collect();
    shapes[0].virtual_size = size;
    shapes
}

/// Serves a chain, and merges all its layers between the leaf and the base, with snapshots between; returns
/// what was seen.
fn merge_all(seed: u64, rates: Rates) -> Marks {
    let mut rng = Rng::with_seed(seed);
    let shapes = shapes(&mut rng);
    let chain = Chain::new(&mut rng, &shapes);
    let (fronts, leaf) = (rng.usize(1..4), chain.names[0].clone());
    let mut world =
        ServedChain::open(Folder::of(&chain.stores), &leaf, fates_of(&chain), (fronts, rates), rng.u64(..));
    let (mut snapshots, mut attempts) = (2, 0);
    while world.entry.len() > 2 || snapshots > 0 {
        world.run(rng.usize(..200));
        if snapshots > 0 && (world.entry.len() == 2 || rng.u32(..3) == 0) {
            world.snapshot(shape(0, 1 << rng.u32(..2)));
            snapshots -= 1;
            continue;
        }
        attempts += 1;
        assert!(attempts < 200, "seed {seed}: the chain does not get shorter");
        world.merge(rng.usize(1..world.entry.len() - 1));
        if rates.cuts > 0 && rng.u32(..4) == 0 {
            world.run(rng.usize(..3000));
            world = world.cut(rng.u64(..));
        } else {
            world.finish_merge();
        }
    }
    world.run(500);
    let content = world.folder.content();
    let (names, _) = open_chain(&content, &world.entry[0]);
    assert_eq!(names.len(), 2, "seed {seed}");
    if world.deaths == 0 && rates.cuts == 0 {
        assert_eq!(content.len(), 2, "seed {seed}: files are left over");
        let image = opened(&content[&names[0]]).expect("an image");
        let locator = image.metadata.parent_locator.as_ref().expect("a child");
        assert_eq!(locator.linkage2(), None, "seed {seed}: the merges have ended");
    }
    examined(&content[&names[1]]);
    world.marks
}

fn merge_many(seeds: std::ops::Range<u64>, rates: Rates) -> Marks {
    let mut marks = Marks::default();
    for seed in seeds {
        marks.merge(&merge_all(seed, rates));
    }
    marks
}

/// Nothing fails: all layers go, in any order, and no file and no linkage is left over.
#[test]
fn layers_of_a_served_chain_are_merged_while_requests_come() {
    let marks = merge_many(0..30, Rates { death: 0, cuts: 0 });
    for what in ["merges of the leaf's parent", "merges of a layer below", "reads", "snapshots"] {
        assert!(marks.count(what) > 30, "{what}: {}", marks.count(what));
    }
}

/// Daemons are killed and the power is cut in the middle of merges.
#[test]
fn a_live_merge_survives_kills_and_power_cuts() {
    let mut marks = merge_many(0..6, Rates { death: 0, cuts: 10 });
    marks.merge(&merge_many(100..115, Rates { death: 1500, cuts: 10 }));
    println!("{marks}");
    assert!(marks.count("images in a merge") >= IMAGES, "{} images", marks.count("images in a merge"));
    for what in [
        "deaths in a merge",
        "deaths while the layer is dropped",
        "images while fronts are held",
        "merges that end",
        "power cuts that are served again",
    ] {
        assert!(marks.count(what) > 20, "{what}: {}", marks.count(what));
    }
}

/// The long run of merges, as `tools/crash` asks for it.
#[test]
#[ignore = "takes hours: tools/crash runs it"]
fn the_long_run() {
    let images = number("VHDX_IMAGES").unwrap_or(IMAGES);
    let (begun, minutes) = (Instant::now(), number("VHDX_MINUTES").unwrap_or(u64::MAX / 60));
    let (mut marks, mut seed) = (Marks::default(), number("VHDX_SEED").unwrap_or(1_000_000));
    while marks.count("images in a merge") < images && begun.elapsed().as_secs() < 60 * minutes {
        let death = if seed.is_multiple_of(2) { 0 } else { 1500 };
        marks.merge(&merge_all(seed, Rates { death, cuts: 10 }));
        seed += 1;
    }
    println!("{marks}");
    println!(
        "{} images in merges, no promise broken; the next seed is {seed}",
        marks.count("images in a merge")
    );
}

/// What catches the bugs that are planted in merges.
#[cfg(feature = "simulation")]
pub fn a_merge_shows_what_is_wrong() {
    merge_many(0..20, Rates { death: 0, cuts: 10 });
}

/// A merge is killed when the host has the target's new DataWriteGuid, durable or not, and the power is cut
/// at every step of the next one.
fn merge_after_kill(seed: u64) {
    let mut rng = Rng::with_seed(seed);
    let chain = Chain::new(&mut rng, &[(); 3].map(|()| Shape { virtual_size: 2 * MIB, ..shape(0, 1) }));
    let (rates, names) = (Rates { death: 0, cuts: 100 }, chain.names.clone());
    let mut world =
        ServedChain::open(Folder::of(&chain.stores), &names[0], fates_of(&chain), (1, rates), rng.u64(..));
    let known = data_write_guid(&world.folder.content()[&names[2]]);
    world.merge(1);
    while data_write_guid(&world.folder.content()[&names[2]]) == known {
        world.run(1);
    }
    world.die();
    world.merge(1);
    world.finish_merge();
}

/// The next merge finds a GUID in the host's cache that a power cut may take back.
#[test]
fn a_merge_relies_on_nothing_that_a_killed_one_left_in_the_cache() {
    (0..8).for_each(merge_after_kill);
}

/// What catches the bugs that are planted where a merge follows one that was killed.
#[cfg(feature = "simulation")]
pub fn a_merge_after_a_kill_shows_what_is_wrong() {
    (0..8).for_each(merge_after_kill);
}
