//! Devices whose images lie on other devices.

use crate::device::registry::{Entry, Listed, Registry};
use crate::device::usage;
use crate::error::{Error, Kind, Result};
use crate::printable::shell;

/// The device of this program, waiting for a daemon, on which the image of `entry` lies: reads and writes of
/// the image wait as well.
///
/// # Errors
///
/// If the registry cannot be read.
pub fn waits_below(registry: &Registry, entry: &Entry) -> Result<Option<Listed>> {
    let is_below = |listed: &Listed| {
        listed.entry.mark != entry.mark && listed.is_abandoned() && lies_on(entry, &listed.entry)
    };
    Ok(registry.list()?.into_iter().find(is_below))
}

/// Whether the image of `entry`, or one of its parents, is on a file system on the device of `below`.
pub fn lies_on(entry: &Entry, below: &Entry) -> bool {
    let mut files = std::iter::once(&entry.image_file).chain(&entry.parent_files);
    files.any(|file| usage::file_system_is_on(file.device, below.id))
}

/// The error for a device whose image lies on a device that waits.
pub fn lies_on_waiting(entry: &Entry, below: &Listed) -> Error {
    let (device, below) = (entry.device.display(), below.entry.device.display());
    let message = format!("the image of {device} lies on {below}, whose daemon was killed: its I/O waits");
    Error::new(Kind::InUse, message)
        .file(&entry.image)
        .remedy(format!("`vhdx-ublk recover {below}` first, then run the command again"))
}

/// The error for a device that was removed by force while its image could not be read.
pub(super) fn not_closed(entry: &Entry, below: &Listed) -> Error {
    let (device, below) = (entry.device.display(), below.entry.device.display());
    let message = format!(
        "{device} is gone, but not everything that was acknowledged is in its image, which lies on \
         {below}, whose I/O waits"
    );
    Error::new(Kind::Io, message).file(&entry.image).remedy(format!(
        "`vhdx-ublk recover {below}`, then `vhdx-ublk add {}` and `vhdx-ublk del` it",
        shell(&entry.image)
    ))
}

/// `devices` in an order in which each comes before those that it lies on.
pub fn nested_first<T>(mut devices: Vec<T>, lies_on: impl Fn(&T, &T) -> bool) -> Vec<T> {
    let mut ordered = Vec::with_capacity(devices.len());
    while !devices.is_empty() {
        let carries_none = |at: &usize| {
            devices.iter().enumerate().all(|(other, device)| other == *at || !lies_on(device, &devices[*at]))
        };
        // In a circle, which cannot be, any order is as good.
        let next = (0..devices.len()).find(carries_none).unwrap_or(0);
        ordered.push(devices.remove(next));
    }
    ordered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_on_another_device_goes_first() {
        // A number lies on its half.
        let lies_on = |above: &u32, below: &u32| above / 2 == *below && above != below;
        assert_eq!(nested_first(vec![1, 2, 4, 3, 5], lies_on), [4, 3, 5, 2, 1]);
        assert_eq!(nested_first(vec![7, 6], |_, _| true), [7, 6], "it ends");
        assert!(nested_first(Vec::<u32>::new(), lies_on).is_empty());
    }
}
