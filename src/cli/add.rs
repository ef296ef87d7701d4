//! `add`: serves an image as a block device.
//!
//! Without `--foreground` the program runs itself again: the child serves, and the parent waits for its
//! report.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use schemars::JsonSchema;
use serde::Serialize;
use vhdx_ublk::chain::Search;
use vhdx_ublk::device::claims::{self, Claims, DEVICES_NEED_ROOT};
use vhdx_ublk::device::daemon;
use vhdx_ublk::device::engine_thread::EngineThread;
use vhdx_ublk::device::launch::Lives;
use vhdx_ublk::device::layers::Parents;
use vhdx_ublk::device::name::Name;
use vhdx_ublk::device::open_image::{NoEngine, OpenImage};
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::device::reclaim::Reclaim;
use vhdx_ublk::device::registry::{Entry, Registry};
use vhdx_ublk::device::respawn::refuse_useless;
use vhdx_ublk::device::salvaged;
use vhdx_ublk::device::session::Plan;
use vhdx_ublk::device::spec::Ready;
use vhdx_ublk::device::stop::{self, How, Target};
use vhdx_ublk::device::{
    MAX_BUFFER_BYTES, MAX_DEPTH, MAX_QUEUES, MIN_REQUEST_BYTES, OnFull, Options, Recovery, Salvage, ZeroCopy,
    confine, features, launch, private_mounts,
};
use vhdx_ublk::disk::{Access, ImageFile, Sparse};
use vhdx_ublk::error::{Doing, Error, Kind, Result};
use vhdx_ublk::operations::children::refuse_parent;
use vhdx_ublk::operations::{Devices, refuse_foreign_links};
use vhdx_ublk::system::module;

use super::parent_options::ParentOptions;
use super::{detached, logging, notify, output, respawn};

/// How long a holder of the image may take to leave: a process that was killed keeps its lock until its last
/// I/O has ended.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// Queues by default: more than this rarely helps a file.
const DEFAULT_QUEUES: usize = 4;

