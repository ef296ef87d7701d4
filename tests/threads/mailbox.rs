//! A message that was sent is received, whoever goes to sleep meanwhile: two fronts ask one engine, whose
//! sleep they share, and the engine answers each.

use std::sync::Arc;

use loom::sync::{Condvar, Mutex};
use loom::thread;
use vhdx_ublk::atomic::start_threads;
use vhdx_ublk::device::mailbox::{EngineEnd, FrontEnds, mailboxes};
use vhdx_ublk::engine::message::{Ask, ToEngine, ToFront};

use crate::explore::{Model, came_to};

pub const MODEL: Model = Model {
    name: "mailboxes",
    threads: 3,
    preemptions: Some(2),
    outcomes: &["a front sleeps", "a front was not asleep", "the engine sleeps"],
    run,
};

/// A thread's sleep until its eventfd was written, which would stop all threads of the model.
struct Bed {
    written: Mutex<u64>,
    comes: Condvar,
}

impl Bed {
    fn new() -> Arc<Self> {
        Arc::new(Self { written: Mutex::new(0), comes: Condvar::new() })
    }

    /// The eventfd was just written.
    fn written(&self) {
        *self.written.lock().expect("no panic holds it") += 1;
        self.comes.notify_one();
    }

    /// Reads the eventfd.
    fn sleep(&self) {
        let mut written = self.written.lock().expect("no panic holds it");
        while *written == 0 {
            written = self.comes.wait(written).expect("no panic holds it");
        }
        *written = 0;
    }
}

/// A queue's thread: it asks, and waits for the answer.
fn ask(mut ends: FrontEnds, bed: &Bed, engine: &Bed) {
    ends.sender.send(ToEngine::Ask { tag: 0, ask: Ask::Flush });
    if ends.sender.flush() {
        engine.written();
    }
    loop {
        if let Some(message) = ends.receiver.pop() {
            assert_eq!(message, ToFront::Reply { tag: 0, result: Ok(()) });
            return;
        }
        if ends.receiver.may_sleep() {
            came_to("a front sleeps");
            bed.sleep();
        } else {
            came_to("a front was not asleep");
        }
        ends.receiver.awake();
    }
}

/// The engine's thread: it answers every front once.
fn answer(mut fronts: Vec<EngineEnd>, bed: &Bed, beds: &[Arc<Bed>]) {
    let mut left = fronts.len();
    while left > 0 {
        for (front, bed) in fronts.iter_mut().zip(beds) {
            while front.receiver.pop().is_some() {
                left -= 1;
                front.sender.send(ToFront::Reply { tag: 0, result: Ok(()) });
                if front.sender.flush() {
                    bed.written();
                }
            }
        }
        if left > 0 && fronts.iter().all(|front| front.receiver.may_sleep()) {
            came_to("the engine sleeps");
            bed.sleep();
        }
        for front in &fronts {
            front.receiver.awake();
        }
    }
}

fn run() {
    let (engine, fronts) = mailboxes(2, 1).expect("file descriptors");
    let bed = Bed::new();
    let beds: Vec<Arc<Bed>> = fronts.iter().map(|_| Bed::new()).collect();
    start_threads();
    let threads: Vec<_> = fronts
        .into_iter()
        .zip(&beds)
        .map(|(ends, own)| {
            let (own, bed) = (own.clone(), bed.clone());
            thread::spawn(move || ask(ends, &own, &bed))
        })
        .collect();
    answer(engine.fronts, &bed, &beds);
    for thread in threads {
        thread.join().expect("no panic");
    }
}
