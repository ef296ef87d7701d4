//! What each step does to the machine.

use super::machine::{
    BASE, CHILD, Command, DEVICES, Device, Entry, Image, Lock, Machine, Process, SessionFile, State, Word,
};
use super::plant::Plant;
use super::step::Step;

/// What a step comes to.
enum Turn {
    /// The next step.
    To(Step),
    /// It has to wait.
    Waits,
    /// The command is refused, or has ended.
    Ends,
}

use Turn::{Ends, To, Waits};

impl Machine {
    /// Process `slot` does its next step. `false` if it has to wait.
    pub fn step(&mut self, slot: usize, plant: Plant) -> bool {
        let Process { step, command, .. } = *self.process(slot);
        let turn = match command {
            Command::Del if !is_of_image(step) => self.remove(slot, step, plant),
            Command::Recover | Command::Upgrade if is_of_recovery(step) => self.recover(slot, step, plant),
            _ if is_of_image(step) => self.open(slot, step, plant),
            _ => self.serve(slot, step, plant),
        };
        match turn {
            To(step) => self.process(slot).step = step,
            Waits => return false,
            Ends => self.end(slot),
        }
        true
    }

    /// The host reports an error in the step of process `slot`, which was done all the same, or not: what the
    /// host had of it is dropped then.
    pub fn fail(&mut self, slot: usize, done: bool, plant: Plant) {
        let Process { command, step, image: at, .. } = *self.process(slot);
        let only_syncs = matches!(step, Step::Syncs | Step::Confirms);
        match done {
            true if only_syncs => self.make_durable(at),
            true => assert!(self.step(slot, plant), "it does not wait"),
            false => self.image(at).value = self.image(at).durable,
        }
        if step == Step::Syncs && plant == Plant::SyncAgain {
            return;
        }
        self.poison(at);
        if step == Step::Freezes && !self.process(slot).grows {
            (self.images[CHILD], self.sessions[CHILD]) = (None, None);
            self.process(slot).locks[CHILD] = Lock::None;
        }
        let process = self.process(slot);
        (process.flushing, process.grows) = (None, false);
        match (step, command) {
            (Step::Commits | Step::Confirms, Command::Del) => process.step = after_close(plant),
            (Step::Commits, _) => process.step = Step::Deletes,
            (Step::Confirms, _) => self.end(slot),
            _ => process.step = Step::Serves,
        }
    }

    /// The process ends in order, and everything that it has is free at once.
    fn end(&mut self, slot: usize) {
        for session in self.sessions.iter_mut().flatten().filter(|it| it.holder == Some(slot)) {
            session.holder = None;
        }
        for entry in self.entries.iter_mut().flatten().filter(|it| it.daemon == Some(slot)) {
            entry.daemon = None;
        }
        for device in self.devices.iter_mut().flatten() {
            device.release(slot);
        }
        if self.registry == Some(slot) {
            self.registry = None;
        }
        self.processes[slot] = None;
    }

    /// An image is opened, and closed again.
    fn open(&mut self, slot: usize, step: Step, plant: Plant) -> Turn {
        let Process { command, image: at, .. } = *self.process(slot);
        match step {
            Step::Locks => {
                if !self.lock(slot, at) {
                    return Ends;
                }
                To(Step::Surveys)
            }
            Step::Surveys if self.is_claimed(at) && plant != Plant::IgnoreClaims => Ends,
            Step::Surveys => To(Step::RefusesParent),
            Step::RefusesParent if at != self.guest.leaf => Ends,
            Step::RefusesParent if matches!(command, Command::Compact | Command::Resize) => {
                To(Step::RefusesOrphan)
            }
            Step::RefusesParent => To(Step::Chooses),
            Step::RefusesOrphan => self.refuse_orphan(at, plant),
            Step::Chooses => self.choose(slot, plant),
            Step::Confirms | Step::Announces | Step::Replays | Step::Reconciles => {
                self.take_over(slot, step, plant)
            }
            Step::Begins => {
                self.begin(slot, at);
                To(self.opened(slot))
            }
            Step::Commits | Step::EndsLog | Step::RemovesSession => self.close(slot, step, plant),
            Step::Changes => {
                self.modify(at);
                self.image(at).logs = true;
                To(Step::EndsLog)
            }
            Step::Resizes => {
                self.modify(at);
                let image = self.image(at);
                (image.logs, image.size) = (true, image.size + 1);
                To(Step::EndsLog)
            }
            _ => unreachable!("{step:?} is no step of an image"),
        }
    }