/// Serve an image as a block device.
///
/// Prints the path of the device on standard output as soon as it can be used. A daemon then serves the
/// device; `vhdx-ublk del` removes it and closes the image. If the image was not closed cleanly, its log is
/// replayed first.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of its own on the command line")]
pub struct Add {
    /// The VHDX file
    #[arg(required_unless_present = "fd", conflicts_with = "fd")]
    image: Option<PathBuf>,
    /// Serve the file of this open descriptor; read-only unless it is open for writing
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(3..))]
    fd: Option<RawFd>,
    /// Refuse all writes; the file is not changed
    #[arg(short, long)]
    read_only: bool,
    /// Show what is left of a damaged image: reads of what is lost fail, and all others do not. What only a
    /// missing parent has reads as zeros. Read-only: the file is not changed
    #[arg(long, conflicts_with = "force")]
    salvage: bool,
    /// Use what can only be guessed: where the regions are if no table names them, what the disk is like if
    /// the metadata are lost
    #[arg(long, requires = "salvage")]
    assume: bool,
    /// Allow writes to an image that has children; the first write makes them unreadable
    #[arg(long, conflicts_with = "read_only")]
    force: bool,
    /// The N of /dev/ublkbN [default: the first free number]
    #[arg(long, value_name = "N")]
    id: Option<u32>,
    /// A name for the device, by which all commands know it: 1 to 64 letters, digits, `.`, `_`, `-`
    #[arg(long, value_name = "NAME")]
    name: Option<Name>,
    /// Number of queues, 1 to 64; at most one per CPU is used [default: the number of CPUs, at most 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    queues: Option<u16>,
    /// Number of requests in flight per queue, 1 to 4096
    #[arg(long, value_name = "N", default_value_t = 64)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_DEPTH)))]
    depth: u16,
    /// What happens when the daemon is killed: `reissue` lets all I/O wait for `vhdx-ublk recover`, `queue`
    /// fails what is in flight and lets the rest wait, `fail` fails all I/O until `recover` (Linux 6.13, for
    /// those who must not wait), `none` fails everything for good [default: reissue, queue or none, the first
    /// that the kernel has]
    #[arg(long, value_enum, value_name = "HOW")]
    recovery: Option<Recovery>,
    /// Whether the file of the image may get holes: Windows refuses an image whose file is sparse. `auto`
    /// makes none on NTFS and over SMB, where a hole marks the file as sparse
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto")]
    sparse: Sparse,
    /// Leave data in the pages of the requests (`on`, Linux 6.16 or newer), or copy it once between the
    /// kernel and the daemon (`off`); `auto` copies, because zero copy was not measured to be faster
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto")]
    zero_copy: ZeroCopy,
    #[command(flatten)]
    parents: ParentOptions,
    /// Keep the kernel from looking for partitions on the disk
    #[arg(long)]
    no_partitions: bool,
    /// Give the daemon a mount namespace of its own: what is mounted later is not mounted for it. For an
    /// image whose path may come to lead to a file system on its own device
    #[arg(long)]
    private_mounts: bool,
    /// Serve an image that may be malicious: read-only, without partitions, with parents from its own folder
    /// only, and ignored by desktops (udisks), where the udev rule is installed
    #[arg(long, conflicts_with_all = ["parent", "parent_map", "force"])]
    untrusted: bool,
    /// Whether the device compacts its image by itself: `off`, or `auto`, once it had no request for 60 s
    /// (`auto=SECONDS`: for so many) and more than a quarter of the file is free. It stops at the first
    /// request, and continues when the device is idle again; `list` shows it. An image that was only read
    /// since it was added is left alone
    #[arg(long, value_name = "WHEN", default_value = "off")]
    #[arg(conflicts_with_all = ["read_only", "salvage", "untrusted"])]
    reclaim: Reclaim,
    /// What becomes of writes that the host has no room for: `fail` fails them, `wait` lets them wait until
    /// it has some; `list` shows how many wait, and for how long. Reads wait, too, once the waiting writes
    /// take all places of a queue (--depth). `del --force` fails what waits
    #[arg(long, value_enum, value_name = "HOW", default_value = "fail")]
    #[arg(conflicts_with_all = ["read_only", "salvage", "untrusted"])]
    on_full: OnFull,
    /// Serve from this process until it is interrupted (Ctrl-C)
    #[arg(short, long)]
    foreground: bool,
    /// Start a small process that recovers the device whenever its daemon dies, until the device is removed.
    /// For machines without a service manager: a unit of systemd does the same
    #[arg(long, conflicts_with = "foreground")]
    respawn: bool,
    /// As JSON: one object, errors too
    #[arg(long)]
    json: bool,
    /// Remove the device with the last mount of it
    #[arg(long, hide = true)]
    for_mount: bool,
    /// This process is the daemon
    #[arg(long, hide = true, conflicts_with = "foreground")]
    serve: bool,
    /// The daemon ends with the process that has started it
    #[arg(long, hide = true, requires = "serve")]
    private: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk add disk.vhdx
  vhdx-ublk add --name data disk.vhdx     later: vhdx-ublk del data
  lsblk $(vhdx-ublk add --read-only disk.vhdx)
  vhdx-ublk add --fd 3 3<>disk.vhdx
  vhdx-ublk add --salvage damaged.vhdx    later: mount -o ro,noload /dev/ublkb0 /mnt
  vhdx-ublk add --respawn disk.vhdx
  vhdx-ublk add --reclaim auto disk.vhdx
  vhdx-ublk add --on-full wait disk.vhdx
  vhdx-ublk add --untrusted received.vhdx

If the daemon is killed, no acknowledged write is lost: I/O waits until `vhdx-ublk recover`, which
--respawn runs by itself; after 20 failures in a row it gives up, and the log says so. For
this, a writable device uses memory under /run: 8 bytes per block, and for a child one bit per
sector of its partially present blocks (`vhdx-ublk info` shows the maximum). Sessions leave an
eighth of /run free, their bits a quarter. If there is no room, or /run is not a tmpfs, the
device works but cannot be recovered, and `add` warns about it.
If the kernel has no ublk driver yet, its module is loaded (modprobe ublk_drv), and a line says so.

With --private-mounts, a snapshot goes to a file system that the image or a parent of it is on.

