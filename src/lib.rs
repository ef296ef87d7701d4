//! A Linux block device whose blocks live in a VHDX file.
//!
//! The modules, each using only those above it in this list:
//!
//! * [`printable`]: text from elsewhere, made fit to be shown;
//! * [`error`]: the one error type;
//! * [`simulation`]: constants, but for the crash tests;
//! * [`mod@format`]: the bytes of a VHDX file, both ways, no I/O;
//! * [`disk`]: the seam under the engine, and its `io_uring` implementation;
//! * [`image`]: an opened image: geometry, block map, log replay;
//! * [`chain`]: the parents of a differencing image;
//! * [`engine`]: the live writer, and the front that serves one queue;
//! * [`operations`]: what is done to images beside serving them;
//! * [`device`]: ublk: control commands, queue loops, the daemon's life cycle;
//! * `cli`: one file per command.

pub mod chain;
pub mod design;
pub mod device;
pub mod disk;
pub mod engine;
pub mod error;
pub mod format;
pub mod image;
pub mod operations;
pub mod printable;
pub mod simulation;
