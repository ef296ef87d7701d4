//! The hot path: one front per queue turns requests into file I/O.
//!
//! A plain synchronous state machine: no lock, no future, no heap use per request. It splits a request at
//! block borders, looks each piece up in the block map and starts file I/O on what is there; what is not
//! there it asks of the engine, and looks up again. It does all payload I/O, also into blocks just granted.
//!
//! Invariants:
//!
//! * a request is completed exactly once, when its last piece has ended and no ask is outstanding, with its
//!   full length or its first error;
//! * a piece counts for the barrier from its *lookup* to its end, in one of two counters by barrier parity;
//! * a write is submitted only in an open session and reported as done only in an unpoisoned one;
//! * a durable write into a block whose mapping is not durable is an ordinary write that joins a flush, and so is one
//!   for which the host has no room: what else it says in that moment the flush is told, too;
//! * a durable write in flight is known to the engine, until its end has been seen and, if it failed, has poisoned;
//! * a sector of a partially present block is marked as being there when its data is, and before the request is done.

use std::ops::Range;
use std::sync::Arc;

use super::drain::Drain;
use super::message::{Ask, ToEngine, ToFront};
use super::port::{FileIo, FileOp, LEAF, MAX_WRITE_ZEROS, PieceId, Port};
use super::run::{Run, Source, first_to_unmap, shows_parents};
use super::shared::{Session, Shared};
use super::{is_refusal, told};
use crate::simulation::{Plant, planted};

/// Pieces of one request in flight at a time: a request of 1 MiB crosses few blocks, a chain splits finer.
pub const MAX_PIECES: usize = 8;

/// How often one piece is repeated that the host has not begun, or has no memory for.
const MAX_RETRIES: u8 = 16;

/// What the host says of an operation that it has not begun, or has not ended and can be asked for again.
const NOT_BEGUN: [i32; 4] = [libc::EAGAIN, libc::EINTR, libc::ENOMEM, libc::ECANCELED];

/// How often one request asks again for a block that a discard took away in between.
const MAX_ASKS_AGAIN: u16 = 1000;

/// Parts of blocks below this size are not punched (each `fallocate` drains all direct I/O on the file):
/// an advisory discard is acknowledged without work, zeros are written.
pub const MIN_PUNCH_BYTES: u64 = 64 << 10;

/// Entries of block maps that a front looks at for one request before it leaves the search to the engine, which lets
/// others have their turn: about 50 microseconds. The longest discard of a single image needs fewer.
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
    slots: Box<[Slot]>,
    active: u32,
    /// Pieces, from their lookup on, for the barrier.
    looked_up: Drain,
    /// Durable writes in flight, for the fence.
    durable: Drain,
    /// No request is begun.
    held: bool,
    hold_owed: bool,
    /// Requests that came meanwhile.
    parked: Vec<(u16, Request)>,
}

#[derive(Clone)]
struct Slot {
    request: Option<Request>,
    /// Virtual offset up to which pieces have been started or asks sent.
    cursor: u64,
    pieces: [Option<Piece>; MAX_PIECES],
    live_pieces: usize,
    waiting: bool,
    /// First error, a positive `errno`; 0 while there is none.
    error: i32,
    flush_at_end: bool,
    asks: u16,
}

#[derive(Clone, Copy)]
struct Piece {
    /// What is still to be done.
    rest: FileIo,
    retries: u8,
    parity: usize,
    /// Of a durable write: in which counter it is.
    durable_parity: Option<usize>,
    /// Not needed for the request's result: a host that cannot do it is no error.
    advisory: bool,
    /// Of a write into partially present blocks: its virtual range.
    written: Option<(u64, u64)>,
}

/// Whether a request can go on at once.
enum Step {
    Again,
    Wait,
}

impl Slot {
    const IDLE: Self = Self {
        request: None,
        cursor: 0,
        pieces: [None; MAX_PIECES],
        live_pieces: 0,
        waiting: false,
        error: 0,
        flush_at_end: false,
        asks: 0,
    };

    /// Takes a request. The places of its pieces are empty already: each was emptied when its piece ended.
    fn begin(&mut self, request: Request) {
        assert!(self.request.is_none() && self.live_pieces == 0 && !self.waiting, "the tag is busy");
        self.request = Some(request);
        self.cursor = request.offset;
        self.error = 0;
        self.flush_at_end = false;
        self.asks = 0;
    }

