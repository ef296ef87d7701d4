//! The answer to a caller at the control socket, which may stop waiting at any moment.
//!
//! Two parties decide what becomes of a request: the engine, which [claims](Reply::claim) it right before the
//! step that cannot be undone, and the caller, which gives it up when its deadline has passed. Whichever
//! comes first decides, so nothing is done for a caller that has been told that nothing was done.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::error::Result;

/// The engine's end.
pub(super) struct Reply<T> {
    answer: mpsc::Sender<Result<T>>,
    caller: Arc<Caller>,
}

/// The caller's end.
pub(super) struct Awaited<T> {
    answer: mpsc::Receiver<Result<T>>,
    caller: Arc<Caller>,
}

struct Caller {
    stream: UnixStream,
    /// Set once, by the first of the two ends.
    decided: AtomicBool,
}

/// A reply to the caller at the other end of `stream`, and what waits for it here.
///
/// # Errors
///
/// When the process has no file descriptor left.
pub(super) fn reply_to<T>(stream: &UnixStream) -> io::Result<(Reply<T>, Awaited<T>)> {
    let caller = Arc::new(Caller { stream: stream.try_clone()?, decided: AtomicBool::new(false) });
    let (sender, receiver) = mpsc::channel();
    Ok((Reply { answer: sender, caller: caller.clone() }, Awaited { answer: receiver, caller }))
}

impl<T> Reply<T> {
    /// Whether to take the step after which the request is done. `false` if nothing waits for it: the
    /// deadline has passed, or the caller has closed its end, perhaps while this process was stopped.
    pub(super) fn claim(&self) -> bool {
        self.caller.decide() && is_connected(&self.caller.stream)
    }

    /// Whether something still waits for it.
    pub(super) fn is_awaited(&self) -> bool {
        !self.caller.decided.load(Ordering::Acquire) && is_connected(&self.caller.stream)
    }

    /// Sends the answer. A caller that has stopped waiting does not get it.
    pub(super) fn send(self, outcome: Result<T>) {
        let _ = self.answer.send(outcome);
    }
}

impl<T> Awaited<T> {
    /// Waits for the answer.
    pub(super) fn wait(&self, patience: Duration) -> std::result::Result<Result<T>, RecvTimeoutError> {
        self.answer.recv_timeout(patience)
    }

    /// Gives the request up. `false` if it was claimed before: then it is being done.
    pub(super) fn give_up(&self) -> bool {
        self.caller.decide()
    }
}

impl Caller {
    fn decide(&self) -> bool {
        !self.decided.swap(true, Ordering::AcqRel)
    }
}

/// Whether the other side has its end open. It may have closed it for sending only.
pub(super) fn is_connected(stream: &UnixStream) -> bool {
    let mut ends = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    let polled = poll(&mut ends, PollTimeout::ZERO);
    let gone = PollFlags::POLLHUP | PollFlags::POLLERR;
    polled.is_ok() && !ends[0].revents().is_some_and(|events| events.intersects(gone))
}

/// Whether the other side has closed its end, or sends nothing more. What it has sent until then is lost.
pub(super) fn has_left(mut stream: &UnixStream) -> bool {
    let mut ends = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
    let polled = poll(&mut ends, PollTimeout::ZERO);
    let has_news = polled.is_ok() && ends[0].any().unwrap_or(true);
    has_news && stream.read(&mut [0; 64]).is_ok_and(|count| count == 0)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn nothing_is_done_for_a_caller_that_has_left() {
        let ends = |stream: &UnixStream| reply_to::<()>(stream).expect("another descriptor");
        let (near, far) = UnixStream::pair().expect("a pair of sockets");
        assert!(ends(&far).0.claim(), "it waits");
        near.shutdown(std::net::Shutdown::Write).expect("open");
        assert!(ends(&far).0.claim(), "it sends nothing more, and still waits");
        let (reply, awaited) = ends(&far);
        assert!(reply.is_awaited() && awaited.give_up() && !reply.is_awaited());
        assert!(!reply.claim(), "the deadline has passed");
        let (reply, awaited) = ends(&far);
        assert!(reply.claim() && !awaited.give_up(), "too late to give it up");
        let (reply, _awaited) = ends(&far);
        drop(near);
        assert!(!reply.is_awaited() && !reply.claim() && !is_connected(&far));
    }

    #[test]
    fn who_sends_no_more_has_left() {
        for how in [std::net::Shutdown::Write, std::net::Shutdown::Both] {
            let (mut near, far) = UnixStream::pair().expect("a pair of sockets");
            assert!(!has_left(&far), "it is silent");
            near.write_all(b"more").expect("room");
            assert!(!has_left(&far), "it talks");
            near.shutdown(how).expect("open");
            assert!(has_left(&far));
        }
    }

    #[test]
    fn an_answer_arrives_and_a_dropped_reply_is_noticed() {
        let (_near, far) = UnixStream::pair().expect("a pair of sockets");
        let (reply, awaited) = reply_to(&far).expect("another descriptor");
        assert!(matches!(awaited.wait(Duration::ZERO), Err(RecvTimeoutError::Timeout)));
        reply.send(Ok(7));
        assert!(matches!(awaited.wait(Duration::ZERO), Ok(Ok(7))));
        let (reply, awaited) = reply_to::<()>(&far).expect("another descriptor");
        drop(reply);
        assert!(matches!(awaited.wait(Duration::ZERO), Err(RecvTimeoutError::Disconnected)));
    }
}
