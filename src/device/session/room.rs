//! The room that sessions take: memory of a file system that must not outlive a power cut, and must not be
//! filled.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FallocateFlags, Flock, fallocate};
use nix::sys::statfs::{self, fstatfs};
use nix::sys::statvfs::fstatvfs;

use crate::device::region::{make_private, shared_words};
use crate::disk::{PAGE_BYTES, next_data, next_hole};
use crate::error::{Doing, Error, Kind, Result};
use crate::image::{HEADER_WORDS, SessionMemory, Written};

/// How much of its file system a session leaves free: one of so many parts.
#[derive(Clone, Debug)]
pub(super) struct Share(Arc<AtomicU64>);

impl Share {
    /// For a new session: other devices need sessions, entries and logs, too.
    pub(super) fn of_new() -> Self {
        Self(Arc::new(AtomicU64::new(8)))
    }

    /// For a session that is taken over: what was reserved before is there, and is needed.
    pub(super) fn of_found() -> Self {
        let share = Self::of_new();
        share.claim();
        share
    }

    /// Everything that is needed was reserved, and is there: to ask for it again takes nothing.
    pub(super) fn claim(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// From now on the session grows as its guest writes: no guest keeps other devices from having sessions.
    pub(super) fn grow(&self) {
        self.0.store(4, Ordering::Relaxed);
    }

    fn parts(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|&parts| parts > 0)
    }
}

/// `RAMFS_MAGIC` of `linux/magic.h`, which `nix` does not have.
const RAMFS_MAGIC: u64 = 0x8584_58f6;

/// Refuses a folder that a power cut does not empty: a session is of no use after it, and must not exist
/// then.
pub(super) fn refuse_lasting(directory: &File) -> Result<()> {
    let kind = fstatfs(directory).doing("looking at its file system")?.filesystem_type();
    let is_memory =
        kind == statfs::TMPFS_MAGIC || u64::try_from(kind.0).is_ok_and(|kind| kind == RAMFS_MAGIC);
    if is_memory {
        return Ok(());
    }
    let message = "it is not a tmpfs: a session file in it would survive a power cut";
    Err(Error::new(Kind::Unsupported, message).remedy("mount a tmpfs on /run/vhdx-ublk"))
}

/// A session's file, which reserves room for the session.
#[derive(Clone, Debug)]
pub(super) struct Reserved {
    pub(super) file: Arc<Flock<File>>,
    pub(super) share: Share,
}

impl Reserved {
    /// Maps the first `count` words of the file.
    pub(super) fn map(self, count: usize) -> io::Result<SessionMemory> {
        assert!(count >= HEADER_WORDS, "a session of {count} words");
        let words = shared_words(&self.file, count)?;
        let written = written_in(self.file.clone());
        Ok(SessionMemory::shared(words, Arc::new(move |range| self.reserve(range)), written))
    }

    /// Reserves room for a range of words.
    pub(super) fn reserve(&self, words: Range<usize>) -> io::Result<()> {
        assert!(words.start < words.end, "no words are reserved");
        let bytes = |words: usize| (words * size_of::<AtomicU64>()) as u64;
        if let Some(left) = self.left_free()?
            && left < bytes(words.len())
        {
            return Err(ErrorKind::StorageFull.into());
        }
        let signed = |bytes: u64| i64::try_from(bytes).expect("17 GiB at most");
        let (start, length) = (signed(bytes(words.start)), signed(bytes(words.len())));
        Ok(fallocate(self.file.as_fd(), FallocateFlags::FALLOC_FL_KEEP_SIZE, start, length)?)
    }

    /// Gives all room back; what `memory` holds, which is mapped from the file, is in private memory from now
    /// on.
    pub(super) fn release(&self, memory: &SessionMemory) -> io::Result<()> {
        let words = memory.shared_words().expect("it is in the file of a session");
        let written = written_in(self.file.clone());
        let mut next = 0;
        let written = std::iter::from_fn(|| {
            let found = (next < words.len()).then(|| written(next..words.len()))??;
            next = found.end;
            Some(found)
        });
        make_private(words, written)?;
        // Another process may look at it just now: it finds zeros, where the end of the file would kill it.
        let holes = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let length = size_of_val(&**words).next_multiple_of(PAGE_BYTES);
        let length = i64::try_from(length).expect("17 GiB at most");
        Ok(fallocate(self.file.as_fd(), holes, 0, length)?)
    }

    /// How many bytes may be taken; `None` without a bound.
    fn left_free(&self) -> io::Result<Option<u64>> {
        let Some(parts) = self.share.parts() else { return Ok(None) };
        let found = fstatvfs(self.file.as_fd())?;
        // A ramfs has no bounds, and reports no blocks.
        if found.blocks() == 0 {
            return Ok(None);
        }
        let kept = found.blocks() / parts;
        Ok(Some(found.blocks_available().saturating_sub(kept).saturating_mul(found.fragment_size())))
    }
}

/// Finds what was written in `file`: room that was reserved and never touched is a hole of it.
fn written_in(file: Arc<Flock<File>>) -> Written {
    let word = size_of::<AtomicU64>();
    let words_of = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    Arc::new(move |words: Range<usize>| {
        let first = match next_data(&file, (words.start * word) as u64) {
            Ok(found) => words_of(found?) / word,
            // Where it cannot be known, everything counts.
            Err(_) => return Some(words),
        };
        let past = next_hole(&file, (first * word) as u64).map_or(words.end, |past| words_of(past) / word);
        (first < words.end).then(|| first..past.min(words.end))
    })
}

const _: () = assert!(HEADER_WORDS * size_of::<AtomicU64>() == PAGE_BYTES);

