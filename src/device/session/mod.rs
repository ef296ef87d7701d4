//! Session files: memory in `/run/vhdx-ublk/` that survives a killed daemon.
//!
//! There is one per image that is served for writing with recovery. It gets its name when it is complete, and
//! is removed once the image was closed cleanly. A session without a device is an *orphan*: the next opening
//! for writing takes it over.
//!
//! * Its name is the image's inode, disk id and `st_dev`. It is found by the first two: another mount may
//!   have changed the third. If the path in the session leads to another file, as on a snapshot of the whole
//!   file system, that file keeps the session.
//! * It must be gone after a power cut: its folder is memory (tmpfs), or there is no session; and it names
//!   the kernel's boot id.
//! * The process that serves with it holds its lock (`flock`), until the last thread of a killed process has
//!   ended.
//! * An orphan at rest holds nothing that its image does not. Commands that change devices remove it, unless
//!   the entry of a device may be its image's.
//! * Room is reserved before it is touched: a store into memory that the file system cannot provide would
//!   kill the daemon. A part of the file system stays free, so that a guest cannot fill it.

mod choice;
mod file;
mod list;
mod name;
mod obstacle;
mod origin;
mod room;

pub(super) use choice::choose;
pub use choice::{Plan, refuse_orphan};
pub(super) use file::{Found, FoundSession, SessionFile, Sessions};
pub use list::{Kept, KeptState, discard, kept};
pub(super) use list::{await_free, is_needed, sweep};
pub(super) use origin::place_of;
#[cfg(test)]
pub(super) use room::folder_in_memory;

#[cfg(test)]
mod orphans;
