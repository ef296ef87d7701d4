//! Promises defended here: whatever is killed when, and in whatever order commands run, a device that was
//! killed is served again, what was acknowledged is read, and one that was removed has left nothing.
//!
//! The processes are those of the program, on a machine that the test makes: see
//! [`testing`](vhdx_ublk::design::testing). Repeat one run: `VHDX_UBLK_SEED=N cargo test --features
//! simulation --test device -- NAME --nocapture`.
//!
//! The runs with `--ignored` take one to three minutes each: `whatever_is_killed_when` kills at every step of
//! a device's life, `whatever_is_killed_while_a_device_is_removed` in `del` after another kill,
//! `whatever_is_killed_while_a_chain_grows` in snapshots and resizes, `whatever_is_killed_in_a_merge` in
//! merges, `whatever_is_killed_while_the_program_is_exchanged` in upgrades,
//! `whatever_is_killed_with_requests_in_flight` at the steps of requests. `whatever_happens_at_once` has
//! commands run side by side, kills, and a driver that fails. Of all but the first the seed may be chosen.

#![cfg(feature = "simulation")]
#![allow(
    clippy::maybe_infinite_iter,
    clippy::case_sensitive_file_extension_comparisons,
    clippy::cast_possible_truncation,
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

use life::{Command, Deed, Life, Reached, Shape};
use machine::Blow;
use vhdx_ublk::simulation::Plant;

use Command::{Add, Del, DelByForce, Grow, List, Merge, Recover, Snapshot, Upgrade};
use Deed::{Close, Kill, OpenDisk, OpenServers, Run, Terminate, Use};

/// One life: `deeds` one after the other, the process at its step of that number struck by a `blow`.
fn live(
    seed: u64,
    deeds: &[Deed],
    blow: Option<(usize, Blow)>,
    plant: Option<Plant>,
) -> Result<Reached, String> {
    live_in((seed, Shape::SMALL), deeds, blow, plant)
}

/// The same with a device of this shape.
fn live_in(
    (seed, shape): (u64, Shape),
    deeds: &[Deed],
    blow: Option<(usize, Blow)>,
    plant: Option<Plant>,
) -> Result<Reached, String> {
    let mut life = Life::new(seed, shape, plant);
    let begin = life.machine.asks;
    life.machine.blow = blow.map(|(step, blow)| (begin + step, blow));
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
        if *deed == Run(Recover) && life.machine.blow.is_none_or(|(step, _)| life.machine.asks < step) {
            life.has_worked(number);
        }
    }
    life.administrate();
    life.end()
}

/// A life in which a process is killed at a step while requests are with the daemon, whose threads take
/// turns.
fn live_in_flight(seed: u64, kill_at: usize, plant: Option<Plant>) -> Result<Reached, String> {
    let mut life = Life::new(seed, Shape::in_flight(seed), plant);
    life.act(Run(Add));
    life.machine.settle();
    life.machine.blow = Some((life.machine.asks + kill_at, Blow::Kill));
    for _ in 0..2 {
        life.act(Use);
        let steps = life.machine.choose(30);
        life.steps(steps);
    }
    life.machine.settle();
    for deed in [Use, Run(Recover), Use] {
        life.act(deed);
        let steps = life.machine.choose(20);
        life.steps(steps);
    }
    life.administrate();
    life.end()
}

/// A life in which a daemon is asked to end when its device is gone and another one has the number.
fn live_with_a_late_request(seed: u64, plant: Option<Plant>) -> Result<Reached, String> {
    let mut life = Life::new(seed, Shape::SMALL, plant);
    life.act(Run(Add));
    life.machine.settle();
    let daemon = life.machine.server().expect("it is served");
    life.machine.held = Some((daemon, "locks a file of the registry"));
    life.act(Run(Del));
    while !life.machine.is_held() && life.machine.broken.is_none() {
        life.machine.step();
    }
    let next = life.add_another();
    while !life.machine.is_gone(next) && life.machine.broken.is_none() {
        life.machine.step();
    }
    life.machine.terminate(daemon);
    life.machine.held = None;
    life.machine.settle();
    life.each_note_has_its_device();
    life.has_worked(next);
    life.administrate();
    life.end()
}

