//! One queue: a thread that carries requests from its ring to its front, and answers back.
//!
//! A queue's life: *ready* when every tag has been offered to the kernel; *drained* when every tag has come
//! back for good and its front is idle; *over* when the device says so. Between drained and over it still
//! answers the engine's barriers, so that the engine can close the image in its own order.
//!
//! While requests wait for room on the host, some are tried again every second. Before the kernel stops the
//! device they fail, as it waits for them.
//!
//! A queue whose device the kernel has quiesced, for another program, is drained when it serves no request;
//! those that wait for room are the other program's.
//! The tags that it offers then never get one. When the image is complete it gives up what it holds. Requests
//! wait, so it is not ended by itself: the end of the process takes the tags of all queues back at once.
//!
//! Only the end of the process helps a queue that fails: the kernel aborts its requests then, and not before.
//! The queue reports that, and leaks the memory that the kernel may still write to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use libublk::sys::UBLK_IO_RES_ABORT;
use nix::sys::eventfd::EventFd;

use super::ring::{Event, QueueRing, RingSetup};
use crate::device::confine::{self, Role};
use crate::device::mailbox::{Receiver, wake_up};
use crate::device::sys;
use crate::engine::front::Front;
use crate::engine::message::ToFront;
use crate::error::{Doing, Error, Kind, Result};

/// The time between two tries of requests that wait for room.
const TRY_PERIOD: Duration = Duration::from_secs(1);

/// What a queue is made of.
pub(in crate::device) struct QueueSetup {
    /// The device's number, for the thread's name.
    pub(in crate::device) device: u32,
    /// The ring's part.
    pub(in crate::device) ring: RingSetup,
    /// Decides what is done for each request.
    pub(in crate::device) front: Front,
    /// From the engine.
    pub(in crate::device) receiver: Receiver<ToFront>,
    /// The CPUs whose requests it gets.
    pub(in crate::device) cpus: Vec<usize>,
    /// The kernel may look for partitions.
    pub(in crate::device) may_scan: bool,
}

/// What a queue reports to the device.
#[derive(Debug)]
pub(in crate::device) enum Report {
    /// Every tag has been offered: the device may be started.
    Ready,
    /// No requests are left, and none will come.
    Drained,
    /// The next process has its requests, and it holds nothing of the image.
    Left,
    /// It could not begin; nothing of it is left.
    Unready(Error),
    /// It cannot continue.
    Failed(Error),
}

/// A queue's thread, as the device sees it.
pub(in crate::device) struct Queue {
    thread: JoinHandle<()>,
    calls: Arc<Calls>,
    wake: Arc<EventFd>,
}

/// What the device announces to a queue, once each.
#[derive(Default)]
struct Calls {
    /// The image is closed, or complete for the next process: the queue ends.
    over: AtomicBool,
    /// The kernel has quiesced the device.
    quiesced: AtomicBool,
    /// The kernel is about to stop the device: no request waits for room.
    waits_end: AtomicBool,
}

impl Queue {
    /// Starts the thread. Its reports go to `report`: first [`Report::Ready`] or [`Report::Unready`].
    pub(in crate::device) fn start<R>(setup: QueueSetup, report: R) -> Result<Self>
    where
        R: Fn(Report) + Send + 'static,
    {
        let calls = Arc::new(Calls::default());
        let wake = setup.ring.wake.clone();
        let name = format!("ublk{}-q{}", setup.device, setup.ring.queue);
        let thread = thread::Builder::new().name(name).spawn({
            let calls = calls.clone();
            move || serve(setup, calls, &report)
        });
        Ok(Self { thread: thread.doing("starting a queue's thread")?, calls, wake })
    }

    /// The kernel has quiesced the device: the queue completes what it serves.
    pub(in crate::device) fn hand_over(&self) {
        self.calls.quiesced.store(true, Ordering::Release);
        wake_up(&self.wake);
    }

    /// The device is about to be stopped: requests that wait for room fail, now and from now on.
    pub(in crate::device) fn end_waits(&self) {
        self.calls.waits_end.store(true, Ordering::Release);
        wake_up(&self.wake);
    }

