//! What a thread or the process is to the kernel: its memory, priority, CPUs, signals, descriptors and system
//! calls; handles on other processes; and the trim and the devices of a file system.
#![allow(
    unsafe_code,
    reason = "no crate in use wraps close_range, signal, FITRIM, BTRFS_IOC_FS_INFO, or seccomp with \
              SECCOMP_FILTER_FLAG_LOG"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{self, Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
use rustix::thread::{CpuSet, sched_setaffinity};
use seccompiler::BpfProgramRef;

/// Keeps all memory that this process has touched, or will touch, from being swapped out: the swap may be on
/// the very disk that it serves. Memory that is never touched is not brought in by this.
pub(super) fn keep_in_memory() -> io::Result<()> {
    Ok(mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)?)
}

/// Brings all memory that this process has mapped now, its program included, into memory and keeps it there:
/// soon the disk that it lies on may not answer.
pub(super) fn load_program() -> io::Result<()> {
    Ok(mlockall(MlockAllFlags::CURRENT)?)
}

/// Marks this thread, and what it starts, as serving a block device: its allocations wait for no I/O.
pub(super) fn become_io_flusher() -> io::Result<()> {
    Ok(process::configure_io_flusher_behavior(true)?)
}

/// The highest priority of an ordinary thread.
const MOST_URGENT: i32 = -20;

/// Lets this thread run as soon as it has work. Not for a thread that gains from finding much work at once.
pub(super) fn become_urgent() -> io::Result<()> {
    Ok(process::setpriority_process(None, MOST_URGENT)?)
}

/// Keeps this thread on `cpus`. The kernel leaves out those that this process may not use; none left is an
/// error.
pub(super) fn run_on(cpus: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    cpus.iter().filter(|&&cpu| cpu < CpuSet::MAX_CPU).for_each(|&cpu| set.set(cpu));
    Ok(sched_setaffinity(None, &set)?)
}

/// Closes every descriptor but the first three and `kept`.
pub(super) fn close_descriptors(kept: Option<RawFd>) -> io::Result<()> {
    let close = |first: u32, last: u32| {
        if first > last {
            return Ok(());
        }
        // SAFETY: what is closed was open before this program began, and nothing here owns it. (musl has no
        // function for it.)
        check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })
    };
    let first = u32::try_from(libc::STDERR_FILENO + 1).expect("a small number");
    match kept.and_then(|kept| u32::try_from(kept).ok()) {
        Some(kept) => close(first, kept - 1).and_then(|()| close(kept + 1, u32::MAX)),
        None => close(first, u32::MAX),
    }
}

/// The signals by which the kernel reports a fault of the program itself; ignoring them would only repeat it.
const FAULTS: [i32; 7] =
    [libc::SIGILL, libc::SIGTRAP, libc::SIGABRT, libc::SIGBUS, libc::SIGFPE, libc::SIGSEGV, libc::SIGSYS];

/// The signals that request something.
pub(super) const REQUESTS: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];

/// Undoes what the caller had decided about signals: faults and requests have their usual effect, and every
/// other signal that would end or stop a process has none.
pub(super) fn reset_signals() -> io::Result<()> {
    for number in 1..=libc::SIGRTMAX() {
        let matters = FAULTS.contains(&number) || REQUESTS.iter().any(|&request| request as i32 == number);
        let action = if matters { libc::SIG_DFL } else { libc::SIG_IGN };
        // SAFETY: neither action runs any code. The kernel's own (SIGKILL, SIGSTOP) and the C library's are
        // refused.
        unsafe { libc::signal(number, action) };
    }
    Ok(SigSet::empty().thread_set_mask()?)
}

/// Blocks the signals that request something in this thread, and in those that it starts: they wait.
pub(super) fn block_requests() -> io::Result<()> {
    Ok(SigSet::from_iter(REQUESTS).thread_block()?)
}

/// Whether a blocked signal asks this process to end. It counts as taken.
pub(super) fn takes_end_request() -> bool {
    let asking = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    let signals = SignalFd::with_flags(&asking, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK);
    signals.is_ok_and(|signals| matches!(signals.read_signal(), Ok(Some(_))))
}

/// Binds every thread of this process, now and later, to `filter`, and has refused calls logged.
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

/// The argument of `FITRIM`: `struct fstrim_range` of the kernel.
#[repr(C)]
struct TrimRange {
    start: u64,
    length: u64,
    least: u64,
}

/// `FITRIM`: `_IOWR('X', 121, struct fstrim_range)`.
const FITRIM: libc::Ioctl = libc::_IOWR::<TrimRange>(b'X' as u32, 121);

const _: () = assert!(size_of::<TrimRange>() == 24, "the size of the argument is part of the number");

