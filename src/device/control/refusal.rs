//! Why the driver is not there, or refuses a command, and what to do about it.

use std::fs;
use std::io;
use std::path::Path;

use super::{CONTROL_PATH, device_ids};
use crate::error::{Error, Kind};

/// The kernel's limit of devices at once; for all users before Linux 6.15.
const DEVICES_LIMIT: &str = "/sys/module/ublk_drv/parameters/ublks_max";

/// Where the kernel shows the driver, whatever `/dev` has.
const IN_KERNEL: &str = "/sys/class/misc/ublk-control";

/// What shows that this is a container: of podman, of docker, of systemd.
const CONTAINERS: [&str; 3] = ["/run/.containerenv", "/.dockerenv", "/run/systemd/container"];

pub(super) fn unavailable(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            let is_container = CONTAINERS.iter().any(|path| Path::new(path).exists());
            missing(Path::new(IN_KERNEL).exists(), is_container)
        }
        Some(libc::EACCES | libc::EPERM) => {
            forbidden(Error::io(format!("opening {CONTROL_PATH}"), error), nix::unistd::geteuid().is_root())
        }
        _ => Error::io(format!("opening {CONTROL_PATH}"), error),
    }
}

/// The driver's control device is not there. It may be in the kernel all the same, outside of a container
/// with a `/dev` of its own.
fn missing(is_in_kernel: bool, is_container: bool) -> Error {
    const SHARE: &str = "give the container the host's devices, folder and rights: `podman run --privileged \
                         -v /dev:/dev -v /run/vhdx-ublk:/run/vhdx-ublk`";
    let (why, remedy) = match (is_in_kernel, is_container) {
        (true, _) => (
            "the kernel has ublk, but this is a container, or /dev is no devtmpfs",
            format!("run the command on the host; or {SHARE}"),
        ),
        (false, true) => (
            "the kernel offers no ublk, and a container cannot load a driver",
            format!("on the host: `modprobe ublk_drv`; then {SHARE}"),
        ),
        (false, false) => (
            "this kernel offers no ublk",
            "modprobe ublk_drv (CONFIG_BLK_DEV_UBLK, Linux 6.0 or newer)".into(),
        ),
    };
    let message = format!("{CONTROL_PATH} does not exist: {why}");
    Error::new(Kind::NoDriver, message).remedy(remedy)
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
        let remedy = |is_in_kernel, is_container| {
            let error = missing(is_in_kernel, is_container);
            error.remedy_text().unwrap_or_default().to_owned()
        };
        assert!(remedy(false, false).starts_with("modprobe ublk_drv"));
        assert!(remedy(false, true).starts_with("on the host: `modprobe ublk_drv`"));
        for is_container in [false, true] {
            let remedy = remedy(true, is_container);
            assert!(remedy.contains("-v /dev:/dev") && !remedy.contains("modprobe"), "{remedy}");
        }
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
