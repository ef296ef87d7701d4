//! The file system at the end of a disk that has grown.
//!
//! The last partition grows to the end of the disk, and then the file system on it, while it is mounted: so
//! its journal protects the change. The well-known programs do both. They run in a mount namespace of their
//! own, in which alone the file system is mounted.
//!
//! A power cut leaves the partition or the file system as it was or as it is to be; the same again finishes
//! it.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use nix::mount::{MsFlags, mount, umount};
use nix::sched::{CloneFlags, unshare};
use schemars::JsonSchema;
use serde::Serialize;

use super::device_disk::DeviceDisk;
use super::driver::{self, Driver};
use super::mounted::Mounted;
use super::{node, program};
use crate::device::device_number;
use crate::device::mounts::{Mount, Mounts};
use crate::device::registry::RUN_DIRECTORY;
use crate::disk::Access;
use crate::error::{Doing, Error, Kind, Result};
use crate::operations::contents::{Contents, Journal, Partition, Volume, VolumeKind};
use crate::printable::printable;
use crate::simulation::{Plant, planted};

/// What grows, and by which programs.
pub struct Plan {
    partition: Option<u32>,
    kind: VolumeKind,
    driver: &'static Driver,
    /// Makes the partition longer, and shows the kernel its new end.
    partitioners: Option<[PathBuf; 2]>,
    /// Makes the file system larger.
    tool: PathBuf,
}

/// What has grown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Grown {
    /// The number of the partition; none if the file system has all of the disk.
    pub partition: Option<u32>,
    /// The type of the file system.
    pub r#type: &'static str,
    /// The length of the file system by its own account, bytes.
    pub volume_bytes: Option<u64>,
}

impl Plan {
    /// What on a disk with these `contents` grows when the disk does. Its file system may be mounted from
    /// `device`, if the disk is served as that.
    ///
    /// # Errors
    ///
    /// [`Kind::Unsupported`] if it is nothing that can be grown; [`Kind::NotFound`] if a program is missing.
    pub fn of(contents: &Contents, device: Option<&Path>) -> Result<Self> {
        let is_mounted = |partition: Option<&Partition>| {
            let node = device.and_then(|device| match partition {
                Some(part) => node::of_partition(device, part.number, part.start, part.length),
                None => Some(device.to_owned()),
            });
            node.is_some_and(|node| mounts_have(&node))
        };
        let (partition, kind) = last_volume(contents, is_mounted)?;
        let (tool, package) = match kind {
            VolumeKind::Ext2 | VolumeKind::Ext3 | VolumeKind::Ext4 => ("resize2fs", "e2fsprogs"),
            VolumeKind::Xfs => ("xfs_growfs", "xfsprogs"),
            VolumeKind::Btrfs => ("btrfs", "btrfs-progs"),
            _ => return Err(refused(format!("{} is not grown by this program", kind.name()))),
        };
        let driver = driver::of(kind).expect("these three are mounted");
        let partitioners = match partition {
            Some(_) => Some([find("sfdisk", "fdisk")?, find("partx", "util-linux")?]),
            None => None,
        };
        Ok(Self { partition, kind, driver, partitioners, tool: find(tool, package)? })
    }

    /// How people call it: `partition 2 and its ext4`.
    pub fn name(&self) -> String {
        match self.partition {
            Some(number) => format!("partition {number} and its {}", self.kind.name()),
            None => self.kind.name().into(),
        }
    }

    /// The number of the partition that grows.
    pub fn partition(&self) -> Option<u32> {
        self.partition
    }

    /// Has it grow to the end of the device at `device`. Where the file system is mounted, the mount of this
    /// process is one more of the same.
    ///
    /// # Errors
    ///
    /// What the kernel or a program says.
    pub fn grow(&self, device: &Path) -> Result<Grown> {
        let node = match (self.partition, &self.partitioners) {
            (Some(number), Some(programs)) => grow_partition(programs, device, number)?,
            _ => device.to_owned(),
        };
        self.require_same(&DeviceDisk::open(device)?.contents())?;
        thread::scope(|scope| {
            let apart = scope.spawn(|| self.grow_file_system(&node));
            apart.join().expect("a panic ends the process")
        })?;
        let contents = DeviceDisk::open(device)?.contents();
        let volume_bytes = self.volume(&contents)?.and_then(|volume| volume.size);
        Ok(Grown { partition: self.partition, r#type: self.kind.name(), volume_bytes })
    }

    /// What is where the file system was that grows.
    fn volume<'a>(&self, contents: &'a Contents) -> Result<Option<&'a Volume>> {
        Ok(match self.partition {
            Some(number) => called(contents, number)?.volume.as_ref(),
            None => contents.volume.as_ref(),
        })
    }

    /// Refuses to mount what is not what was planned for: another user may write to the image meanwhile.
    fn require_same(&self, contents: &Contents) -> Result<()> {
        let is_same = |volume: &Volume| volume.kind == self.kind && !volume.other_devices;
        if self.volume(contents)?.is_some_and(is_same) {
            return Ok(());
        }
        let message = format!("the {} that was to grow is no longer there", self.kind.name());
        let remedy = "find out what writes to the image, and run the command again";
        Err(Error::new(Kind::Mismatch, message).remedy(remedy))
    }

