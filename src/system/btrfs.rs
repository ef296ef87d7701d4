//! Which devices of the machine the kernel would take for parts of the btrfs of an image.
//!
//! The kernel joins all devices with one identifier that it has seen, and an image says any identifier that
//! its writer has chosen. So before a mount its identifier is compared with those of the machine's devices:
//! of what is mounted as the kernel shows it, of what is not as udev has read it. No device is opened for
//! that: it may be one that waits.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use uuid::Uuid;

use crate::device::device_number;

/// Where the kernel shows what is mounted.
const MOUNTED: &str = "/sys/fs/btrfs";

/// Where udev keeps what it has read of each device.
const SEEN: &str = "/run/udev/data";

/// Where the superblock has its identifier, bytes.
const ID_AT: u64 = (64 << 10) + 32;

/// Whether another device of the machine has the identifier of the btrfs that begins at byte `start` of the
/// device at `node`.
///
/// # Errors
///
/// If the device cannot be read.
pub(super) fn has_other_devices(node: &Path, start: u64) -> io::Result<bool> {
    let device = File::open(node)?;
    let mut id = [0; 16];
    device.read_exact_at(&mut id, start.saturating_add(ID_AT))?;
    let number = device_number(device.metadata()?.rdev());
    let id = Uuid::from_bytes(id).to_string();
    Ok(is_mounted_elsewhere(Path::new(MOUNTED), &id, &number)
        || is_seen_elsewhere(Path::new(SEEN), &id, &number))
}

/// Whether a btrfs with this identifier is mounted that has any device but the one with this number.
fn is_mounted_elsewhere(mounted: &Path, id: &str, number: &str) -> bool {
    let Ok(devices) = fs::read_dir(mounted.join(id).join("devices")) else { return false };
    let is_other = |device: fs::DirEntry| {
        fs::read_to_string(device.path().join("dev")).map_or(true, |found| found.trim() != number)
    };
    devices.flatten().any(is_other)
}

/// Whether udev knows another device with a btrfs of this identifier. Those of this program are left out: one
/// image may be served twice.
fn is_seen_elsewhere(seen: &Path, id: &str, number: &str) -> bool {
    let Ok(devices) = fs::read_dir(seen) else { return false };
    let is_btrfs_of_id = |text: &str| {
        let has = |line: &str| text.lines().any(|found| found == line);
        has("E:ID_FS_TYPE=btrfs") && has(&format!("E:ID_FS_UUID={id}"))
    };
    devices.flatten().any(|file| {
        let name = file.file_name();
        let other = name.to_str().and_then(|name| name.strip_prefix('b')).filter(|other| *other != number);
        other.is_some_and(|other| {
            fs::read_to_string(file.path()).is_ok_and(|text| is_btrfs_of_id(&text)) && !is_of_ublk(other)
        })
    })
}

fn is_of_ublk(number: &str) -> bool {
    let device = fs::canonicalize(Path::new("/sys/dev/block").join(number));
    let name = device.ok().and_then(|device| Some(device.file_name()?.to_str()?.starts_with("ublkb")));
    name.unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0f1e2d3c-0000-4000-8000-000000000001";

    #[test]
    fn a_mounted_btrfs_with_another_device_is_one_of_the_machine() {
        let mounted = tempfile::tempdir().expect("a temporary folder");
        assert!(!is_mounted_elsewhere(mounted.path(), ID, "8:1"), "nothing is mounted");
        let device = |name: &str, number: &str| {
            let folder = mounted.path().join(ID).join("devices").join(name);
            fs::create_dir_all(&folder).expect("room");
            fs::write(folder.join("dev"), format!("{number}\n")).expect("room");
        };
        device("ublkb0", "259:1");
        assert!(!is_mounted_elsewhere(mounted.path(), ID, "259:1"), "it is this device");
        assert!(is_mounted_elsewhere(mounted.path(), ID, "259:2"));
        device("sda1", "8:1");
        assert!(is_mounted_elsewhere(mounted.path(), ID, "259:1"), "it has another one");
    }

    #[test]
    fn a_btrfs_of_the_machine_that_is_not_mounted_counts_too() {
        let seen = tempfile::tempdir().expect("a temporary folder");
        let write = |name: &str, kind: &str, id: &str| {
            let text = format!("S:disk/x\nE:ID_FS_TYPE={kind}\nE:ID_FS_UUID={id}\n");
            fs::write(seen.path().join(name), text).expect("room");
        };
        write("b0:1", "ext4", ID);
        write("b0:2", "btrfs", "0f1e2d3c-0000-4000-8000-000000000002");
        write("c0:3", "btrfs", ID);
        write("b0:4", "btrfs", ID);
        assert!(is_seen_elsewhere(seen.path(), ID, "259:1"));
        assert!(!is_seen_elsewhere(seen.path(), ID, "0:4"), "it is this device");
    }
}
