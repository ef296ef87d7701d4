//! The ring: `io_uring` operations as futures, all on one thread.
//!
//! Invariants:
//!
//! * memory that the kernel may touch belongs to the slot of its operation from before the SQE is pushed
//!   until the CQE has been seen; dropping a future frees nothing early;
//! * the slot keeps the file open as well: an SQE names a descriptor number, and the number must not come to
//!   mean another file before the kernel has looked it up;
//! * no user datum is used twice while anything might still speak of it;
//! * nothing is in flight when a ring's memory is freed: its drop waits for the last CQE.
//!
//! No borrow of the slots is held while a waker is woken or dropped: either may come back here.

#![allow(unsafe_code, reason = "SQEs carry raw pointers")]

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::{IoUring, opcode, types};
use nix::sys::eventfd::EventFd;
use rustix::fs::{AtFlags, StatxFlags, statx};
use rustix::io::Errno;
use slab::Slab;

use super::Buffer;
use crate::error::{Error, Result};

/// SQEs collected between two entries into the kernel; a full queue is submitted early.
const QUEUE_ENTRIES: u32 = 256;

/// How often in a row an operation that made no progress (`EINTR`, `EAGAIN`, an unaligned short transfer) is
/// repeated before it fails: a passing cause is gone by then, a lasting one must not hang the caller.
pub(super) const STALLS_MAX: u32 = 16;

/// The user datum of a cancellation, whose CQE says nothing of interest.
const CANCELLATION: u64 = u64::MAX;

/// What an operation reads into or writes from.
pub(super) enum Memory {
    /// Nothing.
    None,
    /// Pages of its own.
    Pages(Buffer),
    /// Pages that several writes share, and that do not change.
    Shared(Rc<Buffer>),
    /// An eventfd's counter.
    Counter(Box<u64>),
    /// How long a timer runs.
    Time(Box<types::Timespec>),
}

enum State {
    InFlight(Option<Waker>),
    /// In flight, without a task that waits for it.
    Abandoned,
    Ended(i32),
}

struct Slot {
    state: State,
    memory: Memory,
    /// Distinguishes this use of the slot from earlier ones.
    generation: u32,
    /// May wait for ever: abandoning it cancels it.
    unbounded: bool,
    /// Keeps the descriptor number valid.
    _file: Option<Arc<dyn AsFd>>,
}

/// One `io_uring`, shared by the disks and the reactor of one thread.
pub struct Ring {
    io: RefCell<IoUring>,
    slots: RefCell<Slab<Slot>>,
    generation: Cell<u32>,
    in_flight: Cell<usize>,
}

impl Ring {
    /// A ring for the calling thread.
    ///
    /// # Errors
    ///
    /// Whatever the kernel says when it offers no `io_uring`, with a remedy.
    pub fn new() -> Result<Rc<Self>> {
        let io = build().map_err(|error| ring_refused("setting up io_uring", error))?;
        Ok(Rc::new(Self::over(io)))
    }

    fn over(io: IoUring) -> Self {
        Self {
            io: RefCell::new(io),
            slots: RefCell::new(Slab::new()),
            generation: Cell::new(0),
            in_flight: Cell::new(0),
        }
    }

    /// Operations whose end the kernel has not reported yet, abandoned ones included.
    pub fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    /// Waits until a thread has added to `eventfd`, and takes its count. Armed at once, not at the first
    /// poll.
    ///
    /// Dropping the future disarms it. A count from before the drop may be gone by then: whoever drops it
    /// looks once more at what the eventfd announces.
    ///
    /// # Errors
    ///
    /// What the kernel says; nothing that a wait could cure.
    pub fn read_eventfd(
        self: &Rc<Self>,
        eventfd: Arc<EventFd>,
    ) -> impl Future<Output = io::Result<u64>> + use<> {
        let arm = {
            let ring = Rc::clone(self);
            move || ring.read_counter(Arc::<EventFd>::clone(&eventfd))
        };
        let mut op = arm();
        async move {
            let mut stalls = 0;
            loop {
                match op.await {
                    (Ok(_), Memory::Counter(count)) => return Ok(*count),
                    (Ok(_), _) => unreachable!("an operation returns the memory it was given"),
                    (Err(error), _) if !is_transient(&error) || stalls == STALLS_MAX => return Err(error),
                    (Err(_), _) => stalls += 1,
                }
                op = arm();
            }
        }
    }

