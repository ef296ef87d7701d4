//! Which devices are ours: one small file per device in `/run/vhdx-ublk/`.
//!
//! The kernel knows devices but not images; the file names both. An entry is made as soon as the device
//! exists, and goes away when the device does. Two things are checked before an entry is believed: the kernel's
//! device carries the same random mark, and the process has the same start time. A device of ours without an
//! entry that can be read is an *orphan*: its daemon was killed between making the device and writing the entry,
//! or the directory went away. It is known by its mark.
//!
//! Order: an entry is written under another name, then renamed; a reader never sees half of one.
//!
//! Invariants:
//!
//! * whoever only reads changes nothing: where the kernel's devices cannot be seen (a container that shares the
//!   directory), entries of living devices look like those of gone ones;
//! * an entry is removed only with its mark, under the directory's lock, once the kernel says that there is no
//!   device with that number and mark: a device added between a look and the removal keeps its own.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::control::{Control, DeviceInfo, KernelState, POLL_INTERVAL, is_mark_of_program};
use super::options::Recovery;
use super::path;
pub use super::process::{Life, ProcessId};
use crate::disk::ImageFile;
use crate::error::{Error, Kind, Result};
use crate::printable::shell;

/// Where the entries and the daemons' logs are; only root may look.
pub const RUN_DIRECTORY: &str = "/run/vhdx-ublk";

/// Mode of the directory, and of what is in it.
const DIRECTORY_MODE: u32 = 0o700;
pub(super) const FILE_MODE: u32 = 0o600;

/// How long the lock of the directory may be waited for: whoever has it may wait for the kernel to make a
/// device, which has a deadline of half a minute.
const LOCK_PATIENCE: Duration = Duration::from_secs(35);

/// Where the kernel lists drivers like this one, whatever `/dev` shows.
const DRIVERS: &str = "/sys/class/misc";

/// One device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The N of `/dev/ublkbN`.
    pub id: u32,
    /// `/dev/ublkbN`.
    pub device: PathBuf,
    /// The image, as an absolute path without symbolic links.
    #[serde(with = "path::one")]
    pub image: PathBuf,
    /// The image's device and inode, which a rename does not change.
    pub image_file: FileId,
    /// Of a differencing image the parents' paths, its own first.
    #[serde(default, with = "path::many")]
    pub parents: Vec<PathBuf>,
    /// The parents' devices and inodes, in the same order.
    #[serde(default)]
    pub parent_files: Vec<FileId>,
    /// The mount namespace in which the paths lead to these files; 0 where that was not recorded.
    #[serde(default)]
    pub mount_namespace: u64,
    /// The daemon.
    pub daemon: ProcessId,
    /// Queues.
    pub queues: u16,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Size of the disk, bytes.
    pub size_bytes: u64,
    /// Nothing may be written.
    pub read_only: bool,
    /// What becomes of it when its daemon is killed.
    pub recovery: Recovery,
    /// The data of requests is not copied.
    #[serde(default)]
    pub zero_copy: bool,
    /// The image's FileWriteGuid when it was opened.
    pub file_write_guid: Uuid,
    /// See [`DeviceInfo::mark`].
    pub mark: u64,
    /// The version of the daemon.
    pub version: String,
    /// The device was started.
    pub started: bool,
    /// Why the image could not be closed cleanly; kept until somebody has been told.
    pub failure: Option<String>,
}

impl Entry {
    /// Whether the device reads `file`, its image or one of that one's parents.
    ///
    /// No path is looked at: it may lie on a device that waits for its daemon, and whoever asks would wait as well.
    pub fn reads(&self, file: FileId) -> bool {
        self.image_file == file || self.parent_files.contains(&file)
    }

