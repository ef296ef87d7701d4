//! Reads and writes that end whole or fail: the state of one, without I/O.

use std::io;
use std::ops::Range;

use super::PAGE_BYTES;
use super::ring::{STALLS_MAX, is_not_begun};

/// The most one operation transfers: a multiple of the page below the kernel's own bound of 2 GiB.
const TRANSFER_MAX_BYTES: usize = 1 << 30;

/// The progress of a read or write, and the meaning of each result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Transfer {
    offset: u64,
    length: usize,
    done: usize,
    /// Results in a row that brought no progress.
    stalls: u32,
}

impl Transfer {
    pub(super) fn new(offset: u64, length: usize) -> io::Result<Self> {
        assert_paged(offset, length as u64);
        span(offset, length as u64)?;
        Ok(Self { offset, length, done: 0, stalls: 0 })
    }

    pub(super) fn is_complete(&self) -> bool {
        self.done == self.length
    }

    /// Where in the file it continues.
    pub(super) fn position(&self) -> u64 {
        self.offset + self.done as u64
    }

    pub(super) fn end(&self) -> u64 {
        self.offset + self.length as u64
    }

    /// The bytes of the memory to transfer next.
    pub(super) fn next(&self) -> Range<usize> {
        self.done..self.length.min(self.done + TRANSFER_MAX_BYTES)
    }

    /// Takes a read's result; the number of valid bytes if the file turns out to end inside.
    pub(super) fn read(
        &mut self,
        result: io::Result<usize>,
        file_length: impl FnOnce() -> io::Result<u64>,
    ) -> io::Result<Option<usize>> {
        let Some(moved) = self.moved(result)? else { return Ok(None) };
        let valid = self.done + moved;
        let short = moved < self.next().len();
        if short && (moved == 0 || self.offset + valid as u64 >= file_length()?) {
            self.done = self.length;
            return Ok(Some(valid));
        }
        self.advance(moved, io::ErrorKind::UnexpectedEof)?;
        Ok(None)
    }

    /// Takes a write's result.
    pub(super) fn wrote(&mut self, result: io::Result<usize>) -> io::Result<()> {
        match self.moved(result)? {
            None => Ok(()),
            Some(0) => Err(io::ErrorKind::WriteZero.into()),
            Some(moved) => self.advance(moved, io::ErrorKind::WriteZero),
        }
    }

    /// The bytes moved; `None` if the operation is to be repeated.
    fn moved(&mut self, result: io::Result<usize>) -> io::Result<Option<usize>> {
        match result {
            Ok(moved) => {
                assert!(moved <= self.next().len(), "{moved} bytes moved, of {:?}", self.next());
                Ok(Some(moved))
            }
            Err(error) if is_not_begun(&error) && self.stalls < STALLS_MAX => {
                self.stalls += 1;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Continues after what was moved, at a page border: direct I/O takes no other. Repeating a part is
    /// harmless.
    fn advance(&mut self, moved: usize, stuck: io::ErrorKind) -> io::Result<()> {
        let whole = moved - moved % PAGE_BYTES;
        if whole > 0 {
            self.done += whole;
            self.stalls = 0;
        } else if self.stalls == STALLS_MAX {
            return Err(stuck.into());
        } else {
            self.stalls += 1;
        }
        assert!(self.done <= self.length);
        Ok(())
    }
}

pub(super) fn assert_paged(offset: u64, length: u64) {
    let page = PAGE_BYTES as u64;
    assert!(offset.is_multiple_of(page) && length.is_multiple_of(page), "{offset}+{length} is not paged");
}

/// `offset..offset + length`, if a file can have such bytes.
pub(super) fn span(offset: u64, length: u64) -> io::Result<Range<u64>> {
    match offset.checked_add(length) {
        Some(end) if i64::try_from(end).is_ok() => Ok(offset..end),
        _ => Err(invalid(format!("{length} bytes at {offset} are beyond what a file can hold"))),
    }
}

pub(super) fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = PAGE_BYTES as u64;

    fn os(errno: i32) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(errno))
    }

    #[expect(clippy::unnecessary_wraps, reason = "stands in for a question to the host")]
    fn no_end() -> io::Result<u64> {
        Ok(u64::MAX)
    }

    #[test]
    fn a_short_transfer_continues_at_a_page_border() {
        let mut transfer = Transfer::new(PAGE, 4 * PAGE_BYTES).expect("a file can hold it");
        transfer.wrote(Ok(PAGE_BYTES + 512)).expect("progress");
        assert_eq!((transfer.position(), transfer.next()), (2 * PAGE, PAGE_BYTES..4 * PAGE_BYTES));
        transfer.wrote(Ok(3 * PAGE_BYTES)).expect("progress");
        assert!(transfer.is_complete());
        let mut transfer = Transfer::new(0, 2 * PAGE_BYTES).expect("a file can hold it");
        assert_eq!(transfer.read(Ok(PAGE_BYTES), no_end).expect("progress"), None);
        assert_eq!(transfer.read(Ok(100), || Ok(PAGE + 100)).expect("the end"), Some(PAGE_BYTES + 100));
        assert!(transfer.is_complete());
    }

    /// Nothing is repeated forever, and progress pays for earlier stalls.
    #[test]
    fn stalls_are_bounded() {
        for errno in [libc::EAGAIN, libc::EINTR, libc::ENOMEM, libc::ECANCELED] {
            let mut transfer = Transfer::new(0, 2 * PAGE_BYTES).expect("a file can hold it");
            for _ in 0..STALLS_MAX {
                transfer.wrote(os(errno)).expect("once more");
            }
            transfer.wrote(Ok(PAGE_BYTES)).expect("progress");
            for _ in 0..STALLS_MAX {
                transfer.read(os(errno), no_end).expect("once more");
            }
            assert_eq!(transfer.wrote(os(errno)).expect_err("enough").raw_os_error(), Some(errno));
        }
        let mut transfer = Transfer::new(0, PAGE_BYTES).expect("a file can hold it");
        for _ in 0..STALLS_MAX {
            transfer.wrote(Ok(512)).expect("once more");
        }
        assert_eq!(transfer.wrote(Ok(512)).expect_err("enough").kind(), io::ErrorKind::WriteZero);
        assert_eq!(transfer.read(Ok(512), no_end).expect_err("enough").kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn other_failures_are_final() {
        let mut transfer = Transfer::new(0, PAGE_BYTES).expect("a file can hold it");
        assert_eq!(transfer.wrote(Ok(0)).expect_err("no progress").kind(), io::ErrorKind::WriteZero);
        assert_eq!(transfer.wrote(os(libc::EIO)).expect_err("broken").raw_os_error(), Some(libc::EIO));
        assert_eq!(transfer.wrote(os(libc::ENOSPC)).expect_err("full").kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn one_operation_is_bounded() {
        let length = 3 * TRANSFER_MAX_BYTES;
        let mut transfer = Transfer::new(0, length).expect("a file can hold it");
        for _ in 0..3 {
            assert_eq!(transfer.next().len(), TRANSFER_MAX_BYTES);
            transfer.wrote(Ok(TRANSFER_MAX_BYTES)).expect("progress");
        }
        assert!(transfer.is_complete());
    }
}
