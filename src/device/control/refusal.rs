//! Why the driver is not there, or refuses a command, and what to do about it.

use std::fs;
use std::io;
use std::path::Path;

use super::{CONTROL_PATH, device_ids};
use crate::error::{Error, Kind};

/// The kernel's limit of devices at once; for all users before Linux 6.15.
const DEVICES_LIMIT: &str = "/sys/module/ublk_drv/parameters/ublks_max";

/// Where the kernel shows the driver, whatever `/dev` has.
const IN_KERNEL: &str = "sys/class/misc/ublk-control";

/// What shows that this is a container: of podman, of docker, of systemd.
const CONTAINERS: [&str; 3] = ["run/.containerenv", ".dockerenv", "run/systemd/container"];

/// The bit of `CAP_SYS_MODULE` in a set of capabilities.
const CAP_SYS_MODULE: u64 = 1 << 16;

/// What the kernels of WSL have in their release.
const WSL: &str = "microsoft";

/// What decides why the driver is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surroundings {
    /// The kernel has it, and `/dev` does not.
    OtherDev,
    /// A container that may not load a driver.
    Container,
    /// Windows' own Linux.
    Wsl,
    /// A machine that may load one.
    Machine,
}

impl Surroundings {
    /// What can be told from the files below `root`.
    pub fn below(root: &Path) -> Self {
        let has = |path: &&str| fs::symlink_metadata(root.join(path)).is_ok();
        let text = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_default();
        let may_load = || {
            let status = text("proc/self/status");
            let set = status.lines().find_map(|line| line.strip_prefix("CapBnd:"));
            let set = set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
            set.is_some_and(|set| set & CAP_SYS_MODULE != 0)
        };
        if has(&IN_KERNEL) {
            Self::OtherDev
        } else if CONTAINERS.iter().any(has) && !may_load() {
            Self::Container
        } else if text("proc/sys/kernel/osrelease").to_ascii_lowercase().contains(WSL) {
            Self::Wsl
        } else {
            Self::Machine
        }
    }

    /// Why the driver is not there, and what helps.
    pub fn advice(self) -> (&'static str, String) {
        const SHARE: &str = "give the container the host's devices, folder and rights: `podman run \
                             --privileged -v /dev:/dev -v /run/vhdx-ublk:/run/vhdx-ublk`";
        match self {
            Self::OtherDev => (
                "the kernel has ublk, but this is a container, or /dev is no devtmpfs",
                format!("run the command on the host; or {SHARE}"),
            ),
            Self::Container => (
                "the kernel offers no ublk, and a container cannot load a driver",
                format!("on the host: `modprobe ublk_drv`; then {SHARE}"),
            ),
            Self::Wsl => (
                "the standard kernel of WSL has no ublk",
                "use a Linux machine that can reach the image; or give WSL a kernel that has ublk \
                 (CONFIG_BLK_DEV_UBLK; `kernel=` in .wslconfig)"
                    .into(),
            ),
            Self::Machine => (
                "this kernel offers no ublk",
                "modprobe ublk_drv (CONFIG_BLK_DEV_UBLK, Linux 6.0 or newer; Ubuntu has it in \
                 linux-modules-extra-$(uname -r))"
                    .into(),
            ),
        }
    }
}

pub(super) fn unavailable(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => missing(Surroundings::below(Path::new("/"))),
        Some(libc::EACCES | libc::EPERM) => {
            forbidden(Error::io(format!("opening {CONTROL_PATH}"), error), nix::unistd::geteuid().is_root())
        }
        _ => Error::io(format!("opening {CONTROL_PATH}"), error),
    }
}

/// The driver's control device is not there.
fn missing(surroundings: Surroundings) -> Error {
    let (why, remedy) = surroundings.advice();
    Error::new(Kind::NoDriver, format!("{CONTROL_PATH} does not exist: {why}")).remedy(remedy)
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
        let remedy = |surroundings| missing(surroundings).remedy_text().unwrap_or_default().to_owned();
        assert!(remedy(Surroundings::Machine).starts_with("modprobe ublk_drv"));
        assert!(remedy(Surroundings::Container).starts_with("on the host: `modprobe ublk_drv`"));
        assert!(!remedy(Surroundings::Wsl).contains("modprobe"));
        let remedy = remedy(Surroundings::OtherDev);
        assert!(remedy.contains("-v /dev:/dev") && !remedy.contains("modprobe"), "{remedy}");
        let error = unavailable(io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(error.kind(), Kind::Permission);
    }

    /// A virtual machine that was made from a container's image has its mark, and loads drivers.
    #[test]
    fn a_container_is_one_that_may_load_no_driver() {
        let seen = |files: &[(&str, &str)]| {
            let root = tempfile::tempdir().expect("a temporary folder");
            for (path, text) in files {
                let path = root.path().join(path);
                fs::create_dir_all(path.parent().expect("a folder")).expect("room");
                fs::write(path, text).expect("room");
            }
            Surroundings::below(root.path())
        };
        let status = |rights| ("proc/self/status", rights);
        let release = |text| ("proc/sys/kernel/osrelease", text);
        let (all, few) = (status("CapBnd:\t000001ffffffffff\n"), status("CapBnd:\t00000000a80425fb\n"));
        assert_eq!(seen(&[(".dockerenv", ""), few]), Surroundings::Container);
        assert_eq!(seen(&[(".dockerenv", ""), all]), Surroundings::Machine);
        assert_eq!(seen(&[few]), Surroundings::Machine);
        assert_eq!(seen(&[release("5.15.153.1-microsoft-standard-WSL2\n"), all]), Surroundings::Wsl);
        assert_eq!(seen(&[(IN_KERNEL, ""), (".dockerenv", ""), few]), Surroundings::OtherDev);
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
