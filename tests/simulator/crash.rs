//! Promises defended here: nothing acknowledged as flushed is ever lost; a sector never shows what was not
//! written to it; what recovery left is a valid image, and power cuts in recovery change nothing; reads see
//! what was written, whatever the order of messages, completions and wake-ups; after a failure that must not
//! be, no write or flush succeeds.

use std::time::Duration;

use fastrand::Rng;
use vhdx_ublk::engine::front::Op;
use vhdx_ublk::image::SLOTS_PER_PAGE;

use crate::sim::campaign::{Campaign, Report, Scenario, run, scenario, scenarios};
use crate::sim::judge::Effort;
use crate::sim::world::{Config, World, new_image};

/// Crash images between the moment at which a snapshot holds the fronts and the one at which it is taken, at
/// least.
const IMAGES_IN_SNAPSHOTS: u64 = 10_000;

/// Crash images between the moment at which the fronts of a disk are held and the one at which it has grown,
/// at least.
const IMAGES_IN_GROWTH: u64 = 10_000;

/// Crash images between the moment at which blocks begin to move under load and the one at which they have,
/// at least.
const IMAGES_IN_MOVES: u64 = 50_000;

/// Distinct images that a test run recovers and judges, at least.
const IMAGES: u64 = 1_000_000;

/// What every test run exercises; one that stays at zero fails it.
const EXERCISED: [&str; 77] = [
    "P0 none or all of it",
    "P1 whole writes",
    "P2 parts of what was at risk",
    "P3 sectors of 4096 bytes",
    "P4 torn sectors",
    "P5 a length of its own",
    "P6 a sync fails",
    "P7 bit rot refused",
    "P7 bit rot that does not matter",
    "a BAT page at risk in place",
    "a block has moved",
    "a cycle of several entries",
    "a durable write fails",
    "a front's I/O is tried again",
    "a length at risk",
    "a log entry at risk",
    "barriers",
    "batches that find no room",
    "blocks filled from the parent",
    "blocks granted",
    "blocks granted recycled space",
    "blocks quarantined",
    "blocks that fronts give space",
    "blocks that move under load",
    "commit cycles",
    "commits of lost space",
    "cuts in a recovery",
    "cuts of a served file",
    "daemon deaths",
    "deaths between freeze and rest",
    "deaths between growth and session",
    "deaths between rest and switch",
    "deaths between session and release",
    "deaths between switch and release",
    "deaths in a recovery",
    "deaths while fronts are held",
    "disks that grow",
    "durable writes",
    "ends that are posted and not seen",
    "extents out of quarantine",
    "growths that are given up",
    "header 1 at risk",
    "header 2 at risk",
    "kills that leave the new size",
    "kills that leave the old size",
    "moments with every image",
    "moves that come too late",
    "not present to partial",
    "not present to present",
    "not present to zero",
    "pages that only the memory had",
    "partial blocks made whole",
    "partial to present",
    "partial to zero",
    "payload sectors judged",
    "present to zero",
    "recovered images examined whole",
    "replays",
    "requests failed by a death",
    "requests repeated to a successor",
    "requests that wait for room through a snapshot",
    "requests that waited for room until the device ended",
    "requests tried again for which there was no room",
    "room made ahead of a growth",
    "sector bitmaps begun",
    "sequences of operations",
    "snapshots",
    "space that only the file names",
    "successors that refuse what may be lost",
    "syncs by a front",
    "the device loses its cache",
    "the file grows",
    "the host has room again",
    "the host is full",
    "the host loses writes",
    "the log starts again",
    "zero to present",
];

fn tell(report: &Report) {
    println!("{}", report.marks);
    for (name, (distinct, busy)) in &report.scenarios {
        println!("  {distinct:>12}  distinct images in {busy:>8.1?}: {name}");
    }
    println!(
        "{} images, {} distinct ones recovered and judged in {} runs, {:.0} distinct ones per second \
         and core",
        report.marks.count("images") + report.marks.count("cuts in a recovery"),
        report.distinct,
        report.runs,
        report.speed()
    );
}

#[test]
fn every_promise_holds_at_every_power_cut() {
    let report = Campaign::test().run(|_| {});
    tell(&report);
    let missing = report.marks.missing(&EXERCISED);
    assert!(missing.is_empty(), "never exercised: {missing:?}");
    assert!(report.distinct >= IMAGES, "only {} distinct images", report.distinct);
    let inside = report.marks.count("images inside a snapshot");
    assert!(inside >= IMAGES_IN_SNAPSHOTS, "only {inside} images inside snapshots");
    let growing = report.marks.count("images while a disk grows");
    assert!(growing >= IMAGES_IN_GROWTH, "only {growing} images while disks grow");
    let moving = report.marks.count("images while blocks move");
    assert!(moving >= IMAGES_IN_MOVES, "only {moving} images while blocks move");
}