Warnings of a running device go to /run/vhdx-ublk/N.log; a full log (1 MiB) becomes N.log.1. With
--foreground in a service of systemd they go to the journal, with the fields VHDX_DEVICE and
VHDX_IMAGE: `journalctl _UID=0 VHDX_DEVICE=/dev/ublkb0`, as any user can send such fields.
Writing to a parent invalidates its children. `add` refuses if it finds any, and lists them; use
--read-only or --force. It finds children that devices use, and those among the first 256 images
of the folder.
JSON: id, device, name (null or a text), image, log (null with --foreground).
Exit status: 0 the device can be used, 1 failure (nothing is left behind), 2 wrong usage.";

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Answer {
    /// The N of `/dev/ublkbN`.
    pub id: u32,
    /// `/dev/ublkbN`.
    pub device: PathBuf,
    /// The name that the device was given.
    pub name: Option<Name>,
    /// The image, as an absolute path without symbolic links.
    pub image: WrittenPath,
    /// Where warnings are written from now on; null if this process serves.
    pub log: Option<PathBuf>,
}

impl Add {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let options = self.options();
        options.validate()?;
        if self.respawn {
            refuse_useless(self.recovery)?;
        }
        if self.foreground {
            return self.serve_here(|ready| {
                self.print(ready)?;
                logging::serving(ready);
                notify::ready(ready);
                Ok(())
            });
        }
        if self.serve {
            let lives = if self.private { Lives::WithItsParent } else { Lives::OnItsOwn };
            return detached::run(self.fd, lives, |ready| self.serve(&options, ready));
        }
        let ready = self.start(&options)?;
        if self.respawn {
            respawn::start(&ready).inspect_err(|_| remove(&ready))?;
        }
        self.print(&ready).inspect_err(|_| remove(&ready))
    }

    fn print(&self, ready: &Ready) -> Result<()> {
        if !self.json {
            return output::print(&ready.device.display().to_string());
        }
        let Ready { id, device, image, log, .. } = ready.clone();
        let log = (!self.foreground).then_some(log);
        output::print_json(&Answer {
            id,
            device,
            name: self.name.clone(),
            image: WrittenPath::of(image),
            log,
        })
    }

    /// Serves from this process until the device's end.
    pub fn serve_here(&self, ready: impl FnOnce(&Ready) -> Result<()>) -> Result<()> {
        if self.respawn {
            let message = "--respawn does not go with a daemon in the foreground";
            return Err(Error::new(Kind::Usage, message)
                .remedy("omit it: what has started this process starts it again (Restart=on-failure)"));
        }
        let options = self.options();
        options.validate()?;
        module::load_driver();
        confine::prepare();
        self.serve(&options, ready)
    }

    /// A device for a mount: `options` are those of this command.
    ///
    /// # Errors
    ///
    /// [`Kind::Usage`] if they are wrong.
    pub fn for_mount(image: &Path, options: &[String]) -> Result<Self> {
        let words = ["add", "--for-mount"].map(OsString::from).into_iter();
        let options = options.iter().map(OsString::from);
        let words = words.chain(options).chain(["--".into(), image.into()]);
        Line::try_parse_from(words).map(|line| line.add).map_err(|error| {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            Error::new(Kind::Usage, first.strip_prefix("error: ").unwrap_or(first))
        })
    }

    /// Has another process serve it.
    ///
    /// # Errors
    ///
    /// Whatever prevented it.
    pub fn launch(&self) -> Result<Ready> {
        let options = self.options();
        options.validate()?;
        self.start(&options)
    }

    fn start(&self, options: &Options) -> Result<Ready> {
        module::load_driver();
        launch::launch(self.child_arguments(options))
    }

    fn options(&self) -> Options {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let default = u16::try_from(cpus.min(DEFAULT_QUEUES)).expect("a handful");
        // The kernel cuts to the same number; buffers are judged by what there will be.
        let queues = self.queues.unwrap_or(default).min(most_queues());
        let request_bytes = request_bytes(queues, self.depth);
        let Self { id, depth, recovery, zero_copy, for_mount, private, private_mounts, untrusted, .. } =
            *self;
        let (reclaim, on_full) = (self.reclaim, self.on_full);
        let (name, no_partitions) = (self.name.clone(), self.no_partitions || untrusted);
        Options {
            id,
            name,
            for_mount,
            private,
            queues,
            depth,
            request_bytes,
            recovery,
            zero_copy,
            private_mounts,
            no_partitions,
            untrusted,
            reclaim,
            on_full,
        }
    }

    /// The command line of the daemon.
    fn child_arguments(&self, options: &Options) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["add".into(), "--serve".into()];
        arguments.extend(
            [format!("--queues={}", options.queues), format!("--depth={}", options.depth)].map(Into::into),
        );
        arguments.extend(self.id.map(|id| format!("--id={id}").into()));
        arguments.extend(self.name.as_ref().map(|name| format!("--name={name}").into()));
        arguments.extend(self.recovery.map(|recovery| {
            let value = recovery.to_possible_value().expect("every recovery has a name");
            format!("--recovery={}", value.get_name()).into()
        }));
        let zero_copy = options.zero_copy.to_possible_value().expect("every choice has a name");
        arguments.push(format!("--zero-copy={}", zero_copy.get_name()).into());
        let sparse = self.sparse.to_possible_value().expect("every choice has a name");
        arguments.push(format!("--sparse={}", sparse.get_name()).into());
        arguments.extend(reclaim_argument(self.reclaim));
        arguments.extend(on_full_argument(self.on_full));
        arguments.extend(self.parents.arguments());
        arguments.extend(logging::arguments());
        arguments.extend(self.read_only.then(|| "--read-only".into()));
        arguments.extend(self.salvage.then(|| "--salvage".into()));
        arguments.extend(self.assume.then(|| "--assume".into()));
        arguments.extend(self.no_partitions.then(|| "--no-partitions".into()));
        arguments.extend(self.private_mounts.then(|| "--private-mounts".into()));
        arguments.extend(self.untrusted.then(|| "--untrusted".into()));
        arguments.extend(self.for_mount.then(|| "--for-mount".into()));
        arguments.extend(self.force.then(|| "--force".into()));
        arguments.extend(self.fd.map(|fd| format!("--fd={fd}").into()));
        arguments.extend(self.image.iter().flat_map(|image| ["--".into(), image.into()]));
        arguments
    }

    /// What to open, and for what. The path of a descriptor leads to its file, wherever that is by now.
    fn source(&self) -> Result<(PathBuf, Access)> {
        let access = |may_write| if may_write { Access::ReadWrite } else { Access::ReadOnly };
        let (None, Some(fd)) = (&self.image, self.fd) else {
            return Ok((self.image.clone().unwrap_or_default(), access(!self.reads_only())));
        };
        let path = PathBuf::from(format!("/proc/self/fd/{fd}"));
        let found = fs::metadata(&path)
            .and_then(|found| Ok((found, fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?)));
        let (found, info) = found.map_err(|error| {
            Error::io(format!("examining descriptor {fd}"), error)
                .remedy(format!("pass an open descriptor: `vhdx-ublk add --fd {fd} {fd}<>disk.vhdx`"))
        })?;
        if found.is_file() && found.nlink() == 0 {
            let message =
                format!("the file of descriptor {fd} has no name, so that its device could not be recovered");
            return Err(Error::new(Kind::NotFound, message).remedy("pass a file that has a name in a folder"));
        }
        let may_write = match open_mode(&info) {
            Some(libc::O_RDWR) => true,
            Some(libc::O_RDONLY) => false,
            _ => {
                let message = format!("descriptor {fd} is not open for reading");
                return Err(Error::new(Kind::Permission, message).remedy("open it for reading and writing"));
            }
        };
        Ok((path, access(may_write && !self.reads_only())))
    }

    /// Whether nothing may be written, whatever the file allows.
    fn reads_only(&self) -> bool {
        self.read_only || self.salvage || self.untrusted
    }

    /// Opens the image, and closes the caller's descriptor: the file has its own.
    fn open(&self) -> Result<(Arc<ImageFile>, Access)> {
        let (path, access) = self.source()?;
        let file = open(&path, access)?;
        if self.fd.is_none() {
            refuse_foreign_links(&path, &file)?;
        }
        file.set_sparse(self.sparse);
        if let Some(fd) = self.fd {
            nix::unistd::close(fd).doing("closing the caller's descriptor")?;
        }
        Ok((Arc::new(file), access))
    }

    /// Serves until the device's end.
    fn serve(&self, options: &Options, ready: impl FnOnce(&Ready) -> Result<()>) -> Result<()> {
        features::check(options)?;
        if options.private_mounts {
            private_mounts::leave()?;
        }
        let search = Search { beside_only: self.untrusted, ..self.parents.search() };
        let parents = Parents { search, open: |path| open(path, Access::ReadOnly) };
        let (file, access) = self.open()?;
        if access == Access::ReadOnly {
            let opened = if self.salvage {
                salvaged::open(file.clone(), &parents, Salvage { assume: self.assume }, None)?
            } else {
                OpenImage::read_only(file.clone(), &parents)?
            };
            let start = |ends| Ok(NoEngine::new(&opened, ends));
            return daemon::serve(&opened.spec(&file)?, options, start, ready);
        }
        refuse_parent(file.path(), &parents.search, self.force, &Claims)?;
        let keep = self.recovery != Some(Recovery::None);
        let engine = EngineThread::open(file.clone(), Plan::Fresh { keep }, parents)?;
        let served = engine.opened().spec(&file)?;
        daemon::serve(&served, options, |ends| Ok(engine.start(ends)), ready)
    }
}