/// A folder in memory.
#[cfg(test)]
pub(in crate::device) fn folder_in_memory() -> tempfile::TempDir {
    let is_memory = |path: &&&str| File::open(path).is_ok_and(|folder| refuse_lasting(&folder).is_ok());
    let found = ["/dev/shm", "/run", "/tmp"].iter().find(is_memory).expect("no tmpfs for session files");
    tempfile::tempdir_in(found).expect("room in memory")
}

#[cfg(test)]
mod tests {
    use nix::fcntl::FlockArg;

    use super::*;

    /// A power cut does not empty it.
    #[test]
    fn a_folder_that_is_no_memory_has_no_sessions() {
        let lasting = File::open("/proc").expect("every Linux has it");
        assert_eq!(refuse_lasting(&lasting).expect_err("it is no tmpfs").kind(), Kind::Unsupported);
    }

    /// The memory of a session is given back with its last user: a disk that grows gets a new one each time.
    #[test]
    fn a_session_is_mapped_as_long_as_something_uses_it() {
        let folder = folder_in_memory();
        let path = folder.path().join("words");
        let file = File::create_new(&path).expect("room in memory");
        file.set_len(PAGE_BYTES as u64).expect("an empty file");
        let file = File::options().read(true).write(true).open(&path).expect("just made");
        let is_mapped = || {
            let maps = std::fs::read_to_string("/proc/self/maps").expect("every Linux has it");
            maps.lines().any(|line| line.ends_with(path.to_str().expect("ASCII")))
        };
        let words = shared_words(&file, HEADER_WORDS).expect("mapped");
        let user = words.clone();
        drop((words, file));
        assert!(is_mapped() && user.len() == HEADER_WORDS);
        drop(user);
        assert!(!is_mapped());
    }

    /// What is read on after the end of its session takes no room there, and only what it was in private.
    #[test]
    fn what_a_session_held_is_still_read_when_its_room_is_given_back() {
        let folder = folder_in_memory();
        let file = tempfile::tempfile_in(folder.path()).expect("room in memory");
        let count = 64 * HEADER_WORDS + 1;
        file.set_len((count * size_of::<AtomicU64>()) as u64).expect("an empty file");
        let blocks = file.try_clone().expect("a descriptor");
        let blocks = || std::os::unix::fs::MetadataExt::blocks(&blocks.metadata().expect("open"));
        let locked = Flock::lock(file, FlockArg::LockExclusiveNonblock).expect("nothing else has it");
        let reserved = Reserved { file: Arc::new(locked), share: Share::of_new() };
        reserved.reserve(0..count).expect("room in memory");
        let memory = reserved.clone().map(count).expect("mapped");
        let words = memory.shared_words().expect("shared").clone();
        for place in [0, 5, 3 * HEADER_WORDS + 7, count - 1] {
            words[place].store(place as u64 + 1, Ordering::Relaxed);
        }
        assert!(blocks() > 0);
        let reader = {
            let words = words.clone();
            std::thread::spawn(move || (0..100_000).all(|_| words[5].load(Ordering::Acquire) == 6))
        };
        reserved.release(&memory).expect("released");
        assert_eq!(blocks(), 0);
        for (place, word) in words.iter().enumerate() {
            let stored = [0, 5, 3 * HEADER_WORDS + 7, count - 1].contains(&place);
            assert_eq!(word.load(Ordering::Relaxed), if stored { place as u64 + 1 } else { 0 });
        }
        assert_eq!(blocks(), 0, "it is not read from there");
        assert!(reader.join().expect("no panic"), "it was there all the time");
    }

    /// A session that replaces another one asks for nothing once it stands by, however full /run is by then:
    /// the image has changed in between.
    #[test]
    fn what_is_claimed_is_not_refused_later() {
        let folder = folder_in_memory();
        let file = tempfile::tempfile_in(folder.path()).expect("room in memory");
        file.set_len(2 * PAGE_BYTES as u64).expect("an empty file");
        let locked = Flock::lock(file, FlockArg::LockExclusiveNonblock).expect("nothing else has it");
        let reserved = Reserved { file: Arc::new(locked), share: Share::of_new() };
        reserved.reserve(0..2 * HEADER_WORDS).expect("room in memory");
        // As if others had taken the rest.
        reserved.share.0.store(1, Ordering::Relaxed);
        assert!(reserved.reserve(0..HEADER_WORDS).is_err());
        reserved.share.claim();
        reserved.reserve(0..2 * HEADER_WORDS).expect("it is there");
    }

    /// A search takes no memory for what was only reserved.
    #[test]
    fn what_was_written_is_found_and_what_was_reserved_is_not() {
        let page = HEADER_WORDS;
        let folder = folder_in_memory();
        let file = tempfile::tempfile_in(folder.path()).expect("room in memory");
        let length = 64 * PAGE_BYTES;
        file.set_len(length as u64).expect("an empty file");
        fallocate(&file, FallocateFlags::empty(), 0, length.try_into().expect("short")).expect("room");
        let words = shared_words(&file, 64 * page).expect("mapped");
        for place in [3 * page + 7, 4 * page, 63 * page + page - 1] {
            words[place].store(1, Ordering::Relaxed);
        }
        let locked = Flock::lock(file, FlockArg::LockExclusiveNonblock).expect("nothing else has it");
        let written = written_in(Arc::new(locked));
        assert_eq!(written(0..64 * page), Some(3 * page..5 * page));
        assert_eq!(written(4 * page..4 * page + 9), Some(4 * page..4 * page + 9));
        assert_eq!(written(5 * page..64 * page), Some(63 * page..64 * page));
        assert_eq!(written(5 * page..63 * page), None);
    }
}
