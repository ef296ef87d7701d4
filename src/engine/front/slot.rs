//! The requests that a front serves, by tag, and the pieces of file I/O that each has in flight.

use std::ops::{Index, IndexMut};

use nix::errno::Errno;

use super::{MAX_PIECES, Request};
use crate::engine::port::{FileIo, PieceId, Ticket};

/// What a front knows of one tag.
pub(super) struct Slot {
    /// The request that is served, and the right to complete it.
    begun: Option<(Request, Ticket)>,
    /// Virtual offset up to which pieces have been started or asks sent.
    pub(super) cursor: u64,
    pieces: [Option<Piece>; MAX_PIECES],
    live_pieces: usize,
    /// An ask is outstanding.
    waiting: bool,
    /// The first error.
    error: Option<Errno>,
    /// The request is done once a flush is.
    pub(super) flush_at_end: bool,
    /// Of a flush: how far it has come.
    pub(super) flush: Flush,
    /// Asks since the request got on.
    pub(super) asks: u16,
    /// The request has waited for room.
    pub(super) has_waited: bool,
}

/// How far a flush has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flush {
    /// Nothing was done.
    Begun,
    /// The front has synced the file, or is about to.
    Synced,
    /// It could not begin to.
    Refused,
    /// The engine was asked.
    Asked,
}

/// File I/O in flight.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    /// What is still to be done.
    pub(super) rest: FileIo,
    /// How often it was repeated as it is.
    pub(super) retries: u8,
    /// In which of the barrier's counters it is.
    pub(super) parity: usize,
    /// Of a durable write or a sync: in which of the fence's counters it is.
    pub(super) unseen_parity: Option<usize>,
    /// Not needed for the request's result: a host that cannot do it is no error.
    pub(super) advisory: bool,
    /// Of a write into partially present blocks: its virtual range.
    pub(super) written: Option<(u64, u64)>,
}

impl Slot {
    const IDLE: Self = Self {
        begun: None,
        cursor: 0,
        pieces: [None; MAX_PIECES],
        live_pieces: 0,
        waiting: false,
        error: None,
        flush_at_end: false,
        flush: Flush::Begun,
        asks: 0,
        has_waited: false,
    };

    /// Takes a request. The places of its pieces are empty already: each was emptied when its piece ended.
    #[inline]
    pub(super) fn begin(&mut self, request: Request, ticket: Ticket) {
        assert!(self.begun.is_none() && self.live_pieces == 0 && !self.waiting, "the tag is busy");
        self.begun = Some((request, ticket));
        self.cursor = request.offset;
        self.error = None;
        self.flush_at_end = false;
        self.flush = Flush::Begun;
        self.asks = 0;
        self.has_waited = false;
    }

    /// Gives up the request; the caller completes it.
    #[inline]
    pub(super) fn end(&mut self) -> Ticket {
        debug_assert!(self.live_pieces == 0 && !self.waiting, "a request ends after all that it started");
        self.begun.take().expect("a request that ends has begun").1
    }

    /// The request that is served.
    #[inline]
    pub(super) fn request(&self) -> &Request {
        &self.begun.as_ref().expect("an event names an active tag").0
    }

    /// Virtual offset of the request's end.
    #[inline]
    pub(super) fn past(&self) -> u64 {
        self.request().offset + self.request().length
    }

    /// The request has failed; its first error is the one that counts.
    pub(super) fn fail(&mut self, errno: Errno) {
        self.error.get_or_insert(errno);
    }

    /// Room would not help the request: if it has found none, it fails for another reason.
    pub(super) fn forget_shortage(&mut self) {
        self.error = self.error.filter(|errno| !matches!(errno, Errno::ENOSPC | Errno::EDQUOT));
    }

    /// Why the request has failed.
    #[inline]
    pub(super) fn error(&self) -> Option<Errno> {
        self.error
    }

    /// An ask is sent.
    pub(super) fn wait(&mut self) {
        debug_assert!(self.begun.is_some(), "an ask belongs to a request");
        assert!(!std::mem::replace(&mut self.waiting, true), "one ask per tag");
    }

    /// The ask is answered.
    pub(super) fn answered(&mut self) {
        assert!(std::mem::take(&mut self.waiting), "a reply to a tag that asked nothing");
    }

    #[inline]
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting
    }

    #[inline]
    pub(super) fn live_pieces(&self) -> usize {
        self.live_pieces
    }

    /// Puts `piece` in a free place; its number.
    #[inline]
    pub(super) fn add(&mut self, piece: Piece) -> u8 {
        debug_assert!(self.begun.is_some() && !self.waiting, "a piece belongs to a request that has no ask");
        let place = self.pieces.iter().position(Option::is_none).expect("fewer than MAX_PIECES are live");
        self.pieces[place] = Some(piece);
        self.live_pieces += 1;
        u8::try_from(place).expect("below MAX_PIECES")
    }

    /// Takes out the piece in place `number`, which has ended.
    #[inline]
    pub(super) fn remove(&mut self, number: u8) -> Piece {
        self.live_pieces -= 1;
        self.pieces[usize::from(number)].take().expect("a piece ends once")
    }

    /// What holds between two events. Nothing in a release.
    #[inline]
    pub(super) fn check(&self) {
        debug_assert_eq!(self.pieces.iter().flatten().count(), self.live_pieces, "pieces are counted");
        match &self.begun {
            None => debug_assert!(self.live_pieces == 0 && !self.waiting, "nothing is done for no request"),
            Some((request, _)) => {
                debug_assert!(self.live_pieces > 0 || self.waiting, "a request waits for something");
                debug_assert!(self.error.is_some() || (request.offset..=self.past()).contains(&self.cursor));
                let inside = |piece: &Piece| u64::from(piece.rest.length) <= request.length;
                debug_assert!(self.pieces.iter().flatten().all(inside), "a piece is part of its request");
            }
        }
    }
}

/// The slots of a front, by tag.
pub(super) struct Slots(Box<[Slot]>);

impl Slots {
    /// `depth` idle slots.
    pub(super) fn new(depth: u16) -> Self {
        Self((0..depth).map(|_| Slot::IDLE).collect())
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }

    /// A piece that is in flight.
    #[inline]
    pub(super) fn piece(&self, id: PieceId) -> &Piece {
        self[id.tag].pieces[usize::from(id.piece)].as_ref().expect("a completion names a live piece")
    }

    /// The same, to be changed.
    #[inline]
    pub(super) fn piece_mut(&mut self, id: PieceId) -> &mut Piece {
        self[id.tag].pieces[usize::from(id.piece)].as_mut().expect("a completion names a live piece")
    }
}

impl Index<u16> for Slots {
    type Output = Slot;

    #[inline]
    fn index(&self, tag: u16) -> &Slot {
        &self.0[usize::from(tag)]
    }
}

impl IndexMut<u16> for Slots {
    #[inline]
    fn index_mut(&mut self, tag: u16) -> &mut Slot {
        &mut self.0[usize::from(tag)]
    }
}
