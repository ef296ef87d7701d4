//! Copies of changed pages that one sync makes durable in the log.

use super::durability::Reliance;
use crate::disk::PAGE_BYTES;
use crate::image::Page;

/// The copies are what is logged and what is written in place, never the pages themselves: those keep
/// changing, and what they hold by then may rely on payload that no sync has covered.
pub(super) struct Round {
    pub(super) pages: Vec<PageCopy>,
    /// What must be durable before an entry names the pages.
    pub(super) relies_on: Reliance,
}

/// A page as it was when its dirty mark had been cleared.
pub(super) struct PageCopy {
    pub(super) page: Page,
    pub(super) bytes: Box<[u8; PAGE_BYTES]>,
}
