//! What every thread of a device sees: the block maps of the chain, the session word, what the host's file can do.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::format::bat::Geometry;
pub use crate::image::Session;
use crate::image::{BlockMap, SectorBitmaps};

/// What tells where the content of one image is.
pub struct Layer {
    /// Where each block lies.
    pub map: BlockMap,
    /// Which sectors of its partially present blocks are in it.
    pub bitmaps: SectorBitmaps,
}

/// The state shared by the fronts and the engine.
pub struct Shared {
    /// Where each block lies.
    pub map: BlockMap,
    bitmaps: SectorBitmaps,
    /// Of a differencing image the parents, its own first; they are never written.
    parents: Box<[Layer]>,
    /// Writes are refused before they reach the engine.
    pub read_only: bool,
    /// The image promises provisioned space (LeaveBlocksAllocated): nothing is ever unmapped.
    pub fixed: bool,
    can_zero_range: AtomicBool,
    can_punch: AtomicBool,
}

impl Shared {
    /// State over `map` and the session in its memory; the host is trusted until it refuses.
    pub fn new(map: BlockMap, read_only: bool, fixed: bool) -> Self {
        let leaf = Layer { map, bitmaps: SectorBitmaps::default() };
        Self::of_chain(leaf, Box::default(), read_only, fixed)
    }

    /// State over a chain and the session in the memory of its leaf.
    pub fn of_chain(leaf: Layer, parents: Box<[Layer]>, read_only: bool, fixed: bool) -> Self {
        Self {
            map: leaf.map,
            bitmaps: leaf.bitmaps,
            parents,
            read_only,
            fixed,
            can_zero_range: AtomicBool::new(true),
            can_punch: AtomicBool::new(true),
        }
    }

    /// The geometry of the virtual disk.
    pub fn geometry(&self) -> &Geometry {
        self.map.geometry()
    }

    /// The image that the leaf's content comes from where it has none itself, and so on, with their numbers.
    pub(super) fn parents(&self) -> impl Iterator<Item = (u8, &BlockMap, &SectorBitmaps)> {
        (1..).zip(&self.parents).map(|(number, layer)| (number, &layer.map, &layer.bitmaps))
    }

    /// Which sectors of its partially present blocks are in the leaf.
    pub(super) fn bitmaps(&self) -> &SectorBitmaps {
        &self.bitmaps
    }

    /// The session word.
    #[inline]
    pub fn session(&self) -> Session {
        self.map.memory().session()
    }

    /// Idle becomes open; poison stays.
    pub fn open_session(&self) {
        self.map.memory().open();
    }

    /// From now on no write or flush may succeed. `true` for the one caller that changed it.
    pub fn poison(&self) -> bool {
        self.map.memory().poison()
    }

    /// Whether the host is believed to take `ZERO_RANGE`.
    pub fn can_zero_range(&self) -> bool {
        self.can_zero_range.load(Ordering::Relaxed)
    }

    /// The host has refused `ZERO_RANGE`: zeros are written from now on.
    pub fn forget_zero_range(&self) {
        self.can_zero_range.store(false, Ordering::Relaxed);
    }

    /// Whether the host is believed to take `PUNCH_HOLE`.
    pub fn can_punch(&self) -> bool {
        self.can_punch.load(Ordering::Relaxed)
    }

    /// The host has refused `PUNCH_HOLE`.
    pub fn forget_punch(&self) {
        self.can_punch.store(false, Ordering::Relaxed);
    }
}
