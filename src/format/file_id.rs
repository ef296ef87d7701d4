//! The file identifier: the first 64 KiB of the file, written once at creation and never again.
//!
//! Invariants: the signature alone decides whether a file is a VHDX; the creator is for people and changes
//! nothing. Creation writes this structure last, so that an unfinished file is never taken for an image.
//!
//! [Rules 6 and 7](crate::design::vhdx_rules#rule-6).

use crate::error::{Error, Kind, Result};
use crate::printable::is_printable;

/// The first eight bytes of every VHDX file.
const SIGNATURE: &[u8; 8] = b"vhdxfile";

/// Bytes of the creator's text, in UTF-16LE, behind the signature (MS-VHDX 2.2.1).
const CREATOR_BYTES: usize = 512;

/// Bytes of the identifier that have a meaning; the rest of the slot is reserved.
const MEANINGFUL: usize = SIGNATURE.len() + CREATOR_BYTES;

const _: () = assert!(MEANINGFUL <= FileId::SIZE && CREATOR_BYTES.is_multiple_of(2));

/// What the file says about itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileId {
    /// The program that made the file, for people only: decoded as far as it can be, without characters that
    /// steer a terminal.
    pub creator: String,
}

impl FileId {
    /// Bytes of the slot, at offset 0 of the file.
    pub const SIZE: usize = 65536;

    /// Reads the identifier from the first bytes of the file, the first 64 KiB or as many as it has.
    ///
    /// Tolerated: any bytes in the creator and in the reserved rest of the slot.
    ///
    /// # Errors
    /// [`Kind::NotVhdx`] without the signature, with a remedy where the bytes look like another format;
    /// [`Kind::Truncated`] if the file ends inside the identifier.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if !bytes.starts_with(SIGNATURE) {
            return Err(not_vhdx(bytes, &[]));
        }
        let Some(creator) = bytes.get(SIGNATURE.len()..MEANINGFUL) else {
            let message = format!("the file ends after {} bytes, {} expected", bytes.len(), Self::SIZE);
            return Err(Error::new(Kind::Truncated, message).in_structure("file identifier").at(0));
        };
        Ok(Self { creator: decode_creator(creator) })
    }

    /// Puts the signature where it belongs, over whatever is there.
    ///
    /// # Panics
    /// If `front` is shorter than the signature.
    pub fn restore(front: &mut [u8]) {
        assert!(front.len() >= SIGNATURE.len(), "there is room for the signature");
        front[..SIGNATURE.len()].copy_from_slice(SIGNATURE);
    }

    /// The whole slot for a new file. Control characters in `creator` and what exceeds 255 UTF-16 units are
    /// left out; a NUL always ends the text.
    pub fn encode(creator: &str) -> Vec<u8> {
        let mut slot = Vec::with_capacity(Self::SIZE);
        slot.extend_from_slice(SIGNATURE);
        for character in creator.chars().filter(|&c| is_printable(c)) {
            let mut units = [0_u16; 2];
            let units = character.encode_utf16(&mut units);
            if slot.len() + 2 * units.len() + 2 > MEANINGFUL {
                break;
            }
            slot.extend(units.iter().flat_map(|unit| unit.to_le_bytes()));
        }
        assert!(slot.len() < MEANINGFUL, "the text and its NUL fit the field");
        assert!(slot.len().is_multiple_of(2), "the text is whole UTF-16 units");
        slot.resize(Self::SIZE, 0);
        debug_assert!(Self::parse(&slot).is_ok(), "what is written reads back");
        slot
    }
}

/// The text up to the first NUL.
fn decode_creator(bytes: &[u8]) -> String {
    let units = bytes
        .chunks_exact(2)
        .map(|unit| u16::from_le_bytes([unit[0], unit[1]]))
        .take_while(|&unit| unit != 0);
    char::decode_utf16(units)
        .map(|unit| unit.unwrap_or(char::REPLACEMENT_CHARACTER))
        .filter(|&c| is_printable(c))
        .collect()
}

/// Bytes at the front of a file that tell what other formats look like.
pub const PROBED_FRONT: usize = 132 << 10;

/// Bytes at its end.
pub const PROBED_END: usize = 512;

