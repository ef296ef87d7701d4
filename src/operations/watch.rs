//! Watching an operation that takes long.

use crate::disk::Remover;

/// Sees how far an operation is, and may ask it to stop.
pub trait Watch {
    /// `done` of `total` bytes are done. Called often, and from one thread.
    fn progress(&self, done: u64, total: u64);

    /// Whether the operation is to stop at its next safe point: what is done until then stays done.
    fn stop_requested(&self) -> bool;

    /// The operation has begun a file, which `remover` removes if the program must end at once. By default
    /// the file then stays.
    fn unfinished(&self, remover: Remover) {
        drop(remover);
    }
}
