//! The few system calls that no crate in use wraps safely: memory shared with the kernel, and what a thread
//! or process is told to be.
#![allow(
    unsafe_code,
    reason = "mmap, madvise, mlockall, prctl, setpriority, sched_setaffinity, signal, close_range, seccomp and pidfds are raw system calls"
)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU64;

use libublk::sys;
use nix::sys::signal::{SigSet, Signal};
use seccompiler::BpfProgramRef;

/// A mapped range that the kernel reads and writes behind the compiler's back: only ever used through raw
/// pointers, each checked against the range.
pub(super) struct Region {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread, and `Region` is its only owner.
unsafe impl Send for Region {}

impl Region {
    /// Private memory, zero and present, for data of the disk: no core dump shows it.
    pub(super) fn memory(length: usize) -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
        let region = Self::map(length, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)?;
        region.leave_out_of_cores()?;
        Ok(region)
    }

    /// Zeros that cost no memory: never written, they stay the kernel's zero page.
    pub(super) fn zeros(length: usize) -> io::Result<Self> {
        Self::map(length, libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    }

    /// A read-only view of what a driver shares.
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
        check(unsafe { libc::madvise(self.base.as_ptr().cast(), self.length, libc::MADV_DONTDUMP) })
    }

    /// How long it is, bytes.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// Where `length` bytes at `offset` lie.
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
        // SAFETY: mapped by `map` with this length, and nothing points into it any more.
        let result = check(unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) });
        assert!(result.is_ok(), "unmapping what was mapped cannot fail");
    }
}

/// The words of a file in memory, shared with whoever maps it next; mapped until the process ends.
pub(super) fn shared_words(file: &File, count: usize) -> io::Result<&'static [AtomicU64]> {
    let length = count * size_of::<AtomicU64>();
    let region =
        Region::map(length, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, file.as_raw_fd(), 0)?;
    region.leave_out_of_cores()?;
    #[expect(clippy::cast_ptr_alignment, reason = "a mapping starts on a page border")]
    let words = region.base.as_ptr().cast::<AtomicU64>();
    std::mem::forget(region);
    // SAFETY: mapped, aligned, never unmapped, and any bits are a valid word. Other processes that map the file
    // use atomic words too.
    Ok(unsafe { std::slice::from_raw_parts(words, count) })
}

/// Keeps whatever memory this process has touched, or will touch, from being swapped out: the swap may be on the
/// very disk that it serves. Memory that is never touched is not brought in by this.
pub(super) fn keep_in_memory() -> io::Result<()> {
    // SAFETY: no pointers are passed.
    check(unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) })
}

/// `PR_SET_IO_FLUSHER` of `linux/prctl.h`; the `libc` crate does not have it.
const PR_SET_IO_FLUSHER: i32 = 57;

/// Tells the kernel that this thread serves a block device: its own allocations must not wait for I/O that
/// only it can do.
pub(super) fn become_io_flusher() -> io::Result<()> {
    // SAFETY: no pointers are passed.
    check(unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) })
}

/// The most urgent an ordinary thread can be.
const MOST_URGENT: i32 = -20;

/// Lets this thread run as soon as it has something to do. Not for a thread that gains by finding much to do at once.
pub(super) fn become_urgent() -> io::Result<()> {
    // SAFETY: no pointers are passed; 0 names the calling thread.
    check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, MOST_URGENT) })
}

/// Keeps this thread on `cpus`. Those this process may not use are left out by the kernel; none left is an
/// error.
pub(super) fn run_on(cpus: &[usize]) -> io::Result<()> {
    // SAFETY: an all-zero `cpu_set_t` is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &cpu in cpus.iter().filter(|&&cpu| cpu < 8 * size_of::<libc::cpu_set_t>()) {
        // SAFETY: the number is below the set's capacity.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    // SAFETY: `set` is initialised and its size is given; 0 names this thread.
    check(unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) })
}

