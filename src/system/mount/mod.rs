//! Mounting the file system of an image, and unmounting it.
//!
//! The image is served by a device, and what is on the device decides what is mounted. The device is open
//! from the look to the end of the mount: it is not removed meanwhile, and no other gets its number. Whoever
//! can write to the file of the image can change what is on it all the same: what keeps such an image from
//! giving rights, or from stopping the machine, are options that depend on who that is, and not on what was
//! seen. mount(8) does the mount: it knows the file systems, their options and their helpers. It gets the
//! type, and does not look for one itself.
//!
//! Invariants:
//!
//! * a mount that fails takes the device away that was made for it;
//! * no file system is mounted that was seen to lead the kernel to other devices of the machine;
//! * what is on an image that others than root can write to, or that was added as untrusted, gives no rights
//!   and has the machine not stop, unless the options say so;
//! * only a device that was made for a mount is removed with the last mount of it; its registry entry says
//!   so;
//! * one mount or unmount at a time: two mounts of one image share its device.

mod choice;
mod mounted;
mod options;
mod trim;
mod trust;

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use choice::{Choice, Place};
use mounted::Mounted;
use nix::fcntl::Flock;
pub use options::MountOptions;
pub use trim::trim_mounted;
use trust::Held;

use crate::device::claims;
use crate::device::registry::{Entry, Listed, Registry, State};
use crate::device::spec::Ready;
use crate::device::stop::{self, How, Target};
use crate::disk::HostFile;
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::machine;
use crate::system::device_disk::DeviceDisk;
use crate::system::{lock, node, program};

/// What the mount of an image has that others than root can write to, unless the user says otherwise.
const RESTRICTIONS: [&str; 2] = ["nosuid", "nodev"];

/// What such a mount has, too, if it is one of these types: their superblock may ask for a panic of the
/// machine when an error is found, and the image has whatever errors its owner likes.
const WITHOUT_PANIC: &str = "errors=remount-ro";
const PANICKING: [&str; 3] = ["ext2", "ext3", "ext4"];

/// The file that a mount or unmount on this machine locks, and its folder.
const MOUNTS: &str = ".vhdx-ublk.mount";
const RUN: &str = "/run";

/// Who unmounts: `umount DIR` calls `umount.vhdx`, which removes the device.
const HELPER: &str = "helper=vhdx";

/// What is to be mounted.
#[derive(Clone, Debug)]
pub struct MountRequest {
    /// The image.
    pub image: PathBuf,
    /// Where.
    pub folder: PathBuf,
    /// The type of the file system; without it, the one that is recognised.
    pub kind: Option<String>,
    /// The options.
    pub options: MountOptions,
    /// Options of mount(8) itself, like `-v`.
    pub flags: Vec<OsString>,
}

impl MountRequest {
    /// Whether there is no image, and that is no failure (`nofail`).
    pub fn is_missing(&self) -> bool {
        self.options.may_be_missing && !self.image.exists()
    }
}

/// What is to be unmounted.
#[derive(Clone, Debug)]
pub struct UnmountRequest {
    /// Where it is mounted.
    pub folder: PathBuf,
    /// Detach it now, and end its use later.
    pub lazy: bool,
    /// Options of umount(8), like `-v`.
    pub flags: Vec<OsString>,
}

/// Mounts the file system of an image; returns the node that is mounted. `add` makes the device, if none
/// serves the image yet.
///
/// # Errors
///
/// Whatever prevented it; nothing is left behind then. The kind is [`Kind::NotFound`] if there is no image.
pub fn mount(request: &MountRequest, add: impl FnOnce() -> Result<Ready>) -> Result<PathBuf> {
    claims::require_root(claims::DEVICES_NEED_ROOT)?;
    let image = Held::at(&request.image)?;
    let folder = fs::canonicalize(&request.folder).doing("finding the folder").file(&request.folder)?;
    let _alone = Alone::wait()?;
    let (id, is_new) = match served(image.file())? {
        Some(entry) => {
            refuse_read_only(&entry, request)?;
            refuse_trusting(&Registry::open()?, &entry, request)?;
            (entry.id, false)
        }
        None => (add()?.id, true),
    };
    let registry = Registry::open()?;
    let mounted = require(&registry, id, image.file(), request)
        .and_then(|entry| mount_device(request, &folder, id, is_trusted(&registry, &image, &entry)));
    if mounted.is_err() && is_new {
        remove(&registry, id);
    }
    mounted
}

/// Whether what is on the image may give rights: root alone decides what that is, and has not said that it is
/// anybody's.
fn is_trusted(registry: &Registry, image: &Held, entry: &Entry) -> bool {
    image.is_of_root(entry) && !registry.is_untrusted(entry.id)
}

/// Keeps every other mount and unmount waiting until it is dropped: of this machine, and of the containers
/// that share its registry, if there is one. None is made for it: as long as there is none, no command needs
/// root to see whether a device has an image.
struct Alone {
    _machine: Flock<File>,
    _sharing: Option<Flock<File>>,
}

