//! An image's file: the open file description that carries its lock and serves every ring, and others for
//! syncs.
//!
//! Linux reports a write that it has accepted and lost once per description. A durable write of a queue is
//! told by the description of the rings, and a sync by that one right behind it would succeed; so the engine
//! syncs by one that nothing else uses, and so does each queue. They carry the lock, too: while anything of a
//! dead process is under way on one of them, a sync that fails included, no other process has the file.
//!
//! Invariants:
//!
//! * the lock is held before the first byte is read, and as long as anything may still touch the file;
//! * the file is a regular one, and still the one its path names when the lock is ours;
//! * opening and reading leave no trace, access time included, where the kernel lets us choose.

use std::fs::{self, File};
use std::io;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, PosixFadviseAdvice, fallocate, fcntl, posix_fadvise};
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, TMPFS_MAGIC, fstatfs};
use nix::sys::statvfs::{Statvfs, fstatvfs, statvfs};
use nix::unistd::{Gid, Uid, Whence, fchown, fdatasync, lseek};

use super::open::{Links, Opened, open_again, open_regular};
use super::ring::{DirectAlignment, direct_alignment};
use super::sparse::{self, Host, Sparse};
use super::{Access, Buffer, HostFile, lock};
use crate::error::{Error, Kind, Result};
use crate::simulation::{Plant, planted};

/// XFS; `nix` has the number for glibc only.
pub(super) const XFS_SUPER_MAGIC: FsType = FsType(0x5846_5342);

/// File systems that write to a new place what is overwritten, by the numbers in their `statfs` (ZFS and
/// bcachefs are not in the kernel's own headers).
const COPYING_HOSTS: [(FsType, &str); 3] =
    [(FsType(0x9123_683e), "btrfs"), (FsType(0xca45_1a4e), "bcachefs"), (FsType(0x2fc1_2fc1), "ZFS")];

/// File systems whose server may keep a failed write with the handle that it came by, and tell only a sync of
/// that one, beside SMB: FUSE, NFS, 9P and Ceph.
const HOSTS_WITH_HANDLES: [FsType; 4] =
    [FsType(0x6573_5546), FsType(0x6969), FsType(0x0102_1997), FsType(0x00c3_6400)];

/// The space that a file takes on its host, bytes: less than its length if it has holes.
pub fn host_bytes(found: &fs::Metadata) -> u64 {
    // The unit of `st_blocks`, whatever the file system's own block size.
    found.blocks() * 512
}

/// Whether Windows will refuse `file` for its holes: it is marked for them, or, where the host does not show
/// the mark, has some on a host that marks files.
///
/// # Errors
///
/// What the operating system says.
pub fn is_sparse_for_windows(file: &File) -> io::Result<bool> {
    if Host::of(file) == Host::Plain {
        return Ok(false);
    }
    if let Some(marked) = sparse::is_marked(file) {
        return Ok(marked);
    }
    let found = file.metadata()?;
    Ok(host_bytes(&found) < found.len())
}

/// An open, locked image file.
///
/// Its drop gives the lock back. So whoever does I/O on its descriptor shares the ownership until that I/O
/// has ended, as [`super::UringDisk`] does, and a process that forks drops it on one side only. When the
/// process dies instead, the kernel keeps the lock until the last I/O has ended.
#[derive(Debug)]
pub struct ImageFile {
    file: File,
    /// The other description, if it may be written.
    syncing: Option<File>,
    /// Those by which the queues sync that serve it.
    queues: Mutex<Vec<File>>,
    /// The host may report a failed write only to a sync of the description that the write went through.
    keeps_errors_by_handle: bool,
    /// What its host does with holes.
    host: Host,
    /// Whether it may get holes, if the user has a wish.
    sparse: OnceLock<Sparse>,
    path: PathBuf,
    access: Access,
    identity: HostFile,
}

/// Another description of the locked `file`, with its lock.
fn open_to_sync(file: &File, identity: HostFile) -> Result<File> {
    let other = open_again(file, Access::ReadWrite)?;
    let found = other.metadata().map_err(|error| Error::io("looking at the image", error))?;
    if HostFile::of(&found) != identity {
        return Err(
            Error::new(Kind::Io, "/proc/self/fd leads to another file").remedy("mount -t proc proc /proc")
        );
    }
    lock::join(&other, Access::ReadWrite)?;
    Ok(other)
}

