//! Words of memory that other processes share, and the room for them.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Bits of a word.
pub const WORD_BITS: u64 = u64::BITS as u64;

/// Makes room for a range of shared memory, in words: touching memory without room would kill the process.
pub type Reserve = Arc<dyn Fn(Range<usize>) -> io::Result<()> + Send + Sync>;

/// Memory that others may have used before, and may use afterwards.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) words: &'static [AtomicU64],
    pub(super) reserve: Reserve,
}
