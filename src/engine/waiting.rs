//! How the engine's tasks wait for each other, on one thread and in arrival order.
//!
//! Everything here is deterministic: tasks are served in the order of their calls, and nothing reads a clock.
//! (Crates like `async-lock` take the place in the queue at the first poll, which would make it depend on the
//! executor.) Futures are never dropped before they end: the engine has no timeouts and no `select`.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Poll, Waker};

/// Runs the engine's tasks: an executor in production, a seeded scheduler in tests.
pub trait Spawn {
    /// Takes over a task; it starts later, not inside this call.
    fn spawn(&self, task: Pin<Box<dyn Future<Output = ()>>>);
}

impl Spawn for smol::LocalExecutor<'static> {
    fn spawn(&self, task: Pin<Box<dyn Future<Output = ()>>>) {
        smol::LocalExecutor::spawn(self, task).detach();
    }
}

/// A lock that is handed on in the order of arrival.
#[derive(Default)]
pub struct Turnstile {
    next_ticket: Cell<u64>,
    serving: Cell<u64>,
    waiting: RefCell<VecDeque<(u64, Waker)>>,
}

impl Turnstile {
    /// Waits for its turn. The place in the queue is taken by the call, not by the first poll.
    pub fn enter(&self) -> impl Future<Output = Pass<'_>> {
        let ticket = self.next_ticket.get();
        self.next_ticket.set(ticket + 1);
        assert!(self.serving.get() <= ticket, "a ticket is served once");
        poll_fn(move |context| {
            if self.serving.get() == ticket {
                return Poll::Ready(Pass(self));
            }
            let mut waiting = self.waiting.borrow_mut();
            waiting.retain(|(other, _)| *other != ticket);
            waiting.push_back((ticket, context.waker().clone()));
            Poll::Pending
        })
    }

    fn is_idle(&self) -> bool {
        self.serving.get() == self.next_ticket.get()
    }
}

/// The right to pass; dropping it lets the next one in.
pub struct Pass<'a>(&'a Turnstile);

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let next = self.0.serving.get() + 1;
        assert!(next <= self.0.next_ticket.get(), "a pass was handed out");
        self.0.serving.set(next);
        let mut waiting = self.0.waiting.borrow_mut();
        if let Some(place) = waiting.iter().position(|(ticket, _)| *ticket == next) {
            let (_, waker) = waiting.remove(place).expect("just found");
            waker.wake();
        }
    }
}

/// One turnstile per block, made when needed.
#[derive(Default)]
pub struct BlockLocks(RefCell<BTreeMap<u64, Rc<Turnstile>>>);

impl BlockLocks {
    /// Runs `work` when all earlier work on `block` has ended.
    pub async fn exclusively<T>(&self, block: u64, work: impl Future<Output = T>) -> T {
        let turnstile = self.0.borrow_mut().entry(block).or_default().clone();
        let pass = turnstile.enter().await;
        debug_assert!(self.0.borrow().contains_key(&block), "a turnstile stays while it is in use");
        let result = work.await;
        drop(pass);
        self.tidy(block, &turnstile);
        result
    }

    /// Runs `work` when all earlier work on each of `blocks` has ended.
    pub async fn exclusively_all<T>(&self, blocks: &[u64], work: impl Future<Output = T>) -> T {
        let turnstile = |block: &u64| self.0.borrow_mut().entry(*block).or_default().clone();
        let turnstiles: Vec<Rc<Turnstile>> = blocks.iter().map(turnstile).collect();
        // All places are taken now: a turnstile without one is dropped, and a later task would not see it.
        let places: Vec<_> = turnstiles.iter().map(|turnstile| turnstile.enter()).collect();
        let mut passes = Vec::with_capacity(blocks.len());
        for place in places {
            passes.push(place.await);
        }
        let result = work.await;
        drop(passes);
        blocks.iter().zip(&turnstiles).for_each(|(block, turnstile)| self.tidy(*block, turnstile));
        result
    }

    fn tidy(&self, block: u64, turnstile: &Turnstile) {
        if turnstile.is_idle() {
            self.0.borrow_mut().remove(&block);
        }
    }
}

/// A value that comes later, once, for any number of waiters.
pub struct Promise<T>(Rc<PromiseState<T>>);

struct PromiseState<T> {
    value: RefCell<Option<T>>,
    waiting: RefCell<Vec<Waker>>,
}

impl<T> Clone for Promise<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for Promise<T> {
    /// A promise not yet kept.
    fn default() -> Self {
        Self(Rc::new(PromiseState { value: RefCell::new(None), waiting: RefCell::default() }))
    }
}

impl<T: Clone> Promise<T> {
    /// A promise kept from the start.
    pub fn kept(value: T) -> Self {
        let promise = Self::default();
        promise.keep(value);
        promise
    }

    /// Gives the value to every task that waits or will wait; once.
    pub fn keep(&self, value: T) {
        let before = self.0.value.borrow_mut().replace(value);
        assert!(before.is_none(), "a promise is kept once");
        self.0.waiting.borrow_mut().drain(..).for_each(Waker::wake);
    }

    /// Whether the value is there.
    pub fn is_kept(&self) -> bool {
        self.0.value.borrow().is_some()
    }

    /// Waits for the value.
    pub async fn wait(&self) -> T {
        poll_fn(|context| {
            if let Some(value) = &*self.0.value.borrow() {
                return Poll::Ready(value.clone());
            }
            self.0.waiting.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await
    }
}

/// A bell that one task waits for; rung before the wait, it is not lost.
#[derive(Default)]
pub struct Bell {
    rung: Cell<bool>,
    waiting: RefCell<Option<Waker>>,
}

impl Bell {
    /// Wakes the waiter, now or when it comes.
    pub fn ring(&self) {
        self.rung.set(true);
        if let Some(waker) = self.waiting.borrow_mut().take() {
            waker.wake();
        }
    }

    /// Waits until the bell has been rung since the last wait.
    pub async fn wait(&self) {
        poll_fn(|context| {
            if self.rung.take() {
                return Poll::Ready(());
            }
            *self.waiting.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}