    /// Waits for `time`, from now on and not from the first poll. Dropping the future ends the wait.
    ///
    /// # Errors
    ///
    /// What the kernel says; nothing that a wait could cure.
    pub fn sleep(self: &Rc<Self>, time: Duration) -> impl Future<Output = io::Result<()>> + use<> {
        let op = self.arm(None, Memory::Time(Box::new(time.into())), true, |memory| {
            let Memory::Time(time) = memory else { unreachable!("given above") };
            opcode::Timeout::new(&raw const **time).build()
        });
        async move {
            match op.await.0 {
                Err(error) if error.raw_os_error() == Some(libc::ETIME) => Ok(()),
                outcome => outcome.map(drop),
            }
        }
    }

    /// Reads at `offset` of `file` into the bytes `range` of `pages`.
    pub(super) fn read(
        self: &Rc<Self>,
        file: Arc<dyn AsFd>,
        offset: u64,
        pages: Buffer,
        range: Range<usize>,
    ) -> Op {
        self.start(file, Memory::Pages(pages), false, |fd, memory| {
            let Memory::Pages(pages) = memory else { unreachable!("given above") };
            let target = &mut pages[range];
            opcode::Read::new(fd, target.as_mut_ptr(), length_of(target)).offset(offset).build()
        })
    }

    /// Writes the bytes `range` of `memory` at `offset` of `file`.
    pub(super) fn write(
        self: &Rc<Self>,
        file: Arc<dyn AsFd>,
        offset: u64,
        memory: Memory,
        range: Range<usize>,
    ) -> Op {
        self.start(file, memory, false, |fd, memory| {
            let source = match memory {
                Memory::Pages(pages) => &pages[range],
                Memory::Shared(pages) => &pages[range],
                Memory::None | Memory::Counter(_) | Memory::Time(_) => unreachable!("only pages are written"),
            };
            opcode::Write::new(fd, source.as_ptr(), length_of(source)).offset(offset).build()
        })
    }

    /// Makes the data of `file`, and its length, durable.
    pub(super) fn sync_data(self: &Rc<Self>, file: Arc<dyn AsFd>) -> Op {
        self.start(file, Memory::None, false, |fd, _| {
            opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build()
        })
    }

    /// `fallocate(2)` with `mode` on `length` bytes at `offset` of `file`.
    pub(super) fn fallocate(self: &Rc<Self>, file: Arc<dyn AsFd>, mode: i32, offset: u64, length: u64) -> Op {
        self.start(file, Memory::None, false, |fd, _| {
            opcode::Fallocate::new(fd, length).offset(offset).mode(mode).build()
        })
    }

    /// Submits what has been collected, waits for a CQE if asked to, and wakes whoever waits for those there
    /// are.
    ///
    /// # Panics
    ///
    /// When nothing is in flight that could end a wait, and when the kernel no longer takes the ring: what is
    /// in flight could never be awaited.
    pub(super) fn turn(&self, wait: bool) {
        assert!(!wait || self.in_flight() > 0, "every task waits, and nothing in flight could wake one");
        self.enter(wait).expect("the kernel keeps accepting a ring that it has set up");
        self.reap();
    }

    fn read_counter(self: &Rc<Self>, eventfd: Arc<EventFd>) -> Op {
        self.start(eventfd, Memory::Counter(Box::new(0)), true, |fd, memory| {
            let Memory::Counter(count) = memory else { unreachable!("given above") };
            let target: *mut u64 = &raw mut **count;
            opcode::Read::new(fd, target.cast(), u64::BITS / u8::BITS).build()
        })
    }