/// The command line of a daemon that serves the image in `file` to this process, and ends with it. When it is
/// killed, I/O on its device fails: there is no process that would recover the device.
pub fn private(file: &File, access: Access, sparse: Sparse, parents: &ParentOptions) -> Vec<OsString> {
    let mut arguments: Vec<OsString> =
        ["add", "--serve", "--private", "--recovery=none"].map(Into::into).into();
    let sparse = sparse.to_possible_value().expect("every choice has a name");
    arguments.push(format!("--sparse={}", sparse.get_name()).into());
    arguments.extend((access == Access::ReadOnly).then(|| "--read-only".into()));
    arguments.extend(parents.arguments());
    arguments.push(format!("--fd={}", file.as_raw_fd()).into());
    arguments
}

fn reclaim_argument(reclaim: Reclaim) -> Option<OsString> {
    (reclaim != Reclaim::OFF).then(|| format!("--reclaim={reclaim}").into())
}

fn on_full_argument(on_full: OnFull) -> Option<OsString> {
    (on_full == OnFull::Wait).then(|| "--on-full=wait".into())
}

/// The command line of a daemon that serves `image`, whose parents are these, as the device of `entry` was
/// served.
pub fn again(entry: &Entry, image: &Path, parents: &[&Path]) -> Vec<OsString> {
    let word = |value: clap::builder::PossibleValue| value.get_name().to_owned();
    let recovery = word(entry.recovery.to_possible_value().expect("every recovery has a name"));
    let sparse = word(entry.sparse.to_possible_value().expect("every choice has a name"));
    let mut arguments: Vec<OsString> = vec!["add".into(), "--serve".into()];
    let zero_copy = if entry.zero_copy { "on" } else { "off" };
    arguments.extend(
        [
            format!("--id={}", entry.id),
            format!("--queues={}", entry.queues),
            format!("--depth={}", entry.depth),
            format!("--recovery={recovery}"),
            format!("--sparse={sparse}"),
            format!("--zero-copy={zero_copy}"),
        ]
        .map(Into::into),
    );
    arguments.extend(entry.name.as_ref().map(|name| format!("--name={name}").into()));
    arguments.extend(reclaim_argument(entry.reclaim));
    arguments.extend(on_full_argument(entry.on_full));
    arguments.extend(entry.private_mounts.then(|| "--private-mounts".into()));
    arguments.extend(entry.no_partitions.then(|| "--no-partitions".into()));
    arguments.extend(logging::arguments());
    for parent in parents {
        let mut option = OsString::from("--parent=");
        option.push(parent);
        arguments.push(option);
    }
    arguments.extend(["--".into(), image.into()]);
    arguments
}

