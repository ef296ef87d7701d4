//! Space that the engine has set aside, so that a front can give a block its space without asking.
//!
//! * An extent of the pool is taken in the engine's map of space, lies in the file, and reads as zero, now
//!   and after a power cut. A front that meets a block without space, which needs nothing but zeros, takes an
//!   extent and publishes the mapping by compare-exchange from the word that it has seen. If another was
//!   faster, the extent goes back.
//! * The front marks the BAT page as it marks a page of bits (`engine/marks.rs`): visible means committable,
//!   and a second front that writes there before the mark is made marks the page itself.
//! * Lookup, publication and the start of the piece are one step of a front, which takes no message in
//!   between: the piece is in the barrier's counter of its lookup, as any other.
//! * The engine fills the pool only while it is awake for something else, and only from what it would grant
//!   next in any case. Space that has to be zeroed first stays with the engine, and so it is used first.
//! * What is in the pool is free space: the engine takes it back before it makes the file longer, before it
//!   says that there is no room, before it looks where the file ends, and before it chooses places. While
//!   blocks move it stays empty.
//!
//! A kill or a power cut leaves what was in the pool free: nothing names it. A successor takes it for space
//! that may hold anything, as all that it finds.

use crate::atomic::ArrayQueue;
use crate::format::MIB;

/// Places: for what is in the pool, and for what each front may have taken out and give back.
pub(super) const PLACES: usize = 256;

/// See the module's head.
pub struct Pool(ArrayQueue<u64>);

impl Default for Pool {
    fn default() -> Self {
        Self(ArrayQueue::new(PLACES))
    }
}

impl Pool {
    /// Adds space for a block, at byte `offset` of the file.
    pub fn add(&self, offset: u64) {
        assert!(offset >= MIB && offset.is_multiple_of(MIB), "space for a block at byte {offset}");
        assert!(self.0.push(offset).is_ok(), "there is a place for what every front may have taken");
    }

    /// Takes space for a block, if there is any.
    pub(super) fn take(&self) -> Option<u64> {
        self.0.pop()
    }

    /// For how many blocks it has space.
    pub(super) fn count(&self) -> usize {
        self.0.len()
    }
}
