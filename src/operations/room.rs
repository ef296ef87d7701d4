//! Whether a file system has room for what an operation is to take of it.

use std::io;

use crate::disk::HostRoom;
use crate::error::{Doing, Error, Kind, Result};
use crate::printable::human_size;

/// Refuses what cannot succeed before it fills a file system, which has this `room`: `needs`, a subject and
/// its verb, are `bytes`. A file system that does not say what it has will say when it is full.
///
/// # Errors
///
/// [`Kind::NoSpace`] if there is less, with what is missing; what the operating system says.
pub(crate) fn require(room: io::Result<HostRoom>, bytes: u64, needs: &str) -> Result<()> {
    let room = room.doing("reading the free space of the file system")?;
    match room.for_this_user() {
        Some(free) if free < bytes => Err(missing(free, bytes, needs)),
        _ => Ok(()),
    }
}

fn missing(free: u64, bytes: u64, needs: &str) -> Error {
    let [missing, bytes, free] = [bytes - free, bytes, free].map(human_size);
    let message =
        format!("{needs} {bytes} of space, and its file system has {free} free: {missing} are missing");
    Error::new(Kind::NoSpace, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn refusal(free: u64, total: u64, bytes: u64) -> Option<String> {
        let room = HostRoom { available_bytes: free, reserved_bytes: 0, total_bytes: total };
        require(Ok(room), bytes, "the copy needs").err().map(|error| error.to_string())
    }

    /// A full file system has no room; one that does not say what it has may have some.
    #[test]
    fn a_full_file_system_is_not_a_silent_one() {
        assert_eq!(refusal(2 * GIB, 9 * GIB, 2 * GIB), None);
        assert_eq!(refusal(0, 0, 2 * GIB), None);
        let text = |free| format!("the copy needs 3 GiB of space, and its file system has {free} free: ");
        assert_eq!(refusal(2 * GIB, 9 * GIB, 3 * GIB), Some(text("2 GiB") + "1 GiB are missing"));
        assert_eq!(refusal(0, 9 * GIB, 3 * GIB), Some(text("0 bytes") + "3 GiB are missing"));
    }
}
