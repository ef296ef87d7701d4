//! Filling the pool of the fronts ([`super::pool`]), and taking back what is in it.

use std::cell::Cell;
use std::rc::Rc;

use super::Engine;
use super::pool::PLACES;
use super::shared::Session;
use crate::disk::Disk;
use crate::format::MIB;
use crate::image::{Content, Extent};
use crate::simulation::{Plant, planted};

/// The most blocks that the pool has space for.
const MOST_BLOCKS: u64 = 32;

/// The most bytes in it, unless two blocks have more: they take no space on the host.
const MOST_BYTES: u64 = 1024 * MIB;

/// While it lives, the pool stays empty.
#[must_use = "the pool is filled again once it is dropped"]
pub struct WithoutPool(Rc<Cell<usize>>);

impl Drop for WithoutPool {
    fn drop(&mut self) {
        self.0.update(|count| count - 1);
    }
}

impl<D: Disk + 'static> Engine<D> {
    /// Keeps the pool empty until what is returned is dropped: what is about to move has to find its places,
    /// and the end of the file is to be cut off.
    pub fn without_pool(&self) -> WithoutPool {
        self.pool_holds.update(|count| count + 1);
        self.empty_pool();
        WithoutPool(self.pool_holds.clone())
    }

    /// Puts into the pool what would be granted next, as far as it reads as zero.
    pub(super) fn fill_pool(&self) {
        let may_have_one = !self.shared.fixed && self.disk.may_have_holes() && self.fronts.count() > 0;
        let is_open = self.shared.session() == Session::Open;
        if !may_have_one || !is_open || self.pool_holds.get() > 0 {
            return;
        }
        let length = self.shared.geometry().block_size();
        let most = usize::try_from((MOST_BYTES / length).clamp(2, MOST_BLOCKS)).expect("few");
        assert!(self.fronts.count() + most <= PLACES, "each front has taken out one at most");
        while self.shared.pool.count() < most
            && let Some(extent) = self.space.borrow_mut().take_zeros(length)
        {
            self.shared.pool.add(extent.offset);
        }
    }

    /// Takes back what is in the pool. What a front has taken out comes back, or is a block's.
    pub(super) fn empty_pool(&self) {
        if planted(Plant::KeepPool) {
            return;
        }
        let length = self.shared.geometry().block_size();
        while let Some(offset) = self.shared.pool.take() {
            self.space.borrow_mut().free(Extent { offset, length }, Content::KnownZero);
        }
    }
}
