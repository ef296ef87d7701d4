//! The bytes of a VHDX file, both ways: check what was read, lay out what will be written. No I/O.
//!
//! Invariants:
//!
//! * A `parse` function checks everything and returns a value that cannot be wrong; nothing behind it
//!   checks again. No input makes it panic.
//! * Every sum and product of values that come from a file is checked.
//! * No function allocates more than a small multiple of its input, and every count has a named limit.
//! * What is encoded follows MS-VHDX to the letter, reserved bits zero. What is parsed is wider where files
//!   in the field need it; each tolerance is named in the documentation of the function that grants it.
//! * Integers on disk are little-endian; the structures are `zerocopy` types without alignment, whose sizes
//!   are asserted when the crate is compiled.
//!
//! Errors carry the absolute offset in the file where the structure's place is fixed by the format. Where the
//! caller chose the place (metadata), the message names the entry and the caller adds the offset.

use std::ops::Range;

pub mod bat;
mod checksum;
pub mod file_id;
pub mod guid;
pub mod header;
pub mod item;
pub mod locator;
pub mod log;
pub mod metadata;
pub mod region;
#[cfg(test)]
mod testing;
pub mod vhd;

/// Bytes in a page: the unit in which the log records changes, and the log's own sector.
pub const PAGE: usize = 4096;

/// One mebibyte in bytes: every object behind the header section starts and ends on a multiple of it.
pub const MIB: u64 = 1 << 20;

/// Bytes at the start of the file that hold the file identifier, the headers and the region tables, and
/// nothing else ever (MS-VHDX 2.2).
pub const HEADER_SECTION: u64 = MIB;

/// The largest virtual disk in bytes: 64 TiB (MS-VHDX 2.6.2.2).
pub const MAX_VIRTUAL_SIZE: u64 = 64 << 40;

/// The smallest payload block in bytes: 1 MiB (MS-VHDX 2.6.2.1).
pub const MIN_BLOCK_SIZE: u32 = 1 << 20;

/// The largest payload block in bytes: 256 MiB (MS-VHDX 2.6.2.1).
pub const MAX_BLOCK_SIZE: u32 = 256 << 20;

/// The two sector sizes of the format in bytes, logical and physical alike (MS-VHDX 2.6.2.4, 2.6.2.5).
pub const SECTOR_SIZES: [u32; 2] = [512, 4096];

/// The longest item of the metadata in bytes: 1 MiB (MS-VHDX 2.6.1.2).
pub const MAX_ITEM_LENGTH: u32 = 1 << 20;

/// The largest offset in a file, in bytes: what the kernel's signed `loff_t` can say. A structure may name
/// anything below 2^64; past this limit it can be nothing but damage.
pub const MAX_FILE_OFFSET: u64 = u64::MAX >> 1;

const _: () = assert!(usize::BITS == 64, "every offset in a file can be one in memory");

/// A count or an offset as an index into memory.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "asserted above: hosts have 64 bits")]
pub const fn index(value: u64) -> usize {
    value as usize
}

const _: () = assert!(MIB.is_multiple_of(PAGE as u64), "whole MiB are whole pages");
const _: () = assert!(MIN_BLOCK_SIZE as u64 == MIB, "the smallest block is the unit of space");

/// Where `length` bytes at `offset` end, unless no file can be that long.
pub fn range_end(offset: u64, length: u64) -> Option<u64> {
    offset.checked_add(length).filter(|&end| end <= MAX_FILE_OFFSET)
}

/// Two of the ranges that overlap, by their index, if any do. Empty ranges occupy nothing.
fn first_overlap(ranges: impl Iterator<Item = Range<u64>>) -> Option<(usize, usize)> {
    let mut sorted: Vec<(u64, u64, usize)> = ranges
        .enumerate()
        .filter(|(_, range)| range.start < range.end)
        .map(|(index, range)| (range.start, range.end, index))
        .collect();
    sorted.sort_unstable();
    // In this order two neighbours overlap if any two ranges do.
    sorted.windows(2).find(|pair| pair[1].0 < pair[0].1).map(|pair| {
        let (a, b) = (pair[0].2, pair[1].2);
        (a.min(b), a.max(b))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_range_past_the_kernels_offsets_has_no_end() {
        assert_eq!(range_end(MIB, MIB), Some(2 * MIB));
        assert_eq!(range_end(MAX_FILE_OFFSET, 0), Some(MAX_FILE_OFFSET));
        assert_eq!(range_end(MAX_FILE_OFFSET, 1), None);
        assert_eq!(range_end(u64::MAX, 2), None);
    }

    #[test]
    fn neighbours_do_not_overlap_and_empty_ranges_occupy_nothing() {
        let ranges = [4..8, 0..4, 8..8, 5..5];
        assert_eq!(first_overlap(ranges.into_iter()), None);
    }

    proptest! {
        #[test]
        fn an_overlap_is_found_exactly_when_two_ranges_share_a_byte(
            raw in prop::collection::vec((0_u64..60, 0_u64..8), 0..12)
        ) {
            let ranges: Vec<Range<u64>> = raw.iter().map(|&(start, len)| start..start + len).collect();
            let share = |a: &Range<u64>, b: &Range<u64>| a.start.max(b.start) < a.end.min(b.end);
            let any = (0..ranges.len()).any(|i| (0..i).any(|j| share(&ranges[i], &ranges[j])));
            let found = first_overlap(ranges.iter().cloned());
            prop_assert_eq!(found.is_some(), any);
            if let Some((a, b)) = found {
                prop_assert!(a < b && share(&ranges[a], &ranges[b]));
            }
        }
    }
}
