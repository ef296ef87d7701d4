//! The device's event loop: queues, signals and the control socket report on one channel, on which the
//! device's thread waits. All queues are started, watched, drained and ended together.
//!
//! Order on the way down: *settled* (every queue that was started has begun or has failed to), then the
//! kernel stops the device, then *drained*, then *finished*. A queue that offered its tags only after the
//! stop would never get them back: older kernels, such as 6.12, accept them.
//!
//! A request to end that comes while the device is left to another process is passed on to that process.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};

use super::confine::{self, Role};
use super::ending::Happening;
use super::handover;
use super::order::Call;
use super::queue::{Queue, QueueSetup, Report};
use super::sys::ProcessHandle;
use super::{sys, usage};
use crate::error::{Doing, Error, Kind, Result};

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
    /// A queue has failed: its requests end with the process and not before.
    failed: bool,
    /// The process that serves the device from now on.
    successor: Arc<Successor>,
    /// A request to end has come since, or while events were only counted.
    end_requested: bool,
}

/// The process to which the device is left.
#[derive(Default)]
struct Successor {
    process: OnceLock<ProcessHandle>,
    /// It was asked to end. A second request would mean that the user insists.
    is_asked: AtomicBool,
}

impl Successor {
    fn is_known(&self) -> bool {
        self.process.get().is_some()
    }

    /// Has it end when nothing uses the device.
    fn pass_on(&self) {
        let Some(process) = self.process.get().filter(|_| !self.is_asked.swap(true, Ordering::Relaxed))
        else {
            return;
        };
        match process.terminate() {
            Ok(()) => tracing::info!("the request to end is passed on to the process that serves the device"),
            Err(error) => tracing::warn!("a request to end is lost: it cannot be passed on: {error}"),
        }
    }
}

impl Supervisor {
    /// A supervisor without queues. Signals that request something are events from now on.
    pub(super) fn new() -> Result<Self> {
        let (sender, events) = mpsc::channel();
        let successor = Arc::default();
        watch_signals(sender.clone(), Arc::clone(&successor))?;
        let queues = Vec::new();
        let (starting, drained, failed, end_requested) = (0, 0, false, false);
        Ok(Self { sender, events, queues, starting, drained, failed, successor, end_requested })
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
        let Some(event) = self.next_before(due) else { return Ok(Demand::Happening(Happening::Time)) };
        match event {
            Event::Call(call) => Ok(Demand::Call(call)),
            Event::Happening(happening) => Ok(Demand::Happening(happening)),
            Event::Queue(_, Report::Drained) => Ok(Demand::Stopped),
            Event::Queue(_, Report::Failed(error)) => Err(error),
            Event::Queue(queue, Report::Ready | Report::Unready(_)) => {
                panic!("queue {queue} has begun before")
            }
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
            let unknown = format!("its users cannot be found: {error}");
            let _ = self.sender.send(Event::Happening(Happening::UsersFound(vec![unknown])));
        }
    }

    /// Waits until every queue that was started has begun, or has failed to.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.work_off(READY_DEADLINE, |queues| queues.starting == 0)
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
    /// Then nothing is under way, and the queues answer the engine, which does what `settle` does, until the
    /// process ends.
    pub(super) fn hand_over(&mut self, settle: impl FnOnce() -> Result<()>) -> Result<()> {
        self.queues.iter().for_each(Queue::hand_over);
        self.drain()?;
        handover::note("requests are completed");
        settle()?;
        handover::note("they are synced");
        Ok(())
    }

    /// Has the process `pid` get the requests to end that come from now on.
    pub(super) fn leave_to(&self, pid: u32) -> Result<()> {
        let handle = ProcessHandle::open(pid).doing(format!("finding process {pid}"))?;
        let _ = self.successor.process.set(handle); // a device is left once
        Ok(())
    }

    /// Passes on a request to end that came before this process knew where to, and was not acted on.
    pub(super) fn pass_on_requests(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            self.end_requested |= matches!(event, Event::Happening(Happening::EndRequested { .. }));
        }
        if std::mem::take(&mut self.end_requested) {
            self.successor.pass_on();
        }
    }

    /// Takes events until `is_done`. A queue that fails is an error. Everything else is only counted, also
    /// signals and calls: the device is being taken down already.
    fn work_off(&mut self, deadline: Duration, is_done: impl Fn(&Self) -> bool) -> Result<()> {
        let until = Instant::now() + deadline;
        while !self.failed && !is_done(self) {
            match self.next(Some(until))? {
                Event::Queue(_, Report::Failed(error)) => return Err(error),
                Event::Happening(Happening::EndRequested { .. }) => self.end_requested = true,
                _ => {}
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
            Event::Queue(_, Report::Failed(_)) => self.failed = true,
            Event::Happening(_) | Event::Call(_) => {}
        }
        Some(event)
    }
}

/// Blocks the signals that request something, here and in every thread started later, and has one thread turn
/// them into events, or pass them on to the `successor`.
fn watch_signals(sender: mpsc::Sender<Event>, successor: Arc<Successor>) -> Result<()> {
    let signals = SigSet::from_iter(sys::REQUESTS);
    signals.thread_block().doing("blocking signals")?;
    let signals = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).doing("receiving signals")?;
    let watch = move || {
        confine::become_(Role::Plain);
        while let Ok(Some(signal)) = signals.read_signal() {
            let happening = meaning(&signal);
            let is_end = matches!(happening, Happening::EndRequested { .. });
            let heard = format!("signal {} from process {}: {happening:?}", signal.ssi_signo, signal.ssi_pid);
            if !successor.is_known() && sender.send(Event::Happening(happening)).is_err() {
                return;
            }
            // Also if it became known meanwhile: this process may end before it takes another event.
            if is_end && successor.is_known() {
                successor.pass_on();
            }
            tracing::info!("{heard}");
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
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    const ASKED: Happening = Happening::EndRequested { by_init: true };

    /// A supervisor of `starting` queues, which have no threads, and their reports.
    fn supervisor(starting: usize, reports: impl IntoIterator<Item = Report>) -> Supervisor {
        let (sender, events) = mpsc::channel();
        for report in reports {
            sender.send(Event::Queue(0, report)).expect("the receiver is here");
        }
        let (queues, successor) = (Vec::new(), Arc::default());
        let (drained, failed, end_requested) = (0, false, false);
        Supervisor { sender, events, queues, starting, drained, failed, successor, end_requested }
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

    #[test]
    fn a_request_that_comes_while_the_device_is_left_is_passed_on() {
        let ends_by = |asked_before: bool, asked_while: bool| {
            let mut child = Command::new("sleep").arg("60").spawn().expect("every machine has it");
            let mut leaving = supervisor(1, []);
            let ask = |sender: &mpsc::Sender<Event>| {
                sender.send(Event::Happening(ASKED)).expect("the receiver is here");
            };
            leaving.leave_to(child.id()).expect("it runs");
            if asked_before {
                ask(&leaving.sender);
            }
            leaving.sender.send(Event::Queue(0, Report::Ready)).expect("the receiver is here");
            leaving.settle().expect("its only queue has begun");
            if asked_while {
                ask(&leaving.sender);
            }
            leaving.pass_on_requests();
            let running = child.try_wait().expect("ours").is_none() && !asked_before && !asked_while;
            if running {
                child.kill().expect("it runs");
            }
            child.wait().expect("it ends").signal()
        };
        assert_eq!(ends_by(false, false), Some(libc::SIGKILL), "without a request it is left alone");
        assert_eq!(ends_by(true, false), Some(libc::SIGTERM));
        assert_eq!(ends_by(false, true), Some(libc::SIGTERM));
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
