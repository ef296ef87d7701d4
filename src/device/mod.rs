//! ublk: control commands, queue loops, the daemon's life.
//!
//! One device, in the process that serves it, from the kernel to the daemon:
//!
//! * `control`, `options`, [`features`]: the driver's commands, and the choices for a device;
//! * [`mailbox`], `leaf_handover`: what joins the queues to the engine;
//! * `queue`: a thread per queue, between the kernel and its front;
//! * [`session`], [`layers`], [`open_image`], `writable`: an image checked and ready to be served;
//! * `fronts`, `served_image`, `snapshot`, `grow`, [`engine_thread`]: the engine of a writable device, on its
//!   own thread; how its image becomes the parent of a new one, or its disk larger, while it is served;
//! * `order`, `reply`, [`socket`]: how a running daemon gets commands;
//!   [`reclaim`]: which one it gives itself; [`stats`]: what it has done;
//! * [`spec`], `ending`, `supervisor`, [`daemon`]: the device from `ADD_DEV` to `DEL_DEV`;
//! * `handover`, [`upgrade`], `service_manager`: how another program takes the device over while it is in
//!   use, and who learns of that;
//! * [`confine`], [`launch`]: the privileges of that process, and how it is started and reports; [`respawn`]:
//!   how it is started again when it dies; [`log_file`], [`warnings`]: what it warns of.
//!
//! What other processes see and do: [`registry`], [`usage`], [`stop`], [`leftovers`], [`health`],
//! [`claims`]; how data travels between processes: [`path`], `wire`; what the kernel reports of the machine,
//! and a daemon's view of it: `process`, `processes`, [`mounts`], [`private_mounts`], `sysfs`; and the nodes
//! in `/dev`: `node`, [`name`], `links`. No two files use each other.
//!
//! Unsafe code is in `control`, `queue::ring`, `queue::buffers`, `region` and `sys` only. `libublk` gives the
//! kernel's structures and numbers.

mod caller;
pub mod claims;
mod compact;
pub mod confine;
mod control;
pub mod daemon;
mod ending;
pub mod engine_thread;
mod errands;
mod exchange;
pub mod features;
pub mod freeze;
mod fronts;
mod grow;
mod handover;
pub mod health;
pub mod image_name;
pub mod job;
pub mod launch;
pub mod layers;
mod leaf_handover;
pub mod leftovers;
mod links;
pub mod log_file;
pub mod mailbox;
mod merge;
pub mod mounts;
pub mod name;
mod node;
mod number;
pub mod open_image;
mod options;
pub mod order;
pub mod path;
pub mod private_mounts;
mod process;
mod processes;
mod queue;
pub mod reclaim;
mod region;
pub mod registry;
mod reply;
pub mod respawn;
pub mod salvaged;
mod served_image;
pub mod service_manager;
pub mod session;
mod snapshot;
pub mod socket;
pub mod spare_buffers;
pub mod spec;
pub mod stats;
pub mod stop;
mod supervisor;
mod sys;
mod sysfs;
#[cfg(test)]
mod testing;
pub mod upgrade;
pub mod usage;
pub mod warnings;
mod wire;
mod writable;

pub use control::{Control, DeviceInfo, KernelState, NewDevice, Surroundings};
pub use options::{
    MAX_BUFFER_BYTES, MAX_DEPTH, MAX_ID, MAX_QUEUES, MAX_REQUEST_BYTES, MIN_REQUEST_BYTES, OnFull, Options,
    Parameters, Recovery, Salvage, ZeroCopy,
};
pub use sys::{btrfs_devices, trim_file_system};
pub use sysfs::device_number;
