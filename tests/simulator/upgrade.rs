//! Promises defended here: while a device changes its program, one process at a time writes the image, and
//! the program before can take the device back until the new one serves it.

use std::fs;
use std::time::Duration;

use vhdx_ublk::device::registry::{Entry, ProcessId, Registry, Reserved};
use vhdx_ublk::disk::{Access, ImageFile};

use crate::sim::violation::violated;

/// The daemon's last request may end after its process: only then another one writes.
#[test]
pub fn a_successor_writes_when_the_daemon_has_left_the_image() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("disk.vhdx");
    fs::write(&path, "content").expect("room");
    let daemon = ImageFile::open(&path, Access::ReadWrite, Duration::ZERO).expect("it is free");
    let successor = ImageFile::open_beside(&path).expect("a daemon leaves room for its successor");
    if successor.become_writer(Duration::ZERO).is_ok() {
        violated("two processes write one image".into());
    }
    drop(daemon);
    successor.become_writer(Duration::from_secs(10)).expect("the daemon has left");
}

/// Each program writes entries of its own version, which the one before may not read.
#[test]
pub fn the_entry_stays_that_of_the_program_before_until_the_device_is_served() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let registry = Registry::at(&folder.path().join("run")).expect("a folder is made");
    let text = include_str!("../formats/entry-1.json");
    let entry: Entry = serde_json::from_str(text).expect("it is read");
    let path = folder.path().join("run").join(format!("{}.json", entry.id));
    let of_before = text.replacen('{', "{\n  \"known_before\": true,", 1);
    fs::write(&path, of_before).expect("room");
    let daemon = ProcessId { pid: 77, start_time: 1, namespace: 0 };
    registry.name_daemon(&entry, daemon, &mut Reserved::default()).expect("it is written");
    let found: serde_json::Value =
        serde_json::from_slice(&fs::read(&path).expect("it is there")).expect("it is whole");
    if found["known_before"] != true {
        violated("the successor has replaced an entry that only the program before understands".into());
    }
    assert_eq!(found["daemon"]["pid"], 77, "the successor is the daemon");
}
