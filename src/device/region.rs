//! Memory that is shared with the kernel or with other processes.
#![allow(unsafe_code, reason = "mappings are used through raw pointers")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use libublk::sys;
use rustix::mm;

use crate::atomic::{AtomicU64, Ordering};
use crate::image::SharedWords;

/// A mapped range that the kernel reads and writes behind the compiler's back: it is used through raw
/// pointers only, each checked against the range.
pub(super) struct Region {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread, and `Region` is its only owner.
unsafe impl Send for Region {}

impl Region {
    /// Private memory, zero and present, for data of the disk: core dumps leave it out.
    pub(super) fn memory(length: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let region = Self::map(length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)?;
        region.leave_out_of_cores()?;
        region.bring_in()?;
        Ok(region)
    }

    /// Brings all of it into memory. `MAP_POPULATE` brings in nothing once the process locks what it touches.
    fn bring_in(&self) -> io::Result<()> {
        let place = self.base.as_ptr().cast();
        // SAFETY: the range is this mapping, and its contents do not change.
        Ok(unsafe { mm::madvise(place, self.length, mm::Advice::LinuxPopulateWrite) }?)
    }

    /// Zeros that cost no memory: never written, they stay the kernel's zero page.
    pub(super) fn zeros(length: usize) -> io::Result<Self> {
        Self::map(length, libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    }

    /// A read-only view of memory that a driver shares.
    pub(super) fn of_device(file: &File, offset: i64, length: usize) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
        Self::map(length, libc::PROT_READ, flags, file.as_raw_fd(), offset)
    }

    fn map(length: usize, protection: i32, flags: i32, fd: i32, offset: i64) -> io::Result<Self> {
        assert!(length > 0, "an empty mapping has no address");
        // SAFETY: without MAP_FIXED the kernel chooses addresses that nothing else uses.
        let base = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).expect("a mapping is never at address zero");
        Ok(Self { base, length })
    }

    fn leave_out_of_cores(&self) -> io::Result<()> {
        // SAFETY: the range is this mapping, and its contents do not change.
        Ok(unsafe { mm::madvise(self.base.as_ptr().cast(), self.length, mm::Advice::LinuxDontDump) }?)
    }

    /// Its length, bytes.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// The address of `length` bytes at `offset`.
    pub(super) fn at(&self, offset: usize, length: usize) -> *mut u8 {
        let end = offset.checked_add(length).expect("offsets within a mapping do not overflow");
        assert!(end <= self.length, "{offset}+{length} leaves a mapping of {} bytes", self.length);
        // SAFETY: `offset` is within the mapping, as just asserted.
        unsafe { self.base.as_ptr().add(offset) }
    }

    /// Makes `length` bytes at `offset` zero.
    pub(super) fn fill_zero(&mut self, offset: usize, length: usize) {
        // SAFETY: `at` checked the range, which is writable memory: the callers' regions come from `memory`,
        // and no request of the kernel on this range is under way, as its tag is with the front.
        unsafe { ptr::write_bytes(self.at(offset, length), 0, length) }
    }

    /// A copy of the `index`-th I/O descriptor of a region that holds nothing else.
    pub(super) fn descriptor(&self, index: usize) -> sys::ublksrv_io_desc {
        let size = size_of::<sys::ublksrv_io_desc>();
        #[expect(clippy::cast_ptr_alignment, reason = "asserted on the next line")]
        let place = self.at(index * size, size).cast::<sys::ublksrv_io_desc>();
        assert!(place.is_aligned(), "descriptors are packed from a page border on");
        // SAFETY: in range and aligned; any bytes are a valid descriptor. Volatile, as the kernel writes it:
        // each field is read once, and only what was read is used.
        unsafe { place.read_volatile() }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nothing points into it now.
        let result = unsafe { mm::munmap(self.base.as_ptr().cast(), self.length) };
        assert!(result.is_ok(), "unmapping what was mapped cannot fail");
    }
}

