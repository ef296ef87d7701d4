//! The machine around the devices: what is done with a device once it is there, and what the system knows of
//! the devices.
//!
//! * [`private_device`]: a device that this process alone uses, and that ends with it;
//! * `device_disk`, `node`: what is on a device, and the nodes of its partitions;
//! * [`program`]: how the machine's own programs are run; [`module`]: the kernel's driver, loaded by one of
//!   them;
//! * `btrfs`: the devices that the kernel would join with those of an image;
//! * `driver`, `mounted`: how the kernel reads each file system, and a mount that no other process sees;
//! * [`mount`]: mounting the file system of an image, and unmounting it;
//! * [`trim`], [`trim_record`], `volume_trim`: the free space of the file systems on a device, how far it is
//!   given up, and what has become of each;
//! * [`grow`]: the file system at the end of a disk that has grown;
//! * [`doctor`], [`metrics`]: whether a machine and an image are fit for use; what devices have done, for
//!   monitoring;
//! * [`table`], [`units`], `escape`: the disks that are served from boot on, and what systemd learns of them;
//! * `lock`: one mount, or change of the table, at a time.
//!
//! It may use everything below it, and only `cli` uses it.

mod btrfs;
pub mod device_disk;
pub mod doctor;
mod driver;
mod escape;
pub mod grow;
mod lock;
pub mod metrics;
pub mod module;
pub mod mount;
mod mounted;
mod node;
pub mod private_device;
pub mod program;
pub mod table;
pub mod trim;
pub mod trim_record;
pub mod units;
mod volume_trim;
