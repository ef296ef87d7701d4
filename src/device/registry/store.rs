//! The directory of entries, and its lock.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use super::entry::{Entry, parse};
use super::request::EndRequest;
use super::reserved::{FILE_MODE, NEXT_ENTRY, Reserved, remove_if_there};
use crate::device::control::POLL_INTERVAL;
use crate::device::links;
use crate::device::name::Name;
use crate::device::process::ProcessId;
use crate::disk::HostFile;
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::machine;
use crate::printable::shell;
use crate::simulation::{Plant, planted};

/// The directory of entries and of the daemons' logs; only root may read it.
pub const RUN_DIRECTORY: &str = "/run/vhdx-ublk";

/// Mode of the directory, and of what is in it.
const DIRECTORY_MODE: u32 = 0o700;

/// How long to wait for the lock of the directory: its holder may wait for the kernel to make a device, which
/// has a deadline of half a minute.
const LOCK_PATIENCE: Duration = Duration::from_secs(35);

/// The file that an upgrade locks.
const UPGRADES: &str = ".upgrade";

/// Why that is locked.
const UPGRADING: &str = "another upgrade is under way, or a device is being served again";

/// Why a keeper's file is locked.
const BEING_RECOVERED: &str = "the device is being served again, or removed";

/// How often a new daemon writes the entry of a device that it takes over: its name, and all once it serves.
const ENTRIES_OF_TAKEOVER: usize = 2;

/// An entry that cannot be read.
#[derive(Debug)]
pub struct Unreadable {
    /// The N of `/dev/ublkbN`.
    pub id: u32,
    /// Why.
    pub error: Error,
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
    /// If its directory can be neither found nor made, or other users could write to it.
    pub fn open() -> Result<Self> {
        Self::at(machine::run_folder(RUN_DIRECTORY))
    }

