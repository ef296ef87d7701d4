//! Waiting until every front has seen the end of the durable writes that it has in flight.

use std::cell::Cell;

use super::Fronts;
use super::message::ToFront;
use super::waiting::{Bell, Turnstile};

/// One fence at a time goes out to all fronts, and each answers once.
#[derive(Default)]
pub(super) struct Fences {
    turn: Turnstile,
    /// Answers that are missing.
    owed: Cell<usize>,
    complete: Bell,
}

impl Fences {
    /// Sends each of `fronts` a fence, and waits for all answers.
    pub(super) async fn pass(&self, fronts: &dyn Fronts) {
        let turn = self.turn.enter().await;
        let count = fronts.count();
        assert!(count > 0, "durable writes in flight belong to fronts");
        assert_eq!(self.owed.replace(count), 0, "one fence at a time");
        (0..count).for_each(|front| fronts.send(front, ToFront::Fence));
        while self.owed.get() > 0 {
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
}
