//! Who uses a block device or a file, in words for people: mounts, swap, stacked devices, what the kernel exports
//! to others, open files.
//!
//! Best effort by nature: what is found was true a moment ago, and processes that may not be looked into are
//! not. Used to refuse with a reason, never to decide that something is safe: where the kernel itself can refuse
//! to stop a device that is open, it decides.

use std::fs::{self, OpenOptions};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::registry::FileId;

/// A disk or one of its partitions.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Node {
    /// Its name in `/sys/class/block`.
    name: String,
    /// Its number, as `/proc` and `/sys` write it: `major:minor`.
    number: String,
}

/// Who uses a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users {
    /// Those that stay until somebody ends them.
    pub lasting: Vec<String>,
    /// Those that leave by themselves in a moment: they only look what a new or changed device is.
    pub passing: Vec<String>,
}

impl Users {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.lasting.is_empty() && self.passing.is_empty()
    }
}

/// Where the kernel's configuration of what it exports is mounted.
const CONFIGURATION: &str = "/sys/kernel/config";

/// Processes that open every new or changed device for a moment: udev's.
const PASSERS_BY: [&str; 3] = ["(udev-worker)", "systemd-udevd", "udevd"];

/// Who uses `/dev/ublkbN` or a partition of it: `mounted at /mnt`, `used as swap`, `used by dm-0`, `open in
/// fio (pid 123)`. Where nothing is found, the device is opened to see whether the kernel lets it be claimed: it
/// must be live.
pub fn of_device(id: u32) -> Users {
    let mut users = named(id);
    let nodes = nodes_of(Path::new("/sys/class/block"), &format!("ublkb{id}"));
    if users.is_empty() && nodes.iter().any(|node| is_claimed(&Path::new("/dev").join(&node.name))) {
        users.lasting.push("claimed by the kernel (mounted in another namespace?)".into());
    }
    users
}

/// As [`of_device`], without opening anything: the kernel may read a disk that is opened, which waits if it waits.
pub fn named(id: u32) -> Users {
    let (class, configuration) = (Path::new("/sys/class/block"), Path::new(CONFIGURATION));
    let nodes = nodes_of(class, &format!("ublkb{id}"));
    let read = |path| fs::read(path).unwrap_or_default();
    let kinds = Kinds::of_kernel();
    let mut users = mounts(&read("/proc/self/mountinfo"), &nodes, &kinds);
    users.extend(foreign_mounts(&nodes, &kinds));
    users.extend(swaps(&read("/proc/swaps"), &nodes));
    users.extend(nodes.iter().flat_map(|node| holders(class, &node.name)));
    users.extend(loops(class, &nodes));
    users.extend(exports(configuration, &nodes));
    let (passing, lasting): (Vec<_>, Vec<_>) =
        openers(|link| is_one_of(link, &nodes)).into_iter().partition(Opener::is_passing);
    users.extend(lasting.iter().map(Opener::to_string));
    Users { lasting: users, passing: passing.iter().map(Opener::to_string).collect() }
}

/// Which processes, this one aside, have the server's side of the device open: `/dev/ublkcN`.
pub fn of_character_device(id: u32) -> Vec<String> {
    let path = PathBuf::from(format!("/dev/ublkc{id}"));
    let found = openers(|link| fs::read_link(link).is_ok_and(|target| target == path));
    found.iter().map(Opener::to_string).collect()
}

/// Whether the process has the character device at `device` open.
pub fn has_device_open(pid: u32, device: &Path) -> bool {
    let (Ok(wanted), Some(name)) = (fs::metadata(device), device.file_name()) else { return false };
    let is_it = |link: &Path| {
        // Only what has this name is asked for its number: another file may lie on storage that hangs.
        fs::read_link(link).is_ok_and(|target| target.file_name() == Some(name))
            && fs::metadata(link)
                .is_ok_and(|found| found.file_type().is_char_device() && found.rdev() == wanted.rdev())
    };
    let directory = PathBuf::from(format!("/proc/{pid}/fd"));
    names_in(&directory).iter().any(|fd| is_it(&directory.join(fd)))
}