    /// The session that was chosen, or none, and the image are brought together.
    fn take_over(&mut self, slot: usize, step: Step, plant: Plant) -> Turn {
        let Process { command, image: at, .. } = *self.process(slot);
        match step {
            Step::Confirms => {
                let (era, guid, logs) = (self.image(at).era, self.image(at).guid, self.image(at).logs);
                if self.session(at).era != era {
                    self.broken = Some("a session is taken over that is not the image's");
                }
                if self.session(at).word == Word::Poisoned {
                    self.broken = Some("a poisoned session is taken over");
                }
                self.session(at).current = guid;
                To(if logs { Step::Announces } else { Step::Reconciles })
            }
            Step::Announces => {
                self.session(at).next = self.new_guid();
                To(Step::Replays)
            }
            Step::Replays => self.replay(slot),
            _ => {
                let size = self.image(at).size;
                if self.session(at).size < size && plant != Plant::KeepShortMap {
                    if self.session(at).word != Word::Idle {
                        self.broken = Some("a session of a shorter disk is taken over");
                    }
                    self.begin(slot, at);
                }
                self.session(at).current = self.image(at).guid;
                To(if command == Command::Del { Step::Commits } else { self.opened(slot) })
            }
        }
    }

    /// Takes the image's lock, and those of its parents.
    fn lock(&mut self, slot: usize, image: usize) -> bool {
        let has_parent = image == CHILD;
        let free = self.is_free(image, Lock::Writer, slot)
            && (!has_parent || self.is_free(BASE, Lock::Reader, slot));
        if free {
            let process = self.process(slot);
            process.locks[image] = Lock::Writer;
            if has_parent {
                process.locks[BASE] = Lock::Reader;
            }
            process.writes = Some(image);
        }
        free
    }

    fn refuse_orphan(&mut self, at: usize, plant: Plant) -> Turn {
        let fits = self.fits(at);
        match &self.sessions[at] {
            _ if plant == Plant::IgnoreClaims => {}
            Some(session) if session.holder.is_some() => {
                let passes = session.word == Word::Idle || plant == Plant::IgnoreHeldSession;
                return if passes { To(Step::Replays) } else { Ends };
            }
            Some(session) if session.word == Word::Idle => self.sessions[at] = None,
            Some(_) if fits => return Ends,
            _ => {}
        }
        To(Step::Replays)
    }

    fn choose(&mut self, slot: usize, plant: Plant) -> Turn {
        let Process { command, image: at, .. } = *self.process(slot);
        let poisoned = self.sessions[at].as_ref().is_some_and(|session| session.word == Word::Poisoned);
        let fits = match plant {
            Plant::IgnoreGuid => true,
            Plant::TakePoisoned if poisoned => true,
            _ => self.fits(at),
        };
        match (&mut self.sessions[at], command) {
            (Some(session), _) if session.holder.is_some() => Ends,
            (Some(session), _) if fits => {
                session.holder = Some(slot);
                if command == Command::Add {
                    session.mark = None;
                }
                To(Step::Confirms)
            }
            (_, Command::Recover | Command::Upgrade) => Ends,
            (unfit, Command::Del) => {
                *unfit = None;
                To(after_close(plant))
            }
            (unfit, _) => {
                *unfit = None;
                To(if self.image(at).logs { Step::Replays } else { Step::Begins })
            }
        }
    }

    /// What was opened for writing is modified: a session that is not of this process no longer fits.
    pub fn modify(&mut self, at: usize) {
        self.image(at).era = self.new_era();
        self.image(at).guid = self.new_guid();
    }

    fn replay(&mut self, slot: usize) -> Turn {
        let Process { command, image: at, .. } = *self.process(slot);
        let own = self.sessions[at].as_ref().is_some_and(|session| session.holder == Some(slot));
        if own {
            self.image(at).guid = self.session(at).next;
        } else if self.image(at).logs {
            self.modify(at);
        }
        self.make_durable(at);
        self.image(at).logs = false;
        To(match command {
            _ if own => Step::Reconciles,
            Command::Compact => Step::Changes,
            Command::Resize => Step::Resizes,
            _ => Step::Begins,
        })
    }