    /// Has a drained queue of a quiesced device give up what it holds, which it reports. It does nothing then
    /// until the process ends.
    pub(in crate::device) fn leave(&self) {
        self.calls.over.store(true, Ordering::Release);
        wake_up(&self.wake);
    }

    /// Ends a drained queue and waits for its end.
    pub(in crate::device) fn finish(self) {
        self.leave();
        self.thread.join().expect("a panic ends the process");
    }
}

fn serve(setup: QueueSetup, calls: Arc<Calls>, report: &dyn Fn(Report)) {
    prepare_thread(&setup);
    // The kernel scans the partitions of a device only if every tag was first offered with CAP_SYS_ADMIN.
    if !setup.may_scan {
        confine::become_(Role::Plain);
        if confine::is_admin() {
            let message = "the kernel would look for partitions: this thread cannot give up CAP_SYS_ADMIN";
            return report(Report::Unready(Error::new(Kind::Unsupported, message)));
        }
    }
    let mut server = match QueueRing::new(setup.ring) {
        Ok(ring) => Server::new(setup.front, setup.receiver, ring, calls),
        Err(error) => return report(Report::Unready(error)),
    };
    let begun = server.begin();
    // Nothing else needs a privilege; no request has come yet.
    confine::become_(Role::Plain);
    if let Err(error) = begun {
        drop(server); // nothing but commands is out, and this ends them
        return report(Report::Unready(error));
    }
    report(Report::Ready);
    match server.run(report) {
        Ok(End::Closed) => server.ring.close(),
        Ok(End::HandedOver) => {
            server.ring.leave_files();
            report(Report::Left);
            // The end of a thread with a ring takes the kernel a while, and requests wait: the process ends
            // all of them at once.
            loop {
                thread::park();
            }
        }
        Err(error) => {
            tracing::error!("{error:#}");
            std::mem::forget(server);
            report(Report::Failed(error));
        }
    }
}

/// A failure here costs speed, or safety when memory runs out, and the device is served.
fn prepare_thread(setup: &QueueSetup) {
    let queue = setup.ring.queue;
    if let Err(error) = sys::run_on(&setup.cpus) {
        tracing::warn!("queue {queue} is not kept on its {} CPUs: {error}", setup.cpus.len());
    }
}

/// How a queue ends.
enum End {
    /// The device is stopped, and nothing is under way.
    Closed,
    /// The next process gets what comes.
    HandedOver,
}

struct Server {
    front: Front,
    receiver: Receiver<ToFront>,
    ring: QueueRing,
    calls: Arc<Calls>,
    /// When requests that wait for room are tried again, if any wait.
    next_try: Option<Instant>,
    /// How many wait, as reports know it.
    short_of_room: usize,
}

impl Server {
    fn new(front: Front, receiver: Receiver<ToFront>, ring: QueueRing, calls: Arc<Calls>) -> Self {
        Self { front, receiver, ring, calls, next_try: None, short_of_room: 0 }
    }

    fn begin(&mut self) -> Result<()> {
        self.ring.fetch_all()?;
        self.handle_events()?;
        self.ring.arm_wake();
        Ok(())
    }

    fn run(&mut self, report: &dyn Fn(Report)) -> Result<End> {
        while !(self.ring.has_ended() && self.front.is_idle()) {
            self.turn()?;
            if self.calls.quiesced.load(Ordering::Acquire) && self.is_handed_over()? {
                report(Report::Drained);
                return self.answer_engine();
            }
        }
        report(Report::Drained);
        while !self.ring.is_quiet() {
            self.turn()?;
        }
        assert!(self.front.is_idle(), "the engine sends nothing to a front that is over");
        Ok(if self.calls.quiesced.load(Ordering::Acquire) { End::HandedOver } else { End::Closed })
    }

