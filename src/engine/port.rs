//! What a front needs from the loop that hosts it.
//!
//! The loop owns the ring, the request buffers and the mailboxes; the front decides. Calls never block and
//! never call back into the front.

use std::sync::Arc;

use nix::errno::Errno;

use super::Outcome;
use super::message::ToEngine;
use super::shared::Shared;

/// Names one piece of one request: its completion comes back under the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PieceId {
    /// The request's tag.
    pub tag: u16,
    /// The piece's place in the tag's slot, below [`super::front::MAX_PIECES`].
    pub piece: u8,
}

/// The right to complete one request. A front has it while it serves the request and gives it up with the
/// completion, so it cannot complete a request twice.
#[derive(Debug)]
#[must_use = "a request that is not completed waits for ever"]
pub struct Ticket(u16);

impl Ticket {
    /// For the request of `tag`, which begins.
    pub(super) fn of(tag: u16) -> Self {
        Self(tag)
    }

    /// The request's tag.
    pub fn tag(&self) -> u16 {
        self.0
    }
}

/// File I/O on an image of the chain, at most `u32::MAX` bytes; offsets and lengths are multiples of the
/// logical sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileIo {
    /// What to do.
    pub op: FileOp,
    /// Which image's file; only [`super::shared::LEAF`]'s is ever written. Meaningless for
    /// [`FileOp::FillZero`].
    pub layer: u8,
    /// Where in that file, bytes; meaningless for [`FileOp::FillZero`].
    pub file_offset: u64,
    /// Where in the tag's buffer the data lies, bytes; meaningless for operations without data.
    pub buffer_offset: u32,
    /// How many bytes.
    pub length: u32,
}

/// The kinds of file I/O. A completion reports bytes done or a negative `errno`; for the operations without
/// data, 0 or a negative `errno`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileOp {
    /// Read into the tag's buffer.
    Read,
    /// Fill part of the tag's buffer with zeros; the file has no part in it.
    FillZero,
    /// Write from the tag's buffer.
    Write {
        /// Durable before it completes (`RWF_DSYNC`).
        durable: bool,
    },
    /// Write zeros from a buffer of the loop's own; at most [`MAX_WRITE_ZEROS`] bytes.
    WriteZeros,
    /// `fallocate` with `ZERO_RANGE | KEEP_SIZE`.
    ZeroRange,
    /// `fallocate` with `PUNCH_HOLE | KEEP_SIZE`.
    PunchHole,
    /// Make what has completed durable, through a description of the leaf that the front alone syncs by. It
    /// has no offset and no length.
    Sync,
}

/// Longest [`FileOp::WriteZeros`]: the size of the loop's one zero buffer.
pub const MAX_WRITE_ZEROS: u32 = 1 << 20;

/// The `errno` of this number. One that only the kernel knows is EIO: it must not become 0, which is success.
pub fn errno(number: i32) -> Errno {
    match Errno::from_raw(number) {
        Errno::UnknownErrno => Errno::EIO,
        known => known,
    }
}

/// The loop that hosts a front.
pub trait Port {
    /// Starts file I/O; its end comes back through [`super::front::Front::io_done`], exactly once.
    fn submit(&mut self, piece: PieceId, io: FileIo);

    /// The same for a piece that was submitted before, and of which this is left.
    fn resubmit(&mut self, piece: PieceId, io: FileIo) {
        self.submit(piece, io);
    }

    /// Sends a message to the engine; there is always room.
    fn send(&mut self, message: ToEngine);

    /// What the fronts of the device serve after a hold, if that has changed: all file I/O from now on is on
    /// its images.
    fn change_leaf(&mut self) -> Option<Arc<Shared>>;

    /// Ends the request of `ticket`: bytes read or written, 0 for other requests, or why it has failed.
    fn complete(&mut self, ticket: Ticket, result: Outcome<u32>);
}
