//! Where and when a session was made: the image's file, and the start of the kernel.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::statvfs::fstatvfs;
use uuid::Uuid;

use super::name::Name;
use crate::disk::ImageFile;
use crate::error::{Doing, Locate, Result};
use crate::image::{Place, SessionMemory};

/// The place of the image in `file`, in this start of the kernel.
///
/// # Errors
///
/// The host's; if `/proc` does not have the boot id.
pub(in crate::device) fn place_of(file: &ImageFile) -> Result<Place> {
    let found = fstatvfs(file).doing("looking at the image's file system").file(file.path())?;
    Ok(Place {
        boot: boot_id()?,
        inode: file.identity().inode,
        device: file.identity().device,
        file_system: found.filesystem_id(),
        path: file.path().to_owned(),
    })
}

/// The identity of this start of the kernel.
pub(super) fn boot_id() -> Result<Uuid> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = fs::read_to_string(PATH);
    let invalid = |error| io::Error::new(ErrorKind::InvalidData, error);
    let boot_id = text.and_then(|text| text.trim().parse().map_err(invalid));
    boot_id.doing("reading the kernel's boot id").file(Path::new(PATH))
}

/// Whether the session `name`, with this `memory`, belongs to another file than the one at `place`: it was
/// made under another mount, and its image still has its path.
pub(super) fn is_another(name: &Name, place: &Place, memory: &SessionMemory) -> bool {
    if name.device == place.device || memory.check_layout().is_err() {
        return false;
    }
    let of_session = fs::metadata(memory.place().path);
    of_session.is_ok_and(|found| (found.dev(), found.ino()) == (name.device, name.inode))
}
