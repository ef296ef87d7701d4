//! The free space of the file systems on an image, given up by the kernel's own drivers.
//!
//! Twice the image is served by a private device. The first device is read-only: each file system is mounted
//! on it, which fails if the file system would have to be changed, as by the replay of its journal. What is
//! mounted there is mounted again on the second device and trimmed.
//!
//! Invariants:
//!
//! * a file system that was not left in order is not changed, nor is what is not recognised;
//! * it is mounted read-only: nothing but free space changes;
//! * nothing is discarded on another device of the host, whatever the image names;
//! * what is on the second device is what was on the first.
//!
//! A trim is safe at every moment: the file system does not use what it discards, and a power cut leaves the
//! discarded space with its old content or with zeros.

use std::io;
use std::path::{Path, PathBuf};

use super::device_disk::DeviceDisk;
use super::driver::{self, Driver};
use super::mounted::Mounted;
use super::node;
use super::trim_record::TrimRecord;
pub use super::volume_trim::VolumeTrim;
use super::volume_trim::name;
use crate::disk::Access;
use crate::error::{Error, Kind, Result};
use crate::operations::Watch;
use crate::operations::contents::{Contents, Journal, Partition, ReadAt, Volume, VolumeKind};

/// How much is trimmed at once, bytes: what an interruption may cost. Shorter parts would have XFS look
/// through its lists of free space too often.
const PART_BYTES: u64 = 4 << 30;

/// Parts end at multiples of this on the disk: the longest block of an image is discarded as a whole.
const PART_ALIGNMENT: u64 = 256 << 20;

/// What is on a disk, and what is done with each volume of it.
pub struct Survey {
    contents: Contents,
    volumes: Vec<Found>,
}

/// Where a volume is.
#[derive(Clone, Copy)]
struct Place {
    partition: Option<u32>,
    start: u64,
    length: u64,
}

/// A volume, and the driver that mounts it, or why it is left alone.
struct Found {
    place: Place,
    kind: Option<VolumeKind>,
    plan: std::result::Result<&'static Driver, String>,
}

/// What was done.
pub struct Trimmed {
    /// The volumes, in the order of their partitions.
    pub volumes: Vec<VolumeTrim>,
    /// Whether a part is left to do, because it was stopped.
    pub stopped: bool,
}

/// The names of the file systems on a disk that may have free space to be trimmed: `ext4 on partition 1`.
pub fn candidates(contents: &Contents) -> Vec<String> {
    let name = |partition: Option<u32>, volume: &Volume| {
        let driver = driver::of(volume.kind).filter(|_| !volume.other_devices);
        driver.map(|_| name(partition, Some(volume.kind.name())))
    };
    let whole = contents.volume.iter().filter_map(|volume| name(None, volume));
    let parts = contents
        .partitions()
        .iter()
        .filter_map(|partition| name(Some(partition.number), partition.volume.as_ref()?));
    whole.chain(parts).collect()
}

impl Survey {
    /// What is on the read-only device at `path`, and what of it can be trimmed. Nothing is changed.
    ///
    /// # Errors
    ///
    /// If the device cannot be opened.
    pub fn of(path: &Path) -> Result<Self> {
        let disk = DeviceDisk::open(path)?;
        let contents = disk.contents();
        let volumes = find(&contents, disk.size()).map(|(place, volume)| {
            let plan = plan(&contents, place, volume).and_then(|driver| probe(path, place, driver));
            Found { place, kind: volume.map(|volume| volume.kind), plan }
        });
        let volumes = volumes.collect();
        Ok(Self { contents, volumes })
    }

    /// Whether there is anything to trim.
    pub fn has_work(&self) -> bool {
        self.volumes.iter().any(|found| found.plan.is_ok())
    }

    /// Why the volume of this partition is not to be mounted, if it is not.
    pub fn obstacle(&self, partition: Option<u32>) -> Option<&str> {
        let found = self.volumes.iter().find(|found| found.place.partition == partition)?;
        found.plan.as_ref().err().map(String::as_str)
    }

    /// What would be done.
    pub fn outline(&self) -> Trimmed {
        Trimmed { volumes: self.volumes.iter().map(Found::untrimmed).collect(), stopped: false }
    }

