//! A file or a device whose bytes several threads read and write, by plain system calls.
//!
//! Its lock, if it has one, is with the [`ImageFile`] that it was made of, which must live as long. Nothing
//! is durable before [`SharedFile::sync`].

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, FsType, XFS_SUPER_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

use super::file::next_data;
use super::{BlockDevice, ImageFile};
use crate::error::{Doing, Error, Locate, Result};

/// File systems on which files share their blocks until one of them is written (bcachefs is not in the
/// kernel's own headers).
const SHARING_HOSTS: [FsType; 3] = [BTRFS_SUPER_MAGIC, XFS_SUPER_MAGIC, FsType(0xca45_1a4e)];

/// Zeros that are written where the host cannot make them.
static ZEROS: [u8; 1 << 18] = [0; 1 << 18];

/// Bytes of a file that are all stored, or none of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Which bytes, from the one that was asked for on. What lies behind the end of the file is not stored.
    pub range: Range<u64>,
    /// Whether the host has stored them; otherwise they read as zero.
    pub stored: bool,
}

/// An open file or device.
#[derive(Debug)]
pub struct SharedFile {
    file: File,
    path: PathBuf,
    shares_blocks: bool,
}

impl SharedFile {
    /// The file of `image`, whose lock the caller keeps.
    ///
    /// # Errors
    ///
    /// When the process has no descriptor left.
    pub fn of(image: &ImageFile) -> Result<Self> {
        let same = image.as_fd().try_clone_to_owned();
        Self::new(
            same.doing("duplicating the descriptor of the file").file(image.path())?.into(),
            image.path(),
        )
    }

    /// The device.
    ///
    /// # Errors
    ///
    /// When the process has no descriptor left.
    pub fn of_device(device: &BlockDevice) -> Result<Self> {
        let same = device.file().try_clone();
        Self::new(same.doing("duplicating the descriptor of the device").file(device.path())?, device.path())
    }

    fn new(file: File, path: &Path) -> Result<Self> {
        let host = fstatfs(&file).doing("examining the file system").file(path)?.filesystem_type();
        let shares_blocks = SHARING_HOSTS.contains(&host);
        Ok(Self { file, path: path.to_owned(), shares_blocks })
    }