    /// `error`, of opening one of the files by its path, with what explains that where the daemon saw other mounts.
    pub fn explain(&self, error: Error) -> Error {
        let is_elsewhere = self.mount_namespace != 0 && self.mount_namespace != mount_namespace();
        if error.kind() != Kind::NotFound || !is_elsewhere {
            return error;
        }
        let message = format!("{} (the path is of another mount namespace than this)", error.message());
        Error::new(Kind::NotFound, message).file(error.file_path().unwrap_or(&self.image)).remedy(
            "run the command where the device was added: in the same container, or for a service with PrivateTmp \
             in the service; or put the image at that path here (mount --bind)",
        )
    }
}

/// The mount namespace of this process; 0 where `/proc` does not say.
pub(super) fn mount_namespace() -> u64 {
    fs::metadata("/proc/self/ns/mnt").map_or(0, |found| found.ino())
}

/// A file, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// Its file system (`st_dev`).
    pub device: u64,
    /// Its inode.
    pub inode: u64,
}

/// Where a device stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Its daemon is bringing it up.
    Starting,
    /// Served.
    Live,
    /// Its daemon is taking it down.
    Stopping,
    /// Its daemon is gone, and its requests have failed.
    Dead,
    /// Its daemon is gone; requests wait for the next one.
    Quiesced,
    /// Its daemon is gone; requests fail until the next one comes.
    FailIo,
    /// It is gone, but its image could not be closed cleanly.
    Failed,
    /// The kernel's devices cannot be seen from here, or it reports something this program does not know.
    Unknown,
}

/// A device of ours, as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// What its daemon wrote.
    pub entry: Entry,
    /// What the kernel adds.
    pub state: State,
}

impl Listed {
    /// Its daemon was killed, and it waits for the next one.
    pub fn is_abandoned(&self) -> bool {
        match self.state {
            State::Quiesced | State::FailIo => true,
            // The kernel notices a daemon's end in its own time.
            State::Live => self.entry.recovery != Recovery::None && self.entry.daemon.life() == Life::Ended,
            _ => false,
        }
    }

    /// It waits for the next daemon, or nothing that is seen from here says that it does not.
    pub fn may_be_abandoned(&self) -> bool {
        self.is_abandoned() || self.state == State::Unknown && !self.entry.daemon.is_alive()
    }
}

/// An entry that cannot be read.
#[derive(Debug)]
pub struct Unreadable {
    /// The N of `/dev/ublkbN`.
    pub id: u32,
    /// Why.
    pub error: Error,
}

/// All that is known of our devices.
#[derive(Debug, Default)]
pub struct Survey {
    /// Those with an entry.
    pub devices: Vec<Listed>,
    /// Those of which only the kernel knows.
    pub orphans: Vec<DeviceInfo>,
    /// Entries that cannot be read; the device may be among the orphans.
    pub unreadable: Vec<Unreadable>,
}

impl Survey {
    /// Whether there is nothing to tell.
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty() && self.orphans.is_empty() && self.unreadable.is_empty()
    }
}

impl FileId {
    /// The file behind `metadata`.
    pub fn of(metadata: &fs::Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }

    /// The file of an open image.
    pub fn of_image(image: &ImageFile) -> Self {
        Self { device: image.device(), inode: image.inode() }
    }
}

/// The directory of entries.
pub struct Registry {
    directory: PathBuf,
}

impl Registry {
    /// The machine's registry.
    ///
    /// # Errors
    ///
    /// When its directory can be neither found nor made, or could be written by others.
    pub fn open() -> Result<Self> {
        Self::at(Path::new(RUN_DIRECTORY))
    }

