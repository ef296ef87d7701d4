//! Merging a child into an image further down its chain.

mod layers;

pub use layers::{Files, Merge, check};
