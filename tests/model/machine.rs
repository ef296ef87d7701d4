//! The machine as far as the life of a device depends on it: images, `/run`, the kernel's devices, processes,
//! and what the guest may rely on.

use super::plant::Plant;
use super::step::Step;

/// Processes that run at once.
pub const PROCESSES: usize = 3;

/// Device numbers.
pub const DEVICES: usize = 2;

/// The image that is there from the start.
pub const BASE: usize = 0;

/// What a snapshot makes.
pub const CHILD: usize = 1;

/// Everything that the next step of anything depends on.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub struct Machine {
    pub images: [Option<Image>; 2],
    pub sessions: [Option<SessionFile>; 2],
    pub entries: [Option<Entry>; DEVICES],
    pub devices: [Option<Device>; DEVICES],
    /// The process that has the registry's lock.
    pub registry: Option<usize>,
    pub processes: [Option<Process>; PROCESSES],
    pub guest: Guest,
    pub left: Budget,
    /// How many GUIDs there are, marks of devices, and eras of images, which begin with a modification.
    pub guids: u8,
    pub marks: u8,
    pub eras: u8,
    /// What was broken, seen in the step that broke it.
    pub broken: Option<&'static str>,
}

/// An image. Its content is one number, which grows with every write.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub struct Image {
    /// FileWriteGuid.
    pub guid: u8,
    /// What its metadata names, a log in the host's cache included; none: what the parent has.
    pub value: Option<u8>,
    /// The same after a power cut.
    pub durable: Option<u8>,
    /// A power cut leaves the file.
    pub lasts: bool,
    /// Its headers name a log.
    pub logs: bool,
    pub era: u8,
    /// Of its disk: a number that only grows. It is durable at once.
    pub size: u8,
}

/// A session file.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub struct SessionFile {
    pub current: u8,
    pub next: u8,
    pub word: Word,
    /// Of the disk that its block map is of.
    pub size: u8,
    /// What its block map names.
    pub value: Option<u8>,
    /// The era of the image that it continues.
    pub era: u8,
    /// The process that has its lock.
    pub holder: Option<usize>,
    /// The device that was served with it last.
    pub mark: Option<u8>,
}

/// What a session says of its image.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum Word {
    /// It has everything.
    Idle,
    /// It may be modified.
    Open,
    /// What must not fail has failed: no write or flush succeeds from now on.
    Poisoned,
}

/// A registry entry.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub struct Entry {
    pub mark: u8,
    pub image: usize,
    /// The process, until it is seen to have ended.
    pub daemon: Option<usize>,
    pub started: bool,
}

/// A device of the kernel.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub struct Device {
    pub mark: u8,
    pub state: State,
    /// The process that has its character device open.
    pub server: Option<usize>,
    /// Of the disk, as the kernel has it.
    pub size: u8,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum State {
    Added,
    Live,
    Quiesced,
    Stopped,
}

/// What a process has locked of an image.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum Lock {
    None,
    Reader,
    /// As a writer, but for the writers' own byte.
    Beside,
    Writer,
}

/// What a process was started for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum Command {
    Add,
    Del,
    Recover,
    Upgrade,
    /// A command that changes an image at rest, as `compact` does.
    Compact,
    /// One that makes the disk of an image at rest larger.
    Resize,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub struct Process {
    pub command: Command,
    pub step: Step,
    pub image: usize,
    pub device: usize,
    pub mark: u8,
    pub locks: [Lock; 2],
    /// Killed: what it holds goes piece by piece.
    pub dying: bool,
    /// Its I/O may reach an image.
    pub writes: Option<usize>,
    /// Of a flush under way: what had been acknowledged when it began.
    pub flushing: Option<u8>,
    /// The image is frozen for its disk to grow, and not for a snapshot.
    pub grows: bool,
}

/// What no kill takes from the guest.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum Promise {
    Acknowledged,
    /// The session of the disk is poisoned: what was flushed.
    Flushed,
}

/// What the guest has seen, and may rely on.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub struct Guest {
    pub acknowledged: u8,
    pub flushed: u8,
    /// A write that waits in the kernel for its end.
    pub pending: Option<u8>,
    /// It has ended, with an error: it may have been done.
    pub failed: bool,
    pub promise: Promise,
    /// The size of the disk, as the kernel said.
    pub size: u8,
    /// The image whose chain is the disk.
    pub leaf: usize,
    /// The user has a device.
    pub wants: bool,
    /// Another program has written the image that a device waits with.
    pub meddled: bool,
}

