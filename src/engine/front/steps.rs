//! The steps of the requests: each starts one piece of file I/O, asks the engine once, or passes over what
//! needs nothing.

use std::ops::Range;

use nix::errno::Errno;

use super::slot::Flush;
use super::{Front, MAX_LOOKS, MIN_PUNCH_BYTES, Op, submit};
use crate::engine::message::{Ask, ToEngine};
use crate::engine::port::{FileIo, FileOp, Port};
use crate::engine::shared::{LEAF, Session, Shared};
use crate::engine::span::{Span, first_to_unmap, shows_parents};
use crate::image::Location;
use crate::simulation::{Plant, planted};

/// How often one request asks again for a block that a discard took away in between.
const MAX_ASKS_AGAIN: u16 = 1000;

/// Whether another step can follow at once.
pub(super) enum Step {
    Again,
    Wait,
}

impl Front {
    /// The next step of a request that is not done, waits for no ask, and may have one more piece.
    #[inline]
    pub(super) fn step<P: Port>(&mut self, tag: u16, port: &mut P) -> Step {
        match self.slots[tag].request().op {
            Op::Read => self.step_read(tag, port),
            Op::Write { durable } => self.step_write(tag, durable, port),
            Op::Flush => self.step_flush(tag, port),
            Op::Discard => self.step_discard(tag, port),
            Op::WriteZeroes { keep_space } => self.step_zero(tag, keep_space, port),
        }
    }

    #[inline]
    fn step_read<P: Port>(&mut self, tag: u16, port: &mut P) -> Step {
        let span = self.span(tag, Span::in_chain);
        if span.is_present() {
            self.start_piece(tag, &span, FileOp::Read, false, port);
            return Step::Again;
        }
        if span.location == Location::Lost {
            self.slots[tag].fail(Errno::EIO);
            return Step::Again;
        }
        let io = FileIo {
            op: FileOp::FillZero,
            layer: LEAF,
            file_offset: 0,
            buffer_offset: self.buffer_offset(tag),
            length: span.length,
        };
        let id = self.claim_piece(tag, io);
        submit(id, io, port);
        Step::Again
    }

    #[inline]
    fn step_write<P: Port>(&mut self, tag: u16, durable: bool, port: &mut P) -> Step {
        if let Some(step) = self.await_session(tag, port) {
            return step;
        }
        let durable = durable && !planted(Plant::IgnoreFua);
        let span = self.span(tag, Span::in_leaf);
        if !span.is_changeable() {
            let (first, count) = self.blocks_ahead(tag);
            if self.shared.give_space(first) {
                return Step::Again;
            }
            return self.ask_again(tag, Ask::Allocate { first, count }, port);
        }
        if durable && !span.durable {
            self.slots[tag].flush_at_end = true;
        }
        self.start_piece(tag, &span, FileOp::Write { durable: durable && span.durable }, false, port);
        Step::Again
    }

    fn step_flush<P: Port>(&mut self, tag: u16, port: &mut P) -> Step {
        debug_assert_eq!(self.slots[tag].live_pieces(), 0, "a flush has one piece of file I/O at most");
        match self.slots[tag].flush {
            _ if self.shared.read_only => self.finish(tag, port),
            Flush::Begun if self.may_sync() => {
                self.slots[tag].flush = Flush::Synced;
                self.start_sync(tag, port);
            }
            Flush::Begun | Flush::Refused => self.end_flush(tag, Ask::Flush, port),
            // Another may have been told of what was lost, and its thread not have seen it yet.
            Flush::Synced if self.shared.has_unseen() && !planted(Plant::SyncPastUnseen) => {
                self.end_flush(tag, Ask::Fence, port);
            }
            Flush::Synced | Flush::Asked => self.finish(tag, port),
        }
        Step::Wait
    }

    /// Whether a sync of the file, which nothing else is about to tell of a loss, is all that a flush needs.
    fn may_sync(&self) -> bool {
        self.shared.session() == Session::Open && self.shared.is_logged() && !self.shared.has_unseen()
    }

