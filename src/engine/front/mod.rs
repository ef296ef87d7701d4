//! The hot path: one front per queue turns requests into file I/O.
//!
//! A plain synchronous state machine: no lock, no future, no heap use per request. It splits a request at
//! block borders, looks each piece up in the block map and starts file I/O on what is there. For what is not
//! there it sends a request to the engine, or gives the block space of the pool, and looks it up again. It
//! does all payload I/O, also into blocks just granted.
//!
//! Invariants:
//!
//! * a request is completed exactly once, when its last piece has ended and no ask is outstanding, with its
//!   full length or its first error. One that waits for room is served again first;
//! * a piece counts for the barrier from its *lookup* to its end, in one of two counters by barrier parity;
//! * a write is submitted only in an open session and reported as done only in an unpoisoned one;
//! * a durable write into a block whose mapping is not durable is an ordinary write that joins a flush, and
//!   so is one for which the host has no room: the sync of that flush fails if the host has lost anything
//!   else by then;
//! * a durable write or a sync in flight is known to the engine and to all fronts, until its end has been
//!   seen and, if it failed, has poisoned;
//! * a flush is a sync by the front where nothing has to be logged, and counts once the end of every other
//!   sync and durable write that was in flight at its end has been seen (`engine/unlogged`,
//!   `engine/sync`);
//! * a sector of a partially present block is marked as present when its data is, and before the request is
//!   done.

mod shortage;
mod slot;
mod steps;
mod verdict;

use std::sync::Arc;

use nix::errno::Errno;

use self::shortage::Shortage;
use self::slot::{Flush, Piece, Slots};
use self::steps::Step;
use self::verdict::{Verdict, judge};
use super::drain::Drain;
use super::message::{Ask, ToEngine, ToFront};
use super::port::{FileIo, FileOp, MAX_WRITE_ZEROS, PieceId, Port, Ticket};
use super::shared::{LEAF, Session, Shared};
use super::span::Span;
use super::{Outcome, for_guest, is_refusal, too_long_is_full};
use crate::image::Location;
use crate::simulation::{Plant, planted};

/// Pieces of one request in flight at a time: a request of 1 MiB crosses few blocks, a chain splits finer.
pub const MAX_PIECES: usize = 8;

/// Parts of blocks below this size are not punched (each `fallocate` drains all direct I/O on the file):
/// an advisory discard is acknowledged without work, zeros are written.
pub const MIN_PUNCH_BYTES: u64 = 64 << 10;

/// Entries of block maps that a front looks at for one request before it leaves the search to the engine,
/// which lets others have their turn: about 50 microseconds. The longest discard of a single image needs
/// fewer.
pub const MAX_LOOKS: u32 = 16 << 10;

/// A request as the kernel made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is asked.
    pub op: Op,
    /// Virtual offset, bytes.
    pub offset: u64,
    /// Length, bytes.
    pub length: u64,
}

/// The kinds of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Read into the tag's buffer.
    Read,
    /// Write from the tag's buffer.
    Write {
        /// Force unit access: durable before it completes.
        durable: bool,
    },
    /// Make every acknowledged write durable.
    Flush,
    /// The content is no longer needed; advisory.
    Discard,
    /// The range reads as zero afterwards.
    WriteZeroes {
        /// Keep the space (`NOUNMAP`).
        keep_space: bool,
    },
}

/// The state machine of one queue.
pub struct Front {
    shared: Arc<Shared>,
    slots: Slots,
    active: u32,
    /// Pieces, from their lookup on, for the barrier.
    looked_up: Drain,
    /// Durable writes and syncs in flight, for the fence.
    unseen: Drain,
    /// No request is begun.
    held: bool,
    hold_owed: bool,
    /// Requests that came meanwhile.
    parked: Vec<(u16, Request)>,
    /// Requests that wait for room.
    shortage: Shortage,
}

impl Front {
    /// A front for `depth` tags.
    pub fn new(shared: Arc<Shared>, depth: u16) -> Self {
        Self {
            shared,
            slots: Slots::new(depth),
            active: 0,
            looked_up: Drain::default(),
            unseen: Drain::default(),
            held: false,
            hold_owed: false,
            parked: Vec::with_capacity(usize::from(depth)),
            shortage: Shortage::default(),
        }
    }

    /// No request is here, and no barrier or fence is owed.
    pub fn is_idle(&self) -> bool {
        self.is_at_rest() && self.shortage.is_over()
    }

    /// The same, but for requests that wait for room.
    pub fn is_at_rest(&self) -> bool {
        self.active == 0 && !self.looked_up.is_owed() && !self.unseen.is_owed() && self.parked.is_empty()
    }

