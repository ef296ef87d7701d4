//! Scenarios, and many seeds of each on all cores: what fails is made smaller and named with the command that
//! repeats it.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fastrand::Rng;
use nix::time::{ClockId, clock_gettime};
use vhdx_ublk::engine::front::{Op, Request};
use vhdx_ublk::image::{InitialState, NewImage};

use super::choose::Choices;
use super::judge::{Effort, Judge};
use super::lineage::descent;
use super::marks::Marks;
use super::oracle::Oracle;
use super::short_logs::ShortLogs;
use super::store::Store;
use super::violation::message;
use super::world::{Beginning, Config, Faults, HostKind, Loss, World, new_image};

/// A log of 16 sectors: rounds of three pages at most, and few of them before it starts again.
const TINY_LOG: u32 = 64 << 10;
/// A log of 24 sectors: rounds of up to six pages.
const SMALL_LOG: u32 = 96 << 10;

/// Lives per seed: each opens what the cut before it left.
const LIVES: usize = 3;

/// What a run does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// Random requests, several lives.
    Swarm,
    /// One life, then a clean close.
    Short,
    /// All sequences of so many operations that start with the one that the seed names.
    Sequences(usize),
}

/// A shape of image and host, and what is done to it.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub name: String,
    pub config: Config,
    pub body: Body,
    /// Seeds of a test run.
    pub seeds: u64,
}

impl Scenario {
    fn swarm(name: &str, seeds: u64, config: Config) -> Self {
        Self { name: name.into(), config, body: Body::Swarm, seeds }
    }

    /// The same with longer sequences, where there are any.
    pub fn lengthened(mut self) -> Self {
        if let Body::Sequences(length) = &mut self.body {
            *length += 1;
        }
        self
    }

    /// Where randomness starts: no two scenarios do the same, so their images differ too.
    fn seed(&self, seed: u64) -> u64 {
        let fold = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        self.name.bytes().fold(seed, fold)
    }
}

/// A small dynamic disk with a tiny log, whose blocks share one BAT page but not its sectors.
pub fn tiny() -> Config {
    let mut config = Config::small();
    config.image.virtual_size = (200 << 20) + 4096;
    config.image.log_length = TINY_LOG;
    config.blocks = vec![0, 1, 2, 70, 130, 200];
    config.requests = 200;
    config.weights = [50, 10, 10, 26, 12, 12];
    config.depth = 16;
    config.width = 3;
    config
}

/// Every scenario of a test run.
pub fn scenarios() -> Vec<Scenario> {
    let mut all = vec![
        Scenario::swarm("dynamic", 170, tiny()),
        Scenario::swarm("no-punch", 160, Config { can_punch: false, ..tiny() }),
        Scenario::swarm("sectors-of-4096", 15, sectors_of_4096()),
        Scenario::swarm("fixed", 6, fixed()),
        Scenario::swarm("chunk-border", 60, chunk_border()),
        Scenario::swarm("growing", 10, growing()),
        Scenario::swarm("again", 30, again()),
        Scenario::swarm("flushes", 20, flushes()),
        Scenario::swarm(
            "failed-sync",
            40,
            Config { faults: Faults { sync: true, ..Faults::NONE }, ..tiny() },
        ),
        Scenario::swarm("failed-durable-write", 20, failed_durable_write()),
    ];
    all.extend(deaths());
    all.extend(children());
    all.extend(snapshots());
    all.extend(killed_snapshots());
    all.extend(grown());
    all.extend(moving());
    all.extend(discarding());
    all.extend(losses());
    all.extend(overwrites());
    all.extend(full_hosts());
    all.extend(waiting());
    all.extend(dense_hosts());
    all.push(Scenario {
        name: "sequences".into(),
        config: sequences(),
        body: Body::Sequences(2),
        seeds: SEQUENCE_SEEDS,
    });
    let mut config = sequences();
    config.image.parent = Some(descent());
    config.beginning = Beginning::Partial;
    all.push(Scenario {
        name: "child-sequences".into(),
        config,
        body: Body::Sequences(2),
        seeds: SEQUENCE_SEEDS,
    });
    all.extend(geometries());
    all
}

