//! A file or a device whose bytes several threads read and write, by plain system calls.
//!
//! Its lock, if it has one, is with the [`ImageFile`] that it was made of, which must live as long. Nothing
//! is durable before [`SharedFile::sync`].
//!
//! A file that the host has cached is read from its cache. Past the cache, one that it has not is read with a
//! quarter of the work, and nothing else falls out of the cache for it. So is a new file written: the disk
//! works from the first write on, and the sync at the end has little left to do.

use std::fs::File;
use std::io::{self, IoSliceMut, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, PosixFadviseAdvice, fallocate, fcntl, posix_fadvise};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, FsType, fstatfs};
use nix::unistd::{Whence, lseek};
use rustix::io::{ReadWriteFlags, preadv2};

use super::file::{XFS_SUPER_MAGIC, host_that_copies, next_data};
use super::open::open_again;
use super::ring::{DirectAlignment, direct_alignment};
use super::{Access, BlockDevice, ImageFile};
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
    /// The same file, past the host's cache.
    direct: Option<Direct>,
    path: PathBuf,
    shares_blocks: bool,
}

/// A description for direct I/O.
#[derive(Debug)]
struct Direct {
    file: File,
    access: Access,
    alignment: DirectAlignment,
}

/// Where a file is asked whether it is cached.
const SAMPLES: u64 = 16;

/// A file that is shorter is read in no time.
const SHORT: u64 = 8 << 20;

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
        Ok(Self { file, direct: None, path: path.to_owned(), shares_blocks })
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

    /// The same file, for reading only, and past the host's cache unless that has it already.
    #[must_use]
    pub fn past_cache(mut self) -> Self {
        if !self.is_cached() {
            self.direct = self.open_direct(Access::ReadOnly);
        }
        self
    }

    /// The same file, written past the host's cache where that is no loss: hosts that copy on write compress
    /// what goes through it.
    #[must_use]
    pub fn written_past_cache(mut self) -> Self {
        if host_that_copies(&self.file).is_ok_and(|host| host.is_none()) {
            self.direct = self.open_direct(Access::ReadWrite);
        }
        self
    }

    /// Whether whole pages are written past the host's cache.
    pub fn is_written_past_cache(&self) -> bool {
        self.direct.as_ref().is_some_and(|direct| direct.access == Access::ReadWrite)
    }

    /// Another description of the file, for direct I/O, if its host has that.
    fn open_direct(&self, access: Access) -> Option<Direct> {
        let alignment = direct_alignment(self.file.as_fd()).ok().flatten()?;
        if alignment.offset == 0 || alignment.memory == 0 {
            return None;
        }
        let file = open_again(&self.file, access).ok()?;
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).ok()?);
        fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT)).ok()?;
        Some(Direct { file, access, alignment })
    }

    /// Whether the host seems to have most of what is stored in its cache, or the file is short.
    fn is_cached(&self) -> bool {
        let length = (&self.file).seek(SeekFrom::End(0)).unwrap_or(0);
        if length < SHORT {
            return true;
        }
        let step = length / SAMPLES;
        let stored = (0..SAMPLES).filter_map(|number| next_data(&self.file, number * step).ok().flatten());
        let (mut cached, mut asked) = (0, 0);
        for at in stored {
            let mut bytes = [0; 512];
            let read = preadv2(&self.file, &mut [IoSliceMut::new(&mut bytes)], at, ReadWriteFlags::NOWAIT);
            cached += u64::from(read.is_ok());
            asked += 1;
        }
        2 * cached > asked
    }

    /// The user that owns it, and what it lets others do: nine bits.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn owner_and_mode(&self) -> Result<(u32, u32)> {
        let found = self.file.metadata().doing("examining the file").file(&self.path)?;
        Ok((found.uid(), found.mode() & 0o777))
    }

    /// Reads `bytes` at `offset`; what lies behind the end reads as zero.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let failed =
            |error, done: usize| Error::io("reading", error).at(offset + done as u64).file(&self.path);
        let direct = self.direct.as_ref().filter(|direct| direct.fits(offset, bytes));
        let mut done = match direct.map(|direct| direct.file.read_at(bytes, offset)) {
            Some(Ok(count)) => count,
            Some(Err(error)) if error.kind() != io::ErrorKind::Interrupted => return Err(failed(error, 0)),
            None | Some(Err(_)) => 0,
        };
        while done < bytes.len() {
            match self.file.read_at(&mut bytes[done..], offset + done as u64) {
                Ok(0) => {
                    bytes[done..].fill(0);
                    break;
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error, done)),
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
        let writes = |direct: &&Direct| direct.access == Access::ReadWrite && direct.fits(offset, bytes);
        let written = match self.direct.as_ref().filter(writes) {
            None => self.file.write_all_at(bytes, offset),
            Some(direct) => match direct.file.write_all_at(bytes, offset) {
                // A short write may have ended where no direct one may begin.
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                    self.file.write_all_at(bytes, offset)
                }
                written => written,
            },
        };
        written.doing("writing").at(offset).file(&self.path)
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
        let device = |file: &File| file.metadata().map(|found| found.dev()).ok();
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

    /// Has the host forget what it holds of the file and has written.
    pub fn read_anew(&self) {
        let _ = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
}

