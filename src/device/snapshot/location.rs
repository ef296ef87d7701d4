//! Where a file would lie: not on the device that shall be served from it, whatever is in between.
//!
//! A device whose image lies on itself waits for itself for ever, and so does everything that uses it. What can lie
//! between a file and a device is followed: partitions, mappers, arrays, loop devices and the files behind them, this
//! program's other devices and their images, the upper folder of an overlay. Where that cannot be followed (FUSE, the
//! network, other virtual devices) a file is refused, except on the file system of the image that is served: that one
//! demonstrably lies elsewhere, and beside the image is where people put its snapshots. A target that this machine
//! exports to itself over the network looks like any other disk, and is taken for one.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::device::registry::Registry;
use crate::device::usage::unescape;
use crate::disk::{ImageFile, folder_of};
use crate::error::{Error, Kind, Result};

/// How many devices and file systems may lie over each other.
const MAX_STACK: usize = 16;

/// File systems whose data is in memory.
const IN_MEMORY: [&str; 3] = ["tmpfs", "ramfs", "devtmpfs"];

/// Refuses a file at `path`, to be served as device `id` in the place of `served`, if it would lie on that device, or
/// if nothing tells that it would not.
///
/// # Errors
///
/// [`Kind::Unsupported`], with the reason; what the host says.
pub(super) fn refuse_on_itself(path: &Path, served: &ImageFile, id: u32) -> Result<()> {
    let folder = folder_of(path);
    let unsupported = |message: String| Err(Error::new(Kind::Unsupported, message).file(path));
    let host = Host { sys: "/sys".into(), disk: format!("ublkb{id}"), images: &images_of };
    match host.of_folder(folder, MAX_STACK) {
        Place::Elsewhere => Ok(()),
        Place::OnDevice => {
            unsupported("it would lie on the device itself, which cannot serve it and be in it".into())
                .map_err(|error| error.remedy("name a place on another file system"))
        }
        Place::Unknown(_) if is_beside(folder, served)? => Ok(()),
        Place::Unknown(why) => {
            unsupported(format!("it cannot be told whether it would lie on the device itself: {why}"))
                .map_err(|error| {
                    let place = folder_of(served.path()).display();
                    error.remedy(format!(
                        "name a place on the file system of the image that is served ({place})"
                    ))
                })
        }
    }
}

fn is_beside(folder: &Path, served: &ImageFile) -> Result<bool> {
    let found = fs::metadata(folder);
    let found = found.map_err(|error| Error::io("looking at the folder", error).file(folder))?;
    Ok(found.dev() == served.device())
}

/// The image and the parents of this program's device `id`.
fn images_of(id: u32) -> Option<Vec<PathBuf>> {
    let entry = Registry::open().ok()?.entry(id).ok()??;
    Some(std::iter::once(entry.image).chain(entry.parents).collect())
}

/// Where something lies.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Elsewhere,
    OnDevice,
    /// It cannot be told, for this reason.
    Unknown(String),
}

impl Place {
    /// Where something lies that has parts at all of `places`.
    fn of_all(places: impl IntoIterator<Item = Self>) -> Self {
        let worse = |one, other| match (one, other) {
            (Self::OnDevice, _) | (_, Self::OnDevice) => Self::OnDevice,
            (Self::Elsewhere, other) => other,
            (one, _) => one,
        };
        places.into_iter().fold(Self::Elsewhere, worse)
    }
}

/// A line of `/proc/self/mountinfo`.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// `major:minor`.
    number: String,
    kind: String,
    source: PathBuf,
    options: Vec<u8>,
}

/// What is looked at.
struct Host<'a> {
    /// `/sys`.
    sys: PathBuf,
    /// The name of the device's disk.
    disk: String,
    /// The images of this program's devices.
    images: &'a dyn Fn(u32) -> Option<Vec<PathBuf>>,
}

