//! A mount namespace of the daemon's own.
//!
//! What is mounted later is not mounted for the daemon: no path of an image comes to lead to a file system on
//! the device itself, which would wait for the daemon that looks at it. What the daemon does not need is not
//! mounted for it either, so that it keeps no other file system from being unmounted.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

use super::mounts::Mounts;
use super::registry::RUN_DIRECTORY;
use super::usage;
use crate::error::{Doing, Result};

/// Whether this process has left the mount namespace of its caller.
static LEFT: AtomicBool = AtomicBool::new(false);

/// What a daemon needs beside its images. By the kernel's exports it finds whether its device is in use.
const NEEDED: [&str; 5] = ["/dev", "/proc", "/sys", usage::CONFIGURATION, RUN_DIRECTORY];

/// Leaves the mount namespace of the caller. Call it before any thread has been started, and before an image
/// is opened.
///
/// # Errors
///
/// The kernel's, as where a container forbids it.
pub fn leave() -> Result<()> {
    const LEAVING: &str = "making a mount namespace";
    let no = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).doing(LEAVING)?;
    mount(no, "/", no, MsFlags::MS_REC | MsFlags::MS_PRIVATE, no).doing(LEAVING)?;
    LEFT.store(true, Ordering::Relaxed);
    Ok(())
}

/// Unmounts, in the namespace of this process, what leads to none of `files`. What stays mounted is logged:
/// it cannot be unmounted elsewhere as long as the daemon lives.
pub(super) fn keep_only(files: &[&Path]) {
    assert!(LEFT.load(Ordering::Relaxed), "otherwise it would unmount the machine's file systems");
    let points = match Mounts::of_this_process() {
        Ok(mounts) => mounts.iter().map(|mount| mount.point()).collect(),
        Err(error) => {
            tracing::warn!("other file systems may stay in use: {error}");
            Vec::new()
        }
    };
    for point in superfluous(points, files) {
        match umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // It went with another one.
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
            Err(errno) => tracing::warn!("{} stays in use: {errno}", point.display()),
        }
    }
}

/// Those of the mount points that lead to nothing that is needed, the latest first.
fn superfluous(points: Vec<PathBuf>, files: &[&Path]) -> Vec<PathBuf> {
    let is_needed = |point: &Path| {
        let mut needed = NEEDED.iter().map(Path::new).chain(files.iter().copied());
        needed.any(|needed| needed.starts_with(point))
    };
    points.into_iter().rev().filter(|point| !is_needed(point)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_to_an_image_or_to_the_device_stays() {
        let points = [
            "/",
            "/dev",
            "/dev/shm",
            "/sys/kernel/config",
            "/run",
            "/run/user/0",
            "/images",
            "/images/a",
            "/home",
            "/images/b",
        ];
        let points = points.map(PathBuf::from).to_vec();
        let files = [Path::new("/images/a/disk.vhdx"), Path::new("/images/base.vhdx")];
        let found = superfluous(points, &files);
        assert_eq!(found, ["/images/b", "/home", "/run/user/0", "/dev/shm"].map(PathBuf::from));
    }
}