impl Alone {
    fn wait() -> Result<Self> {
        const OTHER: &str = "another mount or unmount of an image";
        let machine = lock::acquire(&machine::run_folder(RUN).join(MOUNTS), OTHER)?;
        let registry = claims::registry()?;
        let sharing =
            registry.map(|registry| lock::acquire(&registry.mount_lock_path(), OTHER)).transpose()?;
        Ok(Self { _machine: machine, _sharing: sharing })
    }
}

/// The entry of the device. Fails unless it serves the file that was examined: its name may lead elsewhere
/// by now.
fn require(registry: &Registry, id: u32, file: HostFile, request: &MountRequest) -> Result<Entry> {
    let entry = stop::find(registry, &Target::Id(id))?.entry;
    if entry.image_file == file {
        return Ok(entry);
    }
    let error = Error::new(Kind::InUse, "it was replaced while it was being mounted").file(&request.image);
    Err(error.remedy("find out what changes the folder, and mount it again"))
}

/// The device that serves the image.
fn served(image: HostFile) -> Result<Option<Entry>> {
    let serves = |listed: &Listed| listed.entry.image_file == image && listed.state == State::Live;
    Ok(claims::devices()?.into_iter().find(serves).map(|listed| listed.entry))
}

/// A device that is there stays as it is.
fn refuse_read_only(entry: &Entry, request: &MountRequest) -> Result<()> {
    if !entry.read_only || request.options.read_only {
        return Ok(());
    }
    let message = format!("{} serves the image read-only", entry.device.display());
    Err(Error::new(Kind::InUse, message).file(&request.image).remedy("mount it read-only, too (-o ro)"))
}

/// The kernel has read the partition table of such a device, and its parents may lie anywhere.
fn refuse_trusting(registry: &Registry, entry: &Entry, request: &MountRequest) -> Result<()> {
    if !request.options.is_untrusted() || registry.is_untrusted(entry.id) {
        return Ok(());
    }
    let message = format!("{} serves the image without --untrusted", entry.device.display());
    let error = Error::new(Kind::InUse, message).file(&request.image);
    Err(error.remedy(format!("vhdx-ublk del {}, then mount it again", entry.id)))
}

fn mount_device(request: &MountRequest, folder: &Path, id: u32, is_trusted: bool) -> Result<PathBuf> {
    let device = PathBuf::from(format!("/dev/ublkb{id}"));
    // In use, it stays this device until mount(8) has ended.
    let disk = DeviceDisk::open(&device)?;
    let contents = disk.contents();
    let choice = choice::choose(&contents, request.options.partition.as_deref())?;
    let kind = choice.type_for_mount(request.kind.as_deref()).map_err(|error| error.file(&request.image))?;
    let insists = ["force", "remove_hiberfile"].iter().any(|option| request.options.has(option));
    if !request.options.read_only && !insists {
        choice.refuse_unclean()?;
    }
    let source = Source::of(&device, choice.place);
    if is_mounted(folder, id, &source)? {
        tracing::info!("{} is mounted at {} already", request.image.display(), folder.display());
        return Ok(source.node);
    }
    choice.refuse_joined(&source.node, if source.options.is_empty() { 0 } else { choice.start() })?;
    let options = options(request, kind, &choice, &source, is_trusted);
    let status = command(request, (kind, folder), &options, &source).status().doing("running mount(8)")?;
    drop(disk);
    if status.success() {
        return Ok(source.node);
    }
    let node = source.node.display();
    let error = Error::new(Kind::Io, format!("mount(8) cannot mount {node} ({status})")).file(&request.image);
    Err(error.remedy(match choice.volume.map(|volume| volume.kind.name()) {
        Some("ntfs") if request.kind.is_none() => {
            "where ntfs-3g is not installed, name the kernel's driver: -t ntfs3, for mount(8) -t vhdx.ntfs3"
                .into()
        }
        Some(kind) => format!("the volume is {kind}; dmesg may say more"),
        None => "what the volume holds was not recognised; dmesg may say more".into(),
    }))
}

/// What mount(8) gets to mount.
struct Source {
    node: PathBuf,
    /// Which part of it, if not all of it.
    options: Vec<String>,
}

impl Source {
    /// The source for `place` on the `device`. Where the kernel has no node for the partition, a loop device
    /// shows that part of the disk.
    fn of(device: &Path, place: Option<Place>) -> Self {
        let whole = |options| Self { node: device.to_owned(), options };
        let Some(Place { number, start, length }) = place else { return whole(Vec::new()) };
        match node::of_partition(device, number, start, length) {
            Some(node) => Self { node, options: Vec::new() },
            None => whole(vec![format!("loop,offset={start},sizelimit={length}")]),
        }
    }
}

/// Whether exactly this is mounted at `folder`, as when `mount -a` runs again.
fn is_mounted(folder: &Path, id: u32, source: &Source) -> Result<bool> {
    let Some(Mounted { id: there, node, .. }) = mounted::at(folder)? else { return Ok(false) };
    let number = mounted::number_of(&source.node).doing("examining the device").file(&source.node)?;
    Ok(there == id && (node == number || !source.options.is_empty()))
}

