//! Hostile input: made from good input by mutators that know the structures, and judged by what the program
//! does with it. One target per way in; `target` says what one is, `hunt` looks for input that breaks a
//! promise.

pub mod chain;
pub mod compact;
pub mod corpus;
#[allow(unsafe_code, reason = "the compiler's counters are raw memory")]
pub mod coverage;
pub mod hunt;
pub mod mend;
pub mod merge;
pub mod mutator;
pub mod probe;
pub mod resize;
pub mod salvage;
pub mod search;
pub mod session;
pub mod target;
pub mod text;
pub mod trial;
