//! The words that the threads of a device share, and the queue that joins two of them.
//!
//! They are those of the standard library and of `crossbeam`. With the cargo feature `interleavings` they are
//! loom's, for tests that run a few threads in every order of their steps, and have each load find every
//! value that it may find ([`testing`](crate::design::testing)). Only what those tests are about is taken
//! from here: every other atomic word is the standard library's in any build.

pub use std::sync::atomic::Ordering;

#[cfg(not(feature = "interleavings"))]
pub use crossbeam_queue::ArrayQueue;
#[cfg(not(feature = "interleavings"))]
pub use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, fence};

#[cfg(feature = "interleavings")]
pub use loom::sync::atomic::{AtomicUsize, fence};
#[cfg(feature = "interleavings")]
pub use modelled::{ArrayQueue, AtomicBool, AtomicU32, AtomicU64, set_up, start_threads};

/// Words of zeros. Memory is touched only where something is stored.
#[cfg(not(feature = "interleavings"))]
pub(crate) fn zeroed(count: usize) -> Box<[AtomicU64]> {
    use zerocopy::FromZeros;

    <[AtomicU64]>::new_box_zeroed_with_elems(count).expect("513 MiB of address space at most")
}

/// Words of zeros.
#[cfg(feature = "interleavings")]
pub(crate) fn zeroed(count: usize) -> Box<[AtomicU64]> {
    (0..count).map(|_| AtomicU64::default()).collect()
}

#[cfg(feature = "interleavings")]
mod modelled {
    use std::cell::Cell;
    use std::collections::VecDeque;
    use std::sync::{Mutex, OnceLock};

    use super::Ordering;

    thread_local! {
        // One for all: loom runs the threads of a model in turn, on one thread.
        static SETS_UP: Cell<bool> = const { Cell::new(false) };
    }

    /// A model begins: it changes every word once that its threads will change.
    pub fn set_up() {
        SETS_UP.set(true);
    }

    /// The threads of the model begin: what is zero and was never changed stays so.
    pub fn start_threads() {
        SETS_UP.set(false);
    }

    // Loom keeps the history of every word, and a bitmap has 131,072 of them.
    macro_rules! late_word {
        ($name:ident, $number:ty) => {
            /// A word that is loom's from its first change on, and zero until then.
            #[derive(Default)]
            pub struct $name(OnceLock<loom::sync::atomic::$name>);

            impl $name {
                /// A word that is loom's from now on.
                pub fn new(value: $number) -> Self {
                    Self(loom::sync::atomic::$name::new(value).into())
                }

                fn word(&self) -> &loom::sync::atomic::$name {
                    self.0.get_or_init(|| {
                        assert!(SETS_UP.get(), "a model changes each word before its threads begin");
                        loom::sync::atomic::$name::new(0)
                    })
                }

                /// As the standard library's.
                pub fn load(&self, order: Ordering) -> $number {
                    self.0.get().map_or(0, |word| word.load(order))
                }

                /// As the standard library's.
                pub fn store(&self, value: $number, order: Ordering) {
                    self.word().store(value, order);
                }

                /// As the standard library's.
                pub fn swap(&self, value: $number, order: Ordering) -> $number {
                    self.word().swap(value, order)
                }

                /// As the standard library's.
                ///
                /// # Errors
                /// The value, if it is not `current`.
                pub fn compare_exchange(
                    &self,
                    current: $number,
                    new: $number,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$number, $number> {
                    self.word().compare_exchange(current, new, success, failure)
                }

                /// As the standard library's.
                pub fn fetch_add(&self, value: $number, order: Ordering) -> $number {
                    self.word().fetch_add(value, order)
                }

                /// As the standard library's.
                pub fn fetch_sub(&self, value: $number, order: Ordering) -> $number {
                    self.word().fetch_sub(value, order)
                }

                /// As the standard library's.
                pub fn fetch_or(&self, value: $number, order: Ordering) -> $number {
                    self.word().fetch_or(value, order)
                }

                /// As the standard library's. Of zero nothing is left in any case.
                pub fn fetch_and(&self, value: $number, order: Ordering) -> $number {
                    self.0.get().map_or(0, |word| word.fetch_and(value, order))
                }
            }
        };
    }

    late_word!(AtomicU32, u32);
    late_word!(AtomicU64, u64);

    /// A flag. Loom may take a store for older than a swap that came before it, if the thread that stores has
    /// not seen the swap. The memory model does not: nothing lies between a swap and the value that it found.
    /// So each store is a swap here.
    #[derive(Default)]
    pub struct AtomicBool(loom::sync::atomic::AtomicBool);

    impl AtomicBool {
        /// As the standard library's.
        pub fn new(value: bool) -> Self {
            Self(loom::sync::atomic::AtomicBool::new(value))
        }

        /// As the standard library's.
        pub fn load(&self, order: Ordering) -> bool {
            self.0.load(order)
        }

        /// As the standard library's.
        pub fn store(&self, value: bool, order: Ordering) {
            self.0.swap(value, order);
        }

        /// As the standard library's.
        pub fn swap(&self, value: bool, order: Ordering) -> bool {
            self.0.swap(value, order)
        }
    }

    /// A queue whose receivers may see late that something was sent: the real one promises no more.
    pub struct ArrayQueue<T> {
        messages: Mutex<VecDeque<T>>,
        places: usize,
        sent: loom::sync::atomic::AtomicUsize,
        received: std::sync::atomic::AtomicUsize,
    }

    impl<T> ArrayQueue<T> {
        /// An empty queue with room for so many messages.
        pub fn new(places: usize) -> Self {
            Self {
                messages: Mutex::default(),
                places,
                sent: loom::sync::atomic::AtomicUsize::new(0),
                received: std::sync::atomic::AtomicUsize::new(0),
            }
        }

        /// Adds a message.
        ///
        /// # Errors
        /// The message, if there is no room.
        pub fn push(&self, message: T) -> Result<(), T> {
            let mut messages = self.messages.lock().expect("no panic holds it");
            if messages.len() == self.places {
                return Err(message);
            }
            messages.push_back(message);
            drop(messages);
            self.sent.fetch_add(1, Ordering::Release);
            Ok(())
        }

        /// Takes the oldest message.
        pub fn pop(&self) -> Option<T> {
            if self.is_empty() {
                return None;
            }
            self.received.fetch_add(1, Ordering::Relaxed);
            self.messages.lock().expect("no panic holds it").pop_front()
        }

        /// How many messages are here.
        pub fn len(&self) -> usize {
            self.messages.lock().expect("no panic holds it").len()
        }

        /// Whether no message is known to have come.
        pub fn is_empty(&self) -> bool {
            self.sent.load(Ordering::Acquire) == self.received.load(Ordering::Relaxed)
        }
    }
}