    /// Takes a request; `tag` is idle.
    pub fn start<P: Port>(&mut self, tag: u16, request: Request, port: &mut P) {
        debug_assert!(self.parked.iter().all(|(parked, _)| *parked != tag), "tag {tag} is parked");
        debug_assert!(!self.shortage.holds(tag), "tag {tag} waits for room");
        if self.held {
            return self.parked.push((tag, request));
        }
        self.slots[tag].begin(request, Ticket::of(tag));
        self.serve(tag, request, port);
    }

    /// Serves the request that the slot of `tag` has taken.
    #[inline]
    fn serve<P: Port>(&mut self, tag: u16, request: Request, port: &mut P) {
        self.active += 1;
        if let Err(errno) = self.admit(request) {
            self.slots[tag].fail(errno);
        }
        self.advance(tag, port);
        self.slots[tag].check();
    }

    /// Takes the end of a piece: bytes done, or a negative `errno`.
    pub fn io_done<P: Port>(&mut self, id: PieceId, result: i32, port: &mut P) {
        let piece = *self.slots.piece(id);
        match judge(&piece, result, self.shared.geometry().logical_sector_size()) {
            Verdict::Done => self.end_piece(id, Ok(()), port),
            Verdict::NotBegun => self.have_engine_sync(id, port),
            Verdict::Failed(errno) if self.can_flush_instead(piece, errno) => self.flush_instead(id, port),
            Verdict::Failed(errno) => self.end_piece(id, Err(errno), port),
            Verdict::Continue(rest) => self.resubmit(id, rest, port),
            Verdict::EndOfFile(done) => self.fill_past_end(id, done, port),
            Verdict::Unsupported => self.zero_without_support(id, port),
        }
        self.slots[id.tag].check();
    }

    /// Where in its tag's buffer the data of a live piece goes, bytes.
    pub fn buffer_place(&self, id: PieceId) -> usize {
        self.slots.piece(id).rest.buffer_offset as usize
    }

    /// Takes a message from the engine.
    pub fn receive<P: Port>(&mut self, message: ToFront, port: &mut P) {
        match message {
            ToFront::Reply { tag, result } => {
                let slot = &mut self.slots[tag];
                slot.answered();
                if let Err(errno) = result {
                    slot.fail(errno);
                }
                self.advance(tag, port);
                self.slots[tag].check();
            }
            ToFront::Barrier => {
                self.looked_up.ask();
                self.answer_barrier(port);
            }
            ToFront::Fence => {
                self.unseen.ask();
                self.answer_fence(port);
            }
            ToFront::Hold => {
                assert!(!self.held, "one hold at a time");
                self.held = true;
                self.hold_owed = true;
                self.answer_hold(port);
            }
            ToFront::Release => self.release(port),
        }
    }

    fn answer_hold<P: Port>(&mut self, port: &mut P) {
        if self.hold_owed && (self.active == 0 || planted(Plant::EarlyHeld)) {
            self.hold_owed = false;
            port.send(ToEngine::Held);
        }
    }

    fn release<P: Port>(&mut self, port: &mut P) {
        assert!(self.held && !self.hold_owed, "a hold that was answered is released, once");
        self.held = false;
        if let Some(shared) = port.change_leaf()
            && !planted(Plant::KeepOldMap)
        {
            shared.troubles().take_over(self.shared.troubles(), self.short_of_room());
            self.shared = shared;
        }
        let mut parked = std::mem::take(&mut self.parked);
        for (tag, request) in parked.drain(..) {
            self.start(tag, request, port);
        }
        // With its room, for the next hold.
        self.parked = parked;
    }

    fn admit(&self, request: Request) -> Outcome {
        let sector = u64::from(self.shared.geometry().logical_sector_size());
        let end = request.offset.checked_add(request.length).ok_or(Errno::EIO)?;
        let aligned = request.offset.is_multiple_of(sector) && request.length.is_multiple_of(sector);
        if !aligned || end > self.shared.geometry().virtual_size() {
            return Err(Errno::EIO);
        }
        match request.op {
            Op::Write { .. } | Op::Discard | Op::WriteZeroes { .. } if self.shared.read_only => {
                Err(Errno::EROFS)
            }
            _ => Ok(()),
        }
    }

    /// Starts whatever the request can start now, and completes it when nothing is left.
    fn advance<P: Port>(&mut self, tag: u16, port: &mut P) {
        loop {
            let slot = &self.slots[tag];
            if slot.is_waiting() {
                return;
            }
            if slot.error().is_some() || (slot.cursor == slot.past() && slot.request().op != Op::Flush) {
                break;
            }
            if slot.live_pieces() == MAX_PIECES {
                return;
            }
            if let Step::Wait = self.step(tag, port) {
                return;
            }
        }
        if self.slots[tag].live_pieces() == 0 {
            self.finish(tag, port);
        }
    }