    /// The flush ends with the answer to `ask`.
    fn end_flush<P: Port>(&mut self, tag: u16, ask: Ask, port: &mut P) {
        self.slots[tag].flush = Flush::Asked;
        self.ask(tag, ask, port);
    }

    fn step_discard<P: Port>(&mut self, tag: u16, port: &mut P) -> Step {
        if self.shared.fixed {
            return self.pass_over(tag, self.shared.geometry().block_count());
        }
        if let Some(blocks) = self.whole_blocks(tag) {
            return self.unmap(tag, blocks, false, port);
        }
        let (block, _) = self.blocks_ahead(tag);
        if self.shared.map.first_set(block..block + 1) > block {
            return self.pass_over(tag, block + 1);
        }
        let span = self.part(tag);
        let punches = span.is_changeable() && u64::from(span.length) >= MIN_PUNCH_BYTES;
        if !punches || !self.shared.can_punch() {
            self.skip(tag, &span);
        } else if let Some(step) = self.await_session(tag, port) {
            return step;
        } else {
            self.start_piece(tag, &span, FileOp::PunchHole, true, port);
        }
        Step::Again
    }

    fn step_zero<P: Port>(&mut self, tag: u16, keep_space: bool, port: &mut P) -> Step {
        let keep_space = keep_space || self.shared.fixed;
        let whole = self.whole_blocks(tag);
        if let Some(blocks) = whole.clone().filter(|_| !keep_space) {
            return self.unmap(tag, blocks, true, port);
        }
        let span = self.part(tag);
        if span.location == Location::Zero {
            self.skip(tag, &span);
            return Step::Again;
        }
        if let Some(step) = self.await_session(tag, port) {
            return step;
        }
        if span.is_changeable() {
            let op = self.zeroing_op(span.length, keep_space);
            self.start_piece(tag, &span, op, false, port);
            return Step::Again;
        }
        let ask = if span.is_present() {
            // The engine answers once the block has moved.
            Ask::Allocate { first: self.blocks_ahead(tag).0, count: 1 }
        } else {
            self.zero_absent(tag, &span, whole)
        };
        self.ask_again(tag, ask, port)
    }

    /// What makes the absent block at the cursor read as zeros. It takes space only where a part of it has to
    /// read on as the parents say.
    fn zero_absent(&self, tag: u16, span: &Span, whole: Option<Range<u64>>) -> Ask {
        debug_assert!(!span.is_present(), "a block with space is zeroed by its front");
        let (first, count) = self.blocks_ahead(tag);
        match whole {
            _ if span.location != Location::Below => Ask::ZeroAbsent { first, count, whole: false },
            Some(blocks) => Ask::ZeroAbsent { first, count: blocks.end - blocks.start, whole: true },
            None if shows_parents(&self.shared, first, &mut { MAX_LOOKS }) => {
                Ask::Allocate { first, count: 1 }
            }
            None => Ask::ZeroAbsent { first, count: 1, whole: false },
        }
    }

    /// Whole `blocks` at the cursor are to read as zeros. Those that do already are passed over without a
    /// word to the engine: what it has published is what every acknowledged request has left. A request still
    /// under way may come before this one or after it.
    fn unmap<P: Port>(&mut self, tag: u16, blocks: Range<u64>, define_absent: bool, port: &mut P) -> Step {
        debug_assert!(!blocks.is_empty() && !self.shared.fixed, "{blocks:?} give space back");
        let mut looks = MAX_LOOKS;
        let first = first_to_unmap(&self.shared, blocks.clone(), define_absent, &mut looks);
        if first.is_some()
            && let Some(step) = self.await_session(tag, port)
        {
            return step;
        }
        let passed = self.pass_over(tag, blocks.end);
        let Some(first) = first else { return passed };
        self.ask(tag, Ask::Unmap { first, count: blocks.end - first, define_absent }, port);
        Step::Wait
    }

    pub(super) fn zeroing_op(&self, length: u32, keep_space: bool) -> FileOp {
        if u64::from(length) < MIN_PUNCH_BYTES {
            FileOp::WriteZeros
        } else if !keep_space && self.shared.can_punch() {
            FileOp::PunchHole
        } else if self.shared.can_zero_range() {
            FileOp::ZeroRange
        } else {
            FileOp::WriteZeros
        }
    }

