//! What `create --force` may replace: the image that the user has named, and nothing that another user or a
//! slip of the hand leads to.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use nix::unistd::geteuid;

use super::inspect::identify_locked;
use crate::disk::{HostFile, ImageFile, Place, folder_of, path_of};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::printable::shell;

/// The user that can replace every file.
const ROOT: u32 = 0;

/// The most links that Linux follows on one path.
const MAX_LINKS: usize = 40;

/// What finds a file and opens nothing.
const PATH: OFlag = OFlag::O_PATH.union(OFlag::O_CLOEXEC);

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
/// The owner of a folder can lead the name of an image to any file of root's, by a link in place of the image
/// or of a folder on the way. A link counts as the user's word if it is the user's own, or if its owner could
/// replace the file without help, as root can: `/var/run` and `/dev/fd` are root's.
///
/// # Errors
///
/// [`Kind::Permission`] if a link of another user leads to the file; I/O errors.
pub fn refuse_foreign_links(named: &Path, old: &impl AsFd) -> Result<()> {
    let opened = fstat(old.as_fd()).doing(FOLLOWING).file(named)?;
    let trusted = [geteuid().as_raw(), opened.st_uid, ROOT];
    let mut foreign = None;
    let found = follow(named, |link, owner| {
        foreign = (!trusted.contains(&owner)).then(|| (link.to_owned(), owner));
        foreign.is_none()
    });
    if let Some((link, owner)) = foreign {
        let target = path_of(old, FOLLOWING).file(named)?;
        let message = format!(
            "it is a symbolic link of another user (uid {owner}), by which {} is meant",
            target.display()
        );
        let remedy = format!("if that file is meant, name it: {}", shell(&target));
        return Err(Error::new(Kind::Permission, message).file(&link).remedy(remedy));
    }
    if found.doing(FOLLOWING).file(named)? == (HostFile { device: opened.st_dev, inode: opened.st_ino }) {
        return Ok(());
    }
    let error = Error::new(Kind::InUse, "it was replaced while it was being opened").file(named);
    Err(error.remedy("find out what changes the folder, and run the command again"))
}

/// Why the file at `path` is not replaced: what is to be read is in it.
pub(super) fn own_source(path: &Path) -> Error {
    let message = "it is the source, or one of its parents";
    Error::new(Kind::Usage, message).file(path).remedy("choose another target")
}

/// The place of a new file at `path`, which may get another owner: that of an image that it is like.
///
/// # Errors
///
/// [`Kind::Permission`] if a link of another user leads to the folder; those of [`Place::of`].
pub fn place_of_new(path: &Path) -> Result<Place> {
    let place = Place::of(path)?;
    refuse_foreign_links(folder_of(path), &place.folder())?;
    Ok(place)
}

/// The absolute path of `folder`, into which files of other users may go.
///
/// # Errors
///
/// As [`place_of_new`].
pub(super) fn folder(folder: &Path) -> Result<PathBuf> {
    let place = place_of_new(&folder.join("any"))?;
    Ok(folder_of(place.path()).to_owned())
}

/// The file that `named` leads to, one name after the other, as long as `accept` agrees to every link on the
/// way, which it is shown with its owner. Each link is opened before it is examined: its name may be given to
/// another at any moment.
fn follow(named: &Path, mut accept: impl FnMut(&Path, u32) -> bool) -> io::Result<HostFile> {
    let components = |path: &Path| path.components().rev().map(|name| name.as_os_str().to_owned()).collect();
    let open = |folder: &OwnedFd, name: &OsStr, flags| openat(folder, name, flags | PATH, Mode::empty());
    let mut rest: Vec<OsString> = components(named);
    let mut found = nix::fcntl::open(".", PATH, Mode::empty())?;
    let (mut way, mut links) = (PathBuf::new(), 0);
    while let Some(name) = rest.pop() {
        let next = open(&found, &name, OFlag::O_NOFOLLOW)?;
        let what = fstat(&next)?;
        way.push(&name);
        if SFlag::from_bits_truncate(what.st_mode) & SFlag::S_IFMT != SFlag::S_IFLNK {
            found = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS || !accept(&way, what.st_uid) {
            return Err(Errno::ELOOP.into());
        }
        if fstatfs(&next)?.filesystem_type() == PROC_SUPER_MAGIC {
            // What the kernel shows as the target of an open file need not be a path to it.
            found = open(&found, &name, OFlag::empty())?;
        } else {
            way.pop();
            rest.extend::<Vec<_>>(components(Path::new(&readlinkat(&next, "")?)));
        }
    }
    let what = fstat(&found)?;
    Ok(HostFile { device: what.st_dev, inode: what.st_ino })
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
