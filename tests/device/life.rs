//! A device's life on a machine: what is done to it, and what an administrator must find in the end.

use std::fs;

use libublk::sys;
use vhdx_ublk::simulation::Plant;

use crate::driver::State;
use crate::guest::Stage;
use crate::machine::Machine;

/// What the driver of Linux 7.0 has, as far as the program uses it.
const NEW: u64 = OLD
    | (sys::UBLK_F_UPDATE_SIZE
        | sys::UBLK_F_QUIESCE
        | sys::UBLK_F_SAFE_STOP_DEV
        | sys::UBLK_F_NO_AUTO_PART_SCAN) as u64;

/// The same of Linux 6.12.
const OLD: u64 = (sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE) as u64;

/// Files of the folder that are no device's.
const OF_MACHINE: [&str; 6] = ["machine", "ublk-control", "disk.vhdx", ".lock", ".upgrade", ".mount"];

/// What is done, one after the other, each once all before it is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// A command.
    Run(Command),
    /// Requests.
    Use,
    /// The daemon is killed.
    Kill,
    /// The daemon is asked to end.
    Terminate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Add,
    Del,
    DelByForce,
    Recover,
    Upgrade,
    List,
}

/// What a run has reached.
#[derive(Clone, Debug, Default)]
pub struct Reached {
    pub steps: usize,
    pub acknowledged: usize,
    pub repeated: usize,
    pub killed: usize,
}

impl Reached {
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.acknowledged += other.acknowledged;
        self.repeated += other.repeated;
        self.killed += other.killed;
    }
}

/// A life.
pub struct Life {
    pub machine: Machine,
    image: String,
}

impl Life {
    pub fn new(seed: u64, plant: Option<Plant>) -> Self {
        let features = if seed.is_multiple_of(3) { OLD } else { NEW };
        let machine = Machine::new(seed, features, plant);
        let image = machine.image().to_str().expect("plain").to_owned();
        let mut life = Self { machine, image };
        let words = ["create", &life.image.clone(), "--size", "16M", "--block-size", "1M"];
        let created = life.machine.run(&words);
        let (_, errors) = life.machine.output(created);
        assert_eq!(life.machine.processes[created].status, Some(0), "{errors}");
        life
    }

    /// Starts a command.
    pub fn start(&mut self, command: Command) -> usize {
        let image = self.image.clone();
        let words: &[&str] = match command {
            Command::Add => &["add", "--queues", "1", "--depth", "2", &image],
            Command::Del => &["del", &image],
            Command::DelByForce => &["del", "--force", &image],
            Command::Recover => &["recover", &image],
            Command::Upgrade => &["upgrade", &image],
            Command::List => &["list", "--json"],
        };
        self.machine.start(words)
    }

    /// The device that is served, if one is.
    fn served(&self) -> Option<u32> {
        let mut devices = self.machine.driver.devices.values();
        devices.find(|device| device.state != State::Dead && !device.stopping).map(|device| device.id)
    }

    /// Does `deed`, and nothing else until it is over.
    pub fn act(&mut self, deed: Deed) {
        match deed {
            Deed::Run(command) => drop(self.start(command)),
            Deed::Use => {
                let count = 3;
                for _ in 0..count {
                    let kind = self.machine.choose(16);
                    if let Some(device) = self.served() {
                        self.machine.guest.send(device, kind);
                    }
                }
            }
            Deed::Kill | Deed::Terminate => {
                if let Some(daemon) = self.machine.server() {
                    if deed == Deed::Kill {
                        self.machine.kill(daemon);
                    } else {
                        self.machine.terminate(daemon);
                    }
                }
            }
        }
    }

    /// Lets some of what can happen happen.
    pub fn steps(&mut self, count: usize) {
        for _ in 0..count {
            if self.machine.broken.is_some() || !self.machine.step() {
                return;
            }
        }
    }

    /// An administrator looks after what is left: everything can be served again, or removed.
    pub fn administrate(&mut self) {
        self.machine.settle();
        self.each_has_its_entry();
        self.machine.kill_at = None;
        self.machine.faults = 0;
        self.command_works(&["recover", "--all"]);
        self.command_works(&["list"]);
        if let Some(device) = self.served() {
            self.machine.guest.read_all(device);
        }
        self.machine.settle();
        let is_open = |stage: Stage| matches!(stage, Stage::Queued | Stage::Served);
        let left = self.machine.guest.requests.iter().find(|request| is_open(request.stage)).cloned();
        if let Some(request) = left {
            self.machine.breaks(format!("never completed: {request:?}"));
        }
        self.command_works(&["del", "--force", "--all"]);
        self.remove_orphans();
        self.machine.settle();
        self.nothing_is_left(false);
        self.serve_once_more();
    }