    /// Begins an operation on `file`; see [`Self::arm`].
    fn start(
        self: &Rc<Self>,
        file: Arc<dyn AsFd>,
        memory: Memory,
        unbounded: bool,
        build: impl FnOnce(types::Fd, &mut Memory) -> Entry,
    ) -> Op {
        let fd = types::Fd(file.as_fd().as_raw_fd());
        self.arm(Some(file), memory, unbounded, |memory| build(fd, memory))
    }

    /// Gives an operation its slot, has `build` point the SQE at the memory *in the slot*, and pushes it.
    fn arm(
        self: &Rc<Self>,
        file: Option<Arc<dyn AsFd>>,
        memory: Memory,
        unbounded: bool,
        build: impl FnOnce(&mut Memory) -> Entry,
    ) -> Op {
        let generation = self.generation.get();
        self.generation.set(generation.wrapping_add(1));
        let (key, entry) = {
            let mut slots = self.slots.borrow_mut();
            let state = State::InFlight(None);
            let key = slots.insert(Slot { state, memory, generation, unbounded, _file: file });
            (key, build(&mut slots[key].memory))
        };
        self.in_flight.set(self.in_flight.get() + 1);
        self.push(&entry.user_data(user_data(key, generation)));
        Op { ring: Rc::clone(self), key, taken: false }
    }

    fn push(&self, entry: &Entry) {
        loop {
            let mut io = self.io.borrow_mut();
            // SAFETY: an entry comes from `start` or is a cancellation. A cancellation carries no pointer.
            // The pointer of any other leads into heap memory owned by the entry's slot, and covers
            // `length_of` what it was taken from, or the whole time of a timer. The slot lives, unshared with
            // any code of ours, until `complete` has seen the CQE (`Op::drop` only abandons it, and the drop
            // of the ring waits), and what moves when the slots move is the owner's handle, not the heap
            // memory. Shared pages are only ever read, by us and by the kernel. The descriptor, where there
            // is one, is valid until then, too: the slot holds the file.
            if unsafe { io.submission().push(entry) }.is_ok() {
                return;
            }
            drop(io);
            self.turn(false); // the queue is full: hand it over
        }
    }