/// The scenario of this name.
pub fn scenario(name: &str) -> Scenario {
    let found = scenarios().into_iter().find(|scenario| scenario.name == name);
    found.unwrap_or_else(|| panic!("there is no scenario {name}"))
}

fn sectors_of_4096() -> Config {
    let mut config = tiny();
    config.image.logical_sector_size = 4096;
    config.image.block_size = 2 << 20;
    config.image.virtual_size = (12 << 20) + 4096;
    config.blocks = (0..7).collect();
    config
}

fn fixed() -> Config {
    let mut config = tiny();
    config.image.fixed = true;
    config.image.virtual_size = (6 << 20) + 4096;
    config.blocks = (0..7).collect();
    config
}

fn chunk_border() -> Config {
    let mut config = tiny();
    config.image.virtual_size = 9 << 30;
    config.image.log_length = SMALL_LOG;
    config.blocks = vec![0, 511, 512, 4095, 4096, 4097, 8191, 8192, 9215];
    config.fronts = 3;
    config.descriptors = Some(2);
    config
}

fn growing() -> Config {
    let mut config = tiny();
    config.image.virtual_size = 600 << 20;
    config.image.block_size = 8 << 20;
    config.blocks = (0..75).collect();
    config.width = 1;
    config
}

/// Few blocks that come and go, and I/O that is tried again long after it was looked up.
fn again() -> Config {
    let mut config = tiny();
    config.image.virtual_size = 3 << 20;
    config.blocks = (0..3).collect();
    config.can_punch = false;
    config.weights = [30, 5, 40, 20, 20, 5];
    config.faults = Faults { again: 2, slow_io: 2, ..Faults::NONE };
    config
}

/// Many flushes on few tags: one after the other, so that the log is soon full.
fn flushes() -> Config {
    Config { weights: [50, 10, 2, 90, 20, 5], depth: 3, width: 1, requests: 400, ..tiny() }
}

fn failed_durable_write() -> Config {
    let faults = Faults { durable_write: true, ..Faults::NONE };
    Config { faults, weights: [30, 60, 10, 10, 5, 5], ..tiny() }
}

/// The daemon is killed again and again.
fn deaths() -> [Scenario; 3] {
    let faults = Faults { death: 150, ..Faults::NONE };
    let recycling = Config { can_punch: false, width: 1, faults, ..tiny() };
    let losing = Faults { lost_with_death: true, ..faults };
    [
        Scenario::swarm("killed", 30, Config { faults, ..tiny() }),
        Scenario::swarm("killed-no-punch", 30, recycling),
        Scenario::swarm("killed-and-lost", 30, Config { faults: losing, ..tiny() }),
    ]
}

/// A child of a parent that stays as it is, some of whose sectors are there from the start, or none.
fn children() -> [Scenario; 6] {
    let child = |mut config: Config| {
        config.image.parent = Some(descent());
        config.requests = 60;
        config.beginning = Beginning::Partial;
        config
    };
    let faults = Faults { death: 150, ..Faults::NONE };
    // Many commits, so that some come soon after a block was filled.
    let filled = Config { weights: [50, 10, 2, 60, 20, 5], requests: 120, ..child(tiny()) };
    let filled = Config { beginning: Beginning::LeftOver, ..filled };
    [
        Scenario::swarm("child", 100, child(tiny())),
        Scenario::swarm("child-chunk-border", 12, child(chunk_border())),
        Scenario::swarm("child-killed", 60, child(Config { faults, can_punch: false, ..tiny() })),
        Scenario::swarm("child-filled", 30, filled),
        Scenario::swarm("child-new", 40, Config { beginning: Beginning::Nothing, ..child(tiny()) }),
        Scenario::swarm(
            "child-new-killed",
            40,
            Config { beginning: Beginning::Nothing, faults, ..child(tiny()) },
        ),
    ]
}