    fn finish<P: Port>(&mut self, tag: u16, port: &mut P) {
        let slot = &mut self.slots[tag];
        let request = *slot.request();
        let reads_only = matches!(request.op, Op::Read) || self.shared.read_only;
        if !reads_only && self.shared.session() == Session::Poisoned {
            // What may wait for room does not end for want of it: no room would help.
            if self.shortage.is_waited_for() {
                slot.forget_shortage();
            }
            slot.fail(Errno::EIO);
        }
        if slot.error().is_none() && std::mem::take(&mut slot.flush_at_end) {
            return self.ask(tag, Ask::Flush, port);
        }
        if self.is_short(tag) {
            return self.wait_for_room(tag, port);
        }
        let slot = &mut self.slots[tag];
        let bytes = match request.op {
            Op::Read | Op::Write { .. } => request.length,
            Op::Flush | Op::Discard | Op::WriteZeroes { .. } => 0,
        };
        let result = match slot.error() {
            None => Ok(u32::try_from(bytes).expect("at most 1 MiB")),
            Some(errno) => Err(too_long_is_full(errno)),
        };
        let has_waited = slot.has_waited;
        let ticket = slot.end();
        debug_assert!(self.active > 0, "an active request ends");
        self.active -= 1;
        port.complete(ticket, result);
        self.answer_hold(port);
        if has_waited {
            self.second_try_ends(result.is_ok(), port);
        }
    }

    /// Starts `op` on the file that `span` lies in; the number of its piece is in use from now on.
    #[inline]
    fn start_piece<P: Port>(&mut self, tag: u16, span: &Span, op: FileOp, advisory: bool, port: &mut P) {
        let Location::File { layer, offset: file_offset } = span.location else {
            panic!("file I/O goes to blocks that are there")
        };
        assert!(layer == LEAF || op == FileOp::Read, "parents are only read");
        let io =
            FileIo { op, layer, file_offset, buffer_offset: self.buffer_offset(tag), length: span.length };
        let from = self.slots[tag].cursor;
        debug_assert!(
            from + u64::from(io.length) <= self.slots[tag].past(),
            "a piece is part of its request"
        );
        if op != FileOp::Read && !span.durable {
            self.shared.found_mappings(from, from + u64::from(io.length));
        }
        let id = self.claim_piece(tag, io);
        self.slots.piece_mut(id).advisory = advisory;
        if op == (FileOp::Write { durable: true }) {
            self.unseen_begins(id);
        }
        if span.partial && !advisory && op != FileOp::Read {
            self.slots.piece_mut(id).written = Some((from, from + u64::from(span.length)));
            if planted(Plant::BitsBeforeData) {
                self.shared.mark_written(from, from + u64::from(span.length));
            }
        }
        submit(id, io, port);
    }

    /// Takes a free place for a piece, counts it for the barrier and moves the cursor past it.
    #[inline]
    fn claim_piece(&mut self, tag: u16, io: FileIo) -> PieceId {
        let slot = &mut self.slots[tag];
        let piece = slot.add(Piece {
            rest: io,
            retries: 0,
            parity: self.looked_up.enter(),
            unseen_parity: None,
            advisory: false,
            written: None,
        });
        slot.cursor += u64::from(io.length);
        slot.asks = 0;
        PieceId { tag, piece }
    }

    /// Starts the sync of a flush that needs no more.
    fn start_sync<P: Port>(&mut self, tag: u16, port: &mut P) {
        let io = FileIo { op: FileOp::Sync, layer: LEAF, file_offset: 0, buffer_offset: 0, length: 0 };
        let id = self.claim_piece(tag, io);
        self.unseen_begins(id);
        submit(id, io, port);
    }

    /// The sync of a flush was not begun: the engine syncs for it.
    fn have_engine_sync<P: Port>(&mut self, id: PieceId, port: &mut P) {
        self.slots[id.tag].flush = Flush::Refused;
        self.end_piece(id, Ok(()), port);
    }

    /// Whether a durable write that failed may be done as an ordinary one that joins a flush.
    fn can_flush_instead(&self, piece: Piece, errno: Errno) -> bool {
        piece.rest.op == (FileOp::Write { durable: true })
            && is_refusal(errno)
            && !planted(Plant::RefusalPoisons)
            && self.shared.session() == Session::Open
    }

    fn flush_instead<P: Port>(&mut self, id: PieceId, port: &mut P) {
        self.slots[id.tag].flush_at_end = true;
        self.unseen_ended(id, port);
        let rest = self.slots.piece(id).rest;
        self.resubmit(id, FileIo { op: FileOp::Write { durable: false }, ..rest }, port);
    }

    fn unseen_begins(&mut self, id: PieceId) {
        self.shared.unseen_begins();
        let parity = self.unseen.enter();
        let before = self.slots.piece_mut(id).unseen_parity.replace(parity);
        debug_assert_eq!(before, None, "a durable write or a sync begins once");
    }

