//! Requests that the host has no room for, and that wait until it has some (`add --on-full wait`).
//!
//! Such a request gives its slot up, so that a hold does not wait for it, and keeps its ticket. Later all of
//! it is done again, not only what is left of it: in between its blocks may move or be given back, and
//! another image may be served.

use std::collections::VecDeque;

use nix::errno::Errno;

use super::{Front, Op, Request};
use crate::engine::port::{Port, Ticket};
use crate::engine::shared::Session;
use crate::simulation::{Plant, planted};

/// How many are tried at a time. Each costs a full host some I/O, and has all others follow if it succeeds.
const TRIED_AT_ONCE: usize = 4;

/// See the module's head.
#[derive(Default)]
pub(super) struct Shortage {
    /// Whether requests wait. Otherwise they fail.
    allowed: bool,
    /// Those that do, the next one to be tried first.
    waiting: VecDeque<(Request, Ticket)>,
    /// Requests that have waited and are being served again.
    tried: usize,
    /// All of them are being tried. Each may end at once, which must not try the others again inside of that:
    /// there may be thousands, and the stack is bounded.
    all_tried: bool,
}

impl Shortage {
    /// Whether requests wait for room instead of failing.
    pub(super) fn is_waited_for(&self) -> bool {
        self.allowed
    }

    /// Whether no request waits that is not being served again.
    pub(super) fn is_over(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether the request of `tag` waits.
    pub(super) fn holds(&self, tag: u16) -> bool {
        self.waiting.iter().any(|(_, ticket)| ticket.tag() == tag)
    }
}

impl Front {
    /// The same front, whose requests wait for room instead of failing.
    #[must_use]
    pub fn waiting_for_room(mut self) -> Self {
        self.shortage.allowed = true;
        self.shortage.waiting.reserve(self.slots.count());
        self
    }

    /// How many requests wait for room, those included that are being tried again.
    pub fn short_of_room(&self) -> usize {
        self.shortage.waiting.len() + self.shortage.tried
    }

    /// How many requests wait for room and are not served at the moment.
    pub fn resting(&self) -> usize {
        self.shortage.waiting.len()
    }

    /// Tries some of the requests that wait for room again, unless no request is begun now. The loop calls it
    /// now and then, as long as any waits: that the host has room again is shown by trying only.
    pub fn try_again<P: Port>(&mut self, port: &mut P) {
        for _ in 0..TRIED_AT_ONCE.min(self.shortage.waiting.len()) {
            self.try_next(port);
        }
    }

    /// From now on no request waits for room: those that do fail.
    pub fn end_waits<P: Port>(&mut self, port: &mut P) {
        self.shortage.allowed = false;
        for (_, ticket) in std::mem::take(&mut self.shortage.waiting) {
            self.shared.troubles().waits_no_more();
            port.complete(ticket, Err(Errno::ENOSPC));
        }
    }

    /// Whether the request of `tag`, all of whose pieces have ended, is to wait for room.
    pub(super) fn is_short(&self, tag: u16) -> bool {
        let slot = &self.slots[tag];
        matches!(slot.error(), Some(Errno::ENOSPC | Errno::EDQUOT))
            && self.shortage.allowed
            && slot.request().op != Op::Read
            && self.shared.session() != Session::Poisoned
    }

    /// The request of `tag` is no longer served, and not completed.
    pub(super) fn wait_for_room<P: Port>(&mut self, tag: u16, port: &mut P) {
        let slot = &mut self.slots[tag];
        let (request, has_waited) = (*slot.request(), slot.has_waited);
        let ticket = slot.end();
        self.shortage.waiting.push_back((request, ticket));
        if has_waited {
            self.shortage.tried -= 1;
        } else {
            self.shared.troubles().waits();
        }
        if !planted(Plant::CountWaiting) {
            self.active -= 1;
        }
        self.answer_hold(port);
    }

    /// A request that has waited is completed. It did not find the host full, so the others are tried, too.
    pub(super) fn second_try_ends<P: Port>(&mut self, succeeded: bool, port: &mut P) {
        self.shortage.tried -= 1;
        let troubles = self.shared.troubles();
        troubles.waits_no_more();
        if succeeded {
            troubles.found_room();
        }
        if std::mem::replace(&mut self.shortage.all_tried, true) {
            return;
        }
        for _ in 0..self.shortage.waiting.len() {
            self.try_next(port);
        }
        self.shortage.all_tried = false;
    }

    fn try_next<P: Port>(&mut self, port: &mut P) {
        if self.held {
            return;
        }
        let Some((request, ticket)) = self.shortage.waiting.pop_front() else { return };
        self.shortage.tried += 1;
        let tag = ticket.tag();
        let slot = &mut self.slots[tag];
        let stopped_at = slot.cursor;
        slot.begin(request, ticket);
        slot.has_waited = true;
        if planted(Plant::DoOnlyTheRest) {
            slot.cursor = stopped_at;
        }
        self.serve(tag, request, port);
    }
}
