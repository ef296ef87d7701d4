//! The folder in which something is to be made.

use std::path::Path;

use crate::error::{Error, Kind};
use crate::printable::shell;

/// `error`, of something that needs `folder`: a folder that is missing is called that, and can be made.
pub(super) fn missing(error: Error, folder: &Path) -> Error {
    if error.kind() != Kind::NotFound {
        return error;
    }
    let remedy = format!("create it first: mkdir -p {}", shell(folder));
    Error::new(Kind::NotFound, "there is no such folder").file(folder).remedy(remedy)
}
