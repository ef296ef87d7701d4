//! The log of a daemon that has detached: its standard error, in a file of bounded size.
//!
//! A full log becomes `N.log.1`, in the place of the one before, and a new one begins: both together stay
//! below three times the bound, whatever happens, since one line is short. A process that ends in between
//! leaves the log under one of the two names.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::sys::stat::fstat;
use nix::unistd;

use crate::error::{Doing, Locate, Result};

/// A log of this size is full.
const MAX_BYTES: u64 = 1 << 20;

/// Only root may read logs.
const MODE: u32 = 0o600;

/// The log of this process.
static LOG: OnceLock<PathBuf> = OnceLock::new();

/// Opens the log at `path`, to which lines are added after those of earlier daemons.
///
/// # Errors
///
/// The host's.
pub(super) fn open(path: &Path) -> Result<File> {
    append(path).doing("opening the log").file(path)
}

/// From now on standard error is the log at `path`.
pub(super) fn begin(path: &Path) {
    LOG.get_or_init(|| path.to_owned());
}

/// Reopens the log, which may have been moved away. A process that has not detached has none.
pub(super) fn reopen() {
    let Some(path) = LOG.get() else { return };
    if let Err(error) = redirect(path) {
        tracing::warn!("{}: the log cannot be reopened: {error}", path.display());
    }
}

/// Begins a new log if this one is full. A failure is not reported: there is nowhere to report it to, and
/// the next line tries again.
pub fn keep_bounded() {
    if let Some(path) = LOG.get() {
        let _ = turn_over(path, MAX_BYTES);
    }
}

fn turn_over(path: &Path, max_bytes: u64) -> io::Result<()> {
    let log = fstat(io::stderr())?;
    if u64::try_from(log.st_size).unwrap_or(0) < max_bytes {
        return Ok(());
    }
    // Another daemon of this number may have begun a new one.
    if fs::metadata(path).is_ok_and(|named| (named.dev(), named.ino()) == (log.st_dev, log.st_ino)) {
        fs::rename(path, full(path))?;
    }
    redirect(path)
}

/// The name of a log that is full.
pub(super) fn full(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

fn redirect(path: &Path) -> io::Result<()> {
    let log = append(path)?;
    Ok(unistd::dup2_stderr(&log)?)
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(MODE).open(path)
}
