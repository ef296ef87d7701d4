//! Chains: the parents of a differencing image, found, recognised and opened.
//!
//! A child knows its parent by paths, which may have gone stale, and by the DataWriteGuid that the parent had
//! when the child was made, which decides: a parent that was written since would show the child's reader a
//! disk that never was.

mod children;
mod content;
mod looks;
mod member;
mod open;
mod parent_ref;
mod path;
mod relative;
mod search;

pub use children::{MAX_NEIGHBOURS, children_beside, is_child};
pub use content::{Content, ReadLayer, locate_in_layers};
pub use looks::{Looks, MAX_NAMES};
pub use member::Member;
pub use open::{MAX_CHAIN_BYTES, MAX_DEPTH, follow_parents, open_parents};
pub use parent_ref::{parent_ref, parent_ref_of, point_to, with_found_path, with_parent};
pub use path::{PathMap, same_file};
pub use relative::{Known, Layer, Relative, is_made_of};
pub use search::{Search, is_direct};
