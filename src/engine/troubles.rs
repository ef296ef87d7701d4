//! What has gone wrong on the host, for reports on the device's health.
//!
//! Nothing depends on it. It is written where something has failed, and where room was found again.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;

/// See the module's head.
#[derive(Debug, Default)]
pub struct Troubles {
    host_full: AtomicBool,
    /// Requests that wait until the host has room.
    waiting: AtomicUsize,
    last: Mutex<Option<String>>,
}

impl Troubles {
    /// `doing` has failed with `errno`. That the host is full is logged when that begins.
    pub fn note(&self, doing: &str, errno: Errno) {
        let error = io::Error::from(errno);
        let is_full = matches!(errno, Errno::ENOSPC | Errno::EDQUOT);
        if is_full && !self.host_full.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "{doing} failed: {error}; nothing that needs room succeeds until the host has some"
            );
        }
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("{doing}: {error}"));
    }

    /// A request waits from now on until the host has room. That is logged when the first one does.
    pub fn waits(&self) {
        if self.waiting.fetch_add(1, Ordering::Relaxed) == 0 {
            tracing::warn!("requests wait until the host has room for them");
        }
    }

    /// One of them does so no more.
    pub fn waits_no_more(&self) {
        let before = self.waiting.fetch_sub(1, Ordering::Relaxed);
        assert!(before > 0, "a request waits once");
    }

    /// `count` of the requests that wait are on an image that is served instead of that of `other`.
    pub fn take_over(&self, other: &Self, count: usize) {
        if count > 0 {
            other.waiting.fetch_sub(count, Ordering::Relaxed);
            self.waiting.fetch_add(count, Ordering::Relaxed);
            self.host_full.store(true, Ordering::Relaxed);
        }
    }

    /// The host had room for a write that needs some. As long as others wait it has too little: a file may
    /// become longer on a host that has no room for what is written there.
    pub fn found_room(&self) {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            return;
        }
        if self.is_host_full() && self.host_full.swap(false, Ordering::Relaxed) {
            tracing::warn!("the host has room again");
        }
    }

    /// Whether there was no room for the last write that needed some.
    pub fn is_host_full(&self) -> bool {
        self.host_full.load(Ordering::Relaxed)
    }

    /// The last error, in words.
    pub fn last(&self) -> Option<String> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_host_is_remembered_until_there_is_room_and_its_error_longer() {
        let troubles = Troubles::default();
        assert!(!troubles.is_host_full() && troubles.last().is_none());
        troubles.note("growing the image", Errno::ENOSPC);
        assert!(troubles.is_host_full());
        troubles.found_room();
        assert!(!troubles.is_host_full());
        assert!(troubles.last().is_some_and(|text| text.starts_with("growing the image: ")));
        troubles.note("growing the image", Errno::EFBIG);
        assert!(!troubles.is_host_full(), "no room will help");
        troubles.note("reading", Errno::EIO);
        assert!(
            !troubles.is_host_full() && troubles.last().is_some_and(|text| text.starts_with("reading: "))
        );
    }

    /// Room for one request is not room for those that wait, whatever image is served by then.
    #[test]
    fn a_host_is_full_as_long_as_requests_wait_for_room() {
        let (before, after) = (Troubles::default(), Troubles::default());
        before.note("writing", Errno::ENOSPC);
        before.waits();
        before.waits();
        before.found_room();
        assert!(before.is_host_full());
        after.take_over(&before, 2);
        before.found_room();
        assert!(!before.is_host_full() && after.is_host_full());
        after.waits_no_more();
        after.found_room();
        assert!(after.is_host_full(), "another one waits");
        after.waits_no_more();
        after.found_room();
        assert!(!after.is_host_full());
    }
}
