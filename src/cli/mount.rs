//! `mount`: mounts the file system of an image in one step.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Serialize;

use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::error::Result;
use vhdx_ublk::system::mount::{self, MountOptions, MountRequest};

use super::add::Add;
use super::output;

/// Mount the file system of an image.
///
/// Serves the image as a device and mounts what is on it: the file system of the whole disk, the only one, or
/// that of a partition. If it fails, nothing is left behind. `vhdx-ublk umount` unmounts it, removes the
/// device and closes the image.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Mount {
    /// The VHDX file
    image: PathBuf,
    /// The folder on which to mount it
    folder: PathBuf,
    /// The partition: its number, or the label of its file system; needed if there are several
    #[arg(short, long, value_name = "N|LABEL")]
    partition: Option<String>,
    /// Options of mount(8), and those below
    #[arg(short, long, value_name = "OPTIONS")]
    options: Vec<String>,
    /// Refuse all writes; the file is not changed. The same as -o ro
    #[arg(short, long)]
    read_only: bool,
    /// The type of the file system [default: what is recognised]
    #[arg(short = 't', long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// As JSON: one object, errors too
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk mount -r ext4.vhdx /mnt                   a disk of WSL
  vhdx-ublk mount --partition 3 windows.vhdx /mnt
  vhdx-ublk mount -o untrusted received.vhdx /mnt     an image that may be malicious
  mount -t vhdx windows.vhdx /mnt -o ro,partition=3   the same, where mount.vhdx is installed
  /disks/data.vhdx  /data  vhdx  partition=Data,nofail  0  0          a line of /etc/fstab

Options beside those of mount(8): partition=N or LABEL; and, for the device, those of `vhdx-ublk
add` by the same names: name=, parent=, parent-map=, queues=, depth=, zero-copy=, recovery=,
sparse=, on-full=, salvage, assume, untrusted. For another type of the inner file system:
-t vhdx.TYPE.

An image that is served already is mounted from its device. An NTFS volume of a hibernated
Windows is refused unless the mount is read-only. A read-only mount does not replay the journal
of a file system that was not unmounted cleanly: the latest changes may be missing.
If the image or a parent does not belong to root, or its group or others may write to it, or its
device is made with untrusted, it is mounted with nosuid and nodev: no program on it gets the
rights of its owner, and no node on it opens a device. The options suid and dev allow them. An ext
has errors=remount-ro then, too: its superblock may ask for a panic of the machine at an error.
A file system with parts on other devices is refused: an ext with its journal elsewhere, a btrfs of
several devices, or with the identifier of another one of this machine, an F2FS that names devices.
JSON: image, folder, source (the device, or the partition of it, that is mounted).
Exit status: 0 it is mounted, 1 failure (nothing is left behind), 2 wrong usage.";

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Answer {
    /// The image, as it was named.
    image: WrittenPath,
    /// Where it is mounted, as it was named.
    folder: WrittenPath,
    /// `/dev/ublkbN`, or a partition of it.
    source: PathBuf,
}

impl Mount {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let mut options = MountOptions::parse(&self.options.join(","))?;
        options.read_only |= self.read_only;
        if self.partition.is_some() {
            options.partition = self.partition;
        }
        let Self { image, folder, kind, json, .. } = self;
        let request = MountRequest { image, folder, kind, options, flags: Vec::new() };
        let source = run(&request)?;
        if !json {
            return Ok(());
        }
        let MountRequest { image, folder, .. } = request;
        output::print_json(&Answer { image: WrittenPath::of(image), folder: WrittenPath::of(folder), source })
    }
}

/// Mounts what is requested; serves its image first, where no device does. The node that is mounted.
pub fn run(request: &MountRequest) -> Result<PathBuf> {
    let mut device = request.options.device.clone();
    device.extend(request.options.read_only.then(|| "--read-only".into()));
    let add = Add::for_mount(&request.image, &device)?;
    // Whoever interrupts the mount ends mount(8); this process then takes the device away.
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP] {
        let _ = signal_hook::flag::register(signal, std::sync::Arc::default());
    }
    mount::mount(request, || add.launch())
}
