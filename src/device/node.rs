//! The nodes of a device in `/dev`, which appear and go asynchronously.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::control::POLL_INTERVAL;
use super::registry::Entry;
use crate::error::{Error, Kind, Result};
use crate::machine;

/// How long a device node may take to appear: none in devtmpfs, longer where a program makes it.
const NODE_DEADLINE: Duration = Duration::from_secs(5);

/// How long the device node may stay after the device has gone.
const GONE_DEADLINE: Duration = Duration::from_secs(5);

/// A kind of device node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Character,
    Block,
}

/// Opens a device node as soon as it can be opened: a character device for the server, to write; a block
/// device only to check that others can open it.
pub(super) fn await_node(path: &Path, node: Node) -> Result<File> {
    let until = machine::now() + NODE_DEADLINE;
    loop {
        let error = match open_node(path, node) {
            Ok(file) => return Ok(file),
            Err(error) => error,
        };
        if machine::now() >= until {
            let seconds = NODE_DEADLINE.as_secs();
            return Err(Error::io(format!("opening the device node for {seconds} s"), error)
                .file(path)
                .remedy("check that /dev is a devtmpfs, or that udev is running"));
        }
        machine::pause(POLL_INTERVAL);
    }
}

fn open_node(path: &Path, node: Node) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(node == Node::Character).open(machine::node(path))?;
    let kind = file.metadata()?.file_type();
    let is_right = machine::folder().is_some()
        || match node {
            Node::Character => kind.is_char_device(),
            Node::Block => kind.is_block_device(),
        };
    if is_right { Ok(file) } else { Err(io::Error::other("it is no device of the right kind")) }
}

/// Waits until the node of a device that the kernel has removed is gone, too.
pub(super) fn await_node_gone(entry: &Entry) -> Result<()> {
    let until = machine::now() + GONE_DEADLINE;
    let block = PathBuf::from(format!("/sys/class/block/ublkb{}", entry.id));
    // A device with the same number may be made at any moment: then the kernel has one, and this one is gone.
    let is_there = || fs::metadata(&entry.device).is_ok_and(|found| found.file_type().is_block_device());
    while is_there() && !block.exists() {
        if machine::now() >= until {
            let message = format!("{} is still there, though the device is gone", entry.device.display());
            return Err(Error::new(Kind::Io, message).remedy(format!("rm {}", entry.device.display())));
        }
        machine::pause(POLL_INTERVAL);
    }
    Ok(())
}
