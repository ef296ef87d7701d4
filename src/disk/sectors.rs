//! Reading sectors that are smaller than a page.

use std::io;

use super::{PAGE_BYTES, ReadDisk};

/// Fills `target` with what lies at `offset` of a file, which starts and ends at any sector; whole pages are
/// read.
///
/// # Errors
/// Those of [`ReadDisk::read`].
pub async fn read_sectors<D: ReadDisk>(disk: &D, offset: u64, target: &mut [u8]) -> io::Result<()> {
    assert!(!target.is_empty(), "something is read");
    let before = usize::try_from(offset % PAGE_BYTES as u64).expect("below a page");
    let length = (before + target.len()).next_multiple_of(PAGE_BYTES);
    let pages = disk.read(offset - before as u64, length).await?;
    target.copy_from_slice(&pages[before..][..target.len()]);
    Ok(())
}
