//! Chains: the parents of a differencing image, found, recognised and opened.
//!
//! A child knows its parent by paths, which may have gone stale, and by the DataWriteGuid that the parent had when
//! the child was made, which decides: a parent that was written since would show the child's reader a disk that
//! never was.

mod children;
mod kinship;
mod open;
mod path;
mod search;

pub use children::{MAX_NEIGHBOURS, children_beside, is_child, is_made_of};
pub use kinship::{descent, descent_of, direct, redirected, relinked};
pub use open::{Known, Layer, MAX_CHAIN_BYTES, MAX_DEPTH, Relative, follow_parents, open_parents};
pub use path::{FileIdentity, PathMap, identity, same_file};
pub use search::Search;
