//! Why the driver is not there, or refuses a command, and what to do about it.

use std::fs;
use std::io;

use super::{CONTROL_PATH, device_ids};
use crate::error::{Error, Kind};

/// The kernel's limit of devices at once; for all users before Linux 6.15.
const DEVICES_LIMIT: &str = "/sys/module/ublk_drv/parameters/ublks_max";

pub(super) fn unavailable(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            Error::new(Kind::NoDriver, format!("{CONTROL_PATH} does not exist: this kernel offers no ublk"))
                .remedy("modprobe ublk_drv (CONFIG_BLK_DEV_UBLK, Linux 6.0 or newer)")
        }
        Some(libc::EACCES | libc::EPERM) => {
            forbidden(Error::io(format!("opening {CONTROL_PATH}"), error), nix::unistd::geteuid().is_root())
        }
        _ => Error::io(format!("opening {CONTROL_PATH}"), error),
    }
}

/// The remedy for a command that is not permitted.
pub(super) fn forbidden(error: Error, is_root: bool) -> Error {
    error.remedy(if is_root {
        "a container or a security module forbids this even to root; run it outside of that"
    } else {
        "run it as root"
    })
}

/// The error if the kernel makes no other device because there are `count` of at most `limit`.
fn too_many(count: usize, limit: Option<usize>) -> Option<Error> {
    let limit = limit.filter(|&limit| count >= limit)?;
    let message = format!("the kernel allows {limit} ublk devices at once, and there are {count}");
    let remedy = format!(
        "`vhdx-ublk del` one that is not needed, or allow more: echo {} >{DEVICES_LIMIT}",
        limit.max(1) * 2
    );
    Some(Error::new(Kind::NoSpace, message).remedy(remedy))
}

/// The error of an `ADD_DEV` that was refused with `EACCES`, as kernels before 6.15 do if there are too many
/// devices.
pub(super) fn not_permitted(error: Error) -> Error {
    let limit = fs::read_to_string(DEVICES_LIMIT).ok().and_then(|text| text.trim().parse().ok());
    let is_root = nix::unistd::geteuid().is_root();
    too_many(device_ids().len(), limit).unwrap_or_else(|| forbidden(error, is_root))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_driver_and_a_missing_right_are_told_apart() {
        let error = unavailable(io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(error.kind(), Kind::NoDriver);
        assert!(error.remedy_text().is_some_and(|text| text.contains("modprobe ublk_drv")));
        let error = unavailable(io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(error.kind(), Kind::Permission);
    }

    #[test]
    fn root_is_not_sent_to_become_root() {
        let error = || Error::new(Kind::Permission, "no");
        assert_eq!(forbidden(error(), false).remedy_text(), Some("run it as root"));
        assert!(forbidden(error(), true).remedy_text().is_some_and(|text| text.contains("container")));
    }

    #[test]
    fn a_device_too_many_is_told_from_a_missing_right() {
        assert!(too_many(63, Some(64)).is_none() && too_many(64, None).is_none());
        let error = too_many(64, Some(64)).expect("the limit");
        assert!(error.to_string().contains("allows 64 ublk devices at once, and there are 64"), "{error}");
        assert!(error.remedy_text().is_some_and(|text| text.contains("echo 128 >/sys/module/ublk_drv")));
    }
}
