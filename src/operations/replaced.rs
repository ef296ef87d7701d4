//! What `create --force` may replace: the image that the user has named, and nothing that another user or a
//! slip of the hand leads to.

use std::fs::{OpenOptions, read_link};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::fcntl::readlinkat;
use nix::sys::stat::fstat;
use nix::unistd::geteuid;

use super::inspect::identify_locked;
use crate::disk::{HostFile, ImageFile, folder_of};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::printable::shell;

/// The user that can replace every file.
const ROOT: u32 = 0;

/// The most links that Linux follows on one path.
const MAX_LINKS: usize = 40;

/// Fails unless `old`, which was opened as `named`, may be replaced.
///
/// # Errors
///
/// [`Kind::Permission`] if a link of another user leads to it; [`Kind::NotVhdx`] if it is neither an image
/// nor empty; [`Kind::InUse`] if the name has come to lead elsewhere; what the operating system says.
pub(super) fn require(named: &Path, old: &ImageFile) -> Result<()> {
    refuse_foreign_links(named, old)?;
    refuse_other_files(old)
}

/// What fails where a link cannot be read.
const FOLLOWING: &str = "following the links to the file";

/// Fails if a link of another user leads from `named` to `old`, which was opened so.
///
/// The owner of a folder can lead the name of an image to any file of root's. A link counts as the user's
/// word if it is the user's own, or if its owner could replace the file without help, as root can. Each link
/// is opened before it is examined: its name may be given to another at any moment.
///
/// # Errors
///
/// [`Kind::Permission`] if a link of another user leads to the file; I/O errors.
pub fn refuse_foreign_links(named: &Path, old: &impl AsFd) -> Result<()> {
    let opened = fstat(old.as_fd()).doing(FOLLOWING).file(named)?;
    let identity = HostFile { device: opened.st_dev, inode: opened.st_ino };
    let mut path = named.to_owned();
    for _ in 0..=MAX_LINKS {
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let found =
            OpenOptions::new().read(true).custom_flags(flags).open(&path).doing(FOLLOWING).file(named)?;
        let what = found.metadata().doing(FOLLOWING).file(named)?;
        if HostFile::of(&what) == identity {
            return Ok(());
        }
        if !what.is_symlink() {
            break;
        }
        if ![geteuid().as_raw(), opened.st_uid, ROOT].contains(&what.uid()) {
            let target = read_link(format!("/proc/self/fd/{}", old.as_fd().as_raw_fd()));
            let target = target.doing(FOLLOWING).file(named)?;
            let message =
                format!("it is a symbolic link of another user (uid {}) to {}", what.uid(), target.display());
            let remedy = format!("if that file is meant, name it: {}", shell(&target));
            return Err(Error::new(Kind::Permission, message).file(&path).remedy(remedy));
        }
        let target = readlinkat(&found, "").doing(FOLLOWING).file(named)?;
        path = folder_of(&path).join(target);
    }
    let error = Error::new(Kind::InUse, "it was replaced while it was being opened").file(named);
    Err(error.remedy("find out what changes the folder, and run the command again"))
}

/// A damaged image is one all the same.
fn refuse_other_files(old: &ImageFile) -> Result<()> {
    let remedy = "choose another name, or remove the file yourself";
    let length = old.length().doing("reading the size of the file").file(old.path())?;
    match identify_locked(old) {
        _ if length == 0 => Ok(()),
        Err(error) if error.kind() == Kind::NotVhdx => {
            let message = "it is not a VHDX image, and --force replaces only images and empty files";
            Err(Error::new(Kind::NotVhdx, message).file(old.path()).remedy(remedy))
        }
        Err(error) if error.kind() == Kind::Io => Err(error.file(old.path()).remedy(remedy)),
        _ => Ok(()),
    }
}
