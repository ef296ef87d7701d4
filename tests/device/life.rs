//! A device's life on a machine: what is done to it, and what an administrator must find in the end.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use libublk::sys;
use vhdx_ublk::simulation::Plant;

use crate::driver::State;
use crate::guest::{KINDS, Stage};
use crate::machine::{Blow, Machine};

/// What the driver of Linux 7.0 has, as far as the program uses it.
const NEW: u64 = OLD
    | (sys::UBLK_F_USER_RECOVERY_FAIL_IO
        | sys::UBLK_F_UPDATE_SIZE
        | sys::UBLK_F_QUIESCE
        | sys::UBLK_F_SAFE_STOP_DEV
        | sys::UBLK_F_NO_AUTO_PART_SCAN) as u64;

/// The same of Linux 6.12.
const OLD: u64 = (sys::UBLK_F_USER_RECOVERY | sys::UBLK_F_USER_RECOVERY_REISSUE) as u64;

/// Files of the folder that are no device's.
const OF_MACHINE: [&str; 7] =
    ["machine", "ublk-control", "disk.vhdx", "other.vhdx", ".lock", ".upgrade", ".mount"];

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
    /// Another process opens the disk, or what its server has open, and keeps it open.
    OpenDisk,
    OpenServers,
    Close,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Add,
    Del,
    DelByForce,
    Recover,
    Upgrade,
    List,
    Snapshot,
    Grow,
    /// Of the layer below the image that is served.
    Merge,
}

/// The number of the first device.
const FIRST_DEVICE: &str = "1000";

/// How long a daemon may take to end that looks each second whether it can.
const AT_LAST: Duration = Duration::from_secs(60);

/// What a run has reached.
#[derive(Clone, Debug, Default)]
pub struct Reached {
    pub steps: usize,
    pub acknowledged: usize,
    pub repeated: usize,
    pub failed: usize,
    pub killed: usize,
    pub snapshots: usize,
    pub grown: usize,
    /// Merges that were repeated.
    pub merged: usize,
}

/// How devices are made, and what takes turns.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// The threads that serve requests wait for their turns, too.
    pub in_flight: bool,
    pub recovery: &'static str,
    pub queues: &'static str,
    pub depth: &'static str,
}

impl Shape {
    pub const SMALL: Self = Self { in_flight: false, recovery: "reissue", queues: "1", depth: "2" };

    /// Several queues, whose requests are with the daemon for several turns.
    pub fn in_flight(seed: u64) -> Self {
        let recovery = ["reissue", "reissue", "queue", "fail"][(seed / 2 % 4) as usize];
        // Before Linux 6.12 nothing fails until the recovery.
        let recovery = if recovery == "fail" && is_old(seed) { "queue" } else { recovery };
        let queues = if seed.is_multiple_of(2) { "1" } else { "2" };
        Self { in_flight: true, recovery, queues, depth: "3" }
    }
}

fn is_old(seed: u64) -> bool {
    seed.is_multiple_of(3)
}

impl Reached {
    pub fn add(&mut self, other: &Self) {
        self.steps += other.steps;
        self.acknowledged += other.acknowledged;
        self.repeated += other.repeated;
        self.failed += other.failed;
        self.snapshots += other.snapshots;
        self.grown += other.grown;
        self.merged += other.merged;
        self.killed += other.killed;
    }
}

/// A life.
pub struct Life {
    pub machine: Machine,
    image: String,
    shape: Shape,
    snapshots: usize,
    merged: usize,
}

impl Life {
    pub fn new(seed: u64, shape: Shape, plant: Option<Plant>) -> Self {
        let features = if is_old(seed) { OLD } else { NEW };
        let mut machine = Machine::new(seed, features, plant);
        machine.in_flight = shape.in_flight;
        machine.recovery = shape.recovery;
        let image = machine.image().to_str().expect("plain").to_owned();
        let mut life = Self { machine, image, shape, snapshots: 0, merged: 0 };
        life.create(&life.image.clone());
        life
    }

    fn create(&mut self, image: &str) {
        let created = self.machine.run(&["create", image, "--size", "16M", "--block-size", "1M"]);
        let (_, errors) = self.machine.output(created);
        assert_eq!(self.machine.processes[created].status, Some(0), "{errors}");
    }