    /// Trims the same disk, which is now writable at `path`. What the `record` says was trimmed before is not
    /// trimmed again.
    ///
    /// # Errors
    ///
    /// [`Kind::Mismatch`] if it is not the same; if the device cannot be opened. What is wrong with a volume
    /// is no error, but the reason why that is left alone.
    pub fn trim(&self, path: &Path, record: &mut TrimRecord, watch: &impl Watch) -> Result<Trimmed> {
        let disk = DeviceDisk::open(path)?;
        if disk.contents() != self.contents {
            let message = "another program has changed what is on the disk";
            return Err(Error::new(Kind::Mismatch, message).remedy("run the command again"));
        }
        let to_trim = self.volumes.iter().filter(|found| found.plan.is_ok());
        let total = to_trim.map(|found| found.place.length).fold(0, u64::saturating_add);
        let mut done = 0;
        let mut volumes = Vec::new();
        for found in &self.volumes {
            let mut volume = found.untrimmed();
            if let Ok(driver) = found.plan
                && !watch.stop_requested()
            {
                let progress = |part: u64| watch.progress(done + part.min(found.place.length), total);
                let work = Work { device: path, disk: &disk, place: found.place, driver };
                match work.trim(record, watch, progress) {
                    Ok(bytes) => volume.trimmed_bytes = Some(bytes),
                    Err(reason) => volume.left_alone = Some(reason),
                }
                done += found.place.length;
            }
            volumes.push(volume);
        }
        let stopped = watch.stop_requested();
        if !stopped && self.has_ended(&volumes) {
            record.finish(&volumes);
        }
        Ok(Trimmed { volumes, stopped })
    }

    /// What was done, if the `record` says that nothing is left to do. The record has that from then on: a
    /// command that is killed every second would spend each second on looking at the disk.
    pub fn done_before(&self, record: &mut TrimRecord) -> Option<Trimmed> {
        let volumes: Vec<_> = self.volumes.iter().map(|found| found.as_recorded(record)).collect();
        if !self.has_work() || !self.has_ended(&volumes) {
            return None;
        }
        record.finish(&volumes);
        Some(Trimmed { volumes, stopped: false })
    }

    /// Whether each volume is trimmed that can be. What failed is tried again by the next command.
    fn has_ended(&self, volumes: &[VolumeTrim]) -> bool {
        let mut both = self.volumes.iter().zip(volumes);
        both.all(|(found, volume)| found.plan.is_err() || volume.trimmed_bytes.is_some())
    }
}

impl Found {
    fn untrimmed(&self) -> VolumeTrim {
        VolumeTrim {
            partition: self.place.partition,
            r#type: self.kind.map(|kind| kind.name().to_owned()),
            trimmed_bytes: None,
            left_alone: self.plan.as_ref().err().cloned(),
        }
    }

    /// The same, if it can be trimmed and the `record` says that all of it is.
    fn as_recorded(&self, record: &TrimRecord) -> VolumeTrim {
        let trimmed = record.trimmed(self.place.start, self.place.length);
        let is_whole = self.plan.is_ok() && trimmed.until == self.place.length;
        VolumeTrim { trimmed_bytes: is_whole.then_some(trimmed.bytes), ..self.untrimmed() }
    }
}

/// The volumes on a disk of `size` bytes, and the partitions without one.
fn find(contents: &Contents, size: u64) -> impl Iterator<Item = (Place, Option<&Volume>)> {
    let of = |partition: &Partition| Place {
        partition: Some(partition.number),
        start: partition.start,
        length: partition.length,
    };
    let parts = contents.partitions().iter().filter(|partition| !partition.is_extended());
    let parts = parts.map(move |partition| (of(partition), partition.volume.as_ref()));
    let whole = Place { partition: None, start: 0, length: size };
    let whole = contents.table.is_none().then_some((whole, contents.volume.as_ref()));
    whole.into_iter().chain(parts)
}

/// The driver for a volume, or why it is left alone, as far as its own bytes and the table say.
fn plan(
    contents: &Contents,
    place: Place,
    volume: Option<&Volume>,
) -> std::result::Result<&'static Driver, String> {
    let Some(volume) = volume else { return Err("nothing on it is recognised".into()) };
    let Some(driver) = driver::of(volume.kind) else { return Err(not_trimmed(volume.kind).into()) };
    if volume.other_devices {
        return Err(driver::why_alone(volume.kind).into());
    }
    let shares = |other: &&Partition| {
        !other.is_extended()
            && Some(other.number) != place.partition
            && other.start < place.start.saturating_add(place.length)
            && place.start < other.end()
    };
    if let Some(other) = contents.partitions().iter().find(shares) {
        return Err(format!("it overlaps partition {}", other.number));
    }
    match (volume.journal, volume.kind) {
        (Journal::Dirty, kind) | (Journal::Unknown, kind @ (VolumeKind::Ntfs | VolumeKind::Vfat)) => {
            Err(unclean(kind).into())
        }
        (Journal::Clean | Journal::Unknown, _) => Ok(driver),
    }
}

/// Why what is no file system of those that are mounted here is left alone.
fn not_trimmed(kind: VolumeKind) -> &'static str {
    match kind {
        VolumeKind::Luks => "it is encrypted (LUKS): open it on a device, and run fstrim there",
        VolumeKind::Bitlocker => "it is encrypted (BitLocker)",
        VolumeKind::Lvm2 => "it belongs to LVM: activate its volumes on a device, and run fstrim there",
        VolumeKind::Swap => "it is swap space",
        VolumeKind::F2fs => "F2FS names other devices by path: mount it, and run fstrim there",
        VolumeKind::Refs => "Linux has no driver for it",
        _ => "its driver is not used for this",
    }
}