/// What may still happen.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub struct Budget {
    pub commands: u8,
    pub writes: u8,
    pub kills: u8,
    pub cuts: u8,
    pub meddlings: u8,
    pub snapshots: u8,
    pub upgrades: u8,
    /// Of images at rest.
    pub changes: u8,
    /// Of the disk of a device.
    pub growths: u8,
    pub failures: u8,
}

impl Machine {
    pub fn new(left: Budget) -> Self {
        let image =
            Image { guid: 0, value: Some(0), durable: Some(0), lasts: true, logs: false, era: 0, size: 0 };
        Self {
            images: [Some(image), None],
            sessions: [None, None],
            entries: [None, None],
            devices: [None, None],
            registry: None,
            processes: [None, None, None],
            guest: Guest {
                acknowledged: 0,
                flushed: 0,
                pending: None,
                failed: false,
                promise: Promise::Acknowledged,
                size: 0,
                leaf: BASE,
                wants: false,
                meddled: false,
            },
            left,
            guids: 1,
            marks: 0,
            eras: 1,
            broken: None,
        }
    }

    pub fn image(&mut self, at: usize) -> &mut Image {
        self.images[at].as_mut().expect("the image is there")
    }

    pub fn session(&mut self, at: usize) -> &mut SessionFile {
        self.sessions[at].as_mut().expect("the session is there")
    }

    pub fn process(&mut self, slot: usize) -> &mut Process {
        self.processes[slot].as_mut().expect("the process runs")
    }

    pub fn new_guid(&mut self) -> u8 {
        self.guids += 1;
        self.guids - 1
    }

    pub fn new_era(&mut self) -> u8 {
        self.eras += 1;
        self.eras - 1
    }

    /// Whether every process but `slot` leaves room for `lock` on an image.
    pub fn is_free(&self, image: usize, lock: Lock, slot: usize) -> bool {
        let others = (0..PROCESSES)
            .filter(|other| *other != slot)
            .filter_map(|other| self.processes[other].as_ref().map(|process| process.locks[image]));
        others.into_iter().all(|other| match lock {
            Lock::None => true,
            Lock::Reader => matches!(other, Lock::None | Lock::Reader),
            Lock::Beside => !matches!(other, Lock::Beside),
            Lock::Writer => other == Lock::None,
        })
    }

    /// Whether the session's GUIDs are the image's, and its map is the disk's. A disk grows while its session
    /// rests.
    pub fn fits(&self, image: usize) -> bool {
        let (Some(session), Some(image)) = (&self.sessions[image], &self.images[image]) else { return false };
        let is_its = [session.current, session.next].contains(&image.guid);
        let has_grown = session.size < image.size && session.word == Word::Idle;
        is_its && session.word != Word::Poisoned && (session.size == image.size || has_grown)
    }

    /// Whether the device of an entry waits for its next daemon.
    pub fn is_abandoned(&self, number: usize) -> bool {
        let Some(entry) = &self.entries[number] else { return false };
        self.devices[number].as_ref().is_some_and(|device| {
            device.mark == entry.mark
                && (device.state == State::Quiesced || device.state == State::Live && entry.daemon.is_none())
        })
    }

    /// Whether an abandoned device has a claim to the image.
    pub fn is_claimed(&self, image: usize) -> bool {
        let reads = |entry: &Entry| entry.image >= image;
        (0..DEVICES)
            .any(|number| self.is_abandoned(number) && self.entries[number].as_ref().is_some_and(reads))
    }

    /// What a chain holds from `image` down: by the sessions that a running daemon has, and by the files.
    pub fn served(&self, image: usize) -> Option<u8> {
        let own = match &self.sessions[image] {
            Some(session) => session.value,
            None => self.images[image].as_ref()?.value,
        };
        own.or_else(|| if image == CHILD { self.images[BASE].as_ref()?.value } else { None })
    }

    /// The same after a power cut.
    pub fn durable(&self, image: usize) -> Option<u8> {
        let own = self.images[image].as_ref().filter(|image| image.lasts)?.durable;
        own.or_else(|| if image == CHILD { self.images[BASE].as_ref()?.durable } else { None })
    }

    /// Whether what a reader of the disk sees is old: a later value may be of a write that has not ended.
    pub fn is_known(&self, value: u8, least: u8) -> bool {
        (least..=self.guest.pending.unwrap_or(self.guest.acknowledged)).contains(&value)
    }

    /// The latest write that the disk may not be without.
    pub fn promised(&self) -> u8 {
        match self.guest.promise {
            Promise::Acknowledged => self.guest.acknowledged,
            Promise::Flushed => self.guest.flushed,
        }
    }

    /// What must not fail has failed in the session of an image, and every write fails from now on.
    pub fn poison(&mut self, image: usize) {
        self.session(image).word = Word::Poisoned;
        self.guest.promise = Promise::Flushed;
    }

