//! Room for entries that are written later, when the directory may have none left.
//!
//! A process that takes a device over writes its entry while the I/O of the device waits. So it takes the
//! room before: files without a name, as large as the entries will be. They end with the process.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::machine;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::linkat;

/// Only root may read entries.
pub(in crate::device) const FILE_MODE: u32 = 0o600;

/// The name of an entry until it takes the place of the one before. Its writer has the directory locked; one
/// that was killed may have left it.
pub(super) const NEXT_ENTRY: &str = ".entry";

/// How much longer an entry may become than it was when its room was taken, bytes.
const GROWTH: usize = 1024;

/// See the module's head. Each file has room for one entry.
#[derive(Debug, Default)]
pub struct Reserved(Vec<File>);

impl Reserved {
    /// Room for `count` entries that are about as long as `text`. None where the file system of `folder`
    /// makes no files without a name.
    pub(super) fn take(folder: &Path, text: &str, count: usize) -> io::Result<Self> {
        let blank = vec![b' '; text.len() + GROWTH];
        let file = || -> io::Result<File> {
            let mut options = OpenOptions::new();
            let file = options.write(true).custom_flags(libc::O_TMPFILE).mode(FILE_MODE).open(folder)?;
            file.write_all_at(&blank, 0)?;
            Ok(file)
        };
        match (0..count).map(|_| file()).collect() {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR)) => {
                Ok(Self::default())
            }
            files => files.map(Self),
        }
    }

    /// Writes `text` over the blanks of one file, and puts that in the place of `path`. `None` if none is
    /// left.
    pub(super) fn put(&mut self, text: &str, path: &Path) -> Option<io::Result<()>> {
        self.0.pop().map(|file| put(&file, text, path))
    }
}

pub(super) fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn put(file: &File, text: &str, path: &Path) -> io::Result<()> {
    file.write_all_at(text.as_bytes(), 0)?;
    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    let named = path.with_file_name(NEXT_ENTRY);
    remove_if_there(&named)?;
    linkat(AT_FDCWD, Path::new(&unnamed), AT_FDCWD, &named, AtFlags::AT_SYMLINK_FOLLOW)?;
    machine::turn("puts the entry in its place");
    fs::rename(&named, path).inspect_err(|_| {
        let _ = fs::remove_file(&named); // the error says what is wrong with the folder
    })
}
