//! The mailboxes between the fronts and the engine.
//!
//! One FIFO per front and direction, one eventfd per side: the engine's is shared by all its fronts. A bare
//! queue does not end an `io_uring_enter`, so the receiving side keeps a read of its eventfd (eight bytes) in
//! its ring; an eventfd counts, so a message sent between the last pop and the next read is not missed.
//!
//! Invariants:
//!
//! * a message is in its queue before the eventfd that announces it is written;
//! * the eventfd is written once per batch ([`Sender::flush`]), and only if the receiver sleeps or is about
//!   to: one that is awake looks before it sleeps. It says that it is about to, then looks once more, and a
//!   sender asks for that after it has put its message in the queue. So one of the two sees the other;
//! * there is always room: a tag has one request outstanding at most, and a front one barrier.

use std::sync::Arc;

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::atomic::{ArrayQueue, AtomicBool, Ordering, fence};
use crate::engine::message::{ToEngine, ToFront};
use crate::error::{Doing, Result};
use crate::simulation::{Plant, planted};

/// Places in a queue beyond one for each tag: a barrier, a fence, a hold.
const EXTRA_PLACES: usize = 3;

/// Ends the read of `eventfd` that its owner has armed, or the next one.
pub fn wake_up(eventfd: &EventFd) {
    eventfd.write(1).expect("a counter of 64 bits does not fill up");
}

/// Not `O_NONBLOCK`: a read in a ring then waits in the kernel instead of failing.
fn new_eventfd() -> Result<Arc<EventFd>> {
    let eventfd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC);
    eventfd.map(Arc::new).doing("making an eventfd")
}

/// Whether a side sleeps or is about to, and no sender has woken it: only then is its eventfd written.
#[derive(Default)]
struct Sleep(AtomicBool);

impl Sleep {
    /// The side is about to sleep, and looks whether `nothing_is_here`, which is returned. It looks after it
    /// has said so: otherwise neither side might see what the other did, and the message would wait for ever.
    fn begin(&self, nothing_is_here: impl FnOnce() -> bool) -> bool {
        if planted(Plant::LookFirst) {
            let nothing_was_here = nothing_is_here();
            self.0.store(true, Ordering::Relaxed);
            return nothing_was_here;
        }
        self.0.store(true, Ordering::Relaxed);
        if !planted(Plant::SkipSleepFence) {
            fence(Ordering::SeqCst);
        }
        nothing_is_here()
    }

    fn end(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// Whether the caller, who has put a message in a queue, must wake the side.
    fn must_be_ended(&self) -> bool {
        if !planted(Plant::SkipSendFence) {
            fence(Ordering::SeqCst);
        }
        self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::Relaxed)
    }
}

/// The sending end of one direction.
pub struct Sender<T> {
    queue: Arc<ArrayQueue<T>>,
    wake: Arc<EventFd>,
    sleep: Arc<Sleep>,
    dirty: bool,
}

impl<T> Sender<T> {
    /// Puts a message in the queue; [`Sender::flush`] announces it.
    pub fn send(&mut self, message: T) {
        assert!(
            self.queue.push(message).is_ok(),
            "a queue has a place for every message that may be outstanding"
        );
        self.dirty = true;
    }

    /// Wakes the receiver if anything was sent since the last flush and it sleeps; whether it did. Call it
    /// once per batch, before sleeping.
    pub fn flush(&mut self) -> bool {
        let wakes = std::mem::take(&mut self.dirty) && self.sleep.must_be_ended();
        if wakes {
            wake_up(&self.wake);
        }
        wakes
    }
}

/// The receiving end of one direction.
pub struct Receiver<T> {
    queue: Arc<ArrayQueue<T>>,
    /// Of this side: its receivers share it.
    sleep: Arc<Sleep>,
}

impl<T> Receiver<T> {
    /// The oldest message, if there is one.
    pub fn pop(&self) -> Option<T> {
        self.queue.pop()
    }

    /// Whether nothing is here: as far as this receiver is concerned, the side may sleep then until its
    /// eventfd was written. After the sleep, or instead of it, [`Self::awake`] follows.
    #[must_use]
    pub fn may_sleep(&self) -> bool {
        self.sleep.begin(|| self.queue.is_empty())
    }

    /// The side is awake: it looks before it sleeps, and need not be woken.
    pub fn awake(&self) {
        self.sleep.end();
    }
}

/// A front's ends.
pub struct FrontEnds {
    /// To the engine.
    pub sender: Sender<ToEngine>,
    /// From the engine.
    pub receiver: Receiver<ToFront>,
    /// Wakes this front.
    pub wake: Arc<EventFd>,
}

/// The engine's ends to one front.
pub struct EngineEnd {
    /// To the front.
    pub sender: Sender<ToFront>,
    /// From the front.
    pub receiver: Receiver<ToEngine>,
}

/// The engine's ends to all fronts.
pub struct EngineEnds {
    /// By queue number.
    pub fronts: Vec<EngineEnd>,
    /// Wakes the engine, whichever front sends.
    pub wake: Arc<EventFd>,
}