    /// A device serves the disk anew after one that had failed.
    pub fn begin_anew(&mut self) {
        let guest = &self.guest;
        if guest.promise == Promise::Acknowledged && !guest.failed {
            return;
        }
        match self.served(guest.leaf) {
            Some(value) if self.is_known(value, guest.flushed) => self.guest.acknowledged = value,
            _ => self.broken = Some("a failure has lost what was flushed"),
        }
        (self.guest.pending, self.guest.failed) = (None, false);
        self.guest.promise = Promise::Acknowledged;
    }

    /// A process has ended, and all that it had is free.
    pub fn is_at_rest(&self) -> bool {
        self.processes.iter().all(Option::is_none)
    }

    /// What the device `number` leaves when its end was reported: nothing.
    pub fn check_gone(&mut self, slot: usize) {
        let Process { device, mark, image, .. } = *self.process(slot);
        let left = self.devices[device].as_ref().is_some_and(|it| it.mark == mark)
            || self.entries[device].as_ref().is_some_and(|it| it.mark == mark);
        // A poisoned session stays where its image could not be closed, which is said.
        let is_its = |it: &&SessionFile| it.mark == Some(mark) && it.word != Word::Poisoned;
        let session = self.sessions[image].as_ref().is_some_and(|session| is_its(&session));
        if left || session && !self.guest.meddled {
            self.broken = Some("a device that was removed has left something");
        }
    }

    /// Everything that a power cut leaves: images, and of these what was durable.
    pub fn cut_power(&mut self) {
        for image in &mut self.images {
            *image = image.take().filter(|it| it.lasts).map(|it| Image { value: it.durable, ..it });
        }
        let value = self.durable(self.guest.leaf);
        match value {
            Some(value) if self.is_known(value, self.guest.flushed) => {
                self.guest.acknowledged = value;
                self.guest.flushed = value;
            }
            _ => self.broken = Some("a power cut has lost what was flushed"),
        }
        self.guest.pending = None;
        (self.guest.failed, self.guest.promise) = (false, Promise::Acknowledged);
        self.guest.wants = false;
        self.guest.meddled = false;
        (self.sessions, self.entries, self.devices) = ([None, None], [None, None], [None, None]);
        (self.registry, self.processes) = (None, [None, None, None]);
    }

    /// Names GUIDs, marks and eras by their places: only which are the same matters.
    pub fn rename(&mut self) {
        let (mut guids, mut marks, mut eras) = (Names::default(), Names::default(), Names::default());
        for image in self.images.iter_mut().flatten() {
            guids.rename(&mut image.guid);
            eras.rename(&mut image.era);
        }
        for session in self.sessions.iter_mut().flatten() {
            guids.rename(&mut session.current);
            guids.rename(&mut session.next);
            eras.rename(&mut session.era);
            session.mark.iter_mut().for_each(|mark| marks.rename(mark));
        }
        self.entries.iter_mut().flatten().for_each(|entry| marks.rename(&mut entry.mark));
        self.devices.iter_mut().flatten().for_each(|device| marks.rename(&mut device.mark));
        self.processes.iter_mut().flatten().for_each(|process| marks.rename(&mut process.mark));
        (self.guids, self.marks, self.eras) = (guids.count(), marks.count(), eras.count());
    }

    /// A process that was killed and has nothing left is gone.
    pub fn reap(&mut self, slot: usize) {
        let Some(process) = self.processes[slot].as_ref().filter(|process| process.dying) else { return };
        let has_more = process.writes.is_some()
            || process.locks != [Lock::None; 2]
            || self.entries.iter().flatten().any(|entry| entry.daemon == Some(slot))
            || self.sessions.iter().flatten().any(|session| session.holder == Some(slot))
            || self.devices.iter().flatten().any(|device| device.server == Some(slot));
        if !has_more {
            self.processes[slot] = None;
        }
    }

    /// A daemon is killed: what it has stays until the kernel has taken it back, piece by piece.
    pub fn kill(&mut self, slot: usize, plant: Plant) {
        let process = self.process(slot);
        process.dying = true;
        if plant == Plant::LockOfProcess {
            process.locks = [Lock::None, Lock::None];
        }
        if self.registry == Some(slot) {
            self.registry = None;
        }
    }
}

/// Names that were given anew, in the order in which they came.
#[derive(Default)]
struct Names(Vec<u8>);

impl Names {
    fn rename(&mut self, name: &mut u8) {
        let at = self.0.iter().position(|known| known == name).unwrap_or_else(|| {
            self.0.push(*name);
            self.0.len() - 1
        });
        *name = u8::try_from(at).expect("few");
    }

    fn count(&self) -> u8 {
        u8::try_from(self.0.len()).expect("few")
    }
}
