//! The two headers: which copy is current, and where the log lies.
//!
//! Invariants:
//!
//! * A slot holds a header if its signature and checksum say so; the current one has the greater sequence
//!   number. An update therefore goes to the other slot, is synced, and only then repeated in this one.
//! * A [`Header`] from [`Header::parse`] or [`current`] names a log that can be used: aligned, behind the
//!   header section, at most [`MAX_LOG_LENGTH`], of the one known version if it has anything to replay.
//!
//! [Rules 8 to 18](crate::design::vhdx_rules#rule-8).

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checksum::{self, Damage};
use super::{HEADER_SECTION, MIB, guid, range_end};
use crate::error::{Error, Kind, Result};
use crate::simulation::log_unit;

/// Where the two slots lie in the file, in bytes.
pub const OFFSETS: [u64; 2] = [65536, 131_072];

/// Bytes of a header; the rest of its 64 KiB slot is not part of it.
pub const SIZE: usize = 4096;

/// The longest log we use, in bytes: 1 GiB, as Microsoft's own parser. A scan of the log holds one small
/// record per 4 KiB of it, so this also bounds memory.
pub const MAX_LOG_LENGTH: u32 = 1 << 30;

const SIGNATURE: [u8; 4] = *b"head";
/// The only version of the format there is (MS-VHDX 2.2.2).
const VERSION: u16 = 1;
/// The only version of the log there is (MS-VHDX 2.2.2).
const LOG_VERSION: u16 = 0;
const NAMES: [&str; 2] = ["header 1", "header 2"];

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Raw {
    signature: [u8; 4],
    checksum: U32,
    sequence_number: U64,
    file_write_guid: [u8; 16],
    data_write_guid: [u8; 16],
    log_guid: [u8; 16],
    log_version: U16,
    version: U16,
    log_length: U32,
    log_offset: U64,
    reserved: [u8; 4016],
}

const _: () = assert!(size_of::<Raw>() == SIZE);
const _: () = assert!(OFFSETS[1] + SIZE as u64 <= HEADER_SECTION, "both slots lie in the section");
const _: () = assert!((MAX_LOG_LENGTH as u64).is_multiple_of(MIB), "the longest log is whole MiB");

/// One header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Greater in the newer of the two headers.
    pub sequence_number: u64,
    /// Changes before the first modification of any kind after an open.
    pub file_write_guid: Uuid,
    /// Changes before the first modification after an open that a guest can see. Children name it.
    pub data_write_guid: Uuid,
    /// Marks the log entries that are to be replayed; nil if the log is empty.
    pub log_guid: Uuid,
    /// Version of the log: 0. An empty log of another version reads as 0, since that is what we would write.
    pub log_version: u16,
    /// Where the log starts in the file, in bytes; a multiple of 1 MiB.
    pub log_offset: u64,
    /// Bytes of the log; a multiple of 1 MiB, 0 only if `log_guid` is nil.
    pub log_length: u32,
}

