//! The device that a command is about which works on images at rest, too.

use std::ffi::OsStr;
use std::path::Path;

use vhdx_ublk::device::claims;
use vhdx_ublk::device::registry::Entry;
use vhdx_ublk::device::stop::Target;
use vhdx_ublk::error::{Error, Kind, Result};

/// The device that `target` means, or that serves the image that it means; its daemon runs.
///
/// # Errors
///
/// If it means a device that there is not, or whose daemon does not run.
pub fn find(target: &OsStr) -> Result<Option<Entry>> {
    let target = Target::parse(target)?;
    let is_path = target.image().is_some_and(Path::exists);
    // Who is not root may change an image that is no device's.
    if is_path && !nix::unistd::geteuid().is_root() {
        return Ok(None);
    }
    let entry = match claims::find(&target) {
        Ok(listed) if !listed.is_abandoned() || !is_path => listed.entry,
        Err(error) if !is_path => return Err(error),
        Ok(_) | Err(_) => return Ok(None),
    };
    if !entry.daemon.is_alive() {
        let message = format!("the daemon of {} is not running", entry.device.display());
        return Err(Error::new(Kind::NotFound, message).remedy(format!("vhdx-ublk recover {}", entry.id)));
    }
    Ok(Some(entry))
}
