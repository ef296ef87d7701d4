//! Hostile images: made from good ones by a mutator that knows the structures, and judged by what opening them
//! and writing to them does.

pub mod corpus;
#[allow(unsafe_code, reason = "the compiler's counters are raw memory")]
pub mod coverage;
pub mod mutator;
pub mod probe;
pub mod trial;
