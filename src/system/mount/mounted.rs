//! Which device a mounted file system lies on.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::device::device_number;
use crate::device::mounts::{Mount, Mounts};
use crate::device::name::id_of_node_name;
use crate::error::{Doing, Result};

/// A mounted file system that lies on a device of ublk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mounted {
    /// The N of `/dev/ublkbN`.
    pub(super) id: u32,
    /// Where it is mounted.
    pub(super) point: PathBuf,
    /// The number of the node that is mounted, `major:minor`.
    pub(super) node: String,
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

/// What is mounted at `folder`: of several, the one on top. A folder is looked up by its name alone first, as
/// looking at it waits where the device waits.
///
/// # Errors
///
/// As [`all`].
pub(super) fn at(folder: &Path) -> Result<Option<Mounted>> {
    let mounts = Mounts::of_this_process().doing("reading the mounts")?;
    let on_top = |point: &Path| mounts.iter().filter(|mount| mount.point() == point).last();
    let found = on_top(folder).or_else(|| on_top(&fs::canonicalize(folder).ok()?));
    Ok(found.and_then(|mount| of(&mount)))
}

fn of(mount: &Mount<'_>) -> Option<Mounted> {
    let by_number = String::from_utf8(mount.number.to_vec()).ok();
    let by_number = by_number.and_then(|node| Some((id_of(&node)?, node)));
    // A file system on several devices has a number of its own.
    let by_source = || {
        let source = mount.source();
        // Any other path could lead to a file system that hangs.
        let node = source.starts_with("/dev").then(|| number_of(&source).ok())??;
        Some((id_of(&node)?, node))
    };
    let (id, node) = by_number.or_else(by_source)?;
    Some(Mounted { id, point: mount.point(), node })
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
        assert_eq!(id_of("0:0"), None);
    }
}