/// The command alone.
#[derive(clap::Parser)]
#[command(name = "add")]
struct Line {
    #[command(flatten)]
    add: Add,
}

/// How a descriptor is open, by its `/proc/PID/fdinfo`.
fn open_mode(info: &str) -> Option<i32> {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    let flags = i32::from_str_radix(flags.trim(), 8).ok()?;
    (flags & libc::O_PATH == 0).then_some(flags & libc::O_ACCMODE)
}

/// Removes a device whose path could not be printed.
fn remove(ready: &Ready) {
    let stopped = Registry::open().and_then(|registry| {
        let found = stop::find(&registry, &Target::Id(ready.id))?;
        stop::stop(&registry, &found.entry, &How { force: true, timeout: stop::DEFAULT_TIMEOUT })
    });
    if let Err(error) = stopped {
        tracing::warn!(
            "{} was created but could neither be announced nor removed: {error:#}",
            ready.device.display()
        );
    }
}

/// Opens and locks the image, unless one of our devices has a claim to it.
fn open(path: &Path, access: Access) -> Result<ImageFile> {
    let file = open_locked(path, access)?;
    // Who may not see the devices may make none either, and should learn that first.
    let refused = Claims.refuse_abandoned(&file, access);
    refused.or_else(|error| claims::require_root(DEVICES_NEED_ROOT).and(Err(error)))?;
    Ok(file)
}

