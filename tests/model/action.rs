//! What may happen next to the machine.

use super::machine::{
    BASE, CHILD, Command, DEVICES, Lock, Machine, PROCESSES, Process, Promise, State, Word,
};
use super::plant::Plant;
use super::step::Step;

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// A user starts a command, for this device number.
    Launch(Command, usize),
    /// A process does its next step.
    Step(usize, Step),
    /// A daemon writes what the guest wants, into space that only the session names.
    Lands(usize),
    /// It says so.
    Acknowledges(usize),
    /// It says that the write has failed.
    Refuses(usize),
    /// It commits for a flush.
    Flushes(usize),
    /// It takes a snapshot.
    Snapshots(usize),
    /// It makes its disk larger.
    Grows(usize),
    /// A process does its next step, and the host reports an error: what it wrote was done, or dropped.
    Fails(usize, Step, bool),
    /// SIGTERM to a daemon whose device is not in use.
    Terminate(usize),
    /// SIGKILL.
    Kill(usize),
    /// A process that was killed is seen to have ended.
    IsSeenToEnd(usize),
    /// Its last I/O has ended, and its locks of images with it.
    LosesLocks(usize),
    /// Its lock of the session has ended.
    LosesSession(usize),
    /// The kernel has noticed that it no longer serves its device.
    LosesDevice(usize),
    CutPower,
    /// Another program writes the image, which is not locked.
    Meddle,
}

/// All that may happen, as far as that is known before it is tried.
pub fn actions(machine: &Machine) -> Vec<Action> {
    let mut all = launches(machine);
    let left = &machine.left;
    for slot in 0..PROCESSES {
        let Some(process) = &machine.processes[slot] else { continue };
        if process.dying {
            dying(machine, slot, process, &mut all);
        } else {
            if process.step == Step::Serves {
                serving(machine, slot, process, &mut all);
            }
            all.push(Action::Step(slot, process.step));
            if left.failures > 0 && may_fail(process) {
                all.extend([true, false].map(|done| Action::Fails(slot, process.step, done)));
            }
            if left.kills > 0 {
                all.push(Action::Kill(slot));
            }
        }
    }
    if left.cuts > 0 {
        all.push(Action::CutPower);
    }
    let leaf = machine.guest.leaf;
    if left.meddlings > 0 && machine.is_free(leaf, Lock::Writer, PROCESSES) {
        all.push(Action::Meddle);
    }
    all
}

fn launches(machine: &Machine) -> Vec<Action> {
    let mut all = Vec::new();
    if machine.left.commands == 0 || machine.processes.iter().all(Option::is_some) {
        return all;
    }
    all.push(Action::Launch(Command::Add, 0));
    if machine.left.changes > 0 {
        all.extend([Command::Compact, Command::Resize].map(|command| Action::Launch(command, 0)));
    }
    for number in 0..DEVICES {
        let Some(entry) = &machine.entries[number] else { continue };
        if entry.started || entry.daemon.is_none() {
            all.push(Action::Launch(Command::Del, number));
        }
        all.push(Action::Launch(Command::Recover, number));
        if machine.left.upgrades > 0 && entry.started && entry.daemon.is_some() {
            all.push(Action::Launch(Command::Upgrade, number));
        }
    }
    all
}

fn serving(machine: &Machine, slot: usize, process: &Process, all: &mut Vec<Action>) {
    let device = machine.devices[process.device].as_ref().expect("it is served");
    let (at, guest) = (process.image, &machine.guest);
    let Some(session) = &machine.sessions[at] else { return };
    if device.state != State::Live {
        return;
    }
    match guest.pending.filter(|_| !guest.failed) {
        Some(_) if session.word == Word::Poisoned => all.push(Action::Refuses(slot)),
        Some(value) if session.value != Some(value) => all.push(Action::Lands(slot)),
        Some(_) => all.push(Action::Acknowledges(slot)),
        None => {
            all.push(Action::Terminate(slot));
            if machine.left.writes > 0 && session.word != Word::Poisoned {
                all.push(Action::Lands(slot));
            }
        }
    }
    if session.word == Word::Poisoned {
        return;
    }
    if machine.left.growths > 0 {
        all.push(Action::Grows(slot));
    }
    let durable = machine.images[at].as_ref().and_then(|image| image.durable);
    let is_open = session.word == Word::Open;
    if is_open && (durable != session.value || guest.flushed < guest.acknowledged) {
        all.push(Action::Flushes(slot));
    }
    if is_open && machine.left.snapshots > 0 && at == BASE && machine.images[CHILD].is_none() {
        all.push(Action::Snapshots(slot));
    }
}

/// Whether an error of the host in its next step poisons the session.
fn may_fail(process: &Process) -> bool {
    use Step::{ChangesHeaders, Commits, Confirms, Enlarges, Freezes, NamesGrowth, Syncs};
    matches!(process.step, Syncs | ChangesHeaders | Commits | Confirms | Freezes | NamesGrowth | Enlarges)
}

/// That a process has ended is seen before the kernel has closed its files. The program relies on it when it
/// looks for devices that wait, once it has the lock of an image.
fn dying(machine: &Machine, slot: usize, process: &Process, all: &mut Vec<Action>) {
    if machine.entries.iter().flatten().any(|entry| entry.daemon == Some(slot)) {
        return all.push(Action::IsSeenToEnd(slot));
    }
    if process.writes.is_some() || process.locks != [Lock::None; 2] {
        all.push(Action::LosesLocks(slot));
    }
    if machine.sessions.iter().flatten().any(|session| session.holder == Some(slot)) {
        all.push(Action::LosesSession(slot));
    }
    if machine.devices.iter().flatten().any(|device| device.server == Some(slot)) {
        all.push(Action::LosesDevice(slot));
    }
}