    fn begin(&mut self, slot: usize, at: usize) {
        let Image { guid, value, era, size, .. } = *self.image(at);
        let (current, next, holder, word) = (guid, guid, Some(slot), Word::Idle);
        self.sessions[at] = Some(SessionFile { current, next, word, size, value, era, holder, mark: None });
    }

    /// The image is ready to be served.
    fn opened(&mut self, slot: usize) -> Step {
        match self.process(slot).command {
            Command::Add => Step::Sweeps,
            _ => Step::StartsRecovery,
        }
    }

    fn commit(&mut self, at: usize) {
        self.image(at).value = self.session(at).value;
        self.image(at).logs = true;
    }

    fn make_durable(&mut self, at: usize) {
        self.image(at).durable = self.image(at).value;
        self.image(at).lasts = true;
    }

    fn close(&mut self, slot: usize, step: Step, plant: Plant) -> Turn {
        let Process { command, image: at, flushing, .. } = *self.process(slot);
        let session_first = plant == Plant::SessionFirst;
        match step {
            Step::Commits => {
                if session_first {
                    self.image(at).value = flushing;
                } else {
                    self.commit(at);
                }
                self.make_durable(at);
                return To(Step::EndsLog);
            }
            Step::EndsLog => {
                self.image(at).logs = false;
                if matches!(command, Command::Compact | Command::Resize) {
                    return Ends;
                }
                if !session_first {
                    return To(Step::RemovesSession);
                }
            }
            _ => {
                let session = self.sessions[at].take().expect("it is there");
                if session_first && session.word == Word::Open {
                    self.process(slot).flushing = session.value;
                    return To(Step::Commits);
                }
            }
        }
        To(match command {
            Command::Del => after_close(plant),
            _ if plant == Plant::EntryFirst => Step::RemovesEntry,
            _ => Step::Deletes,
        })
    }

    /// A daemon's own steps.
    fn serve(&mut self, slot: usize, step: Step, plant: Plant) -> Turn {
        let Process { image: at, device, .. } = *self.process(slot);
        match step {
            Step::Sweeps | Step::AddsDevice | Step::WritesEntry => self.make_device(slot, step),
            Step::Starts | Step::NotesStart => self.start(slot, step),
            Step::Serves if self.device(device).state == State::Stopped => To(Step::Stops),
            Step::Serves => Waits,
            Step::AnnouncesSession | Step::ChangesHeaders | Step::OpensSession => {
                self.open_session(slot, step, plant)
            }
            Step::Syncs => {
                self.make_durable(at);
                let flushing = self.process(slot).flushing.take().expect("a flush is under way");
                self.guest.flushed = self.guest.flushed.max(flushing);
                To(Step::Serves)
            }
            Step::Stops | Step::Deletes | Step::RemovesEntry | Step::Exits => {
                self.take_down(slot, step, plant)
            }
            Step::Settles | Step::Leaves => self.leave(slot, step, plant),
            Step::Freezes => {
                let frozen = if self.process(slot).grows { at } else { BASE };
                if self.session(frozen).word == Word::Open {
                    self.commit(frozen);
                    self.make_durable(frozen);
                }
                To(Step::Rests)
            }
            _ if self.process(slot).grows => self.grow(slot, step, plant),
            _ => self.snapshot(slot, step, plant),
        }
    }

    fn start(&mut self, slot: usize, step: Step) -> Turn {
        let Process { image: at, device, mark, .. } = *self.process(slot);
        if step == Step::Starts {
            self.device(device).state = State::Live;
            let size = self.device(device).size;
            self.tell_size(device, size);
            return To(Step::NotesStart);
        }
        // It was stopped meanwhile.
        if let Some(entry) = self.entry_of(device, mark) {
            entry.started = true;
        }
        self.guest.wants = self.device(device).state == State::Live;
        self.begin_anew();
        self.session(at).mark = Some(mark);
        self.guest.meddled = false;
        To(Step::Serves)
    }

