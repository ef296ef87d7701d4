//! A machine that a test has made: real processes of the program, one of which has its turn at a time.
//!
//! A process that is about to do what others can see asks for its turn, and the seed chooses who gets it. A
//! process may be killed instead. What a kill leaves is what the kernel below makes of it: files, locks and
//! memory are real; the driver, the clock and the nodes in `/dev` are the test's.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, Command as Program, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use tempfile::TempDir;
use vhdx_ublk::machine::VARIABLE;
use vhdx_ublk::simulation::{PLANT_VARIABLE, Plant};

use crate::driver::{Command, Driver, Effect, State as Kernel, Tag};
use crate::guest::{Guest, Stage};

/// How long a process that has its turn may take until its next step: longer, and it waits for another one.
const PATIENCE: Duration = Duration::from_millis(40);

/// How long the whole machine may do nothing until it counts as settled.
const QUIET: Duration = Duration::from_millis(30);

/// How often all processes must have been seen asleep, one time after the other, before time passes.
const RESTS: u32 = 3;

/// How long a run may take: longer, and it does not end.
const LONGEST: Duration = Duration::from_secs(60);

/// How long a process that does nothing may have something to do: longer, and the run is broken.
const STUCK: Duration = Duration::from_secs(30);

/// How much time a step takes, nanoseconds.
const STEP: u64 = 200_000;

/// The most steps of a run.
const MOST_STEPS: usize = 30_000;

/// What a process asks for.
#[derive(Clone, Debug)]
enum Ask {
    Turn(String),
    Pause(u64),
    Driver(Command),
    /// The driver begins with it only then.
    Hangs(u64, Command),
    /// The driver's answer is on its way until then.
    Answer(u64, Vec<u8>),
}

/// How the driver fails.
enum Fault {
    /// The command ends with this number and is not done, or has no answer.
    Refused(i32),
    /// It is done, and its answer is lost.
    Lost,
    /// Its answer comes after so long, nanoseconds.
    Late(u64),
    /// It is done after so long.
    Hangs(u64),
}

/// No answer comes.
const NO_ANSWER: i32 = i32::MIN;

/// The longest time that the driver is late, nanoseconds: shorter than any deadline of the program.
const LATEST: usize = 3_000_000_000;

/// What befalls a process at a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    Kill,
    /// It is asked to end.
    Terminate,
}

#[derive(Clone, Debug)]
enum State {
    /// It has had its turn then.
    Runs(Instant),
    Asks(Ask),
    /// It waits for what this child answers.
    Waits(u32),
    /// It waits for requests, signals and callers.
    Idles,
    Gone,
}

/// A process of the program.
pub struct Process {
    pub pid: u32,
    pub name: String,
    state: State,
    line: Option<UnixStream>,
    child: Option<Child>,
    /// It has locked an image, and the end of its rings may take a moment.
    locked: bool,
    /// It serves a device: its threads wait for requests, and the first one for what others want.
    idled: bool,
    pub struck: Option<Blow>,
    /// How it has ended.
    pub status: Option<i32>,
}

impl Process {
    /// It has ended by a signal that no one sent.
    pub fn child_failed(&self) -> bool {
        matches!(self.state, State::Gone)
            && self.child.is_some()
            && self.struck.is_none()
            && self.status.is_none()
    }
}

/// A thread that serves requests, and waits for its turns.
struct Thread {
    pid: u32,
    name: String,
    stream: UnixStream,
    /// What it asks for.
    step: Option<String>,
    /// Since when it may have something to do.
    runs: Option<Instant>,
}

/// The line of a tag.
struct TagLine {
    pid: u32,
    device: u32,
    place: (u16, u16),
    stream: UnixStream,
}

