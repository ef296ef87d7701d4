//! Waiting until the end has been seen of the durable writes and syncs that are in flight.

use std::cell::{Cell, RefCell};

use super::Fronts;
use super::drain::Drain;
use super::message::ToFront;
use super::waiting::{Bell, Turnstile};

/// One fence at a time goes out to all fronts, and each answers once.
#[derive(Default)]
pub(super) struct Fences {
    turn: Turnstile,
    /// Answers that are missing.
    owed: Cell<usize>,
    /// The engine's own syncs.
    syncs: RefCell<Drain>,
    complete: Bell,
}

impl Fences {
    /// Sends each of `fronts` a fence, and waits for all answers and for the engine's own syncs.
    pub(super) async fn pass(&self, fronts: &dyn Fronts) {
        let turn = self.turn.enter().await;
        let count = fronts.count();
        assert_eq!(self.owed.replace(count), 0, "one fence at a time");
        self.syncs.borrow_mut().ask();
        (0..count).for_each(|front| fronts.send(front, ToFront::Fence));
        let mut synced = false;
        loop {
            synced |= self.syncs.borrow_mut().answer();
            if synced && self.owed.get() == 0 {
                break;
            }
            self.complete.wait().await;
        }
        drop(turn);
    }

    /// A front has answered.
    pub(super) fn answered(&self) {
        let owed = self.owed.get().checked_sub(1).expect("a front answers a fence once");
        self.owed.set(owed);
        if owed == 0 {
            self.complete.ring();
        }
    }

    /// The engine is about to sync.
    pub(super) fn sync_begins(&self) -> usize {
        self.syncs.borrow_mut().enter()
    }

    /// The end of that sync has been seen.
    pub(super) fn sync_ended(&self, parity: usize) {
        self.syncs.borrow_mut().leave(parity);
        self.complete.ring();
    }
}
