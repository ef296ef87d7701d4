//! Files that are no good images: each is refused, by file, structure and remedy, and not changed.

use std::fs;

use super::{Bench, MIB, Snapshot, on};

/// Where `create` puts things in an image of 64 MiB with blocks of 1 MiB.
pub const HEADERS: [usize; 2] = [64 << 10, 128 << 10];
pub const REGION_TABLES: [usize; 2] = [192 << 10, 256 << 10];
pub const LOG: usize = 1 << 20;
pub const METADATA: usize = 2 << 20;
pub const BAT: usize = 3 << 20;
pub const END: usize = 4 << 20;

/// Within the metadata region: the items, in the order they are written.
pub const BLOCK_SIZE: usize = METADATA + (64 << 10);
pub const VIRTUAL_SIZE: usize = BLOCK_SIZE + 8;

pub const PRESENT: u64 = 6;

pub type Bytes = Vec<u8>;

/// What is done to a good image; the kind of the error; the structure it names; a part of its message.
type Case = (&'static str, fn(&mut Bytes), &'static str, Option<&'static str>, &'static str);

const CASES: [Case; 31] = [
    ("text", |b| *b = b"What is this?".repeat(9000), "not-vhdx", None, "does not begin with"),
    (
        "a lost signature",
        |b| b[..8].fill(0),
        "corrupt",
        Some("file identifier"),
        "first bytes were overwritten",
    ),
    ("no headers, no signature", no_front, "corrupt", Some("file identifier"), "both headers are damaged"),
    ("btrfs", |b| raw(b, 65600, b"_BHRfS_M"), "not-vhdx", None, "btrfs"),
    ("a fixed VHD", |b| raw(b, END - 512, b"conectix"), "not-vhdx", None, "a fixed VHD"),
    ("empty", Bytes::clear, "not-vhdx", None, "not a VHDX"),
    ("a qcow2 image", |b| raw(b, 0, b"QFI\xfb"), "not-vhdx", None, "qcow2"),
    ("cut in the header section", |b| b.truncate(100 << 10), "", None, ""),
    ("cut in the log", |b| b.truncate(LOG + 4096), "truncated", Some("log"), "ends at byte"),
    ("cut in the metadata", |b| b.truncate(METADATA + 4096), "truncated", Some("region"), "ends at byte"),
    ("cut in the BAT", |b| b.truncate(BAT + 4096), "truncated", Some("region"), "ends at byte"),
    (
        "both headers damaged",
        |b| HEADERS.iter().for_each(|at| b[at + 100] ^= 1),
        "corrupt",
        Some("headers"),
        "checksum",
    ),
    (
        "both region tables damaged",
        |b| REGION_TABLES.iter().for_each(|at| b[at + 100] ^= 1),
        "corrupt",
        Some("region tables"),
        "checksum",
    ),
    (
        "another version",
        |b| headers(b, 66, &2_u16.to_le_bytes()),
        "unsupported",
        Some("header 1"),
        "version 2",
    ),
    ("an absurd log", |b| headers(b, 68, &0xfff0_0000_u32.to_le_bytes()), "", Some("header 2"), ""),
    ("a log far away", |b| headers(b, 72, &(1_u64 << 62).to_le_bytes()), "", None, ""),
    ("a log without entries that are valid", garbage_log, "corrupt", Some("log"), "no valid sequence"),
    (
        "absurdly many regions",
        |b| regions(b, 8, &u32::MAX.to_le_bytes()),
        "corrupt",
        Some("region table 1"),
        "",
    ),
    ("an unknown region that is required", unknown_region, "unsupported", Some("region table 1"), ""),
    (
        "absurdly many items",
        |b| put(b, METADATA + 10, &u16::MAX.to_le_bytes()),
        "corrupt",
        Some("metadata"),
        "",
    ),
    ("an unknown item that is required", unknown_item, "unsupported", Some("metadata"), ""),
    ("no metadata", |b| b[METADATA..BAT].fill(0), "corrupt", Some("metadata"), ""),
    (
        "blocks of 0 bytes",
        |b| put(b, BLOCK_SIZE, &0_u32.to_le_bytes()),
        "corrupt",
        Some("metadata"),
        "blocks of 0 bytes",
    ),
    (
        "blocks of 3 MiB",
        |b| put(b, BLOCK_SIZE, &(3_u32 << 20).to_le_bytes()),
        "corrupt",
        Some("metadata"),
        "blocks of",
    ),
    (
        "an absurd size",
        |b| put(b, VIRTUAL_SIZE, &u64::MAX.to_le_bytes()),
        "corrupt",
        Some("metadata"),
        "virtual disk",
    ),
    (
        "more blocks than the BAT has",
        |b| put(b, VIRTUAL_SIZE, &(1_u64 << 45).to_le_bytes()),
        "corrupt",
        Some("BAT"),
        "",
    ),
    (
        "blocks that overlap",
        |b| {
            block(b, 0, (5 * MIB) | PRESENT);
            block(b, 9, (5 * MIB) | PRESENT);
        },
        "corrupt",
        Some("BAT"),
        "shares",
    ),
    ("a block in the log", |b| block(b, 3, MIB | PRESENT), "corrupt", Some("BAT"), "shares"),
    (
        "a block behind the end",
        |b| block(b, 3, (1 << 40) | PRESENT),
        "truncated",
        Some("BAT"),
        "block 3 lies at byte",
    ),
    ("cut inside a block", cut_inside_a_block, "truncated", Some("BAT"), "block 3 needs the file up to byte"),
    ("a state that does not exist", |b| block(b, 3, 4), "corrupt", Some("BAT"), "block 3"),
];

