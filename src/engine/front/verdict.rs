//! What the end of a piece of file I/O means. Nothing here changes anything.

use nix::errno::Errno;

use super::slot::Piece;
use crate::engine::port::{FileIo, FileOp, errno};

/// How often one piece is repeated that the host has not begun, or has no memory for.
const MAX_RETRIES: u8 = 16;

/// What the host says of an operation that it has not begun, or has not ended and can be asked for again.
const NOT_BEGUN: [Errno; 4] = [Errno::EAGAIN, Errno::EINTR, Errno::ENOMEM, Errno::ECANCELED];

/// See the module's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The piece has ended well.
    Done,
    /// It has failed.
    Failed(Errno),
    /// The sync was not begun: the kernel has no thread for it, and had one for nothing else of this ring.
    NotBegun,
    /// This is still to be done.
    Continue(FileIo),
    /// The file ends after so many bytes of a read.
    EndOfFile(u32),
    /// The host does not know this kind of `fallocate`.
    Unsupported,
}

/// What `result`, bytes done or a negative `errno`, means for `piece` on a disk with sectors of `sector`
/// bytes.
#[inline]
pub(super) fn judge(piece: &Piece, result: i32, sector: u32) -> Verdict {
    let (rest, zeroes) = (piece.rest, matches!(piece.rest.op, FileOp::PunchHole | FileOp::ZeroRange));
    match u32::try_from(result).map_err(|_| errno(-result)) {
        Ok(_) if zeroes => Verdict::Done,
        // By the kernel's ring, not by a file system: a limit of processes is no loss.
        Err(Errno::ECANCELED) if rest.op == FileOp::Sync => Verdict::NotBegun,
        // Whatever else it says: the host may have dropped what it could not write.
        Err(errno) if rest.op == FileOp::Sync => Verdict::Failed(errno),
        Ok(done) => judge_transfer(rest, done, sector),
        Err(errno) if NOT_BEGUN.contains(&errno) && piece.retries < MAX_RETRIES => Verdict::Continue(rest),
        Err(errno) if NOT_BEGUN.contains(&errno) => Verdict::Failed(errno),
        Err(Errno::EOPNOTSUPP | Errno::ENOSYS) if zeroes => Verdict::Unsupported,
        Err(_) if piece.advisory => Verdict::Done,
        Err(errno) => Verdict::Failed(errno),
    }
}

#[inline]
fn judge_transfer(rest: FileIo, done: u32, sector: u32) -> Verdict {
    assert!(done <= rest.length, "more was done than asked");
    if done == rest.length {
        return Verdict::Done;
    }
    // Direct I/O can only continue at a sector border; what a short transfer did beyond it is done again.
    let whole = done - done % sector;
    if rest.op == FileOp::Read && (done == 0 || whole != done) {
        return Verdict::EndOfFile(done);
    }
    if whole == 0 {
        return Verdict::Failed(Errno::EIO);
    }
    debug_assert!(whole < rest.length, "something is left to do");
    let advance = if rest.op == FileOp::WriteZeros { 0 } else { whole };
    Verdict::Continue(FileIo {
        file_offset: rest.file_offset + u64::from(whole),
        buffer_offset: rest.buffer_offset + advance,
        length: rest.length - whole,
        ..rest
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::engine::shared::LEAF;

    fn piece(op: FileOp, length: u32) -> Piece {
        let rest = FileIo { op, layer: LEAF, file_offset: 8 << 20, buffer_offset: 4096, length };
        Piece { rest, retries: 0, parity: 0, unseen_parity: None, advisory: false, written: None }
    }

    #[test]
    fn an_operation_that_was_not_begun_is_repeated_so_many_times() {
        for errno in NOT_BEGUN {
            let mut again = piece(FileOp::Write { durable: true }, 4096);
            assert_eq!(judge(&again, -(errno as i32), 512), Verdict::Continue(again.rest));
            again.retries = MAX_RETRIES;
            assert_eq!(judge(&again, -(errno as i32), 512), Verdict::Failed(errno));
        }
    }

    #[test]
    fn a_sync_is_never_repeated() {
        let sync = piece(FileOp::Sync, 0);
        assert_eq!(judge(&sync, 0, 512), Verdict::Done);
        assert_eq!(judge(&sync, -libc::ECANCELED, 512), Verdict::NotBegun);
        for errno in
            [Errno::EAGAIN, Errno::EINTR, Errno::ENOMEM, Errno::EIO, Errno::ENOSPC, Errno::EOPNOTSUPP]
        {
            assert_eq!(judge(&sync, -(errno as i32), 512), Verdict::Failed(errno));
        }
    }

    #[test]
    fn a_host_that_cannot_give_space_back_fails_no_advice() {
        for op in [FileOp::PunchHole, FileOp::ZeroRange] {
            let mut hole = piece(op, 1 << 20);
            assert_eq!(judge(&hole, 0, 512), Verdict::Done);
            assert_eq!(judge(&hole, -libc::EOPNOTSUPP, 512), Verdict::Unsupported);
            assert_eq!(judge(&hole, -libc::EIO, 512), Verdict::Failed(Errno::EIO));
            assert_eq!(judge(&hole, -524, 512), Verdict::Failed(Errno::EIO), "a number of the kernel's own");
            hole.advisory = true;
            assert_eq!(judge(&hole, -libc::EIO, 512), Verdict::Done);
        }
    }

    /// A transfer that ends short continues where it ended, at a sector border, until all of it is done.
    #[test]
    fn short_transfers_add_up() {
        for op in [FileOp::Read, FileOp::Write { durable: false }, FileOp::WriteZeros] {
            let mut left = piece(op, 64 << 10);
            let mut steps = 0;
            while let Verdict::Continue(rest) = judge(&left, 4096.min(left.rest.length).cast_signed(), 4096) {
                assert_eq!(rest.file_offset + u64::from(rest.length), (8 << 20) + (64 << 10));
                let kept = op == FileOp::WriteZeros;
                assert_eq!(rest.buffer_offset, if kept { 4096 } else { left.rest.buffer_offset + 4096 });
                left.rest = rest;
                steps += 1;
            }
            assert_eq!(steps, 15);
        }
    }

    proptest! {
        /// Only a read ends at the end of a file, and a write that did less than a sector has failed.
        #[test]
        fn a_short_end_is_the_end_of_a_file_or_a_failure(done in 0..4096_u32, reads in any::<bool>()) {
            let op = if reads { FileOp::Read } else { FileOp::Write { durable: false } };
            let found = judge(&piece(op, 8192), done.cast_signed(), 4096);
            let expected = if reads { Verdict::EndOfFile(done) } else { Verdict::Failed(Errno::EIO) };
            prop_assert_eq!(found, expected);
        }
    }
}
