//! The users of a block device or a file, as text for people: mounts, swap, stacked devices, exports of the
//! kernel, open files.
//!
//! Best effort by nature: a result was true a moment ago, and processes that may not be looked into are
//! missing. It is used to refuse with a reason, never to decide that something is safe: where the kernel
//! itself can refuse to stop a device that is open, the kernel decides.

mod readers;
mod stack;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

pub use readers::only_readers;
pub(super) use stack::file_system_is_on;

use super::mounts::{Kinds, Mount, Mounts, unescape};
use super::processes::{self, OpenFile, Process};
use super::sysfs::{device_number, names_in};
use crate::disk::{BlockDevice, HostFile};

/// A disk or one of its partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Node {
    /// Its name in `/sys/class/block`.
    name: String,
    /// Its number, `major:minor`.
    number: String,
}

/// The users of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users {
    /// Those that stay until they are ended.
    pub lasting: Vec<String>,
    /// Those that may leave by themselves in a moment: processes that only identify a new or changed device,
    /// and loop devices that end with their last use.
    pub passing: Vec<String>,
}

impl Users {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.lasting.is_empty() && self.passing.is_empty()
    }
}

/// What uses a device that the kernel knows to be open, if nothing is found that has it open.
pub const UNNAMED: &str = "open in the kernel or in another namespace";

/// The kernel's configuration of its exports.
pub(super) const CONFIGURATION: &str = "/sys/kernel/config";

/// Processes that open every new or changed device for a moment: udev's.
const PASSERS_BY: [&str; 3] = ["(udev-worker)", "systemd-udevd", "udevd"];

/// The users of `/dev/ublkbN` or a partition of it: `mounted at /mnt`, `used as swap`, `used by dm-0`, `open
/// in fio (pid 123)`. If none is found, the device is opened to see whether the kernel lets it be claimed: it
/// must be live.
pub fn of_device(id: u32) -> Users {
    let mut users = named(id);
    let nodes = nodes_of(Path::new("/sys/class/block"), &format!("ublkb{id}"));
    if users.is_empty()
        && nodes.iter().any(|node| BlockDevice::is_claimed(&Path::new("/dev").join(&node.name)))
    {
        users.lasting.push("claimed by the kernel (mounted in another namespace?)".into());
    }
    users
}

/// As [`of_device`], without opening anything: the kernel may read a disk that is opened, which waits if the
/// disk waits.
pub fn named(id: u32) -> Users {
    let class = Path::new("/sys/class/block");
    let nodes = nodes_of(class, &format!("ublkb{id}"));
    let kinds = Kinds::of_kernel();
    let mut users = Mounts::of_this_process().map_or(Vec::new(), |table| mounts(&table, &nodes, &kinds));
    users.extend(foreign_mounts(&nodes, &kinds));
    users.extend(swaps(&fs::read("/proc/swaps").unwrap_or_default(), &nodes));
    users.extend(nodes.iter().flat_map(|node| holders(class, &node.name)));
    let (ending, kept): (Vec<_>, Vec<_>) =
        loops(class, &nodes).into_iter().partition(|name| is_autoclear(class, name));
    users.extend(kept.iter().map(|name| used_by_loop(name)));
    users.extend(exports(Path::new(CONFIGURATION), &nodes));
    let (passing, lasting): (Vec<_>, Vec<_>) =
        openers(|file| is_one_of(file, &nodes)).into_iter().partition(is_passing);
    users.extend(describe(&lasting));
    let passing = ending.iter().map(|name| used_by_loop(name)).chain(describe(&passing)).collect();
    Users { lasting: users, passing }
}

/// The processes, except for this one, that have the server's side of the device open: `/dev/ublkcN`.
pub fn of_character_device(id: u32) -> Vec<String> {
    let path = PathBuf::from(format!("/dev/ublkc{id}"));
    describe(&openers(|file| file.path().as_ref() == Some(&path)))
}

