//! The device's event loop: queues, signals and the control socket report on one channel, on which the
//! device's thread waits. All queues are started, watched, drained and ended together.
//!
//! Order on the way down: *settled* (every queue that was started has begun or has failed to), then the
//! kernel stops the device, then *drained*, then *finished*. A queue that offered its tags only after the
//! stop would never get them back: older kernels, such as 6.12, accept them.
//!
//! A request to end is noted in a file before anything is made of it, and the device's end removes that. So
//! the next daemon learns what this one was asked, whether the device is handed over to it or this one is
//! killed.

use std::os::fd::AsFd;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};

use super::confine::{self, Role};
use super::ending::Happening;
use super::handover;
use super::order::Call;
use super::queue::{Queue, QueueSetup, Report};
use super::registry::EndRequest;
use super::{sys, usage};
use crate::error::{Doing, Error, Kind, Result};
use crate::machine;

/// How long the queues may take to be ready. Only a hang, or a machine that starves, takes this long.
const READY_DEADLINE: Duration = Duration::from_secs(60);

/// How long a queue may take to drain once the kernel has stopped the device: nothing is left to wait for.
const DRAIN_DEADLINE: Duration = Duration::from_secs(30);

/// The first process of a system, which may be a service manager.
const INIT: u32 = 1;

/// What the device's thread waits for.
enum Event {
    Happening(Happening),
    Queue(u16, Report),
    Call(Call),
}

/// What the device's thread must act on while it serves.
pub(super) enum Demand {
    Call(Call),
    Happening(Happening),
    /// Another process has stopped the device.
    Stopped,
}

/// See the module's head.
pub(super) struct Supervisor {
    sender: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    queues: Vec<Queue>,
    /// Queues that have not yet reported whether they are ready.
    starting: usize,
    /// Queues that have drained, or never began.
    drained: usize,
    /// Queues that have left their device to the next process.
    left: usize,
    /// A queue has failed: its requests end with the process and not before.
    failed: bool,
    signals: Arc<Signals>,
}

/// The signals that request something.
struct Signals {
    descriptor: SignalFd,
    /// Where a request to end is noted, as long as the device needs that. Whoever takes a signal holds this
    /// until it is noted: this process may end as soon as no other thread has one in hand.
    note: Mutex<Option<EndRequest>>,
}

impl Signals {
    /// The signals, which are blocked here and in every thread started later.
    fn block() -> Result<Self> {
        let requests = SigSet::from_iter(sys::REQUESTS);
        requests.thread_block().doing("blocking signals")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let descriptor = SignalFd::with_flags(&requests, flags).doing("receiving signals")?;
        Ok(Self { descriptor, note: Mutex::default() })
    }

