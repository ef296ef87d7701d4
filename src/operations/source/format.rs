//! The formats of disk images, and which one a file has.

use std::fmt;
use std::path::Path;

use schemars::JsonSchema;
use serde::Serialize;

use crate::disk::{ImageFile, SharedFile};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::file_id::CONVERT;
use crate::format::vhd::{FOOTER_COOKIE, FOOTER_SIZE};

/// The format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
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

/// What files of other formats have near their front: the place, the bytes there, the format.
const OTHERS: [(usize, &[u8], &str); 13] = [
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "VMDK"),
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (64, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"\x1f\x8b", "gzip"),
    (0, b"\xfd7zXZ\0", "xz"),
    (0, b"\x28\xb5\x2f\xfd", "zstd"),
    (0, b"PK\x03\x04", "zip"),
    (0, b"BZh", "bzip2"),
    (0, b"7z\xbc\xaf\x27\x1c", "7z"),
    // The headers and a region table of a VHDX whose front was overwritten.
    (64 << 10, b"head", DAMAGED),
    (192 << 10, b"regi", DAMAGED),
];

/// What a VHDX is called whose front was overwritten.
const DAMAGED: &str = "damaged VHDX";

/// Bytes that are examined.
const PROBED: usize = 256 << 10;

/// What is at the front of an image that is no raw disk.
const IMAGES: [(&[u8], &str); 2] = [(b"vhdxfile", "VHDX"), (&FOOTER_COOKIE, "VHD")];

/// How a qcow2 image becomes one that can be read here.
pub const FROM_QCOW2: &str = CONVERT;

/// How a disk becomes a qcow2 image, its parents included and without another copy.
pub const TO_QCOW2: &str = "qemu-img makes it of a device: `vhdx-ublk add --read-only OLD.vhdx`, then \
     `qemu-img convert -f raw -O qcow2 /dev/ublkbN NEW.qcow2`";

/// The format of `file`, by its first and last bytes. Whatever nothing is known of is a raw disk.
///
/// # Errors
///
/// [`Kind::Unsupported`] for an image of another format; what the operating system says.
pub(in crate::operations) fn probe(file: &ImageFile) -> Result<DiskFormat> {
    let length = file.length().doing("reading the size of the file").file(file.path())?;
    let bytes = SharedFile::of(file)?;
    let mut front = vec![0; PROBED];
    bytes.read(0, &mut front)?;
    let mut end = [0; 8];
    if let Some(footer) = length.checked_sub(FOOTER_SIZE as u64) {
        bytes.read(footer, &mut end)?;
    }
    if front.starts_with(b"vhdxfile") {
        return Ok(DiskFormat::Vhdx);
    }
    if end == FOOTER_COOKIE || front.starts_with(&FOOTER_COOKIE) {
        return Ok(DiskFormat::Vhd);
    }
    refuse_others(&front).file(file.path())?;
    Ok(DiskFormat::Raw)
}

/// As [`probe()`], for a file that was named by `path`: a raw disk has no name of another format.
///
/// # Errors
///
/// Those of [`probe()`]; [`Kind::Unsupported`] if the name says what the content does not.
pub(super) fn probe_named(path: &Path, file: &ImageFile) -> Result<DiskFormat> {
    let format = probe(file)?;
    let name = path.extension().and_then(|end| end.to_str()).unwrap_or("").to_ascii_lowercase();
    let other = ["vhdx", "avhdx", "vhd", "qcow2", "vmdk", "vdi"].contains(&name.as_str());
    if format != DiskFormat::Raw || !other {
        return Ok(format);
    }
    let message = format!("its name ends in .{name}, and nothing in it is of that format");
    let remedy = "if it was cut short, copy it again from its source; to read it as a raw disk all the same: \
                  --from raw";
    Err(Error::new(Kind::Unsupported, message).file(path).remedy(remedy))
}

/// Refuses a stream that begins with `front` and is an image, which no stream is read as.
///
/// # Errors
///
/// [`Kind::Unsupported`].
pub(in crate::operations) fn refuse_images(front: &[u8]) -> Result<()> {
    if let Some((_, name)) = IMAGES.iter().find(|(magic, _)| front.starts_with(magic)) {
        let message = format!("standard input is a {name} image, and is read as a raw disk only");
        let remedy = "name the file; or, if a disk begins so, say that it is one: --from raw";
        return Err(Error::new(Kind::Unsupported, message).remedy(remedy));
    }
    refuse_others(front)
}

fn refuse_others(front: &[u8]) -> Result<()> {
    let hit = |&&(at, magic, _): &&(usize, &[u8], &str)| {
        front.get(at..).is_some_and(|rest| rest.starts_with(magic))
    };
    let Some((.., name)) = OTHERS.iter().find(hit) else { return Ok(()) };
    let remedy = match *name {
        "qcow2" | "VMDK" | "VDI" => CONVERT,
        DAMAGED => "`vhdx-ublk check` shows the damage, and `vhdx-ublk salvage` may find what is left of it",
        _ => "unpack it first; to read the file itself as a disk, name its format: --from raw",
    };
    let message = format!("this looks like a file of the kind {name}, which is not read");
    Err(Error::new(Kind::Unsupported, message).remedy(remedy))
}