    /// On a thread of its own: leaves the namespace of the process, mounts the file system, and has it grow.
    fn grow_file_system(&self, node: &Path) -> Result<()> {
        const LEAVING: &str = "making a mount namespace";
        let folder = Path::new(RUN_DIRECTORY);
        unshare(CloneFlags::CLONE_NEWNS).doing(LEAVING)?;
        let no = None::<&str>;
        mount(no, "/", no, MsFlags::MS_REC | MsFlags::MS_PRIVATE, no).doing(LEAVING)?;
        let mounted = Mounted::mount(self.driver, node, Access::ReadWrite)
            .map_err(|refusal| refused(refusal.reason(self.driver)))?;
        mounted.attach(folder).doing("mounting the file system")?;
        let mut command = program::at(&self.tool);
        match self.kind {
            VolumeKind::Xfs => command.arg(folder),
            VolumeKind::Btrfs => command.args(["filesystem", "resize", "max"]).arg(folder),
            _ => command.arg(node),
        };
        let outcome = run(&mut command, "");
        umount(folder).doing("unmounting the file system")?;
        outcome
    }
}

/// The last partition, or none, and what it holds.
fn last_volume(
    contents: &Contents,
    is_mounted: impl Fn(Option<&Partition>) -> bool,
) -> Result<(Option<u32>, VolumeKind)> {
    // The second copy of a GPT is behind the disk that was.
    let is_doubt = |fault: &&String| !fault.starts_with("the backup GPT ");
    if let Some(fault) = contents.faults.iter().find(is_doubt) {
        return Err(refused(format!("what is on the disk is not certain: {fault}")));
    }
    let is_data = |partition: &&Partition| !partition.is_extended();
    let last = contents.partitions().iter().filter(is_data).max_by_key(|partition| partition.end());
    let volume = match last {
        Some(last) => last.volume.as_ref(),
        None => contents.volume.as_ref(),
    };
    let is_logical = |last: &Partition| {
        let holds =
            |other: &Partition| other.is_extended() && (other.start..other.end()).contains(&last.start);
        contents.partitions().iter().any(holds)
    };
    if last.is_some_and(is_logical) {
        return Err(refused("the last partition lies in an extended partition".into()));
    }
    let place = last.map_or("the disk".into(), |last| format!("the last partition, {},", last.number));
    let Some(volume) = volume else {
        return Err(refused(format!("nothing is recognised on {place}")));
    };
    if volume.other_devices {
        let why = driver::why_alone(volume.kind);
        return Err(refused(format!("the {} on {place} cannot grow: {why}", volume.kind.name())));
    }
    // A file system that is mounted looks like one that was left so.
    if volume.journal == Journal::Dirty && !is_mounted(last) && !planted(Plant::GrowUnclean) {
        let message = format!("the {} on {place} was not shut down cleanly", volume.kind.name());
        return Err(refused(message));
    }
    Ok((last.map(|last| last.number), volume.kind))
}

/// Whether this process sees a mount of the block device at `node`.
fn mounts_have(node: &Path) -> bool {
    let number = |path: &Path| fs::metadata(path).ok().map(|found| found.rdev()).filter(|rdev| *rdev != 0);
    let Some(wanted) = number(node) else { return false };
    let is_its = |mount: Mount<'_>| {
        let by_number = mount.number == device_number(wanted).as_bytes();
        by_number || mount.btrfs_node().and_then(|node| number(&node)) == Some(wanted)
    };
    Mounts::of_this_process().is_ok_and(|mounts| mounts.iter().any(is_its))
}

fn refused(message: String) -> Error {
    let remedy = "resize the disk without --grow-fs, and grow what is on it in the guest";
    Error::new(Kind::Unsupported, message).remedy(remedy)
}

fn called(contents: &Contents, number: u32) -> Result<&Partition> {
    let found = contents.partitions().iter().find(|partition| partition.number == number);
    found.ok_or_else(|| Error::new(Kind::Mismatch, format!("partition {number} is no longer there")))
}

/// Has the partition reach to the end of the device; its node.
fn grow_partition([sfdisk, partx]: &[PathBuf; 2], device: &Path, number: u32) -> Result<PathBuf> {
    // A table of which a partition is mounted is not read again as a whole.
    let options = ["--quiet", "--no-reread", "--wipe=never", "--wipe-partitions=never", "-N"];
    let text = number.to_string();
    run(program::at(sfdisk).args(options).arg(&text).arg(device), ", +\n")?;
    run(program::at(partx).args(["--update", "--nr", &text]).arg(device), "")?;
    let contents = DeviceDisk::open(device)?.contents();
    let partition = called(&contents, number)?;
    let node = node::of_partition(device, number, partition.start, partition.length);
    node.ok_or_else(|| {
        let message = format!("the kernel does not show partition {number} as long as it is now");
        Error::new(Kind::Io, message).remedy("run the command again")
    })
}

/// The program `name`.
fn find(name: &str, package: &str) -> Result<PathBuf> {
    program::find(name).ok_or_else(|| {
        let message = format!("{name} is not installed, which makes what is on the disk larger");
        Error::new(Kind::NotFound, message).remedy(format!("install it (Debian: {package})"))
    })
}

/// Runs a program, with `input`; what it says is shown only if it fails.
fn run(command: &mut Command, input: &str) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let doing = || format!("running {name}");
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().doing(doing())?;
    let mut stdin = child.stdin.take().expect("it was asked for");
    let _ = stdin.write_all(input.as_bytes()); // a program that does not read it says why
    drop(stdin);
    let output = child.wait_with_output().doing(doing())?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("it says nothing");
    Err(Error::new(Kind::Io, format!("{name} failed ({}): {}", output.status, printable(said))))
}
