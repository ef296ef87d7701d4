//! The mailboxes between the fronts and the engine.
//!
//! One FIFO per front and direction, one eventfd per side: the engine's is shared by all its fronts. A bare
//! queue does not end an `io_uring_enter`, so the receiving side keeps a read of its eventfd (eight bytes) in
//! its ring; an eventfd counts, so a message sent between the last pop and the next read is not missed.
//!
//! Invariants:
//!
//! * a message is in its queue before the eventfd that announces it is written;
//! * the eventfd is written once per batch ([`Sender::flush`]), and not at all by a batch without messages;
//! * there is always room: a tag has one request outstanding at most, and a front one barrier.

use std::sync::Arc;

use crossbeam_queue::ArrayQueue;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::engine::message::{ToEngine, ToFront};
use crate::error::{Doing, Result};

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

/// The sending end of one direction.
pub struct Sender<T> {
    queue: Arc<ArrayQueue<T>>,
    wake: Arc<EventFd>,
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

    /// Wakes the receiver if anything was sent since the last flush. Call it once per batch, before sleeping.
    pub fn flush(&mut self) {
        if std::mem::take(&mut self.dirty) {
            wake_up(&self.wake);
        }
    }
}

/// The receiving end of one direction.
pub struct Receiver<T>(Arc<ArrayQueue<T>>);

impl<T> Receiver<T> {
    /// The oldest message, if there is one.
    pub fn pop(&self) -> Option<T> {
        self.0.pop()
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
    let engine_wake = new_eventfd()?;
    let mut engine = EngineEnds { fronts: Vec::new(), wake: engine_wake.clone() };
    let mut fronts = Vec::new();
    for _ in 0..queues {
        let wake = new_eventfd()?;
        let (to_engine, from_front) = direction(depth, &engine_wake);
        let (to_front, from_engine) = direction(depth, &wake);
        engine.fronts.push(EngineEnd { sender: to_front, receiver: from_front });
        fronts.push(FrontEnds { sender: to_engine, receiver: from_engine, wake });
    }
    Ok((engine, fronts))
}

fn direction<T>(depth: u16, wake: &Arc<EventFd>) -> (Sender<T>, Receiver<T>) {
    let queue = Arc::new(ArrayQueue::new(usize::from(depth) + EXTRA_PLACES));
    (Sender { queue: queue.clone(), wake: wake.clone(), dirty: false }, Receiver(queue))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::message::Ask;

    #[test]
    fn messages_arrive_in_order_and_a_batch_wakes_once() {
        let (engine, mut fronts) = mailboxes(2, 4).expect("file descriptors");
        for tag in 0..4 {
            fronts[1].sender.send(ToEngine::Ask { tag, ask: Ask::Flush });
        }
        fronts[1].sender.flush();
        fronts[1].sender.flush();
        assert_eq!(engine.wake.read(), Ok(1), "one write for the batch, none for the empty one");
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
        engine.fronts[0].sender.flush();
        assert_eq!(fronts[0].wake.read(), Ok(1));
    }
}
