//! A model, and all of its interleavings.

use std::any::Any;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use loom::model::Builder;
use vhdx_ublk::atomic;

/// A few threads of a device, and what must hold whatever their order.
pub struct Model {
    pub name: &'static str,
    /// How many threads it has, the one that begins included.
    pub threads: usize,
    /// How often a thread may be stopped between two of its steps for another one, in one interleaving. As
    /// often as there are steps if there is no bound. It may always be stopped where it waits.
    pub preemptions: Option<usize>,
    /// What has come about in one interleaving or another.
    pub outcomes: &'static [&'static str],
    /// Sets up, runs the threads, and judges.
    pub run: fn(),
}

/// What the interleavings of a model have shown.
pub struct Found {
    pub interleavings: u64,
    pub outcomes: BTreeSet<&'static str>,
}

thread_local! {
    static OUTCOMES: RefCell<BTreeSet<&'static str>> = RefCell::default();
}

/// This interleaving has come to `what`.
pub fn came_to(what: &'static str) {
    OUTCOMES.with_borrow_mut(|outcomes| outcomes.insert(what));
}

impl Model {
    /// Runs every interleaving within the bounds.
    pub fn explore(&self) -> Found {
        let count = Arc::new(AtomicU64::new(0));
        let (counted, run) = (count.clone(), self.run);
        let mut builder = Builder::new();
        builder.max_threads = self.threads;
        builder.max_branches = 10_000;
        builder.preemption_bound = self.preemptions;
        OUTCOMES.take();
        builder.check(move || {
            counted.fetch_add(1, Ordering::Relaxed);
            atomic::set_up();
            run();
        });
        Found { interleavings: count.load(Ordering::Relaxed), outcomes: OUTCOMES.take() }
    }

    /// The bounds, in words.
    pub fn bounds(&self) -> String {
        match self.preemptions {
            Some(count) => format!("{} threads, at most {count} preemptions", self.threads),
            None => format!("{} threads, without a bound", self.threads),
        }
    }
}

/// What a panic says.
pub fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("a panic without words")
}
