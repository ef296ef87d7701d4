//! The names of a device below `/dev`: `/dev/vhdx/NAME` and `/dev/disk/by-id/vhdx-DISK-ID`.
//!
//! udev makes them, by the rule that comes with this program. What the rule has to know is in a file whose
//! name is the *disk sequence number*, which the kernel gives each disk once: a later device of the same
//! number does not get these names. A synthetic event has udev look at the device again. Where udev makes no
//! link to a name, because it does not run or lacks the rule, the daemon makes it. A private device has no
//! such file: it gets no names.
//!
//! A failure costs the names and not the device: it is a warning.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::name::{FOLDER, Name, id_of_node_name};
use super::sys;
use super::sysfs::names_in;

/// Where the kernel shows block devices.
const CLASS: &str = "/sys/class/block";

/// It is there while udev runs.
const UDEV: &str = "/run/udev/control";

/// How long the kernel may take until it may look for partitions.
const SCAN_PATIENCE: Duration = Duration::from_secs(1);

/// How long udev may take to make a link.
const PATIENCE: Duration = Duration::from_secs(3);

const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// What a device is called.
pub(super) struct Names<'a> {
    /// The N of `/dev/ublkbN`.
    pub(super) id: u32,
    /// The disk's identifier, which does not change with the image that holds it.
    pub(super) disk_id: Uuid,
    /// The name that the user gave it.
    pub(super) name: Option<&'a Name>,
    /// The kernel has just begun to look for its partitions.
    pub(super) is_scanned: bool,
}

/// Has the names made. Returns the disk sequence number, for [`withdraw`].
pub(super) fn publish(directory: &Path, names: &Names<'_>) -> Option<u64> {
    let disk = format!("ublkb{}", names.id);
    let published = sequence_of(&disk).and_then(|sequence| {
        write_properties(directory, sequence, names)?;
        announce(&disk)?;
        Ok(sequence)
    });
    let made = names.name.map_or(Ok(()), |name| await_link(name, &disk, names.is_scanned));
    if let Some(error) = published.as_ref().err().or(made.as_ref().err()) {
        tracing::warn!("/dev/{disk} may lack its other names: {error}");
    }
    published.ok()
}

/// Removes every link in the folder of names that leads to the device `id` or to a partition of it, but for
/// those of its own `name`: an earlier device of this number has left them, which ended with its entry lost.
pub(super) fn remove_stale(id: u32, name: Option<&Name>) {
    remove_stale_in(Path::new(FOLDER), id, name);
}

fn remove_stale_in(folder: &Path, id: u32, own: Option<&Name>) {
    for file in names_in(folder) {
        let link = folder.join(&file);
        if leads_to_device(&link, id) && Name::of_link_name(&file).as_ref() != own {
            let _ = fs::remove_file(link); // udev may have been first
        }
    }
}

/// Whether the link leads to the device or to a partition of it, there or not.
fn leads_to_device(link: &Path, id: u32) -> bool {
    let target = fs::read_link(link).ok();
    let node = target.as_deref().and_then(Path::file_name).and_then(|node| node.to_str());
    node.and_then(id_of_node_name) == Some(id)
}

/// Takes the names away, once the device is gone. udev does the same by itself.
pub(super) fn withdraw(directory: &Path, id: u32, sequence: Option<u64>, name: Option<&Name>) {
    if let Some(sequence) = sequence {
        let _ = fs::remove_file(properties_path(directory, sequence)); // no disk gets this number again
    }
    if let Some(name) = name {
        remove_links(Path::new(FOLDER), id, name);
    }
}

/// Removes the links of this name that lead to the device or to a partition of it. The kernel no longer shows
/// which partitions it had.
fn remove_links(folder: &Path, id: u32, name: &Name) {
    for file in names_in(folder) {
        let link = folder.join(&file);
        if Name::of_link_name(&file).as_ref() == Some(name) && leads_to_device(&link, id) {
            let _ = fs::remove_file(link); // udev may have been first
        }
    }
}

fn sequence_of(disk: &str) -> io::Result<u64> {
    let text = fs::read_to_string(Path::new(CLASS).join(disk).join("diskseq"))?;
    text.trim().parse().map_err(io::Error::other)
}

/// Removes the properties of disks that are gone: a daemon was killed before its entry had the number of its
/// disk, or an entry that had it was replaced. No disk gets such a number again.
pub(super) fn sweep(directory: &Path) {
    sweep_but(directory, || {
        let sequence = |disk: &String| match sequence_of(disk) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None, // a partition, or it is gone
            found => Some(found),
        };
        let found: io::Result<_> = names_in(Path::new(CLASS)).iter().filter_map(sequence).collect();
        found.unwrap_or_default()
    });
}

