//! The file identifier: the first 64 KiB of the file, written once at creation and never again.
//!
//! Invariants: the signature alone decides whether a file is a VHDX; the creator is for people and changes
//! nothing. Creation writes this structure last, so that an unfinished file is never taken for an image.

use crate::error::{Error, Kind, Result};
use crate::printable::is_printable;

/// The first eight bytes of every VHDX file.
const SIGNATURE: &[u8; 8] = b"vhdxfile";

/// Bytes of the creator's text, in UTF-16LE, behind the signature (MS-VHDX 2.2.1).
const CREATOR_BYTES: usize = 512;

/// Bytes of the identifier that have a meaning; the rest of the slot is reserved.
const MEANINGFUL: usize = SIGNATURE.len() + CREATOR_BYTES;

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
            return Err(not_vhdx(bytes));
        }
        let Some(creator) = bytes.get(SIGNATURE.len()..MEANINGFUL) else {
            let message = format!("the file ends after {} bytes, {} expected", bytes.len(), Self::SIZE);
            return Err(Error::new(Kind::Truncated, message).in_structure("file identifier").at(0));
        };
        Ok(Self { creator: decode_creator(creator) })
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
        slot.resize(Self::SIZE, 0);
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

/// The refusal of a file without the signature, with what it looks like instead.
fn not_vhdx(bytes: &[u8]) -> Error {
    let error = |message: &str| Error::new(Kind::NotVhdx, message).at(0);
    if bytes.is_empty() {
        return error("the file is empty, not a VHDX");
    }
    match looks_like(bytes) {
        Some((format, remedy)) => error(&format!("not a VHDX: this looks like {format}")).remedy(remedy),
        // Not with what: the file may be anybody's, and an image may lead root to it.
        None => error("not a VHDX: it does not begin with \"vhdxfile\""),
    }
}

/// The remedy for other disk image formats.
const CONVERT: &str = "convert it first: qemu-img convert -O vhdx OLD NEW";
/// The remedy for packed files.
const UNPACK: &str = "unpack it first";
/// The remedy for plain disks.
const RAW: &str = "attach a raw disk with losetup, or convert it: qemu-img convert -f raw -O vhdx OLD NEW";

/// What other formats begin with: offset in bytes, the bytes there, the format, what to do.
const OTHERS: [(usize, &[u8], &str, &str); 18] = [
    (0, b"conectix", "a VHD, the older format", CONVERT),
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
    (510, b"\x55\xaa", "a raw disk or a fixed VHD: it begins with a boot sector", RAW),
    (32769, b"CD001", "an ISO 9660 image", RAW),
];

/// The format the bytes belong to and what to do about it, if they are known.
fn looks_like(bytes: &[u8]) -> Option<(&'static str, &'static str)> {
    if bytes.len() >= MEANINGFUL && bytes.iter().all(|&byte| byte == 0) {
        let found = "a raw disk, or a file whose creation never finished: it begins with zeros";
        return Some((found, "delete an unfinished file and create it again"));
    }
    let hit = |&&(offset, magic, ..): &&(usize, &[u8], &str, &str)| {
        bytes.get(offset..).is_some_and(|rest| rest.starts_with(magic))
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
            let mut bytes = vec![0; 65536];
            bytes[offset..offset + magic.len()].copy_from_slice(magic);
            let error = FileId::parse(&bytes).expect_err(format);
            assert_eq!(error.kind(), Kind::NotVhdx);
            assert!(error.to_string().contains(format), "{error}");
            assert_eq!(error.remedy_text(), Some(remedy));
        }
    }

    #[test]
    fn unknown_bytes_zeros_and_nothing_are_refused_in_words() {
        let text = |bytes: &[u8]| FileId::parse(bytes).expect_err("no VHDX").to_string();
        assert!(!text(b"\x1bhello world").contains("hello"), "what is in the file is told");
        assert!(text(&vec![0; 65536]).contains("creation never finished"));
        assert!(text(b"").contains("empty"));
        assert!(text(b"vhdxfil").contains("does not begin"));
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
