//! What every thread of a device sees: the block map, the session word, what the host's file can do.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::format::bat::Geometry;
use crate::image::BlockMap;
pub use crate::image::Session;

/// The state shared by the fronts and the engine.
pub struct Shared {
    /// Where each block lies.
    pub map: BlockMap,
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
        Self {
            map,
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