/// Has `action` happen. `false` if it cannot yet.
pub fn apply(machine: &mut Machine, action: Action, plant: Plant) -> bool {
    let happens = happen(machine, action, plant);
    machine.rename();
    happens
}

fn happen(machine: &mut Machine, action: Action, plant: Plant) -> bool {
    match action {
        Action::Launch(command, number) => launch(machine, command, number),
        Action::Step(slot, _) => {
            if !machine.step(slot, plant) {
                return false;
            }
        }
        Action::Lands(slot)
        | Action::Acknowledges(slot)
        | Action::Refuses(slot)
        | Action::Flushes(slot)
        | Action::Snapshots(slot)
        | Action::Grows(slot) => serve(machine, action, slot),
        Action::Fails(slot, _, done) => {
            machine.left.failures -= 1;
            machine.fail(slot, done, plant);
        }
        Action::Terminate(slot) => {
            let Process { device, .. } = *machine.process(slot);
            machine.devices[device].as_mut().expect("it is served").state = State::Stopped;
            machine.guest.wants = false;
        }
        Action::Kill(slot) => {
            machine.left.kills -= 1;
            machine.kill(slot, plant);
            machine.reap(slot);
        }
        Action::CutPower => {
            machine.left.cuts -= 1;
            machine.cut_power();
        }
        Action::Meddle => meddle(machine),
        Action::IsSeenToEnd(slot)
        | Action::LosesLocks(slot)
        | Action::LosesSession(slot)
        | Action::LosesDevice(slot) => {
            lose(machine, action, slot);
            machine.reap(slot);
        }
    }
    true
}

/// A daemon does what it is there for.
fn serve(machine: &mut Machine, action: Action, slot: usize) {
    match action {
        Action::Lands(_) => {
            let at = machine.process(slot).image;
            if machine.session(at).word == Word::Open {
                if machine.guest.pending.is_none() || std::mem::take(&mut machine.guest.failed) {
                    machine.left.writes -= 1;
                    machine.guest.pending = Some(machine.guest.acknowledged + 1);
                }
                machine.session(at).value = machine.guest.pending;
            } else {
                machine.process(slot).step = Step::AnnouncesSession;
            }
        }
        Action::Acknowledges(_) => {
            machine.guest.acknowledged = machine.guest.pending.take().expect("it was looked at");
        }
        Action::Refuses(_) => machine.guest.failed = true,
        Action::Flushes(_) => {
            let (at, acknowledged) = (machine.process(slot).image, machine.guest.acknowledged);
            machine.image(at).value = machine.session(at).value;
            machine.image(at).logs = true;
            let process = machine.process(slot);
            (process.flushing, process.step) = (Some(acknowledged), Step::Syncs);
        }
        Action::Snapshots(_) => {
            machine.left.snapshots -= 1;
            machine.process(slot).step = Step::MakesChild;
        }
        _ => {
            machine.left.growths -= 1;
            let process = machine.process(slot);
            (process.grows, process.step) = (true, Step::Freezes);
        }
    }
}

fn launch(machine: &mut Machine, command: Command, number: usize) {
    machine.left.commands -= 1;
    let (step, used) = match command {
        Command::Add => (Step::Locks, None),
        Command::Compact | Command::Resize => (Step::Locks, Some(&mut machine.left.changes)),
        Command::Del => (Step::StopsDevice, None),
        Command::Recover => (Step::FindsDevice, None),
        Command::Upgrade => (Step::LocksBeside, Some(&mut machine.left.upgrades)),
    };
    if let Some(left) = used {
        *left -= 1;
    }
    let entry = machine.entries[number].as_ref();
    let of_device = !matches!(command, Command::Add | Command::Compact | Command::Resize);
    let entry = entry.filter(|_| of_device);
    let (mark, image) = entry.map_or((0, machine.guest.leaf), |entry| (entry.mark, entry.image));
    let slot = machine.processes.iter().position(Option::is_none).expect("there is room");
    machine.processes[slot] = Some(Process {
        command,
        step,
        image,
        device: number,
        mark,
        locks: [Lock::None; 2],
        dying: false,
        writes: None,
        flushing: None,
        grows: false,
    });
}

/// The kernel takes something back from a process that was killed.
fn lose(machine: &mut Machine, action: Action, slot: usize) {
    match action {
        Action::IsSeenToEnd(_) => {
            for entry in machine.entries.iter_mut().flatten().filter(|entry| entry.daemon == Some(slot)) {
                entry.daemon = None;
            }
        }
        Action::LosesLocks(_) => {
            let process = machine.process(slot);
            (process.locks, process.writes) = ([Lock::None; 2], None);
        }
        Action::LosesSession(_) => {
            for session in machine.sessions.iter_mut().flatten().filter(|it| it.holder == Some(slot)) {
                session.holder = None;
            }
        }
        _ => machine.devices.iter_mut().flatten().for_each(|device| device.release(slot)),
    }
}

/// Another program, such as QEMU, replays the image's log and writes.
fn meddle(machine: &mut Machine) {
    machine.left.meddlings -= 1;
    let leaf = machine.guest.leaf;
    let value = machine.guest.pending.unwrap_or(machine.guest.acknowledged) + 1;
    machine.modify(leaf);
    let image = machine.image(leaf);
    (image.value, image.durable, image.logs) = (Some(value), Some(value), false);
    let guest = &mut machine.guest;
    (guest.acknowledged, guest.flushed, guest.pending) = (value, value, None);
    (guest.failed, guest.promise, guest.meddled) = (false, Promise::Acknowledged, true);
}