/// Whether the process has the character device at `device` open.
pub fn has_device_open(pid: u32, device: &Path) -> bool {
    let (Ok(wanted), Some(name)) = (fs::metadata(device), device.file_name()) else { return false };
    // Only a file with this name is asked for its number: another may lie on storage that hangs.
    let has_name = |file: &OpenFile| file.path().is_some_and(|path| path.file_name() == Some(name));
    let is_it = |found: fs::Metadata| found.file_type().is_char_device() && found.rdev() == wanted.rdev();
    processes::open_files(pid).any(|file| has_name(&file) && file.metadata().is_some_and(is_it))
}

/// The processes, except for this one, that have the file open: `open in qemu-system-x86 (pid 123)`.
pub fn of_file(file: HostFile) -> Vec<String> {
    describe(&openers(|open| open.is(file)))
}

fn openers(wanted: impl Fn(&OpenFile) -> bool) -> Vec<Process> {
    let has_it = |&pid: &u32| processes::open_files(pid).any(|file| wanted(&file));
    processes::others().into_iter().filter(has_it).map(Process::of).collect()
}

fn describe(openers: &[Process]) -> Vec<String> {
    openers.iter().map(|process| format!("open in {process}")).collect()
}

fn is_passing(process: &Process) -> bool {
    PASSERS_BY.contains(&process.name.as_str())
}

/// Whether the file is one of the devices. Only files in `/dev` are asked for their number: a file system on
/// a device could hang when the device does.
fn is_one_of(file: &OpenFile, nodes: &[Node]) -> bool {
    if !file.path().is_some_and(|path| path.as_os_str().as_bytes().starts_with(b"/dev/")) {
        return false;
    }
    file.metadata().is_some_and(|found| has_number(&found, nodes))
}

fn has_number(found: &fs::Metadata, nodes: &[Node]) -> bool {
    let number = device_number(found.rdev());
    found.file_type().is_block_device() && nodes.iter().any(|node| node.number == number)
}

fn nodes_of(class: &Path, disk: &str) -> Vec<Node> {
    let number = |name: &str| Some(fs::read_to_string(class.join(name).join("dev")).ok()?.trim().to_owned());
    let is_partition = |name: &str| {
        let rest = name.strip_prefix(disk).and_then(|rest| rest.strip_prefix('p'));
        rest.is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let names = names_in(class).into_iter().filter(|name| name == disk || is_partition(name));
    names.filter_map(|name| Some(Node { number: number(&name)?, name })).collect()
}

/// The mounts of the devices. File systems with numbers of their own (btrfs) are recognised by their source.
fn mounts(table: &Mounts, nodes: &[Node], kinds: &Kinds) -> Vec<String> {
    let ours = table.iter().filter(|mount| is_mount_of(mount, nodes, kinds));
    ours.map(|mount| format!("mounted at {}", mount.point().display())).collect()
}

fn is_mount_of(mount: &Mount, nodes: &[Node], kinds: &Kinds) -> bool {
    let source = kinds.device_of(mount);
    let is_named = |node: &Node| source.as_deref() == Some(&Path::new("/dev").join(&node.name));
    nodes.iter().any(|node| node.number.as_bytes() == mount.number || is_named(node))
}

/// The file systems of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileSystems {
    /// One mount point of each that this process sees.
    pub points: Vec<PathBuf>,
    /// What else writes to the device, or may: what lies on top of it, mounts of other namespaces.
    pub others: Vec<String>,
}