/// A life in which `del` is killed when the device is gone and the image not closed, and then another image
/// is added.
fn live_beside_an_interrupted_del(seed: u64, plant: Option<Plant>) -> Result<Reached, String> {
    let mut life = Life::new(seed, Shape::SMALL, plant);
    life.works(Add);
    life.act(Use);
    life.machine.settle();
    life.act(Kill);
    let del = life.start(Del);
    while !life.machine.driver.devices.is_empty() && life.machine.broken.is_none() {
        life.machine.step();
    }
    life.machine.kill(del);
    life.machine.settle();
    let next = life.add_another();
    life.machine.settle();
    life.has_worked(next);
    life.remove_another();
    life.administrate();
    life.end()
}

/// A life in which the program is exchanged while `del` is on its way with the entry of the daemon before.
fn live_with_an_old_entry(seed: u64, plant: Option<Plant>) -> Result<Reached, String> {
    let mut life = Life::new(seed, Shape::SMALL, plant);
    life.works(Add);
    life.act(Use);
    life.machine.settle();
    let del = life.start(Del);
    life.machine.held = Some((del, "is about to stop a device"));
    while !life.machine.is_held() && life.machine.broken.is_none() {
        life.machine.step();
    }
    life.works(Upgrade);
    life.act(Use);
    life.machine.settle();
    life.machine.held = None;
    while !life.machine.is_gone(del) && life.machine.broken.is_none() {
        life.machine.step();
    }
    life.has_worked(del);
    life.nothing_is_left();
    life.machine.settle();
    life.administrate();
    life.end()
}

/// A life in which the driver is slow, and its commands are interrupted: all commands work.
fn live_with_delays(seed: u64, plant: Option<Plant>) -> Result<Reached, String> {
    let mut life = Life::new(seed, Shape::SMALL, plant);
    (life.machine.faults, life.machine.harmless) = (4, true);
    for command in [Add, List, Upgrade, Snapshot, Recover, Del] {
        if command == Recover {
            life.act(Kill);
        }
        life.works(command);
        life.act(Use);
    }
    life.administrate();
    life.end()
}

/// A life in which others have the disk open, and what its server has open.
fn live_with_openers(seed: u64, plant: Option<Plant>) -> Result<Reached, String> {
    // Only a new driver refuses to stop a disk that is open.
    let mut life = Life::new(3 * seed + 1, Shape::SMALL, plant);
    life.works(Add);
    life.act(OpenDisk);
    life.act(Use);
    life.is_refused(Del);
    life.act(Close);
    life.act(OpenServers);
    life.act(Use);
    life.act(Kill);
    let number = life.start(Recover);
    let steps = 20 + life.machine.choose(40);
    life.steps(steps);
    life.act(Close);
    life.machine.settle();
    life.has_worked(number);
    life.act(Use);
    life.works(Del);
    life.administrate();
    life.end()
}

/// A life in which a daemon is asked to end while others have the disk open.
fn live_asked_to_end_in_use(seed: u64, plant: Option<Plant>) -> Result<Reached, String> {
    // Only a new driver refuses to stop a disk that is open.
    let mut life = Life::new(3 * seed + 1, Shape::SMALL, plant);
    life.works(Add);
    life.act(Use);
    let daemon = life.machine.server().expect("it is served");
    life.act(OpenDisk);
    // What the kernel says to the daemon's first attempt to stop the device.
    life.machine.refusal = [None, Some(libc::EIO), Some(libc::ENOMEM)][(seed % 3) as usize];
    life.act(Terminate);
    life.machine.settle();
    life.is_served();
    life.act(Use);
    life.machine.settle();
    life.act(Close);
    life.ends_by_itself(daemon);
    life.nothing_is_left();
    life.administrate();
    life.end()
}

/// A life in which a process is killed at a step while a layer is merged, and the merge is repeated.
fn live_merging(seed: u64, kill_at: usize, plant: Option<Plant>) -> Result<Reached, String> {
    let mut life = Life::new(seed, Shape::SMALL, plant);
    for command in [Add, Snapshot, Snapshot] {
        life.works(command);
        life.act(Use);
        life.machine.settle();
    }
    life.machine.blow = Some((life.machine.asks + kill_at, Blow::Kill));
    life.act(Run(Merge));
    life.act(Use);
    life.machine.settle();
    life.machine.blow = None;
    // There is nothing to recover if it was the command that was killed.
    life.act(Run(Recover));
    life.machine.settle();
    life.merge_again();
    life.act(Use);
    life.machine.settle();
    life.administrate();
    life.end()
}

