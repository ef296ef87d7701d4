//! Promises defended here: whatever is killed when, and in whatever order commands run, a device that was
//! killed is served again, what was acknowledged is read, and one that was removed has left nothing.
//!
//! The processes are those of the program, on a machine that the test makes: see
//! [`testing`](vhdx_ublk::design::testing). Repeat one run: `VHDX_UBLK_SEED=N cargo test --features
//! simulation --test device -- NAME --nocapture`.

#![cfg(feature = "simulation")]
#![allow(
    clippy::maybe_infinite_iter,
    clippy::case_sensitive_file_extension_comparisons,
    clippy::cast_precision_loss,
    clippy::format_collect,
    clippy::format_push_string,
    reason = "names and stories are this program's own, and short"
)]

mod driver;
mod guest;
mod life;
mod machine;

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use life::{Command, Deed, Life, Reached};
use vhdx_ublk::simulation::Plant;

use Command::{Add, Del, DelByForce, List, Recover, Upgrade};
use Deed::{Kill, Run, Terminate, Use};

/// One life: `deeds` one after the other, the process at its step `kill_at` killed.
fn live(seed: u64, deeds: &[Deed], kill_at: Option<usize>, plant: Option<Plant>) -> Result<Reached, String> {
    let mut life = Life::new(seed, plant);
    let begin = life.machine.asks;
    life.machine.kill_at = kill_at.map(|step| begin + step);
    for deed in deeds {
        if life.machine.broken.is_some() {
            break;
        }
        let number = life.machine.processes.len();
        life.act(*deed);
        // What was sent is under way when the daemon is killed, and that is not noticed when it is recovered.
        if matches!(deed, Use | Kill) {
            let steps = life.machine.choose(6);
            life.steps(steps);
            continue;
        }
        life.machine.settle();
        if *deed == Run(Recover) && life.machine.kill_at.is_none_or(|step| life.machine.asks < step) {
            life.has_worked(number);
        }
    }
    life.administrate();
    life.end()
}

/// A life in which commands run at once, processes are killed, and the driver fails.
fn live_wildly(seed: u64, plant: Option<Plant>) -> Result<Reached, String> {
    let mut life = Life::new(seed, plant);
    life.machine.faults = if life.machine.choose(2) == 0 { 0 } else { 60 };
    let deeds = 3 + life.machine.choose(5);
    for at in 0..deeds {
        let commands = [Add, Add, Del, DelByForce, Recover, Recover, Upgrade, List];
        let deed = match life.machine.choose(16) {
            _ if at == 0 => Run(Add),
            0..8 => Run(commands[life.machine.choose(commands.len())]),
            8..12 => Use,
            12 | 13 => Kill,
            14 => Terminate,
            _ => {
                life.machine.kill_at = Some(life.machine.asks + 1 + life.machine.choose(30));
                Use
            }
        };
        life.act(deed);
        let steps = life.machine.choose(60);
        life.steps(steps);
    }
    life.administrate();
    life.end()
}

/// The lives of `seeds`, on all processors. What they have reached, together.
fn live_all(seeds: Range<u64>, life: impl Fn(u64) -> Result<Reached, String> + Sync) -> Reached {
    let (next, all) = (AtomicU64::new(seeds.start), Mutex::new(Reached::default()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let broken: Mutex<Vec<(u64, String)>> = Mutex::default();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || !broken.lock().expect("no panic").is_empty() {
                        return;
                    }
                    match life(seed) {
                        Ok(reached) => all.lock().expect("no panic").add(&reached),
                        Err(story) => broken.lock().expect("no panic").push((seed, story)),
                    }
                }
            });
        }
    });
    if let Some((seed, story)) = broken.into_inner().expect("no panic").first() {
        panic!("seed {seed}: {story}");
    }
    all.into_inner().expect("no panic")
}

/// `usual`, or the one that was asked for.
fn seeds(usual: Range<u64>) -> Range<u64> {
    let asked = std::env::var("VHDX_UBLK_SEED").ok().map(|seed| seed.parse().expect("a number"));
    asked.map_or(usual, |seed: u64| seed..seed + 1)
}

/// How often the steps are tried at which a kill shows a planted bug.
const ATTEMPTS: u64 = 5;

const WHOLE: [Deed; 7] = [Run(Add), Use, Run(List), Kill, Run(Recover), Use, Run(Del)];

/// The first of so many steps, and every so-many-th after it, is one at which a process is killed.
fn kill_at_each(first: u64, stride: u64, steps: u64) -> Reached {
    live_all(0..steps / stride, |at| {
        let step = first + at * stride;
        live(7 + step % 5, &WHOLE, usize::try_from(step).ok(), None)
    })
}

/// A life at a few of its steps; the long run takes every one.
#[test]
fn a_device_that_loses_a_process_at_a_step_is_served_again_and_removed() {
    let reached = kill_at_each(3, 11, 130);
    println!("{reached:?}");
    assert!(reached.killed > 10 && reached.acknowledged > 10, "{reached:?}");
}

#[test]
#[ignore = "it takes minutes"]
fn whatever_is_killed_when() {
    println!("{:?}", kill_at_each(1, 1, 200));
}

#[test]
#[ignore = "it takes minutes"]
fn whatever_happens_at_once() {
    println!("{:?}", live_all(seeds(0..200), |seed| live_wildly(seed, None)));
}

/// Each planted bug, with the seed and the steps at one of which a kill shows it.
#[test]
fn each_planted_bug_of_devices_is_caught() {
    let removed = [Run(Add), Use, Use, Run(Del)];
    let plants: [(Plant, &[Deed], Range<usize>, &str); 2] = [
        (Plant::SessionFirst, &removed, 36..70, "acknowledged was"),
        (Plant::EntryFirst, &removed, 38..70, "devices without an entry"),
    ];
    for (plant, deeds, steps, rule) in plants.clone() {
        // A seed fixes the order of the steps, and not how far a process has come when it is killed.
        let attempts = (0..ATTEMPTS).flat_map(|attempt| steps.clone().map(move |step| (attempt, step)));
        let caught = attempts.into_iter().find_map(|(attempt, step)| {
            let seed = attempt * 1000 + step as u64;
            let story = live(seed, deeds, Some(step), Some(plant)).err()?;
            story.contains(rule).then_some((seed, step))
        });
        let (seed, step) = caught.unwrap_or_else(|| panic!("{plant:?} is not caught"));
        println!("{plant:?}: caught with seed {seed}, a kill at step {step}");
    }
    assert_eq!(plants.map(|(plant, ..)| plant), Plant::OF_DEVICES);
}
