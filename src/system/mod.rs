//! The machine around the devices: what is done with a device once it is there, and what the system knows of
//! the devices.
//!
//! * [`private_device`]: a device that this process alone uses, and that ends with it;
//! * `device_disk`, `node`: what is on a device, and the nodes of its partitions;
//! * `driver`, `mounted`: how the kernel reads each file system, and a mount that no other process sees;
//! * [`trim`]: the free space of the file systems on a device.
//!
//! It may use everything below it, and only `cli` uses it.

mod device_disk;
mod driver;
mod mounted;
mod node;
pub mod private_device;
pub mod trim;