/// A life in which commands run at once, processes are killed, and the driver fails.
fn live_wildly(seed: u64, plant: Option<Plant>) -> Result<Reached, String> {
    let shape = if seed.is_multiple_of(4) { Shape::in_flight(seed / 4) } else { Shape::SMALL };
    let mut life = Life::new(seed, shape, plant);
    life.machine.faults = if life.machine.choose(2) == 0 { 0 } else { 60 };
    let deeds = 3 + life.machine.choose(5);
    for at in 0..deeds {
        let commands =
            [Add, Add, Del, DelByForce, Recover, Recover, Upgrade, List, Snapshot, Snapshot, Grow, Merge];
        let deed = match life.machine.choose(18) {
            _ if at == 0 => Run(Add),
            0..8 => Run(commands[life.machine.choose(commands.len())]),
            8..12 => Use,
            12 | 13 => Kill,
            14 => Terminate,
            15 => [OpenDisk, OpenServers][life.machine.choose(2)],
            16 => Close,
            _ => {
                let blow = if life.machine.choose(3) == 0 { Blow::Terminate } else { Blow::Kill };
                life.machine.blow = Some((life.machine.asks + 1 + life.machine.choose(30), blow));
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

/// The lives of `seeds`, several at once. What they have reached, together.
fn live_all(seeds: Range<u64>, life: impl Fn(u64) -> Result<Reached, String> + Sync) -> Reached {
    let all = Mutex::new(Reached::default());
    let broken = find(seeds, |seed| match life(seed) {
        Ok(reached) => {
            all.lock().expect("no panic").add(&reached);
            None
        }
        Err(story) => Some((seed, story)),
    });
    if let Some((seed, story)) = broken {
        panic!("seed {seed}: {story}");
    }
    all.into_inner().expect("no panic")
}

/// What `look` finds first in `range`, by several threads.
fn find<T: Send>(range: Range<u64>, look: impl Fn(u64) -> Option<T> + Sync) -> Option<T> {
    let (next, found) = (AtomicU64::new(range.start), Mutex::new(None));
    // They wait for processes most of the time.
    let threads = 4 * std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= range.end || found.lock().expect("no panic").is_some() {
                        return;
                    }
                    if let Some(it) = look(number) {
                        found.lock().expect("no panic").get_or_insert(it);
                    }
                }
            });
        }
    });
    found.into_inner().expect("no panic")
}

/// `usual`, or the one that was asked for.
fn seeds(usual: Range<u64>) -> Range<u64> {
    let asked = std::env::var("VHDX_UBLK_SEED").ok().map(|seed| seed.parse().expect("a number"));
    asked.map_or(usual, |seed: u64| seed..seed + 1)
}

/// How often the steps are tried at which a kill shows a planted bug.
const ATTEMPTS: u64 = 20;

const WHOLE: [Deed; 7] = [Run(Add), Use, Run(List), Kill, Run(Recover), Use, Run(Del)];