    /// Until the image is complete for the next process. Requests of other queues may need the engine, which
    /// needs the answers of all fronts.
    fn answer_engine(&mut self) -> Result<End> {
        while !self.calls.over.load(Ordering::Acquire) {
            self.turn()?;
        }
        // A request that waited for room may have failed in the last turn.
        self.ring.exchange()?;
        Ok(End::HandedOver)
    }

    /// Whether the queue of a quiesced device serves nothing, and nothing is on the way in either direction:
    /// what the kernel dispatched before it was quiesced arrives with the next call, and every result was
    /// submitted.
    fn is_handed_over(&mut self) -> Result<bool> {
        loop {
            self.ring.exchange()?;
            self.handle_events()?;
            if !(self.ring.serves_only(self.front.resting()) && self.front.is_at_rest()) {
                return Ok(false);
            }
            if self.ring.is_submitted() {
                return Ok(true);
            }
        }
    }

    /// Takes the messages that are here. If there are none, submits, and sleeps until something has come.
    /// What the messages lead to is submitted by the next turn: in parts, each would cost a call of its own.
    /// The thread does not sleep behind a message: the message may have ended what the caller waits for, or
    /// begun a piece that ends without the kernel. Nothing would end that sleep.
    fn turn(&mut self) -> Result<()> {
        self.ring.announce();
        let may_sleep = self.receiver.may_sleep();
        if may_sleep {
            self.ring.wait(self.next_try.map(|at| at.saturating_duration_since(Instant::now())))?;
        }
        self.receiver.awake();
        if !may_sleep {
            self.take_messages();
        }
        self.handle_events()?;
        self.tend_short_of_room();
        Ok(())
    }

    /// Has requests that wait for room fail if they are to, or some of them tried again if it is time. Those
    /// of a quiesced device are the next process's.
    fn tend_short_of_room(&mut self) {
        if self.calls.waits_end.load(Ordering::Acquire) {
            self.front.end_waits(&mut self.ring);
        }
        if self.front.resting() == 0 || self.calls.quiesced.load(Ordering::Acquire) {
            self.next_try = None;
        } else {
            let now = Instant::now();
            if self.next_try.is_some_and(|at| at <= now) {
                self.front.try_again(&mut self.ring);
            }
            self.next_try = self.next_try.filter(|at| *at > now).or(Some(now + TRY_PERIOD));
        }
        let short_of_room = self.front.short_of_room();
        if std::mem::replace(&mut self.short_of_room, short_of_room) != short_of_room {
            self.ring.short_of_room(short_of_room);
        }
    }

    fn handle_events(&mut self) -> Result<()> {
        while let Some(event) = self.ring.next_event() {
            self.handle(event)?;
        }
        Ok(())
    }

    fn handle(&mut self, event: Event) -> Result<()> {
        match event {
            Event::Request { tag, request: Ok(request) } => self.front.start(tag, request, &mut self.ring),
            Event::Request { tag, request: Err(errno) } => self.ring.refuse(tag, errno),
            Event::Io { piece, result } => self.front.io_done(piece, result, &mut self.ring),
            Event::Wake => self.receive(),
            Event::Ended { result, .. } if result == UBLK_IO_RES_ABORT => {}
            Event::Ended { tag, result } => return Err(self.refused(tag, result)),
        }
        Ok(())
    }

    /// Reads the mailbox, then waits for the next wake, unless this was the last.
    fn receive(&mut self) {
        self.take_messages();
        if !self.calls.over.load(Ordering::Acquire) {
            self.ring.arm_wake();
        }
    }

    fn take_messages(&mut self) {
        while let Some(message) = self.receiver.pop() {
            self.ring.received(message);
            self.front.receive(message, &mut self.ring);
        }
    }

    /// The kernel refuses a command that is in order, so either it or this program has lost count.
    fn refused(&self, tag: u16, result: i32) -> Error {
        let doing = format!("queue {}: the kernel refused the command of tag {tag}", self.ring.queue());
        match result {
            ..0 => Error::io(doing, std::io::Error::from_raw_os_error(-result)),
            _ => Error::new(Kind::Io, format!("{doing}: unexpected result {result}")),
        }
    }
}
