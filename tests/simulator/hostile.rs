//! Promise defended here: no input, however hostile, makes the program panic, hang, or use memory beyond a
//! stated bound; and an image that opens for writing is served by the same contract as any other.
//!
//! A fuzzer in one process, without an outside tool, and a target for each way in (`fuzz::target`).
//! `VHDX_FUZZ_SECONDS` says how long all of them together look, `VHDX_FUZZ_SEED` where they start;
//! `tools/fuzz` runs them with the compiler's edge counters.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::fuzz::hunt::Hunt;
use crate::fuzz::target::{Case, TARGETS, Target, named};

/// Seconds of looking by default.
const SECONDS: u64 = 8;

/// Trials at least of each target, on a machine however slow.
const TRIALS: u64 = 300;

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// Runs one target for its share of the time.
fn hunt(target: &'static Target, share: u32) {
    let seed = setting("VHDX_FUZZ_SEED").unwrap_or(1);
    let time = Duration::from_secs(setting("VHDX_FUZZ_SECONDS").unwrap_or(SECONDS)) / share;
    let mut hunt = Hunt::new(target, seed);
    hunt.run(Instant::now() + time, TRIALS);
    print!("seed {seed}: ");
    hunt.print();
    for ending in target.endings {
        assert!(hunt.endings.contains_key(ending), "no case was {ending}: {:?}", hunt.endings);
    }
}

/// The one that `VHDX_FUZZ_TARGET` names, or all of them: one after the other, for the coverage of one trial
/// must not be another's.
#[test]
fn nothing_breaks_a_promise() {
    if let Ok(name) = std::env::var("VHDX_FUZZ_TARGET") {
        return hunt(named(&name), 1);
    }
    let share = u32::try_from(TARGETS.len()).expect("few");
    for target in &TARGETS {
        hunt(named(target.name), share);
    }
}

/// Sees a case again that broke a promise: `VHDX_FUZZ_INPUT` names its folder, `VHDX_FUZZ_OPS` is its trial's
/// seed.
#[test]
fn one_case() {
    let Ok(folder) = std::env::var("VHDX_FUZZ_INPUT") else { return };
    let target = named(&std::env::var("VHDX_FUZZ_TARGET").expect("VHDX_FUZZ_TARGET is set, too"));
    let case = Case::load(Path::new(&folder)).expect("readable");
    let outcome = (target.run)(&case, setting("VHDX_FUZZ_OPS").unwrap_or(0));
    println!("no promise broken: {:?}", outcome.ending);
}
