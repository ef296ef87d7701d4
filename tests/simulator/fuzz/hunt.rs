//! Looks for a case that breaks a promise: keeps those that went a way of their own, and makes others from
//! them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fastrand::Rng;

use super::coverage::Coverage;
use super::target::{Case, Outcome, Target};

/// The most cases that are kept to make others from.
const KEPT: usize = 4096;

/// Between reports of a long run.
const REPORT_EVERY: Duration = Duration::from_secs(60);

/// A run of one target.
pub struct Hunt {
    target: &'static Target,
    rng: Rng,
    coverage: Coverage,
    kept: Vec<Case>,
    signatures: BTreeSet<u64>,
    pub endings: BTreeMap<&'static str, u64>,
    pub trials: u64,
    peak: u64,
}

impl Hunt {
    pub fn new(target: &'static Target, seed: u64) -> Self {
        Self {
            target,
            rng: Rng::with_seed(seed),
            coverage: Coverage::new(),
            kept: Vec::new(),
            signatures: BTreeSet::new(),
            endings: BTreeMap::new(),
            trials: 0,
            peak: 0,
        }
    }

    /// Tries the good cases, then makes others until `end`, and `trials` at least.
    pub fn run(&mut self, end: Instant, trials: u64) {
        for case in (self.target.seeds)() {
            self.try_one(case);
        }
        let mut next_print = Instant::now() + REPORT_EVERY;
        while Instant::now() < end || self.trials < trials {
            self.go_on();
            if Instant::now() > next_print {
                self.print();
                next_print += REPORT_EVERY;
            }
        }
    }

    /// One trial; a case that went a new way is kept.
    fn try_one(&mut self, case: Case) {
        let seed = self.rng.u64(..);
        Coverage::start();
        let outcome = std::panic::catch_unwind(|| (self.target.run)(&case, seed));
        let Outcome { ending, signature, peak } = outcome.unwrap_or_else(|panic| {
            report(self.target, &case, seed);
            std::panic::resume_unwind(panic)
        });
        let reached = self.coverage.finish();
        self.trials += 1;
        self.peak = self.peak.max(peak);
        *self.endings.entry(ending).or_default() += 1;
        if (self.signatures.insert(signature) || reached) && self.kept.len() < KEPT {
            self.kept.push(case);
        }
    }

    /// Tries a case made from those that were kept, the newest more often.
    fn go_on(&mut self) {
        let count = self.kept.len();
        let newest = self.rng.bool();
        let parent =
            if newest { self.rng.usize(count - count.div_ceil(8)..count) } else { self.rng.usize(..count) };
        let other = self.rng.usize(..count);
        let child = self.target.offspring(&self.kept[parent], &self.kept[other], &mut self.rng);
        self.try_one(child);
    }

    pub fn print(&self) {
        let (reached, all) = self.coverage.edges();
        let edges =
            if self.coverage.counts() { format!("{reached} of {all} edges") } else { "not counted".into() };
        println!(
            "{}: {} trials: {:?}; {} ways, {} cases kept, coverage: {edges}; peak {} KiB",
            self.target.name,
            self.trials,
            self.endings,
            self.signatures.len(),
            self.kept.len(),
            self.peak >> 10
        );
    }
}

/// Saves a case that broke a promise and says how to see it again.
fn report(target: &Target, case: &Case, seed: u64) {
    let folder: PathBuf =
        Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("hostile-{}-{seed:016x}", target.name));
    match case.save(&folder) {
        Ok(()) => eprintln!(
            "see it again: VHDX_FUZZ_TARGET={} VHDX_FUZZ_INPUT={} VHDX_FUZZ_OPS={seed} cargo test \
             --test simulator hostile::one_case -- --nocapture",
            target.name,
            folder.display()
        ),
        Err(error) => eprintln!("the case could not be saved: {error}"),
    }
}
