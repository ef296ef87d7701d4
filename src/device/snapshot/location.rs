//! Where a file would lie: not on the device that is to be served from it, whatever is in between.
//!
//! A device whose image lies on itself waits for itself forever, and so do all its users. Everything that can
//! lie between a file and a device is followed: partitions, mappers, arrays, loop devices and the files
//! behind them, this program's other devices and their images, the upper folder of an overlay. Where that is
//! impossible (FUSE, the network, other virtual devices) a file is refused, except on the file system of the
//! served image: that one demonstrably lies elsewhere, and snapshots are usually put beside the image. A
//! target that this machine exports to itself over the network looks like any other disk, and is taken for
//! one.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::device::mounts::{Mount, Mounts};
use crate::device::registry::Registry;
use crate::device::sysfs::{MAX_STACK, device_number, targets_in};
use crate::disk::{ImageFile, folder_of};
use crate::error::{Doing, Error, Kind, Locate, Result};

/// File systems whose data is in memory.
const IN_MEMORY: [&str; 3] = ["tmpfs", "ramfs", "devtmpfs"];

/// Refuses a file at `path`, to be served as device `id` in place of `served`, if it would lie on that
/// device, or if that cannot be ruled out.
///
/// # Errors
///
/// [`Kind::Unsupported`], with the reason; the host's.
pub(super) fn refuse_on_itself(path: &Path, served: &ImageFile, id: u32) -> Result<()> {
    let folder = folder_of(path);
    let unsupported = |message: String| Err(Error::new(Kind::Unsupported, message).file(path));
    let host = Host { sys: "/sys".into(), disk: format!("ublkb{id}"), images: &images_of };
    match host.of_folder(folder, MAX_STACK) {
        Location::Elsewhere => Ok(()),
        Location::OnDevice => {
            unsupported("it would lie on the device itself, which would wait for itself".into())
                .map_err(|error| error.remedy("choose a path on another file system"))
        }
        Location::Unknown(_) if is_beside(folder, served)? => Ok(()),
        Location::Unknown(why) => {
            unsupported(format!("it may lie on the device itself: {why}")).map_err(|error| {
                let place = folder_of(served.path()).display();
                error.remedy(format!("choose a path on the file system of the served image ({place})"))
            })
        }
    }
}

fn is_beside(folder: &Path, served: &ImageFile) -> Result<bool> {
    let found = fs::metadata(folder).doing("looking at the folder").file(folder)?;
    Ok(found.dev() == served.identity().device)
}

/// The image of this program's device `id`, and its parents.
fn images_of(id: u32) -> Option<Vec<PathBuf>> {
    let entry = Registry::open().ok()?.entry(id).ok()??;
    Some(std::iter::once(entry.image).chain(entry.parents).collect())
}

/// Where something lies.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Location {
    Elsewhere,
    OnDevice,
    /// Unknown, for this reason.
    Unknown(String),
}

impl Location {
    /// The location of something that has parts at all of `places`.
    fn of_all(places: impl IntoIterator<Item = Self>) -> Self {
        let worse = |one, other| match (one, other) {
            (Self::OnDevice, _) | (_, Self::OnDevice) => Self::OnDevice,
            (Self::Elsewhere, other) => other,
            (one, _) => one,
        };
        places.into_iter().fold(Self::Elsewhere, worse)
    }
}

/// The machine, as far as it matters here.
struct Host<'a> {
    /// `/sys`.
    sys: PathBuf,
    /// The name of the device's disk.
    disk: String,
    /// The images of this program's devices.
    images: &'a dyn Fn(u32) -> Option<Vec<PathBuf>>,
}

