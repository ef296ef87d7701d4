//! Why nothing can be made at a place, in the words that all commands have.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};
use crate::printable::shell;

/// What helps where a file may be replaced.
pub const REPLACE: &str = "choose another name, or replace the file with --force";

/// What helps where none is.
pub const CHOOSE: &str = "choose another name, or remove the file yourself";

/// What helps where a folder is named.
pub(super) const NAME_A_FILE: &str = "name a file in it";

/// There is a file at `path`, and none may be; or a folder, which nothing replaces.
pub fn taken(path: &Path) -> Error {
    if path.is_dir() {
        return Error::new(Kind::Exists, "this is a folder").file(path).remedy(NAME_A_FILE);
    }
    Error::new(Kind::Exists, "there is a file already").file(path)
}

/// The name of the file that is to be at `path`. With a slash behind it, the path is that of a folder.
///
/// # Errors
///
/// [`Kind::Usage`] if the path ends in no name; [`Kind::NotFound`] and [`Kind::Exists`] if it is that of a
/// folder.
pub fn name_of_new(path: &Path) -> Result<&OsStr> {
    let Some(name) = path.file_name() else {
        return Err(Error::new(Kind::Usage, "the path ends in no name of a file").file(path));
    };
    if path.as_os_str().as_bytes().ends_with(name.as_bytes()) {
        return Ok(name);
    }
    if path.is_dir() {
        return Err(taken(path));
    }
    let remedy =
        format!("for a file of that name leave out the slash: {}", shell(&path.with_file_name(name)));
    Err(Error::new(Kind::NotFound, "there is no such folder").file(path).remedy(remedy))
}

/// `error`, of something that needs `folder`: a folder that is missing is called that, and can be made.
pub fn missing_folder(error: Error, folder: &Path) -> Error {
    if error.kind() != Kind::NotFound {
        return error;
    }
    let remedy = format!("create it first: mkdir -p {}", shell(folder));
    Error::new(Kind::NotFound, "there is no such folder").file(folder).remedy(remedy)
}

/// What is wrong when a link in /proc that leads to an open file, or to this program, is not there.
pub fn without_proc() -> Error {
    Error::new(Kind::Io, "/proc, through which files are opened, is not there")
        .remedy("mount -t proc proc /proc")
}

/// Where the kernel has the open `file` now, `doing` something with it: an absolute path without symbolic
/// links.
///
/// # Errors
///
/// [`without_proc`]; what the operating system says.
pub fn path_of(file: &impl AsFd, doing: &str) -> Result<PathBuf> {
    let way = fs::read_link(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()));
    way.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => without_proc(),
        _ => Error::io(doing, error),
    })
}

/// What is wrong with a new file at `path`, if a symbolic link is there that leads to no file.
pub fn dangling(path: &Path) -> Option<Error> {
    let is_link = fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink());
    let leads = || fs::metadata(path).err().is_none_or(|error| error.kind() != io::ErrorKind::NotFound);
    if !is_link || leads() {
        return None;
    }
    let error = Error::new(Kind::Exists, "it is a symbolic link, and there is no file where it leads");
    Some(error.file(path).remedy("remove the link, or name the file that it should lead to"))
}
