//! Opening a file that may be anybody's.
//!
//! Root opens files in folders of others, under paths that images of others tell. Whoever owns the folder or
//! the image decides what is there: a FIFO that never answers, a device that acts when it is opened, a file
//! of the kernel's that is used up by reading, a link, and another of them at the next moment.
//!
//! Order, so that nothing is opened but what was examined:
//!
//! 1. the file is found, which opens nothing (`O_PATH`);
//! 2. what was found is examined: a regular file, on a file system that keeps files;
//! 3. that very file is opened through its descriptor, whatever its path names by then.

use std::fs::{File, FileType, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sys::statfs::{FsType, fstatfs};

use super::Access;
use super::refusal::{NAME_A_FILE, without_proc};
use crate::error::{Doing, Error, Kind, Result};

/// How long a file system may take to find and open a file. Disks that spin up take less; a server that is
/// gone, or a file system in a process of another user, may take forever.
const OPEN_DEADLINE: Duration = Duration::from_secs(15);

/// File systems whose regular files are answers of the kernel: reading one can wait for ever, use up what is
/// read, or act. They are listed rather than those that keep files, because the kernel has few of them, under
/// numbers that never change; those that keep files are many, and some are in processes.
const KERNEL_FILE_SYSTEMS: [(FsType, &str); 24] = [
    (FsType(0x9fa0), "procfs"),
    (FsType(0x6265_6572), "sysfs"),
    (FsType(0x6462_6720), "debugfs"),
    (FsType(0x7472_6163), "tracefs"),
    (FsType(0x7363_6673), "securityfs"),
    (FsType(0xf97c_ff8c), "selinuxfs"),
    (FsType(0x4341_5d53), "smackfs"),
    (FsType(0x0027_e0eb), "cgroup"),
    (FsType(0x6367_7270), "cgroup2"),
    (FsType(0x1cd1), "devpts"),
    (FsType(0x6265_6570), "configfs"),
    (FsType(0xde5e_81e4), "efivarfs"),
    (FsType(0x6165_676c), "pstore"),
    (FsType(0xcafe_4a11), "bpf"),
    (FsType(0x1980_0202), "mqueue"),
    (FsType(0x4249_4e4d), "binfmt_misc"),
    (FsType(0x6c6f_6f70), "binderfs"),
    (FsType(0x6573_5543), "fusectl"),
    (FsType(0x6e73_6673), "nsfs"),
    (FsType(0x6759_6969), "rpc_pipefs"),
    (FsType(0x6e66_7364), "nfsd"),
    (FsType(0x0765_5821), "resctrl"),
    (FsType(0xabba_1974), "xenfs"),
    (FsType(0x6264_6576), "bdev"),
];

/// What becomes of a symbolic link as the last part of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Links {
    /// It leads to the file: the user has named it.
    Follow,
    /// It is no file: the program came across it.
    Refuse,
}

/// A regular file that was opened.
#[derive(Debug)]
pub struct Opened {
    /// The file, opened with `O_NONBLOCK`.
    pub file: File,
    /// Where it was found, absolute, without symbolic links.
    pub path: PathBuf,
}

/// Opens the regular file at `path`; neither a file of another type nor a file system that does not answer
/// holds the caller. The access time stays as it is where the kernel lets us choose.
///
/// # Errors
///
/// [`Kind::Unsupported`] for anything but a regular file on a file system that keeps files; [`Kind::InUse`]
/// if another program holds a lease on it; [`Kind::Io`] if the file system does not answer; what the
/// operating system says.
pub fn open_regular(path: &Path, access: Access, links: Links) -> Result<Opened> {
    let wanted = path.to_owned();
    // What was opened too late is closed there, whenever that is.
    let opened = in_time(move || open_here(&wanted, access, links));
    opened.and_then(|opened| opened).map_err(|error| error.file(path))
}

/// What `ask`, on a thread of its own, learns from a file system.
///
/// # Errors
///
/// [`Kind::Io`] if it does not answer; `ask` may then run on. What the operating system says of the thread.
pub(crate) fn in_time<T: Send + 'static>(ask: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (answer, answered) = mpsc::channel();
    // The receiver may have given up.
    let ask = move || drop(answer.send(ask()));
    thread::Builder::new().name("open".into()).spawn(ask).doing("starting a thread")?;
    let late = |_| {
        let message = format!("its file system has not answered for {} s", OPEN_DEADLINE.as_secs());
        Error::new(Kind::Io, message).remedy("see whether the server or the disk that holds it is there")
    };
    answered.recv_timeout(OPEN_DEADLINE).map_err(late)
}

