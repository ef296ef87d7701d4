//! What can be tested without a device. Most of it runs the engine on a simulated disk (`sim`), under a guest
//! that is made from a seed; a module's head names the promise that it defends. It is one program, so that
//! the simulator is compiled once.
#![cfg_attr(
    not(feature = "simulation"),
    allow(dead_code, reason = "the crash tests need the rest of the simulator")
)]

mod amend;
mod chain;
mod compact;
mod contents;
mod counters;
mod craft;
#[cfg(feature = "simulation")]
mod crash;
mod faults;
mod fuzz;
mod golden;
mod hit_path;
mod hostile;
mod interop;
mod live_merge;
mod loopback;
#[allow(unsafe_code, reason = "a global allocator is unsafe by its trait")]
mod memory;
mod merge;
mod move_chain;
#[cfg(feature = "simulation")]
mod plants;
mod qemu;
mod repair;
mod replay;
mod resize;
mod salvage;
mod sim;
#[allow(dead_code, reason = "the program prints sizes, too")]
#[path = "../../src/cli/size.rs"]
mod size;
#[path = "../skip/mod.rs"]
mod skip;
mod trim;
mod upgrade;

/// Counts for `hit_path` and `hostile`, by thread.
#[global_allocator]
static ALLOCATOR: memory::Counting = memory::Counting;
