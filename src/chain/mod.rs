//! Chains: the parents of a differencing image, found, recognised and opened.
//!
//! A child knows its parent by paths, which may have gone stale, and by the DataWriteGuid that the parent had when
//! the child was made, which decides: a parent that was written since would show the child's reader a disk that
//! never was.

mod kinship;
mod open;
mod path;
mod search;

pub use kinship::{descent, direct, is_child, redirected, relinked};
pub use open::{Layer, MAX_DEPTH, open_parents};
pub use path::{PathMap, same_file};
pub use search::Search;
