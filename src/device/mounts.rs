//! The mounts of a process, from `/proc/PID/mountinfo`.
//!
//! The crate `procfs` is not used for it: it reads the file as UTF-8, leaves octal escapes in paths, and
//! fails for the whole file if one line is odd. Any user can mount a file system of any name in a namespace
//! of their own, which must not hide the mounts of a device.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// The lines of a `mountinfo`.
pub struct Mounts(Vec<u8>);

/// A line like `36 35 98:0 /root /mnt rw,noatime master:1 - ext4 /dev/sda1 rw`.
pub struct Mount<'a> {
    /// Unique among the mounts of a namespace.
    pub(super) id: &'a [u8],
    /// The number of its file system, `major:minor`.
    pub number: &'a [u8],
    /// The mount point, escaped.
    point: &'a [u8],
    /// The type of its file system.
    pub kind: &'a [u8],
    /// The device, or any text for file systems that have none; escaped.
    source: &'a [u8],
    /// The options of its file system, escaped.
    options: &'a [u8],
}

impl Mounts {
    /// The mounts that this process sees.
    ///
    /// # Errors
    ///
    /// When `/proc` cannot be read.
    pub fn of_this_process() -> io::Result<Self> {
        Self::of_process("self")
    }

    /// The mounts that the process `pid` sees.
    pub(super) fn of_process(pid: &str) -> io::Result<Self> {
        fs::read(format!("/proc/{pid}/mountinfo")).map(Self)
    }

    #[cfg(test)]
    pub(crate) fn parse(text: &[u8]) -> Self {
        Self(text.into())
    }

    /// The mounts in their order; a line that cannot be read is left out.
    pub fn iter(&self) -> impl Iterator<Item = Mount<'_>> {
        self.0.split(|&byte| byte == b'\n').filter_map(Mount::parse)
    }
}

impl<'a> Mount<'a> {
    fn parse(line: &'a [u8]) -> Option<Self> {
        let fields: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
        let dash = fields.iter().position(|field| *field == b"-")?;
        let field = |at: usize| fields.get(at).copied();
        Some(Self {
            id: field(0)?,
            number: field(2)?,
            point: field(4)?,
            kind: field(dash + 1)?,
            source: field(dash + 2)?,
            options: field(dash + 3).unwrap_or_default(),
        })
    }

    /// Where it is mounted.
    pub fn point(&self) -> PathBuf {
        unescape(self.point)
    }

    /// What the user of `mount` named as its source: a path only if its file system needs a device.
    pub fn source(&self) -> PathBuf {
        unescape(self.source)
    }

    /// The node that a btrfs of a device of ublk, or of a loop device, names as its source: it may be on
    /// several devices, and has a number of its own. Of other file systems with such a number any user may
    /// choose the source, as with FUSE; and any other path could lead to a file system that hangs.
    pub fn btrfs_node(&self) -> Option<PathBuf> {
        let source = self.source();
        let name = source.strip_prefix("/dev").ok()?.to_str()?;
        let is_node = (name.starts_with("ublkb") || name.starts_with("loop")) && !name.contains('/');
        (self.kind == b"btrfs" && is_node).then_some(source)
    }

    /// The path in an option like `upperdir=/a`.
    pub(super) fn path_option(&self, prefix: &[u8]) -> Option<PathBuf> {
        let mut options = self.options.split(|&byte| byte == b',');
        options.find_map(|option| option.strip_prefix(prefix)).map(unescape)
    }
}

/// The path in a field of `/proc`, which has blanks and backslashes as three octal digits: `\040`.
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
    OsString::from_vec(bytes).into()
}

/// The types of file systems that the kernel knows.
#[derive(Debug)]
pub(super) struct Kinds {
    /// Those that need no device: their source is any text that the user of `mount` chooses.
    without_device: Vec<String>,
}

impl Kinds {
    pub(super) fn of_kernel() -> Self {
        Self::parse(&fs::read_to_string("/proc/filesystems").unwrap_or_default())
    }

    /// Lines like `nodev\ttmpfs` and `\text4`.
    pub(super) fn parse(filesystems: &str) -> Self {
        let names = filesystems.lines().filter_map(|line| line.strip_prefix("nodev\t"));
        Self { without_device: names.map(|name| name.trim().to_owned()).collect() }
    }

    /// Whether a file system of this type (`ext4`, `fuse.sshfs`) has a device as its source.
    fn have_device(&self, kind: &[u8]) -> bool {
        let name = kind.split(|&byte| byte == b'.').next().unwrap_or_default();
        !self.without_device.iter().any(|without| without.as_bytes() == name)
    }

    /// The device that a mount names as its source. Any user can mount a tmpfs in a namespace of their own,
    /// from a "source" of any name, which must not keep a device in use.
    pub(super) fn device_of(&self, mount: &Mount<'_>) -> Option<PathBuf> {
        self.have_device(mount.kind).then(|| mount.source())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn only_a_btrfs_has_a_source_that_counts() {
        let source = |kind: &str, source: &str| {
            let line = format!("36 35 0:98 / /mnt rw - {kind} {source} rw\n");
            let mounts = Mounts::parse(line.as_bytes());
            let found = mounts.iter().next().and_then(|mount| mount.btrfs_node());
            found.map(|path| path.display().to_string())
        };
        for node in ["/dev/ublkb3", "/dev/ublkb3p1", "/dev/loop0"] {
            assert_eq!(source("btrfs", node).as_deref(), Some(node));
            assert_eq!(source("fuse", node), None);
            assert_eq!(source("fuse.btrfs", node), None);
        }
        for path in ["/dev/sda", "/dev/loop/../ublkb3", "/dev/../ublkb3", "ublkb3", "/dev/shm/ublkb3"] {
            assert_eq!(source("btrfs", path), None);
        }
    }

    #[test]
    fn escapes_are_undone_and_what_only_looks_like_one_is_kept() {
        assert_eq!(unescape(b"/a\\040b\\134c"), Path::new("/a b\\c"));
        assert_eq!(unescape(b"/a\\08\\9\\777\\"), Path::new("/a\\08\\9\\777\\"));
    }

    #[test]
    fn an_odd_line_hides_no_other() {
        let mounts = Mounts::parse(
            b"38 35 259:30 / /no-dash rw\n\xff\n\
            36 35 259:4 /sub /mnt/with\\040blank\xfe rw shared:2 - ext4 /dev/a rw,x=/\\040\n",
        );
        let [mount] = &mounts.iter().collect::<Vec<_>>()[..] else { panic!("one can be read") };
        assert_eq!((mount.id, mount.number, mount.kind), (&b"36"[..], &b"259:4"[..], &b"ext4"[..]));
        assert_eq!(mount.point(), unescape(b"/mnt/with blank\xfe"));
        assert_eq!((mount.source(), mount.path_option(b"x=")), ("/dev/a".into(), Some("/ ".into())));
        assert_eq!(mount.path_option(b"upperdir="), None);
    }

    #[test]
    fn the_kernels_own_list_has_the_file_systems_without_a_device() {
        let kinds = Kinds::of_kernel();
        assert!(!kinds.have_device(b"proc") && !kinds.have_device(b"tmpfs"), "{kinds:?}");
        assert!(kinds.have_device(b"ext4") && kinds.have_device(b"btrfs"), "{kinds:?}");
    }
}
