//! Block devices as `/sys` shows them, and the kernel's folders as far as they can be read.

use std::fs;
use std::path::{Path, PathBuf};

/// How many devices may be stacked: mappers, arrays, partitions.
pub(super) const MAX_STACK: usize = 16;

/// A device number (`st_dev`, `st_rdev`) as `/proc` and `/sys` write it: `major:minor`.
pub fn device_number(device: u64) -> String {
    format!("{}:{}", libc::major(device), libc::minor(device))
}

/// The size of `/dev/ublkbN` as the kernel has it, bytes.
pub(super) fn disk_size(id: u32) -> Option<u64> {
    let sectors = fs::read_to_string(format!("/sys/block/ublkb{id}/size")).ok()?;
    sectors.trim().parse::<u64>().ok()?.checked_mul(512)
}

/// The names in `folder`, sorted: none where it cannot be read.
pub(super) fn names_in(folder: &Path) -> Vec<String> {
    let items = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = items.filter_map(|item| item.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// What the links in `folder` lead to: nothing where it cannot be read.
pub(super) fn targets_in(folder: &Path) -> Vec<PathBuf> {
    let items = fs::read_dir(folder).into_iter().flatten().flatten();
    items.filter_map(|item| fs::canonicalize(item.path()).ok()).collect()
}