impl Header {
    /// Reads a header from the first [`SIZE`] bytes of its slot.
    ///
    /// Tolerated: any reserved bytes; any log version and a log of no length, if there is nothing to replay.
    ///
    /// # Errors
    /// [`Kind::Corrupt`] if signature or checksum do not match or the log's place cannot be;
    /// [`Kind::Unsupported`] for another version of the format or the log, or a log of more than 1 GiB.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let raw = intact(bytes).map_err(|damage| Error::corrupt("header", damage.to_string()))?;
        raw.known_version().and_then(Self::from_raw).map_err(|error| error.in_structure("header"))
    }

    /// The bytes of this header, sealed.
    ///
    /// # Panics
    /// If the header breaks what [`Header::parse`] demands: nothing may ever write such a header.
    pub fn encode(&self) -> [u8; SIZE] {
        if let Err(error) = self.check() {
            panic!("a header about to be written breaks the format: {error}");
        }
        let raw = Raw {
            signature: SIGNATURE,
            checksum: U32::new(0),
            sequence_number: U64::new(self.sequence_number),
            file_write_guid: guid::write(self.file_write_guid),
            data_write_guid: guid::write(self.data_write_guid),
            log_guid: guid::write(self.log_guid),
            log_version: U16::new(self.log_version),
            version: U16::new(VERSION),
            log_length: U32::new(self.log_length),
            log_offset: U64::new(self.log_offset),
            reserved: [0; 4016],
        };
        let mut bytes: [u8; SIZE] = zerocopy::transmute!(raw);
        checksum::seal(&mut bytes);
        debug_assert_eq!(Self::parse(&bytes).as_ref().ok(), Some(self), "what is written reads back");
        bytes
    }

    /// Whether the log holds entries that must be replayed before anything else is read.
    pub fn needs_replay(&self) -> bool {
        !self.log_guid.is_nil()
    }

    fn from_raw(raw: &Raw) -> Result<Self> {
        let log_guid = guid::read(&raw.log_guid);
        let header = Self {
            sequence_number: raw.sequence_number.get(),
            file_write_guid: guid::read(&raw.file_write_guid),
            data_write_guid: guid::read(&raw.data_write_guid),
            log_guid,
            log_version: if log_guid.is_nil() { LOG_VERSION } else { raw.log_version.get() },
            log_offset: raw.log_offset.get(),
            log_length: raw.log_length.get(),
        };
        header.check()?;
        Ok(header)
    }

    /// Checks what a header says about the log.
    fn check(&self) -> Result<()> {
        let (offset, length) = (self.log_offset, u64::from(self.log_length));
        let corrupt = |message: String| Err(Error::new(Kind::Corrupt, message));
        if self.log_version != LOG_VERSION {
            let message = format!(
                "the log has version {}; only version {LOG_VERSION} can be replayed",
                self.log_version
            );
            return Err(Error::new(Kind::Unsupported, message)
                .remedy("open it once with the program that wrote it, so that the log is replayed"));
        }
        if !offset.is_multiple_of(MIB) || !length.is_multiple_of(log_unit(MIB)) {
            return corrupt(format!("a log of {length} bytes at {offset}, multiples of 1 MiB expected"));
        }
        if length == 0 {
            return if self.needs_replay() {
                corrupt("a log to replay, but of no length".into())
            } else {
                Ok(())
            };
        }
        if offset < HEADER_SECTION || range_end(offset, length).is_none() {
            return corrupt(format!("the log cannot lie at byte {offset}"));
        }
        if self.log_length > MAX_LOG_LENGTH {
            let message = format!("a log of {length} bytes; at most {MAX_LOG_LENGTH} are supported");
            return Err(Error::new(Kind::Unsupported, message));
        }
        Ok(())
    }
}

impl Raw {
    fn known_version(&self) -> Result<&Self> {
        if self.version.get() == VERSION {
            return Ok(self);
        }
        let message = format!("version {} of the format found, {VERSION} expected", self.version);
        Err(Error::new(Kind::Unsupported, message))
    }
}

/// What the slot beside the current header holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Other {
    /// A header with a smaller sequence number.
    Older,
    /// The same bytes, sequence number included; Disk2vhd leaves such twins.
    Identical,
    /// No header: damaged, or torn while it was written.
    Invalid,
}

/// The header that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Current {
    /// Its content.
    pub header: Header,
    /// The slot it came from, 0 or 1; an update goes to the other one.
    pub slot: usize,
    /// What the other slot holds.
    pub other: Other,
}