impl Host<'_> {
    fn of_folder(&self, folder: &Path, depth: usize) -> Place {
        match mount_of(folder) {
            Ok(Some(mount)) => self.of_mount(&mount, depth),
            Ok(None) => Place::Unknown(format!("{} is in no mount that is seen", folder.display())),
            Err(error) => Place::Unknown(format!("{}: {error}", folder.display())),
        }
    }

    fn of_mount(&self, mount: &Mount, depth: usize) -> Place {
        let Some(depth) = depth.checked_sub(1) else {
            return Place::Unknown("too much lies over each other".into());
        };
        let numbered = |number: &str| fs::canonicalize(self.sys.join("dev/block").join(number)).ok();
        if let Some(device) = numbered(&mount.number) {
            return self.of_device(&device, depth);
        }
        if IN_MEMORY.contains(&mount.kind.as_str()) {
            return Place::Elsewhere;
        }
        if mount.kind == "overlay" {
            return match option(&mount.options, b"upperdir=") {
                Some(upper) => self.of_folder(&upper, depth),
                None => Place::Unknown("it is an overlay without a place for new files".into()),
            };
        }
        let source = fs::metadata(&mount.source).ok().filter(|found| found.rdev() != 0);
        match source.and_then(|found| numbered(&device_number(found.rdev()))) {
            Some(device) => {
                Place::of_all(self.members(&device).iter().map(|device| self.of_device(device, depth)))
            }
            None => Place::Unknown(format!(
                "a file system of type {} does not tell where its data lies",
                mount.kind
            )),
        }
    }

    /// The devices of the file system that has `device`: btrfs may have several.
    fn members(&self, device: &Path) -> Vec<PathBuf> {
        let resolved = |folder: &Path| -> Vec<PathBuf> {
            let items = fs::read_dir(folder).into_iter().flatten().flatten();
            items.filter_map(|item| fs::canonicalize(item.path()).ok()).collect()
        };
        let systems = fs::read_dir(self.sys.join("fs/btrfs")).into_iter().flatten().flatten();
        let mut members = systems.map(|system| resolved(&system.path().join("devices")));
        members
            .find(|members| members.iter().any(|member| member == device))
            .unwrap_or_else(|| vec![device.into()])
    }

    /// Where the block device at `device` of sysfs lies, a disk or a part of one.
    fn of_device(&self, device: &Path, depth: usize) -> Place {
        let Some(depth) = depth.checked_sub(1) else {
            return Place::Unknown("too much lies over each other".into());
        };
        if device.iter().any(|name| name == self.disk.as_str()) {
            return Place::OnDevice;
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
        let slaves: Vec<PathBuf> = fs::read_dir(device.join("slaves"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|slave| fs::canonicalize(slave.path()).ok())
            .collect();
        if !slaves.is_empty() {
            return Place::of_all(slaves.iter().map(|slave| self.of_device(slave, depth)));
        }
        match device.strip_prefix(self.sys.join("devices/virtual/block")) {
            Ok(name) if !is_ram(name) => Place::Unknown(format!(
                "the virtual device {} does not tell where its data lies",
                name.display()
            )),
            _ => Place::Elsewhere,
        }
    }

    fn of_files(&self, files: Option<Vec<PathBuf>>, what: &str, depth: usize) -> Place {
        let Some(files) = files else {
            return Place::Unknown(format!("{what} does not tell where its data lies"));
        };
        Place::of_all(files.iter().map(|file| match fs::metadata(file) {
            Ok(_) => self.of_folder(file, depth),
            Err(error) => Place::Unknown(format!("{what} has its data in {}: {error}", file.display())),
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

fn device_number(device: u64) -> String {
    format!("{}:{}", libc::major(device), libc::minor(device))
}

/// The mount that `path` is in, by its number: a file system may be mounted at many places, and hidden at some.
fn mount_of(path: &Path) -> io::Result<Option<Mount>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path)?;
    let Some(id) = mount_id(&file)? else { return Ok(None) };
    Ok(find_mount(&fs::read("/proc/self/mountinfo")?, &id))
}

fn mount_id(file: &File) -> io::Result<Option<String>> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_raw_fd()))?;
    Ok(info.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(|id| id.trim().to_owned()))
}

fn find_mount(mountinfo: &[u8], id: &str) -> Option<Mount> {
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    mountinfo.split(|&byte| byte == b'\n').find_map(|line| {
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
        let dash = fields.iter().position(|field| *field == b"-")?;
        (fields.first() == Some(&id.as_bytes())).then_some(())?;
        Some(Mount {
            number: text(fields.get(2)?),
            kind: text(fields.get(dash + 1)?),
            source: unescape(fields.get(dash + 2)?),
            options: fields.get(dash + 3).map(|options| options.to_vec()).unwrap_or_default(),
        })
    })
}

/// The path that an option of a mount names.
fn option(options: &[u8], name: &[u8]) -> Option<PathBuf> {
    options.split(|&byte| byte == b',').find_map(|option| option.strip_prefix(name)).map(unescape)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Machine(tempfile::TempDir);

    impl Machine {
        /// Device 1 with a partition, 10 and another program's 7; a mapper over a mapper over the partition; a loop
        /// device over a file; a disk, a disk in memory, and one that says nothing.
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

        fn place(&self, device: &Path) -> Place {
            let images = |id| (id == 10).then(|| vec!["/gone".into()]);
            Host { sys: self.sys(), disk: "ublkb1".into(), images: &images }.of_device(device, MAX_STACK)
        }
    }

    #[test]
    fn what_is_between_a_file_and_a_device_is_followed() {
        let machine = Machine::new();
        let place = |name: &str| machine.place(&machine.virtual_device(name));
        for name in ["ublkb1", "ublkb1/ublkb1p1", "dm-0", "dm-1"] {
            assert_eq!(place(name), Place::OnDevice, "{name}");
        }
        assert_eq!(place("ram3"), Place::Elsewhere);
        assert_eq!(machine.place(&machine.sys().join("devices/pci0/sda")), Place::Elsewhere);
        for name in ["nbd0", "ublkb7", "ublkb10", "loop1"] {
            assert!(matches!(place(name), Place::Unknown(_)), "{name}: {:?}", place(name));
        }
        // The file behind a loop device is looked for on this machine: in memory, or on a disk that is not there.
        assert_ne!(place("loop0/loop0p1"), Place::OnDevice);
    }

    #[test]
    fn a_stack_without_end_is_not_followed_for_ever() {
        let machine = Machine::new();
        fs::create_dir_all(machine.virtual_device("dm-2/slaves")).expect("free");
        machine.link("dm-2", "dm-2/slaves/dm-2");
        assert!(matches!(machine.place(&machine.virtual_device("dm-2")), Place::Unknown(_)));
    }

    #[test]
    fn one_part_on_the_device_is_enough() {
        let unknown = || Place::Unknown("so".into());
        assert_eq!(Place::of_all([Place::Elsewhere, unknown(), Place::OnDevice]), Place::OnDevice);
        assert_eq!(Place::of_all([Place::Elsewhere, unknown(), Place::Elsewhere]), unknown());
        assert_eq!(Place::of_all([]), Place::Elsewhere);
    }

    #[test]
    fn file_systems_are_told_apart() {
        let machine = Machine::new();
        fs::create_dir_all(machine.sys().join("dev/block")).expect("free");
        let number = machine.sys().join("dev/block/259:1");
        std::os::unix::fs::symlink(machine.virtual_device("ublkb1/ublkb1p1"), number).expect("free");
        let host = Host { sys: machine.sys(), disk: "ublkb1".into(), images: &|_| None };
        let place = |line: &str| {
            let mount = find_mount(format!("1 2 0:1 / / rw - a b c\n{line}\n").as_bytes(), "36");
            host.of_mount(&mount.expect("a mount"), MAX_STACK)
        };
        assert_eq!(place("36 35 259:1 / /mnt rw - ext4 /dev/ublkb1p1 rw"), Place::OnDevice);
        assert_eq!(place("36 35 0:40 / /mnt rw shared:1 - tmpfs tmpfs rw"), Place::Elsewhere);
        let unknown = |line: &str| matches!(place(line), Place::Unknown(_));
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
        assert!(mount_of(folder.path()).expect("/proc").is_some());
        assert!(mount_of(&folder.path().join("gone")).is_err());
    }
}
