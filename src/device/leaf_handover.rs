//! The leaf that the queues of a device serve after a hold.

use std::sync::{Arc, Mutex, PoisonError};

use crate::disk::ImageFile;
use crate::engine::shared::Shared;

/// A leaf and its parents: on top of the one that was served before, the same with a larger disk, or over a
/// layer less.
#[derive(Clone)]
pub(super) struct Leaf {
    /// What its engine shares with the fronts.
    pub(super) shared: Arc<Shared>,
    /// The files of the chain, its own first.
    pub(super) files: Arc<[Arc<ImageFile>]>,
}

/// Where the engine leaves a new leaf for the queues; it does so while they are held.
#[derive(Clone, Default)]
pub struct LeafHandover(Arc<Mutex<Latest>>);

#[derive(Default)]
struct Latest {
    /// How many leaves there have been after the first one.
    count: u64,
    leaf: Option<Leaf>,
}

impl LeafHandover {
    /// Has the queues serve `leaf` from now on.
    pub(super) fn set(&self, leaf: Leaf) {
        let mut latest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        latest.count += 1;
        latest.leaf = Some(leaf);
    }

    /// The leaf to serve, if it is not the first one.
    pub(super) fn latest(&self) -> Option<Leaf> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).leaf.clone()
    }

    /// The leaf to serve, if a queue that has served `count` leaves after the first one does not know it. The
    /// queue knows it from then on.
    pub(super) fn newer_than(&self, count: &mut u64) -> Option<Leaf> {
        let latest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = std::mem::replace(count, latest.count) < latest.count;
        latest.leaf.clone().filter(|_| is_new)
    }
}