    /// The daemon's device goes, and it ends.
    fn take_down(&mut self, slot: usize, step: Step, plant: Plant) -> Turn {
        let Process { image: at, device, .. } = *self.process(slot);
        match step {
            Step::Stops => {
                if plant == Plant::UnlockBeforeClose {
                    self.process(slot).locks = [Lock::None, Lock::None];
                }
                To(match self.session(at).word {
                    // It is not closed: the session and the entry stay.
                    Word::Poisoned => Step::Deletes,
                    Word::Open if plant != Plant::SessionFirst => Step::Commits,
                    _ => Step::RemovesSession,
                })
            }
            Step::Deletes => {
                self.devices[device] = None;
                let is_closed = self.sessions[at].is_none();
                To(match plant {
                    Plant::EntryFirst => Step::Exits,
                    _ if is_closed => Step::RemovesEntry,
                    _ => Step::Exits,
                })
            }
            Step::RemovesEntry => {
                self.entries[device] = None;
                To(if plant == Plant::EntryFirst { Step::Deletes } else { Step::Exits })
            }
            _ => {
                // That an image could not be closed is said.
                if self.sessions[at].is_none() {
                    self.check_gone(slot);
                }
                Ends
            }
        }
    }

    fn make_device(&mut self, slot: usize, step: Step) -> Turn {
        let Process { image: at, device, mark, .. } = *self.process(slot);
        match step {
            Step::Sweeps if self.registry.is_some() => Waits,
            Step::Sweeps => {
                for number in 0..DEVICES {
                    let Some(entry) = &self.entries[number] else { continue };
                    let is_there = self.devices[number].as_ref().is_some_and(|it| it.mark == entry.mark);
                    if entry.daemon.is_none() && !is_there {
                        self.entries[number] = None;
                    }
                }
                self.registry = Some(slot);
                To(Step::AddsDevice)
            }
            Step::AddsDevice => {
                let Some(number) = self.devices.iter().position(Option::is_none) else { return Waits };
                let (mark, size) = (self.marks, self.image(at).size);
                self.marks += 1;
                self.devices[number] = Some(Device { mark, state: State::Added, server: Some(slot), size });
                let process = self.process(slot);
                (process.device, process.mark) = (number, mark);
                To(Step::WritesEntry)
            }
            _ => {
                let entry = Entry { mark, image: at, daemon: Some(slot), started: false };
                self.entries[device] = Some(entry);
                self.registry = None;
                To(Step::Starts)
            }
        }
    }

    fn open_session(&mut self, slot: usize, step: Step, plant: Plant) -> Turn {
        let at = self.process(slot).image;
        let late = plant == Plant::LateAnnouncement;
        match step {
            Step::AnnouncesSession if late => {
                self.modify(at);
                self.session(at).era = self.image(at).era;
                To(Step::ChangesHeaders)
            }
            Step::AnnouncesSession => {
                self.session(at).next = self.new_guid();
                To(Step::ChangesHeaders)
            }
            Step::ChangesHeaders if late => {
                self.session(at).next = self.image(at).guid;
                To(Step::OpensSession)
            }
            Step::ChangesHeaders => {
                self.image(at).era = self.new_era();
                self.session(at).era = self.image(at).era;
                self.image(at).guid = self.session(at).next;
                To(Step::OpensSession)
            }
            _ => {
                self.session(at).current = self.image(at).guid;
                self.session(at).word = Word::Open;
                To(Step::Serves)
            }
        }
    }

    fn snapshot(&mut self, slot: usize, step: Step, plant: Plant) -> Turn {
        let device = self.process(slot).device;
        match step {
            Step::MakesChild => {
                let (guid, era, size) = (self.new_guid(), self.new_era(), self.image(BASE).size);
                self.images[CHILD] =
                    Some(Image { guid, value: None, durable: None, lasts: false, logs: false, era, size });
                self.process(slot).locks[CHILD] = Lock::Writer;
                To(if plant == Plant::UnsyncedChild { Step::BeginsChild } else { Step::SyncsChild })
            }
            Step::SyncsChild => {
                self.make_durable(CHILD);
                To(Step::BeginsChild)
            }
            Step::BeginsChild => {
                self.begin(slot, CHILD);
                To(if plant == Plant::EarlyName { Step::NamesChild } else { Step::Freezes })
            }
            Step::Rests => {
                self.image(BASE).logs = false;
                self.session(BASE).word = Word::Idle;
                To(if plant == Plant::EarlyName { Step::Retires } else { Step::NamesChild })
            }
            Step::NamesChild => {
                self.entries[device].as_mut().expect("it is served").image = CHILD;
                self.session(CHILD).mark = Some(self.process(slot).mark);
                self.guest.leaf = CHILD;
                self.process(slot).image = CHILD;
                To(if plant == Plant::EarlyName { Step::Freezes } else { Step::Retires })
            }
            _ => {
                self.sessions[BASE] = None;
                let process = self.process(slot);
                process.locks[BASE] = Lock::Reader;
                process.writes = Some(CHILD);
                To(Step::Serves)
            }
        }
    }

