//! Watching an operation that takes long.

/// Sees how far an operation is, and may ask it to stop.
pub trait Watch {
    /// `done` of `total` bytes are done. Called often, and from one thread.
    fn progress(&self, done: u64, total: u64);

    /// Whether the operation is to stop at its next safe point: what is done until then stays done.
    fn stop_requested(&self) -> bool;
}