/// Removes the properties of all disks but those that are `present`; of none if none is, for then it is not
/// known which there are. Daemons begin meanwhile: a disk is there before its properties, so whoever
/// has properties by now is among the disks that are found later.
fn sweep_but(directory: &Path, present: impl FnOnce() -> BTreeSet<u64>) {
    let found: Vec<(String, u64)> = names_in(directory).into_iter().filter_map(with_sequence).collect();
    let present = present();
    for (file, _) in found.iter().filter(|(_, sequence)| !present.is_empty() && !present.contains(sequence)) {
        let _ = fs::remove_file(directory.join(file)); // another command may have been first
    }
}

/// The file of properties, whole or not, with the disk's number.
fn with_sequence(file: String) -> Option<(String, u64)> {
    let number = file.strip_prefix('.').unwrap_or(&file).strip_suffix(".udev")?.parse().ok()?;
    Some((file, number))
}

fn properties_path(directory: &Path, sequence: u64) -> PathBuf {
    directory.join(format!("{sequence}.udev"))
}

/// The same before it is complete.
fn next_properties_path(directory: &Path, sequence: u64) -> PathBuf {
    directory.join(format!(".{sequence}.udev"))
}

/// What the rule imports: a line for each property. One daemon at a time has the disk.
fn write_properties(directory: &Path, sequence: u64, names: &Names<'_>) -> io::Result<()> {
    let name = names.name.map(|name| format!("VHDX_NAME={name}\n")).unwrap_or_default();
    let text = format!("VHDX_DISK_ID={}\n{name}", names.disk_id);
    let next = next_properties_path(directory, sequence);
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next)?;
    file.write_all(text.as_bytes())?;
    fs::rename(next, properties_path(directory, sequence))
}

/// Has udev look again at the disk and at its partitions.
fn announce(disk: &str) -> io::Result<()> {
    for node in nodes(disk) {
        match fs::write(Path::new(CLASS).join(node).join("uevent"), "change") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {} // a partition that is gone
            outcome => outcome?,
        }
    }
    Ok(())
}

/// The disk, and the partitions that the kernel has found.
fn nodes(disk: &str) -> Vec<String> {
    let parts = names_in(Path::new(CLASS)).into_iter();
    let is_part = |node: &String| node.strip_prefix(disk).is_some_and(|rest| rest.starts_with('p'));
    std::iter::once(disk.to_owned()).chain(parts.filter(is_part)).collect()
}

/// The links of a name, each with the node that it leads to.
fn links(name: &Name, disk: &str) -> Vec<(PathBuf, String)> {
    let link = |node: String| match node.strip_prefix(disk).and_then(|rest| rest.strip_prefix('p')) {
        Some(number) => (name.link_to_partition(number), node),
        None => (name.link(), node),
    };
    nodes(disk).into_iter().map(link).collect()
}

fn leads_to(link: &Path, node: &str) -> bool {
    fs::read_link(link).is_ok_and(|target| target == target_of(node))
}

fn target_of(node: &str) -> PathBuf {
    Path::new("..").join(node)
}

/// Waits until udev has made the link to a name, and makes it if there is none.
fn await_link(name: &Name, disk: &str, is_scanned: bool) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    while Path::new(UDEV).exists() && Instant::now() < until {
        if leads_to(&name.link(), disk) {
            return Ok(());
        }
        thread::sleep(POLL_INTERVAL);
    }
    make_folder(Path::new(FOLDER))?;
    if is_scanned {
        await_partitions(disk);
    }
    links(name, disk).iter().try_for_each(|(link, node)| make_link(link, &target_of(node)))
}

/// Waits until the kernel has read the partition table, which it does while the device starts. If that fails,
/// the links are those of the partitions that it has found.
fn await_partitions(disk: &str) {
    let until = Instant::now() + SCAN_PATIENCE;
    let Ok(device) = File::open(Path::new("/dev").join(disk)) else { return };
    while sys::find_partitions(&device).is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
        && Instant::now() < until
    {
        thread::sleep(POLL_INTERVAL);
    }
}

/// Makes the folder, for every user to look into.
fn make_folder(folder: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o755).create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        // The daemon's umask leaves it to root.
        made => made.and_then(|()| fs::set_permissions(folder, Permissions::from_mode(0o755))),
    }
}