/// Which processes, this one aside, have the file open: `open in qemu-system-x86 (pid 123)`.
pub fn of_file(file: FileId) -> Vec<String> {
    let found = openers(|link| {
        has_inode(link, file.inode) && fs::metadata(link).is_ok_and(|found| FileId::of(&found) == file)
    });
    found.iter().map(Opener::to_string).collect()
}

/// How many devices may lie over each other: mappers, arrays, partitions.
const MAX_STACK: usize = 16;

/// Whether the file system of this number (`st_dev`) lies on `/dev/ublkbN`, through mappers and arrays. No file is
/// looked at, which could wait for a device that waits.
pub fn file_system_is_on(file_system: u64, id: u32) -> bool {
    let number = device_number(file_system);
    let mounts = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let sources = sources_of(&mounts, &number, &Kinds::of_kernel());
    let rdevs = sources
        .iter()
        .filter_map(|source| fs::metadata(source).ok())
        .map(|found| device_number(found.rdev()));
    let disk = format!("ublkb{id}");
    let numbers: Vec<String> = std::iter::once(number.clone()).chain(rdevs).collect();
    numbers.iter().any(|number| {
        let device = Path::new("/sys/dev/block").join(number);
        fs::canonicalize(device).is_ok_and(|device| lies_on(&device, &disk, MAX_STACK))
    })
}

fn device_number(device: u64) -> String {
    format!("{}:{}", libc::major(device), libc::minor(device))
}

/// Where the file systems of this number come from; those of several devices (btrfs) have numbers of their own.
fn sources_of(mountinfo: &[u8], number: &str, kinds: &Kinds) -> Vec<PathBuf> {
    let mounts = mountinfo.split(|&byte| byte == b'\n').filter_map(Mount::parse);
    mounts.filter(|mount| mount.number == number.as_bytes()).filter_map(|mount| mount.device(kinds)).collect()
}

/// The types of file systems that the kernel knows.
#[derive(Debug)]
struct Kinds {
    /// Those that need no device: their source is any text that the user of `mount` chooses.
    without_device: Vec<String>,
}

impl Kinds {
    fn of_kernel() -> Self {
        Self::parse(&fs::read_to_string("/proc/filesystems").unwrap_or_default())
    }

    /// Lines like `nodev\ttmpfs` and `\text4`.
    fn parse(filesystems: &str) -> Self {
        let names = filesystems.lines().filter_map(|line| line.strip_prefix("nodev\t"));
        Self { without_device: names.map(|name| name.trim().to_owned()).collect() }
    }

    /// Whether a file system of this type (`ext4`, `fuse.sshfs`) has a device as its source.
    fn have_device(&self, kind: &[u8]) -> bool {
        let name = kind.split(|&byte| byte == b'.').next().unwrap_or_default();
        !self.without_device.iter().any(|without| without.as_bytes() == name)
    }
}

/// A line like `36 35 98:0 /root /mnt rw,noatime master:1 - ext4 /dev/sda1 rw`.
struct Mount<'a> {
    number: &'a [u8],
    place: &'a [u8],
    kind: &'a [u8],
    source: &'a [u8],
}

impl<'a> Mount<'a> {
    fn parse(line: &'a [u8]) -> Option<Self> {
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
        let dash = fields.iter().position(|field| *field == b"-")?;
        let field = |at: usize| fields.get(at).copied();
        Some(Self { number: field(2)?, place: field(4)?, kind: field(dash + 1)?, source: field(dash + 2)? })
    }

    /// The device that it names as its source. Any user can mount a tmpfs in a namespace of their own, from a
    /// "source" of any name, which must not keep a device in use.
    fn device(&self, kinds: &Kinds) -> Option<PathBuf> {
        kinds.have_device(self.kind).then(|| unescape(self.source))
    }
}

/// Whether the block device at `device` of sysfs is `disk`, a part of it, or made of such.
fn lies_on(device: &Path, disk: &str, depth: usize) -> bool {
    if device.iter().any(|name| name == disk) {
        return true;
    }
    let Some(depth) = depth.checked_sub(1) else { return true };
    let slaves = fs::read_dir(device.join("slaves")).into_iter().flatten().flatten();
    slaves.filter_map(|slave| fs::canonicalize(slave.path()).ok()).any(|slave| lies_on(&slave, disk, depth))
}

