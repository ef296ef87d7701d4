//! What is done to images, beside serving them.
//!
//! An operation finds its images, locks them, refuses what it must not do, and does it; the command line says what is
//! wanted and shows what was done.

pub mod merge;
