//! How far the trim of an image has come, for the next command if this one is interrupted.
//!
//! Without it, a command that is killed every second would spend each second on what is trimmed already. It
//! is a small file of root's in `/run/vhdx-ublk`, gone after a reboot, and removed when the command has done
//! all.
//!
//! Invariants:
//!
//! * what it says is durable;
//! * it counts for one file, and under one DataWriteGuid: whoever writes to the disk gives it a new one, and
//!   moves of blocks keep it;
//! * it is written while a device of this command serves the image: no other process writes to the disk then;
//! * a wrong record could only leave free space as it is.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::volume_trim::VolumeTrim;
use crate::device::registry::Registry;
use crate::disk::HostFile;
use crate::error::{Doing, Locate, Result};
use crate::format::header;
use crate::simulation::{Plant, planted};

/// The form of a record. One of another form does not count.
const FORMAT: u32 = 1;

/// The most records that are kept; the oldest goes.
const MOST_RECORDS: usize = 16;

/// The most bytes that are read of one: a disk has at most some hundred partitions.
const MOST_BYTES: u64 = 1 << 20;

/// The record of one image.
pub struct TrimRecord {
    image: File,
    path: PathBuf,
    known: Known,
}

/// What is in the file.
#[derive(Default, Serialize, Deserialize)]
struct Known {
    format: u32,
    data_write_guid: Uuid,
    places: Vec<Trimmed>,
    /// What became of the volumes, once all of them have been looked at.
    outcome: Option<Vec<VolumeTrim>>,
}

/// How far one volume is trimmed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Trimmed {
    /// Where the volume begins on the disk, bytes.
    pub(super) start: u64,
    /// Its length, bytes.
    pub(super) length: u64,
    /// Its bytes before this one are trimmed.
    pub(super) until: u64,
    /// How many of them were discarded.
    pub(super) bytes: u64,
}

impl TrimRecord {
    /// What is known of the `image`, if that is still so.
    ///
    /// # Errors
    ///
    /// If the image has no header that can be read, or the host refuses.
    pub fn of(image: &File, registry: &Registry) -> Result<Self> {
        let image = image.try_clone().doing("duplicating the image's descriptor")?;
        let file = HostFile::of(&image.metadata().doing("reading the attributes of the image")?);
        let path = registry.trim_record_path(file);
        let current = data_write_guid(&image)?;
        let known = read(&path).filter(|known| {
            let same_content = known.data_write_guid == current || planted(Plant::TrustRecord);
            known.format == FORMAT && same_content
        });
        Ok(Self { image, path, known: known.unwrap_or_default() })
    }

    /// What became of the volumes, if all of them have been looked at.
    pub fn outcome(&self) -> Option<&[VolumeTrim]> {
        self.known.outcome.as_deref()
    }

    /// How far the volume is trimmed that has `length` bytes at `start`.
    pub(super) fn trimmed(&self, start: u64, length: u64) -> Trimmed {
        let known = self.known.places.iter().find(|known| (known.start, known.length) == (start, length));
        known.copied().unwrap_or(Trimmed { start, length, ..Trimmed::default() })
    }

    /// Keeps how far a volume is trimmed, which is durable.
    pub(super) fn keep(&mut self, trimmed: Trimmed) {
        let volume = (trimmed.start, trimmed.length);
        self.known.places.retain(|known| (known.start, known.length) != volume);
        self.known.places.push(trimmed);
        self.write();
    }

    /// Keeps what became of all volumes.
    pub fn finish(&mut self, volumes: &[VolumeTrim]) {
        self.known.outcome = Some(volumes.to_vec());
        self.write();
    }

    /// Forgets it: all has been done.
    pub fn remove(&self) {
        let _ = fs::remove_file(&self.path); // there may be none
    }

    /// A record that cannot be written costs the next command time, and nothing else.
    fn write(&mut self) {
        let written = data_write_guid(&self.image).and_then(|guid| {
            self.known = Known { format: FORMAT, data_write_guid: guid, ..std::mem::take(&mut self.known) };
            replace(&self.path, &self.known).doing("writing how far the trim is").file(&self.path)
        });
        if let Err(error) = written {
            tracing::debug!("{error:#}");
        }
    }
}

/// The GUID that changes with the disk.
fn data_write_guid(image: &File) -> Result<Uuid> {
    let slots = header::OFFSETS.map(|offset| {
        let mut slot = vec![0; header::SIZE];
        image.read_exact_at(&mut slot, offset).map(|()| slot)
    });
    // The daemon writes beside the page cache, and is slower if that has a page of the file.
    let _ = nix::fcntl::posix_fadvise(image, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    let [first, second] = slots;
    let (first, second) = (first.doing("reading the headers")?, second.doing("reading the headers")?);
    Ok(header::current([&first, &second])?.header.data_write_guid)
}

/// The record at `path`, if it is a whole one, and root's.
fn read(path: &Path) -> Option<Known> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path);
    let file = file.ok()?;
    let found = file.metadata().ok()?;
    let mut text = String::new();
    (found.is_file() && found.uid() == nix::unistd::geteuid().as_raw()).then_some(())?;
    file.take(MOST_BYTES).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

/// Puts `known` in the place of what is at `path`, as a whole.
fn replace(path: &Path, known: &Known) -> io::Result<()> {
    if !path.exists() {
        make_room(path)?;
    }
    let new = path.with_extension("new");
    fs::write(&new, serde_json::to_vec(known)?)?;
    fs::rename(&new, path)
}

/// Removes the oldest records beside `path` until there is room for one more.
fn make_room(path: &Path) -> io::Result<()> {
    let Some(folder) = path.parent() else { return Ok(()) };
    let mut records = Vec::new();
    for found in fs::read_dir(folder)? {
        let found = found?;
        if found.file_name().as_encoded_bytes().starts_with(Registry::TRIM_RECORD.as_bytes()) {
            records.push((found.metadata()?.modified()?, found.path()));
        }
    }
    records.sort();
    let most = records.len().saturating_sub(MOST_RECORDS - 1);
    records.iter().take(most).try_for_each(|(_, path)| fs::remove_file(path))
}
