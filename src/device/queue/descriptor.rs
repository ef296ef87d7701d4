//! A request as the kernel describes it, turned into a request to the front.

use libublk::sys;
use nix::errno::Errno;

use crate::device::options::KERNEL_SECTOR_SHIFT;
use crate::engine::Outcome;
use crate::engine::front::{Op, Request};

/// The operation's bits in `op_flags`; the bits of the flags are absolute.
const OP_MASK: u32 = 0xff;

/// The request of a tag. An `Err` is what it is completed with.
///
/// What memory safety needs is checked here: the data fits the tag's buffer. The front checks the range on
/// the disk.
pub(super) fn request(descriptor: &sys::ublksrv_io_desc, request_bytes: u32) -> Outcome<Request> {
    let flag = |bit: u32| descriptor.op_flags & bit != 0;
    let op = match descriptor.op_flags & OP_MASK {
        sys::UBLK_IO_OP_READ => Op::Read,
        sys::UBLK_IO_OP_WRITE => Op::Write { durable: flag(sys::UBLK_IO_F_FUA) },
        // A flush concerns the whole disk; its range has no meaning.
        sys::UBLK_IO_OP_FLUSH => return Ok(Request { op: Op::Flush, offset: 0, length: 0 }),
        sys::UBLK_IO_OP_DISCARD => Op::Discard,
        sys::UBLK_IO_OP_WRITE_ZEROES => Op::WriteZeroes { keep_space: flag(sys::UBLK_IO_F_NOUNMAP) },
        _ => return Err(Errno::EOPNOTSUPP),
    };
    let offset = descriptor.start_sector.checked_mul(1 << KERNEL_SECTOR_SHIFT).ok_or(Errno::EIO)?;
    let length = u64::from(descriptor.nr_sectors) << KERNEL_SECTOR_SHIFT;
    let carries_data = matches!(op, Op::Read | Op::Write { .. });
    if length == 0 || carries_data && length > u64::from(request_bytes) {
        return Err(Errno::EIO);
    }
    Ok(Request { op, offset, length })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(op_flags: u32, start_sector: u64, nr_sectors: u32) -> sys::ublksrv_io_desc {
        sys::ublksrv_io_desc { op_flags, nr_sectors, start_sector, addr: 0 }
    }

    fn decode(op_flags: u32, start_sector: u64, nr_sectors: u32) -> Outcome<Request> {
        request(&descriptor(op_flags, start_sector, nr_sectors), 512 << 10)
    }

    #[test]
    fn sectors_of_512_bytes_become_bytes() {
        let expected = Request { op: Op::Read, offset: 3 << 9, length: 16 << 9 };
        assert_eq!(decode(sys::UBLK_IO_OP_READ, 3, 16), Ok(expected));
    }

    #[test]
    fn flags_are_read_at_their_absolute_bits() {
        let op = |flags| decode(flags, 0, 1).map(|request| request.op);
        assert_eq!(op(sys::UBLK_IO_OP_WRITE), Ok(Op::Write { durable: false }));
        assert_eq!(op(sys::UBLK_IO_OP_WRITE | 1 << 13), Ok(Op::Write { durable: true }));
        assert_eq!(op(sys::UBLK_IO_OP_WRITE | 1 << 8), Ok(Op::Write { durable: false }));
        assert_eq!(op(sys::UBLK_IO_OP_WRITE_ZEROES), Ok(Op::WriteZeroes { keep_space: false }));
        assert_eq!(op(sys::UBLK_IO_OP_WRITE_ZEROES | 1 << 15), Ok(Op::WriteZeroes { keep_space: true }));
        assert_eq!(op(sys::UBLK_IO_OP_DISCARD), Ok(Op::Discard));
    }

    #[test]
    fn a_flush_has_no_range() {
        let expected = Request { op: Op::Flush, offset: 0, length: 0 };
        assert_eq!(decode(sys::UBLK_IO_OP_FLUSH, u64::MAX, u32::MAX), Ok(expected));
    }

    #[test]
    fn what_cannot_be_served_is_an_error_and_not_a_panic() {
        for op in [sys::UBLK_IO_OP_WRITE_SAME, sys::UBLK_IO_OP_ZONE_OPEN, sys::UBLK_IO_OP_REPORT_ZONES, 0xff]
        {
            assert_eq!(decode(op, 0, 1), Err(Errno::EOPNOTSUPP));
        }
        assert_eq!(decode(sys::UBLK_IO_OP_READ, 0, 0), Err(Errno::EIO));
        assert_eq!(decode(sys::UBLK_IO_OP_READ, 1 << 60, 1), Err(Errno::EIO));
        assert_eq!(decode(sys::UBLK_IO_OP_WRITE, 0, 1025), Err(Errno::EIO));
        assert!(decode(sys::UBLK_IO_OP_DISCARD, 0, u32::MAX).is_ok());
    }
}