    /// The registry in `directory`, which is made if it does not exist.
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
                    with_room(error)
                });
            }
            _ => {}
        }
        let found = fs::symlink_metadata(directory);
        let found = found.doing("reading the directory of devices").file(directory)?;
        let user = nix::unistd::geteuid();
        if found.uid() != user.as_raw() && !user.is_root() {
            let message = "the directory of devices belongs to another user";
            return Err(Error::new(Kind::Permission, message).file(directory).remedy("run it as root"));
        }
        if !found.is_dir() || found.mode() & 0o022 != 0 || found.uid() != user.as_raw() {
            let message = "the directory of devices must belong to root, and no other user may write to it";
            return Err(Error::new(Kind::Permission, message).file(directory).remedy("remove it"));
        }
        Ok(Self { directory: directory.to_owned() })
    }

    /// The file to which the daemon of device `id` writes its warnings.
    pub fn log_path(&self, id: u32) -> PathBuf {
        self.directory.join(format!("{id}.log"))
    }

    /// The socket at which the daemon of device `id` listens.
    pub fn socket_path(&self, id: u32) -> PathBuf {
        self.directory.join(format!("{id}.sock"))
    }

    /// Where it is.
    pub(in crate::device) fn directory(&self) -> &Path {
        &self.directory
    }

    /// By which the next daemon of device `id` with this mark knows that this one was asked to end.
    pub(in crate::device) fn request(&self, id: u32, mark: u64) -> EndRequest {
        EndRequest { path: self.directory.join(request_name(id)), mark }
    }

    /// Has the next daemon of device `id` stay whatever those before it were asked.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn forget_request(&self, id: u32) -> Result<()> {
        let path = self.directory.join(request_name(id));
        remove_if_there(&path).doing("forgetting a request to end").file(&path)
    }

    /// The file that a mount or unmount of an image locks.
    pub fn mount_lock_path(&self) -> PathBuf {
        self.directory.join(".mount")
    }

    /// How the names of the files begin that [`Self::trim_record_path`] gives.
    pub const TRIM_RECORD: &str = ".trim-";

    /// The file that says how far the image in `file` is trimmed.
    pub fn trim_record_path(&self, file: HostFile) -> PathBuf {
        self.directory.join(format!("{}{:x}-{:x}", Self::TRIM_RECORD, file.device, file.inode))
    }

    fn entry_path(&self, id: u32) -> PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    /// Keeps every other writer out until it is dropped.
    ///
    /// # Errors
    ///
    /// [`Kind::InUse`] if another process holds it for too long; the host's.
    pub fn lock(&self) -> Result<Locked<'_>> {
        let message = "another vhdx-ublk has the directory of devices locked";
        let lock = self.lock_file(".lock", message, FlockArg::LockExclusiveNonblock)?;
        Ok(Locked { registry: self, _lock: lock })
    }

    /// Keeps every other upgrade out until it is dropped; waits for one that is under way.
    ///
    /// # Errors
    ///
    /// As [`Self::lock`].
    pub fn lock_upgrades(&self) -> Result<Flock<File>> {
        self.lock_file(UPGRADES, UPGRADING, FlockArg::LockExclusiveNonblock)
    }

    /// Keeps upgrades out until it is dropped, and nothing else: each keeper does, and one of them may have
    /// to wait for its image for long.
    ///
    /// # Errors
    ///
    /// As [`Self::lock`].
    pub fn keep_upgrades_out(&self) -> Result<Flock<File>> {
        self.lock_file(UPGRADES, "an upgrade is under way", FlockArg::LockSharedNonblock)
    }

    /// Says that a process serves device `id` again whenever its daemon dies.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn announce_keeper(&self, id: u32) -> Result<()> {
        self.lock_file(&keeper_name(id), BEING_RECOVERED, FlockArg::LockExclusiveNonblock).map(drop)
    }

    /// Keeps that process from serving the device again until this is dropped; waits while it does. `None` if
    /// there is no such process.
    ///
    /// # Errors
    ///
    /// As [`Self::lock`].
    pub fn hold_keeper(&self, id: u32) -> Result<Option<Flock<File>>> {
        let name = keeper_name(id);
        if !self.directory.join(&name).exists() {
            return Ok(None);
        }
        self.lock_file(&name, BEING_RECOVERED, FlockArg::LockExclusiveNonblock).map(Some)
    }

    fn lock_file(&self, name: &str, held: &str, how: FlockArg) -> Result<Flock<File>> {
        const FAILED: &str = "locking the directory of devices";
        let path = self.directory.join(name);
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(FILE_MODE).open(&path);
        let mut file = file.doing(FAILED).file(&path).map_err(with_room)?;
        let until = machine::now() + LOCK_PATIENCE;
        loop {
            machine::turn("locks a file of the registry");
            file = match Flock::lock(file, how) {
                Ok(lock) => return Ok(lock),
                Err((file, nix::Error::EWOULDBLOCK | nix::Error::EINTR)) => file,
                Err((_, errno)) => return Err(errno).doing(FAILED).file(&path),
            };
            if machine::now() >= until {
                let remedy = format!("find it: fuser -v {}", shell(&path));
                return Err(Error::new(Kind::InUse, held).file(&path).remedy(remedy));
            }
            machine::pause(POLL_INTERVAL);
        }
    }

    /// Writes or replaces an entry.
    ///
    /// # Errors
    ///
    /// If the file cannot be written.
    pub fn write(&self, entry: &Entry) -> Result<()> {
        self.write_in(entry, &mut Reserved::default())
    }

    /// The same in room that was taken before, as long as there is some.
    ///
    /// # Errors
    ///
    /// As [`Self::write`].
    pub fn write_in(&self, entry: &Entry, room: &mut Reserved) -> Result<()> {
        self.lock()?.put(entry.id, &text_of(entry)?, room)
    }

    /// The daemon of device `id` with this mark, also if this program does not read the rest of its entry.
    pub(in crate::device) fn daemon(&self, id: u32, mark: u64) -> Option<ProcessId> {
        let text = fs::read_to_string(self.entry_path(id)).ok()?;
        let entry: serde_json::Value = serde_json::from_str(&text).ok()?;
        let daemon = entry.get("daemon").filter(|_| entry["mark"] == mark)?;
        serde_json::from_value(daemon.clone()).ok()
    }

    /// Takes the room that a new daemon of the device needs for its entry.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub fn reserve(&self, entry: &Entry) -> Result<Reserved> {
        let room = Reserved::take(&self.directory, &text_of(entry)?, ENTRIES_OF_TAKEOVER);
        room.doing("taking room for the device's entry").file(&self.directory).map_err(with_room)
    }

    /// Names `daemon` as that of the device of `entry`, and leaves everything else in its entry as it is,
    /// also what this program does not know: the program that wrote it can still read it.
    ///
    /// # Errors
    ///
    /// As [`Self::write`].
    pub fn name_daemon(&self, entry: &Entry, daemon: ProcessId, room: &mut Reserved) -> Result<()> {
        let locked = self.lock()?;
        let text = fs::read_to_string(self.entry_path(entry.id)).ok();
        let found = text.as_deref().filter(|_| !planted(Plant::EarlyEntry));
        let found = found.and_then(|text| with_daemon(text, entry.mark, daemon));
        let text = found.map_or_else(|| text_of(&Entry { daemon, ..entry.clone() }), Ok)?;
        locked.put(entry.id, &text, room)
    }

    /// Removes the entry of device `id` with this mark, and the log if it is empty. A later device of the
    /// same number keeps its own, and an entry that cannot be read stays.
    ///
    /// # Errors
    ///
    /// If the file exists and cannot be removed.
    pub fn remove(&self, id: u32, mark: u64) -> Result<()> {
        let locked = self.lock()?;
        match self.entry(id) {
            Ok(Some(entry)) if entry.mark != mark => Ok(()),
            Ok(_) => locked.unlink(id),
            Err(_unreadable) => Ok(()),
        }
    }

    /// Whether the image of device `id` was added as one that may be malicious. What cannot be read counts.
    pub fn is_untrusted(&self, id: u32) -> bool {
        self.directory.join(untrusted_name(id)).try_exists().unwrap_or(true)
    }

    /// Every entry, in the order of the devices' numbers, and every one that cannot be read.
    ///
    /// # Errors
    ///
    /// If the directory cannot be read.
    pub fn entries(&self) -> Result<(Vec<Entry>, Vec<Unreadable>)> {
        const FAILED: &str = "reading the directory of devices";
        let (mut entries, mut unreadable) = (Vec::new(), Vec::new());
        for item in fs::read_dir(&self.directory).doing(FAILED).file(&self.directory)? {
            let name = item.doing(FAILED).file(&self.directory)?.file_name();
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

    /// The numbers of devices that have files here, and no entry.
    pub(super) fn strays(&self) -> Result<BTreeSet<u32>> {
        const FAILED: &str = "reading the directory of devices";
        let mut strays = BTreeSet::new();
        for item in fs::read_dir(&self.directory).doing(FAILED).file(&self.directory)? {
            let name = item.doing(FAILED).file(&self.directory)?.file_name();
            let id = name.to_str().and_then(id_of_stray).filter(|&id| !self.entry_path(id).exists());
            strays.extend(id);
        }
        Ok(strays)
    }

    /// Whether a writer that was killed has left an entry that has not got its name, or one writes it now.
    pub(super) fn has_half_entry(&self) -> bool {
        self.directory.join(NEXT_ENTRY).exists()
    }

    /// The entry of device `id`, if there is one.
    ///
    /// # Errors
    ///
    /// If it exists but cannot be read.
    pub fn entry(&self, id: u32) -> Result<Option<Entry>> {
        let path = self.entry_path(id);
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            text => text.doing("reading the device's entry").file(&path)?,
        };
        let entry = parse(&text).map_err(|error| match error.remedy_text() {
            Some(_) => error.file(&path),
            None => error.file(&path).remedy(format!(
                "the device continues; `vhdx-ublk del --force {id}` removes it, and the entry with it"
            )),
        })?;
        if entry.id != id {
            let message = format!("it is the entry of device {}", entry.id);
            return Err(Error::corrupt("device entry", message).file(&path));
        }
        Ok(Some(entry))
    }
}