impl Direct {
    fn fits(&self, offset: u64, bytes: &[u8]) -> bool {
        let DirectAlignment { memory, offset: unit } = self.alignment;
        let unit = u64::from(unit);
        (bytes.as_ptr() as usize).is_multiple_of(memory as usize)
            && offset.is_multiple_of(unit)
            && (bytes.len() as u64).is_multiple_of(unit)
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

    /// Both ways give the same bytes, wherever a read begins and the file ends.
    #[test]
    fn past_the_cache_the_bytes_are_the_same() {
        let (_file, shared) = file();
        let bytes: Vec<u8> = (0..(9_u32 << 20) + 700).map(|at| (at / 251).to_le_bytes()[0]).collect();
        shared.write(0, &bytes).expect("room");
        shared.sync().expect("synced");
        shared.read_anew();
        let direct = shared.past_cache();
        if direct.direct.is_none() {
            eprintln!("no direct I/O here, or nothing leaves the cache: tested buffered only");
        }
        for (at, length) in [(0, 1 << 20), (512, 4096), (100, 5000), (9 << 20, 4096), (8 << 20, 2 << 20)] {
            let mut read = crate::disk::Buffer::zeroed(2 << 20);
            read.fill(1);
            direct.read(at as u64, &mut read[..length]).expect("readable");
            let end = (at + length).min(bytes.len());
            assert!(read[..end - at] == bytes[at..end], "{length} bytes at {at}");
            assert!(is_zero(&read[end - at..length]) && read[length..].iter().all(|&byte| byte == 1));
        }
    }

    /// Whole pages go past the cache and other bytes through it, and all of them are there.
    #[test]
    fn both_ways_write_the_same_file() {
        let (file, shared) = file();
        let shared = shared.written_past_cache();
        if !shared.is_written_past_cache() {
            eprintln!("no direct I/O here: tested buffered only");
        }
        let mut expected = vec![0; 1 << 20];
        let mut bytes = crate::disk::Buffer::zeroed(64 << 10);
        for (number, (at, length)) in (1..).zip([
            (8192, 65_536),
            (5000, 700),
            (4096, 4096),
            (65_536, 512),
            (900_000, 10_000),
            (0, 4096),
        ]) {
            bytes.fill(number);
            shared.write(at as u64, &bytes[..length]).expect("room");
            expected[at..at + length].fill(number);
        }
        shared.set_length(1 << 20).expect("room");
        shared.sync().expect("synced");
        assert!(std::fs::read(file.path()).expect("readable") == expected);
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
