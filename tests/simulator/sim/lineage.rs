//! A parent below the image, and what its child begins with.
//!
//! The parent has other blocks than its child, is smaller, and lacks every third of its blocks. Some of the
//! child's blocks are partially present from the start, by runs of three sectors; what lies in its file under
//! the others is noise. Of the blocks behind these the bitmap has bits, which mean nothing: they are not
//! there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use uuid::Uuid;
use vhdx_ublk::format::bat::{BITMAP_BLOCK_SIZE, BatEntry, Geometry, PayloadState};
use vhdx_ublk::format::locator::{PARENT_LINKAGE, ParentLocator, RELATIVE_PATH};
use vhdx_ublk::image::{BlockMap, Image, ParentRef};

use super::disk::SimDisk;
use super::oracle::{Value, stamp};
use super::store::Store;
use super::tasks::block_on;
use super::world::{Beginning, Config};

/// What the parent's sectors hold, and those that a new child has.
const PARENT: Value = 1 << 40;
const CHILD: Value = 1 << 41;

/// Bytes of a block of the parent.
const PARENT_BLOCK: u32 = 2 << 20;

/// How a sector's content follows from the images below.
#[derive(Clone, Debug, Default)]
pub struct Lineage {
    sector_bytes: u64,
    block_bytes: u64,
    parent_bytes: u64,
    /// Bytes of the child's disk in the beginning: nothing of the parent comes into what it grows by.
    child_bytes: u64,
    /// The parent's blocks that are there.
    parents: BTreeSet<u64>,
    /// The child's blocks that are partially present in the beginning.
    partial: BTreeSet<u64>,
    /// Blocks of whose chunks the file has bitmaps, with bits that mean nothing where blocks are not there.
    left_over: BTreeSet<u64>,
    /// What the parent holds, if it was frozen by a snapshot, and what it was made of.
    frozen: Option<Arc<(BTreeMap<u64, Value>, Lineage)>>,
}

/// What makes a new image a child.
pub fn descent() -> ParentRef {
    let mut locator = ParentLocator::default();
    locator.set(PARENT_LINKAGE, Uuid::from_u128(1).braced().to_string());
    locator.set(RELATIVE_PATH, r".\parent.vhdx");
    ParentRef { locator, disk_id: Uuid::from_u128(2) }
}

impl Lineage {
    /// The one of a world; that of an image without a parent has nothing anywhere.
    pub fn of(config: &Config) -> Self {
        if config.image.parent.is_none() {
            return Self::default();
        }
        if let Some(frozen) = &config.frozen {
            return frozen.as_ref().clone();
        }
        let sector_bytes = u64::from(config.image.logical_sector_size);
        let block_bytes = u64::from(config.image.block_size);
        let child_bytes = config.image.virtual_size;
        let parent_bytes = match config.faults.grow {
            0 => child_bytes / 3 * 2 / sector_bytes * sector_bytes,
            _ => child_bytes + child_bytes / 4 / sector_bytes * sector_bytes,
        };
        let parent_block = u64::from(PARENT_BLOCK);
        let under = config.blocks.iter().map(|block| block * block_bytes / parent_block);
        let parents = under.filter(|block| block % 3 != 1 && block * parent_block < parent_bytes);
        let every_third = config.blocks.iter().copied().skip(1).step_by(3);
        let partial = every_third.filter(|_| config.beginning == Beginning::Partial);
        let left_over = match config.beginning {
            Beginning::Nothing => BTreeSet::new(),
            Beginning::Partial | Beginning::LeftOver => config.blocks.iter().copied().collect(),
        };
        Self {
            sector_bytes,
            block_bytes,
            parent_bytes,
            child_bytes,
            parents: parents.collect(),
            partial: partial.collect(),
            left_over,
            frozen: None,
        }
    }

    /// The one of a child of an image that holds `values`, and elsewhere what `below` says.
    pub fn frozen(values: BTreeMap<u64, Value>, below: Self) -> Self {
        Self { frozen: Some(Arc::new((values, below))), ..Self::default() }
    }

    /// What `sector` holds before anything is written.
    pub fn original(&self, sector: u64) -> Value {
        if self.frozen.is_none() && sector * self.sector_bytes >= self.child_bytes {
            return 0;
        }
        let is_here = self.block_bytes > 0
            && self.partial.contains(&(sector * self.sector_bytes / self.block_bytes))
            && self.bit(sector);
        if is_here { CHILD } else { self.parents(sector) }
    }