/// Writes over the entry at `path`, where it was `refused` room to replace that. Whoever reads it at this
/// moment may read neither the old nor the new one; without that its device would not be served.
fn overwrite(path: &Path, text: &str, refused: io::Error) -> io::Result<()> {
    if !matches!(refused.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) {
        return Err(refused);
    }
    let Ok(file) = OpenOptions::new().write(true).open(path) else { return Err(refused) };
    let found = file.metadata()?;
    if u64::try_from(text.len()).expect("short") > found.blocks() * 512 {
        return Err(refused);
    }
    // Blanks behind an entry are no part of it. They are counted in bytes, as the old entry's end is.
    let mut padded = text.as_bytes().to_vec();
    padded.resize(padded.len().max(usize::try_from(found.len()).expect("short")), b' ');
    file.write_all_at(&padded, 0)
}

/// The file that the keeper of device `id` makes, and locks while it serves that again.
fn keeper_name(id: u32) -> String {
    format!("{id}.respawn")
}

/// The file by which the rules of udev, and `mount`, know that the image of device `id` is not trusted.
fn untrusted_name(id: u32) -> String {
    format!("{id}.untrusted")
}

/// The file by which the next daemon of device `id` knows what those before it were asked.
fn request_name(id: u32) -> String {
    format!("{id}.ending")
}

