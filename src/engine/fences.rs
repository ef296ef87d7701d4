//! Waiting until every front has seen the end of the durable writes that it has in flight.

use std::cell::Cell;

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
    /// Sends each of `fronts` fronts a fence with `send`, and waits for all answers.
    pub(super) async fn pass(&self, fronts: usize, send: impl Fn(usize)) {
        assert!(fronts > 0, "durable writes in flight belong to fronts");
        let turn = self.turn.enter().await;
        assert_eq!(self.owed.replace(fronts), 0, "one fence at a time");
        (0..fronts).for_each(send);
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
