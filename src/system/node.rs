//! The nodes of a device's partitions, which the kernel and udev make after that of the device.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use crate::device::device_number;

/// How long a node may take.
const DEADLINE: Duration = Duration::from_secs(3);

const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The unit in which the kernel counts, bytes, whatever the logical sector.
const KERNEL_SECTOR: u64 = 512;

/// The node of partition `number` of the `device`, if the kernel has it at the `length` bytes from `start`
/// on.
pub(super) fn of_partition(device: &Path, number: u32, start: u64, length: u64) -> Option<PathBuf> {
    let disk = device.file_name()?.to_str()?;
    let name = format!("{disk}p{number}");
    let sysfs = Path::new("/sys/class/block").join(&name);
    let node = device.with_file_name(&name);
    let until = Instant::now() + DEADLINE;
    loop {
        if is_there(&sysfs, &node, start, length) {
            return Some(node);
        }
        if Instant::now() >= until {
            return None;
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Whether `node` is that of the partition that `sysfs` describes, and that has these bytes.
fn is_there(sysfs: &Path, node: &Path, start: u64, length: u64) -> bool {
    let number = fs::read_to_string(sysfs.join("dev")).unwrap_or_default();
    lies_at(sysfs, start, length)
        && fs::symlink_metadata(node).is_ok_and(|found| {
            found.file_type().is_block_device() && device_number(found.rdev()) == number.trim()
        })
}

fn lies_at(sysfs: &Path, start: u64, length: u64) -> bool {
    let bytes = |file: &str| {
        let sectors = fs::read_to_string(sysfs.join(file)).ok()?.trim().parse::<u64>().ok()?;
        sectors.checked_mul(KERNEL_SECTOR)
    };
    bytes("start") == Some(start) && bytes("size") == Some(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_partition_at_these_bytes_is_taken() {
        let sysfs = tempfile::tempdir().expect("a temporary folder");
        let write = |file: &str, text: &str| fs::write(sysfs.path().join(file), text).expect("room");
        for (file, text) in [("start", "2048\n"), ("size", "8\n"), ("dev", "1:3\n")] {
            write(file, text);
        }
        assert!(lies_at(sysfs.path(), 1 << 20, 4096));
        assert!(!lies_at(sysfs.path(), 2 << 20, 4096) && !lies_at(sysfs.path(), 1 << 20, 8192));
        assert!(!is_there(sysfs.path(), Path::new("/dev/null"), 1 << 20, 4096), "no block device");
        write("size", &u64::MAX.to_string());
        assert!(!lies_at(sysfs.path(), 1 << 20, u64::MAX), "more than a disk can have");
    }
}