/// Has the file system of the open `folder` discard what is free in its `length` bytes at `start`; how many
/// bytes it says that it has discarded.
///
/// # Errors
///
/// The kernel's: `EOPNOTSUPP` or `ENOTTY` if it does not trim, `EINVAL` if `start` is behind its end.
pub fn trim_file_system(folder: impl AsFd, start: u64, length: u64) -> io::Result<u64> {
    let mut range = TrimRange { start, length, least: 0 };
    // SAFETY: the kernel reads and writes one `struct fstrim_range`, which `range` is, and keeps no pointer.
    check(unsafe { libc::ioctl(folder.as_fd().as_raw_fd(), FITRIM, &raw mut range) })?;
    Ok(range.length)
}

/// `FIFREEZE` and `FITHAW`: `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)`, which have no argument.
const FREEZE: libc::Ioctl = libc::_IOWR::<libc::c_int>(b'X' as u32, 119);
const THAW: libc::Ioctl = libc::_IOWR::<libc::c_int>(b'X' as u32, 120);

/// Has the file system of the open `folder` write everything back; whoever writes to it waits from then on.
///
/// # Errors
///
/// The kernel's: `EOPNOTSUPP` if it cannot be frozen, `EBUSY` if it is.
pub(super) fn freeze_file_system(folder: impl AsFd) -> io::Result<()> {
    // SAFETY: the kernel takes the argument for nothing.
    check(unsafe { libc::ioctl(folder.as_fd().as_raw_fd(), FREEZE, 0) })
}

/// Ends [`freeze_file_system`].
///
/// # Errors
///
/// The kernel's: `EINVAL` if it is not frozen.
pub(super) fn thaw_file_system(folder: impl AsFd) -> io::Result<()> {
    // SAFETY: as above.
    check(unsafe { libc::ioctl(folder.as_fd().as_raw_fd(), THAW, 0) })
}

/// `BLKRRPART`: `_IO(0x12, 95)`.
const FIND_PARTITIONS: libc::Ioctl = libc::_IO(0x12, 95);

/// Has the kernel look for the partitions of the open block device, and waits for that.
///
/// # Errors
///
/// The kernel's: `EINVAL` as long as it is not to look, `EBUSY` if one of those that it has found is in use.
pub(super) fn find_partitions(device: impl AsFd) -> io::Result<()> {
    // SAFETY: the request has no argument.
    check(unsafe { libc::ioctl(device.as_fd().as_raw_fd(), FIND_PARTITIONS) })
}

/// What `BTRFS_IOC_FS_INFO` gives: `struct btrfs_ioctl_fs_info_args` of the kernel.
#[repr(C)]
struct BtrfsInfo {
    largest_number: u64,
    devices: u64,
    id: [u8; 16],
    rest: [u8; 992],
}

/// `BTRFS_IOC_FS_INFO`: `_IOR(0x94, 31, struct btrfs_ioctl_fs_info_args)`.
const BTRFS_FS_INFO: libc::Ioctl = libc::_IOR::<BtrfsInfo>(0x94, 31);

const _: () = assert!(size_of::<BtrfsInfo>() == 1024, "the size of the argument is part of the number");

/// The identifier by which the kernel knows the mounted btrfs of the open `folder`, and how many devices it
/// has.
///
/// # Errors
///
/// The kernel's: `ENOTTY` if it is no btrfs.
pub fn btrfs_devices(folder: impl AsFd) -> io::Result<([u8; 16], u64)> {
    let mut info = BtrfsInfo { largest_number: 0, devices: 0, id: [0; 16], rest: [0; 992] };
    // SAFETY: the kernel writes one `struct btrfs_ioctl_fs_info_args`, which `info` is, and keeps no pointer.
    check(unsafe { libc::ioctl(folder.as_fd().as_raw_fd(), BTRFS_FS_INFO, &raw mut info) })?;
    Ok((info.id, info.devices))
}

/// A process that cannot be mistaken for a later one of the same number.
pub(super) struct ProcessHandle(OwnedFd);

impl ProcessHandle {
    /// The process that now has this number.
    pub(super) fn open(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(rustix::io::Errno::SRCH)?;
        Ok(Self(pidfd_open(pid, PidfdFlags::empty())?))
    }

    /// Requests it to end, if its device is not in use.
    pub(super) fn terminate(&self) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.0, process::Signal::TERM)?)
    }

    /// Waits for its end.
    pub(super) fn await_end(&self) -> io::Result<()> {
        loop {
            match poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
                Ok(1..) => return Ok(()),
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Waits for its end, at most so long; whether it has ended, with all of its threads.
    pub(super) fn has_ended_within(&self, patience: Duration) -> bool {
        let patience = PollTimeout::try_from(patience).expect("a short time");
        let polled = poll(&mut [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)], patience);
        polled.is_ok_and(|count| count > 0)
    }

    /// Ends it.
    pub(super) fn kill(&self) -> io::Result<()> {
        Ok(pidfd_send_signal(&self.0, process::Signal::KILL)?)
    }
}

fn check(result: impl Into<i64>) -> io::Result<()> {
    if result.into() < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
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
