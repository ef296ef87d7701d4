//! Promises defended here: a first write costs no sync; a flush costs one sync when metadata is clean, and at
//! most one more than the rounds its dirty pages need.

#[allow(dead_code, reason = "the simulator serves several tests, none of which needs all of it")]
mod sim;

use fastrand::Rng;
use sim::world::{Config, World, new_image};
use vhdx_ublk::engine::front::Op;

const BLOCK: u64 = 2 << 20;
const WRITES: u64 = 1000;

/// A 1 TiB disk in a session that has seen its first flush.
fn warmed_up() -> World {
    let mut config = Config::small();
    config.image.virtual_size = 1 << 40;
    config.image.block_size = 2 << 20;
    config.requests = 0;
    let mut rng = Rng::with_seed(1);
    let content = new_image(&config, &mut rng);
    let oracle = config.oracle();
    let mut world = World::open(config, content, oracle, rng);
    write(&mut world, 0);
    flush(&mut world);
    world
}

fn write(world: &mut World, block: u64) {
    world.request(Op::Write { durable: false }, block * BLOCK, 4096);
    world.drain();
}

fn flush(world: &mut World) -> u64 {
    let before = world.counters().syncs;
    world.request(Op::Flush, 0, 0);
    world.drain();
    world.counters().syncs - before
}

#[test]
fn a_thousand_first_writes_to_neighbouring_blocks_sync_nothing() {
    let mut world = warmed_up();
    let before = world.counters().syncs;
    (1..=WRITES).for_each(|block| write(&mut world, block));
    assert_eq!(world.counters().syncs, before, "a first write waited for a sync");
    assert_eq!(world.counters().grants, WRITES + 1);
    let flushed = flush(&mut world);
    println!("{WRITES} neighbouring first writes: 0 syncs; one flush then: {flushed}");
    assert!((1..=2).contains(&flushed), "{flushed} syncs for one flush");
    assert_eq!(flush(&mut world), 1, "clean metadata costs one sync");
}

#[test]
fn random_first_writes_flush_within_the_formula() {
    let mut world = warmed_up();
    let mut rng = Rng::with_seed(2);
    let before = world.counters();
    for _ in 0..WRITES {
        let block = rng.u64(1..(1 << 40) / BLOCK);
        write(&mut world, block);
    }
    let flushed = flush(&mut world);
    let after = world.counters();
    let (pages, rounds_of) = (after.pages - before.pages, 83);
    let total = after.syncs - before.syncs;
    println!(
        "{WRITES} random first writes on 1 TiB: {pages} pages logged in {} commits, {total} syncs in all, {flushed} of them in the flush",
        after.commits - before.commits
    );
    // Cycles start by themselves at a quarter of the log: what is left for the flush is less than one round.
    assert!(flushed <= 2, "{flushed} syncs for less than a round of pages");
    let commits = after.commits - before.commits;
    // A log that has room for no more starts again, for three syncs; a grown file's length is synced first.
    let laps = (pages + commits).div_ceil(254 - 2 * 84);
    let most = commits + pages.div_ceil(rounds_of) + 3 * laps + after.grows - before.grows;
    assert!(total <= most, "{total} syncs, {commits} commits, {pages} pages, {laps} laps");
}

/// One flush after another, each behind one first write: one sync each, which is what openvmm needs and a
/// seventh of what QEMU needs. A log of 1 MiB holds 126 of them, then it starts again for three more; and when the
/// file has grown, which it does in ever longer steps, its length is synced first.
#[test]
fn a_flush_after_each_first_write_costs_one_sync() {
    let mut world = warmed_up();
    let first = world.counters();
    let mut before = first;
    for block in 1..=WRITES {
        write(&mut world, block);
        let grown = u64::from(world.counters().grows > before.grows);
        let syncs = flush(&mut world);
        let after = world.counters();
        assert_eq!(syncs, 1 + grown + 3 * (after.logs - before.logs), "the flush behind block {block}");
        before = after;
    }
    let (syncs, grows, logs) =
        (before.syncs - first.syncs, before.grows - first.grows, before.logs - first.logs);
    println!(
        "{WRITES} flushes: {syncs} syncs; the file has grown {grows} times, the log started again {logs} times"
    );
    assert_eq!(logs, (WRITES + 1) / 126, "a log holds 126 of them");
    assert!(syncs * 100 <= WRITES * 105, "{syncs} syncs");
}