/// Chooses the current header from the first [`SIZE`] bytes of both slots, fewer where the file ends.
///
/// Tolerated: one damaged slot; twins that agree in every byte.
///
/// # Errors
/// [`Kind::Corrupt`] if neither slot holds a header ([`Kind::Truncated`] if the file ends before both), if
/// two different headers have one sequence number, or if the current one is impossible. [`Kind::Unsupported`]
/// if *either* header is intact and of another version: falling back to its neighbour would be to read a
/// newer format as if it were this one. The other errors are those of [`Header::parse`].
pub fn current(slots: [&[u8]; 2]) -> Result<Current> {
    let place = |error: Error, slot: usize| error.in_structure(NAMES[slot]).at(OFFSETS[slot]);
    let found = slots.map(intact);
    for (slot, raw) in found.iter().enumerate() {
        if let Ok(raw) = raw {
            raw.known_version().map_err(|error| place(error, slot))?;
        }
    }
    let (raw, slot, other) = match found {
        [Ok(first), Ok(second)] => newer(first, second)?,
        [Ok(first), Err(_)] => (first, 0, Other::Invalid),
        [Err(_), Ok(second)] => (second, 1, Other::Invalid),
        [Err(first), Err(second)] => return Err(neither(first, second)),
    };
    let header = Header::from_raw(raw).map_err(|error| place(error, slot))?;
    Ok(Current { header, slot, other })
}

/// The header in the slot, if signature and checksum say there is one.
fn intact(slot: &[u8]) -> std::result::Result<&Raw, Damage> {
    let bytes = checksum::verify(slot, SIZE, SIGNATURE)?;
    Ok(Raw::ref_from_bytes(bytes).expect("verify returned SIZE bytes, and Raw has no alignment"))
}

/// The current one of two intact headers, its slot, and what its neighbour is.
fn newer<'a>(first: &'a Raw, second: &'a Raw) -> Result<(&'a Raw, usize, Other)> {
    match first.sequence_number.get().cmp(&second.sequence_number.get()) {
        std::cmp::Ordering::Greater => Ok((first, 0, Other::Older)),
        std::cmp::Ordering::Less => Ok((second, 1, Other::Older)),
        std::cmp::Ordering::Equal if first.as_bytes() == second.as_bytes() => {
            Ok((first, 0, Other::Identical))
        }
        std::cmp::Ordering::Equal => {
            let message = format!(
                "both headers have sequence number {} but differ: neither is newer",
                first.sequence_number
            );
            Err(Error::corrupt("headers", message).at(OFFSETS[0]))
        }
    }
}

