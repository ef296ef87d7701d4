//! Processes and their open files, from `/proc`, as far as it may be read.

use std::cell::OnceCell;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use super::sysfs::names_in;
use crate::disk::HostFile;

/// A process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: u32,
    pub(super) name: String,
}

impl Process {
    /// The process `pid`.
    pub(super) fn of(pid: u32) -> Self {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Self { pid, name: name.trim_end().to_owned() }
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.name, self.pid)
    }
}

/// The numbers of all processes except for this one, sorted.
pub(super) fn others() -> Vec<u32> {
    let this = std::process::id();
    let names = names_in(Path::new("/proc"));
    let mut pids: Vec<u32> = names.iter().filter_map(|name| name.parse().ok()).collect();
    pids.sort_unstable();
    pids.retain(|&pid| pid != this);
    pids
}

/// The open files of the process `pid`.
pub(super) fn open_files(pid: u32) -> impl Iterator<Item = OpenFile> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let names = names_in(&process.join("fd")).into_iter();
    names.map(move |fd| OpenFile {
        link: process.join("fd").join(&fd),
        info_path: process.join("fdinfo").join(fd),
        info: OnceCell::new(),
    })
}

/// An open file of a process.
pub(super) struct OpenFile {
    link: PathBuf,
    info_path: PathBuf,
    /// Read once: the descriptor may come to mean another file.
    info: OnceCell<String>,
}

impl OpenFile {
    /// Its path when it was opened, or the kernel's name for what has none.
    pub(super) fn path(&self) -> Option<PathBuf> {
        fs::read_link(&self.link).ok()
    }

    /// Asks its file system, which may hang.
    pub(super) fn metadata(&self) -> Option<fs::Metadata> {
        fs::metadata(&self.link).ok()
    }

    /// A field of its `fdinfo`, like `ino:`; not every kernel has every field.
    pub(super) fn info(&self, field: &str) -> Option<String> {
        let info = self.info.get_or_init(|| fs::read_to_string(&self.info_path).unwrap_or_default());
        info.lines().find_map(|line| line.strip_prefix(field)).map(|value| value.trim().to_owned())
    }

    /// Whether it is `file`. Since Linux 5.14, `fdinfo` has the inode: no file system is asked that has
    /// nothing to do with the file, and might hang.
    pub(super) fn is(&self, file: HostFile) -> bool {
        // A socket, a pipe and the like have no absolute path.
        self.path().is_some_and(|path| path.is_absolute())
            && self.info("ino:").is_none_or(|inode| inode.parse() == Ok(file.inode))
            && self.metadata().is_some_and(|found| HostFile::of(&found) == file)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn an_open_file_is_recognised_by_inode_through_any_path() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let other = tempfile::NamedTempFile::new().expect("a file");
        let id = |file: &File| HostFile::of(&file.metadata().expect("open"));
        let this = std::process::id();
        let fd = file.as_file().as_raw_fd().to_string();
        let open = open_files(this).find(|open| open.link.ends_with(&fd)).expect("it is open");
        assert!(open.is(id(file.as_file())) && !open.is(id(other.as_file())));
        assert!(!others().contains(&this), "this process does not count");
    }
}