    /// The registry in `directory`, which is made where it is not there.
    ///
    /// # Errors
    ///
    /// As [`Self::open`].
    pub fn at(directory: &Path) -> Result<Self> {
        match DirBuilder::new().mode(DIRECTORY_MODE).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                let error = Error::io("making the directory of devices", error).file(directory);
                return Err(if error.kind() == Kind::Permission {
                    error.remedy("run it as root")
                } else {
                    error
                });
            }
            _ => {}
        }
        let found = fs::symlink_metadata(directory);
        let found =
            found.map_err(|error| Error::io("reading the directory of devices", error).file(directory))?;
        let user = nix::unistd::geteuid();
        if found.uid() != user.as_raw() && !user.is_root() {
            let message = "the directory of devices belongs to another user";
            return Err(Error::new(Kind::Permission, message).file(directory).remedy("run it as root"));
        }
        if !found.is_dir() || found.mode() & 0o022 != 0 || found.uid() != user.as_raw() {
            let message = "the directory of devices must be root's, and nobody else may write to it";
            return Err(Error::new(Kind::Permission, message).file(directory).remedy("remove it"));
        }
        Ok(Self { directory: directory.to_owned() })
    }

    /// Where the daemon of device `id` writes its warnings.
    pub fn log_path(&self, id: u32) -> PathBuf {
        self.directory.join(format!("{id}.log"))
    }

    /// Where the daemon of device `id` listens.
    pub fn socket_path(&self, id: u32) -> PathBuf {
        self.directory.join(format!("{id}.sock"))
    }

    fn entry_path(&self, id: u32) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    /// Keeps every other writer out until it is dropped.
    ///
    /// # Errors
    ///
    /// [`Kind::InUse`] when another has it for too long; what the host says.
    pub fn lock(&self) -> Result<Locked<'_>> {
        let path = self.directory.join(".lock");
        let failed = |error| Error::io("locking the directory of devices", error).file(&path);
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(FILE_MODE).open(&path);
        let mut file = file.map_err(failed)?;
        let until = Instant::now() + LOCK_PATIENCE;
        loop {
            file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) => return Ok(Locked { registry: self, _lock: lock }),
                Err((file, nix::Error::EWOULDBLOCK | nix::Error::EINTR)) => file,
                Err((_, errno)) => return Err(failed(errno.into())),
            };
            if Instant::now() >= until {
                let message = "another vhdx-ublk has the directory of devices locked";
                let remedy = format!("find out which: fuser -v {}", shell(&path));
                return Err(Error::new(Kind::InUse, message).file(&path).remedy(remedy));
            }
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Writes or replaces an entry.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn write(&self, entry: &Entry) -> Result<()> {
        self.lock()?.write(entry)
    }

    /// Removes the entry of device `id` with this mark, and the log if nothing was written to it. A later device
    /// of the same number keeps its own, and an entry that cannot be read stays.
    ///
    /// # Errors
    ///
    /// When the file is there and cannot be removed.
    pub fn remove(&self, id: u32, mark: u64) -> Result<()> {
        let locked = self.lock()?;
        match self.entry(id) {
            Ok(Some(entry)) if entry.mark != mark => Ok(()),
            Ok(_) => locked.unlink(id),
            Err(_unreadable) => Ok(()),
        }
    }

    /// Every entry, in the order of the devices' numbers, and every one that cannot be read.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read.
    pub fn entries(&self) -> Result<(Vec<Entry>, Vec<Unreadable>)> {
        let failed = |error| Error::io("reading the directory of devices", error).file(&self.directory);
        let (mut entries, mut unreadable) = (Vec::new(), Vec::new());
        for item in fs::read_dir(&self.directory).map_err(failed)? {
            let name = item.map_err(failed)?.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(".json")?.parse().ok());
            let Some(id) = id else { continue };
            match self.entry(id) {
                Ok(entry) => entries.extend(entry),
                Err(error) => unreadable.push(Unreadable { id, error }),
            }
        }
        entries.sort_by_key(|entry: &Entry| entry.id);
        unreadable.sort_by_key(|unreadable| unreadable.id);
        Ok((entries, unreadable))
    }

    /// The entry of device `id`, if there is one.
    ///
    /// # Errors
    ///
    /// When it is there but cannot be read.
    pub fn entry(&self, id: u32) -> Result<Option<Entry>> {
        let path = self.entry_path(id);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("reading the device's entry", error).file(&path)),
        };
        let entry: Entry = serde_json::from_str(&text).map_err(|error| {
            Error::corrupt("device entry", error.to_string()).file(&path).remedy(format!(
                "the device goes on; `vhdx-ublk del --force {id}` takes it away, and the entry with it"
            ))
        })?;
        if entry.id != id {
            let message = format!("it is the entry of device {}", entry.id);
            return Err(Error::corrupt("device entry", message).file(&path));
        }
        Ok(Some(entry))
    }

    /// Our devices that have an entry, as they are now. Nothing is changed.
    ///
    /// # Errors
    ///
    /// When the registry cannot be read, or the kernel does not answer.
    pub fn list(&self) -> Result<Vec<Listed>> {
        self.survey().map(|survey| survey.devices)
    }

    /// All that is known of our devices, as they are now. Nothing is changed.
    ///
    /// # Errors
    ///
    /// When the registry cannot be read, or the kernel does not answer.
    pub fn survey(&self) -> Result<Survey> {
        let sight = Sight::open()?;
        let (entries, unreadable) = self.entries()?;
        let marks: Vec<u64> = entries.iter().map(|entry| entry.mark).collect();
        let mut devices = Vec::new();
        for entry in entries {
            if let Some(state) = sight.state_of(&entry)? {
                devices.push(Listed { entry, state });
            }
        }
        let is_orphan = |info: &DeviceInfo| is_mark_of_program(info.mark) && !marks.contains(&info.mark);
        let orphans = match &sight {
            Sight::Kernel(control) => control.devices()?.into_iter().filter(is_orphan).collect(),
            Sight::NoDriver | Sight::Hidden => Vec::new(),
        };
        // Its entry may have been written since the entries were read.
        let is_written =
            |info: &DeviceInfo| matches!(self.entry(info.id), Ok(Some(entry)) if entry.mark == info.mark);
        let orphans = Vec::into_iter(orphans).filter(|info| !is_written(info)).collect();
        Ok(Survey { devices, orphans, unreadable })
    }

    /// Removes the entries of devices that the kernel says are gone, unless somebody still has to learn of a
    /// failure. For commands that change devices.
    ///
    /// # Errors
    ///
    /// When the registry cannot be read or changed, or the kernel does not answer.
    pub fn sweep(&self, control: &Control) -> Result<()> {
        let (entries, unreadable) = self.entries()?;
        for entry in entries {
            let seen = control.info(entry.id)?;
            if judge(&entry, Seen::Answer(seen), entry.daemon.life()).is_none() {
                self.remove(entry.id, entry.mark)?;
            }
        }
        for Unreadable { id, .. } in unreadable {
            if control.info(id)?.is_none_or(|info| !is_mark_of_program(info.mark)) {
                let locked = self.lock()?;
                if self.entry(id).is_err() {
                    locked.unlink(id)?;
                }
            }
        }
        Ok(())
    }
}

