//! Promises defended here: whatever is killed when, and whenever the power is cut, an image has one writer,
//! nothing acknowledged is lost, a device that waits can be recovered, and one that was removed has left
//! nothing.
//!
//! A model of a device's life: images, `/run`, the kernel's devices and the processes that use them, each
//! step of a command an action of its own. Every order of actions within the bounds of a scenario is tried.
//! The steps stand for functions of the program; that these exist is a test of its own, that they do what
//! the model says is what the laboratory's tests are for.

mod action;
mod machine;
mod merge;
mod plant;
mod step;
mod transition;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model, Property};

use action::{Action, actions, apply};
use machine::{Budget, CHILD, Command, DEVICES, Machine, Promise, State};
use plant::{PLANTS, Plant};
use step::Step;

/// The machine, with a mistake in it or none.
struct Life {
    budget: Budget,
    plant: Plant,
}

impl Model for Life {
    type State = Machine;
    type Action = Action;

    fn init_states(&self) -> Vec<Machine> {
        vec![Machine::new(self.budget.clone())]
    }

    fn actions(&self, machine: &Machine, actions: &mut Vec<Action>) {
        if machine.broken.is_none() {
            actions.extend(self::actions(machine));
        }
    }

    fn next_state(&self, machine: &Machine, action: Action) -> Option<Machine> {
        let mut next = machine.clone();
        apply(&mut next, action, self.plant).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut promises = vec![
            Property::always("an image has one writer", |_, machine: &Machine| {
                [0, 1].iter().all(|image| {
                    let writes = |process: &&machine::Process| process.writes == Some(*image);
                    machine.processes.iter().flatten().filter(writes).count() <= 1
                })
            }),
            Property::always("what was flushed survives a power cut", |_, machine: &Machine| {
                let durable = machine.durable(machine.guest.leaf);
                durable.is_some_and(|value| machine.is_known(value, machine.guest.flushed))
            }),
            Property::always("what was acknowledged is served", |_, machine: &Machine| {
                machine.processes.iter().flatten().filter(|process| is_live(machine, process)).all(
                    |process| {
                        let served = machine.served(process.image);
                        served.is_some_and(|value| machine.is_known(value, machine.promised()))
                    },
                )
            }),
            Property::always("a session continues only what its image holds", |_, machine: &Machine| {
                machine.broken.is_none_or(|broken| !broken.contains("session"))
            }),
            Property::always("a device that was removed has left nothing", |_, machine: &Machine| {
                machine.broken.is_none_or(|broken| !broken.contains("left"))
            }),
            Property::always("a device that was killed can be recovered", |_, machine: &Machine| {
                !machine.is_at_rest()
                    || !machine.guest.wants
                    || machine.guest.meddled
                    || machine.guest.promise == Promise::Flushed
                    || (0..DEVICES).any(|number| is_recoverable(machine, number))
            }),
            Property::always("no device is without an entry", |_, machine: &Machine| {
                !machine.is_at_rest()
                    || (0..DEVICES).all(|number| {
                        machine.devices[number].as_ref().is_none_or(|device| {
                            device.state == State::Added
                                || machine.entries[number].as_ref().is_some_and(|it| it.mark == device.mark)
                        })
                    })
            }),
            Property::always("a disk is as large as its users were told", |_, machine: &Machine| {
                let disk = machine.images[machine.guest.leaf].as_ref();
                disk.is_some_and(|disk| disk.size >= machine.guest.size)
            }),
            Property::always("what was flushed outlives a failure", |_, machine: &Machine| {
                machine.broken.is_none_or(|broken| !broken.contains("failure"))
            }),
        ];
        promises.extend(reached());
        promises
    }
}

/// What must happen somewhere, or nothing is proved.
fn reached() -> [Property<Life>; 8] {
    [
        Property::sometimes("recovered", |_, machine| is_served_by(machine, Command::Recover)),
        Property::sometimes("upgraded", |_, machine| is_served_by(machine, Command::Upgrade)),
        Property::sometimes("a child is served", |_, machine: &Machine| {
            machine.processes.iter().flatten().any(|it| it.image == CHILD && is_live(machine, it))
        }),
        Property::sometimes("compacted", |_, machine: &Machine| ends(machine, Command::Compact)),
        Property::sometimes("resized", |_, machine: &Machine| ends(machine, Command::Resize)),
        Property::sometimes("grown", |_, machine: &Machine| {
            machine.processes.iter().flatten().any(|it| is_live(machine, it)) && machine.guest.size > 0
        }),
        Property::sometimes("caught up", |_, machine: &Machine| {
            machine.processes.iter().flatten().any(|it| it.step == Step::CatchesUp)
        }),
        Property::sometimes("served after a failure", |life, machine: &Machine| {
            let has_failed = machine.left.failures < life.budget.failures;
            has_failed
                && machine.guest.promise == Promise::Acknowledged
                && is_served_by(machine, Command::Add)
        }),
    ]
}

/// Whether the process serves a device to which requests flow.
fn is_live(machine: &Machine, process: &machine::Process) -> bool {
    let device = machine.devices[process.device].as_ref();
    process.step == Step::Serves
        && !process.dying
        && device.is_some_and(|device| device.state == State::Live && device.mark == process.mark)
}

