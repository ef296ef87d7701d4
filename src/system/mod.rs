//! The machine around the devices: what is done with a device once it is there, and what the system knows of
//! the devices.
//!
//! It may use everything below it, and only `cli` uses it.
