//! The sector bitmaps of an image in memory: which sectors of its partially present blocks are in its file.
//!
//! Only the bits of blocks that are partially present are kept, as only those mean anything: a bit per sector.
//! Memory is touched where such blocks are, and nowhere else.

use std::ops::Range;

use zerocopy::FromZeros;

use super::block_map::BlockMap;
use super::open::View;
use crate::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::format::bat::{BITMAP_BLOCK_SIZE, BatEntry, BitmapState, Geometry, PayloadState, Role};

/// The most memory that the bitmaps of one image may take, bytes: a bit per sector, so 32 TiB in partially
/// present blocks of 512-byte sectors.
pub const MAX_BITMAP_BYTES: u64 = 8 << 30;

const WORD_BITS: u64 = 64;
const WORDS_PER_CHUNK: usize = (BITMAP_BLOCK_SIZE * 8 / WORD_BITS) as usize;

/// See the module's head.
#[derive(Debug, Default)]
pub struct SectorBitmaps {
    /// By chunk; shorter than there are chunks if the last ones have none.
    chunks: Vec<Option<Box<[u64]>>>,
}

impl SectorBitmaps {
    /// Reads the bits of every partially present block of `map`.
    pub(super) async fn read<D: Disk>(
        file: &View<'_, D>,
        map: &BlockMap,
        stored: &[Range<u64>],
    ) -> Result<Self> {
        let geometry = map.geometry();
        let mut bitmaps = Self::default();
        let mut kept = 0;
        let mut chunk_read = None;
        for block in stored.iter().flat_map(|slots| partial_blocks(map, slots.clone())) {
            kept += slice_bytes(geometry, block);
            if kept > MAX_BITMAP_BYTES {
                return Err(too_many());
            }
            let chunk = geometry.chunk_of_block(block);
            if chunk_read.as_ref().is_none_or(|(read, _)| *read != chunk) {
                let offset = place(map, chunk)?;
                let length = usize::try_from(BITMAP_BLOCK_SIZE).expect("1 MiB");
                chunk_read = Some((chunk, file.read("sector bitmap", offset, length).await?));
            }
            let (_, bytes) = chunk_read.as_ref().expect("it was just read");
            bitmaps.store(geometry, block, bytes);
        }
        Ok(bitmaps)
    }

    /// Takes over the bits of `block` out of `bytes`, its chunk's bitmap as the file has it.
    pub fn store(&mut self, geometry: &Geometry, block: u64, bytes: &[u8]) {
        let chunk = usize::try_from(geometry.chunk_of_block(block)).expect("64-bit hosts only");
        if self.chunks.len() <= chunk {
            self.chunks.resize(chunk + 1, None);
        }
        let words = self.chunks[chunk].get_or_insert_with(|| {
            <[u64]>::new_box_zeroed_with_elems(WORDS_PER_CHUNK).expect("1 MiB of address space")
        });
        let slice = geometry.bitmap_slice(block);
        let slice = index(slice.start)..index(slice.end);
        let source = bytes[slice.clone()].as_chunks().0;
        for (word, bytes) in words[slice.start / 8..slice.end / 8].iter_mut().zip(source) {
            *word = u64::from_le_bytes(*bytes);
        }
    }

    /// How the sectors of partially present `block` go on from its sector `from`, which lies below `end`: whether
    /// they are in the file, and the first sector that differs, `end` at most.
    #[inline]
    pub fn run(&self, geometry: &Geometry, block: u64, from: u64, end: u64) -> (bool, u64) {
        let chunk = index(geometry.chunk_of_block(block));
        let Some(Some(words)) = self.chunks.get(chunk) else { return (false, end) };
        let first = geometry.bitmap_slice(block).start * 8;
        let word = |sector: u64| words[index((first + sector) / WORD_BITS)];
        let here = word(from) >> (from % WORD_BITS) & 1 == 1;
        let mut sector = from;
        while sector < end {
            let differing = if here { !word(sector) } else { word(sector) } >> (sector % WORD_BITS);
            if differing != 0 {
                return (here, end.min(sector + u64::from(differing.trailing_zeros())));
            }
            sector = (sector / WORD_BITS + 1) * WORD_BITS;
        }
        (here, end)
    }
}

/// The partially present blocks in `slots`.
fn partial_blocks(map: &BlockMap, slots: Range<u64>) -> impl Iterator<Item = u64> {
    let partial = PayloadState::PartiallyPresent;
    map.geometry().walk(slots).filter_map(move |(_, role)| match role {
        Role::Block(block) if map.load(block).entry.payload_state() == Some(partial) => Some(block),
        _ => None,
    })
}

/// Where the bitmap of `chunk` lies, which has partially present blocks.
fn place(map: &BlockMap, chunk: u64) -> Result<u64> {
    let entry: BatEntry = map.load_slot(map.geometry().bitmap_slot(chunk)).entry;
    if entry.bitmap_state() == Some(BitmapState::Present) {
        return Ok(entry.offset());
    }
    let message = format!("chunk {chunk} has partially present blocks and no sector bitmap");
    Err(Error::corrupt("BAT", message).remedy("`vhdx-ublk check` tells what else is wrong"))
}

fn slice_bytes(geometry: &Geometry, block: u64) -> u64 {
    let slice = geometry.bitmap_slice(block);
    slice.end - slice.start
}

fn too_many() -> Error {
    let message = format!("its sector bitmaps take more than {MAX_BITMAP_BYTES} bytes of memory");
    Error::new(Kind::Unsupported, message).in_structure("BAT").remedy("merge it into its parent")
}

fn index(count: u64) -> usize {
    usize::try_from(count).expect("64-bit hosts only")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_those_of_the_bits_in_the_file(
            block_shift in 20_u32..24,
            sector in prop::sample::select(vec![512_u32, 4096]),
            block in 0_u64..20,
            bytes in prop::collection::vec(prop::sample::select(vec![0_u8, 0xff, 0xf0, 0x5a]), 1 << 16),
        ) {
            let geometry = Geometry::new(1 << 40, 1 << block_shift, sector, true);
            let slice = geometry.bitmap_slice(block);
            let mut image = vec![0xee; index(BITMAP_BLOCK_SIZE)];
            for (target, byte) in image[index(slice.start)..index(slice.end)].iter_mut().zip(&bytes) {
                *target = *byte;
            }
            let mut bitmaps = SectorBitmaps::default();
            bitmaps.store(&geometry, block, &image);
            let bit = |at: u64| image[index(slice.start + at / 8)] >> (at % 8) & 1 == 1;
            let sectors = geometry.block_size() / u64::from(sector);
            let mut at = 0;
            while at < sectors {
                let (here, next) = bitmaps.run(&geometry, block, at, sectors);
                prop_assert!(next > at && (at..next).all(|sector| bit(sector) == here));
                prop_assert!(next == sectors || bit(next) != here);
                prop_assert_eq!(bitmaps.run(&geometry, block, at, at + 1), (here, at + 1));
                at = next;
            }
        }
    }

    #[test]
    fn a_chunk_without_bits_has_nothing() {
        let geometry = Geometry::new(1 << 40, 2 << 20, 512, true);
        assert_eq!(SectorBitmaps::default().run(&geometry, 9999, 5, 77), (false, 77));
    }
}
