//! Session files: memory in `/run/vhdx-ublk/` that outlives a killed daemon.
//!
//! One per image that is served for writing with recovery. It gets its name when it is complete, and goes
//! away when the image was closed cleanly. One whose device is gone is an *orphan*: the next writable open
//! takes it over.
//!
//! * Its name is the image's inode, disk id and `st_dev`. It is looked for by the first two: another mount
//!   may have changed the third. A file that is another one by its path, as on a snapshot of the whole file
//!   system, keeps its own.
//! * It has to be gone after a power cut: its folder is memory (tmpfs), or there is no session; and it names
//!   the kernel's boot id.
//! * The process that serves with it has it locked (`flock`), until the last thread of a killed one has ended.
//! * Room is reserved before it is touched: a store into memory that the file system cannot provide would
//!   kill the daemon. A part of the file system stays free, so that a guest cannot fill it.

mod choice;
mod list;

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, Flock, FlockArg, fallocate};
use nix::sys::statfs::{self, fstatfs};
use nix::sys::statvfs::fstatvfs;
use nix::unistd::linkat;
use uuid::Uuid;

pub(super) use choice::choose;
pub use choice::{Plan, refuse_orphan};
pub use list::{Kept, KeptState, discard, kept};

#[cfg(test)]
mod orphans;

use super::region::shared_words;
use super::registry::{FILE_MODE, RUN_DIRECTORY, Registry};
use crate::disk::{ImageFile, PAGE_BYTES};
use crate::error::{Error, Kind, Result};
use crate::format::bat::Geometry;
use crate::image::{HEADER_WORDS, Image, Place, SessionMemory};

/// How many parts of its file system a new session leaves one of free: so do other devices, their entries and
/// logs.
const NEW_LEAVES_ONE_OF: u64 = 8;

/// The same of a session that grows as its guest writes: no guest keeps other devices from having sessions.
const GROWING_LEAVES_ONE_OF: u64 = 4;

/// What was reserved before is there: a successor needs it.
const LEAVES_NOTHING: u64 = 0;

/// `RAMFS_MAGIC` of `linux/magic.h`, which `nix` does not have.
const RAMFS_MAGIC: u64 = 0x8584_58f6;

const SUFFIX: &str = ".session";

/// Where session files are.
#[derive(Clone, Debug)]
pub(super) struct Sessions {
    directory: PathBuf,
}

/// What a session file is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Name {
    inode: u64,
    disk_id: Uuid,
    device: u64,
}

impl Name {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.strip_suffix(SUFFIX)?.split('-');
        let hexadecimal = |part: Option<&str>| u64::from_str_radix(part?, 16).ok();
        let (inode, disk_id, device) = (parts.next(), parts.next(), parts.next());
        let disk_id = disk_id.filter(|part| part.len() == 32)?.parse().ok()?;
        parts.next().is_none().then_some(Self {
            inode: hexadecimal(inode)?,
            disk_id,
            device: hexadecimal(device)?,
        })
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:x}-{}-{:x}{SUFFIX}", self.inode, self.disk_id.simple(), self.device)
    }
}

/// A session file.
#[derive(Debug)]
pub(super) struct SessionFile {
    path: PathBuf,
    /// The file while it has no name.
    unnamed: Option<Arc<Flock<File>>>,
    /// By this process, which may give it up; not by one that was killed.
    made_here: bool,
    /// See [`Reserved`].
    leaves_one_of: Arc<AtomicU64>,
}

/// A session file with its memory.
pub(super) type FoundSession = (SessionFile, SessionMemory);

/// A session file as it is found.
pub(super) enum Found {
    /// Its memory.
    Free(SessionFile, SessionMemory),
    /// A living process uses it. Its memory, for a look, if it has any yet.
    Held(Option<SessionMemory>),
    /// It is shorter than any session.
    Short(SessionFile),
}

impl Sessions {
    /// The machine's.
    pub(super) fn of_machine() -> Self {
        Self { directory: RUN_DIRECTORY.into() }
    }

