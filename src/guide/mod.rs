//! The guide: tasks around a device that take more than one command.
//!
//! | page | task |
//! |---|---|
//! | [`wsl`] | Mount the disk of a WSL distribution, or any other image. |
//! | [`rescue`] | Rescue files from a chain of Hyper-V. |
//! | [`boot`] | Serve a disk from boot on, and mount it by `/etc/fstab`. |
//! | [`shrink`] | Make an image smaller. |
//! | [`grow`] | Make a disk larger. |
//! | [`backup`] | Back a disk up in increments, while it is in use. |
//! | [`guest`] | Run a guest on an image. |
//! | [`windows`] | Move an image to Windows, Hyper-V, WSL or Azure. |
//! | [`export`] | Give a device to another machine, by NVMe over TCP or iSCSI. |
//! | [`upgrade`] | Replace the program while its devices are in use. |
//! | [`watch`] | See what a device does, and what to do when something is wrong. |
//! | [`network_images`] | Keep the file of an image on NFS or SMB. |
//! | [`json`] | Use the commands from a program. |
//! | [`kubernetes`] | Give a device to a pod. |
//!
//! `vhdx-ublk help TASK` shows them. Each command is explained by its own `--help`; the reasons are in
//! [`design`](crate::design).

#[doc = include_str!("wsl.md")]
pub mod wsl {}

#[doc = include_str!("rescue.md")]
pub mod rescue {}

#[doc = include_str!("boot.md")]
pub mod boot {}

#[doc = include_str!("export.md")]
pub mod export {}

#[doc = include_str!("upgrade.md")]
pub mod upgrade {}

#[doc = include_str!("watch.md")]
pub mod watch {}

#[doc = include_str!("network-images.md")]
pub mod network_images {}

#[doc = include_str!("kubernetes.md")]
pub mod kubernetes {}

#[doc = include_str!("shrink.md")]
pub mod shrink {}

#[doc = include_str!("grow.md")]
pub mod grow {}

#[doc = include_str!("backup.md")]
pub mod backup {}

#[doc = include_str!("guest.md")]
pub mod guest {}

#[doc = include_str!("windows.md")]
pub mod windows {}

#[doc = include_str!("json.md")]
pub mod json {}