/// The refusal of a file without the signature, with what it looks like instead: `front` are its first bytes,
/// at most [`PROBED_FRONT`], `end` its last ones, at most [`PROBED_END`]. What they are is never shown: the
/// file may be one that the caller must not read.
pub fn not_vhdx(front: &[u8], end: &[u8]) -> Error {
    let error = |message: String| Error::new(Kind::NotVhdx, message).at(0);
    if front.is_empty() {
        return error("the file is empty, not a VHDX".into()).remedy("copy it again from its source");
    }
    if let Some((format, remedy)) = looks_like(front, end) {
        return error(format!("not a VHDX: this looks like {format}")).remedy(remedy);
    }
    let zeros = front.iter().all(|&byte| byte == 0);
    let found = if zeros { "it begins with zeros" } else { "it does not begin with \"vhdxfile\"" };
    error(format!("not a VHDX: {found}, and nothing else in it is known")).remedy(UNKNOWN)
}

/// The remedy for other disk image formats.
pub const CONVERT: &str = "convert it first: qemu-img convert -O vhdx OLD NEW.vhdx";
/// The remedy for VHDs.
const CONVERT_VHD: &str = "convert it first: vhdx-ublk convert OLD NEW.vhdx";
/// The remedy for packed files.
const UNPACK: &str = "unpack it first";
/// The remedy for plain disks.
const RAW: &str = "attach a raw disk with losetup, or convert it: vhdx-ublk convert OLD NEW.vhdx";
/// The remedy for an unknown format.
pub const UNKNOWN: &str = "`blkid -p FILE` may tell what it is; if it is a VHDX whose front was overwritten, \
                       `vhdx-ublk salvage FILE COPY` may find what is left of the disk";

/// What the last sector of a VHD begins with.
const VHD_FOOTER: &[u8] = b"conectix";

/// What other formats have at their front: offset in bytes, the bytes there, the format, what to do.
const OTHERS: [(usize, &[u8], &str, &str); 27] = [
    (0, VHD_FOOTER, "a VHD, the older format", CONVERT_VHD),
    (0, b"QFI\xfb", "a qcow2 image", CONVERT),
    (0, b"KDMV", "a VMDK image", CONVERT),
    (0, b"COWD", "a VMDK image", CONVERT),
    (0, b"# Disk DescriptorFile", "a VMDK descriptor", CONVERT),
    (64, b"\x7f\x10\xda\xbe", "a VDI image", CONVERT),
    (0, b"\x1f\x8b", "a gzip file", UNPACK),
    (0, b"\xfd7zXZ\0", "an xz file", UNPACK),
    (0, b"PK\x03\x04", "a zip file", UNPACK),
    (0, b"BZh", "a bzip2 file", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd file", UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z file", UNPACK),
    (0, b"Rar!", "a rar file", UNPACK),
    (0, b"head", "the middle of a VHDX, cut off at the front", "get the whole file"),
    (512, b"EFI PART", "a raw disk with a GPT", RAW),
    (4096, b"EFI PART", "a raw disk with a GPT", RAW),
    (3, b"NTFS    ", "a raw disk with NTFS", RAW),
    (3, b"EXFAT   ", "a raw disk with exFAT", RAW),
    (0, b"LUKS\xba\xbe", "a raw disk, encrypted with LUKS", RAW),
    (0, b"XFSB", "a raw disk with XFS", RAW),
    (536, b"LVM2 001", "a raw disk of LVM", RAW),
    (4086, b"SWAPSPACE2", "a raw disk with swap space", RAW),
    (65600, b"_BHRfS_M", "a raw disk with btrfs", RAW),
    (32769, b"CD001", "an ISO 9660 image", RAW),
    (510, b"\x55\xaa", "a raw disk: it begins with a boot sector", RAW),
    (1080, b"\x53\xef", "a raw disk with ext2, ext3 or ext4", RAW),
    (0, b"hsqs", "a squashfs image", RAW),
];

