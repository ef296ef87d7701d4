//! Which devices are ours: one small file per device in `/run/vhdx-ublk/`.
//!
//! The kernel knows devices but not images; the file names both. An entry is made as soon as the device
//! exists, so that a daemon killed at any later point leaves a device that can be listed and deleted, and it
//! goes away when the device does. Two things are checked before an entry is believed: the kernel's device
//! carries the same random mark, and the process has the same start time.
//!
//! Order: an entry is written under another name, then renamed; a reader never sees half of one.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::control::{Control, DeviceInfo, KernelState};
use super::options::Recovery;
use crate::disk::ImageFile;
use crate::error::{Error, Kind, Result};

/// Where the entries and the daemons' logs are; only root may look.
pub const RUN_DIRECTORY: &str = "/run/vhdx-ublk";

/// Mode of the directory, and of what is in it.
const DIRECTORY_MODE: u32 = 0o700;
pub(super) const FILE_MODE: u32 = 0o600;

/// One device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The N of `/dev/ublkbN`.
    pub id: u32,
    /// `/dev/ublkbN`.
    pub device: PathBuf,
    /// The image, as an absolute path without symbolic links.
    pub image: PathBuf,
    /// The image's device and inode, which a rename does not change.
    pub image_file: FileId,
    /// Of a differencing image the parents' paths, its own first.
    #[serde(default)]
    pub parents: Vec<PathBuf>,
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
    pub fn reads(&self, file: FileId) -> bool {
        let is_it = |path: &PathBuf| fs::metadata(path).is_ok_and(|found| FileId::of(&found) == file);
        self.image_file == file || self.parents.iter().any(is_it)
    }
}

/// A file, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// Its file system (`st_dev`).
    pub device: u64,
    /// Its inode.
    pub inode: u64,
}

/// A process, and not a later one of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it was started, in the kernel's ticks since boot.
    pub start_time: u64,
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
    /// The kernel reports something this program does not know.
    Unknown,
}

/// A device of ours, as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// What its daemon wrote.
    #[serde(flatten)]
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
            State::Live => self.entry.recovery != Recovery::None && !self.entry.daemon.is_alive(),
            _ => false,
        }
    }
}

impl FileId {
    /// The file behind `metadata`.
    pub fn of(metadata: &fs::Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }

    /// The file of an opened image.
    ///
    /// # Errors
    ///
    /// What the host says.
    pub fn of_image(image: &ImageFile) -> Result<Self> {
        let found = nix::sys::stat::fstat(image.as_fd());
        let found =
            found.map_err(|errno| Error::io("looking at the image", errno.into()).file(image.path()))?;
        Ok(Self { device: found.st_dev, inode: found.st_ino })
    }
}

impl ProcessId {
    /// This process.
    ///
    /// # Errors
    ///
    /// When `/proc` is not there.
    pub fn this() -> Result<Self> {
        let pid = std::process::id();
        let start_time = start_time(pid);
        let start_time =
            start_time.ok_or_else(|| Error::new(Kind::Io, "/proc does not say when this process began"))?;
        Ok(Self { pid, start_time })
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }
}

/// The start time of the process that now has this number, unless it has ended and only waits to be reaped.
fn start_time(pid: u32) -> Option<u64> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Field 22 of `/proc/PID/stat`. Field 2 is the program's name in parentheses and may hold anything, so fields
/// are counted from the last parenthesis, behind which the third (the state) begins.
fn parse_stat(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    match fields.next()? {
        "Z" | "X" => None,
        _ => fields.nth(18)?.parse().ok(),
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
    pub(super) fn at(directory: &Path) -> Result<Self> {
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

    /// Writes or replaces an entry.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn write(&self, entry: &Entry) -> Result<()> {
        let path = self.entry_path(entry.id);
        let temporary = self.directory.join(format!(".{}.json.{}", entry.id, std::process::id()));
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
        written.map_err(|error| Error::io("writing the device's entry", error).file(&path))
    }

    /// Removes the entry of device `id` with this mark, and the log if nothing was written to it. A later device
    /// of the same number keeps its own.
    ///
    /// # Errors
    ///
    /// When the file is there and cannot be removed.
    pub fn remove(&self, id: u32, mark: u64) -> Result<()> {
        if self.entry(id)?.is_some_and(|entry| entry.mark != mark) {
            return Ok(());
        }
        let path = self.entry_path(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("removing the device's entry", error).file(&path));
            }
            _ => {}
        }
        let _ = fs::remove_file(self.socket_path(id)); // nobody listens there
        let log = self.log_path(id);
        if fs::metadata(&log).is_ok_and(|metadata| metadata.len() == 0) {
            let _ = fs::remove_file(log); // it holds nothing, so it does no harm either
        }
        Ok(())
    }

    /// Every entry, in the order of the devices' numbers.
    ///
    /// # Errors
    ///
    /// When the directory or an entry cannot be read.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let failed = |error| Error::io("reading the directory of devices", error).file(&self.directory);
        let mut entries = Vec::new();
        for item in fs::read_dir(&self.directory).map_err(failed)? {
            let name = item.map_err(failed)?.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(".json")?.parse().ok());
            if let Some(id) = id {
                entries.extend(self.entry(id)?);
            }
        }
        entries.sort_by_key(|entry: &Entry| entry.id);
        Ok(entries)
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
        let entry = serde_json::from_str(&text);
        let entry = entry.map_err(|error| {
            Error::corrupt("device entry", error.to_string())
                .file(&path)
                .remedy(format!("rm {}", path.display()))
        })?;
        Ok(Some(entry))
    }

    /// Our devices as they are now. Entries of devices that no longer exist are removed.
    ///
    /// # Errors
    ///
    /// When the registry cannot be read, or the kernel does not answer.
    pub fn list(&self) -> Result<Vec<Listed>> {
        let control = match Control::open() {
            Ok(control) => Some(control),
            Err(error) if error.kind() == Kind::NoDriver => None,
            Err(error) => return Err(error),
        };
        let mut listed = Vec::new();
        for entry in self.entries()? {
            match state_of(control.as_ref(), &entry)? {
                Some(state) => listed.push(Listed { entry, state }),
                None => self.remove(entry.id, entry.mark)?,
            }
        }
        Ok(listed)
    }
}