/// Zeros, and what some other format has in one place.
fn raw(bytes: &mut Bytes, at: usize, magic: &[u8]) {
    bytes.fill(0);
    put(bytes, at, magic);
}

fn no_front(bytes: &mut Bytes) {
    bytes[..REGION_TABLES[0]].fill(0xee);
}

pub fn put(bytes: &mut Bytes, at: usize, with: &[u8]) {
    bytes[at..at + with.len()].copy_from_slice(with);
}

/// Changes both headers, and renews their checksums.
pub fn headers(bytes: &mut Bytes, at: usize, with: &[u8]) {
    for start in HEADERS {
        put(bytes, start + at, with);
        seal(&mut bytes[start..start + 4096]);
    }
}

/// Changes both region tables, and renews their checksums.
pub fn regions(bytes: &mut Bytes, at: usize, with: &[u8]) {
    for start in REGION_TABLES {
        put(bytes, start + at, with);
        seal(&mut bytes[start..start + (64 << 10)]);
    }
}

pub fn seal(structure: &mut [u8]) {
    structure[4..8].fill(0);
    let checksum = crc32c::crc32c(structure);
    structure[4..8].copy_from_slice(&checksum.to_le_bytes());
}

pub fn garbage_log(bytes: &mut Bytes) {
    headers(bytes, 48, &[7; 16]);
    put(bytes, LOG, b"loge");
    put(bytes, LOG + 32, &[7; 16]);
}

pub fn unknown_region(bytes: &mut Bytes) {
    regions(bytes, 8, &3_u32.to_le_bytes());
    let place =
        [&[9; 16][..], &(END as u64).to_le_bytes(), &(1_u32 << 20).to_le_bytes(), &1_u32.to_le_bytes()]
            .concat();
    regions(bytes, 16 + 2 * 32, &place);
}

pub fn unknown_item(bytes: &mut Bytes) {
    const REQUIRED: u32 = 1 << 2;
    let count = u16::from_le_bytes([bytes[METADATA + 10], bytes[METADATA + 11]]);
    put(bytes, METADATA + 10, &(count + 1).to_le_bytes());
    let numbers = [512_u32 << 10, 8, REQUIRED, 0].map(u32::to_le_bytes).concat();
    put(bytes, METADATA + 32 + 32 * usize::from(count), &[&[9; 16][..], &numbers].concat());
}

/// Sets the BAT entry of a block, in a file that has room for it.
pub fn block(bytes: &mut Bytes, index: usize, entry: u64) {
    bytes.resize(END + (16 << 20), 0);
    put(bytes, BAT + 8 * index, &entry.to_le_bytes());
}

fn cut_inside_a_block(bytes: &mut Bytes) {
    block(bytes, 3, (END as u64 + 15 * MIB) | PRESENT);
    bytes.truncate(END + 15 * (1 << 20) + (512 << 10));
}

#[test]
fn damaged_images_are_refused_by_name_and_not_changed() {
    let bench = Bench::new();
    let good = bench.image("good.vhdx", &["--size", "64M", "--block-size", "1M"]);
    let good = fs::read(good).expect("readable");
    assert_eq!(good.len(), END, "the layout is the one this test knows");
    let image = bench.path("bad.vhdx");
    for (name, damage, kind, structure, part) in CASES {
        let mut bytes = good.clone();
        damage(&mut bytes);
        fs::write(&image, &bytes).expect("room");
        let before = Snapshot::of(&image);
        let error = on("info", &image, &["--json"]).failed_as_json();
        let message = error["message"].as_str().expect("text");
        assert!(message.contains("bad.vhdx") && message.contains(part), "{name}: {message}");
        assert!(kind.is_empty() || error["kind"] == kind, "{name}: {error}");
        assert!(
            structure.is_none_or(|wanted| error["structure"].as_str().is_some_and(|s| s.starts_with(wanted))),
            "{name}: {error}"
        );
        assert!(error["remedy"].as_str().is_some_and(|remedy| !remedy.is_empty()), "{name}: {error}");
        let told = on("info", &image, &[]).failed(1);
        assert!(told.contains(message), "{name}: {told}");
        for options in [&[][..], &["--read-only"]] {
            let told = on("add", &image, options).failed(1);
            assert!(told.contains(&*message.replace(&*image.to_string_lossy(), "")), "{name}: {told}");
        }
        before.assert_kept(&image);
    }
}
