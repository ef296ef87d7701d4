//! Reading sector bitmaps from the file.

use std::io;
use std::ops::Range;

use super::bitmaps::MAX_BITMAP_BYTES;
use super::block_map::BlockMap;
use super::view::View;
use crate::disk::{Buffer, ReadDisk};
use crate::error::{Error, Kind, Result};
use crate::format::bat::BITMAP_BLOCK_SIZE;
use crate::format::{MAX_BLOCK_SIZE, MIB, SECTOR_SIZES, index};

/// Reads the bits of every partially present block of `map` in its `stored` slots into its bitmaps.
pub(super) async fn read_bitmaps<D: ReadDisk>(
    file: &View<'_, D>,
    map: &BlockMap,
    stored: &[Range<u64>],
) -> Result<()> {
    let mut bitmap = BitmapReader::default();
    for block in stored.iter().flat_map(|slots| partial_blocks(map, slots.clone())) {
        let bits = bitmap.read(file, map, block).await?;
        map.bitmaps().store(map.geometry(), block, bits).map_err(no_room)?;
    }
    Ok(())
}

/// How much of a bitmap is read at a time: as much as the largest block has of it.
const WINDOW_BYTES: u64 = 64 << 10;

const _: () = assert!(MAX_BLOCK_SIZE as u64 / SECTOR_SIZES[0] as u64 / 8 <= WINDOW_BYTES, "a block fits");
const _: () = assert!(BITMAP_BLOCK_SIZE.is_multiple_of(WINDOW_BYTES), "windows end with the bitmap");

/// The part of a bitmap that was read last, and where it lies in the file.
#[derive(Default)]
pub(super) struct BitmapReader(Option<(u64, Buffer)>);

impl BitmapReader {
    /// The bits of `block`, whose chunk has partially present blocks, as the file has them.
    pub(super) async fn read<D: ReadDisk>(
        &mut self,
        file: &View<'_, D>,
        map: &BlockMap,
        block: u64,
    ) -> Result<&[u8]> {
        let chunk = map.geometry().chunk_of_block(block);
        let place = map.bitmap_place(chunk).ok_or_else(|| missing(chunk))?;
        assert!(place >= MIB && place.is_multiple_of(MIB), "a bitmap is a block of the file, at {place}");
        let slice = map.geometry().bitmap_slice(block);
        let start = slice.start - slice.start % WINDOW_BYTES;
        if self.0.as_ref().is_none_or(|(read, _)| *read != place + start) {
            let bytes = file.read("sector bitmap", place + start, index(WINDOW_BYTES)).await?;
            self.0 = Some((place + start, bytes));
        }
        let (_, bytes) = self.0.as_ref().expect("it was just read");
        assert!(slice.end - start <= bytes.len() as u64, "the bits of a block lie in one window");
        Ok(&bytes[index(slice.start - start)..index(slice.end - start)])
    }
}

/// The partially present blocks in `slots`.
pub(super) fn partial_blocks(map: &BlockMap, slots: Range<u64>) -> impl Iterator<Item = u64> {
    assert!(slots.end <= map.geometry().slot_count(), "{slots:?} are in the BAT");
    // Which block a slot is for is asked of few: a chain of full disks has millions.
    slots.filter(|slot| map.may_be_partial(*slot)).filter_map(|slot| map.geometry().block_of_slot(slot))
}

pub(super) fn missing(chunk: u64) -> Error {
    let message = format!("chunk {chunk} has partially present blocks and no sector bitmap");
    Error::corrupt("BAT", message).remedy("`vhdx-ublk check` shows what else is wrong")
}

fn no_room(error: io::Error) -> Error {
    if error.kind() != io::ErrorKind::OutOfMemory {
        return Error::io("making room for sector bitmaps", error);
    }
    let message = format!("its sector bitmaps take more than {MAX_BITMAP_BYTES} bytes of memory");
    Error::new(Kind::Unsupported, message).in_structure("BAT").remedy("merge it into its parent")
}