/// The file systems of `/dev/ublkbN` and its partitions.
pub fn file_systems(id: u32) -> FileSystems {
    let class = Path::new("/sys/class/block");
    let nodes = nodes_of(class, &format!("ublkb{id}"));
    let kinds = Kinds::of_kernel();
    let mut found = FileSystems::default();
    let mut numbers: Vec<Vec<u8>> = Vec::new();
    let mut see = |table: &Mounts, mut found: Option<&mut FileSystems>| {
        let mut unseen = Vec::new();
        for mount in table.iter().filter(|mount| is_mount_of(mount, &nodes, &kinds)) {
            if !numbers.iter().any(|number| number == mount.number) {
                numbers.push(mount.number.to_owned());
                match &mut found {
                    Some(found) => found.points.push(mount.point()),
                    None => unseen.push(mount.point()),
                }
            }
        }
        unseen
    };
    if let Ok(table) = Mounts::of_this_process() {
        see(&table, Some(&mut found));
    }
    for pid in names_in(Path::new("/proc")).iter().filter(|name| name.parse::<u32>().is_ok()) {
        let Ok(table) = Mounts::of_process(pid) else { continue };
        let unseen = see(&table, None).into_iter();
        let unseen = unseen.map(|point| format!("mounted at {} by pid {pid} only", point.display()));
        found.others.extend(unseen);
    }
    found.others.extend(nodes.iter().flat_map(|node| holders(class, &node.name)));
    found.others.extend(loops(class, &nodes).iter().map(|name| used_by_loop(name)));
    found.others.extend(exports(Path::new(CONFIGURATION), &nodes));
    found
}

/// Mounts in other namespaces only: of containers, and of services with their own view.
fn foreign_mounts(nodes: &[Node], kinds: &Kinds) -> Vec<String> {
    let namespace = |pid: &str| Some(fs::metadata(format!("/proc/{pid}/ns/mnt")).ok()?.ino());
    let mut seen: Vec<u64> = namespace("self").into_iter().collect();
    let mut users = Vec::new();
    for pid in names_in(Path::new("/proc")).iter().filter(|name| name.parse::<u32>().is_ok()) {
        let Some(found) = namespace(pid).filter(|found| !seen.contains(found)) else { continue };
        seen.push(found);
        let Ok(table) = Mounts::of_process(pid) else { continue };
        let mounts = mounts(&table, nodes, kinds).into_iter();
        users.extend(mounts.map(|mount| format!("{mount} in the mount namespace of pid {pid}")));
    }
    users
}

/// Loop devices on the device or a partition of it. Those on files of a mounted file system are users of the
/// mount.
fn loops(class: &Path, nodes: &[Node]) -> Vec<String> {
    let is_on = |name: &String| names_a_node(&class.join(name).join("loop/backing_file"), nodes);
    names_in(class).into_iter().filter(is_on).collect()
}

/// Whether the kernel ends a loop device itself when its last user has closed it, as after `mount -o loop`:
/// that happens some time after `umount` has returned.
fn is_autoclear(class: &Path, name: &str) -> bool {
    fs::read(class.join(name).join("loop/autoclear")).is_ok_and(|text| text.trim_ascii() == b"1")
}

fn used_by_loop(name: &str) -> String {
    format!("used by the loop device /dev/{name}")
}

/// Exports of the kernel: `NVMe` targets (nvmet) and SCSI targets (LIO).
fn exports(configuration: &Path, nodes: &[Node]) -> Vec<String> {
    let is_on = |file: &Path| fs::read(file).is_ok_and(|text| text.trim_ascii() == b"1");
    let under = |folder: &Path| {
        let names = names_in(folder).into_iter();
        names.map(|name| (folder.join(&name), name)).collect::<Vec<_>>()
    };
    let mut users = Vec::new();
    for (subsystem, name) in under(&configuration.join("nvmet/subsystems")) {
        for (namespace, _) in under(&subsystem.join("namespaces")) {
            if is_on(&namespace.join("enable")) && names_a_node(&namespace.join("device_path"), nodes) {
                users.push(format!("exported by nvmet as {name}"));
            }
        }
    }
    for (backend, _) in under(&configuration.join("target/core")) {
        for (object, name) in under(&backend) {
            if is_on(&object.join("enable")) && names_a_node(&object.join("udev_path"), nodes) {
                users.push(format!("exported by the SCSI target {name}"));
            }
        }
    }
    users
}