/// Why a volume that was not left in order is left alone.
fn unclean(kind: VolumeKind) -> &'static str {
    match kind {
        VolumeKind::Ntfs => {
            "Windows has not released it: shut Windows down completely (`shutdown /s`), or run chkdsk"
        }
        VolumeKind::Vfat | VolumeKind::Ext2 => "it was not unmounted cleanly: check it first",
        VolumeKind::Ext3 | VolumeKind::Ext4 => {
            "its journal must be replayed, or errors were found in it: mount it once, or run e2fsck"
        }
        _ => "its journal must be replayed: shut its system down cleanly, or mount it once",
    }
}

/// Whether the volume can be mounted on the read-only `device`, that is, without a change to it.
fn probe(
    device: &Path,
    place: Place,
    driver: &'static Driver,
) -> std::result::Result<&'static Driver, String> {
    let node = node_of(device, place)?;
    match Mounted::mount(driver, &node, Access::ReadOnly) {
        Ok(_unmounted_at_once) => Ok(driver),
        Err(refusal) => Err(refusal.reason(driver)),
    }
}

fn node_of(device: &Path, place: Place) -> std::result::Result<PathBuf, String> {
    let Some(number) = place.partition else { return Ok(device.to_owned()) };
    let node = node::of_partition(device, number, place.start, place.length);
    node.ok_or_else(|| "the kernel does not show this partition".into())
}

/// A volume that is to be trimmed.
struct Work<'a> {
    device: &'a Path,
    disk: &'a DeviceDisk,
    place: Place,
    driver: &'a Driver,
}

impl Work<'_> {
    /// Trims it; how many bytes were discarded, or why not. `progress` gets how far it is.
    fn trim(
        &self,
        record: &mut TrimRecord,
        watch: &impl Watch,
        progress: impl Fn(u64),
    ) -> std::result::Result<u64, String> {
        let Self { device, disk, place, driver } = *self;
        let mut trimmed = record.trimmed(place.start, place.length);
        let node = node_of(device, place)?;
        let mounted = Mounted::mount(driver, &node, Access::ReadOnly);
        let mounted = mounted.map_err(|refusal| refusal.reason(driver))?;
        while trimmed.until < place.length && !watch.stop_requested() {
            let at = trimmed.until;
            progress(at);
            let past = if driver.trims_parts { end_of_part(place, at) } else { place.length };
            // The driver knows its own end; the last part reaches behind it.
            let length = if past == place.length { u64::MAX - at } else { past - at };
            trimmed.until = past;
            match mounted.trim(at, length) {
                Ok(discarded) => trimmed.bytes = trimmed.bytes.saturating_add(discarded),
                // It ends before its partition.
                Err(error) if at > 0 && error.raw_os_error() == Some(libc::EINVAL) => {
                    trimmed.until = place.length;
                }
                Err(error) => return Err(refused(&error, driver)),
            }
            // What is kept must not be lost with the daemon.
            disk.sync().map_err(|error| refused(&error, driver))?;
            record.keep(trimmed);
        }
        progress(trimmed.until);
        Ok(trimmed.bytes)
    }
}

/// Where the part of a volume that begins at its byte `at` ends.
fn end_of_part(place: Place, at: u64) -> u64 {
    assert!(at < place.length, "a part has bytes");
    let end = place.start.saturating_add(at).saturating_add(PART_BYTES);
    let end = end.checked_next_multiple_of(PART_ALIGNMENT).unwrap_or(u64::MAX);
    (end - place.start).min(place.length)
}

fn refused(error: &io::Error, driver: &Driver) -> String {
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::ENOTTY) => format!("the kernel's {} does not trim", driver.name),
        _ => format!("the kernel's {} does not trim it: {error}", driver.name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Why a volume that is all of a disk is left alone.
    fn left_alone(kind: VolumeKind, other_devices: bool) -> Option<String> {
        let uuid = None;
        let volume = Volume {
            kind,
            version: None,
            label: None,
            uuid,
            size: None,
            journal: Journal::Clean,
            other_devices,
        };
        let place = Place { partition: None, start: 0, length: 1 << 30 };
        plan(&Contents::of_partitions(Vec::new()), place, Some(&volume)).err()
    }

    #[test]
    fn no_driver_is_led_to_other_devices() {
        for kind in [VolumeKind::Ext3, VolumeKind::Ext4, VolumeKind::Btrfs] {
            assert_eq!(left_alone(kind, false), None);
            let reason = left_alone(kind, true).expect("a part of it is on a device of the host");
            assert!(reason.contains("device"), "{reason}");
        }
        for other_devices in [false, true] {
            let reason = left_alone(VolumeKind::F2fs, other_devices).expect("it may name devices");
            assert!(reason.contains("by path") && reason.contains("fstrim"), "{reason}");
        }
    }
}
