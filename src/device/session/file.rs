//! Session files: found, opened, made, named, removed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, Flock, FlockArg, renameat};
use nix::unistd::linkat;
use uuid::Uuid;

use super::name::Name;
use super::obstacle::Obstacle;
use super::origin::is_another;
use super::room::{Reserved, Share, refuse_lasting};
use crate::device::region::shared_words;
use crate::device::registry::{FILE_MODE, RUN_DIRECTORY, Registry};
use crate::error::{Doing, Error, Locate, Result};
use crate::format::bat::Geometry;
use crate::image::{HEADER_WORDS, Image, Place, SessionMemory};
use crate::machine;
use crate::simulation::{Plant, planted};

/// The folder of session files.
#[derive(Clone, Debug)]
pub(in crate::device) struct Sessions {
    directory: PathBuf,
}

/// A session file.
#[derive(Debug)]
pub(in crate::device) struct SessionFile {
    path: PathBuf,
    naming: Naming,
    /// This process made it and may give it up, unlike one of a killed process.
    made_here: bool,
    reserved: Reserved,
}

/// How far a session file has its name.
#[derive(Debug)]
enum Naming {
    /// It has none.
    None(Arc<Flock<File>>),
    /// It has the one by which it waits for its own.
    Next,
    Own,
}

/// A session file with its memory.
pub(in crate::device) type FoundSession = (SessionFile, SessionMemory);

/// A session file as it is found.
pub(in crate::device) enum Found {
    /// No process uses it. Its memory.
    Free(SessionFile, SessionMemory),
    /// A running process uses it. Its memory, to look at, if it has any yet.
    Held(Option<SessionMemory>),
    /// It is shorter than any session.
    Short(SessionFile),
}

impl Sessions {
    /// The machine's.
    pub(in crate::device) fn of_machine() -> Self {
        Self { directory: machine::run_folder(RUN_DIRECTORY).into() }
    }

    /// Those in the folder of `registry`.
    pub(super) fn of(registry: &Registry) -> Self {
        Self { directory: registry.directory().into() }
    }

    #[cfg(test)]
    pub(in crate::device) fn at(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// The registry in the same folder.
    pub(super) fn registry(&self) -> Result<Registry> {
        Registry::at(&self.directory)
    }

    pub(super) fn path_of(&self, name: &Name) -> PathBuf {
        self.directory.join(name.to_string())
    }

    /// The names of all session files: none if the caller may not read the folder.
    pub(super) fn names(&self) -> Result<Vec<Name>> {
        let failed = "reading the directory of sessions";
        let items = match fs::read_dir(&self.directory) {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => {
                return Ok(Vec::new());
            }
            items => items.doing(failed).file(&self.directory)?,
        };
        let mut names = Vec::new();
        for item in items {
            let item = item.doing(failed).file(&self.directory)?;
            names.extend(item.file_name().to_str().and_then(Name::parse));
        }
        names.sort_by_key(|name| (name.inode, name.device));
        Ok(names)
    }

    /// The session of the image at `place`, if there is one; `image` is the image as it was read, if it could
    /// be. A session that was made under another device number, as before a new mount of its file system,
    /// comes last if it does not fit, or if that is not known: a repair would give away the space that only
    /// the session names.
    pub(in crate::device) fn find(&self, place: &Place, image: Option<&Image>) -> Result<Option<Found>> {
        let disk_id = image.map(|image| image.metadata.disk_id);
        let mut names = self.names()?;
        names.retain(|name| name.inode == place.inode && disk_id.is_none_or(|id| id == name.disk_id));
        // The one that was made under this mount first.
        names.sort_by_key(|name| name.device != place.device);
        let mut unfit = None;
        for name in names {
            let is_elsewhere = name.device != place.device;
            let fits = |memory: &SessionMemory| Obstacle::of(memory, image, place).is_none();
            match self.open(&name)? {
                Some(Found::Free(file, memory)) if is_another(&name, place, &memory) => {
                    tracing::debug!("{} belongs to another file", file.path.display());
                }
                Some(Found::Free(file, memory)) if is_elsewhere && !fits(&memory) => {
                    unfit.get_or_insert(Found::Free(file, memory));
                }
                Some(found) => return Ok(Some(found)),
                None => {}
            }
        }
        Ok(unfit)
    }

    /// The session that was made of the file `inode` of `device`.
    pub(in crate::device) fn of_file(&self, device: u64, inode: u64) -> Result<Option<Found>> {
        let name = self.names()?.into_iter().find(|name| (name.device, name.inode) == (device, inode));
        name.map_or(Ok(None), |name| self.open(&name))
    }

    /// Whether a running process uses it.
    pub(super) fn is_held(&self, name: &Name) -> Result<bool> {
        let path = self.path_of(name);
        let file = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
            file => file.doing("opening the session file").file(&path)?,
        };
        Ok(Flock::lock(file, FlockArg::LockExclusiveNonblock).is_err())
    }