/// The registry, while its lock is held.
pub struct Locked<'a> {
    registry: &'a Registry,
    _lock: Flock<File>,
}

impl Locked<'_> {
    /// Writes or replaces an entry.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn write(&self, entry: &Entry) -> Result<()> {
        let registry = self.registry;
        let path = registry.entry_path(entry.id);
        let temporary = registry.directory.join(format!(".{}.json.{}", entry.id, std::process::id()));
        let text = serde_json::to_string_pretty(entry);
        let text =
            text.map_err(|error| Error::io("describing the device", error.into()).file(&entry.image))?;
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(FILE_MODE)
            .open(&temporary)
            .and_then(|mut file| writeln!(file, "{text}"))
            .and_then(|()| fs::rename(&temporary, &path));
        written.map_err(|error| {
            let _ = fs::remove_file(&temporary); // half of an entry helps nobody; it may not even be there
            Error::io("writing the device's entry", error).file(&path)
        })
    }

    fn unlink(&self, id: u32) -> Result<()> {
        let path = self.registry.entry_path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("removing the device's entry", error).file(&path));
            }
            _ => {}
        }
        let _ = fs::remove_file(self.registry.socket_path(id)); // nobody listens there
        let log = self.registry.log_path(id);
        if fs::metadata(&log).is_ok_and(|metadata| metadata.len() == 0) {
            let _ = fs::remove_file(log); // it holds nothing, so it does no harm either
        }
        Ok(())
    }
}