    fn request(&self) -> &Request {
        self.request.as_ref().expect("an event names an active tag")
    }

    fn end(&self) -> u64 {
        self.request().offset + self.request().length
    }

    fn fail(&mut self, errno: i32) {
        assert!(errno > 0, "errors are positive numbers here");
        if self.error == 0 {
            self.error = errno;
        }
    }
}

impl Front {
    /// A front for `depth` tags.
    pub fn new(shared: Arc<Shared>, depth: u16) -> Self {
        Self {
            shared,
            slots: vec![Slot::IDLE; usize::from(depth)].into_boxed_slice(),
            active: 0,
            looked_up: Drain::default(),
            durable: Drain::default(),
            held: false,
            hold_owed: false,
            parked: Vec::with_capacity(usize::from(depth)),
        }
    }

    /// No request is active, and no barrier or fence is owed.
    pub fn is_idle(&self) -> bool {
        self.active == 0 && !self.looked_up.is_owed() && !self.durable.is_owed() && self.parked.is_empty()
    }

    /// Takes a request; `tag` is idle.
    pub fn start<P: Port>(&mut self, tag: u16, request: Request, port: &mut P) {
        if self.held {
            return self.parked.push((tag, request));
        }
        self.slots[usize::from(tag)].begin(request);
        self.active += 1;
        if let Err(errno) = self.admit(request) {
            self.slots[usize::from(tag)].fail(errno);
        }
        self.advance(tag, port);
    }

    /// Takes the end of a piece: bytes done, or a negative `errno`.
    pub fn io_done<P: Port>(&mut self, id: PieceId, result: i32, port: &mut P) {
        let piece = self.slots[usize::from(id.tag)].pieces[usize::from(id.piece)];
        let piece = piece.expect("a completion names a live piece");
        match self.judge(piece, result) {
            Verdict::Done => self.end_piece(id, 0, port),
            Verdict::Failed(errno) if self.can_flush_instead(piece, errno) => self.flush_instead(id, port),
            Verdict::Failed(errno) => self.end_piece(id, errno, port),
            Verdict::Continue(rest) => self.resubmit(id, rest, port),
            Verdict::EndOfFile(done) => self.fill_past_end(id, done, port),
        }
    }

    /// Where in its tag's buffer the data of a live piece goes, bytes.
    pub fn buffer_place(&self, id: PieceId) -> usize {
        let piece = self.slots[usize::from(id.tag)].pieces[usize::from(id.piece)];
        piece.expect("a live piece").rest.buffer_offset as usize
    }