    fn note(&self) -> MutexGuard<'_, Option<EndRequest>> {
        self.note.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for signals.
    fn wait(&self) -> bool {
        loop {
            match poll(&mut [PollFd::new(self.descriptor.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                polled => return polled.is_ok(),
            }
        }
    }

    /// Takes what has come, and notes a request to end.
    fn take(&self) -> Vec<siginfo> {
        let note = self.note();
        let taken: Vec<siginfo> =
            std::iter::from_fn(|| self.descriptor.read_signal().ok().flatten()).collect();
        if let Some(request) = &*note
            && taken.iter().any(|signal| matches!(meaning(signal), Happening::EndRequested { .. }))
        {
            request.note();
        }
        taken
    }
}

impl Supervisor {
    /// A supervisor without queues. Signals that request something are events from now on.
    pub(super) fn new() -> Result<Self> {
        let (sender, events) = mpsc::channel();
        let signals = Arc::new(Signals::block()?);
        watch_signals(sender.clone(), Arc::clone(&signals))?;
        let (queues, failed) = (Vec::new(), false);
        Ok(Self { sender, events, queues, starting: 0, drained: 0, left: 0, failed, signals })
    }

    /// Notes requests to end as `request` from now on.
    pub(super) fn note_requests(&self, request: EndRequest) {
        *self.signals.note() = Some(request);
    }

    /// Notes no more of them: the number of the device may be another one's soon.
    pub(super) fn note_no_requests(&self) {
        *self.signals.note() = None;
    }

    /// Notes what has come and was not taken yet: this process ends, and the device does not.
    pub(super) fn note_last_requests(&self) {
        self.signals.take();
    }

    /// Acts on what the daemon before was asked.
    pub(super) fn continue_to_end(&self) {
        // It is received here.
        let _ = self.sender.send(Event::Happening(Happening::AskedBefore));
    }

    /// Starts a queue.
    pub(super) fn start(&mut self, setup: QueueSetup) -> Result<()> {
        let (sender, queue) = (self.sender.clone(), setup.ring.queue);
        let report = move |report| {
            // The device's thread receives until every queue is over, or the process ends.
            let _ = sender.send(Event::Queue(queue, report));
        };
        self.queues.push(Queue::start(setup, report)?);
        self.starting += 1;
        Ok(())
    }

    /// Waits until every queue is ready. An error if one is not, or if a signal asks for the end, unless the
    /// process `takes_over` a device that may be in use: then that is the first demand.
    pub(super) fn await_ready(&mut self, takes_over: bool) -> Result<()> {
        let until = Instant::now() + READY_DEADLINE;
        let mut requests = Vec::new();
        while self.starting > 0 {
            match self.next(Some(until))? {
                Event::Queue(_, Report::Unready(error) | Report::Failed(error)) => return Err(error),
                Event::Queue(queue, Report::Drained) => {
                    let message = format!("queue {queue} was stopped before the device was up");
                    return Err(Error::new(Kind::Io, message));
                }
                Event::Happening(request @ Happening::EndRequested { .. }) if takes_over => {
                    requests.push(request);
                }
                Event::Happening(Happening::EndRequested { .. }) => {
                    let message = "a signal asked the daemon to end before the device was up";
                    return Err(Error::new(Kind::Io, message));
                }
                Event::Queue(_, Report::Ready) | Event::Happening(_) => {}
                Event::Call(_) => panic!("the socket is made when the queues are ready"),
                Event::Queue(queue, Report::Left) => panic!("queue {queue} was not asked to leave"),
            }
        }
        for request in requests {
            // It is received here.
            let _ = self.sender.send(Event::Happening(request));
        }
        Ok(())
    }

    /// Passes calls on to the device's thread.
    pub(super) fn caller(&self) -> impl Fn(Call) + Clone + Send + 'static {
        let sender = self.sender.clone();
        move |call| {
            // After the device's end nothing receives it; the caller notices that its call was dropped.
            let _ = sender.send(Event::Call(call));
        }
    }

    /// Waits for the next demand, or until `due`, which is [`Happening::Time`]. An error if the device must
    /// be taken down because of a failure.
    pub(super) fn next_demand(&mut self, due: Option<Instant>) -> Result<Demand> {
        machine::idles();
        let event = self.next_before(due);
        machine::turn("has something to act on");
        let Some(event) = event else { return Ok(Demand::Happening(Happening::Time)) };
        match event {
            Event::Call(call) => Ok(Demand::Call(call)),
            Event::Happening(happening) => Ok(Demand::Happening(happening)),
            Event::Queue(_, Report::Drained) => Ok(Demand::Stopped),
            Event::Queue(_, Report::Failed(error)) => Err(error),
            Event::Queue(queue, Report::Ready | Report::Unready(_)) => {
                panic!("queue {queue} has begun before")
            }
            Event::Queue(queue, Report::Left) => panic!("queue {queue} was not asked to leave"),
        }
    }

    /// Finds the users of device `id`, on another thread, as that may take long. The result is a demand.
    pub(super) fn find_users(&self, id: u32) {
        let sender = self.sender.clone();
        let find = move || {
            let users = usage::of_device(id);
            let users = users.lasting.into_iter().chain(users.passing).collect();
            // The device may be down by now.
            let _ = sender.send(Event::Happening(Happening::UsersFound(users)));
        };
        if let Err(error) = thread::Builder::new().name("ublk-usage".into()).spawn(find) {
            self.have_found(vec![format!("its users cannot be found: {error}")]);
        }
    }

    /// These users of the device are the next demand.
    pub(super) fn have_found(&self, users: Vec<String>) {
        // It is received here.
        let _ = self.sender.send(Event::Happening(Happening::UsersFound(users)));
    }

    /// Waits until every queue that was started has begun, or has failed to.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.work_off(READY_DEADLINE, |queues| queues.starting == 0)
    }