/// See the module's head.
pub struct Machine {
    pub folder: TempDir,
    listener: UnixListener,
    pub processes: Vec<Process>,
    tags: Vec<TagLine>,
    threads: Vec<Thread>,
    /// The threads that serve requests wait for their turns.
    pub in_flight: bool,
    pub driver: Driver,
    pub guest: Guest,
    rng: Rng,
    now: u64,
    plant: Option<Plant>,
    /// The images that the last entry of a device named, the leaf first.
    pub chain: Vec<PathBuf>,
    pub trace: VecDeque<String>,
    pub steps: usize,
    began: Instant,
    /// How many of them were of processes.
    pub asks: usize,
    /// What befalls the process whose step has this number, instead of the step or before it.
    pub blow: Option<(usize, Blow)>,
    /// Of so many commands of the driver one fails; none if it is zero.
    pub faults: usize,
    /// With what the driver refuses the next command.
    pub refusal: Option<i32>,
    /// None of them is more than a command that comes late, or that a signal has interrupted.
    pub harmless: bool,
    /// What the device's requests were said to do when its daemon is killed.
    pub recovery: &'static str,
    /// This process does not get its turn for this step.
    pub held: Option<(usize, &'static str)>,
    /// What must not be.
    pub broken: Option<String>,
    /// Devices whose server has gone, which the driver has not noticed.
    unnoticed: Vec<(u32, u32)>,
    /// Processes that may have had an image locked, and have just ended.
    ended: Vec<u32>,
}

/// What can happen next.
#[derive(Clone, Copy, Debug)]
enum Event {
    Step(usize),
    Serves(usize),
    Notices(usize),
    Sends(usize, usize),
}

/// Whether every thread of a process sleeps, those of its rings included.
fn sleeps(pid: u32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return true };
    threads.flatten().all(|thread| {
        let state = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // The name in parentheses may hold spaces.
        let state = state.rsplit(") ").next().and_then(|rest| rest.chars().next());
        matches!(state, None | Some('S' | 'I' | 'Z' | 'X'))
    })
}

/// Whether the process has ended: it may wait for its parent.
fn has_ended(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}

fn read_message(stream: &mut UnixStream) -> Option<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    stream.read_exact(&mut head).ok()?;
    let length = u32::from_ne_bytes(head[1..].try_into().expect("four bytes"));
    let mut text = vec![0; length as usize];
    stream.read_exact(&mut text).ok()?;
    Some((head[0], text))
}

impl Machine {
    pub fn new(seed: u64, features: u64, plant: Option<Plant>) -> Self {
        let folder = tempfile::Builder::new().prefix("vhdx-machine-").tempdir_in("/dev/shm").expect("room");
        let listener = UnixListener::bind(folder.path().join("machine")).expect("free");
        listener.set_nonblocking(true).expect("it can be");
        Self {
            driver: Driver::new(folder.path().into(), features),
            folder,
            listener,
            processes: Vec::new(),
            tags: Vec::new(),
            threads: Vec::new(),
            in_flight: false,
            guest: Guest::default(),
            rng: Rng::with_seed(seed),
            now: 0,
            plant,
            chain: Vec::new(),
            trace: VecDeque::new(),
            steps: 0,
            began: Instant::now(),
            asks: 0,
            faults: 0,
            refusal: None,
            harmless: false,
            recovery: "",
            blow: None,
            held: None,
            broken: None,
            unnoticed: Vec::new(),
            ended: Vec::new(),
        }
    }

    /// The image.
    pub fn image(&self) -> PathBuf {
        self.folder.path().join("disk.vhdx")
    }

    pub fn choose(&mut self, count: usize) -> usize {
        self.rng.usize(..count)
    }

    fn note(&mut self, line: impl std::fmt::Display) {
        if self.trace.len() == 400 {
            self.trace.pop_front();
        }
        self.trace.push_back(format!("{:6} {:9.4} s  {line}", self.steps, self.now as f64 / 1e9));
    }

    pub fn breaks(&mut self, rule: String) {
        self.note(format!("BROKEN: {rule}"));
        self.broken.get_or_insert(rule);
    }

    /// Starts the program with `words`.
    pub fn start(&mut self, words: &[&str]) -> usize {
        let number = self.processes.len();
        let output = |name: &str| File::create(self.folder.path().join(format!("{number}.{name}")));
        let mut program = Program::new(env!("CARGO_BIN_EXE_vhdx-ublk"));
        program.args(words).env_clear().env(VARIABLE, self.folder.path()).stdin(Stdio::null());
        program.stdout(output("out").expect("room")).stderr(output("err").expect("room"));
        if let Some(plant) = self.plant {
            program.env(PLANT_VARIABLE, format!("{plant:?}"));
        }
        let child = program.spawn().expect("it starts");
        let name = words.iter().take_while(|word| !word.contains('/')).copied().collect::<Vec<_>>().join(" ");
        self.note(format!("{number} {name}: starts"));
        self.add_process(child.id(), name);
        self.processes[number].child = Some(child);
        number
    }

    fn add_process(&mut self, pid: u32, name: String) -> usize {
        self.processes.push(Process {
            pid,
            name,
            state: State::Runs(Instant::now()),
            line: None,
            child: None,
            locked: false,
            idled: false,
            struck: None,
            status: None,
        });
        self.processes.len() - 1
    }

    fn number_of(&self, pid: u32) -> Option<usize> {
        self.processes.iter().position(|it| it.pid == pid && !matches!(it.state, State::Gone))
    }

