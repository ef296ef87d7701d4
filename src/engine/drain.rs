//! Waiting for the operations that are under way now, while others begin: each is counted in one of two
//! counters, and a wait makes new ones use the other counter.

use crate::simulation::{Plant, planted};

/// Two counters, and whether an answer is owed once one of them is zero. One wait at a time.
#[derive(Debug, Default)]
pub(super) struct Drain {
    /// The counter that is used now.
    parity: usize,
    under_way: [u32; 2],
    owed: bool,
}

impl Drain {
    /// Something begins; the counter that it is in.
    #[inline]
    pub(super) fn enter(&mut self) -> usize {
        self.under_way[self.parity] += 1;
        self.parity
    }

    /// What is in this counter ends.
    #[inline]
    pub(super) fn leave(&mut self, parity: usize) {
        debug_assert!(self.under_way[parity] > 0, "what ends has begun");
        self.under_way[parity] -= 1;
    }

    /// An answer is owed once all that is under way has ended.
    pub(super) fn ask(&mut self) {
        assert!(!self.owed, "one wait at a time");
        self.parity ^= 1;
        assert_eq!(self.under_way[self.parity], 0, "the last wait ended when this counter was zero");
        self.owed = true;
    }

    /// An answer is owed.
    #[inline]
    pub(super) fn is_owed(&self) -> bool {
        self.owed
    }

    /// Whether the answer that is owed is due now. It is given once.
    #[inline]
    #[must_use]
    pub(super) fn answer(&mut self) -> bool {
        let ended = self.under_way[self.parity ^ 1] == 0 || planted(Plant::EarlyAnswer);
        let due = self.owed && ended;
        self.owed &= !due;
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_waits_for_what_was_under_way_and_for_nothing_later() {
        let mut drain = Drain::default();
        let early = drain.enter();
        drain.ask();
        let late = drain.enter();
        assert!(drain.is_owed() && !drain.answer());
        drain.leave(early);
        assert!(drain.answer(), "what came later is not waited for");
        assert!(!drain.answer(), "one answer");
        drain.ask();
        assert!(!drain.answer());
        drain.leave(late);
        assert!(drain.answer());
    }
}
