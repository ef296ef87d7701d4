//! The reactor: one thread's executor and its ring, driven together.
//!
//! Tasks run until none is ready; then one `io_uring_enter` submits all that they have asked for and waits
//! for the first completion: an idle reactor sleeps.
//!
//! Other threads may leave [`Mail`], which is looked at before each turn of the ring.
//!
//! Wake-ups come from the ring, on this thread, and from nowhere else. A task that waits for another thread
//! waits for an eventfd (see [`Ring::read_eventfd`]), one that waits for a time uses [`Ring::sleep`]; timers,
//! channels and locks of other runtimes do not end the sleep.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use smol::{LocalExecutor, Task};

use super::{ImageFile, Ring, UringDisk};
use crate::disk::tally::Histogram;
use crate::error::Result;

/// How many polls may pass before the ring gets its turn: tasks that keep each other busy must not starve
/// I/O.
const POLLS_MAX: u32 = 256;

/// Where other threads leave what is to be done. Whoever leaves something for a thread that sleeps wakes it
/// by an eventfd that is read in the ring.
pub trait Mail {
    /// Takes what has come, as tasks; whether there was anything.
    fn take(&self) -> bool;

    /// Whether nothing is there: from the call on, whoever leaves something wakes the thread.
    fn may_sleep(&self) -> bool;

    /// The thread is awake: it need not be woken.
    fn awake(&self);
}

/// One thread's executor and ring.
pub struct Reactor {
    // Dropped in this order: the tasks, with their operations, before the ring that waits for them.
    executor: Rc<LocalExecutor<'static>>,
    ring: Rc<Ring>,
    sync_times: Arc<Histogram>,
    mail: RefCell<Option<Weak<dyn Mail>>>,
}

impl fmt::Debug for Reactor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reactor").field("ring", &self.ring).finish_non_exhaustive()
    }
}

impl Reactor {
    /// A reactor for the calling thread.
    ///
    /// # Errors
    ///
    /// Those of [`Ring::new`].
    pub fn new() -> Result<Self> {
        let executor = Rc::new(LocalExecutor::new());
        Ok(Self { executor, ring: Ring::new()?, sync_times: Arc::default(), mail: RefCell::default() })
    }

    /// The ring, on which to arm operations.
    pub fn ring(&self) -> &Rc<Ring> {
        &self.ring
    }

    /// The executor, on which tasks spawn tasks. A task that holds a clone must end by itself: the two keep
    /// each other, and the ring, alive.
    pub fn executor(&self) -> &Rc<LocalExecutor<'static>> {
        &self.executor
    }

    /// A disk for `file` on this ring.
    pub fn disk(&self, file: Arc<ImageFile>) -> UringDisk {
        UringDisk::new(Rc::clone(&self.ring), file, Arc::clone(&self.sync_times))
    }

    /// How long the syncs of its disks have taken, for any thread to read.
    pub fn sync_times(&self) -> &Arc<Histogram> {
        &self.sync_times
    }

    /// From now on `mail` is taken whenever no task is ready, as long as it lives.
    pub fn serve(&self, mail: Weak<dyn Mail>) {
        self.mail.replace(Some(mail));
    }

    /// Starts a task; it runs while [`Self::block_on`] does. Dropping the handle cancels it, `detach` lets it
    /// go.
    pub fn spawn<T: 'static>(&self, future: impl Future<Output = T> + 'static) -> Task<T> {
        self.executor.spawn(future)
    }

    /// Runs `future`, and every task, until `future` has ended.
    ///
    /// # Panics
    ///
    /// When everything waits and nothing is in flight, and when the kernel gives up on the ring: no
    /// task could ever end.
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        let mut future = pin!(future);
        let woken = Arc::new(Woken(AtomicBool::new(true)));
        let waker = Waker::from(Arc::clone(&woken));
        let mut context = Context::from_waker(&waker);
        let mut polls = 0;
        loop {
            if woken.take()
                && let Poll::Ready(output) = future.as_mut().poll(&mut context)
            {
                return output;
            }
            while polls < POLLS_MAX && self.executor.try_tick() {
                polls += 1;
            }
            polls += 1; // the main future's
            let ready = polls >= POLLS_MAX || woken.is_set();
            if polls >= POLLS_MAX || (!ready && !self.take_mail()) {
                self.turn(!ready);
                polls = 0;
            }
        }
    }

    /// One turn of the ring, and a look at the mail: with `wait` it sleeps until something has completed,
    /// unless mail has come.
    fn turn(&self, wait: bool) {
        let Some(mail) = self.mail() else { return self.ring.turn(wait) };
        self.ring.turn(wait && mail.may_sleep());
        mail.awake();
        mail.take();
    }

    fn take_mail(&self) -> bool {
        self.mail().is_some_and(|mail| mail.take())
    }

    fn mail(&self) -> Option<Rc<dyn Mail>> {
        self.mail.borrow().as_ref().and_then(Weak::upgrade)
    }
}

/// Whether the main future is to be polled.
struct Woken(AtomicBool);

