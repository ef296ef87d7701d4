//! Devices that lie on other devices.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::device::mounts::{Kinds, Mounts};
use crate::device::sysfs::{MAX_STACK, device_number, targets_in};

/// Whether the file system of this number (`st_dev`) lies on `/dev/ublkbN`, through mappers and arrays. No
/// file is looked at: that could wait for a device that waits.
pub(in crate::device) fn file_system_is_on(file_system: u64, id: u32) -> bool {
    let number = device_number(file_system);
    let sources = Mounts::of_this_process()
        .map_or(Vec::new(), |mounts| sources_of(&mounts, &number, &Kinds::of_kernel()));
    let rdevs = sources
        .iter()
        .filter_map(|source| fs::metadata(source).ok())
        .map(|found| device_number(found.rdev()));
    let disk = format!("ublkb{id}");
    std::iter::once(number.clone()).chain(rdevs).any(|number| {
        let device = Path::new("/sys/dev/block").join(number);
        fs::canonicalize(device).is_ok_and(|device| lies_on(&device, &disk, MAX_STACK))
    })
}

/// The devices of the file systems of this number; those of several devices (btrfs) have numbers of their
/// own.
fn sources_of(mounts: &Mounts, number: &str, kinds: &Kinds) -> Vec<PathBuf> {
    let mounts = mounts.iter().filter(|mount| mount.number == number.as_bytes());
    mounts.filter_map(|mount| kinds.device_of(&mount)).collect()
}

/// Whether the block device at `device` of sysfs is `disk`, a part of it, or made of such.
fn lies_on(device: &Path, disk: &str, depth: usize) -> bool {
    if device.iter().any(|name| name == disk) {
        return true;
    }
    let Some(depth) = depth.checked_sub(1) else { return true };
    targets_in(&device.join("slaves")).iter().any(|slave| lies_on(slave, disk, depth))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_found_below_what_lies_on_it() {
        let sys = tempfile::tempdir().expect("a temporary folder");
        for path in ["block/ublkb1/ublkb1p1", "block/ublkb10", "block/dm-0/slaves", "block/dm-1/slaves"] {
            fs::create_dir_all(sys.path().join(path)).expect("free");
        }
        let link = |to: &str, at: &str| {
            std::os::unix::fs::symlink(sys.path().join(to), sys.path().join(at)).expect("free");
        };
        link("block/ublkb1/ublkb1p1", "block/dm-0/slaves/ublkb1p1");
        link("block/dm-0", "block/dm-1/slaves/dm-0");
        let is_on = |device: &str| lies_on(&sys.path().join("block").join(device), "ublkb1", MAX_STACK);
        assert!(is_on("ublkb1") && is_on("ublkb1/ublkb1p1") && is_on("dm-0") && is_on("dm-1"));
        assert!(!is_on("ublkb10"));
    }

    #[test]
    fn a_file_system_with_a_number_of_its_own_is_found_by_its_source() {
        let kinds = Kinds::parse("nodev\ttmpfs\n\tbtrfs\n");
        let mounts = Mounts::parse(
            b"36 35 0:40 / /mnt rw - btrfs /dev/ublkb1 rw\n37 35 0:41 / /m rw - tmpfs /dev/ublkb1 rw\n",
        );
        assert_eq!(sources_of(&mounts, "0:40", &kinds), [Path::new("/dev/ublkb1")]);
        assert_eq!(sources_of(&mounts, "0:41", &kinds), Vec::<PathBuf>::new(), "any text may be its source");
    }
}