impl Host<'_> {
    fn of_folder(&self, folder: &Path, depth: usize) -> Location {
        // Held until the mounts are read: the number of a mount that is gone is used again.
        let found = mount_id(folder).and_then(|(held, id)| Ok((held, id, Mounts::of_this_process()?)));
        let (_held, id, mounts) = match found {
            Ok(found) => found,
            Err(error) => return Location::Unknown(format!("{}: {error}", folder.display())),
        };
        // By its number: a file system may be mounted at many places, and hidden at some.
        match mounts.iter().find(|mount| id.as_deref().is_some_and(|id| id.as_bytes() == mount.id)) {
            Some(mount) => self.of_mount(&mount, depth),
            None => Location::Unknown(format!("{} is in no mount that can be seen", folder.display())),
        }
    }

    fn of_mount(&self, mount: &Mount<'_>, depth: usize) -> Location {
        let Some(depth) = depth.checked_sub(1) else {
            return Location::Unknown("too many devices are stacked".into());
        };
        let numbered = |number: &OsStr| fs::canonicalize(self.sys.join("dev/block").join(number)).ok();
        if let Some(device) = numbered(OsStr::from_bytes(mount.number)) {
            return self.of_device(&device, depth);
        }
        if IN_MEMORY.iter().any(|kind| kind.as_bytes() == mount.kind) {
            return Location::Elsewhere;
        }
        if mount.kind == b"overlay" {
            return match mount.path_option(b"upperdir=") {
                Some(upper) => self.of_folder(&upper, depth),
                None => Location::Unknown("it is an overlay without a folder for new files".into()),
            };
        }
        let source = fs::metadata(mount.source()).ok().filter(|found| found.rdev() != 0);
        match source.and_then(|found| numbered(device_number(found.rdev()).as_ref())) {
            Some(device) => {
                Location::of_all(self.members(&device).iter().map(|device| self.of_device(device, depth)))
            }
            None => Location::Unknown(format!(
                "a file system of type {} does not show where its data lies",
                String::from_utf8_lossy(mount.kind)
            )),
        }
    }

    /// The devices of the file system that has `device`: btrfs may have several.
    fn members(&self, device: &Path) -> Vec<PathBuf> {
        let systems = fs::read_dir(self.sys.join("fs/btrfs")).into_iter().flatten().flatten();
        let mut members = systems.map(|system| targets_in(&system.path().join("devices")));
        members
            .find(|members| members.iter().any(|member| member == device))
            .unwrap_or_else(|| vec![device.into()])
    }

    /// Where the block device at `device` of sysfs lies, a disk or a part of one.
    fn of_device(&self, device: &Path, depth: usize) -> Location {
        let Some(depth) = depth.checked_sub(1) else {
            return Location::Unknown("too many devices are stacked".into());
        };
        if device.iter().any(|name| name == self.disk.as_str()) {
            return Location::OnDevice;
        }
        if let Some(id) = device.iter().find_map(ublk_number) {
            return self.of_files((self.images)(id), "a ublk device of another program", depth);
        }
        if let Some(backing) =
            device.ancestors().find_map(|disk| fs::read(disk.join("loop/backing_file")).ok())
        {
            let file = PathBuf::from(OsStr::from_bytes(backing.trim_ascii_end()));
            return self.of_files(Some(vec![file]), "a loop device", depth);
        }
        let slaves = targets_in(&device.join("slaves"));
        if !slaves.is_empty() {
            return Location::of_all(slaves.iter().map(|slave| self.of_device(slave, depth)));
        }
        match device.strip_prefix(self.sys.join("devices/virtual/block")) {
            Ok(name) if !is_ram(name) => Location::Unknown(format!(
                "the virtual device {} does not show where its data lies",
                name.display()
            )),
            _ => Location::Elsewhere,
        }
    }

    fn of_files(&self, files: Option<Vec<PathBuf>>, what: &str, depth: usize) -> Location {
        let Some(files) = files else {
            return Location::Unknown(format!("{what} does not show where its data lies"));
        };
        Location::of_all(files.iter().map(|file| match fs::metadata(file) {
            Ok(_) => self.of_folder(file, depth),
            Err(error) => Location::Unknown(format!("{what} has its data in {}: {error}", file.display())),
        }))
    }
}

fn ublk_number(name: &OsStr) -> Option<u32> {
    let rest = name.to_str()?.strip_prefix("ublkb")?;
    rest.split('p').next()?.parse().ok()
}

/// `ram0`: a disk in memory.
fn is_ram(name: &Path) -> bool {
    let rest = name.to_str().and_then(|name| name.strip_prefix("ram"));
    rest.is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
}

