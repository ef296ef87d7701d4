//! What the daemon of a device was asked and has not done: to end, when nothing uses the device any longer.
//!
//! It is noted in a file, which names the device's mark: a daemon that has lost its device, or has not got it
//! yet, may note a request when another device has the number.

use std::fs;
use std::io;
use std::path::PathBuf;

/// The file of one device.
#[derive(Clone, Debug)]
pub(in crate::device) struct EndRequest {
    pub(super) path: PathBuf,
    pub(super) mark: u64,
}

impl EndRequest {
    /// Notes one. If there is no room for the mark, the file is empty.
    pub(in crate::device) fn note(&self) {
        if let Err(error) = fs::write(&self.path, self.mark.to_string())
            && error.kind() != io::ErrorKind::StorageFull
        {
            let path = self.path.display();
            tracing::warn!("{path}: the next daemon would not learn of the request to end: {error}");
        }
    }

    /// Whether there is one. One without a mark counts: the first programs wrote none.
    pub(in crate::device) fn is_noted(&self) -> bool {
        fs::read_to_string(&self.path).is_ok_and(|text| text.is_empty() || text == self.mark.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_of_the_device_that_was_asked_and_not_of_its_number() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let of = |mark| EndRequest { path: folder.path().join("0.ending"), mark };
        assert!(!of(7).is_noted());
        of(7).note();
        assert!(of(7).is_noted() && !of(70).is_noted());
        fs::write(folder.path().join("0.ending"), "").expect("room");
        assert!(of(7).is_noted(), "a program before this one has noted it, or there was no room");
    }
}