    /// The same file, which errors call by the name that it will have.
    #[must_use]
    pub fn called(mut self, path: &Path) -> Self {
        path.clone_into(&mut self.path);
        self
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads `bytes` at `offset`; what lies behind the end reads as zero.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            match self.file.read_at(&mut bytes[done..], offset + done as u64) {
                Ok(0) => {
                    bytes[done..].fill(0);
                    break;
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(Error::io("reading", error).at(offset + done as u64).file(&self.path));
                }
            }
        }
        Ok(())
    }

    /// Writes `bytes` at `offset`; the file grows if need be.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, offset).doing("writing").at(offset).file(&self.path)
    }

    /// The stretch that begins at `offset`.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn stretch(&self, offset: u64) -> Result<Stretch> {
        let looking =
            |found: io::Result<Option<u64>>| found.doing("finding holes").at(offset).file(&self.path);
        match looking(next_data(&self.file, offset))? {
            None => Ok(Stretch { range: offset..u64::MAX, stored: false }),
            Some(data) if data > offset => Ok(Stretch { range: offset..data, stored: false }),
            Some(_) => {
                let hole = looking(next_hole(&self.file, offset).map(Some))?;
                Ok(Stretch { range: offset..hole.unwrap_or(u64::MAX), stored: true })
            }
        }
    }

    /// Makes `range` read as zero, and gives its space back where the host can do that.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn zero(&self, range: Range<u64>) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        for way in [FallocateFlags::FALLOC_FL_PUNCH_HOLE, FallocateFlags::FALLOC_FL_ZERO_RANGE] {
            if self.fallocate(way | keep, range.clone())? {
                return Ok(());
            }
        }
        let mut at = range.start;
        while at < range.end {
            let length = (range.end - at).min(ZEROS.len() as u64);
            self.write(at, &ZEROS[..crate::format::index(length)])?;
            at += length;
        }
        Ok(())
    }

    /// `fallocate` of `range`; whether the host has such a thing.
    fn fallocate(&self, mode: FallocateFlags, range: Range<u64>) -> Result<bool> {
        let number = |value: u64| i64::try_from(value).expect("no file is longer");
        let (offset, length) = (number(range.start), number(range.end - range.start));
        loop {
            match fallocate(&self.file, mode, offset, length) {
                Err(Errno::EINTR) => {}
                Err(Errno::EOPNOTSUPP | Errno::EINVAL) => return Ok(false),
                done => return done.map(|()| true).doing("zeroing").at(range.start).file(&self.path),
            }
        }
    }

    /// Whether blocks of `other` can become blocks of this file without a copy.
    pub fn can_share_blocks(&self, other: &Self) -> bool {
        let device =
            |file: &File| file.metadata().map(|found| std::os::unix::fs::MetadataExt::dev(&found)).ok();
        self.shares_blocks && other.shares_blocks && device(&self.file) == device(&other.file)
    }

    /// Has `length` bytes at `offset` be those of `source` at `from`, by sharing its blocks; whether that was
    /// done. All three must be whole blocks of the file system.
    pub fn share_blocks(&self, offset: u64, source: &Self, from: u64, length: u64) -> bool {
        let (mut from, mut to) = (from, offset);
        while to < offset + length {
            let left = crate::format::index(offset + length - to);
            match rustix::fs::copy_file_range(&source.file, Some(&mut from), &self.file, Some(&mut to), left)
            {
                Ok(count) if count > 0 => {}
                Err(rustix::io::Errno::INTR) => {}
                // The bytes are copied then, and what is wrong with the file shows.
                _ => return false,
            }
        }
        true
    }

    /// Sets the length of the file; new bytes read as zero.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn set_length(&self, length: u64) -> Result<()> {
        self.file.set_len(length).doing("setting the length of the file").file(&self.path)
    }

    /// Makes everything that was written durable.
    ///
    /// # Errors
    ///
    /// If the host has lost something.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().doing("syncing").file(&self.path)
    }

    /// The file will be read, or is read again, from its start to its end.
    pub fn read_ahead(&self) {
        let _ = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL);
    }

    /// Has the host forget what it holds of the file and has written.
    pub fn read_anew(&self) {
        let _ = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}

/// Where the next hole begins, at `offset` or behind it; the end of the file is one.
fn next_hole(file: &File, offset: u64) -> io::Result<u64> {
    let from = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    match lseek(file, from, Whence::SeekHole) {
        Ok(found) if found > from => Ok(found.cast_unsigned()),
        Ok(_) => Err(io::ErrorKind::InvalidData.into()),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(u64::MAX),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::is_zero;

    const KIB: u64 = 1 << 10;

    fn file() -> (tempfile::NamedTempFile, SharedFile) {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let shared = SharedFile::new(file.reopen().expect("there"), file.path()).expect("there");
        (file, shared)
    }

    #[test]
    fn stretches_cover_a_file_without_gap() {
        let (_file, shared) = file();
        shared.set_length(1 << 20).expect("room");
        shared.write(256 * KIB, &[7; 4096]).expect("room");
        shared.write(512 * KIB, &[7; 8192]).expect("room");
        let (mut at, mut stored) = (0, 0);
        while at < 1 << 20 {
            let stretch = shared.stretch(at).expect("it can be asked");
            assert!(stretch.range.start == at && !stretch.range.is_empty());
            at = stretch.range.end.min(1 << 20);
            stored += if stretch.stored { at - stretch.range.start } else { 0 };
        }
        assert!((12_288..=1 << 20).contains(&stored), "{stored} bytes are stored");
        assert!(!shared.stretch(1 << 20).expect("behind the end").stored);
    }

    #[test]
    fn what_is_zeroed_reads_as_zero_and_nothing_else_does() {
        let (_file, shared) = file();
        shared.write(0, &vec![7; 1 << 20]).expect("room");
        shared.zero(5000..900_000).expect("zeroed");
        let mut bytes = vec![1; (1 << 20) + 4096];
        shared.read(0, &mut bytes).expect("readable");
        assert!(is_zero(&bytes[5000..900_000]) && is_zero(&bytes[1 << 20..]));
        assert!(bytes[..5000].iter().chain(&bytes[900_000..1 << 20]).all(|&byte| byte == 7));
    }
}
