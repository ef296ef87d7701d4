//! Whether a block device that is overwritten holds its own source.

use std::fs;
use std::path::PathBuf;

use nix::sys::stat::{major, minor};

use crate::disk::HostFile;
use crate::operations::source::Source;

/// Whether the device `number` is the source, another part of the same disk, or a loop device over one of the
/// files of the source.
pub(super) fn holds(number: u64, source: &Source) -> bool {
    let Some(target) = disk_of(number) else { return source.is_device(number) };
    let is_same = source.device().is_some_and(|device| disk_of(device).as_ref() == Some(&target));
    is_same || backing_file(&target).is_some_and(|file| source.has(file))
}

/// The folder of the whole disk that the device is, or is a part of.
fn disk_of(number: u64) -> Option<PathBuf> {
    let folder = format!("/sys/dev/block/{}:{}", major(number), minor(number));
    let folder = fs::canonicalize(folder).ok()?;
    if folder.join("partition").exists() { folder.parent().map(Into::into) } else { Some(folder) }
}

/// The file that a loop device shows.
fn backing_file(disk: &std::path::Path) -> Option<HostFile> {
    let path = fs::read_to_string(disk.join("loop/backing_file")).ok()?;
    HostFile::at(path.trim_end_matches('\n').as_ref()).ok()
}
