//! Whether the file system has room for a target.

use std::path::Path;

use crate::disk::{HostRoom, folder_of};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::printable::human_size;

/// Refuses a target at `path` that needs more than its file system has free.
///
/// # Errors
///
/// [`Kind::NoSpace`], with what is missing; what the operating system says.
pub(super) fn require(path: &Path, needed: u64, remedy: &str) -> Result<()> {
    let room = HostRoom::at(folder_of(path)).doing("examining the folder of the file").file(path)?;
    let available = room.for_this_user();
    // Some file systems do not say; writing the file will.
    if available == 0 || available >= needed {
        return Ok(());
    }
    let message = format!(
        "{} are missing on its file system: it takes up to {}, and {} are free",
        human_size(needed - available),
        human_size(needed),
        human_size(available)
    );
    Err(Error::new(Kind::NoSpace, message).file(path).remedy(remedy))
}
