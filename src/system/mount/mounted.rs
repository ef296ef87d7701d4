//! Which device a mounted file system lies on.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::device::device_number;
use crate::device::mounts::{Mount, Mounts};
use crate::device::name::id_of_node_name;
use crate::error::{Doing, Locate, Result};

/// A mounted file system that lies on a device of ublk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mounted {
    /// The N of `/dev/ublkbN`.
    pub(super) id: u32,
    /// Where it is mounted.
    pub(super) point: PathBuf,
    /// The number of the node that is mounted, `major:minor`.
    pub(super) node: String,
    /// The type of the file system.
    pub(super) kind: String,
}

/// The file systems on devices of ublk that this process sees, in the order in which they were mounted.
///
/// # Errors
///
/// When `/proc` cannot be read.
pub(super) fn all() -> Result<Vec<Mounted>> {
    let mounts = Mounts::of_this_process().doing("reading the mounts")?;
    Ok(mounts.iter().filter_map(|mount| of(&mount)).collect())
}

/// The mount point that `folder` leads to. A folder is looked up by its name alone first, as looking at it
/// waits where the device waits; and any path may lead to a file system that never answers.
///
/// # Errors
///
/// As [`all`]; if there is no such folder.
pub(super) fn point(folder: &Path) -> Result<PathBuf> {
    let mounts = Mounts::of_this_process().doing("reading the mounts")?;
    if mounts.iter().any(|mount| mount.point() == folder) {
        return Ok(folder.to_owned());
    }
    fs::canonicalize(folder).doing("finding the folder").file(folder)
}

/// What is mounted at the mount point `point`: of several, the one on top.
///
/// # Errors
///
/// As [`all`].
pub(super) fn at(point: &Path) -> Result<Option<Mounted>> {
    let mounts = Mounts::of_this_process().doing("reading the mounts")?;
    let on_top = mounts.iter().filter(|mount| mount.point() == point).last();
    Ok(on_top.and_then(|mount| of(&mount)))
}

fn of(mount: &Mount<'_>) -> Option<Mounted> {
    let by_number = String::from_utf8(mount.number.to_vec()).ok();
    let by_number = by_number.and_then(|node| Some((id_of(&node)?, node)));
    let by_source = || {
        let node = number_of(&mount.btrfs_node()?).ok()?;
        Some((id_of(&node)?, node))
    };
    let (id, node) = by_number.or_else(by_source)?;
    let kind = String::from_utf8_lossy(mount.kind).into_owned();
    Some(Mounted { id, point: mount.point(), node, kind })
}

/// The number of the block device at `path`, `major:minor`.
///
/// # Errors
///
/// If it is none, or is not there.
pub(super) fn number_of(path: &Path) -> io::Result<String> {
    let found = fs::metadata(path)?;
    let is_block = found.file_type().is_block_device();
    is_block.then(|| device_number(found.rdev())).ok_or_else(|| io::Error::other("it is no block device"))
}

/// The device of ublk that the block device with this number is, is a partition of, or is a loop device on.
fn id_of(node: &str) -> Option<u32> {
    let device = fs::canonicalize(Path::new("/sys/dev/block").join(node)).ok()?;
    let by_name = id_of_node_name(device.file_name()?.to_str()?);
    by_name.or_else(|| {
        let backing = fs::read_to_string(device.join("loop/backing_file")).ok()?;
        id_of_node_name(backing.trim_end().strip_prefix("/dev/")?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_on_another_kind_of_device_is_on_none_of_ours() {
        assert_eq!(at(Path::new("/proc")).expect("it can be read"), None);
        assert_eq!(at(Path::new("/no/such/folder")).expect("it can be read"), None);
        assert!(point(Path::new("/no/such/folder")).is_err());
        assert_eq!(point(Path::new("/proc/../proc/.")).expect("it is there"), Path::new("/proc"));
        assert_eq!(id_of("0:0"), None);
    }
}
