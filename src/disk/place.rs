//! Where a file is: a folder that is held open, and the file's name in it.
//!
//! Whoever owns a folder on the way to a file can put another in its place, or a link, between any two calls
//! that name the path. So a file that was examined is renamed or removed relative to its folder, which was
//! opened with it, and only while its name there still is that file. What the folder's owner can then still
//! move is in that folder, where they may remove and rename everything anyhow.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};
use rustix::fs::{RenameFlags, renameat_with};

use super::refusal::{missing_folder, name_of_new, path_of, taken};
use super::{Access, HostFile, ImageFile, folder_of};
use crate::error::{Error, Kind, Result};

/// A name in a folder.
#[derive(Debug)]
pub struct Place {
    folder: File,
    name: OsString,
    path: PathBuf,
}

impl Place {
    /// The place that `path` names, whether there is a file or not. A link there is not followed.
    ///
    /// # Errors
    ///
    /// [`Kind::Usage`] if the path ends in no name; those of one that is a folder's; what the operating
    /// system says of the folder.
    pub fn of(path: &Path) -> Result<Self> {
        const OPENING: &str = "opening the folder of the image";
        let failed = |error| Error::io(OPENING, error).file(path);
        let name = name_of_new(path)?;
        let flags = libc::O_DIRECTORY | libc::O_NONBLOCK;
        let folder = OpenOptions::new().read(true).custom_flags(flags).open(folder_of(path)).map_err(failed);
        let folder = folder.map_err(|error| missing_folder(error, folder_of(path)))?;
        // The folder's own path: what it was called by may be a link.
        let way = path_of(&folder, OPENING).map_err(|error| error.file(path))?;
        let place = Self { folder, name: name.to_owned(), path: way.join(name) };
        // A name that cannot be is refused now, and not after all that is to get it has been written.
        place.occupant()?;
        Ok(place)
    }

    /// The place of an open file.
    ///
    /// # Errors
    ///
    /// As [`Self::of`]; [`Kind::InUse`] if the file has lost its name since it was opened.
    pub fn of_file(file: &ImageFile) -> Result<Self> {
        let place = Self::of(file.path())?;
        place.require(file)?;
        Ok(place)
    }

    /// Another name in the same folder.
    ///
    /// # Errors
    ///
    /// When the process has no descriptor left.
    pub fn beside(&self, name: &OsStr) -> Result<Self> {
        let folder = self.folder.try_clone();
        let folder = folder.map_err(|error| Error::io("opening the folder again", error).file(&self.path))?;
        Ok(Self { folder, name: name.to_owned(), path: self.path.with_file_name(name) })
    }

    /// Why the host has made nothing here while `doing` something.
    fn refused(&self, doing: &str, errno: Errno) -> Error {
        match errno {
            Errno::EEXIST => taken(&self.path),
            errno => Error::io(doing, errno.into()).file(&self.path),
        }
    }

    /// The folder, opened.
    pub fn folder(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }

    /// The absolute path, as it was when the folder was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes an empty image file here, where there is none, and locks it for writing. Only its owner may open
    /// it.
    ///
    /// # Errors
    ///
    /// [`Kind::Exists`] when there is something, and as [`ImageFile::open`]; nothing is left here then.
    pub fn create(&self) -> Result<ImageFile> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let made = openat(&self.folder, &*self.name, flags, Mode::S_IRUSR | Mode::S_IWUSR);
        let made = made.map_err(|errno| self.refused("making the image", errno))?;
        let identity = fstat(&made).map(|found| HostFile { device: found.st_dev, inode: found.st_ino });
        let locked = ImageFile::locked(made.into(), &self.path, Access::ReadWrite, Duration::ZERO);
        locked.map_err(|error| {
            // The next attempt would find a file of the name. It stays if it can neither be told nor removed.
            if let Ok(identity) = identity
                && self.occupant().is_ok_and(|here| here == Some(identity))
            {
                let _ = unlinkat(&self.folder, &*self.name, UnlinkatFlags::NoRemoveDir);
            }
            error.file(&self.path)
        })
    }

    /// Fails unless the file here still is `file`.
    ///
    /// # Errors
    ///
    /// [`Kind::InUse`] if it is not; what the operating system says.
    pub fn require(&self, file: &ImageFile) -> Result<()> {
        let message = match fstatat(&self.folder, &*self.name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(found) if HostFile { device: found.st_dev, inode: found.st_ino } == file.identity() => {
                return Ok(());
            }
            Ok(_) => "another file has taken its place",
            Err(Errno::ENOENT) => "it is not in its folder any longer",
            Err(errno) => return Err(Error::io("looking for the file", errno.into()).file(&self.path)),
        };
        let error = Error::new(Kind::InUse, message).file(&self.path);
        Err(error.remedy("find out who changes the folder, and run the command again"))
    }

    /// Removes `file`, which is here, durably.
    ///
    /// # Errors
    ///
    /// As [`Self::require`], and if it is still there, or may come back.
    pub fn remove(&self, file: &ImageFile) -> Result<()> {
        self.require(file)?;
        let removed = unlinkat(&self.folder, &*self.name, UnlinkatFlags::NoRemoveDir);
        removed.map_err(|errno| Error::io("removing the file", errno.into()).file(&self.path))?;
        self.sync()
    }

    /// Gives `file`, which is here, the name of `old` in the same folder, which `old` loses.
    pub(super) fn rename(&self, file: &ImageFile, to: &Self, old: &ImageFile) -> Result<()> {
        to.require(old)?;
        self.require(file)?;
        let renamed = renameat(&self.folder, &*self.name, &to.folder, &*to.name);
        renamed.map_err(|errno| Error::io("replacing the file", errno.into()).file(&to.path))
    }

    /// Gives `file`, which is here, the name of `to` in the same folder, where there must be nothing.
    pub(super) fn rename_to_free(&self, file: &ImageFile, to: &Self) -> Result<()> {
        self.require(file)?;
        let flags = RenameFlags::NOREPLACE;
        match renameat_with(&self.folder, &*self.name, &to.folder, &*to.name, flags) {
            // NFS and some others cannot look and rename in one step, and can make a second name so.
            Err(rustix::io::Errno::INVAL) => self.rename_by_link(file, to),
            Err(errno) => Err(to.refused("naming the file", Errno::from_raw(errno.raw_os_error()))),
            Ok(()) => Ok(()),
        }
    }

    /// As [`Self::rename_to_free`], in two steps: a cut between them leaves both names.
    fn rename_by_link(&self, file: &ImageFile, to: &Self) -> Result<()> {
        if !self.link(file, to)? {
            let message = "its file system can neither rename it to a free name nor give it a second one";
            return Err(Error::new(Kind::Unsupported, message)
                .file(&to.path)
                .remedy("use another file system"));
        }
        self.require(file)?;
        let removed = unlinkat(&self.folder, &*self.name, UnlinkatFlags::NoRemoveDir);
        removed.map_err(|errno| Error::io("removing the old name", errno.into()).file(&self.path))
    }

    /// Gives `file`, which is here, a second name at `to`, durably, where there must be nothing. `false` if
    /// the host cannot: in another file system, or in one without such names.
    ///
    /// # Errors
    ///
    /// As [`Self::require`]; [`Kind::Exists`] if there is something; what the operating system says.
    pub fn link(&self, file: &ImageFile, to: &Self) -> Result<bool> {
        self.require(file)?;
        // By its descriptor: the name may lead elsewhere by now.
        let source = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        match linkat(AT_FDCWD, source.as_str(), &to.folder, &*to.name, AtFlags::AT_SYMLINK_FOLLOW) {
            Ok(()) => {}
            Err(Errno::EXDEV | Errno::EPERM | Errno::EOPNOTSUPP | Errno::EMLINK | Errno::ENOSYS) => {
                return Ok(false);
            }
            Err(errno) => return Err(to.refused("naming the file", errno)),
        }
        to.require(file)?;
        to.sync()?;
        Ok(true)
    }

    /// Whether there is anything here; a link is not followed.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn is_taken(&self) -> Result<bool> {
        self.occupant().map(|found| found.is_some())
    }

    /// What is here, if there is anything; a link is not followed.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn occupant(&self) -> Result<Option<HostFile>> {
        match fstatat(&self.folder, &*self.name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(found) => Ok(Some(HostFile { device: found.st_dev, inode: found.st_ino })),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(Error::io("looking for the file", errno.into()).file(&self.path)),
        }
    }

    /// Makes durable what the folder holds.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn sync(&self) -> Result<()> {
        self.folder.sync_all().map_err(|error| Error::io("syncing the folder", error).file(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// The folder on the way to the file becomes a link: what was opened goes, and nothing behind the link.
    #[test]
    fn a_folder_that_is_swapped_does_not_lead_elsewhere() {
        let bench = tempfile::tempdir().expect("a temporary folder");
        let at = |name: &str| bench.path().join(name);
        for folder in ["mine", "yours"] {
            fs::create_dir(at(folder)).expect("room");
            fs::write(at(folder).join("a.vhdx"), folder).expect("room");
        }
        let file = ImageFile::open(&at("mine/a.vhdx"), Access::ReadWrite, Duration::ZERO).expect("free");
        let place = Place::of_file(&file).expect("there");
        fs::rename(at("mine"), at("moved")).expect("ours");
        symlink(at("yours"), at("mine")).expect("room");
        place.remove(&file).expect("it is where it was");
        assert!(!at("moved/a.vhdx").exists() && at("yours/a.vhdx").exists());
    }

    /// Where a host cannot rename without replacing: the file gets its name, and nothing else does.
    #[test]
    fn a_file_is_renamed_by_a_link() {
        let bench = tempfile::tempdir().expect("a temporary folder");
        let at = |name: &str| Place::of(&bench.path().join(name)).expect("a folder");
        let names = || {
            let entries = fs::read_dir(bench.path()).expect("readable");
            let mut names: Vec<_> = entries.map(|entry| entry.expect("readable").file_name()).collect();
            names.sort();
            names
        };
        let file = at("old").create().expect("free");
        at("old").rename_by_link(&file, &at("new")).expect("free");
        assert_eq!((names(), at("new").require(&file).is_ok()), (vec!["new".into()], true));
        fs::write(bench.path().join("taken"), "another's").expect("room");
        let error = at("new").rename_by_link(&file, &at("taken")).expect_err("taken");
        assert_eq!((error.kind(), names()), (Kind::Exists, vec!["new".into(), "taken".into()]));
        // Another file has taken the name: it is neither named nor removed.
        fs::rename(bench.path().join("taken"), bench.path().join("new")).expect("ours");
        at("new").rename_by_link(&file, &at("next")).expect_err("another file is there");
        assert_eq!(names(), ["new"]);
    }

    #[test]
    fn another_file_under_the_name_stays() {
        let bench = tempfile::tempdir().expect("a temporary folder");
        let path = bench.path().join("a.vhdx");
        let place = Place::of(&path).expect("a folder");
        let file = place.create().expect("free");
        assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        fs::rename(&path, bench.path().join("kept")).expect("ours");
        assert!(place.require(&file).expect_err("gone").to_string().contains("not in its folder"));
        symlink(bench.path().join("kept"), &path).expect("room");
        let error = place.remove(&file).expect_err("a link is not the file");
        assert!(error.kind() == Kind::InUse && error.to_string().contains("another file"), "{error}");
        assert!(fs::symlink_metadata(&path).is_ok());
    }
}
