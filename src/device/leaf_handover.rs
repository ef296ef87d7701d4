//! The leaf that the queues of a device serve after a hold.

use std::sync::{Arc, Mutex, PoisonError};

use crate::disk::ImageFile;
use crate::engine::shared::Shared;

/// A leaf, on top of the one that was served before.
#[derive(Clone)]
pub(super) struct Leaf {
    /// What its engine shares with the fronts.
    pub(super) shared: Arc<Shared>,
    pub(super) file: Arc<ImageFile>,
}

/// Where the engine leaves a new leaf for the queues; it does so while they are held.
#[derive(Clone, Default)]
pub struct LeafHandover(Arc<Mutex<Option<Leaf>>>);

impl LeafHandover {
    /// Has the queues serve `leaf` from now on.
    pub(super) fn set(&self, leaf: Leaf) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(leaf);
    }

    /// The leaf to serve, if it is not the first one.
    pub(super) fn latest(&self) -> Option<Leaf> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The leaf to serve, if it lies on top of the `layers` that a queue knows.
    pub(super) fn newer_than(&self, layers: usize) -> Option<Leaf> {
        self.latest().filter(|leaf| leaf.shared.layers().count() > layers)
    }
}