impl Woken {
    fn take(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::poll_fn;
    use std::time::Duration;

    use nix::sys::eventfd::{EfdFlags, EventFd};
    use smol::future::{self, yield_now};

    use super::*;

    fn eventfd() -> Arc<EventFd> {
        Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).expect("eventfds can be made"))
    }

    fn reactor() -> Reactor {
        Reactor::new().expect("io_uring is there")
    }

    #[test]
    fn tasks_and_the_main_future_run_together() {
        let reactor = reactor();
        let task = reactor.spawn(async {
            yield_now().await;
            20
        });
        assert_eq!(reactor.block_on(async { task.await + 1 }), 21);
        assert_eq!(reactor.block_on(async { 3 }), 3);
    }

    /// Another thread's word arrives through the ring.
    #[test]
    fn an_eventfd_wakes_the_reactor() {
        let (reactor, eventfd) = (reactor(), eventfd());
        let remote = Arc::clone(&eventfd);
        let writer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            remote.write(5).expect("room for a count");
        });
        let count = reactor.block_on(reactor.ring().read_eventfd(Arc::clone(&eventfd)));
        assert_eq!(count.expect("readable"), 5);
        writer.join().expect("it does not panic");
        eventfd.write(2).expect("room for a count");
        assert_eq!(reactor.block_on(reactor.ring().read_eventfd(eventfd)).expect("readable"), 2);
    }

    /// A dropped eventfd read takes no count from its successor.
    #[test]
    fn a_dropped_eventfd_read_is_disarmed() {
        let (reactor, eventfd) = (reactor(), eventfd());
        let read = || reactor.ring().read_eventfd(Arc::clone(&eventfd));
        reactor.block_on(async {
            for _ in 0..3 {
                assert!(future::poll_once(read()).await.is_none(), "nothing was written");
                drop(read()); // never polled
            }
            let successor = read();
            eventfd.write(7).expect("room for a count");
            assert_eq!(successor.await.expect("readable"), 7);
        });
        assert_eq!(reactor.ring().in_flight(), 0);
    }

    /// A reactor goes down with tasks that wait for ever.
    #[test]
    fn dropping_a_reactor_ends_what_waits() {
        let (reactor, eventfd) = (reactor(), eventfd());
        let (ring, dropped) = (Rc::downgrade(reactor.ring()), Rc::new(Cell::new(false)));
        let read = reactor.ring().read_eventfd(Arc::clone(&eventfd));
        let mark = Mark(Rc::clone(&dropped));
        let waiting = async move {
            let _mark = mark;
            read.await
        };
        reactor.spawn(waiting).detach();
        reactor.block_on(yield_now());
        drop(reactor);
        assert!(dropped.get(), "the task is gone");
        assert!(ring.upgrade().is_none(), "the ring is gone");
        assert_eq!(Arc::strong_count(&eventfd), 1, "nothing is in flight");
    }

    /// Tasks that are always ready do not keep completions from being seen.
    #[test]
    fn busy_tasks_do_not_starve_the_ring() {
        let (reactor, eventfd) = (reactor(), eventfd());
        let busy = reactor.spawn(async {
            loop {
                yield_now().await;
            }
        });
        eventfd.write(1).expect("room for a count");
        assert_eq!(reactor.block_on(reactor.ring().read_eventfd(Arc::clone(&eventfd))).expect("readable"), 1);
        drop(busy);
        let mut left = 10 * POLLS_MAX; // a main future that is always ready, and one completion to see
        let mut read = pin!(reactor.ring().read_eventfd(Arc::clone(&eventfd)));
        eventfd.write(1).expect("room for a count");
        reactor.block_on(poll_fn(|context| {
            left -= 1;
            context.waker().wake_by_ref();
            read.as_mut().poll(&mut Context::from_waker(Waker::noop())).map(drop)
        }));
        assert!(left > 0);
    }

    /// The ring's turn does not keep tasks from going on that are ready.
    #[test]
    fn the_ring_does_not_starve_busy_tasks() {
        let (reactor, eventfd) = (reactor(), eventfd());
        let remote = Arc::clone(&eventfd);
        let busy = reactor.spawn(async move {
            for _ in 0..10 * POLLS_MAX {
                yield_now().await;
            }
            remote.write(1).expect("room for a count");
        });
        reactor.block_on(reactor.ring().read_eventfd(eventfd)).expect("readable");
        reactor.block_on(busy);
    }

    /// Idle means asleep: no wake-up comes by itself.
    #[test]
    fn an_idle_reactor_sleeps() {
        let (reactor, eventfd) = (reactor(), eventfd());
        let remote = Arc::clone(&eventfd);
        let writer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(300));
            remote.write(1).expect("room for a count");
        });
        let before = sleeps();
        reactor.block_on(reactor.ring().read_eventfd(eventfd)).expect("readable");
        let slept = sleeps() - before;
        assert!(slept <= 3, "slept {slept} times");
        writer.join().expect("it does not panic");
    }

    /// A wait that nothing can end is a defect, and seen at once.
    #[test]
    #[should_panic(expected = "nothing in flight could wake one")]
    fn a_wait_for_nothing_is_a_panic() {
        reactor().block_on(future::pending::<()>());
    }

    /// Sets its cell when it is dropped.
    struct Mark(Rc<Cell<bool>>);

    impl Drop for Mark {
        fn drop(&mut self) {
            self.0.set(true);
        }
    }

    /// How often this thread has gone to sleep so far.
    fn sleeps() -> u64 {
        let status = std::fs::read_to_string("/proc/thread-self/status").expect("proc is mounted");
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.expect("every kernel counts them").trim().parse().expect("a number")
    }
}
