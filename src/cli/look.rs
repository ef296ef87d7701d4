//! A look at an image: plain reads, no ring, nothing written, no trace left.
//!
//! Beside readers the image is locked like any reader's. While a writer has it, it is read without a lock:
//! what is seen then may be stale, or torn between two states, so a look that finds a contradiction is taken
//! again.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use uuid::Uuid;

use vhdx_ublk::chain::{FileIdentity, Known, Layer, Relative};
use vhdx_ublk::device::session;
use vhdx_ublk::disk::{Access, ImageFile, Links, PlainDisk};
use vhdx_ublk::error::{Doing, Kind, Locate, Result};
use vhdx_ublk::format::metadata::Metadata;
use vhdx_ublk::image::{Identity, Image, ReadImage};

use super::holders;

/// How often an image is read that a writer keeps changing.
const ATTEMPTS: u32 = 3;

/// The pause between two of them: more than a commit of metadata takes.
const PAUSE: Duration = Duration::from_millis(100);

/// The longest log that is looked into where many images are only glanced at: several times what programs make by
/// default, and a folder full of them is read in seconds.
const MAX_GLANCE_LOG_BYTES: u64 = 8 << 20;

/// The unit of `st_blocks`, whatever the file system's own block size.
const STAT_BLOCK_BYTES: u64 = 512;

/// What was seen.
pub struct Seen {
    /// The image, its log replayed in memory.
    pub image: ReadImage,
    /// The file, as an absolute path without symbolic links.
    pub path: PathBuf,
    /// What tells this file from another that takes its name later.
    pub file: FileIdentity,
    /// The file's length, bytes.
    pub file_size: u64,
    /// The space the file takes on its host, bytes.
    pub host_bytes: u64,
    /// A writer had the image: the figures may be stale.
    pub in_use: bool,
}

impl Layer for Seen {
    fn image(&self) -> &Image {
        &self.image
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

/// An image of which only the identity is known. Nobody writes to it while this lives.
pub struct Identified {
    /// What it is, and where.
    pub known: Known,
    /// The same file, to be examined.
    pub disk: PlainDisk,
    _lock: ImageFile,
}

impl Relative for Identified {
    fn metadata(&self) -> &Metadata {
        self.known.metadata()
    }

    fn data_write_guid(&self) -> Uuid {
        self.known.data_write_guid()
    }

    fn path(&self) -> &Path {
        self.known.path()
    }
}

/// Identifies the image at `path`, whatever its blocks are like.
///
/// # Errors
///
/// Those of [`ImageFile::open`] and [`Identity::read`].
pub fn identify(path: &Path) -> Result<Identified> {
    let (disk, lock) = lock_for_reading(path)?;
    let identity = smol::future::block_on(Identity::read(&disk, u64::MAX)).file(path)?;
    Ok(Identified { known: Known { identity, path: lock.path().to_owned() }, disk, _lock: lock })
}

/// Identifies the image at `path` without its lock, as it is at this moment. Whatever it is, this does not take long.
///
/// # Errors
///
/// Those of [`PlainDisk::open`] and [`Identity::read`].
pub fn identify_unlocked(path: &Path) -> Result<Known> {
    identify_found(path, Links::Follow)
}

/// The same for a file that was only come across: a symbolic link is no image.
///
/// # Errors
///
/// As [`identify_unlocked`].
pub fn identify_neighbour(path: &Path) -> Result<Known> {
    identify_found(path, Links::Refuse)
}

/// Identifies the image in `locked`, which the caller has opened.
///
/// # Errors
///
/// Those of [`Identity::read`].
pub fn identify_locked(locked: &ImageFile) -> Result<Identity> {
    smol::future::block_on(Identity::read(&PlainDisk::of(locked)?, MAX_GLANCE_LOG_BYTES))
}

fn identify_found(path: &Path, links: Links) -> Result<Known> {
    let (disk, path) = PlainDisk::open(path, links)?;
    let identity = smol::future::block_on(Identity::read(&disk, MAX_GLANCE_LOG_BYTES)).file(&path)?;
    Ok(Known { identity, path })
}

/// Looks at the image at `path`.
///
/// # Errors
///
/// Whatever is wrong with the file or the image. A contradiction in an image that is in use counts only if it
/// is there every time.
pub fn look(path: &Path) -> Result<Seen> {
    match lock_for_reading(path) {
        Ok((disk, lock)) => see(&disk, lock.path(), false).file(path),
        Err(error) if error.kind() == Kind::InUse => look_past_a_writer(path),
        Err(error) => Err(error),
    }
}

/// Looks at the image at `path`, which nobody writes to while the second value lives.
///
/// # Errors
///
/// As [`look`]; [`Kind::InUse`] if somebody writes to it, or a killed daemon has left something to be written.
pub fn look_at_rest(path: &Path) -> Result<(Seen, ImageFile)> {
    let (disk, lock) = lock_for_reading(path).map_err(|error| holders::explain(error, path))?;
    let seen = see(&disk, lock.path(), false)?;
    holders::refuse_abandoned(&lock, Access::ReadWrite)?;
    session::refuse_orphan(&lock, Some(&seen.image))?;
    Ok((seen, lock))
}

/// The image at `path`, which nobody writes to while the second value lives.
///
/// # Errors
///
/// As [`ImageFile::open`].
pub fn lock_for_reading(path: &Path) -> Result<(PlainDisk, ImageFile)> {
    let locked = ImageFile::open(path, Access::ReadOnly, Duration::ZERO)?;
    Ok((PlainDisk::of(&locked)?, locked))
}

fn look_past_a_writer(path: &Path) -> Result<Seen> {
    let mut left = ATTEMPTS;
    loop {
        let (disk, path) = PlainDisk::open(path, Links::Follow)?;
        left -= 1;
        match see(&disk, &path, true) {
            Err(error) if left > 0 && is_contradiction(error.kind()) => thread::sleep(PAUSE),
            outcome => return outcome.map_err(|error| error.remedy("the image is in use: look again later")),
        }
    }
}

fn is_contradiction(kind: Kind) -> bool {
    matches!(kind, Kind::Corrupt | Kind::Truncated | Kind::Unsupported)
}

/// Sees the image in `disk`, which was found at `path`.
fn see(disk: &PlainDisk, path: &Path, in_use: bool) -> Result<Seen> {
    let image = smol::future::block_on(Image::read(disk)).file(path)?;
    let found = disk.file().metadata().doing("looking at the image").file(path)?;
    let (path, file) = (path.to_owned(), (found.dev(), found.ino()));
    let (file_size, host_bytes) = (found.len(), found.blocks() * STAT_BLOCK_BYTES);
    Ok(Seen { image, path, file, file_size, host_bytes, in_use })
}
