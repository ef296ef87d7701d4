//! What a successor finds in the memory of a killed process and not in the file.

use std::collections::BTreeSet;

use super::page::Page;
use super::space::Extent;

/// What a killed process left to be committed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pending {
    /// Pages that differ from the file's.
    pub pages: BTreeSet<Page>,
    /// Chunks whose sector bitmaps no durable entry names yet.
    pub bitmaps: BTreeSet<u64>,
    /// Space that the file still names and the memory does not.
    pub unmapped: Vec<Extent>,
    /// The session was open: zeros may have been granted that no sync covers.
    pub resumed: bool,
    /// The disk has just become larger in a session: what that session left unused in the file is to be given
    /// back when the image is closed.
    pub grown: bool,
}