fn open_here(path: &Path, access: Access, links: Links) -> Result<Opened> {
    let follow = if links == Links::Follow { 0 } else { libc::O_NOFOLLOW };
    // The standard library adds O_CLOEXEC, and asks for reading, which O_PATH ignores.
    let found = OpenOptions::new().read(true).custom_flags(libc::O_PATH | follow).open(path);
    let found = found.map_err(|error| Error::io("finding the image", error))?;
    refuse_irregular(&found)?;
    let link = PathBuf::from(format!("/proc/self/fd/{}", found.as_raw_fd()));
    let file = open_quietly(&link, access).map_err(refused)?;
    let path = std::fs::read_link(&link).map_err(|error| Error::io("finding the image", error))?;
    Ok(Opened { file, path })
}

/// Opens the open `file` once more: another description of it.
///
/// # Errors
///
/// What the operating system says.
pub(super) fn open_again(file: &File, access: Access) -> Result<File> {
    let link = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    open_quietly(&link, access).map_err(refused)
}

/// Opens what `link` in `/proc` leads to, without touching its access time, which only its owner and root may
/// ask for.
fn open_quietly(link: &Path, access: Access) -> io::Result<File> {
    let open = |flags| {
        let write = access == Access::ReadWrite;
        OpenOptions::new().read(true).write(write).custom_flags(flags).open(link)
    };
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    match open(flags | libc::O_NOATIME) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => open(flags),
        outcome => outcome,
    }
}

fn refused(error: io::Error) -> Error {
    match error.raw_os_error() {
        // Without O_NONBLOCK the holder could make us wait for `lease-break-time`.
        Some(libc::EWOULDBLOCK) => Error::new(Kind::InUse, "another program holds a lease on it"),
        Some(libc::ENOENT) => without_proc(),
        _ => Error::io("opening the image", error),
    }
}

fn refuse_irregular(found: &File) -> Result<()> {
    let looking = |error| Error::io("looking at the image", error);
    let kind = found.metadata().map_err(looking)?.file_type();
    if !kind.is_file() {
        let message = format!("this is {}, and an image is a regular file", name(kind));
        return Err(Error::new(Kind::Unsupported, message).remedy(instead(kind)));
    }
    let host = fstatfs(found).map_err(|errno| looking(errno.into()))?.filesystem_type();
    match KERNEL_FILE_SYSTEMS.iter().find(|(number, _)| *number == host) {
        None => Ok(()),
        Some((_, name)) => {
            let message =
                format!("this is a file of the kernel's ({name}), and an image is a file on a disk");
            Err(Error::new(Kind::Unsupported, message))
        }
    }
}

/// What to name instead of what is of this `kind`.
fn instead(kind: FileType) -> &'static str {
    match kind {
        _ if kind.is_dir() => NAME_A_FILE,
        _ if kind.is_block_device() => {
            "name an image file: `vhdx-ublk list` shows those of devices, and `convert` makes one of a \
             disk"
        }
        _ => "name the file of an image",
    }
}

fn name(kind: FileType) -> &'static str {
    match kind {
        _ if kind.is_dir() => "a folder",
        _ if kind.is_symlink() => "a symbolic link",
        _ if kind.is_block_device() => "a block device",
        _ if kind.is_char_device() => "a character device",
        _ if kind.is_fifo() => "a FIFO",
        _ if kind.is_socket() => "a socket",
        _ => "something unknown",
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use nix::sys::stat::Mode;

    use super::*;

    fn refusal(path: &Path, links: Links) -> String {
        let error = open_regular(path, Access::ReadOnly, links).expect_err("no image");
        assert_eq!(error.kind(), Kind::Unsupported, "{error}");
        error.to_string()
    }

    /// What waits, acts, or is used up by reading is refused by its type.
    #[test]
    fn nothing_but_a_file_on_a_disk_is_opened() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).expect("a FIFO can be made");
        assert!(refusal(&fifo, Links::Follow).contains("a FIFO"));
        assert!(refusal(folder.path(), Links::Follow).contains("a folder"));
        assert!(refusal(Path::new("/dev/null"), Links::Follow).contains("a character device"));
        for of_kernel in ["/proc/self/status", "/proc/kmsg", "/sys/kernel/uevent_seqnum"] {
            if Path::new(of_kernel).exists() {
                assert!(refusal(Path::new(of_kernel), Links::Follow).contains("of the kernel's"));
            }
        }
    }

    #[test]
    fn a_link_is_followed_only_where_the_user_has_named_it() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (file, link) = (folder.path().join("file"), folder.path().join("link"));
        fs::write(&file, "x").expect("room");
        std::os::unix::fs::symlink(&file, &link).expect("room");
        assert!(refusal(&link, Links::Refuse).contains("a symbolic link"));
        let opened = open_regular(&link, Access::ReadOnly, Links::Follow).expect("a regular file");
        assert_eq!(opened.path, fs::canonicalize(&file).expect("there"));
        open_regular(&file, Access::ReadWrite, Links::Refuse).expect("no link");
    }
}