    /// A device that was served has an entry as long as the kernel has it.
    fn each_has_its_entry(&mut self) {
        let folder = self.machine.folder.path();
        let lacks = |id: &u32| !folder.join(format!("{id}.json")).exists();
        let served = self.machine.driver.devices.values().filter(|device| device.was_served);
        let lacking: Vec<u32> = served.map(|device| device.id).filter(lacks).collect();
        if !lacking.is_empty() {
            self.machine.breaks(format!("devices without an entry: {lacking:?}"));
        }
    }

    /// What only the kernel knows is named by `list`, and removed by its number.
    fn remove_orphans(&mut self) {
        let ids: Vec<u32> = self.machine.driver.devices.keys().copied().collect();
        for id in ids {
            self.command_works(&["del", "--force", &id.to_string()]);
        }
    }

    /// The image has everything.
    fn serve_once_more(&mut self) {
        let image = self.image.clone();
        self.command_works(&["add", "--queues", "1", "--depth", "2", &image]);
        if let Some(device) = self.served() {
            self.machine.guest.read_all(device);
        }
        self.machine.settle();
        self.command_works(&["del", &image]);
        self.machine.settle();
        self.nothing_is_left(true);
        self.command_works(&["check", &image]);
    }

    /// A command has ended with success.
    pub fn has_worked(&mut self, number: usize) {
        if self.machine.broken.is_none() && self.machine.processes[number].status != Some(0) {
            let (name, (_, errors)) =
                (self.machine.processes[number].name.clone(), self.machine.output(number));
            self.machine.breaks(format!("`{name}` fails: {errors}"));
        }
    }

    fn command_works(&mut self, words: &[&str]) {
        if self.machine.broken.is_some() {
            return;
        }
        let number = self.machine.run(words);
        self.has_worked(number);
    }

    /// No device, no process, no file. A session may wait for the next opening until the image was `served`
    /// once more.
    fn nothing_is_left(&mut self, served: bool) {
        if self.machine.broken.is_some() {
            return;
        }
        let devices: Vec<u32> = self.machine.driver.devices.keys().copied().collect();
        if !devices.is_empty() {
            self.machine.breaks(format!("devices are left: {devices:?}"));
        }
        let alive = (0..self.machine.processes.len()).find(|&number| !self.machine.is_gone(number));
        if let Some(number) = alive {
            self.machine.breaks(format!("process {number} is left: {}", self.machine.processes[number].name));
        }
        let items = fs::read_dir(self.machine.folder.path()).expect("readable");
        let size =
            |name: &str| fs::metadata(self.machine.folder.path().join(name)).map_or(0, |found| found.len());
        let is_left = |name: &str| {
            let of_command = name.ends_with(".out") || name.ends_with(".err");
            let is_log = name.ends_with(".log") && size(name) > 0;
            let is_session =
                name.ends_with(".session") || name.ends_with(".session.next") || name == ".entry";
            !(of_command || is_log || is_session && !served || OF_MACHINE.contains(&name))
        };
        let names = items.map(|item| item.expect("readable").file_name().into_string().expect("plain"));
        let left: Vec<String> = names.filter(|name| is_left(name)).collect();
        if !left.is_empty() {
            self.machine.breaks(format!("files are left: {left:?}"));
        }
    }

    /// No process has ended by a fault of the program.
    fn no_fault(&mut self) {
        for number in 0..self.machine.processes.len() {
            let process = &self.machine.processes[number];
            let has_failed = process.child_failed();
            let (_, errors) = self.machine.output(number);
            if has_failed || errors.contains("panicked") {
                self.machine
                    .breaks(format!("process {number} ({}): {errors}", self.machine.processes[number].name));
            }
        }
        let logs = fs::read_dir(self.machine.folder.path()).expect("readable");
        for path in logs.map(|item| item.expect("readable").path()) {
            if path.extension().is_some_and(|kind| kind == "log") {
                let text = fs::read_to_string(&path).unwrap_or_default();
                if text.contains("panicked") {
                    self.machine.breaks(format!("{}: {text}", path.display()));
                }
            }
        }
    }

    /// Ends the life. What it has reached, or what was broken.
    pub fn end(mut self) -> Result<Reached, String> {
        self.no_fault();
        self.machine.end();
        let machine = &self.machine;
        let Some(rule) = &machine.broken else {
            let killed = machine.processes.iter().filter(|process| process.killed);
            return Ok(Reached {
                steps: machine.steps,
                acknowledged: machine.guest.acknowledgements,
                repeated: machine.guest.repetitions,
                killed: killed.count(),
            });
        };
        let mut story: String = machine.trace.iter().map(|line| format!("{line}\n")).collect();
        for number in 0..machine.processes.len() {
            let (_, errors) = machine.output(number);
            if !errors.is_empty() {
                story.push_str(&format!("{number}: {errors}\n"));
            }
        }
        for item in fs::read_dir(machine.folder.path()).expect("readable").flatten() {
            if item.path().extension().is_some_and(|kind| kind == "log") {
                let text = fs::read_to_string(item.path()).unwrap_or_default();
                story.push_str(&format!("{}: {text}\n", item.path().display()));
            }
        }
        Err(format!("{rule}\n{story}"))
    }
}
