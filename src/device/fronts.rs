//! The engine's half of the mailboxes: messages from the fronts arrive here, and leave for them.
//!
//! Replies leave in batches: they are queued as they come, and announced once no other task is ready.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::EventFd;
use smol::future::yield_now;

use super::mailbox::{Receiver, Sender, wake_up};
use crate::disk::{Mail, Reactor, Ring, UringDisk};
use crate::engine::message::{ToEngine, ToFront};
use crate::engine::waiting::Bell;
use crate::engine::{Engine, Fronts};

/// The messages of all fronts, on their way to the engine.
pub(super) struct FrontInbox {
    wake: Arc<EventFd>,
    receivers: Vec<Receiver<ToEngine>>,
    /// The engine that they are for: a snapshot exchanges it, and so does a disk that grows.
    engine: RefCell<Rc<Engine<UringDisk>>>,
    /// Set by another thread, which writes `wake` afterwards.
    called: Arc<AtomicBool>,
    /// Rung when `called` was seen.
    attention: Bell,
    /// How many fronts hold, and the bell that rings when all do.
    held: Cell<usize>,
    all_held: Bell,
    /// The image is closed.
    closed: Cell<bool>,
}

impl FrontInbox {
    /// An inbox that gives what arrives to `engine`. A thread that sets `called` writes the eventfd `wake`
    /// afterwards.
    pub(super) fn new(
        wake: Arc<EventFd>,
        receivers: Vec<Receiver<ToEngine>>,
        engine: Rc<Engine<UringDisk>>,
        called: Arc<AtomicBool>,
    ) -> Self {
        Self {
            wake,
            receivers,
            engine: RefCell::new(engine),
            called,
            attention: Bell::default(),
            held: Cell::new(0),
            all_held: Bell::default(),
            closed: Cell::new(false),
        }
    }

    /// Takes messages until the inbox is closed.
    pub(super) async fn run(self: Rc<Self>, ring: Rc<Ring>) {
        while !self.closed.get() {
            let count = ring.read_eventfd(self.wake.clone()).await;
            count.expect("an eventfd can be read as long as it is open");
            self.take();
            if self.called.swap(false, Ordering::AcqRel) {
                self.attention.ring();
            }
        }
    }

    fn receive(&self, front: usize, message: ToEngine) {
        if message != ToEngine::Held {
            return self.engine.borrow().receive(front, message);
        }
        self.held.update(|count| count + 1);
        assert!(self.held.get() <= self.receivers.len(), "front {front} holds twice");
        if self.held.get() == self.receivers.len() {
            self.all_held.ring();
        }
    }

    /// Waits until another thread calls.
    pub(super) async fn called(&self) {
        self.attention.wait().await;
    }

    /// From now on messages are for `engine`. The fronts are held.
    pub(super) fn change_engine(&self, engine: Rc<Engine<UringDisk>>) {
        assert_eq!(
            self.held.get(),
            self.receivers.len(),
            "a front that serves a request waits for its engine"
        );
        *self.engine.borrow_mut() = engine;
    }

    /// Holds all fronts: returns when none of them serves a request.
    pub(super) fn hold(&self, reactor: &Reactor, fronts: &Mailboxes) {
        self.held.set(0);
        (0..fronts.count()).for_each(|front| fronts.send(front, ToFront::Hold));
        reactor.block_on(self.all_held.wait());
    }

    /// Ends [`Self::run`]: no front asks for anything, as the image is closed.
    pub(super) fn close(&self) {
        self.closed.set(true);
        wake_up(&self.wake);
    }
}

impl Mail for FrontInbox {
    fn take(&self) -> bool {
        let mut came = false;
        for (front, receiver) in self.receivers.iter().enumerate() {
            while let Some(message) = receiver.pop() {
                self.receive(front, message);
                came = true;
            }
        }
        came
    }

    fn may_sleep(&self) -> bool {
        self.receivers.iter().all(Receiver::may_sleep)
    }

    fn awake(&self) {
        self.receivers.iter().for_each(Receiver::awake);
    }
}

/// The engine's way to the fronts.
#[derive(Default)]
pub(super) struct Mailboxes {
    senders: RefCell<Vec<Sender<ToFront>>>,
    /// Something was queued and not yet announced.
    queued: Bell,
}

impl Fronts for Mailboxes {
    fn send(&self, front: usize, message: ToFront) {
        self.senders.borrow_mut()[front].send(message);
        self.queued.ring();
    }

    fn count(&self) -> usize {
        self.senders.borrow().len()
    }
}

impl Mailboxes {
    /// Joins the fronts, once: there are none before.
    pub(super) fn join(&self, senders: Vec<Sender<ToFront>>) {
        let before = self.senders.replace(senders);
        assert!(before.is_empty(), "the fronts of an engine do not change");
    }

    /// Lets fronts that were held continue, at once: no task has to run for it.
    pub(super) fn release(&self) {
        (0..self.count()).for_each(|front| self.send(front, ToFront::Release));
        self.flush();
    }

    /// Announces what was queued, once per batch and front, for ever.
    pub(super) async fn deliver(self: Rc<Self>) {
        loop {
            self.queued.wait().await;
            yield_now().await;
            self.flush();
        }
    }

    fn flush(&self) {
        for sender in self.senders.borrow_mut().iter_mut() {
            sender.flush();
        }
    }
}