/// Where the next stored bytes lie, at `offset` or behind it; nothing if the rest of the file is a hole.
/// A host that does not know where its holes are says `offset`.
///
/// # Errors
///
/// What the operating system says.
pub(crate) fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    let from = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    // Every other access to the file names its offset: the position this moves means nothing.
    match lseek(file, from, Whence::SeekData) {
        Ok(found) if found >= from => Ok(Some(found.cast_unsigned())),
        Ok(_) => Err(io::ErrorKind::InvalidData.into()),
        Err(Errno::ENXIO) => Ok(None),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(Some(offset)),
        Err(errno) => Err(errno.into()),
    }
}

/// Where the stored bytes that begin at `offset` end: at the next hole, or at the end of the file. Hosts that
/// do not know have no holes.
///
/// # Errors
///
/// What the operating system says.
pub(crate) fn next_hole(file: &File, offset: u64) -> io::Result<u64> {
    let from = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    match lseek(file, from, Whence::SeekHole) {
        Ok(found) if found >= from => Ok(found.cast_unsigned()),
        Ok(_) => Err(io::ErrorKind::InvalidData.into()),
        Err(Errno::ENXIO) => Ok(offset),
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(u64::MAX),
        Err(errno) => Err(errno.into()),
    }
}

/// Hosts that punch holes into any file, by the number that `statfs` gives: ext4, XFS, btrfs, tmpfs, F2FS.
/// Others do so for some files, or when their server can, or never; asking would change the file's times.
const PUNCHING: [FsType; 5] =
    [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, TMPFS_MAGIC, FsType(0xf2f5_2010)];

/// Whether the host surely takes back space of `file` that is not needed.
pub(super) fn takes_space_back(file: &File) -> bool {
    fstatfs(file).is_ok_and(|host| PUNCHING.contains(&host.filesystem_type()))
}

/// The name of the host of `file`, if it copies on write.
pub(super) fn host_that_copies(file: &File) -> io::Result<Option<&'static str>> {
    let found = fstatfs(file)?.filesystem_type();
    let copying = COPYING_HOSTS.iter().find(|(kind, _)| *kind == found);
    Ok(copying.map(|(_, name)| *name))
}

/// How the payload of an image reaches its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PayloadIo {
    /// Past the host's page cache.
    Direct,
    /// Through the host's page cache.
    Buffered {
        /// Why direct I/O cannot be used, as a clause.
        reason: String,
    },
}

/// Room on the file system that holds an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostRoom {
    /// Free for everybody, in bytes.
    pub available_bytes: u64,
    /// Free, but kept by the file system for privileged users, in bytes.
    pub reserved_bytes: u64,
    /// What the whole file system has, in bytes; 0 if it does not say, as some over networks.
    pub total_bytes: u64,
}

impl HostRoom {
    /// The room left on the file system of `path`.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(Self::of(&statvfs(path)?))
    }

    /// The bytes that this process can have, if the file system says.
    pub fn for_this_user(&self) -> Option<u64> {
        let reserved = if nix::unistd::geteuid().is_root() { self.reserved_bytes } else { 0 };
        (self.total_bytes > 0).then(|| self.available_bytes.saturating_add(reserved))
    }

    fn of(answer: &Statvfs) -> Self {
        let unit = answer.fragment_size();
        let reserved = answer.blocks_free().saturating_sub(answer.blocks_available());
        Self {
            available_bytes: answer.blocks_available().saturating_mul(unit),
            reserved_bytes: reserved.saturating_mul(unit),
            total_bytes: answer.blocks().saturating_mul(unit),
        }
    }
}

impl ImageFile {
    /// Opens and locks the image at `path`; waits up to `lock_wait` for other holders to leave.
    ///
    /// # Errors
    ///
    /// [`Kind::NotFound`], [`Kind::Permission`]; [`Kind::Unsupported`] for anything but a regular file;
    /// [`Kind::InUse`] when another process keeps the lock (the caller, which may know the holder, adds the
    /// remedy) or the path has come to name another file meanwhile; [`Kind::Io`].
    pub fn open(path: &Path, access: Access, lock_wait: Duration) -> Result<Self> {
        let Opened { file, path: found } = open_regular(path, access, Links::Follow)?;
        change_flags(&file, |flags| flags & !OFlag::O_NONBLOCK)
            .map_err(|error| Error::io("opening the image", error).file(path))?;
        Self::locked(file, &found, access, lock_wait).map_err(|error| error.file(path))
    }