/// The host loses what it has accepted, and says so to one, whose thread may not run.
fn losses() -> [Scenario; 2] {
    let config = Config { weights: [50, 50, 5, 30, 5, 5], ..tiny() };
    let lost_writes = Faults { loss: Some(Loss::Writes), unseen: 3, ..Faults::NONE };
    let lost_cache = Faults { loss: Some(Loss::Cache), unseen: 2, ..Faults::NONE };
    [
        Scenario::swarm("lost-writes", 30, Config { faults: lost_writes, ..config.clone() }),
        Scenario::swarm("lost-cache", 30, Config { faults: lost_cache, ..config }),
    ]
}

/// Hardly anything but overwrites: most flushes have nothing to log, and fronts sync side by side.
fn overwrites() -> [Scenario; 4] {
    let mut config = Config { blocks: (0..3).collect(), depth: 2, weights: [50, 4, 5, 60, 1, 1], ..tiny() };
    config.image.virtual_size = 3 << 20;
    let failing = Faults { sync: true, unseen: 3, ..Faults::NONE };
    let lost_cache = Faults { loss: Some(Loss::Cache), unseen: 2, ..Faults::NONE };
    let killed = Faults { death: 150, lost_with_death: true, ..Faults::NONE };
    let with = |faults| Config { faults, ..config.clone() };
    [
        Scenario::swarm("overwrites", 15, config.clone()),
        Scenario::swarm("overwrites-failed-sync", 15, with(failing)),
        Scenario::swarm("overwrites-lost-cache", 15, with(lost_cache)),
        Scenario::swarm("overwrites-killed", 10, with(killed)),
    ]
}

/// The host has no room now and then, for holes of the file, or, as it copies on write, for anything.
fn full_hosts() -> [Scenario; 7] {
    let child = |mut config: Config, beginning| {
        config.image.parent = Some(descent());
        Config { beginning, requests: 80, ..config }
    };
    let sparse = Faults { full: 120, ..Faults::NONE };
    let copying = Faults { host: HostKind::Copying, ..sparse };
    let holes = Config { faults: sparse, weights: [50, 30, 5, 26, 12, 12], ..tiny() };
    let copies = Config { faults: copying, ..holes.clone() };
    let killed = Config { faults: Faults { death: 200, ..copying }, ..copies.clone() };
    // Many logs, and headers with them, in little time.
    let often = Config { faults: Faults { full: 30, ..copying }, ..flushes() };
    [
        Scenario::swarm("full", 25, holes.clone()),
        Scenario::swarm("full-child", 20, child(holes.clone(), Beginning::Partial)),
        Scenario::swarm("full-child-new", 20, child(holes, Beginning::Nothing)),
        Scenario::swarm("full-copying", 40, copies.clone()),
        Scenario::swarm("full-copying-child", 20, child(copies, Beginning::Nothing)),
        Scenario::swarm("full-copying-killed", 20, killed),
        Scenario::swarm("full-copying-flushes", 15, often),
    ]
}

/// Requests wait while the host has no room, whatever happens to the device meanwhile.
fn waiting() -> [Scenario; 7] {
    let faults = Faults { full: 80, waits: true, ..Faults::NONE };
    let copying = Faults { host: HostKind::Copying, ..faults };
    let config = Config { faults, weights: [50, 20, 10, 26, 12, 12], ..tiny() };
    let mut child = Config { beginning: Beginning::Partial, requests: 80, ..config.clone() };
    child.image.parent = Some(descent());
    let with = |faults| Config { faults, ..config.clone() };
    let killed = Config { can_punch: false, fronts: 3, ..with(Faults { death: 150, ..copying }) };
    let once = |name: &str, config| Scenario { name: name.into(), config, body: Body::Short, seeds: 20 };
    [
        once("waiting", with(faults)),
        once("waiting-child", child),
        once("waiting-copying", with(copying)),
        once("waiting-killed", killed),
        once("waiting-snapshot", with(Faults { snapshot: 60, ..faults })),
        once("waiting-failed-sync", with(Faults { sync: true, ..copying })),
        once("waiting-moving", with(Faults { moves: 15, ..copying })),
    ]
}