/// The options for mount(8): of contradicting ones the last counts, so those of the user come last.
fn options(
    request: &MountRequest,
    kind: &str,
    choice: &Choice,
    source: &Source,
    is_trusted: bool,
) -> Vec<String> {
    let mut options = vec![HELPER.to_owned()];
    options.extend(source.options.iter().cloned());
    if !is_trusted {
        options.extend(RESTRICTIONS.map(str::to_owned));
        options.extend(PANICKING.contains(&kind).then(|| WITHOUT_PANIC.to_owned()));
    }
    if request.options.read_only {
        options.push("ro".into());
        if let Some(option) = choice.without_replay().filter(|option| !request.options.has(option)) {
            tracing::warn!(
                "{}: the file system was not unmounted cleanly; its journal is not replayed, because the \
                 mount is read-only",
                request.image.display()
            );
            options.push(option.into());
        }
    }
    options.extend(request.options.inner.iter().cloned());
    options
}

/// The command that mounts the file system.
fn command(
    request: &MountRequest,
    (kind, folder): (&str, &Path),
    options: &[String],
    source: &Source,
) -> Command {
    let mut command = program::command("mount");
    command.args(&request.flags);
    command.args(["-t", kind]).arg("-o").arg(options.join(",")).arg("--").arg(&source.node).arg(folder);
    command
}

/// Removes a device that could not be mounted.
fn remove(registry: &Registry, id: u32) {
    let how = How { force: true, timeout: stop::DEFAULT_TIMEOUT };
    let removed =
        stop::find(registry, &Target::Id(id)).and_then(|found| stop::stop(registry, &found.entry, &how));
    if let Err(error) = removed {
        tracing::warn!("/dev/ublkb{id} could not be removed: {error:#}");
    }
}

/// Unmounts what is mounted at a folder, and removes its device if it was made for a mount and this was the
/// last one.
///
/// # Errors
///
/// [`Kind::NotFound`] if nothing of ours is mounted there; [`Kind::InUse`] if umount(8) fails; as
/// [`stop::stop`].
pub fn unmount(request: &UnmountRequest) -> Result<()> {
    let foreign = || {
        let message = "no image of this program is mounted there";
        Error::new(Kind::NotFound, message).file(&request.folder).remedy("`findmnt` shows what is mounted")
    };
    let registry = claims::registry()?.ok_or_else(foreign)?;
    let point = mounted::point(&request.folder)?;
    let _alone = Alone::wait()?;
    let mounted = mounted::at(&point)?.ok_or_else(foreign)?;
    let entry = stop::find(&registry, &Target::Id(mounted.id))?.entry;
    let mut command = program::command("umount");
    // This program is the helper.
    command.arg("-i").args(request.lazy.then_some("-l")).args(&request.flags);
    command.arg("--").arg(&mounted.point);
    let status = command.status().doing("running umount(8)")?;
    if !status.success() {
        let message = format!("umount(8) cannot unmount it ({status}); the device stays");
        return Err(Error::new(Kind::InUse, message).file(&request.folder));
    }
    if !entry.for_mount || mounted::all()?.iter().any(|other| other.id == mounted.id) {
        return Ok(());
    }
    let how = How { force: false, timeout: stop::DEFAULT_TIMEOUT };
    let stopped = match stop::stop(&registry, &entry, &how) {
        Err(error) if error.kind() == Kind::InUse && request.lazy => stop::end_when_unused(&entry),
        stopped => stopped,
    };
    stopped.map_err(|error| {
        let message = format!("it is unmounted, but its device stays: {error:#}");
        Error::new(error.kind(), message).file(&request.folder).remedy(format!("vhdx-ublk del {}", entry.id))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The options for mount(8), of an image whose mount gets `text`.
    fn options_for(kind: &str, text: &str, is_trusted: bool) -> String {
        let request = MountRequest {
            image: "/disks/a.vhdx".into(),
            folder: "/mnt".into(),
            kind: None,
            options: MountOptions::parse(text).expect("good options"),
            flags: Vec::new(),
        };
        let source = Source { node: "/dev/ublkb0".into(), options: Vec::new() };
        options(&request, kind, &Choice { place: None, volume: None }, &source, is_trusted).join(",")
    }

    #[test]
    fn an_image_of_a_user_gives_no_rights_unless_root_says_so() {
        assert_eq!(options_for("xfs", "noatime", true), "helper=vhdx,noatime");
        assert_eq!(options_for("xfs", "noatime", false), "helper=vhdx,nosuid,nodev,noatime");
        assert_eq!(options_for("xfs", "ro,suid,dev", false), "helper=vhdx,nosuid,nodev,ro,suid,dev");
    }

    #[test]
    fn an_image_of_a_user_stops_no_machine_unless_root_says_so() {
        for kind in ["ext2", "ext3", "ext4"] {
            assert_eq!(options_for(kind, "noatime", true), "helper=vhdx,noatime");
            let expected = "helper=vhdx,nosuid,nodev,errors=remount-ro,errors=panic";
            assert_eq!(options_for(kind, "errors=panic", false), expected);
        }
    }
}
