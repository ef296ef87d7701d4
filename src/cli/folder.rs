//! The folder that a file is in: where names become durable.

use std::fs::File;
use std::path::Path;

use vhdx_ublk::error::{Error, Result};

/// The folder of the file at `path`.
pub fn of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes it durable that there is, or is not, a file at `path`.
///
/// # Errors
///
/// What the host says.
pub fn sync(path: &Path) -> Result<()> {
    let synced = File::open(of(path)).and_then(|folder| folder.sync_all());
    synced.map_err(|error| Error::io("syncing the folder of the image", error).file(path))
}
