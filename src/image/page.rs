//! The pages of metadata that change while an image is served.

/// One of them, as the log carries it: 4096 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Page {
    /// Of the bitmap of a chunk.
    Bitmap {
        /// The chunk.
        chunk: u64,
        /// The page of its bitmap.
        page: u64,
    },
    /// Of the BAT.
    Bat(u64),
}
