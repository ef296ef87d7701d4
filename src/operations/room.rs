//! Whether a file system has room for what must have all its space at once.

use crate::disk::ImageFile;
use crate::error::{Doing, Error, Kind, Result};
use crate::printable::human_size;

/// Refuses what cannot succeed before it fills the file system of `file`: `what` needs `bytes` now.
///
/// # Errors
///
/// [`Kind::NoSpace`] if there is less; what the operating system says.
pub(super) fn require(file: &ImageFile, bytes: u64, what: &str) -> Result<()> {
    let room = file.host_room().doing("reading the free space of the file system")?;
    let available = room.for_this_user();
    // Some file systems do not say; making the file will.
    if available == 0 || available >= bytes {
        return Ok(());
    }
    let message = format!(
        "{what} needs {} of space now: {} are missing on the file system of {}",
        human_size(bytes),
        human_size(bytes - available),
        file.path().display()
    );
    Err(Error::new(Kind::NoSpace, message))
}