/// Opens and locks an image. Waits for a holder to leave, unless it is a device of ours, which stays.
pub fn open_locked(path: &Path, access: Access) -> Result<ImageFile> {
    let opened = match ImageFile::open(path, access, Duration::ZERO) {
        Err(error) if error.kind() == Kind::InUse && !Claims.serve(path) => {
            ImageFile::open(path, access, LOCK_WAIT)
        }
        outcome => outcome,
    };
    opened.map_err(|error| refused_by_host(Claims.with_holder(error, path), access))
}

/// What helps where the host does not let the image be written.
fn refused_by_host(error: Error, access: Access) -> Error {
    match error.os_error() {
        Some(libc::EROFS) if access == Access::ReadWrite => {
            error.remedy("the file system is read-only: `--read-only` serves the image as it is")
        }
        Some(libc::EPERM) if access == Access::ReadWrite => error.remedy(
            "the file may be immutable: see `lsattr`, `chattr -i`; `--read-only` serves the image as it is",
        ),
        _ => error,
    }
}

/// The most queues that a device gets: one per CPU of the machine.
fn most_queues() -> u16 {
    let cpus = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_CONF).ok().flatten();
    cpus.and_then(|cpus| u16::try_from(cpus).ok()).unwrap_or(MAX_QUEUES).clamp(1, MAX_QUEUES)
}