/// Where the device of `entry` stands; `None` when it is gone and nobody needs to know.
pub(super) fn state_of(control: Option<&Control>, entry: &Entry) -> Result<Option<State>> {
    let info = match control {
        Some(control) => control.info(entry.id)?,
        None => None,
    };
    Ok(judge(entry, info, entry.daemon.is_alive()))
}

fn judge(entry: &Entry, kernel: Option<DeviceInfo>, alive: bool) -> Option<State> {
    let ours = kernel.filter(|info| info.mark == entry.mark);
    match ours.map(|info| info.state) {
        None if alive => Some(State::Stopping),
        None if entry.failure.is_some() => Some(State::Failed),
        None => None,
        Some(KernelState::Live) => Some(State::Live),
        Some(KernelState::Dead) if !alive => Some(State::Dead),
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
            image_file: FileId { device: 1, inode: 2 },
            daemon: ProcessId { pid: 1234, start_time: 5678 },
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
        DeviceInfo { id: 0, queues: 1, depth: 64, request_bytes: 4096, flags: 0, state, mark }
    }

    #[test]
    fn an_entry_is_written_read_replaced_and_removed() {
        let place = tempfile::tempdir().expect("a directory");
        let registry = Registry::at(&place.path().join("run")).expect("made");
        assert_eq!(registry.entries().expect("read"), []);
        registry.write(&entry(7)).expect("written");
        registry.write(&entry(3)).expect("written");
        let changed = Entry { failure: Some("no".into()), ..entry(7) };
        registry.write(&changed).expect("replaced");
        assert_eq!(registry.entries().expect("read"), [entry(3), changed.clone()]);
        assert_eq!(registry.entry(7).expect("read"), Some(changed));
        let mode = fs::metadata(registry.entry_path(7)).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, FILE_MODE);
        registry.remove(7, 5).expect("another device's entry is left alone");
        assert!(registry.entry(7).expect("read").is_some());
        registry.remove(7, u64::MAX).expect("removed");
        registry.remove(7, u64::MAX).expect("removing what is not there is no error");
        assert_eq!(registry.entries().expect("read"), [entry(3)]);
    }

    #[test]
    fn a_directory_that_others_may_write_is_refused() {
        let place = tempfile::tempdir().expect("a directory");
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o777)).expect("permitted");
        let error = Registry::at(place.path()).err().expect("refused");
        assert_eq!(error.kind(), Kind::Permission);
    }

    #[test]
    fn a_damaged_entry_is_an_error_that_names_its_file() {
        let place = tempfile::tempdir().expect("a directory");
        let registry = Registry::at(&place.path().join("run")).expect("made");
        fs::write(registry.entry_path(1), "{").expect("written");
        let error = registry.entries().expect_err("damaged");
        assert!(error.to_string().contains("1.json"), "{error}");
    }

    #[test]
    fn a_programs_name_cannot_forge_its_start_time() {
        let stat = |name: &str, state: &str| format!("77 ({name}) {state} {} 4242 0", "0 ".repeat(18).trim());
        assert_eq!(parse_stat(&stat("fio", "S")), Some(4242));
        assert_eq!(parse_stat(&stat("a) S 1 2 (b", "R")), Some(4242));
        assert_eq!(parse_stat(&stat("fio", "Z")), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn this_process_is_alive_and_a_later_one_of_its_number_would_not_be_it() {
        let this = ProcessId::this().expect("/proc");
        assert!(this.is_alive());
        assert!(!ProcessId { start_time: this.start_time + 1, ..this }.is_alive());
    }

    #[test]
    fn a_device_of_another_server_under_our_number_is_not_ours() {
        let ours = entry(0);
        assert_eq!(judge(&ours, Some(info(5, KernelState::Live)), false), None);
        assert_eq!(judge(&ours, Some(info(ours.mark, KernelState::Live)), true), Some(State::Live));
    }

    #[test]
    fn a_dead_device_says_whether_its_daemon_is_at_work() {
        let ours = entry(0);
        let dead = Some(info(ours.mark, KernelState::Dead));
        assert_eq!(judge(&ours, dead, false), Some(State::Dead));
        assert_eq!(judge(&ours, dead, true), Some(State::Stopping));
        assert_eq!(judge(&Entry { started: false, ..entry(0) }, dead, true), Some(State::Starting));
    }

    #[test]
    fn a_failure_stays_until_it_was_told() {
        let failed = Entry { failure: Some("poisoned".into()), ..entry(0) };
        assert_eq!(judge(&failed, None, false), Some(State::Failed));
        assert_eq!(judge(&entry(0), None, false), None);
        assert_eq!(judge(&entry(0), None, true), Some(State::Stopping));
    }
}
