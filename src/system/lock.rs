//! One at a time: mounts and unmounts, and changes of the table of disks.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::printable::shell;

/// How long another may take: a mount makes a device, and the kernel may replay a journal.
const PATIENCE: Duration = Duration::from_secs(120);

const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Keeps everyone else who locks the file at `path` waiting until it is dropped; `other` is what they do.
///
/// # Errors
///
/// [`Kind::InUse`] if another takes too long; the host's.
pub(super) fn acquire(path: &Path, other: &str) -> Result<Flock<File>> {
    let waiting = || format!("waiting for the end of {other}");
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    let mut file = file.doing(waiting()).file(path)?;
    let until = Instant::now() + PATIENCE;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((file, nix::Error::EWOULDBLOCK | nix::Error::EINTR)) => file,
            Err((_, errno)) => return Err(errno).doing(waiting()).file(path),
        };
        if Instant::now() >= until {
            let message = format!("{other} has not ended");
            let remedy = format!("find it: fuser -v {}", shell(path));
            return Err(Error::new(Kind::InUse, message).file(path).remedy(remedy));
        }
        thread::sleep(POLL_INTERVAL);
    }
}