    #[cfg(test)]
    pub(super) fn at(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// The names of all session files. A caller that may not look sees none.
    fn names(&self) -> Result<Vec<Name>> {
        let failed = |error| Error::io("reading the directory of sessions", error).file(&self.directory);
        let items = match fs::read_dir(&self.directory) {
            Ok(items) => items,
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => {
                return Ok(Vec::new());
            }
            Err(error) => return Err(failed(error)),
        };
        let mut names = Vec::new();
        for item in items {
            names.extend(item.map_err(failed)?.file_name().to_str().and_then(Name::parse));
        }
        names.sort_by_key(|name| (name.inode, name.device));
        Ok(names)
    }

    /// The session of the image at `place`, if there is one; `image` is how it looks, if that is known. One that
    /// was made under another device number, as before its file system was mounted anew, comes last if it does not
    /// fit, or if that is not known: a repair would give away the space that only the session names.
    pub(super) fn find(&self, place: &Place, image: Option<&Image>) -> Result<Option<Found>> {
        let disk_id = image.map(|image| image.metadata.disk_id);
        let mut names = self.names()?;
        names.retain(|name| name.inode == place.inode && disk_id.is_none_or(|id| id == name.disk_id));
        // The one that was made under this mount first.
        names.sort_by_key(|name| name.device != place.device);
        let mut unfit = None;
        for name in names {
            let is_elsewhere = name.device != place.device;
            match self.open(&name)? {
                Some(Found::Free(file, memory)) if is_another(&name, place, &memory) => {
                    tracing::debug!("{} is another file's", file.path.display());
                }
                Some(Found::Free(file, memory)) if is_elsewhere && !choice::fits(&memory, image, place) => {
                    unfit.get_or_insert(Found::Free(file, memory));
                }
                Some(found) => return Ok(Some(found)),
                None => {}
            }
        }
        Ok(unfit)
    }

    /// The session that was made of the file `inode` of `device`.
    pub(super) fn of_file(&self, device: u64, inode: u64) -> Result<Option<Found>> {
        let name = self.names()?.into_iter().find(|name| (name.device, name.inode) == (device, inode));
        name.map_or(Ok(None), |name| self.open(&name))
    }

    fn open(&self, name: &Name) -> Result<Option<Found>> {
        let path = self.directory.join(name.to_string());
        let failed = |doing: &'static str| {
            let path = &path;
            move |error| Error::io(doing, error).file(path)
        };
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("opening the session file")(error)),
        };
        let length = file.metadata().map_err(failed("looking at the session file"))?.len();
        let count = usize::try_from(length).unwrap_or(0) / size_of::<AtomicU64>();
        let is_short = count < HEADER_WORDS;
        let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) => file,
            Err(_) if is_short => return Ok(Some(Found::Held(None))),
            Err((file, _)) => {
                let words = shared_words(&file, count).map_err(failed("mapping the session file"))?;
                let none = Arc::new(|_| Err(ErrorKind::ReadOnlyFilesystem.into()));
                return Ok(Some(Found::Held(Some(SessionMemory::shared(words, none)))));
            }
        };
        let leaves_one_of = Arc::new(AtomicU64::new(LEAVES_NOTHING));
        let reserved = Reserved { file: Arc::new(file), leaves_one_of: leaves_one_of.clone() };
        let session = SessionFile { path: path.clone(), unnamed: None, made_here: false, leaves_one_of };
        if is_short {
            return Ok(Some(Found::Short(session)));
        }
        let memory = reserved.map(count).map_err(failed("mapping the session file"))?;
        Ok(Some(Found::Free(session, memory)))
    }

    /// Makes a session file for a map of `geometry`, with all the room it needs. It has no name yet.
    pub(super) fn create(&self, place: &Place, disk_id: Uuid, geometry: &Geometry) -> Result<FoundSession> {
        Registry::at(&self.directory)?;
        let name = Name { inode: place.inode, disk_id, device: place.device };
        let path = self.directory.join(name.to_string());
        let failed = |doing: &'static str| {
            let path = &path;
            move |error| Error::io(doing, error).file(path)
        };
        let directory = File::open(&self.directory).map_err(failed("opening the directory of sessions"))?;
        refuse_lasting(&directory).map_err(|error| error.file(&self.directory))?;
        let flags = libc::O_TMPFILE;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .mode(FILE_MODE)
            .open(&self.directory);
        let file = file.map_err(failed("making the session file"))?;
        let locked = Flock::lock(file, FlockArg::LockExclusiveNonblock);
        let file = Arc::new(locked.map_err(|(_, errno)| failed("locking the session file")(errno.into()))?);
        let leaves_one_of = Arc::new(AtomicU64::new(NEW_LEAVES_ONE_OF));
        let reserved = Reserved { file: file.clone(), leaves_one_of: leaves_one_of.clone() };
        let (needed, count) = (SessionMemory::reserved_words(geometry), SessionMemory::words_for(geometry));
        let memory = file
            .set_len((count * size_of::<AtomicU64>()) as u64)
            .and_then(|()| reserved.reserve(0..needed))
            .and_then(|()| reserved.map(count))
            .map_err(failed("reserving room for the session"))?;
        Ok((SessionFile { path: path.clone(), unnamed: Some(file), made_here: true, leaves_one_of }, memory))
    }

    /// The host has said that it lost data of the file system of the image at `place`, and will not say so
    /// again: the sessions of other images there, whose data may be meant, must not be taken over on the word
    /// of a sync.
    pub(super) fn spread_doubt(&self, place: &Place) -> Result<()> {
        let mut names = self.names()?;
        names.retain(|name| name.device == place.device && name.inode != place.inode);
        for name in names {
            match self.open(&name)? {
                Some(Found::Free(_, memory) | Found::Held(Some(memory)))
                    if memory.check_layout().is_ok() && memory.used_page_cache() =>
                {
                    memory.leave_in_doubt();
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes sessions of images whose inode the image `disk_id` at `place` has now: they are gone.
    pub(super) fn give_up_replaced(&self, place: &Place, disk_id: Uuid) -> Result<()> {
        let mut names = self.names()?;
        names.retain(|name| {
            (name.inode, name.device) == (place.inode, place.device) && name.disk_id != disk_id
        });
        for name in names {
            if let Some(Found::Free(session, memory)) = self.open(&name)?
                && memory.check_layout().is_ok()
                // A number of a device is used again, for another file system.
                && memory.place().file_system == place.file_system
                && place.file_system != 0
            {
                let path = memory.place().path;
                tracing::warn!(
                    "the session of {} is given up: this is a new image in its place",
                    path.display()
                );
                session.remove()?;
            }
        }
        Ok(())
    }
}

impl SessionFile {
    /// Gives it its name: it is complete. What the session takes from now on, it takes as its guest writes.
    pub(super) fn publish(&mut self) -> Result<()> {
        if let Some(file) = self.unnamed.take() {
            let link = format!("/proc/self/fd/{}", file.as_raw_fd());
            let named = linkat(AT_FDCWD, link.as_str(), AT_FDCWD, &self.path, AtFlags::AT_SYMLINK_FOLLOW);
            named.map_err(|errno| Error::io("naming the session file", errno.into()).file(&self.path))?;
        }
        self.leaves_one_of.store(GROWING_LEAVES_ONE_OF, Ordering::Relaxed);
        Ok(())
    }

    fn name(&self) -> Option<Name> {
        Name::parse(self.path.file_name()?.to_str()?)
    }

    /// Whether it was made under another device number than the image at `place` has now: it may be another
    /// image's, on another file system.
    fn is_elsewhere(&self, place: &Place) -> bool {
        self.name().is_some_and(|name| name.device != place.device)
    }

    /// Removes it, unless it may be another image's: inode and disk id of an image are what its maker chooses.
    fn remove_own(self, place: &Place) -> Result<()> {
        if self.is_elsewhere(place) {
            let path = self.path.display();
            tracing::warn!("{path} stays, it may be another image's: see `vhdx-ublk session list`");
            return Ok(());
        }
        self.remove()
    }

    /// Removes it: the image needs it no more.
    pub(super) fn remove(self) -> Result<()> {
        match fs::remove_file(&self.path) {
            _ if self.unnamed.is_some() => Ok(()),
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::io("removing the session file", error).file(&self.path))
            }
            _ => Ok(()),
        }
    }

    /// Removes it if this process made it and has not used it.
    pub(super) fn abandon(self) -> Result<()> {
        if self.made_here { self.remove() } else { Ok(()) }
    }

    /// The way out when it can neither be taken over nor left alone.
    pub(super) fn with_remedy(&self, error: Error) -> Error {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        error.remedy(format!(
            "`vhdx-ublk session discard {name}` gives up what was acknowledged and not flushed; what was flushed is safe in the image"
        ))
    }
}

/// Where the image in `file` is, since this start of the kernel.
///
/// # Errors
///
/// What the host says; when `/proc` does not say which start this is.
pub(super) fn place_of(file: &ImageFile) -> Result<Place> {
    let failed = |error| Error::io("looking at the image's file system", error).file(file.path());
    let file_system = fstatvfs(file).map_err(|errno| failed(errno.into()))?.filesystem_id();
    Ok(Place {
        boot: boot_id()?,
        inode: file.inode(),
        device: file.device(),
        file_system,
        path: file.path().to_owned(),
    })
}

/// Which start of the kernel this is.
fn boot_id() -> Result<Uuid> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let failed = |error| Error::io("asking for the kernel's boot id", error).file(Path::new(PATH));
    let text = fs::read_to_string(PATH).map_err(failed)?;
    text.trim().parse().map_err(|error| failed(io::Error::new(ErrorKind::InvalidData, error)))
}