/// The number of the device that `name`, of a file that only one with an entry needs, belongs to.
fn id_of_stray(name: &str) -> Option<u32> {
    let (id, _) = name.split_once('.')?;
    let id = id.parse().ok()?;
    [keeper_name(id), untrusted_name(id), request_name(id)].iter().any(|stray| stray == name).then_some(id)
}

/// An entry as it is written.
fn text_of(entry: &Entry) -> Result<String> {
    serde_json::to_string_pretty(entry).doing("describing the device").file(&entry.image)
}

/// The `text` of an entry with this mark, with another daemon.
fn with_daemon(text: &str, mark: u64, daemon: ProcessId) -> Option<String> {
    let mut entry: serde_json::Value = serde_json::from_str(text).ok()?;
    if entry.get("mark")?.as_u64() != Some(mark) {
        return None;
    }
    *entry.get_mut("daemon")? = serde_json::to_value(daemon).ok()?;
    serde_json::to_string_pretty(&entry).ok()
}

/// `error` of a change, with what makes changes possible. A device that no other command could find is not
/// served.
fn with_room(error: Error) -> Error {
    match error.os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => error.remedy(
            "free some space in /run: each device needs a few KiB there, from which other commands know it",
        ),
        Some(libc::EROFS) => error
            .remedy("mount /run writable: each device has an entry there, from which other commands know it"),
        _ => error,
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
    /// If the file cannot be written.
    pub fn write(&self, entry: &Entry) -> Result<()> {
        self.put(entry.id, &text_of(entry)?, &mut Reserved::default())
    }

    fn put(&self, id: u32, text: &str, room: &mut Reserved) -> Result<()> {
        let path = self.registry.entry_path(id);
        machine::turn("writes the entry");
        let written = room
            .put(text, &path)
            .unwrap_or_else(|| self.replace(&path, text).or_else(|refused| overwrite(&path, text, refused)));
        written.doing("writing the device's entry").file(&path).map_err(with_room)
    }

    /// Removes what a writer that was killed has left.
    pub(super) fn remove_half_entry(&self) -> Result<()> {
        let path = self.registry.directory.join(NEXT_ENTRY);
        remove_if_there(&path).doing("removing half an entry").file(&path)
    }

    /// Has the rules of udev know whether the image of device `id` is trusted, before the device is there.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn mark_untrusted(&self, id: u32, is_untrusted: bool) -> Result<()> {
        const FAILED: &str = "marking the device as untrusted";
        let path = self.registry.directory.join(untrusted_name(id));
        remove_if_there(&path).doing(FAILED).file(&path)?;
        if is_untrusted {
            File::create_new(&path).doing(FAILED).file(&path).map_err(with_room)?;
        }
        Ok(())
    }

    /// Refuses a name that a device has.
    ///
    /// # Errors
    ///
    /// [`Kind::InUse`], with the device; if the entries cannot be read.
    pub fn refuse_name_in_use(&self, name: &Name) -> Result<()> {
        let (entries, _) = self.registry.entries()?;
        let Some(other) = entries.into_iter().find(|entry| entry.name.as_ref() == Some(name)) else {
            return Ok(());
        };
        let device = other.device.display();
        let message = format!("{device} has the name {name}");
        let remedy = format!("choose another name, or `vhdx-ublk del {device}` first");
        Err(Error::new(Kind::InUse, message).remedy(remedy))
    }

    /// Half of an entry is removed when this fails.
    fn replace(&self, path: &Path, text: &str) -> io::Result<()> {
        let next = self.registry.directory.join(NEXT_ENTRY);
        remove_if_there(&next)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(FILE_MODE).open(&next)?;
        let written = writeln!(file, "{text}").and_then(|()| {
            machine::turn("puts the entry in its place");
            fs::rename(&next, path)
        });
        written.inspect_err(|_| {
            let _ = fs::remove_file(&next); // the error says what is wrong with the folder
        })
    }

    /// Removes the entry of device `id`, its socket, its names, and its log if that is empty.
    pub(super) fn unlink(&self, id: u32) -> Result<()> {
        if let Ok(Some(Entry { disk_sequence, name, .. })) = self.registry.entry(id) {
            links::withdraw(&self.registry.directory, id, disk_sequence, name.as_ref());
        }
        let path = self.registry.entry_path(id);
        machine::turn("removes the entry");
        remove_if_there(&path).doing("removing the device's entry").file(&path)?;
        let _ = fs::remove_file(self.registry.socket_path(id)); // no process listens there
        for name in [keeper_name(id), untrusted_name(id), request_name(id)] {
            let _ = fs::remove_file(self.registry.directory.join(name)); // there may be none
        }
        let log = self.registry.log_path(id);
        if fs::metadata(&log).is_ok_and(|metadata| metadata.len() == 0) {
            let _ = fs::remove_file(log); // an empty log does no harm either
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;
    use std::os::unix::fs::PermissionsExt;
    use std::thread;

    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    use super::super::entry::tests::entry;
    use super::*;

    /// A lock that keeps nothing out.
    fn locked(directory: &Path) -> Flock<File> {
        let file = File::create(directory.join("lock")).expect("room");
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno).expect("free")
    }

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
        let names: Vec<_> = fs::read_dir(&registry.directory).expect("readable").flatten().collect();
        assert_eq!(names.len(), 3, "two entries and the lock: {names:?}");
        registry.remove(7, 5).expect("the entry of another device is left alone");
        assert!(registry.entry(7).expect("read").is_some());
        registry.remove(7, u64::MAX).expect("removed");
        registry.remove(7, u64::MAX).expect("removing what is not there is no error");
        assert_eq!(read(&registry), [entry(3)]);
    }

    #[test]
    fn keepers_do_not_wait_for_each_other() {
        let place = tempfile::tempdir().expect("a directory");
        let registry = Registry::at(&place.path().join("run")).expect("made");
        let first = registry.keep_upgrades_out().expect("none is under way");
        let second = registry.keep_upgrades_out().expect("the first keeper does not mind");
        drop((first, second));
        let upgrade = registry.lock_upgrades().expect("no keeper is at work");
        let path = registry.directory.join(UPGRADES);
        let file = File::open(path).expect("there");
        assert!(Flock::lock(file, FlockArg::LockSharedNonblock).is_err(), "an upgrade keeps keepers out");
        drop(upgrade);
    }

    #[test]
    fn what_is_not_trusted_is_known_until_the_device_is_gone() {
        let place = tempfile::tempdir().expect("a directory");
        let registry = Registry::at(&place.path().join("run")).expect("made");
        registry.write(&entry(7)).expect("written");
        assert!(!registry.is_untrusted(7));
        registry.lock().expect("locked").mark_untrusted(7, true).expect("marked");
        registry.write(&entry(7)).expect("replaced, as after a recovery");
        assert!(registry.is_untrusted(7) && !registry.is_untrusted(3));
        registry.remove(7, entry(7).mark).expect("removed");
        assert!(!registry.is_untrusted(7));
    }

    #[test]
    fn what_a_killed_process_has_left_of_a_device_is_known_by_its_number() {
        let place = tempfile::tempdir().expect("a directory");
        let registry = Registry::at(&place.path().join("run")).expect("made");
        registry.write(&entry(7)).expect("written");
        for name in ["3.ending", "4.untrusted", "5.respawn", "7.ending", "6.log", "x.ending", ".entry"] {
            fs::write(registry.directory.join(name), "").expect("room");
        }
        assert!(registry.has_half_entry());
        assert_eq!(registry.strays().expect("readable"), [3, 4, 5].into());
        let locked = registry.lock().expect("free");
        locked.remove_half_entry().expect("removed");
        locked.unlink(3).expect("removed");
        assert!(!registry.has_half_entry());
        assert_eq!(registry.strays().expect("readable"), [4, 5].into());
    }

    #[test]
    fn an_entry_that_cannot_be_written_leaves_nothing_behind() {
        let place = tempfile::tempdir().expect("a directory");
        let registry = Registry::at(&place.path().join("run")).expect("made");
        fs::create_dir(registry.entry_path(7)).expect("made");
        let error = registry.write(&entry(7)).expect_err("a directory has its path");
        assert!(error.to_string().contains("7.json"), "{error}");
        assert_eq!(error.os_error(), Some(libc::EISDIR), "{error:?}");
        let names: Vec<_> = fs::read_dir(&registry.directory).expect("readable").flatten().collect();
        assert_eq!(names.len(), 2, "the directory and the lock: {names:?}");
        let registry = Registry { directory: place.path().join("gone") };
        let error = Locked { registry: &registry, _lock: locked(place.path()) }.write(&entry(7));
        assert_eq!(error.expect_err("no directory").os_error(), Some(libc::ENOENT));
    }

    /// On a tmpfs that no other thread sees; only root may make one.
    #[test]
    fn what_a_takeover_writes_has_its_room_however_full_the_directory_is() {
        let place = tempfile::tempdir().expect("a directory");
        let apart = || {
            let no = None::<&str>;
            let mounted = unshare(CloneFlags::CLONE_NEWNS)
                .and_then(|()| mount(no, "/", no, MsFlags::MS_REC | MsFlags::MS_PRIVATE, no))
                .and_then(|()| mount(no, place.path(), Some("tmpfs"), MsFlags::empty(), Some("size=64k")));
            if mounted.is_err() {
                assert!(!nix::unistd::geteuid().is_root(), "root may mount: {mounted:?}");
                return;
            }
            let registry = Registry::at(&place.path().join("run")).expect("made");
            registry.write(&entry(3)).expect("written");
            let mut room = registry.reserve(&entry(3)).expect("there is room");
            let rest = fs::write(place.path().join("filler"), vec![1; 64 << 10]).expect_err("full");
            assert_eq!(rest.raw_os_error(), Some(libc::ENOSPC));
            let error = registry.reserve(&entry(3)).expect_err("no room is left");
            assert!(error.remedy_text().is_some_and(|text| text.contains("space in /run")), "{error:?}");
            let other = ProcessId { pid: 77, start_time: 1, namespace: 0 };
            registry.name_daemon(&entry(3), other, &mut room).expect("in its room");
            fs::write(place.path().join("more"), [1]).expect("that of the entry before");
            let long = Entry { notify_socket: Some("x".repeat(500)), daemon: other, ..entry(3) };
            registry.write_in(&long, &mut room).expect("in its room");
            assert_eq!(registry.entry(3).expect("read"), Some(long));
            let names: Vec<_> = fs::read_dir(&registry.directory).expect("readable").flatten().collect();
            assert_eq!(names.len(), 2, "the entry and the lock: {names:?}");
        };
        thread::scope(|scope| scope.spawn(apart).join()).expect("it does not panic");
    }

    #[test]
    fn a_daemon_is_named_in_an_entry_that_its_writer_still_reads() {
        let place = tempfile::tempdir().expect("a directory");
        let registry = Registry::at(&place.path().join("run")).expect("made");
        let ours =
            text_of(&entry(3)).expect("text").replace("\"format\": 1", "\"format\": 9, \"later\": [7]");
        fs::write(registry.entry_path(3), ours).expect("room");
        let daemon = ProcessId { pid: 77, start_time: 1, namespace: 0 };
        registry.name_daemon(&entry(3), daemon, &mut Reserved::default()).expect("written");
        let found = fs::read_to_string(registry.entry_path(3)).expect("there");
        let found: serde_json::Value = serde_json::from_str(&found).expect("JSON");
        assert_eq!((&found["format"], &found["later"][0]), (&9.into(), &7.into()));
        assert_eq!(found["daemon"]["pid"], 77);
        let another = Entry { mark: 5, ..entry(3) };
        registry.name_daemon(&another, daemon, &mut Reserved::default()).expect("written");
        assert_eq!(registry.entry(3).expect("whole"), Some(Entry { daemon, ..another }));
    }

    #[test]
    fn a_directory_that_others_may_write_is_refused() {
        let place = tempfile::tempdir().expect("a directory");
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o777)).expect("permitted");
        let error = Registry::at(place.path()).err().expect("refused");
        assert_eq!(error.kind(), Kind::Permission);
    }

    #[test]
    fn an_unreadable_entry_hides_no_other_and_the_remedy_is_not_to_remove_it() {
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
        registry.remove(1, 7).expect("its owner is not known");
        assert!(registry.entry_path(1).exists());
    }

    #[test]
    fn an_image_of_any_name_has_an_entry() {
        let place = tempfile::tempdir().expect("a directory");
        let registry = Registry::at(&place.path().join("run")).expect("made");
        let odd = |bytes: &[u8]| PathBuf::from(std::ffi::OsString::from_vec(bytes.to_vec()));
        let odd = Entry { image: odd(b"/a\xff\n.vhdx"), parents: vec![odd(b"/\xfe")], ..entry(1) };
        registry.write(&odd).expect("written");
        assert_eq!(read(&registry), [odd]);
    }

    /// Names of files have more bytes than characters; what an entry leaves of a longer one is no text.
    #[test]
    fn an_entry_of_any_name_is_written_over_a_longer_one_and_a_shorter_one() {
        let place = tempfile::tempdir().expect("a directory");
        let registry = Registry::at(&place.path().join("run")).expect("made");
        let [short, long] = [20, 200].map(|length| {
            let image = format!("/{}.vhdx", "ä".repeat(length)).into();
            Entry { image, ..entry(1) }
        });
        let path = registry.entry_path(1);
        for (first, second) in [(&long, &short), (&short, &long), (&long, &entry(1))] {
            registry.write(first).expect("written");
            let length = fs::metadata(&path).expect("there").len();
            let text = text_of(second).expect("text");
            overwrite(&path, &text, io::Error::from_raw_os_error(libc::ENOSPC)).expect("in its block");
            assert_eq!(registry.entry(1).expect("whole"), Some(second.clone()));
            let written = fs::metadata(&path).expect("there").len();
            assert_eq!(written, length.max(text.len() as u64), "no byte more than is needed");
        }
    }

    #[test]
    fn one_writer_at_a_time() {
        let place = tempfile::tempdir().expect("a directory");
        let registry = Registry::at(&place.path().join("run")).expect("made");
        let locked = registry.lock().expect("free");
        let (sender, written) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                registry.write(&entry(1)).expect("the lock becomes free");
                sender.send(()).expect("the receiver is here");
            });
            locked.write(&entry(2)).expect("the lock is held here");
            assert!(written.recv_timeout(Duration::from_millis(50)).is_err(), "another wrote meanwhile");
            drop(locked);
        });
        assert_eq!(read(&registry), [entry(1), entry(2)]);
    }
}
