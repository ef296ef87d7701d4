//! The content of a chain at rest: what a reader of its leaf sees.

use std::io;
use std::sync::Arc;

use crate::disk::{ReadDisk, read_sectors};
use crate::format::index;
use crate::image::{BlockMap, Location, locate};

/// An image of a chain as it is read.
pub struct ReadLayer<D> {
    /// Its file.
    pub disk: D,
    /// Where its content is, the sector bitmaps of partially present blocks included.
    pub map: Arc<BlockMap>,
}

/// A chain whose content is read: the leaf, and all its parents, its own first. No process writes to any of
/// them.
pub struct Content<D> {
    layers: Vec<ReadLayer<D>>,
}

impl<D> Content<D> {
    /// The content of the chain of these `layers`.
    ///
    /// # Panics
    /// Without a leaf, or with more layers than a chain can have.
    pub fn new(layers: Vec<ReadLayer<D>>) -> Self {
        assert!(!layers.is_empty() && layers.len() <= super::MAX_DEPTH, "a chain of {} layers", layers.len());
        Self { layers }
    }

    /// The layers, the leaf first.
    pub fn layers(&self) -> &[ReadLayer<D>] {
        &self.layers
    }

    /// The size of the virtual disk, bytes.
    pub fn virtual_size(&self) -> u64 {
        self.leaf().geometry().virtual_size()
    }

    /// The size of a logical sector, bytes.
    pub fn sector_size(&self) -> u32 {
        self.leaf().geometry().logical_sector_size()
    }

    /// Where the bytes from virtual offset `from` on are, and the offset, up to `end`, at which that ends.
    /// Bytes in a file are those of one block; what no file has may be longer. A smaller parent reads as
    /// zeros behind its end.
    ///
    /// Never [`Location::Below`]: what no layer has is [`Location::Undefined`].
    pub fn locate(&self, from: u64, end: u64) -> (Location, u64) {
        assert!(from < end && end <= self.virtual_size(), "bytes {from} to {end} of the disk");
        let (location, mut past) = self.first_of(from, end);
        while past < end && !matches!(location, Location::File { .. }) {
            past = self.pass_empty(past, end);
            if past == end {
                break;
            }
            let (next, next_past) = self.first_of(past, end);
            if next != location {
                break;
            }
            past = next_past;
        }
        (location, past)
    }

    /// Fills `target` with the content from virtual offset `from` on.
    ///
    /// # Errors
    /// Those of the host. Sectors that no file has read as zeros.
    pub async fn read(&self, from: u64, target: &mut [u8]) -> io::Result<()>
    where
        D: ReadDisk,
    {
        let end = from + target.len() as u64;
        let mut at = from;
        while at < end {
            let (location, past) = self.locate(at, end);
            let piece = &mut target[index(at - from)..index(past - from)];
            match location {
                Location::File { layer, offset } => {
                    read_sectors(&self.layers[usize::from(layer)].disk, offset, piece).await?;
                }
                Location::Zero | Location::Undefined | Location::Below => piece.fill(0),
                Location::Lost => return Err(io::Error::from_raw_os_error(libc::EIO)),
            }
            at = past;
        }
        Ok(())
    }

    fn leaf(&self) -> &BlockMap {
        &self.layers[0].map
    }

    /// Passes over blocks whose slots were never set, in a chain without parents: a sparse disk of 64 TiB has
    /// millions of them.
    fn pass_empty(&self, from: u64, end: u64) -> u64 {
        let geometry = self.leaf().geometry();
        if self.layers.len() > 1 || geometry.is_differencing() || geometry.offset_in_block(from) != 0 {
            return from;
        }
        let set = self.leaf().first_set(geometry.block_of_offset(from)..geometry.block_count());
        (set * geometry.block_size()).clamp(from, end)
    }

    /// Where the bytes from `from` on are, of the blocks that `from` is in.
    fn first_of(&self, from: u64, end: u64) -> (Location, u64) {
        match locate_in_layers(self.layers.iter().map(|layer| &*layer.map), from, end) {
            (Location::Below, past) => (Location::Undefined, past),
            found => found,
        }
    }
}

/// Where the bytes from virtual offset `from` on are by the maps of a chain, the leaf's first, and the offset
/// at which that ends: `end`, or where the block of a layer does. A smaller parent reads as zeros behind its
/// end; what the last layer leaves to its parent is [`Location::Below`].
pub fn locate_in_layers<'a>(
    maps: impl Iterator<Item = &'a BlockMap>,
    from: u64,
    mut end: u64,
) -> (Location, u64) {
    for (number, map) in (0..).zip(maps) {
        let size = map.geometry().virtual_size();
        if from >= size {
            return (Location::Zero, end);
        }
        match locate(number, map, from, end.min(size)) {
            (Location::Below, length) => end = from + length,
            (location, length) => return (location, from + length),
        }
    }
    (Location::Below, end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Buffer;
    use crate::format::MIB;
    use crate::format::bat::{BatEntry, Geometry};

    /// A file in which every byte of a MiB is the number of that MiB.
    struct Numbered;

    impl ReadDisk for Numbered {
        async fn read(&self, offset: u64, length: usize) -> io::Result<Buffer> {
            let mut buffer = Buffer::zeroed(length);
            for (byte, at) in buffer.iter_mut().zip(offset..) {
                *byte = u8::try_from(at / MIB).expect("a small file");
            }
            Ok(buffer)
        }

        async fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
            Ok(Some(offset))
        }

        async fn length(&self) -> io::Result<u64> {
            Ok(100 * MIB)
        }

        fn takes_space_back(&self) -> bool {
            false
        }
    }

    fn layer(blocks: u64, differencing: bool, entries: &[BatEntry]) -> ReadLayer<Numbered> {
        let map = BlockMap::empty(Geometry::new(blocks * MIB, 1 << 20, 512, differencing));
        let words: Vec<_> = entries.iter().map(|entry| entry.write()).collect();
        map.restore(0, &words);
        ReadLayer { disk: Numbered, map: map.into() }
    }

    #[test]
    fn each_layer_covers_those_below_and_a_smaller_parent_ends_in_zeros() {
        let (zero, absent) = (BatEntry::zero(), BatEntry::not_present());
        let leaf = layer(5, true, &[BatEntry::present(7 * MIB), zero, absent, absent, absent]);
        let parent = layer(3, false, &[BatEntry::present(8 * MIB), BatEntry::present(9 * MIB), absent]);
        let chain = Content::new(vec![leaf, parent]);
        let locate = |at| chain.locate(at, chain.virtual_size());
        let file = |layer, offset| Location::File { layer, offset };
        assert_eq!(locate(512), (file(0, 7 * MIB + 512), MIB));
        assert_eq!(locate(MIB), (Location::Zero, 2 * MIB));
        assert_eq!(locate(2 * MIB), (Location::Undefined, 3 * MIB), "no layer has it");
        assert_eq!(locate(3 * MIB), (Location::Zero, 5 * MIB), "the parent ends before");
        let mut found = [9; 1024];
        smol::future::block_on(chain.read(MIB - 512, &mut found)).expect("no fault");
        assert!(found[..512].iter().all(|byte| *byte == 7) && found[512..].iter().all(|byte| *byte == 0));
    }

    /// One step passes over the blocks of a large disk that were never written.
    #[test]
    fn an_empty_disk_is_one_extent() {
        let chain = Content::new(vec![layer(64 << 20, false, &[BatEntry::present(7 * MIB)])]);
        let size = chain.virtual_size();
        assert_eq!(chain.locate(MIB, size), (Location::Undefined, size));
    }
}
