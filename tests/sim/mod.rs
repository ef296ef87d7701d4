//! A simulated device: disk, guest, oracle and schedule in one thread, reproducible from a seed.

pub mod disk;
pub mod oracle;
pub mod store;
pub mod tasks;
pub mod world;