    /// One `io_uring_enter`. What hinders for a moment is no error: the caller's loop comes back.
    fn enter(&self, wait: bool) -> io::Result<()> {
        match self.io.borrow().submit_and_wait(usize::from(wait)) {
            Ok(_) => Ok(()),
            // EBUSY: completions have overflowed their queue; reaping makes room.
            Err(error) if is_transient(&error) || error.raw_os_error() == Some(libc::EBUSY) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn reap(&self) {
        loop {
            let Some(entry) = self.io.borrow_mut().completion().next() else { return };
            self.complete(entry.user_data(), entry.result());
        }
    }

    fn complete(&self, datum: u64, result: i32) {
        if datum == CANCELLATION {
            return;
        }
        self.in_flight.set(self.in_flight.get() - 1);
        let (waker, removed) = {
            let mut slots = self.slots.borrow_mut();
            let key = key_of(datum);
            let slot = slots.get_mut(key).expect("a slot lives until its CQE");
            assert_eq!(user_data(key, slot.generation), datum, "a CQE of an earlier use of the slot");
            match std::mem::replace(&mut slot.state, State::Ended(result)) {
                State::InFlight(waker) => (waker, None),
                State::Abandoned => (None, Some(slots.remove(key))),
                State::Ended(_) => unreachable!("an operation has one CQE"),
            }
        };
        drop(removed);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Drop for Ring {
    /// Waits for what is in flight. Every future is gone, since each holds the ring; what may wait for ever
    /// was cancelled when its future went.
    fn drop(&mut self) {
        while self.in_flight() > 0 {
            if self.enter(true).is_err() {
                // The kernel may still write to the slots' memory: it must outlive the process's interest in
                // it.
                std::mem::forget(self.slots.take());
                return;
            }
            self.reap();
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ring({} in flight)", self.in_flight())
    }
}

/// An operation: resolves to its result, in bytes where it transfers any, and the memory it was given.
///
/// It is on its way from the moment it is made. Dropped, it still takes place, unseen.
pub(super) struct Op {
    ring: Rc<Ring>,
    key: usize,
    taken: bool,
}

impl Future for Op {
    type Output = (io::Result<usize>, Memory);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        assert!(!self.taken, "polled again after its end");
        let waker = context.waker().clone();
        let mut slots = self.ring.slots.borrow_mut();
        match &mut slots[self.key].state {
            State::InFlight(waiting) => {
                let replaced = waiting.replace(waker);
                drop(slots);
                drop(replaced);
                Poll::Pending
            }
            State::Abandoned => unreachable!("abandoned by its drop only"),
            State::Ended(_) => {
                let slot = slots.remove(self.key);
                drop(slots);
                self.taken = true;
                let State::Ended(result) = slot.state else { unreachable!("matched above") };
                Poll::Ready((result_of(result), slot.memory))
            }
        }
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let mut slots = self.ring.slots.borrow_mut();
        let slot = &mut slots[self.key];
        let cancelled = slot.unbounded.then_some(user_data(self.key, slot.generation));
        match std::mem::replace(&mut slot.state, State::Abandoned) {
            State::InFlight(waker) => {
                drop(slots);
                drop(waker);
                if let Some(datum) = cancelled {
                    self.ring.push(&opcode::AsyncCancel::new(datum).build().user_data(CANCELLATION));
                    self.ring.turn(false); // at once: a read without a waiting task takes no later count
                }
            }
            State::Ended(_) => {
                let removed = slots.remove(self.key);
                drop(slots);
                drop(removed);
            }
            State::Abandoned => unreachable!("dropped once"),
        }
    }
}

/// `EINTR` and `EAGAIN`: the same operation may well succeed when it is repeated.
pub(super) fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}

/// Which users the kernel gives no rings to: 0 none, 1 those without a right to them, 2 all.
const RINGS_DISABLED: &str = "/proc/sys/kernel/io_uring_disabled";

/// The kernel gives no ring, while `doing`: the error with the reason, where that is known.
pub fn ring_refused(doing: &str, error: io::Error) -> Error {
    let disabled = std::fs::read_to_string(RINGS_DISABLED).unwrap_or_default();
    let remedy = rings_remedy(error.raw_os_error(), disabled.trim());
    let error = Error::io(doing, error);
    match remedy {
        Some(remedy) => error.remedy(remedy),
        None => error,
    }
}

fn rings_remedy(errno: Option<i32>, disabled: &str) -> Option<String> {
    match (errno, disabled) {
        (Some(libc::EPERM), "1" | "2") => Some(format!(
            "the sysctl kernel.io_uring_disabled is {disabled}, which forbids it: sysctl \
             kernel.io_uring_disabled=0"
        )),
        (Some(libc::EPERM | libc::EACCES), _) => Some(
            "a seccomp filter or a security module forbids io_uring, as in many containers: allow it".into(),
        ),
        (Some(libc::ENOSYS), _) => Some("this needs a kernel with CONFIG_IO_URING".into()),
        (Some(libc::ENOMEM), _) => Some("raise the limit of locked memory: ulimit -l unlimited".into()),
        _ => None,
    }
}

/// What the host has not begun, or could not begin for want of memory: repeated, it may well succeed. A sync
/// is never repeated all the same.
pub(super) fn is_not_begun(error: &io::Error) -> bool {
    is_transient(error) || matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::ECANCELED))
}

/// A ring that runs its completions only when its thread asks for them, where the kernel has that (6.1).
fn build() -> io::Result<IoUring> {
    let mut modern = IoUring::builder();
    modern.setup_single_issuer().setup_defer_taskrun().setup_coop_taskrun().setup_taskrun_flag();
    match modern.build(QUEUE_ENTRIES) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(QUEUE_ENTRIES),
        outcome => outcome,
    }
}

fn user_data(key: usize, generation: u32) -> u64 {
    let key = u32::try_from(key).expect("fewer slots than memory has pages");
    (u64::from(generation) << u32::BITS) | u64::from(key)
}

#[expect(clippy::cast_possible_truncation, reason = "the lower half is the key")]
fn key_of(datum: u64) -> usize {
    datum as u32 as usize
}