    /// Opens the image at `path` for writing, although others read it and have locked it: see
    /// `lock_past_readers` for what the caller must know.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn open_past_readers(path: &Path) -> Result<Self> {
        let access = Access::ReadWrite;
        let Opened { file, path: found } = open_regular(path, access, Links::Follow)?;
        let opened = change_flags(&file, |flags| flags & !OFlag::O_NONBLOCK)
            .map_err(|error| Error::io("opening the image", error))
            .and_then(|()| lock::lock_past_readers(&file))
            .and_then(|()| Self::named(file, &found, access));
        opened.map_err(|error| error.file(path))
    }

    /// Opens the image at `path` for writing beside the process that writes it and is to be succeeded: others
    /// stay out when that ends. [`Self::become_writer`] must come before anything is read or written.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn open_beside(path: &Path) -> Result<Self> {
        let Opened { file, path: found } = open_regular(path, Access::ReadWrite, Links::Follow)?;
        let opened = change_flags(&file, |flags| flags & !OFlag::O_NONBLOCK)
            .map_err(|error| Error::io("opening the image", error))
            .and_then(|()| lock::lock_beside(&file))
            .and_then(|()| Self::named(file, &found, Access::ReadWrite));
        opened.map_err(|error| error.file(path))
    }

    /// The same file for writing, while `reader` still reads it. The new description's lock keeps all
    /// others out, and `reader` has none until [`Self::lock_again`].
    ///
    /// # Errors
    ///
    /// [`Kind::InUse`] if others read it, or its path names another file by now; what the operating system
    /// says: `reader` is locked as before then.
    pub fn writer_for(reader: &Self) -> Result<Self> {
        let writer = || {
            let file = open_again(&reader.file, Access::ReadWrite)?;
            change_flags(&file, |flags| flags & !OFlag::O_NONBLOCK)
                .map_err(|error| Error::io("opening the image", error))?;
            lock::lock_for_readers(&file, reader.descriptions())?;
            Self::named(file, &reader.path, Access::ReadWrite).inspect_err(|_| {
                if let Err(error) = reader.lock_again() {
                    tracing::warn!("{error:#}");
                }
            })
        };
        let writer = writer().map_err(|error| error.file(&reader.path))?;
        writer.set_sparse(reader.sparse());
        Ok(writer)
    }

    /// Gives a reader of the file its lock back, while a writer of this process keeps all others out, which
    /// is to leave.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn lock_again(&self) -> Result<()> {
        let mut descriptions = self.descriptions();
        let locked = descriptions.try_for_each(|file| lock::join(file, Access::ReadOnly));
        locked.map_err(|error| error.file(&self.path))
    }

    /// Gives the host the space of a file that has lost its last name. Whoever still has it open keeps an
    /// empty file.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn give_back_if_nameless(&self) -> io::Result<()> {
        if self.file.metadata()?.nlink() > 0 { Ok(()) } else { self.file.set_len(0) }
    }

    /// Whether the file at `path` comes from a server of SMB. No lock is taken or looked at.
    ///
    /// # Errors
    ///
    /// If it cannot be opened, or is no regular file.
    pub fn is_on_smb(path: &Path) -> Result<bool> {
        let opened = open_regular(path, Access::ReadOnly, Links::Follow);
        let Opened { file, .. } = opened.map_err(|error| error.file(path))?;
        Ok(Host::of(&file).is_smb())
    }

    /// Completes the lock of a file from [`Self::open_beside`]. Waits up to `wait` for the process before to
    /// end, its last I/O included.
    ///
    /// # Errors
    ///
    /// [`Kind::InUse`] if it has not ended by then.
    pub fn become_writer(&self, wait: Duration) -> Result<()> {
        if planted(Plant::EarlyWriter) {
            return Ok(());
        }
        lock::take_writer(&self.file, wait).map_err(|error| error.file(&self.path))
    }

    /// Locks `file`, which was opened at `path`.
    pub(super) fn locked(file: File, path: &Path, access: Access, lock_wait: Duration) -> Result<Self> {
        lock::lock(&file, path, access, lock_wait)?;
        Self::named(file, path, access)
    }

    /// The file, which is locked, if `path` still names it.
    fn named(file: File, path: &Path, access: Access) -> Result<Self> {
        let looking = |error| Error::io("looking at the image", error);
        let identity = HostFile::of(&file.metadata().map_err(looking)?);
        if identity != HostFile::at(path).map_err(looking)? {
            let message = "another file has taken its place while it was being opened";
            return Err(Error::new(Kind::InUse, message).remedy("run the command again"));
        }
        // Now, so that later losses are reported to it, and before owner and mode change.
        let syncing = match access {
            Access::ReadOnly => None,
            Access::ReadWrite => Some(open_to_sync(&file, identity)?),
        };
        let kind = fstatfs(&file).map_err(|errno| looking(errno.into()))?.filesystem_type();
        let host = Host::of(&file);
        let keeps_errors_by_handle = host.is_smb() || HOSTS_WITH_HANDLES.contains(&kind);
        let (queues, sparse) = (Mutex::default(), OnceLock::new());
        let path = path.to_owned();
        Ok(Self { file, syncing, queues, keeps_errors_by_handle, host, sparse, path, access, identity })
    }

    /// Decides whether the file may get holes; without this [`Sparse::Auto`] does. Called once, before
    /// anything is written.
    pub fn set_sparse(&self, sparse: Sparse) {
        assert_eq!(*self.sparse.get_or_init(|| sparse), sparse, "it was decided otherwise before");
    }

    /// What was decided.
    pub fn sparse(&self) -> Sparse {
        self.sparse.get().copied().unwrap_or_default()
    }

    /// Whether the file must get no holes.
    pub fn is_dense(&self) -> bool {
        self.sparse().is_dense_on(self.host)
    }

    /// Takes the mark of a sparse file away, as far as its host knows how. The file must have no holes left.
    ///
    /// # Errors
    ///
    /// [`Kind::Unsupported`] when Windows would still refuse the file; [`Kind::Io`].
    pub fn unmark_sparse(&self) -> Result<()> {
        let looking = |error| Error::io("looking at the image", error).file(&self.path);
        if self.host == Host::MarksHolesOfFallocate {
            // For a whole file the client asks the server to take the mark away, and does nothing else.
            let whole = i64::try_from(self.length().map_err(looking)?).unwrap_or(i64::MAX);
            if let Err(errno) = fallocate(&self.file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, whole) {
                tracing::info!("{}: the server keeps the mark: {errno}", self.path.display());
            }
        }
        if is_sparse_for_windows(&self.file).map_err(looking)? {
            let message =
                "the holes are filled, but the file is still marked as sparse, and Windows refuses it";
            let remedy = "copy it: the copy has no mark (`cp --sparse=never`)";
            return Err(Error::new(Kind::Unsupported, message).remedy(remedy).file(&self.path));
        }
        Ok(())
    }

    /// Whether its host marks files for their holes, and so does not always show holes in their size.
    pub fn is_on_host_that_marks(&self) -> bool {
        self.host != Host::Plain
    }

    /// What its host does with holes.
    pub(super) fn host(&self) -> Host {
        self.host
    }

    /// Whether a sync of the writers' own description has to come before that of the other one.
    pub(super) fn keeps_errors_by_handle(&self) -> bool {
        self.keeps_errors_by_handle
    }

    /// The descriptor to sync by.
    pub(super) fn syncing_fd(&self) -> BorrowedFd<'_> {
        self.syncing.as_ref().unwrap_or(&self.file).as_fd()
    }

    /// Makes durable what the host's cache has of the file, whichever process wrote it. A file system that is
    /// never written to (`squashfs`, ISO 9660) has nothing there, and knows no sync.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] if the host has lost something.
    pub fn sync_found(&self) -> Result<()> {
        match fdatasync(self.syncing_fd()) {
            Ok(()) | Err(Errno::EINVAL) => Ok(()),
            Err(errno) => {
                let doing = "syncing what was written before";
                Err(Error::io(doing, errno.into()).file(&self.path))
            }
        }
    }

    /// Opens a description for each of `count` queues, which will write the file: none of their writes may be
    /// accepted before, or a loss could be told to another. Called once.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn open_for_queues(&self, count: usize) -> Result<()> {
        assert_eq!(self.access, Access::ReadWrite, "who only reads has nothing to sync");
        let opened = (0..count).map(|_| open_to_sync(&self.file, self.identity)).collect::<Result<Vec<_>>>();
        let before = mem::replace(&mut *self.queues(), opened.map_err(|error| error.file(&self.path))?);
        assert!(before.is_empty(), "a queue has one description to sync by");
        Ok(())
    }

    /// How many queues may sync it.
    pub fn queue_count(&self) -> usize {
        self.queues().len()
    }

    /// Shows the description by which `queue` syncs, if there is one, to whom keeps it open.
    pub fn with_queue<T>(&self, queue: u16, take: impl FnOnce(Option<BorrowedFd<'_>>) -> T) -> T {
        take(self.queues().get(usize::from(queue)).map(AsFd::as_fd))
    }

    fn queues(&self) -> MutexGuard<'_, Vec<File>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the file the permissions of `other` that `most` has too, and if possible its owner. It must be
    /// finished: others may open it from now on.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] when the permissions cannot be set.
    pub fn resemble(&self, other: &Self, most: u32) -> Result<()> {
        let failed = |error| Error::io("taking over the file's permissions", error).file(other.path());
        let old = other.file.metadata().map_err(failed)?;
        let owner = (Some(Uid::from_raw(old.uid())), Some(Gid::from_raw(old.gid())));
        let given = fchown(&self.file, owner.0, owner.1).is_ok();
        // Where the file cannot be given away, the groups of another are not let in.
        self.permit(old.mode() & most & if given { 0o777 } else { 0o700 })
    }

    /// Who may open the file: nine bits.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn mode(&self) -> Result<u32> {
        let found = self.file.metadata();
        let found = found.map_err(|error| Error::io("looking at the image", error).file(&self.path))?;
        Ok(found.mode() & 0o777)
    }

    /// Sets who may open the file, durably: the nine bits of `mode`.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] when the operating system refuses.
    pub fn permit(&self, mode: u32) -> Result<()> {
        let set = self.file.set_permissions(fs::Permissions::from_mode(mode & 0o777));
        let set = set.and_then(|()| self.file.sync_all());
        set.map_err(|error| Error::io("setting the file's permissions", error).file(&self.path))
    }

    /// Lets others read it too, who could not before: this process writes it no more, and no queue syncs it.
    pub fn share(&self) {
        // Unlocked now: a queue's ring has its descriptor until that queue serves another image.
        mem::take(&mut *self.queues()).iter().for_each(lock::unlock);
        for file in self.descriptions() {
            lock::share(file);
        }
    }

    fn descriptions(&self) -> impl Iterator<Item = &File> + Clone {
        std::iter::once(&self.file).chain(&self.syncing)
    }

    /// Whether its host copies on write, so that an overwrite needs room, reserved or not; the host's name.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn host_that_copies(&self) -> io::Result<Option<&'static str>> {
        host_that_copies(&self.file)
    }

    /// Moves all further I/O of this file past the host's page cache, and what is there out of it, if the
    /// host can do that in units of the image's logical sectors, of `logical_sector_size` bytes. Called once,
    /// before there is any I/O in flight.
    ///
    /// # Errors
    ///
    /// [`Kind::Io`] when the file cannot be looked at; that direct I/O is refused is an answer, not an error.
    pub fn enable_direct(&self, logical_sector_size: u32) -> Result<PayloadIo> {
        assert!(logical_sector_size.is_power_of_two() && logical_sector_size >= 512);
        let looking = |error| Error::io("looking at the host's direct I/O", error).file(&self.path);
        let told = direct_alignment(self.file.as_fd()).map_err(looking)?;
        if let Some(reason) = told.and_then(|alignment| unfit(alignment, logical_sector_size)) {
            return Ok(PayloadIo::Buffered { reason });
        }
        if let Err(error) = change_flags(&self.file, |flags| flags | OFlag::O_DIRECT) {
            return Ok(PayloadIo::Buffered { reason: format!("the host refuses direct I/O: {error}") });
        }
        if told.is_none()
            && let Err(reason) = self.probe(logical_sector_size)
        {
            change_flags(&self.file, |flags| flags & !OFlag::O_DIRECT).map_err(looking)?;
            return Ok(PayloadIo::Buffered { reason });
        }
        // While the page cache holds one page of a file, the host ends each of its direct writes on another
        // thread.
        self.read_anew();
        Ok(PayloadIo::Direct)
    }

    /// Has the host forget what it holds of the file and has written: the next read comes from the disk. What
    /// a failed write left in the page cache is not in the file, and looks as if it were.
    pub fn read_anew(&self) {
        if let Err(error) = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED) {
            tracing::warn!("{}: the host keeps what it has cached: {error}", self.path.display());
        }
    }

    /// Whether I/O passes the host's page cache by; no, if the host does not say.
    pub fn is_direct(&self) -> bool {
        fcntl(&self.file, FcntlArg::F_GETFL).is_ok_and(|flags| flags & libc::O_DIRECT != 0)
    }

    /// What payload I/O asks of memory: bytes, a power of two, at most a logical sector.
    ///
    /// # Errors
    ///
    /// What the host says.
    pub fn memory_alignment(&self, logical_sector_size: u32) -> Result<u32> {
        let looking = |error| Error::io("looking at the host's direct I/O", error).file(&self.path);
        let told = direct_alignment(self.file.as_fd()).map_err(looking)?;
        Ok(payload_alignment(told, logical_sector_size))
    }

    /// Reads one sector, aligned to a sector in file and memory and to nothing more.
    fn probe(&self, sector_size: u32) -> std::result::Result<(), String> {
        let size = sector_size as usize;
        let mut memory = Buffer::zeroed((2 * size).next_multiple_of(super::PAGE_BYTES));
        match self.file.read_at(&mut memory[size..2 * size], u64::from(sector_size)) {
            Ok(read) if read == size => Ok(()),
            Ok(_) => Err("the file is too short to try direct I/O".to_owned()),
            Err(error) => Err(format!("the host refuses a direct read of {sector_size} bytes: {error}")),
        }
    }

    /// The absolute path, without symbolic links, under which the file was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it was opened and locked for.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Which file it is, whatever its names.
    pub fn identity(&self) -> HostFile {
        self.identity
    }

    /// The file's length in bytes.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn length(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Whether the file system takes back the space of a hole that is punched into this file.
    pub fn takes_space_back(&self) -> bool {
        takes_space_back(&self.file)
    }

    /// Where the next stored bytes lie, at `offset` or behind it: see [`super::ReadDisk::next_data`].
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        next_data(&self.file, offset)
    }

    /// Where the stored bytes that begin at `offset` end: at the next hole, or at the end of the file. Hosts
    /// that do not know have no holes.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn next_hole(&self, offset: u64) -> io::Result<u64> {
        next_hole(&self.file, offset)
    }

    /// As [`host_bytes`].
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn host_bytes(&self) -> io::Result<u64> {
        Ok(host_bytes(&self.file.metadata()?))
    }

    /// The room left on the file system that holds the file.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn host_room(&self) -> io::Result<HostRoom> {
        Ok(HostRoom::of(&fstatvfs(&self.file)?))
    }

    /// Sets the file's length; blocks the caller for as long as the host works on it.
    pub(super) fn set_length(&self, length: u64) -> io::Result<()> {
        self.file.set_len(length)
    }
}