/// A session is of no use after a power cut, and must not be there then.
fn refuse_lasting(directory: &File) -> Result<()> {
    let found = fstatfs(directory).map_err(|errno| Error::io("looking at its file system", errno.into()))?;
    let kind = found.filesystem_type();
    let is_memory =
        kind == statfs::TMPFS_MAGIC || u64::try_from(kind.0).is_ok_and(|kind| kind == RAMFS_MAGIC);
    if is_memory {
        return Ok(());
    }
    let message = "it is no tmpfs: a session file in it would outlive a power cut";
    Err(Error::new(Kind::Unsupported, message).remedy("mount a tmpfs on /run"))
}

/// Whether the session `name`, whose `memory` this is, belongs to a file that is not the one at `place`: it
/// was made under another mount, and its image still is where it was.
fn is_another(name: &Name, place: &Place, memory: &SessionMemory) -> bool {
    if name.device == place.device || memory.check_layout().is_err() {
        return false;
    }
    let of_session = fs::metadata(memory.place().path);
    of_session.is_ok_and(|found| (found.dev(), found.ino()) == (name.device, name.inode))
}

/// A session's file, and how much of its file system it leaves free.
#[derive(Clone)]
struct Reserved {
    file: Arc<Flock<File>>,
    /// One part of so many, or nothing.
    leaves_one_of: Arc<AtomicU64>,
}