/// The file must have no holes, whatever the guest gives back.
fn dense_hosts() -> [Scenario; 3] {
    let faults = Faults { host: HostKind::Dense, ..Faults::NONE };
    let config = Config { faults, weights: [40, 10, 5, 15, 30, 30], ..tiny() };
    let mut child = Config { beginning: Beginning::Partial, requests: 80, ..config.clone() };
    child.image.parent = Some(descent());
    let failing = Config { faults: Faults { sync: true, ..faults }, ..config.clone() };
    [
        Scenario::swarm("dense", 20, config),
        Scenario::swarm("dense-child", 10, child),
        Scenario::swarm("dense-failed-sync", 20, failing),
    ]
}

/// The daemon is killed while snapshots are taken, and between their steps.
fn killed_snapshots() -> [Scenario; 2] {
    let faults = Faults { snapshot: 60, death: 90, ..Faults::NONE };
    let once = |name: &str, config| Scenario { name: name.into(), config, body: Body::Short, seeds: 12 };
    [
        once("killed-snapshot", Config { faults, ..tiny() }),
        once("killed-snapshot-no-punch", Config { faults, can_punch: false, fronts: 3, ..tiny() }),
    ]
}

/// The disk grows while requests come, whatever its end lies in: it has the same sectors behind its old ends
/// watched as before them.
fn grown() -> [Scenario; 6] {
    let faults = Faults { grow: 150, ..Faults::NONE };
    let killed = Faults { death: 150, ..faults };
    let disk = |faults| {
        let mut config = Config { faults, blocks: vec![0, 1, 2, 130, 200, 201, 203, 299], ..tiny() };
        config.sizes = [(200 << 20) + (1020 << 10), (203 << 20) + 512, 300 << 20].to_vec();
        config.requests = 160;
        config
    };
    let child = |faults, beginning| {
        let mut config = disk(faults);
        config.image.parent = Some(descent());
        Config { beginning, ..config }
    };
    let once = |name: &str, config| Scenario { name: name.into(), config, body: Body::Short, seeds: 15 };
    [
        once("grown", disk(faults)),
        once("grown-killed", Config { can_punch: false, fronts: 3, ..disk(killed) }),
        once("grown-fixed", grown_fixed(faults)),
        once("grown-dense-killed", grown_fixed(Faults { host: HostKind::Dense, ..killed })),
        once("grown-child", child(faults, Beginning::Partial)),
        once("grown-child-killed", child(killed, Beginning::Nothing)),
    ]
}

/// A fixed disk, whose new blocks have their space at once.
fn grown_fixed(faults: Faults) -> Config {
    let mut config = Config { faults, blocks: (0..14).collect(), ..fixed() };
    config.sizes = [(8 << 20) + (1020 << 10), (11 << 20) + 512, 14 << 20].to_vec();
    config.requests = 160;
    config
}

/// Blocks move, and the file is cut, while requests come.
fn moving() -> [Scenario; 7] {
    let faults = Faults { moves: 15, ..Faults::NONE };
    let killed = Faults { death: 150, ..faults };
    let config = Config { faults, fronts: 3, weights: [50, 10, 30, 20, 12, 12], ..tiny() };
    let mut child = Config { beginning: Beginning::Partial, requests: 80, ..config.clone() };
    child.image.parent = Some(descent());
    // More pages of sector bitmaps change between two flushes than one round of the log has.
    let marked = Config { weights: [90, 5, 5, 10, 5, 5], ..child.clone() };
    let slow = Faults { again: 3, slow_io: 2, ..faults };
    let slow = Config { faults: slow, can_punch: false, blocks: (0..3).collect(), ..config.clone() };
    let interrupted = Faults { snapshot: 200, grow: 200, death: 200, ..faults };
    let mut interrupted = Config { faults: interrupted, ..config.clone() };
    interrupted.sizes = [(200 << 20) + (1020 << 10), 300 << 20].to_vec();
    let full = Faults { full: 120, host: HostKind::Copying, ..faults };
    let full = Config { faults: full, ..config.clone() };
    let once = |name: &str, config| Scenario { name: name.into(), config, body: Body::Short, seeds: 20 };
    [
        once("moving", config.clone()),
        once("moving-slowly", slow),
        once("moving-killed", Config { faults: killed, can_punch: false, ..config }),
        once("moving-child", marked),
        once("moving-child-killed", Config { faults: killed, ..child }),
        once("moving-interrupted", interrupted),
        once("moving-full", full),
    ]
}