    /// `None` in an open session; otherwise the step that leads there, or to the request's failure.
    #[inline]
    fn await_session<P: Port>(&mut self, tag: u16, port: &mut P) -> Option<Step> {
        match self.shared.session() {
            Session::Open => None,
            Session::Idle => Some(self.ask_again(tag, Ask::OpenSession, port)),
            Session::Poisoned => {
                self.slots[tag].fail(Errno::EIO);
                Some(Step::Again)
            }
        }
    }

    pub(super) fn ask<P: Port>(&mut self, tag: u16, ask: Ask, port: &mut P) {
        self.slots[tag].wait();
        port.send(ToEngine::Ask { tag, ask });
    }

    /// An ask whose answer is looked up again, so that its repetitions need a bound.
    fn ask_again<P: Port>(&mut self, tag: u16, ask: Ask, port: &mut P) -> Step {
        let slot = &mut self.slots[tag];
        slot.asks += 1;
        if slot.asks > MAX_ASKS_AGAIN {
            slot.fail(Errno::EIO);
            return Step::Again;
        }
        self.ask(tag, ask, port);
        Step::Wait
    }

    /// The longest span from the cursor that one piece of file I/O can serve, over neighbouring blocks too.
    #[inline]
    fn span(&self, tag: u16, look_up: impl Fn(&Shared, u64, u64) -> Span) -> Span {
        let slot = &self.slots[tag];
        let mut span = look_up(&self.shared, slot.cursor, slot.past());
        let mut next = slot.cursor + u64::from(span.length);
        while next < slot.past() {
            let more = look_up(&self.shared, next, slot.past());
            if !span.continues_with(&more) {
                break;
            }
            span.length += more.length;
            span.durable &= more.durable;
            span.partial |= more.partial;
            span.moving |= more.moving;
            next += u64::from(more.length);
        }
        span
    }

    /// The part of the cursor's block that the request covers.
    #[inline]
    fn part(&self, tag: u16) -> Span {
        let slot = &self.slots[tag];
        Span::in_leaf(&self.shared, slot.cursor, slot.past())
    }

    /// Whole blocks at the cursor. The last block of the disk is whole when the range reaches the end of the
    /// disk.
    fn whole_blocks(&self, tag: u16) -> Option<Range<u64>> {
        let geometry = self.shared.geometry();
        let slot = &self.slots[tag];
        let end = slot.past();
        if !slot.cursor.is_multiple_of(geometry.block_size()) {
            return None;
        }
        let first = slot.cursor / geometry.block_size();
        let past =
            if end == geometry.virtual_size() { geometry.block_count() } else { end / geometry.block_size() };
        (past > first).then_some(first..past)
    }

    /// The blocks from the cursor to the end of the request, as (first, count).
    fn blocks_ahead(&self, tag: u16) -> (u64, u64) {
        let slot = &self.slots[tag];
        debug_assert!(slot.cursor < slot.past(), "a step begins before the request's end");
        let first = self.shared.geometry().block_of_offset(slot.cursor);
        let last = self.shared.geometry().block_of_offset(slot.past() - 1);
        (first, last - first + 1)
    }

    /// Nothing needs doing in the blocks before `block`.
    fn pass_over(&mut self, tag: u16, block: u64) -> Step {
        let slot = &mut self.slots[tag];
        slot.cursor = slot.past().min(block * self.shared.geometry().block_size());
        slot.asks = 0;
        Step::Again
    }

    /// Nothing needs doing for `span`.
    fn skip(&mut self, tag: u16, span: &Span) {
        let slot = &mut self.slots[tag];
        slot.cursor += u64::from(span.length);
        slot.asks = 0;
    }

    #[inline]
    pub(super) fn buffer_offset(&self, tag: u16) -> u32 {
        let slot = &self.slots[tag];
        match slot.request().op {
            Op::Read | Op::Write { .. } => {
                u32::try_from(slot.cursor - slot.request().offset).expect("a buffer holds at most 1 MiB")
            }
            Op::Flush | Op::Discard | Op::WriteZeroes { .. } => 0,
        }
    }
}