impl Drop for ImageFile {
    /// Unlocks, rather than leaving it to the end of the description: a ring lets go of a file some time
    /// after the last completion, which can be as late as its thread's next entry into the kernel.
    fn drop(&mut self) {
        self.descriptions().for_each(lock::unlock);
        self.queues().iter().for_each(lock::unlock);
    }
}

impl AsFd for ImageFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn change_flags(file: &File, change: impl FnOnce(OFlag) -> OFlag) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(change(flags)))?;
    Ok(())
}

/// What payload I/O asks of memory, bytes.
fn payload_alignment(told: Option<DirectAlignment>, sector_size: u32) -> u32 {
    match told {
        // Tried with memory aligned to a sector.
        None => sector_size,
        // Through the page cache, which takes any memory.
        Some(alignment) if unfit(alignment, sector_size).is_some() => 1,
        Some(alignment) => alignment.memory.next_power_of_two(),
    }
}

/// Why direct I/O of this alignment does not fit sectors of `sector_size` bytes, if it does not.
fn unfit(alignment: DirectAlignment, sector_size: u32) -> Option<String> {
    let DirectAlignment { memory, offset } = alignment;
    if memory == 0 || offset == 0 {
        return Some("the host has no direct I/O for this file".to_owned());
    }
    (offset.max(memory) > sector_size).then(|| {
        let needed = offset.max(memory);
        format!("the host's direct I/O needs units of {needed} bytes, the logical sectors have {sector_size}")
    })
}