/// Whether the text in `file` is the path of one of the devices.
fn names_a_node(file: &Path, nodes: &[Node]) -> bool {
    let path = fs::read(file).unwrap_or_default();
    is_node(Path::new(OsStr::from_bytes(path.trim_ascii_end())), nodes)
}

/// Whether `path` names one of the devices: by its own name, or through a link or another node.
fn is_node(path: &Path, nodes: &[Node]) -> bool {
    let by_name = |node: &Node| path == Path::new("/dev").join(&node.name);
    let by_number = |found: fs::Metadata| has_number(&found, nodes);
    // Only paths below `/dev` are followed: any other could lead to a file system that hangs.
    nodes.iter().any(by_name) || path.starts_with("/dev") && fs::metadata(path).is_ok_and(by_number)
}

/// Lines like `/dev/sda2 partition 8388604 0 -2`, under a headline.
fn swaps(swaps: &[u8], nodes: &[Node]) -> Vec<String> {
    let lines = swaps.split(|&byte| byte == b'\n').skip(1);
    let used = lines.filter_map(|line| line.split(|byte| b" \t".contains(byte)).next()).map(unescape);
    used.filter(|path| is_node(path, nodes))
        .map(|path| format!("used as swap ({})", path.display()))
        .collect()
}

fn holders(class: &Path, name: &str) -> Vec<String> {
    let names = names_in(&class.join(name).join("holders")).into_iter();
    names.map(|holder| format!("used by {holder}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes() -> Vec<Node> {
        let node = |name: &str, number: &str| Node { name: name.into(), number: number.into() };
        vec![node("ublkb3", "259:3"), node("ublkb3p1", "259:4")]
    }

    #[test]
    fn mounts_are_found_by_number_and_by_source() {
        let mountinfo = b"22 1 0:21 / /proc rw,nosuid - proc proc rw\n\
            36 35 259:4 /sub /mnt/with\\040blank rw,noatime master:1 shared:2 - ext4 /dev/ublkb3p1 rw\n\
            37 35 0:44 / /srv rw - btrfs /dev/ublkb3 rw,space_cache\n\
            38 35 259:30 / /other rw - ext4 /dev/ublkb30 rw\n\
            39 35 259:3 / /no-dash rw\n";
        let found = mounts(&Mounts::parse(mountinfo), &nodes(), &kinds());
        assert_eq!(found, ["mounted at /mnt/with blank", "mounted at /srv"]);
    }

    fn kinds() -> Kinds {
        Kinds::parse("nodev\tproc\nnodev\ttmpfs\nnodev\tfuse\n\text4\n\tfuseblk\n\tbtrfs\n")
    }

    /// Every user may mount these in a namespace of their own, with any source.
    #[test]
    fn a_file_system_without_a_device_does_not_use_its_source() {
        let mountinfo = b"40 35 0:50 / /mnt rw - tmpfs /dev/ublkb3 rw\n\
            41 35 0:51 / /m rw - fuse.sshfs /dev/ublkb3p1 rw\n";
        let mountinfo = Mounts::parse(mountinfo);
        assert_eq!(mounts(&mountinfo, &nodes(), &kinds()), Vec::<String>::new());
        let real = b"42 35 259:4 / /w rw - fuseblk.ntfs /dev/ublkb3p1 rw\n\
            43 35 0:52 / /z rw - btrfs /dev/ublkb3 rw\n";
        assert_eq!(mounts(&Mounts::parse(real), &nodes(), &kinds()), ["mounted at /w", "mounted at /z"]);
        let unlisted = Kinds::parse("");
        assert_eq!(mounts(&mountinfo, &nodes(), &unlisted).len(), 2, "an unknown type may have a device");
    }

    #[test]
    fn swap_on_a_partition_is_found() {
        let table = b"Filename\t\t\t\tType\t\tSize\tUsed\tPriority\n\
            /dev/ublkb3p1                           partition\t1048572\t0\t-2\n\
            /dev/ublkb30                            partition\t1048572\t0\t-3\n";
        assert_eq!(swaps(table, &nodes()), ["used as swap (/dev/ublkb3p1)"]);
    }

    #[test]
    fn a_loop_device_on_a_partition_is_a_user_and_one_on_a_file_is_not() {
        let class = tempfile::tempdir().expect("a directory");
        for (name, file) in
            [("loop0", "/dev/ublkb3p1\n"), ("loop1", "/dev/ublkb30\n"), ("loop2", "/images/ublkb3\n")]
        {
            fs::create_dir_all(class.path().join(name).join("loop")).expect("made");
            fs::write(class.path().join(name).join("loop/backing_file"), file).expect("written");
        }
        fs::create_dir_all(class.path().join("loop3")).expect("one without a file");
        assert_eq!(loops(class.path(), &nodes()), ["loop0"]);
        assert!(!is_autoclear(class.path(), "loop0"));
        fs::write(class.path().join("loop0/loop/autoclear"), "1\n").expect("written");
        assert!(is_autoclear(class.path(), "loop0"));
    }

    #[test]
    fn what_the_kernel_exports_is_a_user() {
        let configuration = tempfile::tempdir().expect("a directory");
        let object = |folder: &str, key: &str, device: &str, enabled: &str| {
            let folder = configuration.path().join(folder);
            fs::create_dir_all(&folder).expect("made");
            fs::write(folder.join(key), format!("{device}\n")).expect("written");
            fs::write(folder.join("enable"), format!("{enabled}\n")).expect("written");
        };
        object("nvmet/subsystems/disks/namespaces/1", "device_path", "/dev/ublkb3", "1");
        object("nvmet/subsystems/disks/namespaces/2", "device_path", "/dev/ublkb30", "1");
        object("nvmet/subsystems/off/namespaces/1", "device_path", "/dev/ublkb3", "0");
        object("target/core/iblock_0/scsi", "udev_path", "/dev/ublkb3p1", "1");
        assert_eq!(
            exports(configuration.path(), &nodes()),
            ["exported by nvmet as disks", "exported by the SCSI target scsi"]
        );
    }

    #[test]
    fn only_udev_is_expected_to_leave_by_itself() {
        let passes = |name: &str| is_passing(&Process { pid: 1, name: name.into() });
        assert!(passes("(udev-worker)") && passes("systemd-udevd"));
        assert!(!passes("fio") && !passes("udev-worker-of-mine"));
    }

    #[test]
    fn partitions_belong_to_their_disk_only() {
        let class = tempfile::tempdir().expect("a directory");
        for (name, number) in
            [("ublkb1", "259:0\n"), ("ublkb1p2", "259:1\n"), ("ublkb11", "259:9\n"), ("sda", "8:0\n")]
        {
            fs::create_dir_all(class.path().join(name).join("holders/dm-0")).expect("made");
            fs::write(class.path().join(name).join("dev"), number).expect("written");
        }
        let names: Vec<_> =
            nodes_of(class.path(), "ublkb1").into_iter().map(|node| (node.name, node.number)).collect();
        assert_eq!(names, [("ublkb1".into(), "259:0".into()), ("ublkb1p2".into(), "259:1".into())]);
        assert_eq!(holders(class.path(), "ublkb1"), ["used by dm-0"]);
    }

    #[test]
    fn a_process_has_a_device_open_by_its_number_and_not_by_a_name() {
        let this = std::process::id();
        let folder = tempfile::tempdir().expect("a directory");
        let _zero = fs::File::open("/dev/zero").expect("every Linux has it");
        let _other = fs::File::create(folder.path().join("full")).expect("room");
        assert!(has_device_open(this, Path::new("/dev/zero")));
        assert!(!has_device_open(this, Path::new("/dev/full")), "only a file of its name is open");
        assert!(!has_device_open(this, Path::new("/dev/not-there")));
    }
}