/// The refusal of a file without any header.
fn neither(first: Damage, second: Damage) -> Error {
    let short = |damage| matches!(damage, Damage::Short { .. });
    let kind = if short(first) && short(second) { Kind::Truncated } else { Kind::Corrupt };
    let message = format!("neither header is valid: the first has {first}; the second has {second}");
    Error::new(kind, message).in_structure("headers").at(OFFSETS[0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::testing::{noise, patch};
    use proptest::prelude::*;

    fn sample() -> Header {
        Header {
            sequence_number: 7,
            file_write_guid: Uuid::from_u128(1),
            data_write_guid: Uuid::from_u128(2),
            log_guid: Uuid::from_u128(3),
            log_version: 0,
            log_offset: MIB,
            log_length: 1 << 20,
        }
    }

    fn numbered(sequence_number: u64) -> [u8; SIZE] {
        Header { sequence_number, ..sample() }.encode()
    }

    fn patched(at: usize, with: &[u8]) -> [u8; SIZE] {
        let mut bytes = sample().encode();
        patch(&mut bytes, at, with);
        bytes
    }

    fn refusal(bytes: &[u8]) -> (Kind, String) {
        let error = Header::parse(bytes).expect_err("a header to refuse");
        (error.kind(), error.to_string())
    }

    #[test]
    fn every_field_lies_where_the_specification_puts_it() {
        let header = Header { log_offset: 3 << 20, log_length: 2 << 20, ..sample() };
        let bytes = header.encode();
        assert_eq!(&bytes[..4], b"head");
        assert_eq!(bytes[8..16], 7_u64.to_le_bytes());
        assert_eq!(bytes[16..32], guid::write(header.file_write_guid));
        assert_eq!(bytes[32..48], guid::write(header.data_write_guid));
        assert_eq!(bytes[48..64], guid::write(header.log_guid));
        assert_eq!(bytes[64..68], [0, 0, 1, 0]);
        assert_eq!(bytes[68..72], (2_u32 << 20).to_le_bytes());
        assert_eq!(bytes[72..80], (3_u64 << 20).to_le_bytes());
        assert!(bytes[80..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn a_damaged_header_is_refused() {
        let mut bytes = sample().encode();
        bytes[4095] = 1;
        assert!(refusal(&bytes).1.contains("checksum"));
        assert!(refusal(&patched(0, b"daeh")).1.contains("the signature \"head\" is not there"));
        assert!(refusal(&bytes[..4095]).1.contains("4095 bytes found, 4096 expected"));
    }

    #[test]
    fn another_version_of_format_or_log_is_unsupported() {
        assert_eq!(refusal(&patched(66, &[2, 0])).0, Kind::Unsupported);
        assert_eq!(refusal(&patched(66, &[0, 0])).0, Kind::Unsupported);
        let (kind, message) = refusal(&patched(64, &[1, 0]));
        assert_eq!(kind, Kind::Unsupported);
        assert!(message.contains("the log has version 1"), "{message}");
    }

    #[test]
    fn another_log_version_is_tolerated_when_there_is_nothing_to_replay_and_not_written_again() {
        let mut bytes = patched(48, &[0; 16]);
        patch(&mut bytes, 64, &[9, 0]);
        let header = Header::parse(&bytes).expect("an empty log");
        assert!(!header.needs_replay());
        assert_eq!(header.log_version, 0);
        // Activating the log must not meet a version that cannot be written.
        Header { log_guid: Uuid::from_u128(9), ..header }.encode();
    }

    #[test]
    fn reserved_bytes_are_tolerated() {
        assert_eq!(Header::parse(&patched(80, &[0xff; 4016])).expect("reserved"), sample());
    }

    #[test]
    fn a_log_that_cannot_lie_there_is_refused() {
        let log = |offset: u64, length: u32| {
            let mut bytes = patched(72, &offset.to_le_bytes());
            patch(&mut bytes, 68, &length.to_le_bytes());
            refusal(&bytes)
        };
        let mib = 1_u32 << 20;
        assert!(log(MIB + 4096, mib).1.contains("multiples of 1 MiB"));
        assert!(log(MIB, mib + 4096).1.contains("multiples of 1 MiB"));
        assert!(log(0, mib).1.contains("cannot lie at byte 0"));
        assert!(log(!(MIB - 1), mib).1.contains("cannot lie"));
        assert!(log(1 << 63, mib).1.contains("cannot lie"));
        assert!(log(MIB, 0).1.contains("no length"));
        assert_eq!(log(MIB, MAX_LOG_LENGTH + mib).0, Kind::Unsupported);
    }

    #[test]
    fn a_log_of_one_gib_is_used_and_one_of_no_length_is_empty() {
        Header::parse(&Header { log_length: MAX_LOG_LENGTH, ..sample() }.encode()).expect("1 GiB");
        for log_offset in [0, MIB] {
            let none = Header { log_offset, log_length: 0, log_guid: Uuid::nil(), ..sample() };
            assert_eq!(Header::parse(&none.encode()).expect("no log"), none);
        }
    }

    #[test]
    #[should_panic(expected = "breaks the format")]
    fn a_header_that_could_not_be_read_is_never_written() {
        Header { log_length: 0, ..sample() }.encode();
    }

    #[test]
    fn the_greater_sequence_number_is_current_in_either_slot() {
        for (first, second, slot) in [(1, 2, 1), (2, 1, 0), (u64::MAX, 1, 0), (0, 1 << 63, 1)] {
            let found = current([&numbered(first), &numbered(second)]).expect("two headers");
            assert_eq!((found.slot, found.other), (slot, Other::Older));
            assert_eq!(found.header.sequence_number, first.max(second));
        }
    }

    #[test]
    fn one_damaged_slot_is_tolerated() {
        let good = numbered(1);
        let mut torn = numbered(2);
        torn[100] ^= 1;
        let found = current([&torn, &good]).expect("the second");
        assert_eq!((found.slot, found.other, found.header.sequence_number), (1, Other::Invalid, 1));
        let found = current([&good, &[]]).expect("the first");
        assert_eq!((found.slot, found.other), (0, Other::Invalid));
    }

    #[test]
    fn identical_twins_are_tolerated_and_different_ones_refused() {
        let twins = current([&numbered(5), &numbered(5)]).expect("twins");
        assert_eq!((twins.slot, twins.other), (0, Other::Identical));
        let other = Header { sequence_number: 5, file_write_guid: Uuid::nil(), ..sample() }.encode();
        let error = current([&numbered(5), &other]).expect_err("which one?");
        assert_eq!(error.kind(), Kind::Corrupt);
        assert!(error.to_string().contains("sequence number 5"), "{error}");
    }

    #[test]
    fn an_intact_header_of_another_version_is_never_passed_over() {
        let newer = patched(66, &[2, 0]);
        for other in [&numbered(1), &numbered(100)] {
            let error = current([other, &newer]).expect_err("version 2 beside version 1");
            assert_eq!(error.kind(), Kind::Unsupported);
            assert!(error.to_string().starts_with("header 2 at byte 131072: version 2"), "{error}");
        }
    }

    #[test]
    fn only_the_current_headers_log_matters() {
        let bad_log = patched(72, &[1]);
        assert_eq!(current([&bad_log, &numbered(8)]).expect("8 is newer").header.sequence_number, 8);
        let error = current([&bad_log, &numbered(6)]).expect_err("7 is newer, and its log misplaced");
        assert!(error.to_string().starts_with("header 1 at byte 65536: a log of"), "{error}");
    }

    #[test]
    fn no_header_at_all_is_corrupt_and_a_file_too_short_truncated() {
        let error = current([&[0; SIZE], &[]]).expect_err("none");
        assert_eq!(error.kind(), Kind::Corrupt);
        assert!(error.to_string().starts_with("headers at byte 65536: neither"), "{error}");
        assert_eq!(current([&[0; 10], &[]]).expect_err("none").kind(), Kind::Truncated);
    }

    prop_compose! {
        fn any_header()(
            sequence_number: u64, guids: [u128; 3], log_mib in 1_u64..(1 << 40), length_mib in 1_u32..=1024
        ) -> Header {
            Header {
                sequence_number,
                file_write_guid: Uuid::from_u128(guids[0]),
                data_write_guid: Uuid::from_u128(guids[1]),
                log_guid: Uuid::from_u128(guids[2]),
                log_version: 0,
                log_offset: log_mib * MIB,
                log_length: length_mib << 20,
            }
        }
    }

    proptest! {
        #[test]
        fn a_header_comes_back(header in any_header()) {
            prop_assert_eq!(Header::parse(&header.encode()).expect("own header"), header);
        }

        #[test]
        fn no_bytes_make_the_parser_panic(seed: u64, len in 0_usize..=65536, at in 0_usize..100) {
            let bytes = noise(seed, len);
            prop_assert!(Header::parse(&bytes).is_err());
            prop_assert!(current([&bytes, &bytes]).is_err());
            let mut sealed = sample().encode();
            patch(&mut sealed, at.max(8), &noise(seed, 8 + len % 64));
            if let Ok(header) = Header::parse(&sealed) {
                prop_assert_eq!(Header::parse(&header.encode()).expect("own header"), header);
            }
            let _ = current([&sealed, &numbered(seed)]);
        }
    }
}