    /// The disk that a daemon serves becomes larger, while the fronts are held.
    fn grow(&mut self, slot: usize, step: Step, plant: Plant) -> Turn {
        let Process { image: at, device, mark, .. } = *self.process(slot);
        match step {
            Step::Rests => {
                self.image(at).logs = false;
                if plant != Plant::GrowUnrested {
                    self.session(at).word = Word::Idle;
                }
                if plant == Plant::TellEarly {
                    self.tell_size(device, 1);
                }
                To(if plant == Plant::RenewEarly { Step::RenewsSession } else { Step::AnnouncesGrowth })
            }
            Step::AnnouncesGrowth => {
                self.session(at).current = self.image(at).guid;
                if plant != Plant::UnannouncedGrowth {
                    self.session(at).next = self.new_guid();
                }
                To(Step::NamesGrowth)
            }
            Step::NamesGrowth => {
                self.make_durable(at);
                let (era, announced) = (self.new_era(), self.session(at).next);
                let named = if plant == Plant::UnannouncedGrowth { self.new_guid() } else { announced };
                self.session(at).era = era;
                let image = self.image(at);
                (image.era, image.guid) = (era, named);
                To(Step::Enlarges)
            }
            Step::Enlarges => {
                let image = self.image(at);
                (image.size, image.logs) = (image.size + 1, true);
                To(Step::EndsEdit)
            }
            Step::EndsEdit => {
                self.image(at).logs = false;
                To(if plant == Plant::RenewEarly { Step::TellsSize } else { Step::RenewsSession })
            }
            Step::RenewsSession => {
                self.begin(slot, at);
                let early = u8::from(plant == Plant::RenewEarly);
                self.session(at).size += early;
                self.session(at).mark = Some(mark);
                To(if early == 1 { Step::AnnouncesGrowth } else { Step::TellsSize })
            }
            _ => {
                let size = self.image(at).size;
                self.tell_size(device, size);
                self.process(slot).grows = false;
                To(Step::Serves)
            }
        }
    }

    /// The kernel has the size of the disk, and its users with it.
    fn tell_size(&mut self, number: usize, size: u8) {
        self.device(number).size = size;
        self.guest.size = self.guest.size.max(size);
    }

    fn leave(&mut self, slot: usize, step: Step, plant: Plant) -> Turn {
        let Process { image: at, device, .. } = *self.process(slot);
        if step == Step::Settles {
            if self.session(at).word == Word::Open {
                self.commit(at);
                self.make_durable(at);
            }
            return To(Step::Leaves);
        }
        if plant == Plant::LeaveNothing {
            self.sessions[at] = None;
        }
        if self.device(device).state == State::Live {
            self.device(device).state = State::Quiesced;
        }
        self.kill(slot, plant);
        To(Step::Leaves)
    }

    /// `del`, from another process than the daemon.
    fn remove(&mut self, slot: usize, step: Step, plant: Plant) -> Turn {
        let Process { device: number, mark, .. } = *self.process(slot);
        match step {
            Step::StopsDevice => {
                let Some(daemon) = self.entry_of(number, mark).map(|entry| entry.daemon) else {
                    return Ends;
                };
                let serves = daemon.is_some_and(|daemon| !self.process(daemon).dying);
                if serves && self.guest.pending.is_some() {
                    return Waits;
                }
                if let Some(device) = self.devices[number].as_mut().filter(|device| device.mark == mark) {
                    device.state = State::Stopped;
                    self.guest.wants = false;
                }
                To(Step::AwaitsDaemon)
            }
            Step::AwaitsDaemon => match self.entry_of(number, mark) {
                Some(Entry { daemon: Some(_), .. }) => Waits,
                Some(&mut Entry { image, .. }) => {
                    // It is waited for until all its threads have ended, and so until its files are closed.
                    let holder = self.sessions[image].as_ref().and_then(|session| session.holder);
                    if holder.is_some_and(|holder| self.process(holder).dying) {
                        return Waits;
                    }
                    self.process(slot).image = image;
                    To(Step::RemovesRemains)
                }
                None => To(Step::Reports),
            },
            Step::RemovesRemains => match &self.devices[number] {
                Some(device) if device.mark == mark && device.server.is_some() => Waits,
                Some(device) if device.mark == mark => {
                    self.devices[number] = None;
                    To(if plant == Plant::EntryBeforeClose {
                        Step::RemovesLastEntry
                    } else {
                        Step::LocksToClose
                    })
                }
                _ => To(if plant == Plant::EntryBeforeClose {
                    Step::RemovesLastEntry
                } else {
                    Step::LocksToClose
                }),
            },
            Step::RemovesLastEntry => {
                if self.entry_of(number, mark).is_some() {
                    self.entries[number] = None;
                }
                To(if plant == Plant::EntryBeforeClose { Step::LocksToClose } else { Step::Reports })
            }
            Step::LocksToClose => self.lock_to_close(slot, plant),
            _ => {
                self.check_gone(slot);
                self.guest.meddled &= self.guest.wants;
                Ends
            }
        }
    }

