//! Log entries as the benchmarks need them.

use uuid::Uuid;
use vhdx_ublk::format::MIB;
use vhdx_ublk::format::log::{Change, NewEntry};

/// The log that every entry belongs to.
pub const LOG_GUID: Uuid = Uuid::from_u128(0x10c);

/// What a BAT page may hold in any image: blocks that are zero, and bits that its unused slots may have.
fn zero_blocks() -> Box<[u8; 4096]> {
    let mut page = Box::new([0; 4096]);
    page.iter_mut().step_by(8).for_each(|state| *state = 2);
    page
}

/// A change of each of these pages.
pub fn pages(places: impl Iterator<Item = u64>) -> Vec<Change> {
    places.map(|file_offset| Change::Data { file_offset, page: zero_blocks() }).collect()
}

/// An entry with these changes.
pub fn entry(sequence_number: u64, tail: u32, changes: &[Change]) -> NewEntry<'_> {
    NewEntry {
        sequence_number,
        tail,
        log_guid: LOG_GUID,
        flushed_file_offset: 4 * MIB,
        last_file_offset: 4 * MIB,
        changes,
    }
}