/// A guest that discards and never flushes.
fn discarding() -> [Scenario; 2] {
    let faults = Faults { lost_space: 12, ..Faults::NONE };
    let config = Config { faults, weights: [50, 10, 20, 0, 30, 12], ..tiny() };
    let killed = Faults { death: 150, full: 150, host: HostKind::Copying, ..faults };
    let once = |name: &str, config| Scenario { name: name.into(), config, body: Body::Short, seeds: 12 };
    [
        once("discarding", config.clone()),
        once("discarding-killed", Config { faults: killed, can_punch: false, fronts: 3, ..config }),
    ]
}

/// Snapshots are taken while requests come.
fn snapshots() -> [Scenario; 2] {
    let faults = Faults { snapshot: 60, ..Faults::NONE };
    let once = |name: &str, config| Scenario { name: name.into(), config, body: Body::Short, seeds: 30 };
    [
        once("snapshot", Config { faults, ..tiny() }),
        once("snapshot-no-punch", Config { faults, can_punch: false, fronts: 3, ..tiny() }),
    ]
}

fn sequences() -> Config {
    let mut config = tiny();
    config.image.virtual_size = 3 << 20;
    config.blocks = (0..3).collect();
    config.fronts = 1;
    config.depth = 4;
    config.requests = 0;
    config
}

/// Blocks, sectors and sizes where arithmetic has its borders.
fn geometries() -> Vec<Scenario> {
    let mut all = Vec::new();
    for block_size in [1_u32 << 20, 2 << 20, 32 << 20, 256 << 20] {
        for sector in [512_u32, 4096] {
            let (block, sector_bytes) = (u64::from(block_size), u64::from(sector));
            let chunk = sector_bytes << 23;
            let sizes = [
                ("short-of-a-block", 3 * block - sector_bytes),
                ("short-of-a-chunk", chunk - sector_bytes),
                ("past-a-chunk", chunk + sector_bytes),
                ("64-tib", 64 << 40),
            ];
            for (what, size) in sizes {
                let name = format!("blocks-{}-mib-sectors-{sector}-{what}", block_size >> 20);
                let config = geometry(block_size, sector, size);
                all.push(Scenario { name, config, body: Body::Short, seeds: 2 });
            }
        }
    }
    all
}

fn geometry(block_size: u32, sector: u32, size: u64) -> Config {
    let last = (size - 1) / u64::from(block_size);
    let ratio = (u64::from(sector) << 23) / u64::from(block_size);
    let mut blocks = vec![0, 1, ratio - 1, ratio, ratio + 1, last - last.min(1), last];
    blocks.retain(|&block| block <= last);
    blocks.sort_unstable();
    blocks.dedup();
    let image = NewImage {
        virtual_size: size,
        fixed: false,
        block_size,
        log_length: SMALL_LOG,
        logical_sector_size: sector,
        physical_sector_size: 4096,
        initial_state: InitialState::NotPresent,
        parent: None,
    };
    // To open a BAT of half a GiB takes a hundred times as long.
    let requests = if size == 64 << 40 { 8 } else { 60 };
    Config { image, blocks, requests, width: 2, ..tiny() }
}

/// What a run found and exercised.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Distinct images recovered.
    pub distinct: u64,
    pub marks: Marks,
    /// Operations of the disk and decisions of the schedule, as one number.
    pub trace: u64,
    /// Of the threads that did it.
    pub busy: Duration,
    pub runs: u64,
    /// Distinct images and time per scenario.
    pub scenarios: BTreeMap<String, (u64, Duration)>,
}

impl Report {
    fn add(&mut self, other: &Self) {
        self.distinct += other.distinct;
        self.marks.merge(&other.marks);
        self.trace ^= other.trace;
        self.busy += other.busy;
        self.runs += other.runs;
        for (name, (distinct, busy)) in &other.scenarios {
            let sum = self.scenarios.entry(name.clone()).or_default();
            *sum = (sum.0 + distinct, sum.1 + *busy);
        }
    }

