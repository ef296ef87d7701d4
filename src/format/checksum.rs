//! The seal on headers, region tables and log entries: a signature, then a CRC-32C over the whole structure.
//!
//! Invariant: all three keep the signature in bytes 0-3 and the checksum in bytes 4-7, and the checksum is
//! computed as if its own field were zero. Signatures are compared as bytes, never as integers: MS-VHDX
//! prints some of them in one byte order and some in the other.

use std::fmt;
use std::ops::Range;

/// Where the checksum lies in every sealed structure, in bytes.
const FIELD: Range<usize> = 4..8;

/// Why a structure is not what its signature and checksum should make it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Damage {
    /// There are fewer bytes than the structure has.
    Short { found: usize, expected: usize },
    /// Something else is there. It is not shown: an image may lead root to another user's file.
    Signature { expected: [u8; 4] },
    /// The bytes are not those that were sealed.
    Checksum { stored: u32, computed: u32 },
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Short { found, expected } => write!(f, "{found} bytes found, {expected} expected"),
            Self::Signature { expected } => {
                write!(f, "the signature \"{}\" is not there", expected.escape_ascii())
            }
            Self::Checksum { stored, computed } => {
                write!(f, "checksum {stored:#010x} stored, {computed:#010x} computed")
            }
        }
    }
}

/// The CRC-32C of `bytes` with the checksum field taken as zero.
pub(super) fn compute(bytes: &[u8]) -> u32 {
    assert!(bytes.len() >= FIELD.end, "a sealed structure has at least its seal");
    let crc = crc32c::crc32c(&bytes[..FIELD.start]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &bytes[FIELD.end..])
}

/// Stores the checksum of `bytes` in its field.
pub(super) fn seal(bytes: &mut [u8]) {
    let crc = compute(bytes);
    bytes[FIELD].copy_from_slice(&crc.to_le_bytes());
    debug_assert_eq!(compute(bytes), crc, "the seal does not cover itself");
}

/// The first `size` bytes of `bytes`, if they are a sealed structure with this signature.
pub(super) fn verify(bytes: &[u8], size: usize, signature: [u8; 4]) -> Result<&[u8], Damage> {
    assert!(size >= FIELD.end, "a sealed structure has at least its seal");
    let Some(bytes) = bytes.get(..size) else {
        return Err(Damage::Short { found: bytes.len(), expected: size });
    };
    if bytes[..signature.len()] != signature {
        return Err(Damage::Signature { expected: signature });
    }
    let stored = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    let computed = compute(bytes);
    if stored != computed {
        return Err(Damage::Checksum { stored, computed });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_polynomial_is_castagnolis() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn the_field_counts_as_zero() {
        assert_eq!(compute(b"head\xff\xff\xff\xffrest"), crc32c::crc32c(b"head\0\0\0\0rest"));
    }

    #[test]
    fn damage_is_named() {
        let mut bytes = *b"head\0\0\0\0rest";
        seal(&mut bytes);
        assert_eq!(verify(&bytes, 12, *b"head"), Ok(&bytes[..]));
        assert_eq!(verify(&bytes, 13, *b"head"), Err(Damage::Short { found: 12, expected: 13 }));
        let wrong = verify(&bytes, 12, *b"regi").expect_err("another signature");
        assert_eq!(wrong.to_string(), "the signature \"regi\" is not there");
        bytes[11] ^= 1;
        let torn = verify(&bytes, 12, *b"head").expect_err("a changed byte");
        assert!(torn.to_string().starts_with("checksum 0x"), "{torn}");
    }

    proptest! {
        #[test]
        fn any_single_flipped_bit_breaks_the_seal(
            mut bytes in prop::collection::vec(any::<u8>(), 8..200),
            at in any::<prop::sample::Index>(),
            bit in 0..8,
        ) {
            bytes[..4].copy_from_slice(b"head");
            seal(&mut bytes);
            prop_assert!(verify(&bytes, bytes.len(), *b"head").is_ok());
            let at = at.index(bytes.len());
            bytes[at] ^= 1_u8 << bit;
            prop_assert!(verify(&bytes, bytes.len(), *b"head").is_err());
        }
    }
}