    /// What a command has printed: its answer, and its errors.
    pub fn output(&self, number: usize) -> (String, String) {
        let read = |name: &str| {
            fs::read_to_string(self.folder.path().join(format!("{number}.{name}"))).unwrap_or_default()
        };
        (read("out"), read("err"))
    }

    pub fn is_gone(&self, number: usize) -> bool {
        matches!(self.processes[number].state, State::Gone)
    }

    /// The daemon that serves a device, if one does.
    pub fn server(&self) -> Option<usize> {
        self.driver.devices.values().find_map(|device| self.number_of(device.server?))
    }

    /// Takes what has come, for `patience` at most. Whether anything has.
    fn pump(&mut self, patience: Duration) -> bool {
        let mut fds = vec![PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        let lines: Vec<usize> =
            (0..self.processes.len()).filter(|&at| self.processes[at].line.is_some()).collect();
        for &at in &lines {
            let line = self.processes[at].line.as_ref().expect("it has one");
            fds.push(PollFd::new(line.as_fd(), PollFlags::POLLIN));
        }
        fds.extend(self.tags.iter().map(|tag| PollFd::new(tag.stream.as_fd(), PollFlags::POLLIN)));
        fds.extend(self.threads.iter().map(|it| PollFd::new(it.stream.as_fd(), PollFlags::POLLIN)));
        let patience = PollTimeout::try_from(patience).expect("a short time");
        if !poll(&mut fds, patience).is_ok_and(|count| count > 0) {
            return self.reap();
        }
        let ready: Vec<bool> =
            fds.iter().map(|fd| fd.revents().is_some_and(|events| !events.is_empty())).collect();
        drop(fds);
        for (&at, _) in lines.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
            self.hear_process(at);
        }
        let first = 1 + lines.len() + self.tags.len();
        let heard: Vec<usize> = (0..self.threads.len()).filter(|at| ready[first + at]).collect();
        heard.into_iter().rev().for_each(|at| self.hear_thread(at));
        let mut gone = Vec::new();
        for tag in (0..self.tags.len()).filter(|tag| ready[1 + lines.len() + tag]) {
            if !self.hear_tag(tag) {
                gone.push(tag);
            }
        }
        gone.into_iter().rev().for_each(|tag| self.tag_ends(tag));
        if ready[0] {
            self.accept();
        }
        true
    }

    /// Commands that have ended without having asked for anything.
    fn reap(&mut self) -> bool {
        let silent = |it: &Process| it.line.is_none() && !matches!(it.state, State::Gone);
        let ended: Vec<usize> = (0..self.processes.len())
            .filter(|&at| silent(&self.processes[at]) && has_ended(self.processes[at].pid))
            .collect();
        for &at in &ended {
            self.process_ends(at);
        }
        !ended.is_empty()
    }