/// The longest requests whose buffers stay within bounds: many requests in flight need not be long ones.
fn request_bytes(queues: u16, depth: u16) -> u32 {
    let mut bytes = Options::default().request_bytes;
    while u64::from(queues) * u64::from(depth) * u64::from(bytes) > MAX_BUFFER_BYTES
        && bytes > MIN_REQUEST_BYTES
    {
        bytes /= 2;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Add {
        Line::try_parse_from([&["add"], arguments].concat()).expect("a good command line").add
    }

    #[test]
    fn the_child_serves_what_the_parent_was_told_to() {
        let add = parse(&[
            "--read-only",
            "--id",
            "7",
            "--name",
            "data",
            "--for-mount",
            "--depth",
            "9",
            "--queues",
            "1",
            "--recovery",
            "fail",
            "--zero-copy",
            "fallback",
            "--parent",
            "-one",
            "--parent-map",
            r"C:\=/mnt/c",
            "--parent=two",
            "--",
            "-odd name",
        ]);
        let arguments = add.child_arguments(&add.options());
        let again = Line::try_parse_from(arguments).expect("its own words").add;
        assert!(again.serve && again.read_only && again.image.as_deref() == Some(Path::new("-odd name")));
        assert_eq!((again.id, again.queues, again.depth), (Some(7), Some(1), 9));
        assert_eq!(again.options(), add.options());
        let search = again.parents.search();
        assert_eq!(search.parents, [Path::new("-one"), Path::new("two")]);
        assert_eq!(search.maps, add.parents.search().maps);
    }

    #[test]
    fn an_untrusted_image_is_read_only_and_its_partitions_are_left_alone() {
        let add = parse(&["--untrusted", "x"]);
        let again = Line::try_parse_from(add.child_arguments(&add.options())).expect("its own words").add;
        assert!(again.options().no_partitions && again.options().untrusted);
        assert_eq!(again.source().expect("a path").1, Access::ReadOnly);
        let add = parse(&["--no-partitions", "x"]);
        let again = Line::try_parse_from(add.child_arguments(&add.options())).expect("its own words").add;
        assert!(again.options().no_partitions && !again.options().untrusted);
        assert_eq!(again.source().expect("a path").1, Access::ReadWrite);
        for wrong in [["--parent", "y"], ["--parent-map", r"C:\=/c"]] {
            assert!(Line::try_parse_from([&["add", "--untrusted", "x"], &wrong[..]].concat()).is_err());
        }
    }

    #[test]
    fn the_child_serves_the_descriptor_that_the_parent_was_given() {
        let add = parse(&["--fd", "7"]);
        let again = Line::try_parse_from(add.child_arguments(&add.options())).expect("its own words").add;
        assert_eq!((again.fd, again.image), (Some(7), None));
        for wrong in [&["--fd", "7", "x"][..], &["--fd", "2"], &[]] {
            assert!(Line::try_parse_from([&["add"], wrong].concat()).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_descriptor_tells_how_it_is_open() {
        let mode = |flags: &str| open_mode(&format!("pos:\t0\nflags:\t{flags}\nmnt_id:\t29\n"));
        assert_eq!(mode("0100002"), Some(libc::O_RDWR));
        assert_eq!(mode("02100000"), Some(libc::O_RDONLY));
        assert_eq!(mode("0100001"), Some(libc::O_WRONLY));
        assert_eq!(mode("012000000"), None, "it only names the file");
        assert_eq!(open_mode(""), None);
    }

    #[test]
    fn the_child_insists_as_the_parent_does() {
        let add = parse(&["--force", "x"]);
        let again = Line::try_parse_from(add.child_arguments(&add.options())).expect("its own words").add;
        assert!(again.force && !again.read_only && !parse(&["x"]).force);
        let add = parse(&["--salvage", "--assume", "x"]);
        let again = Line::try_parse_from(add.child_arguments(&add.options())).expect("its own words").add;
        assert!(again.salvage && again.assume && again.reads_only() && !parse(&["x"]).salvage);
    }

    #[test]
    fn the_child_compacts_when_the_parent_was_told_to() {
        let add = parse(&["--reclaim=auto=7", "x"]);
        let again = Line::try_parse_from(add.child_arguments(&add.options())).expect("its own words").add;
        assert_eq!(again.options().reclaim.to_string(), "auto=7");
        assert_eq!(parse(&["x"]).options().reclaim, Reclaim::OFF);
        for arguments in [&["--reclaim", "auto=0"][..], &["--reclaim", "auto", "--untrusted"]] {
            assert!(Line::try_parse_from([&["add", "x"], arguments].concat()).is_err(), "{arguments:?}");
        }
    }

    #[test]
    fn writes_wait_for_room_when_the_parent_was_told_that_they_do() {
        let add = parse(&["--on-full=wait", "x"]);
        let again = Line::try_parse_from(add.child_arguments(&add.options())).expect("its own words").add;
        assert_eq!((again.options().on_full, parse(&["x"]).options().on_full), (OnFull::Wait, OnFull::Fail));
        let entry = Entry { on_full: OnFull::Wait, ..crate::cli::list::testing::listed().entry };
        let words = super::again(&entry, Path::new("/x"), &[]);
        assert_eq!(Line::try_parse_from(words).expect("its own words").add.on_full, OnFull::Wait);
        assert!(Line::try_parse_from(["add", "x", "--on-full", "wait", "--read-only"]).is_err());
    }

    #[test]
    fn deep_queues_get_short_requests_instead_of_an_error() {
        assert_eq!(request_bytes(4, 64), 512 << 10);
        assert_eq!(request_bytes(1, 4096), 64 << 10);
        for (queues, depth) in [(1, 1), (1, 4096), (16, 4096), (64, 64)] {
            let request_bytes = request_bytes(queues, depth);
            let options = Options { queues, depth, request_bytes, ..Options::default() };
            options.validate().expect("within bounds");
        }
    }

    #[test]
    fn more_queues_than_cpus_are_not_asked_for() {
        let options = parse(&["--queues", "64", "--depth", "4096", "x"]).options();
        assert_eq!(options.queues, most_queues());
        assert!(most_queues() > 16 || options.validate().is_ok(), "{options:?}");
    }

    #[test]
    fn a_host_that_refuses_writes_is_told_from_a_missing_right() {
        let refused = |errno, access| {
            let error = Error::io("opening", std::io::Error::from_raw_os_error(errno));
            refused_by_host(error, access).remedy_text().map(str::to_owned).unwrap_or_default()
        };
        assert!(refused(libc::EROFS, Access::ReadWrite).contains("--read-only"));
        assert!(refused(libc::EPERM, Access::ReadWrite).contains("chattr -i"));
        assert!(refused(libc::EACCES, Access::ReadWrite).is_empty());
        assert!(refused(libc::EPERM, Access::ReadOnly).is_empty());
    }

    #[test]
    fn counts_out_of_range_are_wrong_usage() {
        for arguments in
            [["--queues", "0"], ["--queues", "65"], ["--depth", "0"], ["--depth", "4097"], ["--id", "-1"]]
        {
            assert!(Line::try_parse_from([&["add", "x"], &arguments[..]].concat()).is_err(), "{arguments:?}");
        }
    }
}
