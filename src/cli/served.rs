//! The device that a command is about which works on images at rest, too.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;

use vhdx_ublk::device::claims;
use vhdx_ublk::device::registry::Entry;
use vhdx_ublk::device::stop::Target;
use vhdx_ublk::error::{Doing, Error, Kind, Locate, Result};

/// The device that `text` means, or that serves the image that it means; its daemon runs.
///
/// # Errors
///
/// If it means a device that there is not, or whose daemon does not run.
pub fn find(text: &OsStr) -> Result<Option<Entry>> {
    let target = Target::parse(text)?;
    let is_path = target.image().is_some_and(Path::exists);
    // Who is not root may change an image that is no device's.
    if is_path && !nix::unistd::geteuid().is_root() {
        return Ok(None);
    }
    let entry = match claims::find(&target) {
        Ok(listed) if !listed.is_abandoned() || !is_path => listed.entry,
        Err(error) if !is_path => return Err(missing(Path::new(text), error)),
        Ok(_) | Err(_) => return Ok(None),
    };
    if !entry.daemon.is_alive() {
        let message = format!("the daemon of {} is not running", entry.device.display());
        return Err(Error::new(Kind::NotFound, message).remedy(format!("vhdx-ublk recover {}", entry.id)));
    }
    Ok(Some(entry))
}

/// Why there is neither a device nor an image: what looks like the path of a file is missing as any other is.
pub fn missing(path: &Path, error: Error) -> Error {
    let looks_like_path = path.as_os_str().as_encoded_bytes().contains(&b'/') || path.extension().is_some();
    if error.kind() != Kind::NotFound || !looks_like_path {
        return error;
    }
    match fs::metadata(path).doing("finding the image").file(path) {
        Err(missing) if missing.kind() == Kind::NotFound => missing,
        Ok(_) | Err(_) => error,
    }
}