    /// Has every request fail that waits for room, now and from now on: the kernel, which is about to stop
    /// the device, waits for them.
    pub(super) fn end_waits(&self) {
        self.queues.iter().for_each(Queue::end_waits);
    }

    /// Waits until every queue has drained. The kernel has stopped the device.
    pub(super) fn drain(&mut self) -> Result<()> {
        self.work_off(DRAIN_DEADLINE, |queues| queues.drained == queues.queues.len())
    }

    /// Ends all queues, which have drained, and waits for their end.
    pub(super) fn finish(&mut self) {
        assert_eq!(self.drained, self.queues.len(), "queues are finished when they have drained");
        self.queues.drain(..).for_each(Queue::finish);
        self.drained = 0;
    }

    /// Has every queue of a device that the kernel has quiesced complete what it serves, and waits for that.
    /// Then nothing is under way, and the queues answer the engine, which does what `settle` does, until
    /// they hold nothing of the image.
    pub(super) fn hand_over(&mut self, settle: impl FnOnce() -> Result<()>) -> Result<()> {
        self.queues.iter().for_each(Queue::hand_over);
        self.drain()?;
        handover::note("requests are completed");
        settle()?;
        handover::note("they are synced");
        self.queues.iter().for_each(Queue::leave);
        self.work_off(DRAIN_DEADLINE, |queues| queues.left == queues.queues.len())?;
        handover::note("they hold nothing");
        Ok(())
    }

    /// Takes events until `is_done`. A queue that fails is an error. Everything else is only counted, also
    /// signals and calls: the device is being taken down already.
    fn work_off(&mut self, deadline: Duration, is_done: impl Fn(&Self) -> bool) -> Result<()> {
        let until = Instant::now() + deadline;
        while !self.failed && !is_done(self) {
            if let Event::Queue(_, Report::Failed(error)) = self.next(Some(until))? {
                return Err(error);
            }
        }
        if self.failed {
            let message = "a queue has failed, and its requests end only with this process";
            return Err(Error::new(Kind::Io, message));
        }
        Ok(())
    }

    /// The next event, counted.
    fn next(&mut self, until: Option<Instant>) -> Result<Event> {
        self.next_before(until).ok_or_else(|| Error::new(Kind::Io, "the queues did not answer in time"))
    }

    /// The next event, counted; none if `until` comes first.
    fn next_before(&mut self, until: Option<Instant>) -> Option<Event> {
        let event = match until {
            None => self.events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(until) => self.events.recv_timeout(until.saturating_duration_since(Instant::now())),
        };
        let event = match event {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => return None,
            Err(RecvTimeoutError::Disconnected) => unreachable!("a sender is held here"),
        };
        if let Event::Queue(queue, Report::Ready | Report::Unready(_)) = &event {
            assert!(self.starting > 0, "queue {queue} has begun before");
        }
        match event {
            Event::Queue(_, Report::Ready) => self.starting -= 1,
            Event::Queue(_, Report::Unready(_)) => {
                self.starting -= 1;
                self.drained += 1;
            }
            Event::Queue(_, Report::Drained) => self.drained += 1,
            Event::Queue(_, Report::Left) => self.left += 1,
            Event::Queue(_, Report::Failed(_)) => self.failed = true,
            Event::Happening(_) | Event::Call(_) => {}
        }
        Some(event)
    }
}

/// Has one thread turn the `signals` into events.
fn watch_signals(sender: mpsc::Sender<Event>, signals: Arc<Signals>) -> Result<()> {
    let watch = move || {
        confine::become_(Role::Plain);
        while signals.wait() {
            for signal in signals.take() {
                let (happening, number, pid) = (meaning(&signal), signal.ssi_signo, signal.ssi_pid);
                tracing::info!("signal {number} from process {pid}: {happening:?}");
                if sender.send(Event::Happening(happening)).is_err() {
                    return;
                }
            }
        }
    };
    let thread = thread::Builder::new().name("ublk-signals".into()).spawn(watch);
    thread.map(drop).doing("starting the thread for signals")
}