    /// Takes a message from the engine.
    pub fn receive<P: Port>(&mut self, message: ToFront, port: &mut P) {
        match message {
            ToFront::Reply { tag, result } => {
                let slot = &mut self.slots[usize::from(tag)];
                assert!(std::mem::take(&mut slot.waiting), "tag {tag} asked nothing");
                if let Err(errno) = result {
                    slot.fail(errno);
                }
                self.advance(tag, port);
            }
            ToFront::Barrier => {
                self.looked_up.ask();
                self.answer_barrier(port);
            }
            ToFront::Fence => {
                self.durable.ask();
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
        assert!(self.held && !self.hold_owed, "what was held is released, once");
        self.held = false;
        if let Some(shared) = port.change_leaf() {
            self.shared = shared;
        }
        let mut parked = std::mem::take(&mut self.parked);
        for (tag, request) in parked.drain(..) {
            self.start(tag, request, port);
        }
        // With its room, for the next hold.
        self.parked = parked;
    }

    fn admit(&self, request: Request) -> Result<(), i32> {
        let sector = u64::from(self.shared.geometry().logical_sector_size());
        let end = request.offset.checked_add(request.length).ok_or(libc::EIO)?;
        let aligned = request.offset.is_multiple_of(sector) && request.length.is_multiple_of(sector);
        if !aligned || end > self.shared.geometry().virtual_size() {
            return Err(libc::EIO);
        }
        match request.op {
            Op::Write { .. } | Op::Discard | Op::WriteZeroes { .. } if self.shared.read_only => {
                Err(libc::EROFS)
            }
            _ => Ok(()),
        }
    }

    /// Starts whatever the request can start now, and completes it when nothing is left.
    fn advance<P: Port>(&mut self, tag: u16, port: &mut P) {
        loop {
            let slot = &self.slots[usize::from(tag)];
            if slot.waiting {
                return;
            }
            if slot.error != 0 || (slot.cursor == slot.end() && slot.request().op != Op::Flush) {
                break;
            }
            if slot.live_pieces == MAX_PIECES {
                return;
            }
            let step = match slot.request().op {
                Op::Read => self.step_read(tag, port),
                Op::Write { durable } => self.step_write(tag, durable, port),
                Op::Flush => self.step_flush(tag, port),
                Op::Discard => self.step_discard(tag, port),
                Op::WriteZeroes { keep_space } => self.step_zero(tag, keep_space, port),
            };
            if let Step::Wait = step {
                return;
            }
        }
        if self.slots[usize::from(tag)].live_pieces == 0 {
            self.finish(tag, port);
        }
    }

    fn finish<P: Port>(&mut self, tag: u16, port: &mut P) {
        let slot = &mut self.slots[usize::from(tag)];
        let request = *slot.request();
        let reads_only = matches!(request.op, Op::Read) || self.shared.read_only;
        if slot.error == 0 && !reads_only && self.shared.session() == Session::Poisoned {
            slot.error = libc::EIO;
        }
        if slot.error == 0 && std::mem::take(&mut slot.flush_at_end) {
            return self.ask(tag, Ask::Flush, port);
        }
        let result = match request.op {
            _ if slot.error != 0 => -slot.error,
            Op::Read | Op::Write { .. } => i32::try_from(request.length).expect("at most 1 MiB"),
            Op::Flush | Op::Discard | Op::WriteZeroes { .. } => 0,
        };
        slot.request = None;
        self.active -= 1;
        port.complete(tag, result);
        self.answer_hold(port);
    }

    fn step_read<P: Port>(&mut self, tag: u16, port: &mut P) -> Step {
        let run = self.run(tag, Run::through);
        if run.is_present() {
            self.start_piece(tag, &run, FileOp::Read, false, port);
            return Step::Again;
        }
        let io = FileIo {
            op: FileOp::FillZero,
            layer: LEAF,
            file_offset: 0,
            buffer_offset: self.buffer_offset(tag),
            length: run.length,
        };
        let id = self.claim_piece(tag, io);
        submit(id, io, port);
        Step::Again
    }

    fn step_write<P: Port>(&mut self, tag: u16, durable: bool, port: &mut P) -> Step {
        if let Some(step) = self.await_session(tag, port) {
            return step;
        }
        let durable = durable && !planted(Plant::IgnoreFua);
        let run = self.run(tag, Run::of);
        if !run.is_present() {
            let (first, count) = self.blocks_ahead(tag);
            return self.ask_again(tag, Ask::Allocate { first, count }, port);
        }
        if durable && !run.durable {
            self.slots[usize::from(tag)].flush_at_end = true;
        }
        self.start_piece(tag, &run, FileOp::Write { durable: durable && run.durable }, false, port);
        Step::Again
    }

    fn step_flush<P: Port>(&mut self, tag: u16, port: &mut P) -> Step {
        let slot = &mut self.slots[usize::from(tag)];
        if self.shared.read_only || slot.asks > 0 {
            self.finish(tag, port);
        } else {
            slot.asks = 1;
            self.ask(tag, Ask::Flush, port);
        }
        Step::Wait
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
        let run = self.part(tag);
        let punches = run.is_present() && u64::from(run.length) >= MIN_PUNCH_BYTES;
        if !punches || !self.shared.can_punch() {
            self.skip(tag, &run);
        } else if let Some(step) = self.await_session(tag, port) {
            return step;
        } else {
            self.start_piece(tag, &run, FileOp::PunchHole, true, port);
        }
        Step::Again
    }

    fn step_zero<P: Port>(&mut self, tag: u16, keep_space: bool, port: &mut P) -> Step {
        let keep_space = keep_space || self.shared.fixed;
        let whole = self.whole_blocks(tag);
        if let Some(blocks) = whole.clone().filter(|_| !keep_space) {
            return self.unmap(tag, blocks, true, port);
        }
        let run = self.part(tag);
        if run.source == Source::Zero {
            self.skip(tag, &run);
            return Step::Again;
        }
        if let Some(step) = self.await_session(tag, port) {
            return step;
        }
        if run.is_present() {
            let op = self.zeroing_op(run.length, keep_space);
            self.start_piece(tag, &run, op, false, port);
            return Step::Again;
        }
        let ask = self.zero_absent(tag, &run, whole);
        self.ask_again(tag, ask, port)
    }

    /// What makes the absent block at the cursor read as zeros. It takes space only where a part of it has to read
    /// on as the parents say.
    fn zero_absent(&self, tag: u16, run: &Run, whole: Option<Range<u64>>) -> Ask {
        let (first, count) = self.blocks_ahead(tag);
        match whole {
            _ if run.source != Source::Parents => Ask::ZeroAbsent { first, count, whole: false },
            Some(blocks) => Ask::ZeroAbsent { first, count: blocks.end - blocks.start, whole: true },
            None if shows_parents(&self.shared, first, &mut { MAX_LOOKS }) => {
                Ask::Allocate { first, count: 1 }
            }
            None => Ask::ZeroAbsent { first, count: 1, whole: false },
        }
    }

    /// Whole `blocks` at the cursor are to read as zeros. Those that do already are passed over without a word to the
    /// engine: what it has published is what every acknowledged request has left. A request still under way may come
    /// before this one or after it.
    fn unmap<P: Port>(&mut self, tag: u16, blocks: Range<u64>, define_absent: bool, port: &mut P) -> Step {
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

    fn zeroing_op(&self, length: u32, keep_space: bool) -> FileOp {
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
                self.slots[usize::from(tag)].fail(libc::EIO);
                Some(Step::Again)
            }
        }
    }

    fn ask<P: Port>(&mut self, tag: u16, ask: Ask, port: &mut P) {
        let slot = &mut self.slots[usize::from(tag)];
        assert!(!slot.waiting, "one ask per tag");
        slot.waiting = true;
        port.send(ToEngine::Ask { tag, ask });
    }

    /// An ask whose answer is looked up again, so that its repetitions need a bound.
    fn ask_again<P: Port>(&mut self, tag: u16, ask: Ask, port: &mut P) -> Step {
        let slot = &mut self.slots[usize::from(tag)];
        slot.asks += 1;
        if slot.asks > MAX_ASKS_AGAIN {
            slot.fail(libc::EIO);
            return Step::Again;
        }
        self.ask(tag, ask, port);
        Step::Wait
    }

    /// The longest run from the cursor that one piece of file I/O can serve, over neighbouring blocks too.
    #[inline]
    fn run(&self, tag: u16, look_up: impl Fn(&Shared, u64, u64) -> Run) -> Run {
        let slot = &self.slots[usize::from(tag)];
        let mut run = look_up(&self.shared, slot.cursor, slot.end());
        let mut next = slot.cursor + u64::from(run.length);
        while next < slot.end() {
            let more = look_up(&self.shared, next, slot.end());
            if !run.continues_with(&more) {
                break;
            }
            run.length += more.length;
            run.durable &= more.durable;
            run.partial |= more.partial;
            next += u64::from(more.length);
        }
        run
    }

    /// The part of the cursor's block that the request covers.
    #[inline]
    fn part(&self, tag: u16) -> Run {
        let slot = &self.slots[usize::from(tag)];
        Run::of(&self.shared, slot.cursor, slot.end())
    }

    /// Whole blocks at the cursor. The last block of the disk is whole when the range reaches the end of the disk.
    fn whole_blocks(&self, tag: u16) -> Option<Range<u64>> {
        let geometry = self.shared.geometry();
        let slot = &self.slots[usize::from(tag)];
        let end = slot.end();
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
        let slot = &self.slots[usize::from(tag)];
        let first = self.shared.geometry().block_of_offset(slot.cursor);
        let last = self.shared.geometry().block_of_offset(slot.end() - 1);
        (first, last - first + 1)
    }

    /// Nothing needs doing in the blocks before `block`.
    fn pass_over(&mut self, tag: u16, block: u64) -> Step {
        let slot = &mut self.slots[usize::from(tag)];
        slot.cursor = slot.end().min(block * self.shared.geometry().block_size());
        slot.asks = 0;
        Step::Again
    }

    /// Nothing needs doing for `run`.
    fn skip(&mut self, tag: u16, run: &Run) {
        let slot = &mut self.slots[usize::from(tag)];
        slot.cursor += u64::from(run.length);
        slot.asks = 0;
    }

    fn buffer_offset(&self, tag: u16) -> u32 {
        let slot = &self.slots[usize::from(tag)];
        match slot.request().op {
            Op::Read | Op::Write { .. } => {
                u32::try_from(slot.cursor - slot.request().offset).expect("a buffer holds at most 1 MiB")
            }
            Op::Flush | Op::Discard | Op::WriteZeroes { .. } => 0,
        }
    }

    #[inline]
    fn start_piece<P: Port>(&mut self, tag: u16, run: &Run, op: FileOp, advisory: bool, port: &mut P) {
        let Source::File(layer, file_offset) = run.source else {
            panic!("file I/O goes to blocks that are there")
        };
        assert!(layer == LEAF || op == FileOp::Read, "parents are only read");
        let buffer_offset = self.buffer_offset(tag);
        let io = FileIo { op, layer, file_offset, buffer_offset, length: run.length };
        let from = self.slots[usize::from(tag)].cursor;
        let id = self.claim_piece(tag, io);
        let piece = self.piece(id);
        piece.advisory = advisory;
        if op == (FileOp::Write { durable: true }) {
            self.durable_write_begins(id);
        }
        let piece = self.piece(id);
        if run.partial && !advisory && op != FileOp::Read {
            piece.written = Some((from, from + u64::from(run.length)));
            if planted(Plant::BitsBeforeData) {
                self.shared.mark_written(from, from + u64::from(run.length));
            }
        }
        submit(id, io, port);
    }

    /// Takes a free place for a piece, counts it for the barrier and moves the cursor past it.
    #[inline]
    fn claim_piece(&mut self, tag: u16, io: FileIo) -> PieceId {
        let slot = &mut self.slots[usize::from(tag)];
        let place = slot.pieces.iter().position(Option::is_none).expect("fewer than MAX_PIECES are live");
        slot.pieces[place] = Some(Piece {
            rest: io,
            retries: 0,
            parity: self.looked_up.enter(),
            durable_parity: None,
            advisory: false,
            written: None,
        });
        slot.live_pieces += 1;
        slot.cursor += u64::from(io.length);
        slot.asks = 0;
        PieceId { tag, piece: u8::try_from(place).expect("below MAX_PIECES") }
    }

    #[inline]
    fn release_piece(&mut self, id: PieceId) -> Piece {
        let slot = &mut self.slots[usize::from(id.tag)];
        let piece = slot.pieces[usize::from(id.piece)].take().expect("a piece ends once");
        slot.live_pieces -= 1;
        self.looked_up.leave(piece.parity);
        piece
    }

    fn piece(&mut self, id: PieceId) -> &mut Piece {
        self.slots[usize::from(id.tag)].pieces[usize::from(id.piece)].as_mut().expect("a live piece")
    }

    /// What a completion means for its piece.
    #[inline]
    fn judge(&self, piece: Piece, result: i32) -> Verdict {
        let rest = piece.rest;
        if NOT_BEGUN.contains(&-result) {
            return if piece.retries < MAX_RETRIES {
                Verdict::Continue(rest)
            } else {
                Verdict::Failed(-result)
            };
        }
        match rest.op {
            FileOp::PunchHole | FileOp::ZeroRange => self.judge_fallocate(piece, result),
            FileOp::Read | FileOp::FillZero | FileOp::Write { .. } | FileOp::WriteZeros => {
                let Ok(done) = u32::try_from(result) else { return Verdict::Failed(-result) };
                self.judge_transfer(rest, done)
            }
        }
    }

    fn judge_fallocate(&self, piece: Piece, result: i32) -> Verdict {
        let refused = result == -libc::EOPNOTSUPP || result == -libc::ENOSYS;
        match piece.rest.op {
            _ if result >= 0 => Verdict::Done,
            FileOp::PunchHole if refused => {
                self.shared.forget_punch();
                if piece.advisory {
                    return Verdict::Done;
                }
                Verdict::Continue(FileIo { op: self.zeroing_op(piece.rest.length, true), ..piece.rest })
            }
            FileOp::ZeroRange if refused => {
                self.shared.forget_zero_range();
                Verdict::Continue(FileIo { op: FileOp::WriteZeros, ..piece.rest })
            }
            _ if piece.advisory => Verdict::Done,
            _ => Verdict::Failed(-result),
        }
    }

    fn judge_transfer(&self, rest: FileIo, done: u32) -> Verdict {
        assert!(done <= rest.length, "more was done than asked");
        if done == rest.length {
            return Verdict::Done;
        }
        // Direct I/O can only go on at a sector border; what a short transfer did beyond it is done again.
        let whole = done - done % self.shared.geometry().logical_sector_size();
        if rest.op == FileOp::Read && (done == 0 || whole != done) {
            return Verdict::EndOfFile(done);
        }
        if whole == 0 {
            return Verdict::Failed(libc::EIO);
        }
        let advance = if rest.op == FileOp::WriteZeros { 0 } else { whole };
        Verdict::Continue(FileIo {
            op: rest.op,
            layer: rest.layer,
            file_offset: rest.file_offset + u64::from(whole),
            buffer_offset: rest.buffer_offset + advance,
            length: rest.length - whole,
        })
    }

    /// Whether a durable write that failed may be done as an ordinary one that joins a flush.
    fn can_flush_instead(&self, piece: Piece, errno: i32) -> bool {
        let durable = piece.rest.op == (FileOp::Write { durable: true });
        durable
            && is_refusal(errno)
            && !planted(Plant::RefusalPoisons)
            && self.shared.session() == Session::Open
    }

    fn flush_instead<P: Port>(&mut self, id: PieceId, port: &mut P) {
        self.slots[usize::from(id.tag)].flush_at_end = true;
        self.durable_write_ended(id, port);
        let rest = self.piece(id).rest;
        self.resubmit(id, FileIo { op: FileOp::Write { durable: false }, ..rest }, port);
    }

    fn durable_write_begins(&mut self, id: PieceId) {
        self.shared.durable_write_begins();
        let parity = self.durable.enter();
        self.piece(id).durable_parity = Some(parity);
    }

    /// The end of a durable write has been seen, and has poisoned if it must.
    fn durable_write_ended<P: Port>(&mut self, id: PieceId, port: &mut P) {
        if let Some(parity) = self.piece(id).durable_parity.take() {
            self.shared.durable_write_ended();
            self.durable.leave(parity);
            self.answer_fence(port);
        }
    }

    fn resubmit<P: Port>(&mut self, id: PieceId, rest: FileIo, port: &mut P) {
        let piece = self.piece(id);
        piece.retries = if piece.rest == rest { piece.retries + 1 } else { 0 };
        piece.rest = rest;
        if planted(Plant::LateCount) {
            let counted = piece.parity;
            self.looked_up.leave(counted);
            self.piece(id).parity = self.looked_up.enter();
            self.answer_barrier(port);
        }
        submit(id, rest, port);
    }

    /// The file ends before the end of what is read. What it never had reads as zero: fixed images by QEMU end inside
    /// their last block. What it had when it was opened, somebody has cut off.
    fn fill_past_end<P: Port>(&mut self, id: PieceId, done: u32, port: &mut P) {
        let rest = self.piece(id).rest;
        if self.shared.has_lost(rest.layer, rest.file_offset + u64::from(done)) {
            return self.end_piece(id, libc::EIO, port);
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

    fn end_piece<P: Port>(&mut self, id: PieceId, errno: i32, port: &mut P) {
        let must_not_fail = errno != 0 && self.piece(id).rest.op == (FileOp::Write { durable: true });
        if must_not_fail && !planted(Plant::NoPoison) && self.shared.poison() {
            tracing::error!("a durable write failed with errno {errno}: no write or flush will succeed");
        }
        self.durable_write_ended(id, port);
        let piece = self.release_piece(id);
        if errno != 0 {
            self.shared.troubles().note("reading or writing the image", errno);
            self.slots[usize::from(id.tag)].fail(told(errno));
        } else if let Some((from, to)) = piece.written {
            self.shared.mark_written(from, to);
        }
        self.answer_barrier(port);
        self.advance(id.tag, port);
    }

    fn answer_fence<P: Port>(&mut self, port: &mut P) {
        if self.durable.answer() {
            port.send(ToEngine::Fenced);
        }
    }

    fn answer_barrier<P: Port>(&mut self, port: &mut P) {
        if self.looked_up.answer() {
            port.send(ToEngine::BarrierDone);
        }
    }
}

/// What a completion means.
enum Verdict {
    Done,
    Failed(i32),
    Continue(FileIo),
    EndOfFile(u32),
}

fn submit<P: Port>(id: PieceId, rest: FileIo, port: &mut P) {
    let length = if rest.op == FileOp::WriteZeros { rest.length.min(MAX_WRITE_ZEROS) } else { rest.length };
    port.submit(id, FileIo { length, ..rest });
}