fn is_served_by(machine: &Machine, command: Command) -> bool {
    machine.processes.iter().flatten().any(|it| it.command == command && is_live(machine, it))
}

/// Whether such a command has changed an image at rest.
fn ends(machine: &Machine, command: Command) -> bool {
    machine.processes.iter().flatten().any(|it| it.command == command && it.step == Step::EndsLog)
}

/// Whether `recover` finds all that it needs, and serves what was acknowledged.
fn is_recoverable(machine: &Machine, number: usize) -> bool {
    let Some(entry) = &machine.entries[number] else { return false };
    let value = machine.served(entry.image);
    machine.is_abandoned(number)
        && machine.fits(entry.image)
        && value.is_some_and(|value| machine.is_known(value, machine.promised()))
}

/// What may happen in each scenario.
fn scenarios() -> [(&'static str, Budget); 9] {
    let none = Budget {
        commands: 0,
        writes: 1,
        kills: 0,
        cuts: 0,
        meddlings: 0,
        snapshots: 0,
        upgrades: 0,
        changes: 0,
        growths: 0,
        failures: 0,
    };
    [
        ("killed twice", Budget { commands: 3, kills: 2, ..none.clone() }),
        ("without power", Budget { commands: 2, writes: 2, kills: 1, cuts: 1, ..none.clone() }),
        ("written by another program", Budget { commands: 3, kills: 1, meddlings: 1, ..none.clone() }),
        ("changed at rest", Budget { commands: 3, kills: 1, changes: 1, ..none.clone() }),
        ("frozen by a snapshot", Budget { commands: 2, kills: 2, cuts: 1, snapshots: 1, ..none.clone() }),
        ("taken over by an upgrade", Budget { commands: 3, kills: 2, upgrades: 1, ..none.clone() }),
        ("on a host that fails", Budget { commands: 3, kills: 1, cuts: 1, failures: 1, ..none.clone() }),
        ("made larger", Budget { commands: 2, kills: 2, cuts: 1, growths: 1, ..none.clone() }),
        (
            "made larger on a host that fails",
            Budget { commands: 2, kills: 1, growths: 1, failures: 1, ..none },
        ),
    ]
}

/// What the scenarios must reach, or they prove nothing.
const REACHED: [&str; 8] = [
    "recovered",
    "upgraded",
    "a child is served",
    "compacted",
    "resized",
    "grown",
    "caught up",
    "served after a failure",
];

fn check(budget: &Budget, plant: Plant, end: HasDiscoveries) -> impl Checker<Life> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let life = Life { budget: budget.clone(), plant };
    life.checker().threads(threads).finish_when(end).spawn_bfs().join()
}

#[test]
fn every_order_of_actions_keeps_the_promises() {
    let mut reached = BTreeSet::new();
    for (name, budget) in scenarios() {
        let started = Instant::now();
        let checker = check(&budget, Plant::None, HasDiscoveries::AnyFailures);
        let (states, steps) = (checker.unique_state_count(), checker.state_count());
        let (depth, seconds) = (checker.max_depth(), started.elapsed().as_secs_f32());
        println!("{name}: {states} states, {steps} transitions, depth {depth}, {seconds:.1} s, {budget:?}");
        for (property, path) in checker.discoveries() {
            assert!(REACHED.contains(&property), "{name}: \"{property}\" is broken:\n{}", said(path));
            reached.insert(property);
        }
    }
    assert_eq!(reached, BTreeSet::from(REACHED));
}

#[test]
fn each_mistake_is_seen() {
    for (plant, property, scenario) in PLANTS {
        let (name, budget) = &scenarios()[scenario];
        let end = HasDiscoveries::AnyOf(BTreeSet::from([property]));
        let found = check(budget, plant, end).discovery(property);
        let path = found.unwrap_or_else(|| panic!("{name}: {plant:?} does not break \"{property}\""));
        println!("{plant:?}, {name}: \"{property}\" is broken by {} actions", path.into_actions().len());
    }
}

/// A step that stands for nothing proves nothing.
#[test]
fn every_step_names_a_function() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |file| fs::read_to_string(folder.join("tests/model").join(file)).expect("readable");
    let texts = ["step.rs", "merge.rs"].map(read);
    let lines = texts.iter().flat_map(|text| {
        let (_, steps) = text.split_once("pub enum Step {").expect("it is there");
        steps.lines().map(str::trim).take_while(|line| *line != "}")
    });
    let mut doc = "";
    for line in lines {
        if let Some(text) = line.strip_prefix("/// ") {
            doc = text;
        } else if let Some(step) = line.strip_suffix(',') {
            let mut names = doc.split('`').skip(1).step_by(2);
            let (file, function) = names.next().zip(names.next()).expect("a file and a function");
            let source = fs::read_to_string(folder.join("src").join(file));
            let source = source.unwrap_or_else(|error| panic!("{step}: src/{file}: {error}"));
            let has_it = ["(", "<"].iter().any(|next| source.contains(&format!("fn {function}{next}")));
            assert!(has_it, "{step}: src/{file} has no function {function}");
            doc = "";
        }
    }
}

fn said(path: stateright::Path<Machine, Action>) -> String {
    path.into_actions().iter().fold(String::new(), |said, action| format!("{said}  {action:?}\n"))
}