/// Makes a link, instead of another one that may be there. Anything else that is there stays.
fn make_link(link: &Path, target: &Path) -> io::Result<()> {
    match fs::symlink_metadata(link) {
        Ok(found) if !found.is_symlink() => return Err(io::Error::other("something else has that name")),
        Ok(_) => fs::remove_file(link)?,
        Err(_) => {}
    }
    symlink(target, link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_finds_the_properties_of_a_disk_and_no_others() {
        let directory = tempfile::tempdir().expect("a directory");
        let name = "data".parse().expect("a name");
        let names = Names { id: 7, disk_id: Uuid::from_u128(1), name: Some(&name), is_scanned: false };
        write_properties(directory.path(), 42, &names).expect("room");
        let text = fs::read_to_string(directory.path().join("42.udev")).expect("there");
        assert_eq!(text, "VHDX_DISK_ID=00000000-0000-0000-0000-000000000001\nVHDX_NAME=data\n");
        withdraw(directory.path(), 7, Some(42), None);
        assert_eq!(fs::read_dir(directory.path()).expect("there").count(), 0);
    }

    #[test]
    fn properties_of_disks_that_are_gone_are_removed() {
        let directory = tempfile::tempdir().expect("a directory");
        for file in ["7.udev", ".7.udev", "8.udev", ".9.udev", "7.json", "x.udev", ".entry"] {
            fs::write(directory.path().join(file), "").expect("room");
        }
        let all = names_in(directory.path());
        sweep_but(directory.path(), BTreeSet::new);
        assert_eq!(names_in(directory.path()), all, "no disk is known at all");
        sweep_but(directory.path(), || [8, 10].into());
        assert_eq!(names_in(directory.path()), [".entry", "7.json", "8.udev", "x.udev"]);
    }

    /// The sweep takes no lock that a daemon holds while it makes its device.
    #[test]
    fn a_disk_that_appears_during_a_sweep_keeps_its_properties() {
        let directory = tempfile::tempdir().expect("a directory");
        let write = |file: &str| fs::write(directory.path().join(file), "").expect("room");
        write("7.udev");
        sweep_but(directory.path(), || {
            let present = [8].into();
            [".9.udev", "10.udev"].into_iter().for_each(write);
            present
        });
        assert_eq!(names_in(directory.path()), [".9.udev", "10.udev"]);
    }

    #[test]
    fn a_link_replaces_a_link_and_nothing_else() {
        let directory = tempfile::tempdir().expect("a directory");
        let link = directory.path().join("data");
        make_link(&link, &target_of("ublkb1")).expect("free");
        make_link(&link, &target_of("ublkb2")).expect("a link");
        assert!(leads_to(&link, "ublkb2") && !leads_to(&link, "ublkb1"));
        fs::remove_file(&link).expect("ours");
        fs::write(&link, "precious").expect("room");
        assert!(make_link(&link, &target_of("ublkb1")).is_err());
        assert_eq!(fs::read_to_string(&link).expect("it stays"), "precious");
    }

    #[test]
    fn a_number_that_is_used_again_does_not_keep_the_names_of_before() {
        let directory = tempfile::tempdir().expect("a directory");
        let links = [
            ("old", "ublkb1"),
            ("old-part2", "ublkb1p2"),
            ("own", "ublkb1"),
            ("other", "ublkb11"),
            ("disk", "sda"),
        ];
        for (link, node) in links {
            make_link(&directory.path().join(link), &target_of(node)).expect("free");
        }
        fs::write(directory.path().join("file"), "").expect("room");
        let left = |own: Option<&Name>| {
            remove_stale_in(directory.path(), 1, own);
            names_in(directory.path())
        };
        assert_eq!(left(Some(&"own".parse().expect("a name"))), ["disk", "file", "other", "own"]);
        assert_eq!(left(None), ["disk", "file", "other"]);
    }

    #[test]
    fn a_device_takes_its_own_links_along_and_no_others() {
        let directory = tempfile::tempdir().expect("a directory");
        let links = [
            ("data", "ublkb1"),
            ("data-part2", "ublkb1p2"),
            ("data-part3", "ublkb2p3"),
            ("data2", "ublkb1"),
            ("other-part2", "ublkb1p2"),
        ];
        for (link, node) in links {
            make_link(&directory.path().join(link), &target_of(node)).expect("free");
        }
        fs::write(directory.path().join("data-part9"), "").expect("room");
        remove_links(directory.path(), 1, &"data".parse().expect("a name"));
        assert_eq!(names_in(directory.path()), ["data-part3", "data-part9", "data2", "other-part2"]);
    }
}