/// Closes every descriptor but the first three and `kept`.
pub(super) fn close_descriptors(kept: Option<RawFd>) -> io::Result<()> {
    let close = |first: u32, last: u32| {
        // SAFETY: what is closed was open before this program began, and nothing here has a handle on it.
        if first > last { Ok(()) } else { check(unsafe { libc::close_range(first, last, 0) }) }
    };
    let first = u32::try_from(libc::STDERR_FILENO + 1).expect("a small number");
    match kept.and_then(|kept| u32::try_from(kept).ok()) {
        Some(kept) => close(first, kept - 1).and_then(|()| close(kept + 1, u32::MAX)),
        None => close(first, u32::MAX),
    }
}

/// The signals by which the kernel tells of a fault in the program itself; ignoring them would only repeat it.
const FAULTS: [i32; 7] =
    [libc::SIGILL, libc::SIGTRAP, libc::SIGABRT, libc::SIGBUS, libc::SIGFPE, libc::SIGSEGV, libc::SIGSYS];

/// The signals by which somebody asks for something.
pub(super) const REQUESTS: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

/// Forgets what the caller had decided about signals: faults and requests have their usual effect, and every other
/// signal that would end or stop a process has none.
pub(super) fn reset_signals() -> io::Result<()> {
    for number in 1..=libc::SIGRTMAX() {
        let matters = FAULTS.contains(&number) || REQUESTS.iter().any(|&request| request as i32 == number);
        let action = if matters { libc::SIG_DFL } else { libc::SIG_IGN };
        // SAFETY: neither action runs any code. The kernel's own (SIGKILL, SIGSTOP) and the C library's are refused.
        unsafe { libc::signal(number, action) };
    }
    Ok(SigSet::empty().thread_set_mask()?)
}

/// Has every thread of this process, and those that come, ask `filter` before each system call.
pub(super) fn install_filter(filter: BpfProgramRef<'_>) -> io::Result<()> {
    let length = u16::try_from(filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len: length, filter: filter.as_ptr().cast_mut().cast() };
    let flags = libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_LOG;
    // SAFETY: the kernel copies `program`, which names `length` instructions, and keeps no pointer.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    match result {
        0 => Ok(()),
        ..0 => Err(io::Error::last_os_error()),
        _ => Err(io::Error::other("one of the threads has a filter of its own")),
    }
}

/// A process that cannot be mistaken for a later one of the same number.
pub(super) struct ProcessHandle(OwnedFd);

impl ProcessHandle {
    /// The process that now has this number.
    pub(super) fn open(pid: u32) -> io::Result<Self> {
        // SAFETY: no pointers are passed.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::c_long::from(pid), 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = i32::try_from(fd).expect("a file descriptor is small");
        // SAFETY: just opened, and owned by nobody else.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Asks it to end, if its device is not in use.
    pub(super) fn terminate(&self) -> io::Result<()> {
        self.signal(libc::SIGTERM)
    }

    /// Ends it.
    pub(super) fn kill(&self) -> io::Result<()> {
        self.signal(libc::SIGKILL)
    }

    fn signal(&self, signal: i32) -> io::Result<()> {
        let null = ptr::null::<libc::siginfo_t>();
        // SAFETY: a null `siginfo` is allowed and means an ordinary signal.
        let result =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), signal, null, 0) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zero_aligned_and_bounded() {
        let mut region = Region::memory(8192).expect("memory");
        let place = region.at(4096, 4096);
        assert_eq!(place.addr() % 4096, 0);
        // SAFETY: in range, and nobody else knows this region.
        unsafe { place.write(7) };
        region.fill_zero(4096, 1);
        // SAFETY: as above.
        assert_eq!(unsafe { place.read() }, 0);
    }

    #[test]
    #[should_panic(expected = "leaves a mapping")]
    fn a_pointer_past_the_end_is_refused() {
        Region::memory(4096).expect("memory").at(4096, 1);
    }

    #[test]
    fn a_thread_can_be_kept_on_the_cpus_it_already_has() {
        let all: Vec<usize> = (0..1024).collect();
        run_on(&all).expect("some CPU of all is ours");
        assert!(run_on(&[]).is_err());
    }
}
