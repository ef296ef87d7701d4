//! The number of a new device.
//!
//! The kernel gives the lowest that it has no device for. An entry may have that number: its device is gone,
//! and `del` closes its image by the entry, or reports what has happened to the image. The entry of the new
//! device would take its place.

use super::control::{Control, DeviceInfo, NewDevice};
use super::registry::{Entry, Registry};
use crate::disk::HostFile;
use crate::error::{Error, Kind, Result};
use crate::simulation::{Plant, planted};

/// Makes a device for `image`, with a number that no entry of another image has. Whoever calls it has
/// `registry` locked until the device has its entry.
///
/// # Errors
///
/// [`Kind::Exists`] if the number that is wanted is taken; otherwise those of the registry and of the kernel.
pub(super) fn add(
    control: &Control,
    registry: &Registry,
    new: &NewDevice,
    image: HostFile,
) -> Result<DeviceInfo> {
    let left = left(control, registry, image)?;
    let find = |id: u32| left.iter().find(|entry| entry.id == id);
    match new.id {
        Some(id) => find(id).map_or_else(|| control.add(new), |entry| Err(is_left(entry))),
        None if left.is_empty() => control.add(new),
        None => {
            // It ends: there are fewer entries and devices than numbers.
            let numbers = (0..u32::MAX).filter(|id| find(*id).is_none());
            let mut tries = numbers.map(|id| control.add(&NewDevice { id: Some(id), ..*new }));
            let is_taken =
                |tried: &Result<DeviceInfo>| tried.as_ref().is_err_and(|error| error.kind() == Kind::Exists);
            tries.find(|tried| !is_taken(tried)).expect("one of 4 billion")
        }
    }
}

/// The entries of other images than `image` whose devices are gone, and which no daemon is about to remove.
fn left(control: &Control, registry: &Registry, image: HostFile) -> Result<Vec<Entry>> {
    let mut left = Vec::new();
    for entry in registry.entries()?.0 {
        let is_anothers = entry.image_file != image && !planted(Plant::ReuseNumber);
        if is_anothers && !entry.daemon.is_alive() && control.info(entry.id)?.is_none() {
            left.push(entry);
        }
    }
    Ok(left)
}

fn is_left(entry: &Entry) -> Error {
    let (device, image) = (entry.device.display(), entry.image.display());
    Error::new(Kind::Exists, format!("{device} was removed, and {image} is not closed yet"))
        .remedy(format!("close it first: `vhdx-ublk del {device}`, or choose another number"))
}
