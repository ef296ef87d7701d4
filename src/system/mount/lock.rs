//! One mount or unmount at a time.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use crate::device::registry::Registry;
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::printable::shell;

/// How long another mount may take: it makes a device, and the kernel may replay a journal.
const PATIENCE: Duration = Duration::from_secs(120);

const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Keeps every other mount and unmount waiting until it is dropped.
///
/// # Errors
///
/// [`Kind::InUse`] if another takes too long; the host's.
pub(super) fn acquire(registry: &Registry) -> Result<Flock<File>> {
    const FAILED: &str = "waiting for other mounts";
    let path = registry.mount_lock_path();
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let mut file = file.doing(FAILED).file(&path)?;
    let until = Instant::now() + PATIENCE;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((file, nix::Error::EWOULDBLOCK | nix::Error::EINTR)) => file,
            Err((_, errno)) => return Err(errno).doing(FAILED).file(&path),
        };
        if Instant::now() >= until {
            let message = "another mount or unmount of an image has not ended";
            let remedy = format!("find it: fuser -v {}", shell(&path));
            return Err(Error::new(Kind::InUse, message).file(&path).remedy(remedy));
        }
        thread::sleep(POLL_INTERVAL);
    }
}