    fn lock_to_close(&mut self, slot: usize, plant: Plant) -> Turn {
        let at = self.process(slot).image;
        let Some(session) = &self.sessions[at] else { return To(after_close(plant)) };
        let is_held = session.holder.is_some() || plant == Plant::CountOthers;
        let has_it = |number: usize| {
            let (Some(entry), Some(device)) = (&self.entries[number], &self.devices[number]) else {
                return false;
            };
            entry.image == at && device.mark == entry.mark && (is_held || self.is_abandoned(number))
        };
        if (0..DEVICES).any(has_it) {
            return To(after_close(plant));
        }
        if session.word == Word::Poisoned && session.holder.is_none() {
            self.sessions[at] = None;
            return To(after_close(plant));
        }
        if self.lock(slot, at) {
            return To(Step::Chooses);
        }
        // Those that are killed end; another command may have the image by now, and has its session.
        let ends = self.processes.iter().flatten().any(|other| other.dying && other.writes == Some(at));
        if ends { Waits } else { Ends }
    }

    /// `recover`, and the successor of an upgrade.
    fn recover(&mut self, slot: usize, step: Step, plant: Plant) -> Turn {
        let Process { image: at, device: number, mark, .. } = *self.process(slot);
        match step {
            Step::FindsDevice if !self.is_abandoned(number) => Ends,
            Step::FindsDevice => To(Step::LocksToRecover),
            Step::LocksToRecover => {
                if self.lock(slot, at) {
                    if at == CHILD && self.sessions[BASE].as_ref().is_some_and(|it| it.holder.is_none()) {
                        self.sessions[BASE] = None;
                    }
                    return To(Step::RefusesChanged);
                }
                let ends = self.processes.iter().flatten().any(|other| other.dying);
                if ends { Waits } else { Ends }
            }
            Step::RefusesChanged => match self.entry_of(number, mark) {
                Some(entry) if entry.image == at => To(Step::Chooses),
                _ => Ends,
            },
            Step::StartsRecovery => match &mut self.devices[number] {
                Some(device) if device.mark == mark && device.server.is_some() => Waits,
                Some(device) if device.mark == mark && device.state == State::Quiesced => {
                    device.server = Some(slot);
                    To(Step::NamesDaemon)
                }
                _ => Ends,
            },
            Step::NamesDaemon => match self.entry_of(number, mark) {
                Some(entry) => {
                    (entry.daemon, entry.started) = (Some(slot), false);
                    To(Step::EndsRecovery)
                }
                None => Ends,
            },
            Step::EndsRecovery if self.device(number).state != State::Quiesced => Ends,
            Step::EndsRecovery => {
                self.device(number).state = State::Live;
                let is_shorter = self.device(number).size < self.image(at).size;
                To(if is_shorter { Step::CatchesUp } else { Step::NotesStart })
            }
            Step::CatchesUp => {
                let size = self.image(at).size;
                self.tell_size(number, size);
                To(Step::NotesStart)
            }
            _ => self.succeed(slot, step, plant),
        }
    }