/// Maps the first `count` words of `file`, until the last user drops them.
pub(super) fn shared_words(file: &File, count: usize) -> io::Result<SharedWords> {
    assert_eq!(size_of::<AtomicU64>(), size_of::<u64>(), "a file has no words of a model");
    let length = count * size_of::<AtomicU64>();
    let region =
        Region::map(length, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file.as_raw_fd(), 0)?;
    region.leave_out_of_cores()?;
    #[expect(clippy::cast_ptr_alignment, reason = "a mapping starts on a page border")]
    let words = region.base.as_ptr().cast::<AtomicU64>();
    // SAFETY: mapped with room for as many words, aligned, and any bits are a valid word. Other processes
    // that map the file use atomic words too. The mapping goes with the region, and that with what is
    // returned, which lends the words for no longer.
    let words = unsafe { std::slice::from_raw_parts(words, count) };
    Ok(SharedWords::of(words, Arc::new(Mapped(region))))
}

/// Has private memory take the place of `words`, with the same content: what is in `written`, and zeros.
/// Nothing stores to them any longer; other threads may load them all the time.
pub(super) fn make_private(
    words: &SharedWords,
    written: impl Iterator<Item = Range<usize>>,
) -> io::Result<()> {
    let length = size_of_val(&**words);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let copy = Region::map(length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)?;
    copy.leave_out_of_cores()?;
    for place in written.flatten() {
        let word = words[place].load(Ordering::Relaxed);
        if word != 0 {
            let target = copy.at(place * size_of::<u64>(), size_of::<u64>());
            // SAFETY: in range, aligned by whole words from a page border, and nothing else knows the copy.
            unsafe { target.cast::<u64>().write_unaligned(word) };
        }
    }
    let place = words.as_ptr().cast_mut().cast();
    // SAFETY: `words` are a whole mapping of this length, made by `shared_words`, whose end unmaps whatever
    // is there. A load in another thread finds one or the other, which are equal: one that comes in between
    // waits for the end of the call in its page fault.
    unsafe { mm::mremap_fixed(copy.base.as_ptr().cast(), length, length, mm::MremapFlags::MAYMOVE, place) }?;
    // It has moved.
    std::mem::forget(copy);
    Ok(())
}

/// A mapping that is only kept.
struct Mapped(#[expect(dead_code, reason = "it is unmapped when it is dropped")] Region);

// SAFETY: nothing reaches the region through it.
unsafe impl Sync for Mapped {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::sys as sys_of_daemon;

    #[test]
    fn memory_is_zero_aligned_and_bounded() {
        let mut region = Region::memory(8192).expect("memory");
        let place = region.at(4096, 4096);
        assert_eq!(place.addr() % 4096, 0);
        // SAFETY: in range, and only this test uses the region.
        unsafe { place.write(7) };
        region.fill_zero(4096, 1);
        // SAFETY: as above.
        assert_eq!(unsafe { place.read() }, 0);
    }

    /// A buffer that the kernel cannot fault in would stall its queue, whether it is registered or not.
    #[test]
    fn memory_is_present_where_the_process_locks_what_it_touches() {
        // Without the right to it, the memory is present all the same.
        let _ = sys_of_daemon::keep_in_memory();
        let region = Region::memory(1 << 20).expect("memory");
        let mut pages = [0_u8; (1 << 20) / 4096];
        // SAFETY: the range is mapped, and there is a byte for each of its pages.
        let result = unsafe { libc::mincore(region.at(0, 1 << 20).cast(), 1 << 20, pages.as_mut_ptr()) };
        mm::munlockall().expect("any process may");
        assert_eq!(result, 0);
        assert!(pages.iter().all(|page| page & 1 == 1), "{pages:?}");
    }

    #[test]
    #[should_panic(expected = "leaves a mapping")]
    fn a_pointer_past_the_end_is_refused() {
        Region::memory(4096).expect("memory").at(4096, 1);
    }
}
