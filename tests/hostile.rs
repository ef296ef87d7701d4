//! Promise defended here: no image, however hostile, makes the program panic, hang, or use memory beyond a
//! stated bound; and one that opens for writing is served by the same contract as any other.
//!
//! A fuzzer in one process, without an outside tool. `VHDX_FUZZ_SECONDS` says how long it looks,
//! `VHDX_FUZZ_SEED` where it starts; `tools/fuzz` runs it with the compiler's edge counters.

#[allow(dead_code, reason = "shared with tests that lay out more")]
mod craft;
mod fuzz;
#[allow(unsafe_code, reason = "a global allocator is unsafe by its trait")]
#[allow(dead_code, reason = "shared with a test that counts allocations")]
mod memory;
#[allow(dead_code, reason = "the simulator serves several tests, none of which needs all of it")]
mod sim;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fastrand::Rng;
use fuzz::coverage::Coverage;
use fuzz::trial::{self, Ending, Outcome};
use fuzz::{corpus, mutator};
use sim::store::Store;

#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;

/// Seconds of looking when nobody asks for more.
const SECONDS: u64 = 5;

/// Trials at least, on a machine however slow.
const TRIALS: u64 = 500;

/// The most images that are kept to make others from.
const KEPT: usize = 4096;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// The images that went a way of their own, and how to find more.
struct Hunt {
    rng: Rng,
    coverage: Coverage,
    kept: Vec<Store>,
    signatures: BTreeSet<u64>,
    endings: BTreeMap<Ending, u64>,
    trials: u64,
    replayed: u64,
    peak: u64,
}

impl Hunt {
    fn new(seed: u64) -> Self {
        Self {
            rng: Rng::with_seed(seed),
            coverage: Coverage::new(),
            kept: Vec::new(),
            signatures: BTreeSet::new(),
            endings: BTreeMap::new(),
            trials: 0,
            replayed: 0,
            peak: 0,
        }
    }

    /// One trial; an image that went a new way is kept.
    fn try_one(&mut self, image: Store) {
        let seed = self.rng.u64(..);
        Coverage::start();
        let outcome = std::panic::catch_unwind(|| trial::run(&image, seed));
        let Outcome { ending, replayed, signature, peak } = outcome.unwrap_or_else(|panic| {
            report(&image, seed);
            std::panic::resume_unwind(panic)
        });
        let reached = self.coverage.finish();
        self.trials += 1;
        self.replayed += u64::from(replayed);
        self.peak = self.peak.max(peak);
        *self.endings.entry(ending).or_default() += 1;
        if (self.signatures.insert(signature) || reached) && self.kept.len() < KEPT {
            self.kept.push(image);
        }
    }

    /// Tries an image made from those that were kept, the newest more often.
    fn go_on(&mut self) {
        let count = self.kept.len();
        let newest = self.rng.bool();
        let parent =
            if newest { self.rng.usize(count - count.div_ceil(8)..count) } else { self.rng.usize(..count) };
        let other = self.rng.usize(..count);
        let child = mutator::offspring(&self.kept[parent], &self.kept[other], &mut self.rng);
        self.try_one(child);
    }

    fn print(&self) {
        let (reached, all) = self.coverage.edges();
        let edges =
            if self.coverage.counts() { format!("{reached} of {all} edges") } else { "not counted".into() };
        println!(
            "{} trials: {:?}, {} with a log to replay; {} ways, {} images kept, coverage: {edges}; peak {} KiB",
            self.trials,
            self.endings,
            self.replayed,
            self.signatures.len(),
            self.kept.len(),
            self.peak >> 10
        );
    }
}

/// Saves an image that broke a promise and says how to see it again.
fn report(image: &Store, seed: u64) {
    let path: PathBuf = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("hostile-{seed:016x}.vhdx"));
    match image.save(&path) {
        Ok(()) => eprintln!(
            "see it again: VHDX_FUZZ_INPUT={} VHDX_FUZZ_OPS={seed} cargo test --test hostile one_image -- --nocapture",
            path.display()
        ),
        Err(error) => eprintln!("the image of {} bytes could not be saved: {error}", image.length),
    }
}

#[test]
fn no_image_breaks_a_promise() {
    let seed = setting("VHDX_FUZZ_SEED").unwrap_or(1);
    let end = Instant::now() + Duration::from_secs(setting("VHDX_FUZZ_SECONDS").unwrap_or(SECONDS));
    let mut hunt = Hunt::new(seed);
    for image in corpus::images() {
        hunt.try_one(image);
    }
    assert_eq!(hunt.endings.get(&Ending::Refused), None, "good images open: {:?}", hunt.endings);
    assert_eq!(hunt.endings[&Ending::ReadOnly], 1, "all but the child are written to: {:?}", hunt.endings);
    let mut next_print = Instant::now() + Duration::from_secs(60);
    while Instant::now() < end || hunt.trials < TRIALS {
        hunt.go_on();
        if Instant::now() > next_print {
            hunt.print();
            next_print += Duration::from_secs(60);
        }
    }
    print!("seed {seed}: ");
    hunt.print();
    assert!(hunt.endings.len() == 3 && hunt.replayed > 10, "too few kinds of image: {:?}", hunt.endings);
}

/// Sees an image again that broke a promise: `VHDX_FUZZ_INPUT` names it, `VHDX_FUZZ_OPS` is its trial's seed.
#[test]
fn one_image() {
    let Ok(path) = std::env::var("VHDX_FUZZ_INPUT") else { return };
    let file = std::fs::File::open(path).expect("the image is there");
    let outcome = trial::run(&Store::load(&file).expect("readable"), setting("VHDX_FUZZ_OPS").unwrap_or(0));
    println!("no promise broken: {:?}", outcome.ending);
}