/// How much of the kernel's devices is seen from here.
pub(super) enum Sight {
    /// All of them.
    Kernel(Control),
    /// The kernel has no driver, so there are none.
    NoDriver,
    /// The driver is there, and cannot be reached: a `/dev` of a container's own.
    Hidden,
}

impl Sight {
    /// What is seen.
    pub(super) fn open() -> Result<Self> {
        match Control::open() {
            Ok(control) => Ok(Self::Kernel(control)),
            Err(error) if error.kind() == Kind::NoDriver => Ok(Self::without_control(Path::new(DRIVERS))),
            // As where a container has the node and no right to it.
            Err(error) if error.kind() == Kind::Permission && !Control::may_be_opened() => Ok(Self::Hidden),
            Err(error) => Err(error),
        }
    }

    fn without_control(drivers: &Path) -> Self {
        let is_loaded = drivers.join("ublk-control").exists();
        if drivers.exists() && !is_loaded { Self::NoDriver } else { Self::Hidden }
    }

    /// Where the device of `entry` stands; `None` when it is gone and nobody needs to know.
    pub(super) fn state_of(&self, entry: &Entry) -> Result<Option<State>> {
        let seen = match self {
            Self::Kernel(control) => Seen::Answer(control.info(entry.id)?),
            Self::NoDriver => Seen::Answer(None),
            Self::Hidden => Seen::Nothing,
        };
        Ok(judge(entry, seen, entry.daemon.life()))
    }
}

/// What the kernel says about a device.
#[derive(Clone, Copy, Debug)]
enum Seen {
    /// It cannot be asked.
    Nothing,
    Answer(Option<DeviceInfo>),
}