    /// Distinct images recovered and judged per second of one core.
    pub fn speed(&self) -> f64 {
        let whole = u32::try_from(self.distinct).map_or(f64::MAX, f64::from);
        whole / self.busy.as_secs_f64().max(1e-6)
    }
}

/// Runs one seed, with at most so many requests per life.
///
/// # Panics
/// With a violation if a promise is broken.
pub fn run(scenario: &Scenario, seed: u64, requests: usize, effort: Effort) -> Report {
    let _logs = ShortLogs::new(scenario.config.descriptors);
    let started = thread_time();
    let mut report = match scenario.body {
        Body::Swarm => swarm(scenario, seed, requests, effort, LIVES),
        Body::Short => swarm(scenario, seed, requests, effort, 1),
        Body::Sequences(length) => all_sequences(scenario, seed, length, effort),
    };
    report.busy = thread_time().saturating_sub(started);
    report.runs = 1;
    report.scenarios.insert(scenario.name.clone(), (report.distinct, report.busy));
    report
}

fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every Linux has this clock").into()
}

fn swarm(scenario: &Scenario, seed: u64, requests: usize, effort: Effort, lives: usize) -> Report {
    let mut rng = Rng::with_seed(scenario.seed(seed));
    let mut config = scenario.config.clone();
    config.requests = config.requests.min(requests);
    config.fronts = rng.usize(1..=config.fronts + 1);
    // Some kinds of request are rare in some runs, or missing; plain writes never are.
    for weight in &mut config.weights[1..] {
        *weight = if rng.u32(..5) == 0 { 0 } else { rng.u32(..=2 * *weight) };
    }
    config.faults.slow_syncs = rng.bool();
    let mut content = new_image(&config, &mut rng);
    let (mut oracle, mut judge, mut report) = (config.oracle(), None, Report::default());
    for life in 0..lives {
        let mut world = World::open(config.clone(), content, oracle, rng.fork());
        let watcher: Judge = judge.take().unwrap_or_else(|| world.new_judge(effort));
        world.watch(watcher);
        let last_step = if life + 1 == lives { usize::MAX } else { rng.usize(50..4000) };
        let mut steps = 0;
        while steps < last_step && world.step() {
            steps += 1;
        }
        if life + 1 == lives && !world.is_broken() {
            world.close();
            if !world.is_broken() {
                world.rot();
            }
        }
        (content, oracle) = world.cut(1).expect("one cut was made");
        judge = world.unwatch();
        report.trace = report.trace.rotate_left(3) ^ world.trace();
        world.finish();
        report.marks.merge(&world.marks);
    }
    let judge = judge.expect("the last life was watched");
    report.distinct = judge.distinct();
    report.marks.merge(&judge.marks);
    report
}

/// What a sequence starts from: how many blocks are there, how many commits the ring has seen, and whether
/// one of the blocks was taken away again.
const PRELUDES: [(u64, usize, bool); 4] = [(0, 0, false), (2, 1, false), (2, 6, false), (3, 2, true)];

/// The operations of a sequence.
const OPERATIONS: usize = 14;

/// One per first operation and prelude.
const SEQUENCE_SEEDS: u64 = (PRELUDES.len() * OPERATIONS) as u64;