    fn accept(&mut self) {
        let mut stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            Err(error) => panic!("{error}"),
        };
        stream.set_nonblocking(false).expect("it can be");
        let Some((kind, text)) = read_message(&mut stream) else { return };
        let word = |at: usize| u32::from_ne_bytes(text[at..at + 4].try_into().expect("four bytes"));
        let half = |at: usize| u16::from_ne_bytes([text[at], text[at + 1]]);
        let pid = word(0);
        if kind == b'T' {
            let (device, place) = (word(4), (half(8), half(10)));
            return self.tag_begins(TagLine { pid, device, place, stream });
        }
        if kind == b'B' {
            let name = String::from_utf8(text[4..].to_vec()).expect("words");
            return self.thread_begins(Thread { pid, name, stream, step: None, runs: None });
        }
        let number = self.number_of(pid).unwrap_or_else(|| {
            let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words = arguments.split('\0').skip(1).take(2).collect::<Vec<_>>().join(" ");
            self.add_process(pid, words)
        });
        self.processes[number].line = Some(stream);
        self.hear_process(number);
    }

    fn thread_begins(&mut self, mut thread: Thread) {
        let is_wanted = self.in_flight;
        let _ = thread.stream.write_all(&[u8::from(is_wanted)]); // its process may have gone
        if is_wanted {
            self.threads.push(thread);
        }
    }

    /// What a thread that serves requests asks for, or its end.
    fn hear_thread(&mut self, at: usize) {
        match read_message(&mut self.threads[at].stream) {
            Some((b't', text)) => {
                self.threads[at].step = Some(String::from_utf8(text).expect("words"));
                self.threads[at].runs = None;
            }
            _ => drop(self.threads.remove(at)),
        }
    }

    fn hear_process(&mut self, number: usize) {
        let line = self.processes[number].line.as_mut().expect("it has one");
        let Some((kind, text)) = read_message(line) else { return self.process_ends(number) };
        let pid = self.processes[number].pid;
        let state = match kind {
            b't' => State::Asks(Ask::Turn(String::from_utf8(text).expect("words"))),
            b's' => {
                let pause = u64::from_ne_bytes(text[..].try_into().expect("eight bytes"));
                State::Asks(Ask::Pause(self.now + pause))
            }
            b'c' => {
                let command = Command::parse(&text);
                self.driver.begin(&command);
                State::Asks(Ask::Driver(command))
            }
            b'i' => State::Idles,
            b'w' => {
                let child = u32::from_ne_bytes(text[..].try_into().expect("four bytes"));
                if self.number_of(child).is_none() && !has_ended(child) {
                    let name = format!("{}, its child", self.processes[number].name);
                    self.add_process(child, name);
                }
                State::Waits(child)
            }
            b'n' => return self.wake_parent(pid),
            _ => panic!("no such message"),
        };
        if matches!(&state, State::Asks(Ask::Turn(step)) if step == "locks an image") {
            self.processes[number].locked = true;
        }
        self.processes[number].idled |= matches!(state, State::Idles);
        self.processes[number].state = state;
    }

    /// Whoever waits for `pid` has a next step.
    fn wake_parent(&mut self, pid: u32) {
        for process in &mut self.processes {
            if matches!(process.state, State::Waits(child) if child == pid) {
                process.state = State::Runs(Instant::now());
            }
        }
    }

    fn process_ends(&mut self, number: usize) {
        let process = &mut self.processes[number];
        process.line = None;
        if matches!(process.state, State::Gone) {
            return;
        }
        process.state = State::Gone;
        let pid = process.pid;
        self.threads.retain(|thread| thread.pid != pid);
        let process = &mut self.processes[number];
        process.status = match &mut process.child {
            Some(child) => child.wait().ok().and_then(|status| status.code()),
            None => None,
        };
        let (status, until) = (process.status, Instant::now() + STUCK);
        while !has_ended(pid) {
            if Instant::now() >= until {
                return self.breaks(format!("process {number} has closed its line, and does not end"));
            }
            thread::sleep(Duration::from_micros(200));
        }
        let _ = waitpid(Pid::from_raw(pid.cast_signed()), Some(WaitPidFlag::WNOHANG)); // it may be another's
        self.note(format!("{number} ends: {status:?}"));
        self.wake_parent(pid);
        if self.processes[number].locked {
            self.ended.push(pid);
        }
    }

    /// A ring is taken down after its process, and keeps files open until then.
    fn await_unlocked(&mut self, pid: u32) {
        let until = Instant::now() + Duration::from_millis(200);
        while Instant::now() < until && self.tags.iter().any(|tag| tag.pid == pid) {
            self.pump(Duration::from_millis(5));
        }
        while Instant::now() < until && self.is_locked() {
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether a process has the image locked for writing.
    fn is_locked(&self) -> bool {
        let Ok(file) = File::open(self.image()) else { return false };
        let mut lock = libc::flock { l_type: 1, l_whence: 0, l_start: 300, l_len: 1, l_pid: 0 };
        let looked = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_GETLK(&mut lock));
        looked.is_ok() && i32::from(lock.l_type) != libc::F_UNLCK
    }

    fn tag_begins(&mut self, tag: TagLine) {
        let Some(device) = self.driver.devices.get_mut(&tag.device) else { return };
        if let Some(holder) = device.holder.filter(|holder| *holder != tag.pid) {
            let rule = format!("device {} has two servers, {holder} and {}", tag.device, tag.pid);
            return self.breaks(rule);
        }
        device.holder = Some(tag.pid);
        device.tags.insert(tag.place, Tag::Unfetched);
        self.tags.push(tag);
    }

    /// Takes what a server says of a tag. `false`: it has closed the device.
    fn hear_tag(&mut self, at: usize) -> bool {
        let line = &mut self.tags[at];
        let Some((kind, text)) = read_message(&mut line.stream) else { return false };
        let (pid, id, place) = (line.pid, line.device, line.place);
        let (result, data) = text.split_first_chunk().expect("a result");
        let result = i32::from_ne_bytes(*result);
        let Some(device) = self.driver.devices.get_mut(&id) else { return true };
        let before = device.tags.insert(place, Tag::Offered);
        let is_over =
            device.stopping || device.state == Kernel::Dead && device.server.is_none() && kind == b'D';
        match (kind, before) {
            (b'F', Some(Tag::Unfetched)) => {}
            (b'D', Some(Tag::Serves(number))) => {
                let completed = self.guest.complete(number, result, data);
                self.note(format!("request {number} is completed: {result}"));
                if let Err(rule) = completed {
                    self.breaks(rule);
                }
            }
            _ => self.breaks(format!("tag {place:?} of device {id} is offered as {before:?}")),
        }
        if is_over {
            self.driver.devices.get_mut(&id).expect("it is there").tags.insert(place, Tag::Ended);
            self.send_tag(id, place, -libc::ENODEV, &[]);
        }
        // Its threads do this by themselves.
        if !self.in_flight
            && let Some(number) = self.number_of(pid)
            && matches!(self.processes[number].state, State::Runs(_))
            && kind == b'D'
        {
            self.processes[number].state = State::Idles;
        }
        true
    }

    fn tag_ends(&mut self, at: usize) {
        let TagLine { pid, device, .. } = self.tags.remove(at);
        let is_last = !self.tags.iter().any(|tag| (tag.pid, tag.device) == (pid, device));
        if is_last {
            self.unnoticed.push((pid, device));
        }
    }

    fn send_tag(&mut self, id: u32, place: (u16, u16), result: i32, data: &[u8]) {
        let Some(tag) = self.tags.iter_mut().find(|tag| (tag.device, tag.place) == (id, place)) else {
            return;
        };
        let mut text = result.to_ne_bytes().to_vec();
        text.extend(u32::try_from(data.len()).expect("short").to_ne_bytes());
        text.extend(data);
        let pid = tag.pid;
        let _ = tag.stream.write_all(&text); // its process may have gone
        let name = format!("queue {}", place.0);
        if let Some(thread) = self.threads.iter_mut().find(|it| it.pid == pid && it.name == name) {
            thread.runs = Some(Instant::now());
        } else if let Some(number) = self.number_of(pid)
            && matches!(self.processes[number].state, State::Idles)
        {
            self.processes[number].state = State::Runs(Instant::now());
        }
    }

    fn happen(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::FailServed(device) => self.guest.fail_served(device),
                Effect::Abort(device, place) => self.send_tag(device, place, -libc::ENODEV, &[]),
                Effect::Fail(device) => self.guest.fail(device),
                Effect::Serves(device) => self.note(format!("device {device} is served")),
            }
        }
    }

    /// Whether a process is where it is held.
    pub fn is_held(&self) -> bool {
        self.held.is_some_and(|(number, step)| self.asks_for(number, step))
    }

    fn asks_for(&self, number: usize, step: &str) -> bool {
        matches!(&self.processes[number].state, State::Asks(Ask::Turn(asked)) if asked == step)
    }

    /// What can happen now.
    fn events(&self) -> Vec<Event> {
        let is_ready = |ask: &Ask| match ask {
            Ask::Turn(_) => true,
            Ask::Pause(until) | Ask::Answer(until, _) => *until <= self.now,
            Ask::Hangs(until, command) => *until <= self.now && self.driver.is_ready(command),
            Ask::Driver(command) => self.driver.is_ready(command),
        };
        let steps = (0..self.processes.len())
            .filter(|&at| matches!(&self.processes[at].state, State::Asks(ask) if is_ready(ask)))
            .filter(|&at| !(self.is_held() && self.held.is_some_and(|(held, _)| held == at)))
            .map(Event::Step);
        let serves = (0..self.threads.len()).filter(|&at| self.threads[at].step.is_some()).map(Event::Serves);
        let is_closed =
            |device: &u32| self.driver.devices.get(device).is_none_or(|device| device.character_openers == 0);
        let notices = (0..self.unnoticed.len()).filter(|&at| is_closed(&self.unnoticed[at].1));
        let notices = notices.map(Event::Notices);
        let requests = self.guest.requests.iter().enumerate().filter_map(|(number, request)| {
            let device = self.driver.devices.get(&request.device)?;
            let is_served = device.state == Kernel::Live && !device.stopping && !device.pausing;
            let tag = self.tags.iter().position(|tag| {
                tag.device == request.device && device.tags.get(&tag.place) == Some(&Tag::Offered)
            })?;
            (request.stage == Stage::Queued && is_served).then_some(Event::Sends(number, tag))
        });
        steps.chain(notices).chain(requests).chain(serves).collect()
    }

    /// Waits until every thread that has had its turn has its next step, or sleeps, and so do all others of
    /// its process: one may have given another something to do.
    fn settle_threads(&mut self) {
        while let Some(at) = (0..self.threads.len()).find(|&at| self.threads[at].runs.is_some()) {
            let (pid, since) = (self.threads[at].pid, self.threads[at].runs.expect("it runs"));
            if !self.pump(Duration::from_micros(500)) && (sleeps(pid) || since.elapsed() > PATIENCE) {
                while self.pump(Duration::ZERO) {}
                let of_process = self.threads.iter_mut().filter(|it| it.pid == pid);
                of_process.for_each(|thread| thread.runs = None);
            }
        }
    }

    /// Waits until every process that has had its turn has its next step, or waits.
    fn settle_turn(&mut self) {
        self.settle_threads();
        while let Some(pid) = self.ended.pop() {
            self.await_unlocked(pid);
        }
        loop {
            let runs = |it: &Process| matches!(it.state, State::Runs(since) if since.elapsed() < PATIENCE);
            if !self.processes.iter().any(runs) {
                while self.pump(Duration::ZERO) {}
                if !self.processes.iter().any(runs) {
                    let mut served = self.processes.iter_mut().filter(|it| it.idled);
                    // The step was that of a thread of its own.
                    served.by_ref().filter(|it| matches!(it.state, State::Runs(_))).for_each(|it| {
                        it.state = State::Idles;
                    });
                    return;
                }
            }
            self.pump(Duration::from_millis(5));
        }
    }

    /// One event, which the seed chooses. `false`: nothing can happen.
    pub fn step(&mut self) -> bool {
        self.settle_turn();
        self.look_at_entries();
        let fails = self.driver.devices.values().filter(|device| device.state == Kernel::FailIo);
        fails.for_each(|device| self.guest.fail(device.id));
        let mut events = self.events();
        if events.is_empty() {
            if self.await_rest() {
                return true;
            }
            let due = |it: &Process| match &it.state {
                State::Asks(Ask::Pause(until) | Ask::Hangs(until, _) | Ask::Answer(until, _)) => Some(*until),
                _ => None,
            };
            match self.processes.iter().filter_map(due).filter(|due| *due > self.now).min() {
                Some(due) => self.now = due,
                None => return self.await_any(),
            }
            events = self.events();
        }
        if self.steps >= MOST_STEPS || self.began.elapsed() > LONGEST {
            self.breaks("the run does not end".into());
            return false;
        }
        let mut event = events[self.choose(events.len())];
        // The kernel takes its time, so that a device is often taken over before it was closed.
        if matches!(event, Event::Notices(_)) && self.choose(8) != 0 {
            event = events[0];
        }
        self.steps += 1;
        self.now += STEP;
        match event {
            Event::Step(number) => {
                self.asks += 1;
                match self.blow.filter(|(step, _)| *step == self.asks) {
                    Some((_, Blow::Kill)) => self.kill(number),
                    Some((_, Blow::Terminate)) => {
                        self.terminate(number);
                        self.grant(number);
                    }
                    None => self.grant(number),
                }
            }
            Event::Serves(at) => self.serve(at),
            Event::Notices(at) => self.notice(at),
            Event::Sends(number, tag) => self.send_request(number, tag),
        }
        true
    }

    /// Which images the device has: a snapshot changes that when the entry changes.
    fn look_at_entries(&mut self) {
        for id in self.driver.devices.keys() {
            let Ok(text) = fs::read_to_string(self.folder.path().join(format!("{id}.json"))) else {
                continue;
            };
            let Ok(entry) = serde_json::from_str::<serde_json::Value>(&text) else { continue };
            let parents = entry["parents"].as_array().cloned().unwrap_or_default();
            let images = std::iter::once(&entry["image"]).chain(&parents);
            let images: Vec<_> = images.filter_map(|path| path.as_str().map(PathBuf::from)).collect();
            if images.contains(&self.image()) {
                self.chain = images;
            }
        }
    }

    /// Has a thread do its step, unless its process is killed there.
    fn serve(&mut self, at: usize) {
        self.asks += 1;
        let Thread { pid, name, .. } = &self.threads[at];
        let number = self.number_of(*pid);
        let name = format!("{} {name}", number.map_or(0, |number| number));
        let step = self.threads[at].step.take().expect("it asks");
        if self.blow == Some((self.asks, Blow::Kill))
            && let Some(number) = number
        {
            self.note(format!("{name}: KILLED before it {step}"));
            return self.kill(number);
        }
        self.note(format!("{name}: {step}"));
        let thread = &mut self.threads[at];
        thread.runs = Some(Instant::now());
        let _ = thread.stream.write_all(&[1]); // it may have ended
    }

    /// Waits until no process has anything to do: on a loaded machine it may take long for that, and no time
    /// may pass for the others meanwhile. `true`: one has said something.
    fn await_rest(&mut self) -> bool {
        let until = Instant::now() + STUCK;
        let mut seen = 0;
        while seen < RESTS && Instant::now() < until {
            if self.pump(Duration::from_millis(2)) {
                return true;
            }
            let acts = |it: &Process| !matches!(it.state, State::Gone | State::Asks(_));
            let rests = self.processes.iter().filter(|it| acts(it)).all(|it| sleeps(it.pid));
            seen = if rests { seen + 1 } else { 0 };
        }
        false
    }

    /// Waits for what takes a process long. `false`: nothing is under way.
    fn await_any(&mut self) -> bool {
        let until = Instant::now() + STUCK;
        loop {
            let works = |it: &Process| matches!(it.state, State::Runs(_) | State::Waits(_));
            if self.pump(QUIET) || self.threads.iter().any(|thread| thread.step.is_some()) {
                return true;
            }
            let is_served = self.guest.requests.iter().any(|request| {
                request.stage == Stage::Served
                    && self.driver.devices.get(&request.device).is_some_and(|device| device.server.is_some())
            });
            if !is_served && !self.processes.iter().any(works) {
                return false;
            }
            if Instant::now() >= until {
                self.breaks("a process, or a request, waits for ever".into());
                return false;
            }
        }
    }

    /// How the driver fails a command: as the test wants, or by chance.
    fn fault(&mut self) -> Option<Fault> {
        if let Some(errno) = self.refusal.take() {
            return Some(Fault::Refused(-errno));
        }
        if self.faults == 0 || self.choose(self.faults) != 0 {
            return None;
        }
        let refusals = [-libc::EINTR, -libc::EIO, -libc::EBUSY, -libc::EINVAL, NO_ANSWER];
        let time = self.choose(LATEST) as u64;
        let kinds = if self.harmless { 3 } else { 8 };
        Some(match self.choose(kinds) {
            0 if self.harmless => Fault::Refused(-libc::EINTR),
            0 => Fault::Lost,
            1 => Fault::Late(time),
            2 => Fault::Hangs(time),
            other => Fault::Refused(refusals[other - 3]),
        })
    }

    /// The driver gets a command. Its answer, unless that comes later.
    fn command(&mut self, number: usize, command: &Command, effects: &mut Vec<Effect>) -> Option<Vec<u8>> {
        let fault = self.fault();
        let (code, payload, late) = match fault {
            Some(Fault::Hangs(time)) => {
                let name = self.processes[number].name.clone();
                self.note(format!("{number} {name}: {} {} hangs", command.name(), command.device));
                let until = self.now + time;
                self.processes[number].state = State::Asks(Ask::Hangs(until, command.clone()));
                return None;
            }
            Some(Fault::Refused(code)) => {
                if code == -libc::EBUSY && command.pauses() {
                    self.driver.pause(command.device);
                }
                self.withdraw(command);
                (code, Vec::new(), None)
            }
            fault => match self.driver.execute(command, effects) {
                _ if matches!(fault, Some(Fault::Lost)) => (NO_ANSWER, Vec::new(), None),
                Ok(payload) => (0, payload, fault),
                Err(errno) => (-errno, Vec::new(), fault),
            },
        };
        let name = self.processes[number].name.clone();
        self.note(format!("{number} {name}: {} {}: {code}", command.name(), command.device));
        let answer: Vec<u8> = code.to_ne_bytes().into_iter().chain(payload).collect();
        let Some(Fault::Late(time)) = late else { return Some(answer) };
        let until = self.now + time;
        self.processes[number].state = State::Asks(Ask::Answer(until, answer));
        None
    }

    fn notice(&mut self, at: usize) {
        let (pid, device) = self.unnoticed.remove(at);
        self.note(format!("the driver notices that device {device} was closed"));
        if self.driver.devices.get(&device).is_some_and(|device| device.holder == Some(pid)) {
            let was_served = self.driver.devices[&device].state == Kernel::Live;
            let mut effects = Vec::new();
            self.driver.release(device, &mut effects);
            if was_served && self.driver.devices.get(&device).is_some_and(|it| it.recovery() != self.recovery)
            {
                self.breaks(format!("requests do not {} after a kill, as they were to", self.recovery));
            }
            self.happen(effects);
            self.guest.repeat(device);
        }
    }

    fn send_request(&mut self, number: usize, tag: usize) {
        let (id, place) = (self.tags[tag].device, self.tags[tag].place);
        let op = self.guest.requests[number].op;
        self.note(format!("request {number} is sent: {op:?}"));
        self.guest.requests[number].stage = Stage::Served;
        let device = self.driver.devices.get_mut(&id).expect("it is there");
        let (code, sector, sectors) = op.describe();
        device.describe(place, code, sector, sectors);
        device.tags.insert(place, Tag::Serves(number));
        self.send_tag(id, place, 0, &op.data());
    }

    fn grant(&mut self, number: usize) {
        let before = std::mem::replace(&mut self.processes[number].state, State::Runs(Instant::now()));
        let State::Asks(ask) = before else { panic!("it asks for nothing") };
        let mut effects = Vec::new();
        let answer = match ask {
            Ask::Turn(step) => {
                let name = self.processes[number].name.clone();
                self.note(format!("{number} {name}: {step}"));
                Some(Vec::new())
            }
            Ask::Pause(_) => Some(Vec::new()),
            Ask::Answer(_, answer) => Some(answer),
            Ask::Driver(command) | Ask::Hangs(_, command) => self.command(number, &command, &mut effects),
        };
        if let Some(answer) = answer {
            self.answer(number, answer);
        }
        self.happen(effects);
    }

    fn answer(&mut self, number: usize, answer: Vec<u8>) {
        let mut text = self.now.to_ne_bytes().to_vec();
        text.extend(u32::try_from(answer.len()).expect("short").to_ne_bytes());
        text.extend(answer);
        let line = self.processes[number].line.as_mut().expect("it has one");
        let _ = line.write_all(&text); // it may have ended
    }

    /// Kills a process, and waits until the kernel has taken it down.
    pub fn kill(&mut self, number: usize) {
        let (pid, name) = (self.processes[number].pid, self.processes[number].name.clone());
        self.note(format!("{number} {name}: KILLED before {:?}", self.processes[number].state));
        self.processes[number].struck = Some(Blow::Kill);
        let before = std::mem::replace(&mut self.processes[number].state, State::Runs(Instant::now()));
        if let State::Asks(Ask::Driver(command) | Ask::Hangs(_, command)) = before {
            self.lose(&command);
        }
        let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL); // it may have ended
        if let Some(child) = &mut self.processes[number].child {
            let _ = child.wait();
        }
        while !has_ended(pid) {
            thread::sleep(Duration::from_micros(200));
        }
        self.process_ends(number);
    }

    /// The sender of a command dies, and the driver may have got it.
    fn lose(&mut self, command: &Command) {
        if self.choose(2) == 0 && self.driver.is_ready(command) {
            let mut effects = Vec::new();
            let done = self.driver.execute(command, &mut effects).is_ok();
            self.note(format!("{} {} is done all the same: {done}", command.name(), command.device));
            self.happen(effects);
        } else {
            self.withdraw(command);
        }
    }

    /// The driver has not done `command`, and stops nothing because of it.
    fn withdraw(&mut self, command: &Command) {
        let is_asked = |it: &Process| {
            matches!(&it.state, State::Asks(Ask::Driver(other) | Ask::Hangs(_, other))
                if other.device == command.device && other.stops())
        };
        if command.stops() && !self.processes.iter().any(is_asked) {
            self.driver.continues(command.device);
        }
    }

    /// Asks a process to end.
    pub fn terminate(&mut self, number: usize) {
        self.note(format!("{number}: SIGTERM"));
        self.processes[number].struck = Some(Blow::Terminate);
        let pid = Pid::from_raw(self.processes[number].pid.cast_signed());
        let _ = kill(pid, Signal::SIGTERM); // it may have ended
        if matches!(self.processes[number].state, State::Idles) {
            self.processes[number].state = State::Runs(Instant::now());
        }
        // A thread of its own takes the signal, also while the process waits for its turn.
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            thread::sleep(Duration::from_millis(2));
            if sleeps(self.processes[number].pid) {
                return;
            }
        }
    }

    /// Lets everything happen that can.
    pub fn settle(&mut self) {
        while self.broken.is_none() && self.step() {}
    }

    /// Runs a command to its end, among all that happens.
    pub fn run(&mut self, words: &[&str]) -> usize {
        let number = self.start(words);
        while self.broken.is_none() && !self.is_gone(number) {
            if !self.step() && !self.is_gone(number) {
                self.breaks(format!("{number} does not end"));
            }
        }
        number
    }

    /// Ends all that is left of the run.
    pub fn end(&mut self) {
        for process in &mut self.processes {
            if !matches!(process.state, State::Gone) {
                let _ = kill(Pid::from_raw(process.pid.cast_signed()), Signal::SIGKILL); // it may have ended
            }
            if let Some(child) = &mut process.child {
                let _ = child.wait();
            }
            let _ = waitpid(Pid::from_raw(process.pid.cast_signed()), Some(WaitPidFlag::WNOHANG));
        }
    }
}