/// The first of so many steps, and every so-many-th after it, is one at which a process is killed.
fn kill_at_each(first: u64, stride: u64, steps: u64) -> Reached {
    live_all(0..steps / stride, |at| {
        let step = first + at * stride;
        live(7 + step % 5, &WHOLE, Some((step as usize, Blow::Kill)), None)
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

/// A few kills at steps of requests; the long run takes every step.
#[test]
fn requests_that_a_daemon_has_when_it_is_killed_are_repeated_or_fail_as_it_was_added() {
    let reached = live_all(seeds(0..8), |seed| live_in_flight(seed, 3 + 7 * seed as usize, None));
    println!("{reached:?}");
    assert!(reached.repeated > 2 && reached.failed > 0 && reached.killed > 4, "{reached:?}");
}

/// What is done while a chain grows, and so does its disk.
const CHAIN: [Deed; 9] =
    [Run(Add), Use, Run(Snapshot), Use, Run(Grow), Use, Run(Snapshot), Kill, Run(Recover)];

/// A few kills in a snapshot, and while the disk grows; the long run takes every step.
#[test]
fn a_chain_is_whole_whatever_is_killed_while_a_snapshot_is_taken_or_the_disk_grows() {
    let reached =
        live_all(seeds(0..12), |seed| live(seed, &CHAIN, Some((24 + 6 * seed as usize, Blow::Kill)), None));
    println!("{reached:?}");
    assert!(reached.snapshots > 6 && reached.grown > 2 && reached.killed > 8, "{reached:?}");
}

#[test]
#[ignore = "it takes minutes"]
fn whatever_is_killed_while_a_chain_grows() {
    println!(
        "{:?}",
        live_all(seeds(0..400), |seed| {
            let blow = Some((20 + (seed / 3) as usize, Blow::Kill));
            let shape = if seed.is_multiple_of(2) { Shape::in_flight(seed) } else { Shape::SMALL };
            live_in((seed, shape), &CHAIN, blow, None)
        })
    );
}

/// A few kills in a merge; the long run takes every step.
#[test]
fn a_merge_that_was_killed_is_completed_by_the_next_one() {
    let reached = live_all(seeds(0..8), |seed| live_merging(seed, 2 + 3 * seed as usize, None));
    println!("{reached:?}");
    assert!(reached.killed > 4 && reached.merged > 2, "{reached:?}");
}

#[test]
#[ignore = "it takes minutes"]
fn whatever_is_killed_in_a_merge() {
    println!("{:?}", live_all(seeds(0..200), |seed| live_merging(seed, 1 + (seed / 4) as usize, None)));
}

/// What is done while the program is exchanged.
const UPGRADES: [Deed; 8] = [Run(Add), Use, Run(Upgrade), Use, Run(Snapshot), Use, Run(Upgrade), Use];

#[test]
#[ignore = "it takes minutes"]
fn whatever_is_killed_while_the_program_is_exchanged() {
    println!(
        "{:?}",
        live_all(seeds(0..400), |seed| {
            let blow = Some((20 + (seed / 2) as usize, Blow::Kill));
            live_in((seed, Shape::in_flight(seed)), &UPGRADES, blow, None)
        })
    );
}

#[test]
#[ignore = "it takes minutes"]
fn whatever_is_killed_with_requests_in_flight() {
    println!("{:?}", live_all(seeds(0..400), |seed| live_in_flight(seed, 1 + (seed / 4) as usize, None)));
}

#[test]
#[ignore = "it takes minutes"]
fn whatever_happens_at_once() {
    println!("{:?}", live_all(seeds(0..400), |seed| live_wildly(seed, None)));
}

#[test]
fn what_a_daemon_is_asked_is_not_asked_of_the_next_device_with_its_number() {
    println!("{:?}", live_all(seeds(1..3), |seed| live_with_a_late_request(seed, None)));
}

/// What is done to a device whose daemon was killed.
const REMOVED: [Deed; 4] = [Run(Add), Use, Kill, Run(Del)];

/// A few kills of `del`, which an administrator runs again; the long run takes every step.
#[test]
fn a_del_that_was_killed_is_completed_by_the_next_one() {
    let reached =
        live_all(seeds(0..8), |seed| live(seed, &REMOVED, Some((40 + 4 * seed as usize, Blow::Kill)), None));
    println!("{reached:?}");
    assert!(reached.killed > 10, "{reached:?}");
}

#[test]
#[ignore = "it takes minutes"]
fn whatever_is_killed_while_a_device_is_removed() {
    println!(
        "{:?}",
        live_all(seeds(0..300), |seed| {
            live(seed, &REMOVED, Some((24 + (seed / 5) as usize, Blow::Kill)), None)
        })
    );
}

#[test]
fn another_device_takes_no_number_by_which_an_image_is_still_to_be_closed() {
    println!("{:?}", live_all(seeds(0..3), |seed| live_beside_an_interrupted_del(seed, None)));
}

#[test]
fn del_ends_when_the_image_is_closed_whichever_daemon_serves_it() {
    println!("{:?}", live_all(seeds(0..6), |seed| live_with_an_old_entry(seed, None)));
}

#[test]
fn commands_work_with_a_driver_that_is_slow_or_interrupted() {
    println!("{:?}", live_all(seeds(0..6), |seed| live_with_delays(seed, None)));
}

#[test]
fn a_disk_that_is_open_is_not_removed_and_one_whose_server_is_watched_is_served_again() {
    println!("{:?}", live_all(seeds(0..4), |seed| live_with_openers(seed, None)));
}

#[test]
fn a_daemon_that_is_asked_to_end_serves_a_disk_as_long_as_it_is_open() {
    println!("{:?}", live_all(seeds(0..3), |seed| live_asked_to_end_in_use(seed, None)));
}

type PlantedLife = fn(u64, usize, Plant) -> Result<Reached, String>;

/// A life with a planted bug.
struct Planted {
    plant: Plant,
    /// With a seed, and the number of a step.
    life: PlantedLife,
    /// At one of which it shows.
    steps: Range<usize>,
    /// What breaks.
    rule: &'static str,
}

/// Each planted bug, and where it shows.
fn planted() -> [Planted; 15] {
    let killed: PlantedLife = |seed, step, plant| {
        live(seed, &[Run(Add), Use, Use, Run(Del)], Some((step, Blow::Kill)), Some(plant))
    };
    let chain: PlantedLife = |seed, step, plant| live(seed, &CHAIN, Some((step, Blow::Kill)), Some(plant));
    let removed: PlantedLife =
        |seed, step, plant| live(seed, &REMOVED, Some((step, Blow::Kill)), Some(plant));
    let another: PlantedLife = |seed, _, plant| live_beside_an_interrupted_del(seed, Some(plant));
    let old: PlantedLife = |seed, _, plant| live_with_an_old_entry(seed, Some(plant));
    let late: PlantedLife = |seed, _, plant| live_with_a_late_request(seed, Some(plant));
    let flight: PlantedLife = |seed, step, plant| live_in_flight(seed, step, Some(plant));
    let delays: PlantedLife = |seed, _, plant| live_with_delays(seed, Some(plant));
    let merging: PlantedLife = |seed, step, plant| live_merging(seed, step, Some(plant));
    let openers: PlantedLife = |seed, _, plant| live_with_openers(seed, Some(plant));
    let asked: PlantedLife = |seed, _, plant| live_asked_to_end_in_use(seed, Some(plant));
    let it = |plant, life, steps, rule| Planted { plant, life, steps, rule };
    [
        it(Plant::SessionFirst, killed, 38..48, "acknowledged was"),
        it(Plant::EntryFirst, killed, 38..48, "devices without an entry"),
        it(Plant::SecondName, killed, 5..12, ".session.next"),
        it(Plant::NoteToTheEnd, late, 0..1, "noted of no device"),
        it(Plant::FailInFlight, flight, 5..25, "requests do not reissue"),
        it(Plant::EarlyCompletion, flight, 5..25, "acknowledged was"),
        it(Plant::ForgetSwitch, chain, 40..60, "there is no session file"),
        it(Plant::SkipCatchUp, chain, 40..70, "the kernel knows of"),
        it(Plant::ForgetMerge, merging, 5..40, "`merge"),
        it(Plant::GiveUpInterrupted, delays, 0..1, "Interrupted system call"),
        it(Plant::StopUsed, openers, 0..1, "Del is not refused"),
        it(Plant::EndUsed, asked, 0..1, "a disk that is open is not served"),
        it(Plant::TrustGone, removed, 40..70, ".session\"]"),
        it(Plant::ReuseNumber, another, 0..1, ".session\"]"),
        it(Plant::TrustOldEntry, old, 0..1, "is left: "),
    ]
}

#[test]
fn each_planted_bug_of_devices_is_caught() {
    for Planted { plant, life, steps, rule } in planted() {
        let began = std::time::Instant::now();
        // A seed fixes the order of the steps, and not how far a process has come when it is killed.
        let attempts = 0..ATTEMPTS * steps.len() as u64;
        let caught = find(attempts, |attempt| {
            let step = steps.start + attempt as usize % steps.len();
            let story = life(attempt, step, plant).err()?;
            story.contains(rule).then_some((attempt, step))
        });
        let (seed, step) = caught.unwrap_or_else(|| panic!("{plant:?} is not caught"));
        println!("{plant:?}: caught with seed {seed} at step {step}, {:?}", began.elapsed());
    }
    assert_eq!(planted().map(|it| it.plant), Plant::OF_DEVICES);
}