fn all_sequences(scenario: &Scenario, seed: u64, length: usize, effort: Effort) -> Report {
    let seed = usize::try_from(seed % SEQUENCE_SEEDS).expect("small");
    let (first, prelude) = (seed % OPERATIONS, seed / OPERATIONS);
    let mut rng = Rng::with_seed(scenario.seed(prelude as u64));
    let content = new_image(&scenario.config, &mut rng);
    let (mut judge, mut report, mut choices) = (None, Report::default(), Choices::exhaustive());
    loop {
        let oracle = scenario.config.oracle();
        let mut world = World::open(scenario.config.clone(), content.clone(), oracle, rng.clone());
        enter(&mut world, PRELUDES[prelude]);
        let watcher: Judge = judge.take().unwrap_or_else(|| world.new_judge(effort));
        world.watch(watcher);
        let together = choices.pick(2) == 1;
        for place in 0..length {
            let operation = if place == 0 { first } else { choices.pick(OPERATIONS) };
            world = operate(world, operation, &scenario.config, &mut rng.clone());
            if !together {
                world.drain();
            }
        }
        world.drain();
        world.request(Op::Flush, 0, 0);
        world.drain();
        world.close();
        judge = world.unwatch();
        report.trace = report.trace.rotate_left(3) ^ world.trace();
        world.finish();
        report.marks.merge(&world.marks);
        report.marks.hit("sequences of operations");
        if !choices.advance() {
            break;
        }
    }
    let judge = judge.expect("every sequence was watched");
    report.distinct = judge.distinct();
    report.marks.merge(&judge.marks);
    report
}

fn enter(world: &mut World, (blocks, commits, taken_away): (u64, usize, bool)) {
    let block = u64::from(world.config.image.block_size);
    let mut ask = |op, offset, length| {
        world.request(op, offset, length);
        world.drain();
    };
    for number in 0..blocks {
        ask(Op::Write { durable: false }, number * block, 4096);
    }
    for _ in 0..commits {
        ask(Op::Flush, 0, 0);
        ask(Op::Discard, 0, block);
        ask(Op::Flush, 0, 0);
        ask(Op::Write { durable: false }, 0, 512);
    }
    ask(Op::Flush, 0, 0);
    if taken_away {
        ask(Op::Discard, block, block);
        ask(Op::Flush, 0, 0);
    }
}

/// Starts one operation; a close opens the image again.
fn operate(mut world: World, operation: usize, config: &Config, rng: &mut Rng) -> World {
    let block = u64::from(config.image.block_size);
    let write = |durable| Op::Write { durable };
    let zero = |keep_space| Op::WriteZeroes { keep_space };
    let (op, offset, length) = match operation {
        0 => (write(false), 0, block),
        1 => (write(false), 0, 512),
        2 => (write(false), block / 2, 512),
        3 => (write(false), block - 512, 512),
        4 => (write(false), block - 1024, 2048),
        5 => (write(false), 2 * block, 512),
        6 => (write(true), 0, 512),
        7 => (write(true), 2 * block - 1024, 2048),
        8 => (Op::Flush, 0, 0),
        9 => (Op::Discard, 0, block),
        10 => (Op::Discard, block, block / 2),
        11 => (zero(false), 0, 2 * block),
        12 => (zero(true), block / 2, block),
        _ => return reopen(world, config, rng),
    };
    let request = Request { op, offset, length };
    if world.overlaps(&request) {
        world.drain();
    }
    world.request(op, offset, length);
    world
}

fn reopen(mut world: World, config: &Config, rng: &mut Rng) -> World {
    world.drain();
    let content: Store = world.close();
    let judge = world.unwatch();
    let oracle: Oracle = world.oracle.clone();
    let mut next = World::open(config.clone(), content, oracle, rng.fork());
    next.marks.merge(&world.marks);
    if let Some(judge) = judge {
        next.watch(judge);
    }
    next
}

/// Which runs have ended.
#[derive(Default)]
pub struct Ledger {
    /// Every run below this number has ended.
    pub done: u64,
    /// Distinct images of the runs below it that this campaign has made.
    pub distinct: u64,
    /// Of runs that ended before an earlier one did.
    ahead: BTreeMap<u64, u64>,
    /// Sum of all runs.
    pub total: Report,
}

impl Ledger {
    fn enter(&mut self, number: u64, report: &Report) {
        self.total.add(report);
        self.ahead.insert(number, report.distinct);
        while let Some(distinct) = self.ahead.remove(&self.done) {
            self.done += 1;
            self.distinct += distinct;
        }
    }
}

