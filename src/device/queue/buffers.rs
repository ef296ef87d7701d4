//! How the data of a request reaches the file: through a buffer that belongs to its tag, or from its own
//! pages.
//!
//! *Copied*: the kernel copies between the pages of a request and the tag's buffer, and the file is read
//! into, and written from, that buffer. All buffers are one region: present from the start, because a buffer
//! the kernel cannot fault in would stall the queue, and one it can fault in only partly would silently cut a
//! write short; registered in the ring, so that its pages are not looked up for every request.
//!
//! *In place*: the kernel registers the pages of a request in the ring, with the tag as their index, together
//! with the command that brings the request, and the file is read into, and written from, those pages.
//! Addresses are offsets in the request then. If the kernel fails to register them it sets a flag, and the
//! ring must register them by a command.
#![allow(unsafe_code, reason = "registering a buffer gives the kernel a pointer")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use io_uring::types::Fixed;
use io_uring::{IoUring, opcode, squeue};
use libublk::sys;

use crate::device::region::Region;
use crate::engine::port::FileIo;

/// The index of the buffers of all tags, in copied data.
const ALL_BUFFERS: u16 = 0;

/// An index at which nothing can be registered: there are fewer tags.
const NO_INDEX: u16 = u16::MAX;

/// The source of the zeros that fill parts of a request's pages.
const ZEROS_PATH: &str = "/dev/zero";

/// How the data of a device's requests reaches its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::device) enum Transfer {
    /// The kernel copies it.
    Copied,
    /// It stays in the requests' pages.
    InPlace(BufferIndex),
}

/// See the module's head.
pub(super) enum RequestBuffers {
    /// Through buffers.
    Copied(Buffers),
    /// In the pages of the requests.
    InPlace {
        /// Read to fill pages with zeros.
        zeros: File,
        /// The index at which the kernel registers a tag's pages.
        index: BufferIndex,
    },
}

/// The buffers of copied data.
pub(super) struct Buffers {
    region: Region,
    request_bytes: usize,
    registered: bool,
}

/// The index at which the kernel registers the pages of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::device) enum BufferIndex {
    /// The tag.
    Tag,
    /// One that does not exist, so that registering always fails: to test what the ring does then.
    Impossible,
}

impl RequestBuffers {
    /// The data of `depth` tags, of at most `request_bytes` each; in `spare`, if there is some.
    pub(super) fn new(
        transfer: Transfer,
        depth: u16,
        request_bytes: u32,
        spare: Option<Region>,
    ) -> io::Result<Self> {
        match transfer {
            Transfer::Copied => Self::copied(depth, request_bytes, spare),
            Transfer::InPlace(index) => Self::in_place(index),
        }
    }

    fn copied(depth: u16, request_bytes: u32, spare: Option<Region>) -> io::Result<Self> {
        let request_bytes = request_bytes as usize;
        let length = usize::from(depth) * request_bytes;
        let region = match spare.filter(|spare| spare.length() == length) {
            Some(spare) => spare,
            None => Region::memory(length)?,
        };
        Ok(Self::Copied(Buffers { region, request_bytes, registered: false }))
    }

    fn in_place(index: BufferIndex) -> io::Result<Self> {
        Ok(Self::InPlace { zeros: File::open(ZEROS_PATH)?, index })
    }

    /// Registers the buffers in the ring, or slots for those of `depth` requests. A failure that only costs
    /// speed is a warning.
    pub(super) fn register(&mut self, uring: &IoUring, depth: u16) -> io::Result<()> {
        let Self::Copied(buffers) = self else {
            return uring.submitter().register_buffers_sparse(u32::from(depth));
        };
        let all = [libc::iovec {
            iov_base: buffers.region.at(0, buffers.region.length()).cast(),
            iov_len: buffers.region.length(),
        }];
        // SAFETY: the range is mapped. The kernel keeps its pages as long as they are registered, and nothing
        // is submitted once the region has gone.
        match unsafe { uring.submitter().register_buffers(&all) } {
            Ok(()) => buffers.registered = true,
            Err(error) => tracing::warn!("request buffers are not registered in the ring: {error}"),
        }
        Ok(())
    }

    /// The first bytes of a tag's buffer.
    #[cfg(feature = "simulation")]
    pub(super) fn read_out(&self, tag: u16, length: usize) -> Vec<u8> {
        let Self::Copied(buffers) = self else { panic!("a test copies data") };
        let mut data = vec![0; length];
        let place = buffers.at(tag, 0, u32::try_from(length).expect("a request's"));
        // SAFETY: the buffer is mapped and at least this long, and nothing is under way on it.
        unsafe { ptr::copy_nonoverlapping(place, data.as_mut_ptr(), length) };
        data
    }

    /// Puts `data` at the begin of a tag's buffer.
    #[cfg(feature = "simulation")]
    pub(super) fn read_in(&self, tag: u16, data: &[u8]) {
        let Self::Copied(buffers) = self else { panic!("a test copies data") };
        let place = buffers.at(tag, 0, u32::try_from(data.len()).expect("a request's"));
        // SAFETY: as above.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), place, data.len()) };
    }

    /// The source of zeros, if the ring needs one.
    pub(super) fn zeros_fd(&self) -> Option<i32> {
        match self {
            Self::Copied(_) => None,
            Self::InPlace { zeros, .. } => Some(zeros.as_raw_fd()),
        }
    }