    /// Starts `add` of another image.
    pub fn add_another(&mut self) -> usize {
        let image = self.another();
        self.create(&image);
        self.machine.start(&["add", "--queues", "1", "--depth", "2", &image])
    }

    /// Removes the device of the other image.
    pub fn remove_another(&mut self) {
        self.command_works(&["del", &self.another()]);
        self.machine.settle();
    }

    fn another(&self) -> String {
        self.image.replace("disk.vhdx", "other.vhdx")
    }

    /// Starts a command.
    pub fn start(&mut self, command: Command) -> usize {
        let image = self.leaf();
        let next = self.snapshot(self.snapshots);
        let layer =
            self.machine.chain.get(1).map_or_else(|| image.clone(), |layer| layer.display().to_string());
        self.snapshots += usize::from(command == Command::Snapshot);
        let Shape { queues, depth, recovery, .. } = self.shape;
        let words: &[&str] = match command {
            Command::Add => &["add", "--queues", queues, "--depth", depth, "--recovery", recovery, &image],
            Command::Del => &["del", &image],
            Command::DelByForce => &["del", "--force", &image],
            Command::Recover => &["recover", &image],
            Command::Upgrade => &["upgrade", &image],
            Command::List => &["list", "--json"],
            Command::Snapshot => &["snapshot", FIRST_DEVICE, &next],
            Command::Grow => &["resize", FIRST_DEVICE, "--size", "+1M"],
            Command::Merge => &["merge", &layer],
        };
        self.machine.start(words)
    }

    /// The image of the snapshot of this number.
    fn snapshot(&self, number: usize) -> String {
        self.image.replace("disk.vhdx", &format!("snapshot{number}.vhdx"))
    }

