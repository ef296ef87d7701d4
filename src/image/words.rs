//! Words of memory that other processes share, and the room for them.

use std::any::Any;
use std::io;
use std::ops::{Deref, Range};
use std::sync::Arc;

use crate::atomic::AtomicU64;

/// Bits of a word.
pub const WORD_BITS: u64 = u64::BITS as u64;

/// Words that other processes may use, too, while anything here holds them.
#[derive(Clone)]
pub struct SharedWords {
    /// A plain reference: they are looked at for every request.
    words: &'static [AtomicU64],
    _owner: Arc<dyn Any + Send + Sync>,
}

impl SharedWords {
    /// `words`, which go with `owner`: nothing else may have this reference to them.
    pub fn of(words: &'static [AtomicU64], owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { words, _owner: owner }
    }
}

impl Deref for SharedWords {
    type Target = [AtomicU64];

    #[inline]
    fn deref(&self) -> &[AtomicU64] {
        self.words
    }
}

impl From<Vec<AtomicU64>> for SharedWords {
    /// They are never given back.
    fn from(words: Vec<AtomicU64>) -> Self {
        Self::of(words.leak(), Arc::new(()))
    }
}

/// Makes room for a range of shared memory, in words: touching memory without room would kill the process.
pub type Reserve = Arc<dyn Fn(Range<usize>) -> io::Result<()> + Send + Sync>;

/// Finds the first part of a range of shared memory that may hold anything but zeros, in words; `None` if
/// there is none. Looking at the rest would take memory, a page at a time.
pub type Written = Arc<dyn Fn(Range<usize>) -> Option<Range<usize>> + Send + Sync>;

/// Memory that others may have used before, and may use afterwards.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) words: SharedWords,
    pub(super) reserve: Reserve,
    pub(super) written: Written,
}