    /// What `sector` holds under `entry`, if not what the child's file has there; `here` is what the bitmap
    /// says.
    pub fn elsewhere(&self, entry: BatEntry, sector: u64, here: impl FnOnce() -> bool) -> Option<Value> {
        match entry.payload_state() {
            Some(PayloadState::FullyPresent) => None,
            Some(PayloadState::PartiallyPresent) if here() => None,
            Some(PayloadState::PartiallyPresent | PayloadState::NotPresent) => Some(self.parents(sector)),
            _ => Some(0),
        }
    }

    fn bit(&self, sector: u64) -> bool {
        (sector % (self.block_bytes / self.sector_bytes) / 3).is_multiple_of(2)
    }

    fn parents(&self, sector: u64) -> Value {
        if let Some(frozen) = &self.frozen {
            let (values, below) = frozen.as_ref();
            return values.get(&sector).copied().unwrap_or_else(|| below.original(sector));
        }
        if self.sector_bytes == 0 {
            return 0;
        }
        let offset = sector * self.sector_bytes;
        let is_there =
            self.parents.contains(&(offset / u64::from(PARENT_BLOCK))) && offset < self.parent_bytes;
        if is_there { PARENT } else { 0 }
    }

    /// The parent's file, and where its content is; nothing if there is no parent.
    pub fn parent(&self) -> Option<(Store, BlockMap)> {
        if self.block_bytes == 0 {
            return None;
        }
        let sector = u32::try_from(self.sector_bytes).expect("small");
        let map = BlockMap::empty(Geometry::new(self.parent_bytes, PARENT_BLOCK, sector, false));
        let (mut file, block_bytes) = (Store::default(), u64::from(PARENT_BLOCK));
        file.resize((1 + self.parents.len() as u64) * block_bytes);
        for (place, block) in (1..).zip(&self.parents) {
            map.publish(*block, BatEntry::present(place * block_bytes));
            let first = block * block_bytes / self.sector_bytes;
            self.write(&mut file, place * block_bytes, first, block_bytes, |_| Some(PARENT));
        }
        Some((file, map))
    }

    /// Lays the blocks that are partially present into the new child in `content`.
    pub fn begin(&self, content: Store) -> Store {
        if self.left_over.is_empty() {
            return content;
        }
        let disk = SimDisk::new(content, true, true, 512);
        let image = block_on(Image::read(&disk)).expect("a new image");
        let (geometry, bat) = (*image.map.geometry(), image.layout.bat.offset);
        let mut file = disk.content();
        let mut bitmaps: BTreeMap<u64, u64> = BTreeMap::new();
        for block in &self.left_over {
            let chunk = geometry.chunk_of_block(*block);
            let bitmap = *bitmaps.entry(chunk).or_insert_with(|| {
                let place = file.length;
                file.resize(place + BITMAP_BLOCK_SIZE);
                file.write(bat + geometry.bitmap_slot(chunk) * 8, &BatEntry::present(place).write());
                place
            });
            if self.partial.contains(block) {
                self.begin_block(&mut file, &geometry, bat, *block, bitmap);
            } else if block % 2 == 0 || self.partial.is_empty() {
                let slice = geometry.bitmap_slice(*block);
                let bits = vec![0xff; usize::try_from(slice.end - slice.start).expect("small")];
                file.write(bitmap + slice.start, &bits);
            }
        }
        file
    }

    fn begin_block(&self, file: &mut Store, geometry: &Geometry, bat: u64, block: u64, bitmap: u64) {
        let (place, first) = (file.length, block * self.block_bytes / self.sector_bytes);
        file.resize(place + self.block_bytes);
        file.write(bat + geometry.payload_slot(block) * 8, &BatEntry::partially_present(place).write());
        let slice = geometry.bitmap_slice(block);
        let bits = (0..slice.end - slice.start)
            .map(|byte| (0..8).fold(0, |bits, bit| bits | u8::from(self.bit(first + byte * 8 + bit)) << bit));
        file.write(bitmap + slice.start, &bits.collect::<Vec<u8>>());
        self.write(file, place, first, self.block_bytes, |sector| self.bit(sector).then_some(CHILD));
    }

    /// Fills a block in a file with what its sectors hold; those that hold nothing get garbage.
    fn write(
        &self,
        file: &mut Store,
        place: u64,
        first: u64,
        length: u64,
        holds: impl Fn(u64) -> Option<Value>,
    ) {
        let mut bytes = vec![0xaa; usize::try_from(length).expect("small")];
        let sectors = bytes.chunks_mut(usize::try_from(self.sector_bytes).expect("small"));
        for (sector, bytes) in (first..).zip(sectors) {
            if let Some(value) = holds(sector) {
                stamp(sector, value, bytes);
            }
        }
        file.write(place, &bytes);
    }
}
