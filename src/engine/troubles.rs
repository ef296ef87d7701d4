//! What has gone wrong on the host, for reports on the device's health.
//!
//! Nothing depends on it. It is written where something has failed, and where room was found again.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;

/// See the module's head.
#[derive(Debug, Default)]
pub struct Troubles {
    host_full: AtomicBool,
    last: Mutex<Option<String>>,
}

impl Troubles {
    /// `doing` has failed with `errno`. That the host is full is logged when that begins.
    pub fn note(&self, doing: &str, errno: Errno) {
        let error = io::Error::from(errno);
        let is_full = matches!(errno, Errno::ENOSPC | Errno::EDQUOT);
        if is_full && !self.host_full.swap(true, Ordering::Relaxed) {
            tracing::warn!("{doing} failed: {error}; writes that need room fail until the host has some");
        }
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(format!("{doing}: {error}"));
    }

    /// The host had room for a write that needs some.
    pub fn found_room(&self) {
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
        troubles.note("reading", Errno::EIO);
        assert!(
            !troubles.is_host_full() && troubles.last().is_some_and(|text| text.starts_with("reading: "))
        );
    }
}