/// The format the bytes belong to and what to do about it, if they are known.
fn looks_like(front: &[u8], end: &[u8]) -> Option<(&'static str, &'static str)> {
    if end.len() == PROBED_END && end.starts_with(VHD_FOOTER) && !front.starts_with(VHD_FOOTER) {
        return Some(("a fixed VHD, the older format", CONVERT_VHD));
    }
    let hit = |&&(offset, magic, ..): &&(usize, &[u8], &str, &str)| {
        front.get(offset..).is_some_and(|rest| rest.starts_with(magic))
    };
    OTHERS.iter().find(hit).map(|&(_, _, format, remedy)| (format, remedy))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::testing::noise;
    use proptest::prelude::*;

    #[test]
    fn the_creator_comes_back() {
        let slot = FileId::encode("vhdx-ublk 0.1 ü 🦀");
        assert_eq!(slot.len(), FileId::SIZE);
        assert_eq!(&slot[..12], b"vhdxfilev\0h\0");
        assert_eq!(FileId::parse(&slot).expect("own slot").creator, "vhdx-ublk 0.1 ü 🦀");
    }

    #[test]
    fn a_long_creator_is_cut_between_characters_and_ends_in_nul() {
        for text in ["x".repeat(300), format!("x{}", "🦀".repeat(200))] {
            let slot = FileId::encode(&text);
            assert_eq!(slot[518..520], [0, 0]);
            let creator = FileId::parse(&slot).expect("own slot").creator;
            assert!(text.starts_with(&creator) && creator.encode_utf16().count() >= 254, "{creator}");
        }
    }

    #[test]
    fn a_creator_that_fills_the_field_without_nul_is_tolerated() {
        let mut slot = FileId::encode("");
        slot[8..520].copy_from_slice(&b"Q\0".repeat(256));
        assert_eq!(FileId::parse(&slot).expect("no NUL").creator, "Q".repeat(256));
    }

    #[test]
    fn a_creator_never_reaches_a_terminal_as_a_command() {
        let mut slot = FileId::encode("");
        let units: [u16; 8] = [0x1b, u16::from(b'a'), 0x9b, 7, 0x202e, 0xd800, u16::from(b'b'), 0];
        for (index, unit) in units.iter().enumerate() {
            slot[8 + 2 * index..][..2].copy_from_slice(&unit.to_le_bytes());
        }
        assert_eq!(FileId::parse(&slot).expect("odd creator").creator, "a\u{fffd}b");
        assert_eq!(FileId::parse(&FileId::encode("a\x1b[2Jb")).expect("own slot").creator, "a[2Jb");
    }

    #[test]
    fn a_file_that_ends_inside_the_identifier_is_truncated() {
        let error = FileId::parse(b"vhdxfile").expect_err("8 bytes");
        assert_eq!(error.kind(), Kind::Truncated);
    }

    #[test]
    fn other_formats_are_refused_by_name_with_a_remedy() {
        for (offset, magic, format, remedy) in OTHERS {
            let mut bytes = vec![0; PROBED_FRONT];
            bytes[offset..offset + magic.len()].copy_from_slice(magic);
            let error = not_vhdx(&bytes, &[0; PROBED_END]);
            assert_eq!(error.kind(), Kind::NotVhdx);
            assert!(error.to_string().contains(format), "{error}");
            assert_eq!(error.remedy_text(), Some(remedy));
        }
        let mut end = [0; PROBED_END];
        end[..8].copy_from_slice(VHD_FOOTER);
        let error = not_vhdx(&vec![0; PROBED_FRONT], &end);
        assert!(error.to_string().contains("a fixed VHD"), "{error}");
        assert_eq!(error.remedy_text(), Some(CONVERT_VHD));
    }

    /// What is no VHDX may be a file that the caller must not read, and no remedy ends it.
    #[test]
    fn unknown_bytes_zeros_and_nothing_are_refused_in_words() {
        let zeros = vec![0; FileId::SIZE];
        for bytes in [&b"root:secret:hash"[..], &zeros, b"", b"vhdxfil"] {
            let error = FileId::parse(bytes).expect_err("no VHDX");
            let text = format!("{error} {}", error.remedy_text().expect("there is one"));
            assert!(!text.contains("secret") && !text.contains("delete"), "{text}");
        }
        let text = |bytes: &[u8]| FileId::parse(bytes).expect_err("no VHDX").to_string();
        assert!(text(&zeros).contains("begins with zeros"));
        assert!(text(b"").contains("empty"));
    }

    #[test]
    fn a_lost_signature_is_restored_and_nothing_else() {
        let slot = FileId::encode("somebody");
        let mut lost = slot.clone();
        lost[..8].fill(0xee);
        FileId::restore(&mut lost);
        assert_eq!(lost, slot);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(seed: u64, len in 0_usize..=65536, real: bool) {
            let mut bytes = noise(seed, len);
            if real && len >= 8 {
                bytes[..8].copy_from_slice(SIGNATURE);
            }
            prop_assert_eq!(FileId::parse(&bytes).is_ok(), real && len >= MEANINGFUL);
        }

        #[test]
        fn printable_text_comes_back(text in "\\PC{0,100}") {
            let text: String = text.chars().filter(|&c| is_printable(c)).collect();
            prop_assert_eq!(FileId::parse(&FileId::encode(&text)).expect("own slot").creator, text);
        }
    }
}