fn length_of(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).expect("transfers are bounded")
}

fn result_of(result: i32) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result))
}

/// What direct I/O on a file asks for, in bytes; zero when the file system has none for this file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DirectAlignment {
    pub memory: u32,
    pub offset: u32,
}

/// The alignment of direct I/O on `fd`; `None` when the kernel does not tell.
pub(super) fn direct_alignment(fd: BorrowedFd<'_>) -> io::Result<Option<DirectAlignment>> {
    let answer = match statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        // Where a container hides the call, only trying shows what the file needs.
        Err(Errno::NOSYS) => return Ok(None),
        answer => answer?,
    };
    let told = answer.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
    let (memory, offset) = (answer.stx_dio_mem_align, answer.stx_dio_offset_align);
    Ok(told.then_some(DirectAlignment { memory, offset }))
}

#[cfg(test)]
mod tests {
    use nix::sys::eventfd::EfdFlags;

    use super::*;

    fn eventfd() -> Arc<EventFd> {
        Arc::new(EventFd::new().expect("eventfds can be made"))
    }

    /// A kernel without the modern flags gets a ring that does the same.
    #[test]
    fn a_plain_ring_serves_too() {
        let plain = IoUring::new(QUEUE_ENTRIES).expect("io_uring is there");
        assert!(!plain.params().is_setup_single_issuer());
        let (ring, eventfd) = (Rc::new(Ring::over(plain)), eventfd());
        drop(ring.read_eventfd(Arc::clone(&eventfd)));
        let mut read = std::pin::pin!(ring.read_eventfd(Arc::clone(&eventfd)));
        eventfd.write(3).expect("room for a count");
        let mut context = Context::from_waker(Waker::noop());
        let count = loop {
            match read.as_mut().poll(&mut context) {
                Poll::Ready(count) => break count,
                Poll::Pending => ring.turn(true),
            }
        };
        assert_eq!((count.expect("readable"), ring.in_flight()), (3, 0));
    }

    /// Slots are used again, user data are not; and every slot is given back.
    #[test]
    fn slots_are_recycled_under_new_names() {
        let (ring, file) = (Ring::new().expect("io_uring is there"), eventfd());
        let names: Vec<u64> = (0..100)
            .map(|_| {
                let op = ring.read_counter(Arc::clone(&file));
                let generation = ring.slots.borrow()[op.key].generation;
                let name = user_data(op.key, generation);
                assert_eq!(key_of(name), op.key);
                drop(op);
                while ring.in_flight() > 0 {
                    ring.turn(true);
                }
                name
            })
            .collect();
        assert!(ring.slots.borrow().is_empty());
        let mut distinct = names.clone();
        distinct.dedup();
        assert_eq!(distinct, names);
        assert!(!names.contains(&CANCELLATION));
    }

    /// One task may start more operations than the submission and completion queues hold.
    #[test]
    fn a_full_queue_is_no_obstacle() {
        const COUNT: u32 = 5 * QUEUE_ENTRIES;
        let ring = Ring::new().expect("io_uring is there");
        let one_each = EventFd::from_value_and_flags(COUNT, EfdFlags::EFD_SEMAPHORE);
        let eventfd = Arc::new(one_each.expect("eventfds can be made"));
        let ops: Vec<Op> = (0..COUNT).map(|_| ring.read_counter(Arc::clone(&eventfd))).collect();
        while ring.in_flight() > 0 {
            ring.turn(true);
        }
        let mut context = Context::from_waker(Waker::noop());
        for mut op in ops {
            let ended = Pin::new(&mut op).poll(&mut context);
            assert!(matches!(ended, Poll::Ready((Ok(8), Memory::Counter(count))) if *count == 1));
        }
        assert!(ring.slots.borrow().is_empty());
    }

    #[test]
    fn results_are_bytes_or_error_numbers() {
        assert_eq!(result_of(512).expect("a count"), 512);
        assert_eq!(result_of(-libc::EIO).expect_err("an error number").raw_os_error(), Some(libc::EIO));
    }
}
