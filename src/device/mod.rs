//! ublk: control commands, queue loops, the daemon's life cycle.
//!
//! * [`daemon`]: one device from `ADD_DEV` to `DEL_DEV`, in the process that serves it;
//! * [`confine`]: what that process keeps of its caller's and of root's power; `ending`: what it makes of signals;
//! * [`mailbox`]: what joins its queues to the engine;
//! * [`engine_thread`]: the engine of a writable device, on a thread of its own;
//! * [`opened`]: an image checked and ready to be served;
//! * [`snapshot`]: how the image of a device becomes the parent of a new one while it is served; `maker`: by whom that
//!   is made; `place`: where it may lie;
//! * [`launch`]: how that process is started, and how it reports; [`socket`]: how it is told what to do;
//! * [`registry`], [`stop`], [`usage`], [`features`], [`health`]: what other processes see and do; [`path`]: paths in JSON.
//!
//! Beneath: `control` (the driver's commands), `queue` (one thread per queue), `queues` (all of them), `ring` (a
//! queue's `io_uring`), `data` (where the data of its requests is), and the pure parts, `descriptor`, `options`
//! and `token`. Raw system calls are in `control`, `data`, `ring` and `sys` only. `libublk` gives the kernel's structures and numbers.

pub mod confine;
mod control;
pub mod daemon;
mod data;
mod descriptor;
mod ending;
pub mod engine_thread;
pub mod features;
mod fronts;
pub mod health;
pub mod launch;
pub mod layers;
mod leaf;
pub mod mailbox;
mod maker;
pub mod opened;
mod options;
pub mod order;
pub mod path;
mod place;
mod process;
mod queue;
mod queues;
pub mod readers;
pub mod registry;
mod ring;
pub mod served;
mod serving;
pub mod session;
pub mod snapshot;
pub mod socket;
pub mod stop;
mod sys;
mod token;
pub mod usage;
mod wire;

pub use control::{Control, DeviceInfo, KernelState, NewDevice};
pub use options::{
    MAX_BUFFER_BYTES, MAX_DEPTH, MAX_ID, MAX_QUEUES, MAX_REQUEST_BYTES, MIN_REQUEST_BYTES, Options,
    Parameters, Recovery, ZeroCopy,
};