    pub(super) fn open(&self, name: &Name) -> Result<Option<Found>> {
        let path = self.path_of(name);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            file => file.doing("opening the session file").file(&path)?,
        };
        let length = file.metadata().doing("looking at the session file").file(&path)?.len();
        let count = usize::try_from(length).unwrap_or(0) / size_of::<AtomicU64>();
        let is_short = count < HEADER_WORDS;
        let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) if has_name(&file).doing("looking at the session file").file(&path)? => file,
            // It was removed, or replaced, before it was locked.
            Ok(_) => return Ok(None),
            Err(_) if is_short => return Ok(Some(Found::Held(None))),
            Err((file, _)) => {
                let words = shared_words(&file, count).doing("mapping the session file").file(&path)?;
                let none = Arc::new(|_| Err(ErrorKind::ReadOnlyFilesystem.into()));
                let memory = SessionMemory::shared(words, none, Arc::new(Some));
                return Ok(Some(Found::Held(Some(memory))));
            }
        };
        let reserved = Reserved { file: Arc::new(file), share: Share::of_found() };
        let (naming, kept) = (Naming::Own, reserved.clone());
        let session = SessionFile { path, naming, made_here: false, reserved: kept };
        if is_short {
            return Ok(Some(Found::Short(session)));
        }
        let memory = reserved.map(count).doing("mapping the session file").file(&session.path)?;
        Ok(Some(Found::Free(session, memory)))
    }

    /// Makes a session file for a map of `geometry`, with all the room that it needs. It has no name yet.
    pub(in crate::device) fn create(
        &self,
        place: &Place,
        disk_id: Uuid,
        geometry: &Geometry,
    ) -> Result<FoundSession> {
        self.registry()?;
        let path = self.path_of(&Name { inode: place.inode, disk_id, device: place.device });
        let directory = File::open(&self.directory).doing("opening the directory of sessions").file(&path)?;
        refuse_lasting(&directory).file(&self.directory)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .mode(FILE_MODE)
            .open(&self.directory);
        let file = file.doing("making the session file").file(&path)?;
        let locked = Flock::lock(file, FlockArg::LockExclusiveNonblock);
        let locked = locked.map_err(|(_, errno): (_, Errno)| errno);
        let file = Arc::new(locked.doing("locking the session file").file(&path)?);
        let reserved = Reserved { file: file.clone(), share: Share::of_new() };
        let kept = reserved.clone();
        let (needed, count) = (SessionMemory::reserved_words(geometry), SessionMemory::words_for(geometry));
        assert!(needed <= count, "{needed} words of {count} are reserved");
        let memory = file
            .set_len((count * size_of::<AtomicU64>()) as u64)
            .and_then(|()| reserved.reserve(0..needed))
            .and_then(|()| reserved.map(count))
            .doing("reserving room for the session")
            .file(&path)?;
        Ok((SessionFile { path, naming: Naming::None(file), made_here: true, reserved: kept }, memory))
    }

    /// The host has reported that it lost data of the file system of the image at `place`, and will not
    /// report it again. The loss may concern the sessions of other images there: they must not be taken over
    /// because a sync succeeds.
    pub(in crate::device) fn spread_doubt(&self, place: &Place) -> Result<()> {
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

    /// Removes sessions of images that no longer exist: the image `disk_id` at `place` has their inode.
    pub(super) fn give_up_replaced(&self, place: &Place, disk_id: Uuid) -> Result<()> {
        let mut names = self.names()?;
        names.retain(|name| {
            (name.inode, name.device) == (place.inode, place.device) && name.disk_id != disk_id
        });
        for name in names {
            if let Some(Found::Free(session, memory)) = self.open(&name)?
                && memory.check_layout().is_ok()
                // Device numbers are used again, for other file systems.
                && memory.place().file_system == place.file_system
                && place.file_system != 0
            {
                let path = memory.place().path;
                let path = path.display();
                tracing::warn!("the session of {path} is given up: a new image has its inode");
                session.remove()?;
            }
        }
        Ok(())
    }
}