    /// The addresses in the command of a tag and in its submission.
    pub(super) fn offer(&self, tag: u16) -> (u64, Option<u64>) {
        match self {
            Self::Copied(buffers) => {
                let place = buffers.at(tag, 0, 0).expose_provenance();
                (place as u64, None)
            }
            Self::InPlace { index, .. } => {
                let index = if *index == BufferIndex::Tag { tag } else { NO_INDEX };
                assert!(tag < NO_INDEX, "tag {tag} is no index");
                let flags = u64::from(sys::UBLK_AUTO_BUF_REG_FALLBACK);
                (0, Some(u64::from(index) | flags << u16::BITS))
            }
        }
    }

    /// Whether the pages of a request with the flags `op_flags` are yet to be registered.
    pub(super) fn wants_registration(&self, op_flags: u32) -> bool {
        matches!(self, Self::InPlace { .. }) && op_flags & sys::UBLK_IO_F_NEED_REG_BUF != 0
    }

    /// Reads from `file` into the data of a tag.
    pub(super) fn read(&self, file: Fixed, tag: u16, io: FileIo) -> squeue::Entry {
        let FileIo { file_offset, length, .. } = io;
        let (address, index) = self.locate(tag, io);
        match index {
            Some(index) => opcode::ReadFixed::new(file, address, length, index).offset(file_offset).build(),
            None => opcode::Read::new(file, address, length).offset(file_offset).build(),
        }
    }

    /// Writes to `file` from the data of a tag.
    pub(super) fn write(&self, file: Fixed, tag: u16, io: FileIo, flags: i32) -> squeue::Entry {
        let FileIo { file_offset, length, .. } = io;
        let (address, index) = self.locate(tag, io);
        match index {
            Some(index) => {
                let write = opcode::WriteFixed::new(file, address, length, index);
                write.offset(file_offset).rw_flags(flags).build()
            }
            None => opcode::Write::new(file, address, length).offset(file_offset).rw_flags(flags).build(),
        }
    }

    /// Fills part of the data of a tag with zeros: at once, or by the entry, which reads from the file
    /// `zeros`, see [`RequestBuffers::zeros_fd`].
    pub(super) fn fill_zero(&mut self, zeros: Fixed, tag: u16, io: FileIo) -> Option<squeue::Entry> {
        match self {
            Self::Copied(buffers) => {
                buffers.fill_zero(tag, io.buffer_offset, io.length);
                None
            }
            Self::InPlace { .. } => Some(self.read(zeros, tag, FileIo { file_offset: 0, ..io })),
        }
    }

    /// The address of a piece's data, and the index at which it is registered.
    fn locate(&self, tag: u16, io: FileIo) -> (*mut u8, Option<u16>) {
        match self {
            Self::Copied(buffers) => {
                let place = buffers.at(tag, io.buffer_offset, io.length);
                (place, buffers.registered.then_some(ALL_BUFFERS))
            }
            Self::InPlace { .. } => (ptr::without_provenance_mut(io.buffer_offset as usize), Some(tag)),
        }
    }
}

impl Buffers {
    fn offset(&self, tag: u16, buffer_offset: u32, length: u32) -> usize {
        let end = buffer_offset as usize + length as usize;
        assert!(end <= self.request_bytes, "{buffer_offset}+{length} leaves the tag's buffer");
        usize::from(tag) * self.request_bytes + buffer_offset as usize
    }

    fn at(&self, tag: u16, buffer_offset: u32, length: u32) -> *mut u8 {
        self.region.at(self.offset(tag, buffer_offset, length), length as usize)
    }

    fn fill_zero(&mut self, tag: u16, buffer_offset: u32, length: u32) {
        self.region.fill_zero(self.offset(tag, buffer_offset, length), length as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::port::FileOp;
    use crate::engine::shared::LEAF;

    #[test]
    fn pages_are_registered_with_the_tag_as_index_or_not_at_all() {
        let offer = |index| RequestBuffers::in_place(index).expect("there is a /dev/zero").offer(7);
        assert_eq!(offer(BufferIndex::Tag), (0, Some(7 | 1 << 16)));
        assert_eq!(offer(BufferIndex::Impossible), (0, Some(0xffff | 1 << 16)));
    }

    #[test]
    fn only_pages_may_be_unregistered_and_only_when_the_kernel_says_so() {
        let in_place = RequestBuffers::in_place(BufferIndex::Tag).expect("there is a /dev/zero");
        assert!(in_place.wants_registration(1 | 1 << 17) && !in_place.wants_registration(1));
        assert!(!RequestBuffers::copied(1, 4096, None).expect("memory").wants_registration(1 << 17));
    }

    #[test]
    fn buffers_lie_side_by_side_and_are_filled_at_once() {
        let mut data = RequestBuffers::copied(2, 8192, None).expect("memory");
        let first = data.offer(0).0;
        assert_eq!(data.offer(1).0, first + 8192);
        let io =
            FileIo { op: FileOp::FillZero, layer: LEAF, file_offset: 0, buffer_offset: 4096, length: 4096 };
        assert!(data.fill_zero(Fixed(2), 1, io).is_none());
    }

    #[test]
    #[should_panic(expected = "leaves the tag's buffer")]
    fn a_piece_never_reaches_into_the_next_tags_buffer() {
        let data = RequestBuffers::copied(2, 8192, None).expect("memory");
        data.read(
            Fixed(1),
            0,
            FileIo { op: FileOp::Read, layer: LEAF, file_offset: 0, buffer_offset: 4096, length: 8192 },
        );
    }
}