    /// The successor of a daemon that lives.
    fn succeed(&mut self, slot: usize, step: Step, plant: Plant) -> Turn {
        let Process { image: at, device: number, mark, .. } = *self.process(slot);
        let daemon = self.entry_of(number, mark).map(|entry| entry.daemon);
        let fails = self.sessions[at].as_ref().is_some_and(|session| session.word == Word::Poisoned);
        match (step, daemon) {
            (Step::LocksBeside, _) => {
                if !self.is_free(at, Lock::Beside, slot) {
                    return Ends;
                }
                self.process(slot).locks[at] = Lock::Beside;
                To(Step::RefusesEnded)
            }
            (_, None) | (Step::RefusesEnded, Some(None)) => Ends,
            (Step::RefusesEnded, Some(Some(_))) => To(Step::AsksDaemon),
            (Step::AsksDaemon, Some(Some(daemon))) => {
                let daemon = self.process(daemon);
                match daemon.step {
                    _ if daemon.dying => To(Step::AwaitsEnd),
                    Step::Serves if fails => Ends,
                    Step::Serves if daemon.image == at => {
                        daemon.step = Step::Settles;
                        To(if plant == Plant::EagerSuccessor { Step::TakesWriter } else { Step::AwaitsEnd })
                    }
                    Step::Serves
                    | Step::Stops
                    | Step::Commits
                    | Step::EndsLog
                    | Step::RemovesSession
                    | Step::Deletes
                    | Step::RemovesEntry
                    | Step::Exits => Ends,
                    _ => Waits,
                }
            }
            (Step::AsksDaemon, Some(None)) => To(Step::AwaitsEnd),
            (Step::AwaitsEnd, Some(Some(_))) => Waits,
            (Step::AwaitsEnd, Some(None)) => To(Step::TakesWriter),
            (Step::TakesWriter, _) => {
                let others = self.processes.iter().enumerate().filter(|(other, _)| *other != slot);
                let mut others = others.filter_map(|(_, other)| other.as_ref());
                if others.any(|other| other.locks[at] == Lock::Writer) && plant != Plant::EagerSuccessor {
                    return Waits;
                }
                let process = self.process(slot);
                (process.locks[at], process.writes) = (Lock::Writer, Some(at));
                if at == CHILD {
                    process.locks[BASE] = Lock::Reader;
                }
                To(Step::AwaitsSession)
            }
            _ => match &self.sessions[at] {
                Some(session) if session.holder.is_some() => Waits,
                _ => To(Step::Chooses),
            },
        }
    }

    fn device(&mut self, number: usize) -> &mut Device {
        self.devices[number].as_mut().expect("the device is there")
    }

    fn entry_of(&mut self, number: usize, mark: u8) -> Option<&mut Entry> {
        self.entries[number].as_mut().filter(|entry| entry.mark == mark)
    }
}

impl Device {
    /// The process `slot` no longer has its character device open.
    pub fn release(&mut self, slot: usize) {
        if self.server == Some(slot) {
            self.server = None;
            if self.state == State::Live {
                self.state = State::Quiesced;
            }
        }
    }
}

/// What a `del` does once the image is closed.
fn after_close(plant: Plant) -> Step {
    if plant == Plant::EntryBeforeClose { Step::Reports } else { Step::RemovesLastEntry }
}

fn is_of_image(step: Step) -> bool {
    use Step::{
        Announces, Begins, Changes, Chooses, Commits, Confirms, EndsLog, Locks, Reconciles, RefusesOrphan,
        RefusesParent, RemovesSession, Replays, Resizes, Surveys,
    };
    matches!(
        step,
        Locks
            | Surveys
            | RefusesOrphan
            | RefusesParent
            | Chooses
            | Confirms
            | Announces
            | Replays
            | Reconciles
            | Begins
            | Commits
            | EndsLog
            | RemovesSession
            | Changes
            | Resizes
    )
}

fn is_of_recovery(step: Step) -> bool {
    use Step::{
        AsksDaemon, AwaitsEnd, AwaitsSession, CatchesUp, EndsRecovery, FindsDevice, LocksBeside,
        LocksToRecover, NamesDaemon, RefusesChanged, RefusesEnded, StartsRecovery, TakesWriter,
    };
    matches!(
        step,
        AsksDaemon
            | AwaitsEnd
            | AwaitsSession
            | CatchesUp
            | EndsRecovery
            | FindsDevice
            | LocksBeside
            | LocksToRecover
            | NamesDaemon
            | RefusesChanged
            | RefusesEnded
            | StartsRecovery
            | TakesWriter
    )
}
