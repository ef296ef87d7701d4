//! A new VHD whose blocks get their space, and are written, before anything else is.
//!
//! The data of every block begins on a page, as Windows places it: its bitmap is the last sector before.

use std::time::{Duration, SystemTime};

use uuid::Uuid;

use crate::disk::{Buffer, PAGE_BYTES, SharedFile};
use crate::error::Result;
use crate::format::index;
use crate::format::vhd::{
    self, DEFAULT_BLOCK_SIZE, DynamicHeader, FOOTER_SIZE, Footer, HEADER_SIZE, Kept, SECTOR,
};

/// The start of the year 2000, from which the format counts seconds, after that of 1970.
const EPOCH: Duration = Duration::from_secs(946_684_800);

/// Where the header and, behind it, the table of a dynamic image lie.
const HEADER: u64 = FOOTER_SIZE as u64;
const TABLE: u64 = HEADER + HEADER_SIZE as u64;

/// A VHD that is being made. It takes 4 bytes of memory for each block that has space.
pub(super) struct VhdDraft {
    fixed: bool,
    /// Where the first block's data begins.
    first: u64,
    /// Whether the table fits before it.
    table_first: bool,
    /// The blocks that have space, in the order of the file, and of the disk.
    placed: Vec<u32>,
}

impl VhdDraft {
    /// A VHD whose disk has `size` bytes, if that is known.
    pub(super) fn new(fixed: bool, size: Option<u64>) -> Self {
        let table = size.map_or(0, table_length);
        let first = if fixed { 0 } else { paged(TABLE + table + bitmap()) };
        Self { fixed, first, table_first: size.is_some(), placed: Vec::new() }
    }

    /// Where byte `offset` of the disk lies in the file, in a block that gets space now if it has none.
    pub(super) fn place(&mut self, offset: u64) -> u64 {
        if self.fixed {
            return offset;
        }
        let block_size = u64::from(DEFAULT_BLOCK_SIZE);
        let block = u32::try_from(offset / block_size).expect("a disk of 2040 GiB has fewer blocks");
        if self.placed.last() != Some(&block) {
            assert!(self.placed.last().is_none_or(|&last| last < block), "block {block} is in order");
            self.placed.push(block);
        }
        self.data(self.placed.len() as u64 - 1) + offset % block_size
    }

    /// Where the data of the block of this number in the file begins.
    fn data(&self, number: u64) -> u64 {
        self.first + number * stride()
    }

    /// The bytes of the file of a disk of `size` bytes.
    pub(super) fn length(&self, size: u64) -> u64 {
        if self.fixed {
            return size + FOOTER_SIZE as u64;
        }
        self.end() + if self.table_first { 0 } else { table_length(size) } + FOOTER_SIZE as u64
    }

    /// Where the last block ends.
    fn end(&self) -> u64 {
        end_of(self.first, self.placed.len() as u64)
    }

    /// Writes everything but the blocks' data to their file, and cuts off what is behind. The disk has `size`
    /// bytes.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub(super) fn finish(self, file: &SharedFile, size: u64) -> Result<()> {
        let now =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(EPOCH).saturating_sub(EPOCH);
        let kept = if self.fixed { Kept::Fixed } else { Kept::Dynamic { header: HEADER } };
        // The format's clock ends in 2136.
        let timestamp = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        let footer = Footer { size, kept, unique_id: Uuid::new_v4(), timestamp }.encode();
        let length = self.length(size);
        file.set_length(length)?;
        if !self.fixed {
            let table_offset = if self.table_first { TABLE } else { self.end() };
            let entries = u32::try_from(size.div_ceil(DEFAULT_BLOCK_SIZE.into())).expect("at most 2040 GiB");
            let bits = [0xff; PAGE_BYTES];
            for number in 0..self.placed.len() as u64 {
                write(file, self.data(number) - bitmap(), &bits[..index(bitmap())])?;
            }
            let offsets = (0..).map(|number| self.data(number) - bitmap());
            let blocks = self.placed.iter().map(|&block| u64::from(block)).zip(offsets);
            write(file, table_offset, &vhd::encode_table(entries, blocks))?;
            let header = DynamicHeader { table_offset, entries, block_size: DEFAULT_BLOCK_SIZE };
            write(file, HEADER, &header.encode())?;
            write(file, 0, &footer)?;
        }
        write(file, length - FOOTER_SIZE as u64, &footer)
    }
}

/// The space of `blocks` blocks and of everything else of a dynamic VHD with a disk of `size` bytes.
pub(super) fn dynamic_length(size: u64, blocks: u64) -> u64 {
    end_of(VhdDraft::new(false, Some(size)).first, blocks) + FOOTER_SIZE as u64
}

/// Where the last of `blocks` blocks ends, of which the data of the first one begins at `first`.
fn end_of(first: u64, blocks: u64) -> u64 {
    match blocks.checked_sub(1) {
        None => first,
        Some(last) => first + last * stride() + u64::from(DEFAULT_BLOCK_SIZE),
    }
}

fn bitmap() -> u64 {
    vhd::bitmap_bytes(DEFAULT_BLOCK_SIZE)
}

/// From one block's data to the next one's.
fn stride() -> u64 {
    u64::from(DEFAULT_BLOCK_SIZE) + PAGE_BYTES as u64
}

fn table_length(size: u64) -> u64 {
    (4 * size.div_ceil(DEFAULT_BLOCK_SIZE.into())).next_multiple_of(SECTOR)
}

fn paged(offset: u64) -> u64 {
    offset.next_multiple_of(PAGE_BYTES as u64)
}

/// Writes from memory that direct I/O can use.
fn write(file: &SharedFile, offset: u64, bytes: &[u8]) -> Result<()> {
    let mut buffer = Buffer::zeroed(bytes.len().next_multiple_of(PAGE_BYTES));
    buffer[..bytes.len()].copy_from_slice(bytes);
    file.write(offset, &buffer[..bytes.len()])
}
