//! The few system calls that no crate in use wraps safely: what a thread or the process is to the kernel.
#![allow(
    unsafe_code,
    reason = "mlockall, prctl, setpriority, sched_setaffinity, signal, close_range, seccomp and pidfds are raw system calls"
)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use nix::sys::signal::{SigSet, Signal};
use seccompiler::BpfProgramRef;

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
    fn a_thread_can_be_kept_on_the_cpus_it_already_has() {
        let all: Vec<usize> = (0..1024).collect();
        run_on(&all).expect("some CPU of all is ours");
        assert!(run_on(&[]).is_err());
    }
}
