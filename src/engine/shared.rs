//! What every thread of a device sees: the block map, the session word, what the host's file can do.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use crate::format::bat::Geometry;
use crate::image::BlockMap;

/// Where the writable session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Session {
    /// Nothing has been modified: the file is still as it was found.
    Idle,
    /// The headers announce a writer; modifications may go on.
    Open,
    /// Something that must not fail has failed: no write or flush succeeds any more, reads go on.
    Poisoned,
}

/// The state shared by the fronts and the engine.
pub struct Shared {
    /// Where each block lies.
    pub map: BlockMap,
    /// Writes are refused before they reach the engine.
    pub read_only: bool,
    /// The image promises provisioned space (LeaveBlocksAllocated): nothing is ever unmapped.
    pub fixed: bool,
    session: AtomicU8,
    can_zero_range: AtomicBool,
    can_punch: AtomicBool,
}

const IDLE: u8 = 0;
const OPEN: u8 = 1;
const POISONED: u8 = 2;

impl Shared {
    /// Fresh state over `map`, the session idle, the host trusted until it refuses.
    pub fn new(map: BlockMap, read_only: bool, fixed: bool) -> Self {
        Self {
            map,
            read_only,
            fixed,
            session: AtomicU8::new(IDLE),
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
        match self.session.load(Ordering::Acquire) {
            IDLE => Session::Idle,
            OPEN => Session::Open,
            _ => Session::Poisoned,
        }
    }

    /// Idle becomes open; poison stays.
    pub fn open_session(&self) {
        let _ = self.session.compare_exchange(IDLE, OPEN, Ordering::AcqRel, Ordering::Acquire);
    }

    /// From now on no write or flush may succeed. `true` for the one caller that changed it.
    pub fn poison(&self) -> bool {
        self.session.swap(POISONED, Ordering::AcqRel) != POISONED
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
