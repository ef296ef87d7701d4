//! The formats of disk images, and which one a file has.

use std::fmt;

use serde::Serialize;

use crate::disk::{ImageFile, SharedFile};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::vhd::{FOOTER_COOKIE, FOOTER_SIZE};

/// The format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The disk itself.
    Raw,
    /// The older format of Windows.
    Vhd,
    /// VHDX.
    Vhdx,
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Vhd => "VHD",
            Self::Vhdx => "VHDX",
        })
    }
}

/// What a file of another format begins with, and the name of the format.
const OTHERS: [(&[u8], &str); 7] = [
    (b"QFI\xfb", "qcow2"),
    (b"KDMV", "VMDK"),
    (b"COWD", "VMDK"),
    (b"# Disk DescriptorFile", "VMDK"),
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
];

/// How a qcow2 image becomes a disk that can be read here, and back.
pub const QCOW2_RECIPE: &str = "qemu-img converts it through a device: `vhdx-ublk create NEW.vhdx --size \
     SIZE`, `vhdx-ublk add NEW.vhdx`, `qemu-img convert -n -O raw OLD.qcow2 /dev/ublkbN`; and back: \
     `vhdx-ublk add --read-only OLD.vhdx`, `qemu-img convert -f raw -O qcow2 /dev/ublkbN NEW.qcow2`";

/// The format of `file`, by its first and last bytes. Whatever nothing is known of is a raw disk.
///
/// # Errors
///
/// [`Kind::Unsupported`] for an image of another format; what the operating system says.
pub(in crate::operations) fn probe(file: &ImageFile) -> Result<DiskFormat> {
    let length = file.length().doing("reading the size of the file").file(file.path())?;
    let bytes = SharedFile::of(file)?;
    let mut front = [0; 32];
    bytes.read(0, &mut front)?;
    let mut end = [0; 8];
    if let Some(footer) = length.checked_sub(FOOTER_SIZE as u64) {
        bytes.read(footer, &mut end)?;
    }
    if front.starts_with(b"vhdxfile") {
        return Ok(DiskFormat::Vhdx);
    }
    if let Some((_, name)) = OTHERS.iter().find(|(magic, _)| front.starts_with(magic)) {
        let message = format!("this looks like a {name} file, which is not read");
        let remedy = match *name {
            "qcow2" => QCOW2_RECIPE,
            "VMDK" => "convert it first: qemu-img convert -O raw OLD NEW",
            _ => "unpack it first; to read the file itself as a disk, name its format: --from raw",
        };
        return Err(Error::new(Kind::Unsupported, message).file(file.path()).remedy(remedy));
    }
    Ok(if end == FOOTER_COOKIE || front.starts_with(&FOOTER_COOKIE) {
        DiskFormat::Vhd
    } else {
        DiskFormat::Raw
    })
}