impl SessionFile {
    /// Gives the complete file its name. From now on the session grows as its guest writes.
    ///
    /// Another file that has the name is the session of the disk before it grew: it holds nothing that the
    /// image does not, and is replaced in one step, so that a kill leaves one of the two. Only then is the
    /// new one named twice: whoever removes the old one removes both.
    pub(in crate::device) fn publish(&mut self) -> Result<()> {
        machine::turn("names its session");
        if !planted(Plant::SecondName) {
            self.take_free_name().doing("naming the session file").file(&self.path)?;
        }
        self.stand_by()?;
        machine::turn("puts its session in the place of another");
        if let Naming::Next = self.naming {
            let named = renameat(AT_FDCWD, &self.next(), AT_FDCWD, &self.path);
            named.doing("naming the session file").file(&self.path)?;
            self.naming = Naming::Own;
        }
        self.reserved.share.grow();
        Ok(())
    }

    /// Ends the reservations: all room that it needs until it is published is claimed, and neither what is
    /// stored in it by then nor [`Self::publish`] fails for want of any.
    pub(in crate::device) fn stand_by(&mut self) -> Result<()> {
        if let Naming::None(file) = &self.naming {
            let named = self.remove_next().and_then(|()| Ok(link(file, &self.next())?));
            named.doing("naming the session file").file(&self.path)?;
            self.naming = Naming::Next;
        }
        self.reserved.share.claim();
        Ok(())
    }

    /// Gives the file its name, unless it has one, or another file has that.
    fn take_free_name(&mut self) -> io::Result<()> {
        let Naming::None(file) = &self.naming else { return Ok(()) };
        match link(file, &self.path) {
            Ok(()) => self.naming = Naming::Own,
            Err(Errno::EEXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(())
    }

    /// The name that a file has before it replaces the one with this name.
    fn next(&self) -> PathBuf {
        let mut next = self.path.clone().into_os_string();
        next.push(".next");
        next.into()
    }

    /// A kill may have left a file with that name.
    fn remove_next(&self) -> io::Result<()> {
        match fs::remove_file(self.next()) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    pub(super) fn name(&self) -> Option<Name> {
        Name::parse(self.path.file_name()?.to_str()?)
    }

    /// Whether it was made under another device number than the image at `place` has now: it may belong to an
    /// image on another file system.
    pub(super) fn is_elsewhere(&self, place: &Place) -> bool {
        self.name().is_some_and(|name| name.device != place.device)
    }

    /// Removes it, unless it may belong to another image, whose maker can choose any inode and disk id.
    pub(super) fn remove_own(self, place: &Place) -> Result<()> {
        if self.is_elsewhere(place) {
            let path = self.path.display();
            tracing::warn!("{path} stays, it may belong to another image: see `vhdx-ublk session list`");
            return Ok(());
        }
        self.remove()
    }

    /// Removes it: the image no longer needs it.
    pub(in crate::device) fn remove(self) -> Result<()> {
        machine::turn("removes the session");
        let is_named = matches!(self.naming, Naming::Own);
        let removed = self.remove_next();
        match removed.and_then(|()| if is_named { fs::remove_file(&self.path) } else { Ok(()) }) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            removed => removed.doing("removing the session file").file(&self.path),
        }
    }

    /// Removes it, and gives back the room of `memory`, which is in it, although that is still read: private
    /// memory, which takes only what was stored, is in its place then. Nothing stores to it any longer.
    pub(in crate::device) fn retire(self, memory: &SessionMemory) -> Result<()> {
        let (path, reserved) = (self.path.clone(), self.reserved.clone());
        self.remove()?;
        reserved.release(memory).doing("giving back the room of the session").file(&path)
    }

    /// Removes it if this process made it and has not used it.
    pub(in crate::device) fn abandon(self) -> Result<()> {
        if self.made_here { self.remove() } else { Ok(()) }
    }

    /// Adds what to do if it can neither be taken over nor left alone.
    pub(in crate::device) fn with_remedy(&self, error: Error) -> Error {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        error.remedy(format!(
            "`vhdx-ublk session discard {name}` gives up what was acknowledged and not flushed; flushed \
             data is safe in the image"
        ))
    }
}

/// Gives a file that has no name this one, which is free.
fn link(file: &File, path: &Path) -> nix::Result<()> {
    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(AT_FDCWD, unnamed.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)
}

/// Whether the file has a name: one that was removed has none.
fn has_name(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.nlink() > 0)
}
