//! The leaf that the queues of a device go on with after a hold.

use std::sync::{Arc, Mutex, PoisonError};

use crate::disk::ImageFile;
use crate::engine::shared::Shared;

/// A leaf, on top of the one that was served before.
#[derive(Clone)]
pub(super) struct Leaf {
    /// What the fronts and its engine share.
    pub(super) shared: Arc<Shared>,
    /// Its file.
    pub(super) file: Arc<ImageFile>,
}

/// Where the engine leaves it for the queues; it is set while they are held.
#[derive(Clone, Default)]
pub struct NextLeaf(Arc<Mutex<Option<Leaf>>>);

impl NextLeaf {
    /// From now on the queues are to serve `leaf`.
    pub(super) fn set(&self, leaf: Leaf) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(leaf);
    }

    /// The leaf that the queues are to serve, if it is not the first one.
    pub(super) fn latest(&self) -> Option<Leaf> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The leaf, for a queue that knows `known` layers, if that has become one of its parents.
    pub(super) fn above(&self, known: usize) -> Option<Leaf> {
        self.latest().filter(|leaf| leaf.shared.layers().count() > known)
    }
}
