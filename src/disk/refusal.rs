//! Why nothing can be made at a place, in the words that all commands have.

use std::path::Path;

use crate::error::{Error, Kind};
use crate::printable::shell;

/// What helps where a file may be replaced.
pub const REPLACE: &str = "choose another name, or replace the file with --force";

/// What helps where none is.
pub const CHOOSE: &str = "choose another name, or remove the file yourself";

/// There is a file at `path`, and none may be.
pub fn taken(path: &Path) -> Error {
    Error::new(Kind::Exists, "there is a file already").file(path)
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
