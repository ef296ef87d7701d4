//! One queue: a thread that carries requests from its ring to its front and answers back.
//!
//! A queue's life: *ready* when every tag has been offered to the kernel; *drained* when every tag has come
//! back for good and its front is idle; *over* when the device says so. Between drained and over it goes on
//! answering the engine's barriers, so that the engine can close the image in its own order.
//!
//! A queue that fails cannot be helped by anything but the end of the process: the kernel aborts its requests
//! then, and not before. It says so and leaks what the kernel may still be writing to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use libublk::sys::UBLK_IO_RES_ABORT;
use nix::sys::eventfd::EventFd;

use super::confine::{self, Role};
use super::mailbox::{Receiver, wake_up};
use super::ring::{Event, Ring, RingSetup};
use super::sys;
use crate::engine::front::Front;
use crate::engine::message::ToFront;
use crate::engine::port::Port;
use crate::error::{Error, Kind, Result};

/// What a queue is made of.
pub(super) struct QueueSetup {
    /// The device's number, for the thread's name.
    pub(super) device: u32,
    /// The ring's part.
    pub(super) ring: RingSetup,
    /// Who decides.
    pub(super) front: Front,
    /// From the engine.
    pub(super) receiver: Receiver<ToFront>,
    /// The CPUs whose requests it gets.
    pub(super) cpus: Vec<usize>,
}

/// What a queue tells the device.
#[derive(Debug)]
pub(super) enum Report {
    /// Every tag has been offered: the device may be started.
    Ready,
    /// No requests are left, and none will come.
    Drained,
    /// It could not begin; nothing of it is left.
    Unready(Error),
    /// It cannot go on.
    Failed(Error),
}

/// A queue's thread, as the device sees it.
pub(super) struct Queue {
    thread: JoinHandle<()>,
    over: Arc<AtomicBool>,
    wake: Arc<EventFd>,
}

impl Queue {
    /// Starts the thread. Its reports go to `report`: first [`Report::Ready`] or [`Report::Unready`].
    pub(super) fn start<R>(setup: QueueSetup, report: R) -> Result<Self>
    where
        R: Fn(Report) + Send + 'static,
    {
        let over = Arc::new(AtomicBool::new(false));
        let wake = setup.ring.wake.clone();
        let name = format!("ublk{}-q{}", setup.device, setup.ring.queue);
        let thread = thread::Builder::new().name(name).spawn({
            let over = over.clone();
            move || serve(setup, over, &report)
        });
        let thread = thread.map_err(|error| Error::io("starting a queue's thread", error))?;
        Ok(Self { thread, over, wake })
    }

    /// Ends a drained queue and waits for its end.
    pub(super) fn finish(self) {
        self.over.store(true, Ordering::Release);
        wake_up(&self.wake);
        self.thread.join().expect("a panic ends the process");
    }
}

fn serve(setup: QueueSetup, over: Arc<AtomicBool>, report: &dyn Fn(Report)) {
    prepare_thread(&setup);
    let mut server = match Ring::new(setup.ring) {
        Ok(ring) => Server { front: setup.front, receiver: setup.receiver, ring, over },
        Err(error) => return report(Report::Unready(error)),
    };
    confine::become_(Role::Plain); // the ring is made, and the thread is what it shall be
    if let Err(error) = server.begin() {
        drop(server); // nothing but commands is out, and this ends them
        return report(Report::Unready(error));
    }
    report(Report::Ready);
    if let Err(error) = server.run(report) {
        tracing::error!("{error:#}");
        std::mem::forget(server);
        return report(Report::Failed(error));
    }
    server.ring.close();
}

/// What fails here costs speed, or safety when memory runs out, but serves.
fn prepare_thread(setup: &QueueSetup) {
    let queue = setup.ring.queue;
    if let Err(error) = sys::become_io_flusher() {
        tracing::warn!("queue {queue} is not marked as serving a disk: {error}");
    }
    if let Err(error) = sys::run_on(&setup.cpus) {
        tracing::warn!("queue {queue} is not kept on its {} CPUs: {error}", setup.cpus.len());
    }
}

struct Server {
    front: Front,
    receiver: Receiver<ToFront>,
    ring: Ring,
    over: Arc<AtomicBool>,
}

impl Server {
    fn begin(&mut self) -> Result<()> {
        self.ring.fetch_all()?;
        self.handle_events()?;
        self.ring.arm_wake();
        Ok(())
    }

    fn run(&mut self, report: &dyn Fn(Report)) -> Result<()> {
        while !(self.ring.has_ended() && self.front.is_idle()) {
            self.ring.wait()?;
            self.handle_events()?;
        }
        report(Report::Drained);
        while !self.ring.is_quiet() {
            self.ring.wait()?;
            self.handle_events()?;
        }
        assert!(self.front.is_idle(), "the engine asks nothing of a front that is over");
        Ok(())
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
            Event::Request { tag, request: Err(errno) } => self.ring.complete(tag, -errno),
            Event::Io { piece, result } => self.front.io_done(piece, result, &mut self.ring),
            Event::Wake => self.receive(),
            Event::Ended { result, .. } if result == UBLK_IO_RES_ABORT => {}
            Event::Ended { tag, result } => return Err(self.refused(tag, result)),
        }
        Ok(())
    }

    /// Reads the mailbox, then waits for the next wake, unless this was the last.
    fn receive(&mut self) {
        while let Some(message) = self.receiver.pop() {
            self.front.receive(message, &mut self.ring);
        }
        if !self.over.load(Ordering::Acquire) {
            self.ring.arm_wake();
        }
    }

    /// The kernel does not take a command that is in order, so either it or we have lost count.
    fn refused(&self, tag: u16, result: i32) -> Error {
        let doing = format!("queue {}: the kernel refused the command of tag {tag}", self.ring.queue());
        match result {
            ..0 => Error::io(doing, std::io::Error::from_raw_os_error(-result)),
            _ => Error::new(Kind::Io, format!("{doing}: unexpected result {result}")),
        }
    }
}