fn judge(entry: &Entry, seen: Seen, life: Life) -> Option<State> {
    let Seen::Answer(kernel) = seen else { return Some(State::Unknown) };
    let runs = matches!(life, Life::Runs | Life::Stopped);
    let ours = kernel.filter(|info| info.mark == entry.mark);
    match ours.map(|info| info.state) {
        None if runs => Some(State::Stopping),
        None if entry.failure.is_some() => Some(State::Failed),
        None => None,
        Some(KernelState::Live) => Some(State::Live),
        Some(KernelState::Dead) if life == Life::Ended => Some(State::Dead),
        Some(KernelState::Dead) if entry.started => Some(State::Stopping),
        Some(KernelState::Dead) => Some(State::Starting),
        Some(KernelState::Quiesced) => Some(State::Quiesced),
        Some(KernelState::FailIo) => Some(State::FailIo),
        Some(KernelState::Unknown) => Some(State::Unknown),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    pub(in crate::device) fn entry(id: u32) -> Entry {
        Entry {
            id,
            device: format!("/dev/ublkb{id}").into(),
            image: "/images/disk.vhdx".into(),
            parents: Vec::new(),
            parent_files: Vec::new(),
            mount_namespace: 0,
            image_file: FileId { device: 1, inode: 2 },
            daemon: ProcessId { pid: 1234, start_time: 5678, namespace: 0 },
            queues: 2,
            depth: 64,
            size_bytes: 1 << 30,
            read_only: false,
            recovery: Recovery::Reissue,
            zero_copy: false,
            file_write_guid: Uuid::from_u128(1),
            mark: u64::MAX,
            version: "0.1.0".into(),
            started: true,
            failure: None,
        }
    }

    fn info(mark: u64, state: KernelState) -> DeviceInfo {
        DeviceInfo { id: 0, queues: 1, depth: 64, request_bytes: 4096, flags: 0, state, mark, server: None }
    }

    fn seen(mark: u64, state: KernelState) -> Seen {
        Seen::Answer(Some(info(mark, state)))
    }

    const GONE: Seen = Seen::Answer(None);

    fn read(registry: &Registry) -> Vec<Entry> {
        let (entries, unreadable) = registry.entries().expect("read");
        assert!(unreadable.is_empty(), "{unreadable:?}");
        entries
    }

    #[test]
    fn an_entry_is_written_read_replaced_and_removed() {
        let place = tempfile::tempdir().expect("a directory");
        let registry = Registry::at(&place.path().join("run")).expect("made");
        assert_eq!(read(&registry), []);
        registry.write(&entry(7)).expect("written");
        registry.write(&entry(3)).expect("written");
        let changed = Entry { failure: Some("no".into()), ..entry(7) };
        registry.write(&changed).expect("replaced");
        assert_eq!(read(&registry), [entry(3), changed.clone()]);
        assert_eq!(registry.entry(7).expect("read"), Some(changed));
        let mode = fs::metadata(registry.entry_path(7)).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, FILE_MODE);
        registry.remove(7, 5).expect("another device's entry is left alone");
        assert!(registry.entry(7).expect("read").is_some());
        registry.remove(7, u64::MAX).expect("removed");
        registry.remove(7, u64::MAX).expect("removing what is not there is no error");
        assert_eq!(read(&registry), [entry(3)]);
    }

    #[test]
    fn a_directory_that_others_may_write_is_refused() {
        let place = tempfile::tempdir().expect("a directory");
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o777)).expect("permitted");
        let error = Registry::at(place.path()).err().expect("refused");
        assert_eq!(error.kind(), Kind::Permission);
    }

    #[test]
    fn an_entry_that_cannot_be_read_hides_no_other_and_nobody_is_told_to_remove_it() {
        let place = tempfile::tempdir().expect("a directory");
        let registry = Registry::at(&place.path().join("run")).expect("made");
        registry.write(&entry(2)).expect("written");
        fs::write(registry.entry_path(1), "{").expect("written");
        fs::copy(registry.entry_path(2), registry.entry_path(5)).expect("copied");
        let (entries, unreadable) = registry.entries().expect("the directory can be read");
        assert_eq!(entries, [entry(2)]);
        assert_eq!(unreadable.iter().map(|unreadable| unreadable.id).collect::<Vec<_>>(), [1, 5]);
        let error = &unreadable[0].error;
        assert!(error.to_string().contains("1.json"), "{error}");
        assert!(error.remedy_text().is_some_and(|text| !text.contains("rm ")), "{error}");
        registry.remove(1, 7).expect("whose it is cannot be told");
        assert!(registry.entry_path(1).exists());
    }

    #[test]
    fn an_image_of_any_name_has_an_entry() {
        use std::os::unix::ffi::OsStringExt;
        let place = tempfile::tempdir().expect("a directory");
        let registry = Registry::at(&place.path().join("run")).expect("made");
        let odd = |bytes: &[u8]| PathBuf::from(std::ffi::OsString::from_vec(bytes.to_vec()));
        let odd = Entry { image: odd(b"/a\xff\n.vhdx"), parents: vec![odd(b"/\xfe")], ..entry(1) };
        registry.write(&odd).expect("written");
        assert_eq!(read(&registry), [odd]);
    }

    #[test]
    fn a_parent_is_known_by_its_inode_and_no_path_is_followed() {
        let parent = FileId { device: 1, inode: 7 };
        let child = Entry { parents: vec!["/".into()], parent_files: vec![parent], ..entry(1) };
        assert!(child.reads(parent) && child.reads(child.image_file));
        assert!(!child.reads(FileId::of(&fs::metadata("/").expect("there"))));
    }

    #[test]
    fn a_path_of_another_mount_namespace_is_told_to_be_one() {
        let missing = || Error::new(Kind::NotFound, "no such file");
        let here = Entry { mount_namespace: mount_namespace(), ..entry(1) };
        assert!(here.explain(missing()).remedy_text().is_none());
        let elsewhere = Entry { mount_namespace: mount_namespace() + 1, ..entry(1) };
        let error = elsewhere.explain(missing());
        assert!(error.to_string().contains("another mount namespace"), "{error}");
        assert!(elsewhere.explain(Error::new(Kind::Io, "no")).remedy_text().is_none());
    }

    #[test]
    fn one_writer_at_a_time() {
        let place = tempfile::tempdir().expect("a directory");
        let registry = Registry::at(&place.path().join("run")).expect("made");
        let locked = registry.lock().expect("free");
        let (say, said) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                registry.write(&entry(1)).expect("the lock becomes free");
                say.send(()).expect("somebody listens");
            });
            locked.write(&entry(2)).expect("the lock is held here");
            assert!(said.recv_timeout(Duration::from_millis(50)).is_err(), "another wrote meanwhile");
            drop(locked);
        });
        assert_eq!(read(&registry), [entry(1), entry(2)]);
    }

    #[test]
    fn where_the_kernel_is_not_seen_nothing_is_known_to_be_gone() {
        for life in [Life::Runs, Life::Ended, Life::Hidden] {
            assert_eq!(judge(&entry(0), Seen::Nothing, life), Some(State::Unknown));
        }
        let waits = Listed { entry: entry(0), state: State::Unknown };
        assert!(waits.may_be_abandoned() && !waits.is_abandoned());
        let drivers = tempfile::tempdir().expect("a directory");
        assert!(matches!(Sight::without_control(drivers.path()), Sight::NoDriver));
        assert!(matches!(Sight::without_control(&drivers.path().join("none")), Sight::Hidden));
        fs::create_dir(drivers.path().join("ublk-control")).expect("made");
        assert!(matches!(Sight::without_control(drivers.path()), Sight::Hidden));
    }

    #[test]
    fn a_daemon_that_cannot_be_seen_is_not_taken_for_a_dead_one() {
        let ours = entry(0);
        assert_eq!(judge(&ours, seen(ours.mark, KernelState::Live), Life::Hidden), Some(State::Live));
        assert!(
            !Listed {
                entry: Entry { daemon: ProcessId { namespace: 1, ..ours.daemon }, ..ours },
                state: State::Live
            }
            .is_abandoned()
        );
    }

    #[test]
    fn a_device_of_another_server_under_our_number_is_not_ours() {
        let ours = entry(0);
        assert_eq!(judge(&ours, seen(5, KernelState::Live), Life::Ended), None);
        assert_eq!(judge(&ours, seen(ours.mark, KernelState::Live), Life::Runs), Some(State::Live));
    }

    #[test]
    fn a_dead_device_says_whether_its_daemon_is_at_work() {
        let ours = entry(0);
        let dead = seen(ours.mark, KernelState::Dead);
        assert_eq!(judge(&ours, dead, Life::Ended), Some(State::Dead));
        assert_eq!(judge(&ours, dead, Life::Runs), Some(State::Stopping));
        assert_eq!(judge(&Entry { started: false, ..entry(0) }, dead, Life::Runs), Some(State::Starting));
    }

    #[test]
    fn a_failure_stays_until_it_was_told() {
        let failed = Entry { failure: Some("poisoned".into()), ..entry(0) };
        assert_eq!(judge(&failed, GONE, Life::Ended), Some(State::Failed));
        assert_eq!(judge(&entry(0), GONE, Life::Ended), None);
        assert_eq!(judge(&entry(0), GONE, Life::Runs), Some(State::Stopping));
    }
}
