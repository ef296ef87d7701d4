//! Whether a file may have holes.
//!
//! Windows refuses an image whose file is sparse (0xC03A001A). On NTFS, and over SMB, the first hole marks
//! the file as sparse; that the hole is filled later changes nothing for some servers. So on these hosts an
//! image stays dense: nothing is punched, and a file grows by space that is really allocated.
//!
//! [Rule 109](crate::design::vhdx_rules#rule-109).

use std::ffi::CStr;
use std::fs::File;
use std::os::unix::fs::MetadataExt;

use nix::libc;
use nix::sys::statfs::{FUSE_SUPER_MAGIC, FsType, fstatfs};
use serde::{Deserialize, Serialize};

/// What the user says about holes in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub enum Sparse {
    /// Holes, unless they mark the file as sparse for Windows: over SMB, on ntfs3 and ntfs-3g.
    #[default]
    Auto,
    /// Holes.
    Yes,
    /// No holes.
    No,
}

/// SMB, by the numbers of its two clients in the kernel.
const SMB: [FsType; 2] = [FsType(0xff53_4d42), FsType(0xfe53_4d42)];

/// The kernel's own NTFS.
const NTFS3: FsType = FsType(0x7366_746e);

/// What a host does with holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Host {
    /// Holes are its own affair.
    Plain,
    /// A hole marks the file as sparse for Windows; `fallocate` allocates.
    MarksHoles,
    /// The same, and `fallocate` only sets the length: SMB.
    MarksHolesOfFallocate,
}

impl Host {
    /// The host of `file`; a plain one if it does not say.
    pub(super) fn of(file: &File) -> Self {
        let Ok(found) = fstatfs(file) else { return Self::Plain };
        let kind = found.filesystem_type();
        // ntfs-3g and its like have a block device; other FUSE file systems have none.
        let on_device = || file.metadata().is_ok_and(|found| libc::major(found.dev()) != 0);
        match kind {
            _ if SMB.contains(&kind) => Self::MarksHolesOfFallocate,
            NTFS3 => Self::MarksHoles,
            FUSE_SUPER_MAGIC if on_device() => Self::MarksHoles,
            _ => Self::Plain,
        }
    }

    /// Whether it is a server of SMB.
    pub(super) fn is_smb(self) -> bool {
        self == Self::MarksHolesOfFallocate
    }
}

/// Whether `file` comes from a server of SMB.
pub(super) fn is_on_smb(file: &File) -> bool {
    Host::of(file).is_smb()
}

/// Whether Windows sees the mark in the attributes of `file`; nothing if the host does not show them.
pub(super) fn is_marked(file: &File) -> Option<bool> {
    /// The attributes that Windows keeps with a file, as the client of SMB, ntfs3 and ntfs-3g show them.
    const NAMES: [&CStr; 2] = [c"user.cifs.dosattrib", c"system.ntfs_attrib"];
    /// `FILE_ATTRIBUTE_SPARSE_FILE`.
    const SPARSE: u32 = 0x200;
    NAMES.iter().find_map(|name| {
        let mut value = [0; size_of::<u32>()];
        let read = rustix::fs::fgetxattr(file, *name, &mut value).ok()?;
        (read == value.len()).then(|| u32::from_ne_bytes(value) & SPARSE != 0)
    })
}

/// What is wrong with a file that has holes on such a host.
pub const SPARSE_FOR_WINDOWS: &str =
    "the file is sparse, and Windows refuses it: copy it to a file without holes (`cp --sparse=never`)";

impl Sparse {
    /// Whether a file on `host` stays dense.
    pub(super) fn is_dense_on(self, host: Host) -> bool {
        match self {
            Self::Auto => host != Host::Plain,
            Self::Yes => false,
            Self::No => true,
        }
    }
}
