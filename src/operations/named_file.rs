//! The file of an image for another process, which opens and locks it itself.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{Devices, locked, replaced};
use crate::disk::Access;
use crate::error::{Doing, Locate, Result};

/// A file that the user has named, open and not locked.
pub struct NamedFile {
    /// Its path, absolute and without symbolic links.
    pub path: PathBuf,
    /// The file.
    pub file: File,
}

/// Finds the file of the image at `path`, which is not opened for reading or writing.
///
/// # Errors
///
/// [`Kind::Permission`](crate::error::Kind::Permission) if a link of another user leads to it; what the
/// operating system says.
pub fn find(path: &Path) -> Result<File> {
    let found = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path);
    let found = found.doing("finding the image").file(path)?;
    replaced::refuse_foreign_links(path, &found)?;
    Ok(found)
}

/// Opens the file of the image at `path` for writing, if nothing uses it now. Its name is followed once: what
/// happens to the name later changes nothing.
///
/// # Errors
///
/// [`Kind::InUse`](crate::error::Kind::InUse) if another process has it, or a device waits for a new daemon
/// to serve it; [`Kind::Permission`](crate::error::Kind::Permission) if a link of another user leads to it.
pub fn open(path: &Path, devices: &dyn Devices) -> Result<NamedFile> {
    let locked = locked::lock(path, Access::ReadWrite, devices)?;
    replaced::refuse_foreign_links(path, &locked)?;
    // A descriptor of its own has no lock.
    let link = format!("/proc/self/fd/{}", locked.as_fd().as_raw_fd());
    let file = OpenOptions::new().read(true).write(true).open(link).doing("opening the image").file(path)?;
    Ok(NamedFile { path: locked.path().to_owned(), file })
}
