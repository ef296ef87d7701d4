//! All queues of a device: started, watched, drained and ended together.
//!
//! Queues, termination signals and the control socket speak on one channel, so that the device's thread waits in
//! one place.
//!
//! Order on the way down: *settled* (every queue that was started has begun or has failed to), then the kernel
//! stops the device, then *drained*, then *finished*. A queue that offered its tags only after the stop would
//! never get them back: older kernels, 6.12 for one, take them.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};

use super::queue::{Queue, QueueSetup, Report};
use super::socket::Call;
use crate::error::{Error, Kind, Result};

/// How long the queues may take to be ready: only a hang, or a machine that starves, comes near it.
const READY_DEADLINE: Duration = Duration::from_secs(60);

/// How long a queue may take to drain once the kernel has stopped the device: nothing is left to wait for.
const DRAIN_DEADLINE: Duration = Duration::from_secs(30);

/// What the device's thread waits for.
enum Event {
    Signal(Signal),
    Queue(u16, Report),
    Call(Call),
}

/// See the module's head.
pub(super) struct Queues {
    sender: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    threads: Vec<Queue>,
    /// Those that have not said yet whether they are ready.
    starting: usize,
    /// Those that have drained, or never began.
    drained: usize,
    /// One has failed: its requests end with the process and not before.
    failed: bool,
}

impl Queues {
    /// No queues yet. From now on termination signals are events.
    pub(super) fn new() -> Result<Self> {
        let (sender, events) = mpsc::channel();
        watch_signals(sender.clone())?;
        Ok(Self { sender, events, threads: Vec::new(), starting: 0, drained: 0, failed: false })
    }

    /// Starts a queue.
    pub(super) fn start(&mut self, setup: QueueSetup) -> Result<()> {
        let (sender, queue) = (self.sender.clone(), setup.ring.queue);
        let report = move |report| {
            // The device's thread listens until every queue is over, or the process ends.
            let _ = sender.send(Event::Queue(queue, report));
        };
        self.threads.push(Queue::start(setup, report)?);
        self.starting += 1;
        Ok(())
    }

    /// Waits until every queue is ready. An error when one is not, or when a signal comes.
    pub(super) fn await_ready(&mut self) -> Result<()> {
        let until = Instant::now() + READY_DEADLINE;
        while self.starting > 0 {
            match self.next(Some(until))? {
                Event::Queue(_, Report::Ready) => {}
                Event::Queue(_, Report::Unready(error) | Report::Failed(error)) => return Err(error),
                Event::Queue(queue, Report::Drained) => {
                    let message = format!("queue {queue} was stopped before the device was up");
                    return Err(Error::new(Kind::Io, message));
                }
                Event::Signal(signal) => {
                    let message = format!("stopped by {signal} before the device was up");
                    return Err(Error::new(Kind::Io, message));
                }
                Event::Call(_) => panic!("the socket is made when the queues are ready"),
            }
        }
        Ok(())
    }

