//! The devices of this program: one small file per device in `/run/vhdx-ublk/`.
//!
//! The kernel knows devices but not images; the file names both. An entry is made as soon as the device
//! exists, and removed with the device. It counts only if the kernel's device carries the same random mark
//! and the process has the same start time. A device of this program without a readable entry is an *orphan*:
//! its daemon was killed between making the device and writing the entry, or the directory was lost. It is
//! known by its mark.
//!
//! Order: an entry is written under another name, then renamed; a reader never sees half of one. The room for
//! what must not fail is taken before (`reserved`). A process that takes a device over changes nothing in its
//! entry but the daemon until it serves: the program before can read the entry until then, whatever version
//! the new one writes.
//!
//! Invariants:
//!
//! * a reader changes nothing: where the kernel's devices cannot be seen (a container that shares the
//!   directory), entries of living devices look like those of removed ones;
//! * what else a killed process has left is removed under that lock, too, and only where the kernel reports
//!   no device of its number: whoever makes a device or its entry holds it;
//! * an entry is removed only with its mark, under the directory's lock, once the kernel reports that there
//!   is no device with that number and mark: a device added between the check and the removal keeps its own.

mod entry;
mod request;
mod reserved;
mod sight;
mod store;
mod survey;

pub(super) use entry::mount_namespace;
pub use entry::{ENTRY_FORMAT, Entry, MergeUnderWay};
pub(super) use request::EndRequest;
pub(super) use reserved::FILE_MODE;
pub use reserved::Reserved;
pub(super) use sight::Sight;
pub use sight::State;
pub use store::{Locked, RUN_DIRECTORY, Registry, Unreadable};
pub use survey::{Listed, Survey};

pub use super::process::{Life, ProcessId};

#[cfg(test)]
pub(crate) use entry::tests::entry;