/// More dirty BAT pages than the log holds, in one cycle: rounds follow each other round the ring, and the
/// newest synced entry never points at overwritten log space.
#[test]
fn rounds_that_fill_the_log_again_and_again_survive_every_cut() {
    let mut config = Config::small();
    config.image.virtual_size = 1 << 40;
    config.requests = 0;
    for seed in 0..4 {
        let mut rng = Rng::with_seed(seed);
        let content = new_image(&config, &mut rng);
        let mut world = World::open(config.clone(), content, config.oracle(), rng);
        world.request(Op::Write { durable: true }, 0, 4096);
        world.drain();
        // The cycle that starts by itself waits for its sync while pages pile up for the next one.
        world.hold_syncs = true;
        for page in 1..500 {
            world.request(Op::Write { durable: false }, (page * SLOTS_PER_PAGE) << 20, 4096);
            while world.step() {}
        }
        world.request(Op::Flush, 0, 0);
        world.hold_syncs = false;
        let mut steps = 0_u64;
        while world.step() {
            steps += 1;
            if steps.is_multiple_of(3) {
                world.cut(1);
            }
        }
        let counters = world.counters();
        assert!(counters.pages >= 500 && counters.commits <= 4, "the pages did not pile up: {counters:?}");
        world.close();
    }
}

#[test]
fn one_seed_gives_one_trace() {
    for name in ["dynamic", "failed-sync", "again"] {
        let (scenario, requests) = (scenario(name), 40);
        for seed in 0..3 {
            let traces = [(); 2].map(|()| run(&scenario, seed, requests, Effort::TEST));
            assert_eq!(traces[0].trace, traces[1].trace, "{name}, seed {seed}");
            assert_eq!(traces[0].distinct, traces[1].distinct, "{name}, seed {seed}");
        }
    }
}

pub fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Repeats one run: `VHDX_SCENARIO`, `VHDX_SEED` and `VHDX_REQUESTS` name it, as a failing run says.
#[test]
fn one_seed() {
    let name = std::env::var("VHDX_SCENARIO").unwrap_or_else(|_| "dynamic".into());
    let scenario =
        if number("VHDX_DEPTH").is_some() { scenario(&name).lengthened() } else { scenario(&name) };
    let requests = number("VHDX_REQUESTS")
        .map_or(scenario.config.requests, |count| usize::try_from(count).expect("64-bit hosts only"));
    let effort = effort();
    tell(&run(&scenario, number("VHDX_SEED").unwrap_or(0), requests, effort));
}

fn effort() -> Effort {
    match number("VHDX_DEPTH") {
        None => Effort::TEST,
        Some(depth) => Effort { depth: u32::try_from(depth).expect("a small number"), ..Effort::LONG },
    }
}

/// The long run, as `tools/crash` asks for it.
#[test]
#[ignore = "takes hours: tools/crash runs it"]
fn the_long_run() {
    let state = std::env::var_os("VHDX_STATE").map(std::path::PathBuf::from);
    let (done, before) = state.as_deref().map_or((0, 0), read_state);
    let images = number("VHDX_IMAGES").map(|images| images.saturating_sub(before));
    let minutes = number("VHDX_MINUTES").map(|minutes| Duration::from_secs(60 * minutes));
    let seed = number("VHDX_SEED").unwrap_or(1_000_000);
    let part = std::env::var("VHDX_SCENARIO").unwrap_or_default();
    let wanted = scenarios().into_iter().filter(|scenario| scenario.name.contains(&part));
    let scenarios: Vec<Scenario> = wanted.map(Scenario::lengthened).collect();
    assert!(!scenarios.is_empty(), "no scenario has {part} in its name");
    let campaign = Campaign { scenarios, effort: effort(), seed, images, at_most: minutes, done };
    let report = campaign.run(|ledger| {
        let (distinct, rate) = (before + ledger.total.distinct, ledger.total.speed());
        eprint!("\r{distinct} distinct images, {} runs, {rate:.0} per second and core ", ledger.done);
        if let Some(path) = &state {
            let line = format!("{} {}\n", ledger.done, before + ledger.distinct);
            std::fs::write(path, line).expect("the state file can be written");
        }
    });
    eprintln!();
    tell(&report);
    println!("{} distinct images over all runs, no promise broken", before + report.distinct);
}

/// Runs done by earlier campaigns and the distinct images they recovered.
fn read_state(path: &std::path::Path) -> (u64, u64) {
    let Ok(text) = std::fs::read_to_string(path) else { return (0, 0) };
    let mut numbers =
        text.split_whitespace().map(|word| word.parse().expect("the state file holds two numbers"));
    let mut next = || numbers.next().expect("the state file holds two numbers");
    (next(), next())
}