    /// The end of a durable write or a sync has been seen, and has poisoned if it must.
    fn unseen_ended<P: Port>(&mut self, id: PieceId, port: &mut P) {
        if let Some(parity) = self.slots.piece_mut(id).unseen_parity.take() {
            self.shared.unseen_ended();
            self.unseen.leave(parity);
            self.answer_fence(port);
        }
    }

    fn resubmit<P: Port>(&mut self, id: PieceId, rest: FileIo, port: &mut P) {
        let piece = self.slots.piece_mut(id);
        debug_assert!((1..=piece.rest.length).contains(&rest.length), "a piece never gets longer");
        piece.retries = if piece.rest == rest { piece.retries + 1 } else { 0 };
        piece.rest = rest;
        if planted(Plant::LateCount) {
            let counted = piece.parity;
            self.looked_up.leave(counted);
            self.slots.piece_mut(id).parity = self.looked_up.enter();
            self.answer_barrier(port);
        }
        port.resubmit(id, bounded(rest));
    }

    /// The file ends before the end of what is read. What it never had reads as zero: fixed images by QEMU
    /// end inside their last block. What it had when it was opened, another program has cut off.
    fn fill_past_end<P: Port>(&mut self, id: PieceId, done: u32, port: &mut P) {
        let rest = self.slots.piece(id).rest;
        let [start, end] = [done, rest.length].map(|bytes| rest.file_offset + u64::from(bytes));
        if self.shared.has_lost(rest.layer, start..end) {
            return self.end_piece(id, Err(Errno::EIO), port);
        }
        let rest = FileIo {
            op: FileOp::FillZero,
            layer: LEAF,
            file_offset: 0,
            buffer_offset: rest.buffer_offset + done,
            length: rest.length - done,
        };
        self.resubmit(id, rest, port);
    }

    /// The host does not know this kind of `fallocate`: another way, from now on. What is advisory is left
    /// undone.
    fn zero_without_support<P: Port>(&mut self, id: PieceId, port: &mut P) {
        let Piece { rest, advisory, .. } = *self.slots.piece(id);
        if rest.op == FileOp::PunchHole {
            self.shared.forget_punch();
        } else {
            self.shared.forget_zero_range();
        }
        if advisory {
            return self.end_piece(id, Ok(()), port);
        }
        self.resubmit(id, FileIo { op: self.zeroing_op(rest.length, true), ..rest }, port);
    }

    fn end_piece<P: Port>(&mut self, id: PieceId, outcome: Outcome, port: &mut P) {
        if planted(Plant::EndBeforePoison) {
            self.unseen_ended(id, port);
        }
        let op = self.slots.piece(id).rest.op;
        if let Err(errno) = outcome {
            self.note_failure(op, errno);
        }
        self.unseen_ended(id, port);
        let piece = self.slots[id.tag].remove(id.piece);
        self.looked_up.leave(piece.parity);
        if let Err(errno) = outcome {
            // What no sync has made durable is lost, whatever the host says of why.
            let errno = if op == FileOp::Sync { Errno::EIO } else { for_guest(errno) };
            if !(planted(Plant::TrustSecondTry) && self.slots[id.tag].has_waited) {
                self.slots[id.tag].fail(errno);
            }
        } else if let Some((from, to)) = piece.written {
            self.shared.mark_written(from, to);
        }
        self.answer_barrier(port);
        self.advance(id.tag, port);
    }

    /// File I/O has failed; what must not fail poisons.
    fn note_failure(&self, op: FileOp, errno: Errno) {
        let (doing, poisons) = match op {
            FileOp::Sync => ("syncing the image", !planted(Plant::SilentSync)),
            FileOp::Write { durable: true } => ("a durable write", !planted(Plant::NoPoison)),
            _ => ("reading or writing the image", false),
        };
        self.shared.troubles().note(doing, errno);
        if poisons && self.shared.poison() {
            tracing::error!("{doing} failed: {errno}; no write or flush will succeed, reads still work");
        }
    }

    fn answer_fence<P: Port>(&mut self, port: &mut P) {
        if self.unseen.answer() {
            port.send(ToEngine::Fenced);
        }
    }

    fn answer_barrier<P: Port>(&mut self, port: &mut P) {
        if self.looked_up.answer() {
            port.send(ToEngine::BarrierDone);
        }
    }
}

fn submit<P: Port>(id: PieceId, rest: FileIo, port: &mut P) {
    port.submit(id, bounded(rest));
}

/// As much of `rest` as one operation does.
fn bounded(rest: FileIo) -> FileIo {
    let length = if rest.op == FileOp::WriteZeros { rest.length.min(MAX_WRITE_ZEROS) } else { rest.length };
    FileIo { length, ..rest }
}