fn nodes_of(class: &Path, disk: &str) -> Vec<Node> {
    let number = |name: &str| Some(fs::read_to_string(class.join(name).join("dev")).ok()?.trim().to_owned());
    let is_partition = |name: &str| {
        let rest = name.strip_prefix(disk).and_then(|rest| rest.strip_prefix('p'));
        rest.is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let mut names: Vec<String> =
        names_in(class).into_iter().filter(|name| name == disk || is_partition(name)).collect();
    names.sort();
    names.into_iter().filter_map(|name| Some(Node { number: number(&name)?, name })).collect()
}

fn names_in(directory: &Path) -> Vec<String> {
    let items = fs::read_dir(directory).into_iter().flatten().flatten();
    items.filter_map(|item| item.file_name().into_string().ok()).collect()
}

/// The mounts of the devices. File systems with numbers of their own (btrfs) are recognised by their source.
fn mounts(mountinfo: &[u8], nodes: &[Node], kinds: &Kinds) -> Vec<String> {
    let is_ours = |mount: &Mount| {
        let source = mount.device(kinds);
        let is_named = |node: &Node| source.as_deref() == Some(&Path::new("/dev").join(&node.name));
        nodes.iter().any(|node| node.number.as_bytes() == mount.number || is_named(node))
    };
    let mounts = mountinfo.split(|&byte| byte == b'\n').filter_map(Mount::parse);
    mounts.filter(is_ours).map(|mount| format!("mounted at {}", unescape(mount.place).display())).collect()
}

/// Mounts that only other namespaces have: of containers, and of services with a view of their own.
fn foreign_mounts(nodes: &[Node], kinds: &Kinds) -> Vec<String> {
    let namespace = |pid: &str| Some(fs::metadata(format!("/proc/{pid}/ns/mnt")).ok()?.ino());
    let mut seen: Vec<u64> = namespace("self").into_iter().collect();
    let mut users = Vec::new();
    for pid in names_in(Path::new("/proc")).iter().filter(|name| name.parse::<u32>().is_ok()) {
        let Some(found) = namespace(pid).filter(|found| !seen.contains(found)) else { continue };
        seen.push(found);
        let table = fs::read(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        let mounts = mounts(&table, nodes, kinds).into_iter();
        users.extend(mounts.map(|mount| format!("{mount} in the mount namespace of pid {pid}")));
    }
    users
}

/// Loop devices on the device or a partition of it; those on files of a mounted file system are its mount's.
fn loops(class: &Path, nodes: &[Node]) -> Vec<String> {
    let mut names = names_in(class);
    names.sort();
    let backs = |name: &String| {
        let file = fs::read(class.join(name).join("loop/backing_file")).ok()?;
        is_node(Path::new(std::ffi::OsStr::from_bytes(file.trim_ascii_end())), nodes).then(|| name.clone())
    };
    names.iter().filter_map(backs).map(|name| format!("used by the loop device /dev/{name}")).collect()
}

/// What the kernel exports: `NVMe` targets (nvmet) and SCSI targets (LIO).
fn exports(configuration: &Path, nodes: &[Node]) -> Vec<String> {
    let leads_here = |file: &Path| {
        let path = fs::read(file).unwrap_or_default();
        is_node(Path::new(std::ffi::OsStr::from_bytes(path.trim_ascii_end())), nodes)
    };
    let is_on = |file: &Path| fs::read(file).is_ok_and(|text| text.trim_ascii() == b"1");
    let under = |folder: &Path| {
        let mut names = names_in(folder);
        names.sort();
        names.into_iter().map(|name| (folder.join(&name), name)).collect::<Vec<_>>()
    };
    let mut users = Vec::new();
    for (subsystem, name) in under(&configuration.join("nvmet/subsystems")) {
        for (namespace, _) in under(&subsystem.join("namespaces")) {
            if is_on(&namespace.join("enable")) && leads_here(&namespace.join("device_path")) {
                users.push(format!("exported by nvmet as {name}"));
            }
        }
    }
    for (backend, _) in under(&configuration.join("target/core")) {
        for (object, name) in under(&backend) {
            if is_on(&object.join("enable")) && leads_here(&object.join("udev_path")) {
                users.push(format!("exported by the SCSI target {name}"));
            }
        }
    }
    users
}

/// Whether `path` names one of the devices: by its own name, or through a link or another node.
fn is_node(path: &Path, nodes: &[Node]) -> bool {
    let by_name = |node: &Node| path == Path::new("/dev").join(&node.name);
    let by_number = |found: fs::Metadata| {
        found.file_type().is_block_device()
            && nodes.iter().any(|node| node.number == device_number(found.rdev()))
    };
    // Only what is below `/dev` is looked at: any other path could lead to a file system that hangs.
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

/// `/proc` writes blanks and backslashes in paths as `\040`: three octal digits.
pub(super) fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let digits =
            tail.get(..3).filter(|digits| first == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        let value =
            digits.map(|d| u16::from(d[0] - b'0') * 64 + u16::from(d[1] - b'0') * 8 + u16::from(d[2] - b'0'));
        if let Some(byte) = value.and_then(|value| u8::try_from(value).ok()) {
            bytes.push(byte);
            rest = &tail[3..];
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

fn holders(class: &Path, name: &str) -> Vec<String> {
    let mut names = names_in(&class.join(name).join("holders"));
    names.sort();
    names.into_iter().map(|holder| format!("used by {holder}")).collect()
}

/// A process that has something open.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Opener {
    pid: u32,
    name: String,
}

impl Opener {
    fn is_passing(&self) -> bool {
        PASSERS_BY.contains(&self.name.as_str())
    }
}

impl std::fmt::Display for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "open in {} (pid {})", self.name, self.pid)
    }
}

/// The processes, this one aside, that have an open file for which `wanted` holds. It is given the link in
/// `/proc/PID/fd`.
fn openers(wanted: impl Fn(&Path) -> bool) -> Vec<Opener> {
    let this = std::process::id();
    let mut pids: Vec<u32> =
        names_in(Path::new("/proc")).iter().filter_map(|name| name.parse().ok()).collect();
    pids.sort_unstable();
    let has_it = |pid: &u32| {
        let directory = PathBuf::from(format!("/proc/{pid}/fd"));
        names_in(&directory).iter().any(|fd| wanted(&directory.join(fd)))
    };
    let describe = |pid: u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Opener { pid, name: name.trim_end().to_owned() }
    };
    pids.into_iter().filter(|&pid| pid != this).filter(has_it).map(describe).collect()
}