/// How much of everything.
#[derive(Clone, Debug)]
pub struct Campaign {
    pub scenarios: Vec<Scenario>,
    pub effort: Effort,
    /// The first seed of each scenario.
    pub seed: u64,
    /// Ends when so many distinct images were recovered; without, when every scenario has had its seeds.
    pub images: Option<u64>,
    /// Ends after so long in any case.
    pub at_most: Option<Duration>,
    /// Runs that an earlier campaign has done already.
    pub done: u64,
}

impl Campaign {
    /// A test run: every scenario with its seeds.
    pub fn test() -> Self {
        let scenarios = scenarios();
        Self { scenarios, effort: Effort::TEST, seed: 0, images: None, at_most: None, done: 0 }
    }

    /// Runs it on all cores; `progress` is called whenever a run has ended.
    ///
    /// # Panics
    /// If a promise is broken, with the command that repeats it.
    pub fn run(&self, progress: impl Fn(&Ledger) + Sync) -> Report {
        let next = AtomicU64::new(self.done);
        let failed = Mutex::new(None);
        let ledger = Mutex::new(Ledger { done: self.done, ..Ledger::default() });
        let started = Instant::now();
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        std::thread::scope(|scope| {
            for _ in 0..cores {
                scope.spawn(|| {
                    while failed.lock().expect("no panic holds it").is_none()
                        && !self.is_over(&ledger.lock().expect("no panic holds it").total, started)
                    {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        let Some((scenario, seed)) = self.item(number) else { break };
                        match attempt(scenario, seed, scenario.config.requests, self.effort) {
                            Ok(report) => {
                                let mut ledger = ledger.lock().expect("no panic holds it");
                                ledger.enter(number, &report);
                                progress(&ledger);
                            }
                            Err(why) => {
                                let story = tell(scenario, seed, self.effort, &why);
                                failed.lock().expect("no panic holds it").get_or_insert(story);
                            }
                        }
                    }
                });
            }
        });
        if let Some(story) = failed.into_inner().expect("no panic holds it") {
            panic!("{story}");
        }
        ledger.into_inner().expect("no panic holds it").total
    }

    fn is_over(&self, total: &Report, started: Instant) -> bool {
        self.images.is_some_and(|images| total.distinct >= images)
            || self.at_most.is_some_and(|at_most| started.elapsed() >= at_most)
    }

    /// Run number `number`: a scenario and its seed; the scenarios take turns.
    fn item(&self, number: u64) -> Option<(&Scenario, u64)> {
        let count = self.scenarios.len() as u64;
        if self.images.is_some() || self.at_most.is_some() {
            let place = usize::try_from(number % count).expect("few scenarios");
            return Some((&self.scenarios[place], self.seed + number / count));
        }
        let mut left = number;
        for scenario in &self.scenarios {
            if left < scenario.seeds {
                return Some((scenario, self.seed + left));
            }
            left -= scenario.seeds;
        }
        None
    }
}

/// Runs one seed; the error says which promise was broken.
pub fn attempt(scenario: &Scenario, seed: u64, requests: usize, effort: Effort) -> Result<Report, String> {
    let outcome = catch_unwind(AssertUnwindSafe(|| run(scenario, seed, requests, effort)));
    outcome.map_err(|panic| message(&*panic).to_owned())
}

/// What failed, made as small as it still fails, and the command that repeats it.
fn tell(scenario: &Scenario, seed: u64, effort: Effort, why: &str) -> String {
    let (mut requests, mut why) = (scenario.config.requests, why.to_owned());
    let mut step = requests / 2;
    while step > 0 {
        match attempt(scenario, seed, requests - step, effort) {
            Err(smaller) => (requests, why) = (requests - step, smaller),
            Ok(_) => step /= 2,
        }
        step = step.min(requests / 2);
    }
    let depth = if effort == Effort::TEST { String::new() } else { format!("VHDX_DEPTH={} ", effort.depth) };
    format!(
        "{why}\n\nscenario {name}, seed {seed}, {requests} requests per life; to repeat:\n  \
         VHDX_SCENARIO={name} VHDX_SEED={seed} VHDX_REQUESTS={requests} {depth}cargo test --locked \
         --features simulation --test simulator crash::one_seed -- --nocapture\n",
        name = scenario.name
    )
}