/// Mailboxes between one engine and `queues` fronts of `depth` tags each.
///
/// # Errors
///
/// If the process has no file descriptor left.
pub fn mailboxes(queues: u16, depth: u16) -> Result<(EngineEnds, Vec<FrontEnds>)> {
    assert!(queues > 0 && depth > 0, "{queues} queues of depth {depth}");
    let (engine_wake, engine_sleep) = (new_eventfd()?, Arc::default());
    let mut engine = EngineEnds { fronts: Vec::new(), wake: engine_wake.clone() };
    let mut fronts = Vec::new();
    for _ in 0..queues {
        let (wake, sleep) = (new_eventfd()?, Arc::default());
        let (to_engine, from_front) = direction(depth, &engine_wake, &engine_sleep);
        let (to_front, from_engine) = direction(depth, &wake, &sleep);
        engine.fronts.push(EngineEnd { sender: to_front, receiver: from_front });
        fronts.push(FrontEnds { sender: to_engine, receiver: from_engine, wake });
    }
    Ok((engine, fronts))
}

fn direction<T>(depth: u16, wake: &Arc<EventFd>, sleep: &Arc<Sleep>) -> (Sender<T>, Receiver<T>) {
    let queue = Arc::new(ArrayQueue::new(usize::from(depth) + EXTRA_PLACES));
    let (wake, sleep) = (wake.clone(), sleep.clone());
    let receiver = Receiver { queue: queue.clone(), sleep: sleep.clone() };
    (Sender { queue, wake, sleep, dirty: false }, receiver)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::device::testing::receive;
    use crate::engine::message::Ask;

    #[test]
    fn messages_arrive_in_order_and_a_batch_wakes_once() {
        let (engine, mut fronts) = mailboxes(2, 4).expect("file descriptors");
        assert!(engine.fronts.iter().all(|end| end.receiver.may_sleep()));
        for tag in 0..4 {
            fronts[1].sender.send(ToEngine::Ask { tag, ask: Ask::Flush });
        }
        assert!(fronts[1].sender.flush() && !fronts[1].sender.flush(), "a batch, and an empty one");
        fronts[0].sender.send(ToEngine::BarrierDone);
        assert!(!fronts[0].sender.flush(), "the other front has woken it");
        assert_eq!(engine.wake.read(), Ok(1));
        assert_eq!(engine.fronts[0].receiver.pop(), Some(ToEngine::BarrierDone));
        for tag in 0..4 {
            assert_eq!(engine.fronts[1].receiver.pop(), Some(ToEngine::Ask { tag, ask: Ask::Flush }));
        }
        assert_eq!(engine.fronts[1].receiver.pop(), None);
        assert_eq!(engine.fronts[0].receiver.pop(), None);
    }

    #[test]
    fn every_tag_and_a_barrier_fit_in_either_direction() {
        let (mut engine, mut fronts) = mailboxes(1, 64).expect("file descriptors");
        for tag in 0..64 {
            fronts[0].sender.send(ToEngine::Ask { tag, ask: Ask::Flush });
            engine.fronts[0].sender.send(ToFront::Reply { tag, result: Ok(()) });
        }
        fronts[0].sender.send(ToEngine::BarrierDone);
        engine.fronts[0].sender.send(ToFront::Barrier);
        assert!(!fronts[0].receiver.may_sleep(), "it looks before it sleeps");
        fronts[0].receiver.awake();
        assert!(!engine.fronts[0].sender.flush(), "who is awake is not woken");
    }

    #[test]
    fn a_message_that_comes_as_its_receiver_looks_wakes_it() {
        let (mut engine, fronts) = mailboxes(1, 1).expect("file descriptors");
        let mut woken = false;
        let sender = &mut engine.fronts[0].sender;
        fronts[0].receiver.sleep.begin(|| {
            sender.send(ToFront::Fence);
            woken = sender.flush();
            true
        });
        assert!(woken, "the receiver has not seen it, and sleeps");
        assert_eq!(fronts[0].wake.read(), Ok(1));
    }

    /// Each message is sent while its receiver goes to sleep, or just before or after.
    #[test]
    fn no_message_waits_for_a_receiver_that_sleeps() {
        const MESSAGES: u16 = 50_000;
        let (mut engine, mut fronts) = mailboxes(1, 1).expect("file descriptors");
        let (mut front, mut end) = (fronts.remove(0), engine.fronts.remove(0));
        let (ended, awaited) = mpsc::sync_channel(1);
        let wake = engine.wake.clone();
        let replying = thread::spawn(move || {
            for tag in 0..MESSAGES {
                while end.receiver.pop().is_none() {
                    if end.receiver.may_sleep() {
                        wake.read().expect("it is open");
                    }
                    end.receiver.awake();
                }
                end.sender.send(ToFront::Reply { tag, result: Ok(()) });
                end.sender.flush();
            }
        });
        thread::spawn(move || {
            for tag in 0..MESSAGES {
                front.sender.send(ToEngine::Ask { tag, ask: Ask::Flush });
                front.sender.flush();
                assert_eq!(receive(&front), ToFront::Reply { tag, result: Ok(()) });
            }
            ended.send(()).expect("awaited");
        });
        awaited.recv_timeout(Duration::from_secs(120)).expect("a message was left, and both sides sleep");
        replying.join().expect("it has answered all");
    }
}