/// Whether the link leads to one of the devices. Only links into `/dev` are followed: asking a file system
/// on a device about its files could hang when that device does.
fn is_one_of(link: &Path, nodes: &[Node]) -> bool {
    let target = fs::read_link(link);
    if !target.is_ok_and(|target| target.as_os_str().as_bytes().starts_with(b"/dev/")) {
        return false;
    }
    let Ok(found) = fs::metadata(link) else { return false };
    let number = device_number(found.rdev());
    found.file_type().is_block_device() && nodes.iter().any(|node| node.number == number)
}

/// Whether the open file behind `/proc/PID/fd/N` may have this inode: `fdinfo` says so without asking the
/// file's own file system. Kernels before 5.14 do not say, and then it may.
fn has_inode(link: &Path, inode: u64) -> bool {
    let target = fs::read_link(link);
    if !target.is_ok_and(|target| target.is_absolute()) {
        return false; // a socket, a pipe, something anonymous
    }
    let (Some(process), Some(fd)) = (link.parent().and_then(Path::parent), link.file_name()) else {
        return false;
    };
    let info = fs::read_to_string(process.join("fdinfo").join(fd)).unwrap_or_default();
    let number = info.lines().find_map(|line| line.strip_prefix("ino:"));
    number.is_none_or(|number| number.trim().parse() == Ok(inode))
}