    /// What passes calls on to the device's thread.
    pub(super) fn caller(&self) -> impl Fn(Call) + Send + 'static {
        let sender = self.sender.clone();
        move |call| {
            // Nobody listens any more: who called finds the answer's channel closed.
            let _ = sender.send(Event::Call(call));
        }
    }

    /// Waits for the next call, or until the device shall be taken down: none. An error when it has to be, for a
    /// failure.
    pub(super) fn next_call(&mut self) -> Result<Option<Call>> {
        match self.next(None)? {
            Event::Call(call) => return Ok(Some(call)),
            Event::Signal(signal) => tracing::info!("stopping: {signal}"),
            Event::Queue(_, Report::Drained) => {
                tracing::info!("stopping: somebody else has stopped the device");
            }
            Event::Queue(_, Report::Failed(error)) => return Err(error),
            Event::Queue(queue, Report::Ready | Report::Unready(_)) => {
                panic!("queue {queue} has begun before")
            }
        }
        Ok(None)
    }

    /// Waits until every queue that was started has begun, or has failed to.
    pub(super) fn settle(&mut self) -> Result<()> {
        self.work_off(READY_DEADLINE, |queues| queues.starting == 0)
    }

    /// Waits until every queue has drained. The kernel has stopped the device.
    pub(super) fn drain(&mut self) -> Result<()> {
        self.work_off(DRAIN_DEADLINE, |queues| queues.drained == queues.threads.len())
    }

    /// Ends all queues, which have drained, and waits for their end.
    pub(super) fn finish(&mut self) {
        assert_eq!(self.drained, self.threads.len(), "queues are finished when they have drained");
        self.threads.drain(..).for_each(Queue::finish);
        self.drained = 0;
    }

    /// Takes events until `is_done`. A queue that fails is an error; everything else is only counted, signals
    /// and calls as well: the device is being taken down already.
    fn work_off(&mut self, deadline: Duration, is_done: impl Fn(&Self) -> bool) -> Result<()> {
        let until = Instant::now() + deadline;
        while !self.failed && !is_done(self) {
            if let Event::Queue(_, Report::Failed(error)) = self.next(Some(until))? {
                return Err(error);
            }
        }
        if self.failed {
            return Err(Error::new(
                Kind::Io,
                "a queue has failed, and its requests end only with this process",
            ));
        }
        Ok(())
    }

    /// The next event, counted.
    fn next(&mut self, until: Option<Instant>) -> Result<Event> {
        let event = match until {
            None => self.events.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(until) => self.events.recv_timeout(until.saturating_duration_since(Instant::now())),
        };
        let event = match event {
            Ok(event) => event,
            Err(RecvTimeoutError::Timeout) => {
                return Err(Error::new(Kind::Io, "the queues did not answer in time"));
            }
            Err(RecvTimeoutError::Disconnected) => unreachable!("a sender is held here"),
        };
        match event {
            Event::Queue(_, Report::Ready) => self.starting -= 1,
            Event::Queue(_, Report::Unready(_)) => {
                self.starting -= 1;
                self.drained += 1;
            }
            Event::Queue(_, Report::Drained) => self.drained += 1,
            Event::Queue(_, Report::Failed(_)) => self.failed = true,
            Event::Signal(_) | Event::Call(_) => {}
        }
        Ok(event)
    }
}

/// Blocks the signals that ask a daemon to end, here and in every thread started later, and has one thread
/// turn them into events.
fn watch_signals(sender: mpsc::Sender<Event>) -> Result<()> {
    let failed = |doing: &'static str| move |error| Error::io(doing, error);
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    signals.thread_block().map_err(|errno| failed("blocking signals")(errno.into()))?;
    let watch = move || {
        while let Ok(signal) = signals.wait() {
            if sender.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    };
    let thread = thread::Builder::new().name("ublk-signals".into()).spawn(watch);
    thread.map(drop).map_err(failed("starting the thread for signals"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Queues of which `starting` have been started, though none has a thread; what they report.
    fn queues(starting: usize, reports: impl IntoIterator<Item = Report>) -> Queues {
        let (sender, events) = mpsc::channel();
        for report in reports {
            sender.send(Event::Queue(0, report)).expect("the receiver is here");
        }
        Queues { sender, events, threads: Vec::new(), starting, drained: 0, failed: false }
    }

    fn failure() -> Error {
        Error::new(Kind::Io, "no")
    }

    #[test]
    fn the_device_is_up_when_every_queue_is_ready() {
        let mut both = queues(2, [Report::Ready, Report::Ready]);
        assert!(both.await_ready().is_ok());
        assert_eq!((both.starting, both.drained), (0, 0));
    }

    #[test]
    fn a_queue_that_cannot_begin_is_reported_and_waited_for_no_more() {
        let mut both = queues(2, [Report::Unready(failure()), Report::Ready, Report::Drained]);
        assert_eq!(both.await_ready().expect_err("one is not ready").to_string(), "no");
        both.settle().expect("the other one has begun");
        assert_eq!((both.starting, both.drained), (0, 1));
        both.next(None).expect("drained");
        assert_eq!(both.drained, 2);
    }

    #[test]
    fn a_queue_that_fails_is_an_error_at_any_time() {
        assert!(queues(1, [Report::Failed(failure())]).await_ready().is_err());
        assert!(queues(1, [Report::Failed(failure())]).settle().is_err());
        let mut up = queues(0, [Report::Failed(failure())]);
        assert!(up.next_call().is_err());
        assert!(
            up.settle().is_err(),
            "the kernel must not be asked to stop the device: it would never answer"
        );
    }

    #[test]
    fn a_signal_stops_a_device_that_is_up_and_one_that_is_not() {
        let coming_up = queues(1, []);
        coming_up.sender.send(Event::Signal(Signal::SIGTERM)).expect("the receiver is here");
        let mut coming_up = coming_up;
        assert!(coming_up.await_ready().expect_err("a signal").to_string().contains("SIGTERM"));
        let mut up = queues(0, []);
        up.sender.send(Event::Signal(Signal::SIGINT)).expect("the receiver is here");
        assert!(matches!(up.next_call(), Ok(None)));
    }
}