    /// The image that is served, or was.
    fn leaf(&self) -> String {
        self.machine
            .chain
            .first()
            .map_or_else(|| self.image.clone(), |leaf| leaf.to_str().expect("plain").into())
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
                let count = if self.shape.in_flight { 6 } else { 3 };
                for _ in 0..count {
                    let kind = self.machine.choose(KINDS);
                    if let Some(device) = self.served() {
                        let sectors = self.machine.driver.devices[&device].sectors;
                        self.machine.guest.send((device, sectors), kind);
                    }
                }
            }
            Deed::OpenDisk | Deed::OpenServers => self.machine.driver.open(deed == Deed::OpenServers),
            Deed::Close => self.machine.driver.close(),
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
        self.machine.driver.close();
        self.machine.settle();
        self.each_has_its_entry();
        self.machine.blow = None;
        let had_faults = std::mem::take(&mut self.machine.faults) > 0;
        self.command_works(&["recover", "--all"]);
        self.machine.settle();
        if !had_faults {
            self.each_size_is_known();
        }
        self.command_works(&["list"]);
        self.read_all();
        self.machine.settle();
        let is_open = |stage: Stage| matches!(stage, Stage::Queued | Stage::Served);
        let left = self.machine.guest.requests.iter().find(|request| is_open(request.stage)).cloned();
        if let Some(request) = left {
            self.machine.breaks(format!("never completed: {request:?}"));
        }
        self.command_works(&["del", "--force", "--all"]);
        self.remove_orphans();
        self.machine.settle();
        self.remove_spare_snapshots();
        self.nothing_is_left();
        self.serve_once_more();
    }

    /// What a daemon was asked is noted as long as its device is there.
    pub fn each_note_has_its_device(&mut self) {
        let items = fs::read_dir(self.machine.folder.path()).expect("readable").flatten();
        let notes = items
            .map(|item| item.path())
            .filter(|path| path.extension().is_some_and(|kind| kind == "ending"));
        let strays: Vec<_> = notes
            .filter(|note| {
                let entry = fs::read_to_string(note.with_extension("json")).unwrap_or_default();
                let mark = fs::read_to_string(note).unwrap_or_default();
                mark.is_empty() || !entry.contains(&format!("\"mark\": {mark},"))
            })
            .collect();
        if !strays.is_empty() {
            self.machine.breaks(format!("requests to end are noted of no device: {strays:?}"));
        }
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

    /// The kernel has the size of a disk that is in its device's entry.
    fn each_size_is_known(&mut self) {
        for device in self.machine.driver.devices.values().filter(|device| device.state == State::Live) {
            let path = self.machine.folder.path().join(format!("{}.json", device.id));
            let text = fs::read_to_string(path).unwrap_or_default();
            let entry: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
            if entry["size_bytes"] != device.sectors * 512 {
                let rule =
                    format!("the kernel knows of {} sectors, and not of all of {entry}", device.sectors);
                return self.machine.breaks(rule);
            }
        }
    }

    fn read_all(&mut self) {
        if let Some(device) = self.served() {
            let sectors = self.machine.driver.devices[&device].sectors;
            if let Err(rule) = self.machine.guest.read_all((device, sectors)) {
                self.machine.breaks(rule);
            }
        }
    }

    /// What only the kernel knows is named by `list`, and removed by its number.
    fn remove_orphans(&mut self) {
        let ids: Vec<u32> = self.machine.driver.devices.keys().copied().collect();
        for id in ids {
            self.command_works(&["del", "--force", &id.to_string()]);
        }
    }

    /// A snapshot that was not taken is removed by hand if a kill has left it. Nothing serves it.
    fn remove_spare_snapshots(&mut self) {
        for number in 0..self.snapshots {
            let image = self.snapshot(number);
            let path = PathBuf::from(&image);
            if self.machine.chain.contains(&path) || fs::remove_file(&path).is_err() {
                continue;
            }
            if !self.machine.processes.iter().any(|process| process.struck.is_some()) {
                self.machine.breaks(format!("{image} is left, and no process has ended early"));
            }
        }
    }

    /// The image has everything, and its chain is sound.
    fn serve_once_more(&mut self) {
        let image = self.leaf();
        self.command_works(&["add", "--queues", "1", "--depth", "2", &image]);
        self.read_all();
        self.machine.settle();
        self.command_works(&["del", &image]);
        self.machine.settle();
        self.nothing_is_left();
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

    /// Runs a command, which must succeed.
    pub fn works(&mut self, command: Command) {
        if self.machine.broken.is_none() {
            let number = self.machine.processes.len();
            self.act(Deed::Run(command));
            self.machine.settle();
            self.has_worked(number);
        }
    }

    /// The first snapshot's image, above which there is another one, is merged, if an interrupted merge has
    /// left it.
    pub fn merge_again(&mut self) {
        let layer = self.snapshot(0);
        if fs::exists(&layer).expect("readable") {
            self.command_works(&["merge", &layer]);
            self.machine.settle();
            self.merged += 1;
        }
        if self.machine.broken.is_none() && fs::exists(&layer).expect("readable") {
            self.machine.breaks(format!("{layer} is left by its merge"));
        }
    }

    /// Runs a command, which must fail and change nothing.
    pub fn is_refused(&mut self, command: Command) {
        let number = self.machine.processes.len();
        let before = self.served();
        self.act(Deed::Run(command));
        self.machine.settle();
        if self.machine.processes[number].status == Some(0) || self.served() != before {
            self.machine.breaks(format!("{command:?} is not refused"));
        }
    }

    /// A device is served.
    pub fn is_served(&mut self) {
        if self.machine.broken.is_none() && (self.served().is_none() || self.machine.server().is_none()) {
            self.machine.breaks("a disk that is open is not served".into());
        }
    }

    /// A daemon that was asked to end does so when it looks again, which it does each second.
    pub fn ends_by_itself(&mut self, daemon: usize) {
        let until = Instant::now() + AT_LAST;
        while self.machine.broken.is_none() && !self.machine.is_gone(daemon) {
            if !self.machine.step() && Instant::now() >= until {
                self.machine.breaks("a daemon that was asked to end does not".into());
            }
        }
    }

    fn command_works(&mut self, words: &[&str]) {
        if self.machine.broken.is_some() {
            return;
        }
        let number = self.machine.run(words);
        self.has_worked(number);
    }

    /// Neither devices, nor processes, nor files.
    pub fn nothing_is_left(&mut self) {
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
            let is_image = self.machine.chain.iter().any(|image| image.ends_with(name));
            !(of_command || is_log || is_image || OF_MACHINE.contains(&name))
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
            let killed = machine.processes.iter().filter(|process| process.struck == Some(Blow::Kill));
            return Ok(Reached {
                steps: machine.steps,
                acknowledged: machine.guest.acknowledgements,
                repeated: machine.guest.repetitions,
                failed: machine.guest.failures,
                killed: killed.count(),
                snapshots: machine.chain.len().saturating_sub(1),
                grown: machine.driver.growths,
                merged: self.merged,
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
