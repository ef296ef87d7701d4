//! A simulated device: disk, guest, oracle and schedule in one thread, reproducible from a seed.

#[cfg(feature = "simulation")]
pub mod campaign;
pub mod choose;
pub mod disk;
pub mod errors;
pub mod fates;
pub mod images;
pub mod judge;
pub mod layers;
pub mod lineage;
pub mod marks;
pub mod medium;
pub mod oracle;
pub mod places;
pub mod room;
pub mod served_chain;
#[cfg(feature = "simulation")]
pub mod short_logs;
pub mod store;
pub mod tasks;
pub mod violation;
pub mod watched;
pub mod world;
