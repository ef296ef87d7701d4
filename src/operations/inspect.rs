//! Inspecting an image: plain reads, nothing is written, and no trace is left.
//!
//! Beside readers the image is locked like any reader's. While a writer has it, it is read without a lock:
//! what is read then may be stale, or torn between two states, so a contradiction counts only if it is found
//! every time.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::Devices;
use crate::chain::{Known, Layer};
use crate::disk::{
    Access, HostFile, ImageFile, Links, PlainDisk, SPARSE_FOR_WINDOWS, host_bytes, is_sparse_for_windows,
};
use crate::error::{Doing, Kind, Locate, Result};
use crate::format::header::Other;
use crate::format::region::Copies;
use crate::image::{Identity, Image, ReadImage};

/// How often an image is read that a writer keeps changing.
const ATTEMPTS: u32 = 3;

/// The pause between two of them: more than a commit of metadata takes.
const PAUSE: Duration = Duration::from_millis(100);

/// The longest log that is replayed to identify one of many images: several times what programs make by
/// default, and a folder full of them is read in seconds.
const MAX_IDENTIFIED_LOG_BYTES: u64 = 8 << 20;

/// An image as it was at one moment.
pub struct Inspected {
    /// The image, its log replayed in memory.
    pub image: ReadImage,
    /// The file, as an absolute path without symbolic links.
    pub path: PathBuf,
    /// Distinguishes this file from another that gets its name later.
    pub file: HostFile,
    /// The file's length, bytes.
    pub file_size: u64,
    /// The space the file takes on its host, bytes.
    pub host_bytes: u64,
    /// Windows will refuse the file for its holes.
    pub is_sparse_for_windows: bool,
    /// A writer had the image: the figures may be stale.
    pub in_use: bool,
}

/// An image that was inspected and is still open.
pub struct Opened {
    /// What was found.
    pub inspected: Inspected,
    disk: PlainDisk,
    /// Keeps writers away, if there was none.
    _lock: Option<ImageFile>,
}

impl Opened {
    /// Its file.
    pub fn disk(&self) -> &PlainDisk {
        &self.disk
    }
}

impl Layer for Opened {
    fn image(&self) -> &Image {
        &self.inspected.image
    }

    fn path(&self) -> &Path {
        &self.inspected.path
    }
}

