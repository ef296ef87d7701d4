//! Work that several threads do at once while one watches them.
//!
//! The threads take their pieces of work in turn from one supply, so that a failure or a signal ends all of
//! them after the piece that each is at, and memory is bounded by a few pieces.

use std::num::NonZero;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use super::Watch;
use crate::error::{Doing, Error, Kind, Result};

/// Bytes of the disk that a thread has in hand: more than a processor's cache has would be read from memory
/// twice.
pub const PIECE: u64 = 1 << 20;

/// How often the watch is asked.
const PERIOD: Duration = Duration::from_millis(50);

/// The threads of one operation.
pub(super) struct Workers {
    total: u64,
    done: AtomicU64,
    stopped: AtomicBool,
}

impl Workers {
    /// Threads that have `total` bytes to do.
    pub(super) fn new(total: u64) -> Self {
        Self { total, done: AtomicU64::new(0), stopped: AtomicBool::new(false) }
    }

    /// How many threads there are: two for each processor, since each waits for the disk half of its time.
    pub(super) fn count() -> usize {
        2 * thread::available_parallelism().map_or(2, NonZero::get).clamp(2, 8)
    }

    /// The first `bytes` are done, as far as pieces are taken in order.
    pub(super) fn reached(&self, bytes: u64) {
        self.done.fetch_max(bytes.min(self.total), Ordering::Relaxed);
    }

    /// Whether no more work is to be taken.
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// No more work is to be taken.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Runs `work` on each thread until it returns on all of them; `watch` is asked on this one.
    ///
    /// # Errors
    ///
    /// The first one of any thread; [`Kind::Stopped`] if the watch has asked for that.
    pub(super) fn run(&self, watch: &dyn Watch, work: impl Fn() -> Result<()> + Sync) -> Result<()> {
        let work = || work().inspect_err(|_| self.stop());
        let outcome = thread::scope(|scope| {
            let (alive, ended) = mpsc::channel::<()>();
            let start = |number: usize| {
                let (alive, work) = (alive.clone(), &work);
                let name = format!("worker {number}");
                thread::Builder::new().name(name).spawn_scoped(scope, move || {
                    let outcome = work();
                    drop(alive);
                    outcome
                })
            };
            let started: Vec<_> = (0..Self::count()).map(start).collect();
            drop(alive);
            let mut outcome = Ok(());
            // One that cannot be started leaves its work to the others.
            if started.iter().all(std::io::Result::is_err) {
                outcome = Err(std::io::ErrorKind::OutOfMemory).doing("starting a thread");
            }
            while ended.recv_timeout(PERIOD) == Err(mpsc::RecvTimeoutError::Timeout) {
                self.look(watch);
            }
            for thread in started.into_iter().flatten() {
                let ended = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                outcome = outcome.and(ended);
            }
            outcome
        });
        outcome?;
        watch.progress(self.done.load(Ordering::Relaxed), self.total);
        if watch.stop_requested() && self.is_stopped() {
            return Err(Error::new(Kind::Stopped, "stopped by a signal"));
        }
        Ok(())
    }

    fn look(&self, watch: &dyn Watch) {
        watch.progress(self.done.load(Ordering::Relaxed), self.total);
        if watch.stop_requested() {
            self.stop();
        }
    }
}

/// A value that threads get in the order of their pieces' numbers.
pub(super) struct Turns<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    next: u64,
    broken: bool,
    value: T,
}

impl<T> Turns<T> {
    /// The value; piece 0 is first.
    pub(super) fn new(value: T) -> Self {
        Self { state: Mutex::new(State { next: 0, broken: false, value }), changed: Condvar::new() }
    }

    /// Waits for the turn of piece `number`, and ends it. Nothing if a piece before it has failed.
    ///
    /// # Errors
    ///
    /// Those of `act`, after which nothing has a turn.
    pub(super) fn take<R>(&self, number: u64, act: impl FnOnce(&mut T) -> Result<R>) -> Result<Option<R>> {
        let waits = |state: &mut State<T>| !state.broken && state.next != number;
        let waited = self.changed.wait_while(self.lock(), waits);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        if state.broken {
            return Ok(None);
        }
        assert_eq!(state.next, number, "each piece has one turn");
        let outcome = act(&mut state.value);
        state.next += 1;
        state.broken |= outcome.is_err();
        self.changed.notify_all();
        outcome.map(Some)
    }

    /// A piece has failed: those behind it have no turn.
    pub(super) fn break_off(&self) {
        self.lock().broken = true;
        self.changed.notify_all();
    }

    /// The value, when all turns have ended.
    pub(super) fn into_inner(self) -> T {
        self.state.into_inner().unwrap_or_else(PoisonError::into_inner).value
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Stopping(bool);

    impl Watch for Stopping {
        fn progress(&self, done: u64, total: u64) {
            assert!(done <= total);
        }

        fn stop_requested(&self) -> bool {
            self.0
        }
    }

    #[test]
    fn turns_are_taken_in_order_and_a_failure_ends_them() {
        let workers = Workers::new(100);
        let (turns, numbers) = (Turns::new(Vec::new()), AtomicU64::new(0));
        let work = |last: u64, fails: u64| {
            while !workers.is_stopped() {
                let number = numbers.fetch_add(1, Ordering::Relaxed);
                if number >= last {
                    break;
                }
                let taken = turns.take(number, |taken: &mut Vec<u64>| {
                    if number == fails {
                        return Err(Error::new(Kind::Io, "a piece that fails"));
                    }
                    taken.push(number);
                    Ok(())
                });
                taken?;
            }
            Ok(())
        };
        workers.run(&Stopping(false), || work(500, u64::MAX)).expect("no piece fails");
        numbers.store(500, Ordering::Relaxed);
        let error = workers.run(&Stopping(false), || work(1000, 700)).expect_err("piece 700 fails");
        assert!(error.kind() == Kind::Io && workers.is_stopped());
        assert_eq!(turns.into_inner(), (0..700).collect::<Vec<_>>());
    }

    #[test]
    fn a_stop_ends_the_work() {
        let workers = Workers::new(100);
        let work = || {
            while !workers.is_stopped() {
                thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        };
        assert_eq!(workers.run(&Stopping(true), work).expect_err("stopped").kind(), Kind::Stopped);
    }
}
