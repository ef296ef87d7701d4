//! What the engine's thread has another one do while it opens an image: the thread that waits for the image.
//!
//! That one may still ask the driver which devices there are. The engine's thread may not, as it reads images
//! that other users made (see [`confine`](super::confine)).

use std::sync::{Arc, mpsc};

/// What the other thread is to run.
pub(super) type Errand = Box<dyn FnOnce() + Send>;

/// The way to the thread that waits. By default there is none, and this thread may ask the driver itself.
#[derive(Clone, Default)]
pub(super) struct Errands(Option<Arc<dyn Fn(Errand) + Send + Sync>>);

impl Errands {
    /// `hand_over` gives errands to the thread that waits.
    pub(super) fn by(hand_over: impl Fn(Errand) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(hand_over)))
    }

    /// What `task` returns, which the thread that waits has run.
    pub(super) fn run<T: Send + 'static>(&self, task: impl FnOnce() -> T + Send + 'static) -> T {
        let Some(hand_over) = &self.0 else { return task() };
        let (result, awaited) = mpsc::channel();
        hand_over(Box::new(move || {
            // It is received below.
            let _ = result.send(task());
        }));
        awaited.recv().expect("a thread waits for the image, and a panic ends the process")
    }
}