fn meaning(signal: &siginfo) -> Happening {
    let hangup = u32::try_from(Signal::SIGHUP as i32).expect("signals are counted from one");
    match signal.ssi_signo {
        number if number == hangup => Happening::HungUp,
        _ => Happening::EndRequested { by_init: signal.ssi_pid == INIT },
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::raise;

    use super::super::registry::Registry;
    use super::*;

    const ASKED: Happening = Happening::EndRequested { by_init: true };

    /// A supervisor of `starting` queues, which have no threads, and their reports.
    fn supervisor(starting: usize, reports: impl IntoIterator<Item = Report>) -> Supervisor {
        let (sender, events) = mpsc::channel();
        for report in reports {
            sender.send(Event::Queue(0, report)).expect("the receiver is here");
        }
        let signals = Arc::new(Signals::block().expect("this thread may block them"));
        Supervisor {
            sender,
            events,
            queues: Vec::new(),
            starting,
            drained: 0,
            left: 0,
            failed: false,
            signals,
        }
    }

    fn failure() -> Error {
        Error::new(Kind::Io, "no")
    }

    #[test]
    fn the_device_is_up_when_every_queue_is_ready() {
        let mut both = supervisor(2, [Report::Ready, Report::Ready]);
        assert!(both.await_ready(false).is_ok());
        assert_eq!((both.starting, both.drained), (0, 0));
    }

    #[test]
    fn a_queue_that_cannot_begin_is_reported_and_no_longer_waited_for() {
        let mut both = supervisor(2, [Report::Unready(failure()), Report::Ready, Report::Drained]);
        assert_eq!(both.await_ready(false).expect_err("one is not ready").to_string(), "no");
        both.settle().expect("the other one has begun");
        assert_eq!((both.starting, both.drained), (0, 1));
        both.next(None).expect("drained");
        assert_eq!(both.drained, 2);
    }

    #[test]
    fn a_queue_that_fails_is_an_error_at_any_time() {
        assert!(supervisor(1, [Report::Failed(failure())]).await_ready(false).is_err());
        assert!(supervisor(1, [Report::Failed(failure())]).settle().is_err());
        let mut up = supervisor(0, [Report::Failed(failure())]);
        assert!(up.next_demand(None).is_err());
        assert!(
            up.settle().is_err(),
            "the kernel must not be asked to stop the device: it would never answer"
        );
    }

    /// The signals are those of the test's own thread, which are no other thread's.
    #[test]
    fn a_request_to_end_is_noted_before_anything_is_made_of_it() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("0.ending");
        let leaving = supervisor(1, []);
        let ask = |signal: Signal| raise(signal).expect("this thread has it blocked");
        ask(Signal::SIGTERM);
        leaving.note_last_requests();
        assert!(!path.exists(), "the device has no note yet");
        leaving.note_requests(Registry::at(folder.path()).expect("its own").request(0, 1));
        ask(Signal::SIGHUP);
        leaving.note_last_requests();
        assert!(!path.exists(), "nothing asks for the end");
        ask(Signal::SIGINT);
        assert!(leaving.signals.wait());
        leaving.note_last_requests();
        assert!(path.exists());
        std::fs::remove_file(&path).expect("it is there");
        leaving.note_no_requests();
        ask(Signal::SIGTERM);
        leaving.note_last_requests();
        assert!(!path.exists(), "the device is gone");
    }

    #[test]
    fn a_request_to_end_stops_a_device_that_is_not_up() {
        let mut coming_up = supervisor(1, []);
        for happening in [Happening::HungUp, ASKED] {
            coming_up.sender.send(Event::Happening(happening)).expect("the receiver is here");
        }
        assert!(coming_up.await_ready(false).expect_err("a request").to_string().contains("daemon to end"));
        let mut successor = supervisor(1, []);
        let asked = [Event::Happening(ASKED), Event::Queue(0, Report::Ready)];
        for event in asked {
            successor.sender.send(event).expect("the receiver is here");
        }
        successor.await_ready(true).expect("the device may be in use");
        assert!(matches!(successor.next_demand(None), Ok(Demand::Happening(Happening::EndRequested { .. }))));
        let mut up = supervisor(0, []);
        up.sender.send(Event::Happening(ASKED)).expect("the receiver is here");
        assert!(matches!(up.next_demand(None), Ok(Demand::Happening(Happening::EndRequested { .. }))));
        let due = Some(Instant::now());
        assert!(matches!(up.next_demand(due), Ok(Demand::Happening(Happening::Time))));
    }
}