/// Whether the kernel itself has the device, as mounts and stacked devices do, from whatever namespace.
fn is_claimed(node: &Path) -> bool {
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(node);
    opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

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
        let found = mounts(mountinfo, &nodes(), &kinds());
        assert_eq!(found, ["mounted at /mnt/with blank", "mounted at /srv"]);
    }

    fn kinds() -> Kinds {
        Kinds::parse("nodev\tproc\nnodev\ttmpfs\nnodev\tfuse\n\text4\n\tfuseblk\n\tbtrfs\n")
    }

    /// Every user may mount these in a namespace of their own, under any name of a source.
    #[test]
    fn a_file_system_without_a_device_is_no_user_of_its_source() {
        let mountinfo = b"40 35 0:50 / /mnt rw - tmpfs /dev/ublkb3 rw\n\
            41 35 0:51 / /m rw - fuse.sshfs /dev/ublkb3p1 rw\n";
        assert_eq!(mounts(mountinfo, &nodes(), &kinds()), Vec::<String>::new());
        assert_eq!(sources_of(mountinfo, "0:50", &kinds()), Vec::<PathBuf>::new());
        let real = b"42 35 259:4 / /w rw - fuseblk.ntfs /dev/ublkb3p1 rw\n\
            43 35 0:52 / /z rw - btrfs /dev/ublkb3 rw\n";
        assert_eq!(mounts(real, &nodes(), &kinds()), ["mounted at /w", "mounted at /z"]);
        let unlisted = Kinds::parse("");
        assert_eq!(mounts(mountinfo, &nodes(), &unlisted).len(), 2, "what is not known may have a device");
    }

    #[test]
    fn the_kernels_own_list_tells_file_systems_without_a_device() {
        let kinds = Kinds::of_kernel();
        assert!(!kinds.have_device(b"proc") && !kinds.have_device(b"tmpfs"), "{kinds:?}");
        assert!(kinds.have_device(b"ext4") && kinds.have_device(b"btrfs"), "{kinds:?}");
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
        assert_eq!(loops(class.path(), &nodes()), ["used by the loop device /dev/loop0"]);
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
        let opener = |name: &str| Opener { pid: 1, name: name.into() };
        assert!(opener("(udev-worker)").is_passing() && opener("systemd-udevd").is_passing());
        assert!(!opener("fio").is_passing() && !opener("udev-worker-of-mine").is_passing());
    }

    #[test]
    fn escapes_are_undone_and_what_only_looks_like_one_is_kept() {
        assert_eq!(unescape(b"/a\\040b\\134c"), Path::new("/a b\\c"));
        assert_eq!(unescape(b"/a\\08\\9\\777\\"), Path::new("/a\\08\\9\\777\\"));
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
    fn what_lies_on_a_device_is_found_through_what_is_between() {
        let sys = tempfile::tempdir().expect("a temporary folder");
        for path in ["block/ublkb1/ublkb1p1", "block/ublkb10", "block/dm-0/slaves", "block/dm-1/slaves"] {
            fs::create_dir_all(sys.path().join(path)).expect("free");
        }
        let link = |to: &str, at: &str| {
            std::os::unix::fs::symlink(sys.path().join(to), sys.path().join(at)).expect("free");
        };
        link("block/ublkb1/ublkb1p1", "block/dm-0/slaves/ublkb1p1");
        link("block/dm-0", "block/dm-1/slaves/dm-0");
        let is_on = |device: &str| lies_on(&sys.path().join("block").join(device), "ublkb1", MAX_STACK);
        assert!(is_on("ublkb1") && is_on("ublkb1/ublkb1p1") && is_on("dm-0") && is_on("dm-1"));
        assert!(!is_on("ublkb10"));
        let mounts = b"36 35 0:40 / /mnt rw - btrfs /dev/ublkb1 rw\n37 35 0:41 / /m rw - tmpfs tmpfs rw\n";
        assert_eq!(sources_of(mounts, "0:40", &kinds()), [Path::new("/dev/ublkb1")]);
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

    #[test]
    fn an_open_file_is_recognised_by_inode_through_any_name() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let other = tempfile::NamedTempFile::new().expect("a file");
        let id = |file: &tempfile::NamedTempFile| FileId::of(&file.as_file().metadata().expect("open"));
        let link = PathBuf::from(format!("/proc/self/fd/{}", file.as_file().as_raw_fd()));
        assert!(has_inode(&link, id(&file).inode));
        assert!(!has_inode(&link, id(&other).inode));
        assert_eq!(of_file(id(&file)), Vec::<String>::new(), "this process does not count");
    }
}