/// The folder of the file at `path`.
pub fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::Mode;

    use super::super::Place;
    use super::*;

    const NO_WAIT: Duration = Duration::ZERO;
    /// The file system through which user-mode Linux sees its host's files: it keeps no times of its own.
    const HOSTFS: libc::c_long = 0x00c0_ffee;

    fn open(path: &Path) -> Result<ImageFile> {
        ImageFile::open(path, Access::ReadOnly, NO_WAIT)
    }

    fn file_with(contents: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        fs::write(file.path(), contents).expect("writable");
        file
    }

    /// Whatever is no regular file is refused by name, for reading and for writing, and without blocking.
    #[test]
    fn only_regular_files_are_images() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).expect("a FIFO can be made");
        for (path, name) in [
            (directory.path(), "a folder"),
            (&fifo, "a FIFO"),
            (Path::new("/dev/null"), "a character device"),
        ] {
            for access in [Access::ReadOnly, Access::ReadWrite] {
                let error = ImageFile::open(path, access, NO_WAIT).expect_err("not regular");
                assert_eq!(error.kind(), Kind::Unsupported);
                assert!(error.to_string().contains(name), "{error}");
                assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
            }
        }
    }

    #[test]
    fn what_is_missing_is_not_found_and_what_exists_is_not_made_again() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("image.vhdx");
        assert_eq!(open(&path).expect_err("missing").kind(), Kind::NotFound);
        let made = Place::of(&path).and_then(|place| place.create()).expect("free");
        assert_eq!(open(&path).expect_err("its maker writes").kind(), Kind::InUse);
        drop(made);
        assert_eq!(
            Place::of(&path).and_then(|place| place.create()).expect_err("there").kind(),
            Kind::Exists
        );
        open(&path).expect("its maker has left");
    }

    #[test]
    fn an_open_image_knows_itself() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (path, link) = (directory.path().join("image.vhdx"), directory.path().join("link"));
        fs::write(&path, vec![1; 10_000]).expect("writable");
        std::os::unix::fs::symlink(&path, &link).expect("links can be made");
        let image = open(&link).expect("regular");
        assert_eq!(image.path(), fs::canonicalize(&path).expect("exists"));
        assert_eq!(image.access(), Access::ReadOnly);
        let metadata = fs::metadata(&path).expect("exists");
        assert_eq!(image.identity(), HostFile::of(&metadata));
        assert_eq!(image.length().expect("open"), 10_000);
        assert_eq!(image.host_bytes().expect("open"), metadata.blocks() * 512);
        image.host_room().expect("the file system says");
    }

    /// The lock is free once the image is dropped, though a ring may hold the description longer.
    #[test]
    fn a_dropped_image_leaves_no_lock_behind() {
        let file = file_with(b"x");
        let image = ImageFile::open(file.path(), Access::ReadWrite, NO_WAIT).expect("regular");
        let ring_reference = image.file.try_clone().expect("descriptors can be copied");
        assert_eq!(open(file.path()).expect_err("a writer is there").kind(), Kind::InUse);
        drop(image);
        open(file.path()).expect("the writer is gone");
        drop(ring_reference);
    }

    /// A queue's description has the lock, too, which a sync of a dead process keeps. It ends when the image
    /// is shared or dropped, though the queue's ring may hold the description longer.
    #[test]
    fn a_queue_syncs_by_a_description_that_has_the_lock() {
        let file = file_with(b"x");
        let image = ImageFile::open(file.path(), Access::ReadWrite, NO_WAIT).expect("regular");
        image.open_for_queues(2).expect("there are descriptors");
        let of_queue = |image: &ImageFile, queue| {
            let copy = |file: BorrowedFd<'_>| file.try_clone_to_owned().expect("descriptors can be copied");
            image.with_queue(queue, |file| file.map(copy))
        };
        assert_eq!((image.queue_count(), of_queue(&image, 2).is_none()), (2, true));
        let ring_reference = of_queue(&image, 1).expect("it has one");
        lock::unlock(&image.file);
        lock::unlock(image.syncing.as_ref().expect("a writer has one"));
        assert_eq!(open(file.path()).expect_err("a sync may be under way").kind(), Kind::InUse);
        image.share();
        drop(open(file.path()).expect("others may read it"));
        image.open_for_queues(1).expect("the last ones are gone");
        let second_reference = of_queue(&image, 0).expect("it has one");
        drop(image);
        open(file.path()).expect("the writer is gone");
        drop((ring_reference, second_reference));
    }

    /// A file that has lost its name while it was waited for is no longer the image.
    #[test]
    fn a_replaced_file_is_refused() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (path, other) = (directory.path().join("image.vhdx"), directory.path().join("other"));
        fs::write(&path, b"old").expect("writable");
        fs::write(&other, b"new").expect("writable");
        let path = fs::canonicalize(path).expect("exists");
        let opened = File::open(&path).expect("exists");
        fs::rename(&other, &path).expect("same directory");
        let error = ImageFile::locked(opened, &path, Access::ReadOnly, NO_WAIT).expect_err("replaced");
        assert_eq!(error.kind(), Kind::InUse);
    }

    #[test]
    fn flags_are_as_promised() {
        let file = file_with(b"x");
        let image = open(file.path()).expect("regular");
        let flags = OFlag::from_bits_retain(fcntl(&image, FcntlArg::F_GETFL).expect("open"));
        assert!(!flags.contains(OFlag::O_NONBLOCK), "it would turn waits of the ring into EAGAIN");
        let descriptor = fcntl(&image, FcntlArg::F_GETFD).expect("open");
        assert_ne!(descriptor & libc::FD_CLOEXEC, 0);
    }

    /// An image that is only read is not changed, its times included (the temporary file is ours: permitted).
    #[test]
    fn reading_leaves_the_access_time_alone() {
        let file = file_with(&[1; 8192]);
        if fstatfs(file.as_file()).expect("open").filesystem_type().0 == HOSTFS {
            eprintln!("\n*** NOT TESTED: hostfs takes its times from the host ***\n");
            return;
        }
        // An access time older than the modification time is one that `relatime` would bring up to date.
        let long_ago = fs::FileTimes::new().set_accessed(std::time::UNIX_EPOCH);
        file.as_file().set_times(long_ago).expect("ours");
        let before = fs::metadata(file.path()).expect("exists");
        let image = open(file.path()).expect("regular");
        let mut bytes = [0; 8192];
        image.file.read_exact_at(&mut bytes, 0).expect("long enough");
        drop(image);
        let after = fs::metadata(file.path()).expect("exists");
        assert_eq!(after.accessed().expect("kept"), std::time::UNIX_EPOCH);
        assert_eq!((before.mtime_nsec(), before.ctime_nsec()), (after.mtime_nsec(), after.ctime_nsec()));
    }

    /// What the answer says is what the description does from then on.
    #[test]
    fn direct_io_is_used_exactly_where_it_is_reported() {
        let file = file_with(&[7; 8192]);
        for sector_size in [512, 4096] {
            let image = open(file.path()).expect("regular");
            let told = direct_alignment(image.as_fd()).expect("statx works");
            let answer = image.enable_direct(sector_size).expect("the file can be looked at");
            eprintln!("sector size {sector_size}, kernel's answer {told:?}: {answer:?}");
            let flags = OFlag::from_bits_retain(fcntl(&image, FcntlArg::F_GETFL).expect("open"));
            assert_eq!(flags.contains(OFlag::O_DIRECT), answer == PayloadIo::Direct);
            if let Some(alignment) = told {
                assert_eq!(answer == PayloadIo::Direct, unfit(alignment, sector_size).is_none());
            }
            let mut memory = Buffer::zeroed(4096);
            let size = sector_size as usize;
            let read = image.file.read_at(&mut memory[..size], u64::from(sector_size)).expect("aligned");
            assert_eq!((read, memory[0]), (size, 7));
        }
    }

    #[test]
    fn the_probe_needs_a_file_it_can_read() {
        let short = file_with(&[7; 600]);
        let image = open(short.path()).expect("regular");
        assert!(image.probe(512).is_err());
        let long = file_with(&[7; 1024]);
        open(long.path()).expect("regular").probe(512).expect("buffered reads take anything");
    }

    #[test]
    fn an_alignment_fits_when_a_sector_is_a_multiple_of_it() {
        let alignment = |memory, offset| DirectAlignment { memory, offset };
        assert_eq!(unfit(alignment(4, 512), 512), None);
        assert_eq!(unfit(alignment(512, 4096), 4096), None);
        assert!(unfit(alignment(512, 4096), 512).is_some_and(|reason| reason.contains("4096")));
        assert!(unfit(alignment(4096, 512), 512).is_some());
        assert!(unfit(alignment(0, 0), 4096).is_some());
    }

    /// More would be refused by the block layer, which takes less than a page.
    #[test]
    fn payload_never_asks_for_memory_aligned_to_more_than_a_sector() {
        let alignment = |memory, offset| Some(DirectAlignment { memory, offset });
        assert_eq!(payload_alignment(alignment(4, 512), 512), 4);
        assert_eq!(payload_alignment(alignment(4096, 4096), 4096), 4096);
        assert_eq!(payload_alignment(alignment(3, 512), 512), 4);
        for buffered in [alignment(0, 0), alignment(1 << 16, 1 << 16), alignment(4096, 512)] {
            assert_eq!(payload_alignment(buffered, 512), 1);
        }
        assert_eq!(payload_alignment(None, 512), 512);
    }
}