/// `path`, open without access to its data, and the number of the mount that it is in, if the kernel reports
/// it.
fn mount_id(path: &Path) -> io::Result<(File, Option<String>)> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(|id| id.trim().to_owned());
    Ok((file, id))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Machine(tempfile::TempDir);

    impl Machine {
        /// Device 1 with a partition, 10 and another program's 7; a mapper over a mapper over the partition;
        /// a loop device over a file; a disk, a disk in memory, and one that shows nothing.
        fn new() -> Self {
            let machine = Self(tempfile::tempdir().expect("a temporary folder"));
            for path in [
                "ublkb1/ublkb1p1",
                "ublkb10",
                "ublkb7",
                "dm-0/slaves",
                "dm-1/slaves",
                "loop0/loop",
                "loop0/loop0p1",
                "loop1/loop",
                "ram3",
                "nbd0",
            ] {
                fs::create_dir_all(machine.virtual_device(path)).expect("free");
            }
            fs::create_dir_all(machine.sys().join("devices/pci0/sda")).expect("free");
            machine.link("ublkb1/ublkb1p1", "dm-0/slaves/ublkb1p1");
            machine.link("dm-0", "dm-1/slaves/dm-0");
            let backing = machine.virtual_device("loop0/loop/backing_file");
            fs::write(backing, format!("{}\n", machine.0.path().join("sys").display())).expect("free");
            fs::write(machine.virtual_device("loop1/loop/backing_file"), "/gone (deleted)\n").expect("free");
            machine
        }

        fn sys(&self) -> PathBuf {
            fs::canonicalize(self.0.path()).expect("there").join("sys")
        }

        fn virtual_device(&self, name: &str) -> PathBuf {
            self.sys().join("devices/virtual/block").join(name)
        }

        fn link(&self, to: &str, at: &str) {
            std::os::unix::fs::symlink(self.virtual_device(to), self.virtual_device(at)).expect("free");
        }

        fn place(&self, device: &Path) -> Location {
            let images = |id| (id == 10).then(|| vec!["/gone".into()]);
            Host { sys: self.sys(), disk: "ublkb1".into(), images: &images }.of_device(device, MAX_STACK)
        }
    }

    #[test]
    fn what_is_between_a_file_and_a_device_is_followed() {
        let machine = Machine::new();
        let place = |name: &str| machine.place(&machine.virtual_device(name));
        for name in ["ublkb1", "ublkb1/ublkb1p1", "dm-0", "dm-1"] {
            assert_eq!(place(name), Location::OnDevice, "{name}");
        }
        assert_eq!(place("ram3"), Location::Elsewhere);
        assert_eq!(machine.place(&machine.sys().join("devices/pci0/sda")), Location::Elsewhere);
        for name in ["nbd0", "ublkb7", "ublkb10", "loop1"] {
            assert!(matches!(place(name), Location::Unknown(_)), "{name}: {:?}", place(name));
        }
        // The file behind a loop device is sought on this machine: in memory, or on a disk that is not there.
        assert_ne!(place("loop0/loop0p1"), Location::OnDevice);
    }

    #[test]
    fn a_stack_without_end_is_not_followed_forever() {
        let machine = Machine::new();
        fs::create_dir_all(machine.virtual_device("dm-2/slaves")).expect("free");
        machine.link("dm-2", "dm-2/slaves/dm-2");
        assert!(matches!(machine.place(&machine.virtual_device("dm-2")), Location::Unknown(_)));
    }

    #[test]
    fn one_part_on_the_device_is_enough() {
        let unknown = || Location::Unknown("so".into());
        assert_eq!(
            Location::of_all([Location::Elsewhere, unknown(), Location::OnDevice]),
            Location::OnDevice
        );
        assert_eq!(Location::of_all([Location::Elsewhere, unknown(), Location::Elsewhere]), unknown());
        assert_eq!(Location::of_all([]), Location::Elsewhere);
    }

    #[test]
    fn file_systems_are_told_apart() {
        let machine = Machine::new();
        fs::create_dir_all(machine.sys().join("dev/block")).expect("free");
        let number = machine.sys().join("dev/block/259:1");
        std::os::unix::fs::symlink(machine.virtual_device("ublkb1/ublkb1p1"), number).expect("free");
        let host = Host { sys: machine.sys(), disk: "ublkb1".into(), images: &|_| None };
        let place = |line: &str| {
            let mounts = Mounts::parse(line.as_bytes());
            host.of_mount(&mounts.iter().next().expect("a mount"), MAX_STACK)
        };
        assert_eq!(place("36 35 259:1 / /mnt rw - ext4 /dev/ublkb1p1 rw"), Location::OnDevice);
        assert_eq!(place("36 35 0:40 / /mnt rw shared:1 - tmpfs tmpfs rw"), Location::Elsewhere);
        let unknown = |line: &str| matches!(place(line), Location::Unknown(_));
        assert!(unknown("36 35 0:41 / /mnt rw - fuse.sshfs host:/ rw"));
        assert!(unknown("36 35 0:42 / /mnt rw - nfs4 127.0.0.1:/ rw,addr=127.0.0.1"));
        assert!(unknown("36 35 0:43 / /mnt rw - overlay overlay rw,lowerdir=/a"));
        assert!(unknown(
            "36 35 0:43 / /mnt rw - overlay overlay rw,lowerdir=/a,upperdir=/not\\040there,workdir=/w"
        ));
    }

    #[test]
    fn a_folder_is_in_a_mount() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        assert!(mount_id(folder.path()).expect("/proc").1.is_some());
        assert!(mount_id(&folder.path().join("gone")).is_err());
    }
}
