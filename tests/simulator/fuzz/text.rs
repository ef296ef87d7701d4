//! Bytes that readers of small things get: locators, registry entries, lines of the control socket, sizes,
//! maps of drives.
//!
//! * They are understood or refused, in memory that is bounded by their own length.
//! * What is understood is written as it was read.

use std::hash::{DefaultHasher, Hash, Hasher};

use vhdx_ublk::chain::PathMap;
use vhdx_ublk::device::registry::Entry;
use vhdx_ublk::device::socket::Command;
use vhdx_ublk::format::locator::{PARENT_LINKAGE, ParentLocator, RELATIVE_PATH};

use super::target::{Case, Outcome, Target, any_bytes};
use crate::memory::peak_of;
use crate::size;

pub const TARGET: Target = Target {
    name: "text",
    seeds,
    change_bytes: any_bytes,
    run: |case, _| run(&case.bytes),
    endings: &["nothing", "a locator", "an entry", "a command", "a size", "a map"],
};

/// Memory that a reader takes beyond a multiple of what it reads, bytes.
const SLACK: u64 = 64 << 10;

/// How much more than its text a value may take: keys of 1 byte in maps, strings of UTF-16 that become UTF-8.
const FACTOR: u64 = 64;

fn seeds() -> Vec<Case> {
    let mut locator = ParentLocator::default();
    locator.set(PARENT_LINKAGE, "{00000000-0000-0000-0000-000000000006}");
    locator.set(RELATIVE_PATH, ".\\parent.vhdx");
    let entry = r#"{"id":0,"device":"/dev/ublkb0","image":"/a.vhdx","image_file":{"device":1,"inode":2},
        "parents":[],"daemon":{"pid":1,"start_time":2},"queues":1,"depth":64,
        "size_bytes":1048576,"read_only":false,"recovery":"reissue","zero_copy":false,
        "file_write_guid":"00000000-0000-0000-0000-000000000006","mark":7,"version":"0.1.0",
        "started":true,"failure":null}"#;
    let texts = [
        locator.encode(),
        entry.into(),
        br#"{"snapshot":{"image":"/disks/monday.vhdx"}}"#.to_vec(),
        b"64KiB".to_vec(),
        b"10G".to_vec(),
        b"C:\\=/mnt/c".to_vec(),
        Vec::new(),
    ];
    texts.into_iter().map(|bytes| Case { files: Vec::new(), bytes }).collect()
}

fn run(bytes: &[u8]) -> Outcome {
    let (ending, peak) = peak_of(|| read(bytes));
    let bound = SLACK + FACTOR * bytes.len() as u64;
    assert!(peak <= bound, "{} bytes take {peak}, the bound is {bound}", bytes.len());
    let mut shape = DefaultHasher::new();
    (ending, bytes.len().checked_ilog2()).hash(&mut shape);
    Outcome { ending, signature: shape.finish(), peak }
}

/// What the bytes are, of what is read here.
fn read(bytes: &[u8]) -> &'static str {
    if let Ok(locator) = ParentLocator::parse(bytes) {
        let again = ParentLocator::parse(&locator.encode()).expect("what was read can be written");
        assert_eq!(again, locator);
        return "a locator";
    }
    if let Ok(entry) = serde_json::from_slice::<Entry>(bytes) {
        let text = serde_json::to_vec(&entry).expect("what was read can be written");
        assert_eq!(serde_json::from_slice::<Entry>(&text).expect("what was written can be read"), entry);
        return "an entry";
    }
    if let Ok(command) = serde_json::from_slice::<Command>(bytes) {
        let text = serde_json::to_vec(&command).expect("what was read can be written");
        assert_eq!(serde_json::from_slice::<Command>(&text).expect("what was written can be read"), command);
        return "a command";
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return "nothing" };
    if let Ok(bytes) = size::parse(text) {
        assert_eq!(size::parse(&bytes.to_string()), Ok(bytes));
        let _ = (
            size::parse_disk(text),
            size::parse_block(text),
            size::parse_log(text),
            vhdx_ublk::printable::both_sizes(bytes),
        );
        return "a size";
    }
    if text.parse::<PathMap>().is_ok() { "a map" } else { "nothing" }
}