impl Reserved {
    fn map(self, count: usize) -> io::Result<SessionMemory> {
        let words = shared_words(&self.file, count)?;
        Ok(SessionMemory::shared(words, Arc::new(move |range| self.reserve(range))))
    }

    /// Makes room for a range of words.
    fn reserve(&self, words: Range<usize>) -> io::Result<()> {
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

    /// How many bytes may be taken, if not as many as there are.
    fn left_free(&self) -> io::Result<Option<u64>> {
        let parts = self.leaves_one_of.load(Ordering::Relaxed);
        if parts == LEAVES_NOTHING {
            return Ok(None);
        }
        let found = fstatvfs(self.file.as_fd())?;
        // A ramfs has no bounds, and says that it has no blocks.
        if found.blocks() == 0 {
            return Ok(None);
        }
        let kept = found.blocks() / parts;
        Ok(Some(found.blocks_available().saturating_sub(kept).saturating_mul(found.fragment_size())))
    }
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
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_name_is_read_as_it_is_written(inode: u64, disk: u128, device: u64) {
            let name = Name { inode, disk_id: Uuid::from_u128(disk), device };
            prop_assert_eq!(Name::parse(&name.to_string()), Some(name));
        }
    }

    /// A power cut does not empty it.
    #[test]
    fn a_folder_that_is_no_memory_has_no_sessions() {
        let lasting = File::open("/proc").expect("every Linux has it");
        assert_eq!(refuse_lasting(&lasting).expect_err("it is no tmpfs").kind(), Kind::Unsupported);
    }

    #[test]
    fn other_files_of_the_folder_are_no_sessions() {
        for text in
            ["0.json", "0.log", "1-2.session", "1-2-3.session", "x.session", ".session", "1-0-1-1.session"]
        {
            assert_eq!(Name::parse(text), None, "{text}");
        }
    }
}