impl Layer for Inspected {
    fn image(&self) -> &Image {
        &self.image
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

impl Inspected {
    /// What is wrong with the image without preventing its use.
    pub fn warnings(&self) -> Vec<&'static str> {
        let mut warnings = Vec::new();
        if self.is_sparse_for_windows {
            warnings.push(SPARSE_FOR_WINDOWS);
        }
        match (self.image.header.other, self.image.header.slot) {
            (Other::Invalid, 0) => warnings.push("header 2 is damaged; header 1 is used"),
            (Other::Invalid, _) => warnings.push("header 1 is damaged; header 2 is used"),
            (Other::Older | Other::Identical, _) => {}
        }
        match self.image.regions.copies {
            Copies::Equal => {}
            Copies::Different => warnings.push("the two region tables differ; the first is used"),
            Copies::FirstInvalid => warnings.push("region table 1 is damaged; region table 2 is used"),
            Copies::SecondInvalid => warnings.push("region table 2 is damaged; region table 1 is used"),
        }
        warnings
    }
}

/// Inspects the image at `path`.
///
/// # Errors
///
/// Whatever is wrong with the file or the image. A contradiction in an image that is in use counts only if it
/// is there every time.
pub fn inspect(path: &Path) -> Result<Inspected> {
    open(path).map(|opened| opened.inspected)
}

/// As [`inspect`], to read its content, too: it stays as it is, unless it is in use.
///
/// # Errors
///
/// Those of [`inspect`].
pub fn open(path: &Path) -> Result<Opened> {
    match lock_for_reading(path) {
        Ok((disk, lock)) => {
            let inspected = read(&disk, lock.path(), false).file(path)?;
            Ok(Opened { inspected, disk, _lock: Some(lock) })
        }
        Err(error) if error.kind() == Kind::InUse => open_unlocked(path),
        Err(error) => Err(error),
    }
}

/// Inspects the image at `path`. No other process writes to it while the second value lives.
///
/// # Errors
///
/// As [`inspect`]; [`Kind::InUse`] if another process writes to it, or a killed daemon has left something to
/// be written.
pub fn inspect_locked(path: &Path, devices: &dyn Devices) -> Result<(Inspected, ImageFile)> {
    let (disk, lock) = lock_for_reading(path).map_err(|error| devices.with_holder(error, path))?;
    let inspected = read(&disk, lock.path(), false)?;
    devices.refuse_abandoned(&lock, Access::ReadWrite)?;
    devices.refuse_orphan(&lock, Some(&inspected.image))?;
    Ok((inspected, lock))
}

/// Identifies the image at `path` without its lock, as it is at this moment. It never takes long, whatever
/// the file is.
///
/// # Errors
///
/// Those of [`PlainDisk::open`] and [`Identity::read`].
pub fn identify(path: &Path) -> Result<Known> {
    identify_found(path, Links::Follow)
}

/// As [`identify`], for a file that was found in a folder and that the user has not named: a symbolic link is
/// refused.
///
/// # Errors
///
/// As [`identify`].
pub fn identify_neighbour(path: &Path) -> Result<Known> {
    identify_found(path, Links::Refuse)
}

/// Identifies the image in `locked`, which the caller has opened.
///
/// # Errors
///
/// Those of [`Identity::read`].
pub fn identify_locked(locked: &ImageFile) -> Result<Identity> {
    smol::future::block_on(Identity::read(&PlainDisk::of(locked)?, MAX_IDENTIFIED_LOG_BYTES))
}

/// The image at `path`. No other process writes to it while the second value lives.
///
/// # Errors
///
/// As [`ImageFile::open`].
pub(super) fn lock_for_reading(path: &Path) -> Result<(PlainDisk, ImageFile)> {
    let locked = ImageFile::open(path, Access::ReadOnly, Duration::ZERO)?;
    Ok((PlainDisk::of(&locked)?, locked))
}

fn identify_found(path: &Path, links: Links) -> Result<Known> {
    let (disk, path) = PlainDisk::open(path, links)?;
    let identity = smol::future::block_on(Identity::read(&disk, MAX_IDENTIFIED_LOG_BYTES)).file(&path)?;
    Ok(Known { identity, path, lock: () })
}

fn open_unlocked(path: &Path) -> Result<Opened> {
    let mut left = ATTEMPTS;
    loop {
        let (disk, path) = PlainDisk::open(path, Links::Follow)?;
        left -= 1;
        match read(&disk, &path, true) {
            Err(error) if left > 0 && is_contradiction(error.kind()) => thread::sleep(PAUSE),
            outcome => {
                let read = outcome.map_err(|error| error.remedy("the image is in use: try again later"));
                return read.map(|inspected| Opened { inspected, disk, _lock: None });
            }
        }
    }
}

fn is_contradiction(kind: Kind) -> bool {
    matches!(kind, Kind::Corrupt | Kind::Truncated | Kind::Unsupported)
}

/// Reads the image in `disk`, which was found at `path`.
fn read(disk: &PlainDisk, path: &Path, in_use: bool) -> Result<Inspected> {
    let image = smol::future::block_on(Image::read(disk)).file(path)?;
    let found = disk.file().metadata().doing("reading the attributes of the image").file(path)?;
    let (path, file) = (path.to_owned(), HostFile::of(&found));
    let (file_size, host_bytes) = (found.len(), host_bytes(&found));
    let is_sparse_for_windows = is_sparse_for_windows(disk.file()).unwrap_or(false);
    Ok(Inspected { image, path, file, file_size, host_bytes, is_sparse_for_windows, in_use })
}
