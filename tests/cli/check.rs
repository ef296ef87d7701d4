//! Every fault is found, by structure and place, and not by one byte changed; what can be mended without
//! guessing is mended, and nothing else.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use uuid::Uuid;
use vhdx_ublk::disk::{Access, ImageFile};
use vhdx_ublk::format::locator::{PARENT_LINKAGE, ParentLocator, RELATIVE_PATH};
use vhdx_ublk::format::log::{Change, NewEntry};
use vhdx_ublk::format::metadata::Metadata;

use super::damage::{
    BAT, BLOCK_SIZE, Bytes, END, HEADERS, LOG, METADATA, PRESENT, REGION_TABLES, VIRTUAL_SIZE, block,
    garbage_log, headers, put, regions, seal, unknown_region,
};
use super::{Bench, MIB, Ran, Snapshot, has, images, on, qemu, run, skipped};

/// Exit statuses.
const SOUND: i32 = 0;
const UNKNOWN: i32 = 1;
const UNSOUND_CHAIN: i32 = 1;
const CORRUPT: i32 = 2;
const LEAKING: i32 = 3;

/// The state of a block that is in this file only in part.
const PARTIAL: u64 = 7;

/// Blocks of a chunk; the slot of its sector bitmap.
const CHUNK: usize = 4096;

const LOG_GUID: Uuid = Uuid::from_u128(0x1234_5678);

/// What a child of these tests knows its parent by, and where that has it in its headers.
const LINKAGE: Uuid = Uuid::from_u128(1);
const DATA_WRITE_GUID: usize = 32;

type Damage = fn(&mut Bytes);

/// What is done to a good image; the exit status of `check`, the structure it names, where, a part of what it
/// says; the exit status after `--repair`.
type Case = (&'static str, Damage, i32, &'static str, usize, &'static str, i32);

const CASES: [Case; 41] = [
    ("no signature", |b| b[..8].fill(0xee), CORRUPT, "file identifier", 0, "signature is missing", SOUND),
    ("64 KiB gone", |b| b[..64 << 10].fill(0), CORRUPT, "file identifier", 0, "are intact", SOUND),
    ("header 1 bad", |b| b[HEADERS[0] + 100] ^= 1, CORRUPT, "header 1", HEADERS[0], "checksum", SOUND),
    ("header 2 bad", |b| b[HEADERS[1] + 100] ^= 1, CORRUPT, "header 2", HEADERS[1], "checksum", SOUND),
    ("no header", no_header, CORRUPT, "headers", HEADERS[0], "neither header", CORRUPT),
    ("twin headers", twin_headers, SOUND, "headers", HEADERS[0], "the same", SOUND),
    ("equal numbers", equal_numbers, CORRUPT, "headers", HEADERS[0], "neither is newer", CORRUPT),
    ("table 1 bad", |b| b[REGION_TABLES[0] + 9] ^= 1, CORRUPT, "region table 1", REGION_TABLES[0], "", SOUND),
    ("table 2 bad", |b| b[REGION_TABLES[1] + 9] ^= 1, CORRUPT, "region table 2", REGION_TABLES[1], "", SOUND),
    ("tables differ", tables_differ, CORRUPT, "region table 2", REGION_TABLES[1], "differs", CORRUPT),
    (
        "region bits",
        |b| regions(b, 45, &[1]),
        CORRUPT,
        "region tables",
        REGION_TABLES[0] + 45,
        "reserved",
        SOUND,
    ),
    (
        "region bits, one bad",
        region_bits_and_a_bad_copy,
        CORRUPT,
        "region table 1",
        REGION_TABLES[0],
        "",
        SOUND,
    ),
    ("metadata bits", |b| put(b, METADATA + 60, &[1]), CORRUPT, "metadata table", METADATA + 60, "", SOUND),
    ("no metadata", |b| b[METADATA..BAT].fill(0), CORRUPT, "metadata table", METADATA, "signature", CORRUPT),
    ("blocks of 3 MiB", |b| put(b, BLOCK_SIZE, &[0, 0, 0x30, 0]), CORRUPT, "metadata", METADATA, "", CORRUPT),
    (
        "a small BAT",
        |b| put(b, VIRTUAL_SIZE, &(1_u64 << 45).to_le_bytes()),
        CORRUPT,
        "BAT",
        BAT,
        "needs",
        CORRUPT,
    ),
    ("a virgin log", |b| headers(b, 48, &[7; 16]), CORRUPT, "log", LOG, "none was ever written", SOUND),
    ("a torn log", garbage_log, CORRUPT, "log", LOG, "no valid sequence", CORRUPT),
    ("a dirty log", dirty_log, SOUND, "log", LOG, "1 entries to replay", SOUND),
    ("a log over payload", log_over_payload, CORRUPT, "log", END, "belong to a block", CORRUPT),
    ("a short log", |b| b.truncate(LOG + 4096), CORRUPT, "log", LOG, "ends at byte", CORRUPT),
    ("blocks overlap", |b| two_blocks(b, 5), CORRUPT, "BAT", BAT + 72, "another block", CORRUPT),
    (
        "a block in the header",
        |b| block(b, 3, PRESENT),
        CORRUPT,
        "BAT",
        BAT + 24,
        "the header section",
        CORRUPT,
    ),
    ("a block in the log", |b| block(b, 3, MIB | PRESENT), CORRUPT, "BAT", BAT + 24, "the log", CORRUPT),
    (
        "a block in the BAT",
        |b| block(b, 3, (BAT as u64) | PRESENT),
        CORRUPT,
        "BAT",
        BAT + 24,
        "the BAT",
        CORRUPT,
    ),
    (
        "a block far out",
        |b| block(b, 3, (1 << 40) | PRESENT),
        CORRUPT,
        "BAT",
        BAT + 24,
        "lies at byte",
        CORRUPT,
    ),
    ("a block cut off", block_cut_off, CORRUPT, "BAT", BAT, "needs the file", CORRUPT),
    (
        "reserved bits",
        |b| block(b, 0, (4 * MIB) | 8 | PRESENT),
        CORRUPT,
        "BAT",
        BAT,
        "reserved bits 0x8",
        SOUND,
    ),
    ("state 4", |b| block(b, 3, 4), CORRUPT, "BAT", BAT + 24, "reserved state 4", CORRUPT),
    ("state 5", |b| block(b, 0, (4 * MIB) | 5), CORRUPT, "BAT", BAT, "state 5", SOUND),
    ("state 7", |b| block(b, 0, (4 * MIB) | 7), CORRUPT, "BAT", BAT, "without parent", CORRUPT),
    (
        "a zero block's place",
        |b| block(b, 3, (5 * MIB) | 2),
        SOUND,
        "BAT",
        BAT + 24,
        "Windows refuses",
        SOUND,
    ),
    ("an unused tail", |b| b.resize(END + 100, 0), SOUND, "space", END, "unused", SOUND),
    (
        "a log in the BAT",
        |b| headers(b, 72, &(BAT as u64).to_le_bytes()),
        CORRUPT,
        "region tables",
        BAT,
        "the log",
        CORRUPT,
    ),
    ("a fault and no log", fault_and_no_log, CORRUPT, "region table 1", REGION_TABLES[0], "", CORRUPT),
    ("a child", |b| child(b, (5 * MIB) | PRESENT), SOUND, "metadata", METADATA, "parent", SOUND),
    ("no bitmap", |b| child(b, 0), CORRUPT, "BAT", BAT + 8 * CHUNK, "no sector bitmap", CORRUPT),
    ("a bitmap in state 3", |b| child(b, 3), CORRUPT, "BAT", BAT + 8 * CHUNK, "reserved state", CORRUPT),
    (
        "bitmap bits",
        |b| child(b, (5 * MIB) | 8 | PRESENT),
        CORRUPT,
        "BAT",
        BAT + 8 * CHUNK,
        "bits set",
        SOUND,
    ),
    (
        "a shared bitmap",
        |b| child(b, (4 * MIB) | PRESENT),
        CORRUPT,
        "BAT",
        BAT + 8 * CHUNK,
        "another",
        CORRUPT,
    ),
    ("a leak", leak, LEAKING, "space", END, "take room", SOUND),
];

/// A damaged region table, and a log that a repair must not write to.
fn fault_and_no_log(bytes: &mut Bytes) {
    block(bytes, 3, MIB | PRESENT);
    bytes[REGION_TABLES[0] + 9] ^= 1;
}

/// A child with one block of its own, in part, and the entry of the chunk's sector bitmap.
fn child(bytes: &mut Bytes, bitmap: u64) {
    let mut locator = ParentLocator::default();
    locator.set(PARENT_LINKAGE, LINKAGE.braced().to_string());
    locator.set(RELATIVE_PATH, r".\parent.vhdx");
    let metadata = Metadata {
        block_size: 1 << 20,
        leave_blocks_allocated: false,
        has_parent: true,
        virtual_size: 64 * MIB,
        disk_id: Uuid::from_u128(1),
        logical_sector_size: 512,
        physical_sector_size: 4096,
        parent_locator: Some(locator),
    };
    put(bytes, METADATA, &metadata.encode_region());
    block(bytes, 7, (4 * MIB) | PARTIAL);
    block(bytes, CHUNK, bitmap);
    bytes.truncate(6 << 20);
}

fn no_header(bytes: &mut Bytes) {
    for at in HEADERS {
        bytes[at + 100] ^= 1;
    }
}

fn twin_headers(bytes: &mut Bytes) {
    bytes.copy_within(HEADERS[1]..HEADERS[1] + 4096, HEADERS[0]);
}

fn equal_numbers(bytes: &mut Bytes) {
    twin_headers(bytes);
    bytes[HEADERS[0] + 16] ^= 1;
    seal(&mut bytes[HEADERS[0]..HEADERS[0] + 4096]);
}

fn tables_differ(bytes: &mut Bytes) {
    let second = REGION_TABLES[1]..REGION_TABLES[1] + (64 << 10);
    bytes[second.start + 200] ^= 1;
    seal(&mut bytes[second]);
}

fn region_bits_and_a_bad_copy(bytes: &mut Bytes) {
    regions(bytes, 45, &[1]);
    bytes[REGION_TABLES[0] + 9] ^= 1;
}

fn two_blocks(bytes: &mut Bytes, mib: u64) {
    block(bytes, 0, (mib * MIB) | PRESENT);
    block(bytes, 9, (mib * MIB) | PRESENT);
}

fn block_cut_off(bytes: &mut Bytes) {
    block(bytes, 0, (4 * MIB) | PRESENT);
    bytes.truncate(END + 4096);
}

/// A hole in the middle that is stored on the host, between the regions and the only block.
fn leak(bytes: &mut Bytes) {
    block(bytes, 7, (6 * MIB) | PRESENT);
    bytes.truncate(7 << 20);
    bytes[END..].fill(0xdd);
}

/// One entry to replay, which makes block 2 present.
fn dirty_log(bytes: &mut Bytes) {
    let mut page = Box::new([0; 4096]);
    page[16..24].copy_from_slice(&((4 * MIB) | PRESENT).to_le_bytes());
    logged(bytes, BAT as u64, page);
}

/// One entry to replay, which changes a block's data.
fn log_over_payload(bytes: &mut Bytes) {
    block(bytes, 0, (4 * MIB) | PRESENT);
    bytes.truncate(END + (1 << 20));
    logged(bytes, END as u64, Box::new([0xee; 4096]));
}

fn logged(bytes: &mut Bytes, file_offset: u64, page: Box<[u8; 4096]>) {
    let changes = [Change::Data { file_offset, page }];
    let entry = NewEntry {
        sequence_number: 1,
        tail: 0,
        log_guid: LOG_GUID,
        flushed_file_offset: END as u64,
        last_file_offset: END as u64 + MIB,
        changes: &changes,
    };
    put(bytes, LOG, &entry.encode());
    headers(bytes, 48, &LOG_GUID.to_bytes_le());
}

/// A good image of 64 MiB in blocks of 1 MiB.
fn good(bench: &Bench) -> Bytes {
    let good =
        fs::read(bench.image("good.vhdx", &["--size", "64M", "--block-size", "1M"])).expect("readable");
    assert_eq!(good.len(), END, "the layout is the one these tests know");
    good
}

/// The report, from an exit status that is no failure.
fn report(image: &Path, options: &[&str], status: i32) -> Value {
    let Ran { status: found, stdout, stderr } = on("check", image, &[&["--json"], options].concat());
    assert_eq!((found, stderr.as_str()), (Some(status), ""), "{stdout}");
    serde_json::from_str(&stdout).expect("one JSON value")
}

#[test]
fn every_fault_is_found_and_what_is_certain_is_repaired() {
    let bench = Bench::new();
    let good = good(&bench);
    let mut parent = good.clone();
    headers(&mut parent, DATA_WRITE_GUID, &LINKAGE.to_bytes_le());
    fs::write(bench.path("parent.vhdx"), parent).expect("room");
    let image = bench.path("bad.vhdx");
    for (name, damage, status, structure, offset, part, after) in CASES {
        let mut bytes = good.clone();
        damage(&mut bytes);
        fs::write(&image, &bytes).expect("room");
        let before = Snapshot::of(&image);
        let found = report(&image, &[], status);
        let findings = found["findings"].as_array().expect("an array");
        let names = |finding: &&Value| finding["structure"] == structure && finding["offset"] == offset;
        let finding = findings.iter().find(names).unwrap_or_else(|| panic!("{name}: {found:#}"));
        assert!(finding["what"].as_str().is_some_and(|what| what.contains(part)), "{name}: {finding}");
        let text = on("check", &image, &[]);
        assert_eq!((text.status, text.stderr.as_str()), (Some(status), ""), "{name}");
        assert!(text.stdout.contains(finding["what"].as_str().expect("text")), "{name}: {}", text.stdout);
        before.assert_kept(&image);
        let repaired = report(&image, &["--repair"], after);
        assert_eq!(repaired["before"]["findings"], found["findings"], "{name}");
        let done = repaired["done"].as_array().expect("an array");
        assert_eq!(done.is_empty(), found["repairable"] == 0, "{name}: {done:?}");
        if found["repairable"] == 0 {
            assert!(
                fs::read(&image).expect("readable") == bytes,
                "{name}: changed, and nothing was repaired"
            );
        } else {
            let left = repaired["findings"].as_array().expect("an array");
            // That an image has a parent, or that a block which a log has just brought is empty, is no fault.
            let fine = |finding: &Value| {
                let what = finding["what"].as_str().expect("text");
                what.contains("has a parent") || what.contains("read as zeros")
            };
            assert!(left.iter().all(fine) && repaired["repairable"] == 0, "{name}: {repaired:#}");
            on("info", &image, &[]).succeeded();
        }
        assert_eq!(report(&image, &[], after)["findings"], repaired["findings"], "{name}");
    }
}

/// Some readers take the NUL for a part of the path, and others do not: it goes, and the path stays.
#[test]
fn a_locator_whose_path_ends_in_a_nul_is_found_and_mended() {
    let bench = Bench::new();
    let parent = bench.image("base.vhdxx", &["--size", "16M"]);
    let child = bench.image("child.vhdx", &["--parent", parent.to_str().expect("UTF-8")]);
    let mut bytes = fs::read(&child).expect("readable");
    let name: Vec<u8> = "base.vhdxx".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let at = bytes.windows(name.len()).position(|found| *found == name).expect("the path in the locator");
    bytes[at + name.len() - 2] = 0;
    fs::write(&child, bytes).expect("room");
    fs::rename(&parent, bench.path("base.vhdx")).expect("ours");
    let found = report(&child, &[], CORRUPT);
    assert_eq!((&found["corruptions"], &found["repairable"]), (&1.into(), &1.into()), "{found:#}");
    let findings = found["findings"].as_array().expect("an array");
    assert!(findings.iter().any(|finding| finding["structure"] == "parent locator"), "{found:#}");
    report(&child, &["--repair"], SOUND);
    on("info", &child, &["--chain"]).succeeded();
}

/// After a repair every block has the bytes it had, and QEMU agrees.
#[test]
fn a_repair_keeps_the_data() {
    let bench = Bench::new();
    let mut bytes = good(&bench);
    block(&mut bytes, 5, (7 * MIB) | 8 | PRESENT);
    block(&mut bytes, 6, (5 * MIB) | PRESENT);
    block(&mut bytes, 8, (20 * MIB) | 2);
    bytes[5 << 20..6 << 20].fill(0x66);
    bytes[7 << 20..8 << 20].fill(0x55);
    bytes[6 << 20..7 << 20].fill(0xdd);
    bytes[HEADERS[0] + 100] ^= 1;
    bytes[REGION_TABLES[0] + 100] ^= 1;
    let image = bench.path("bad.vhdx");
    fs::write(&image, &bytes).expect("room");
    let found = report(&image, &[], CORRUPT);
    assert_eq!(
        (&found["corruptions"], &found["leaks"], &found["beyond_repair"]),
        (&3.into(), &2.into(), &0.into())
    );
    assert_eq!((&found["allocated_blocks"], &found["unused_tail_bytes"]), (&2.into(), &(12 * MIB).into()));
    assert_eq!((&found["free_bytes"], &found["leaked_bytes"]), (&(2 * MIB).into(), &(2 * MIB).into()));
    let text = on("check", &image, &["--repair"]);
    assert_eq!(text.status, Some(SOUND), "{}", text.stdout);
    assert!(text.stdout.contains("repaired: is copied from its twin"), "{}", text.stdout);
    let after = fs::read(&image).expect("readable");
    assert_eq!(after.len(), 8 << 20, "the tail is cut off");
    assert!(
        after[5 << 20..6 << 20] == bytes[5 << 20..6 << 20] && after[7 << 20..] == bytes[7 << 20..8 << 20]
    );
    assert_eq!(after[BAT + 40..BAT + 48], ((7 * MIB) | PRESENT).to_le_bytes());
    assert!(after[6 << 20..7 << 20].iter().all(|&byte| byte == 0), "the leak is a hole");
    if !has("qemu-img") || !has("qemu-io") {
        return skipped("qemu-img is not installed: no other program has judged a repair");
    }
    qemu(&["check", "-q", "-f", "vhdx"], &image);
    let commands = ["-c", "read -P 0x55 5M 1M", "-c", "read -P 0x66 6M 1M", "-c", "read -P 0 7M 57M"];
    let read = Command::new("qemu-io").args(["-r", "-f", "vhdx"]).args(commands).arg(&image).output();
    let read = read.expect("it runs");
    let said = String::from_utf8_lossy(&read.stdout);
    assert!(read.status.success() && !said.contains("failed"), "{said}");
}

/// More faults than are kept, of one kind, in more batches than one: all are counted, all are mended.
#[test]
fn thousands_of_faults_are_counted_and_mended() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "1T", "--block-size", "1M", "--block-state", "zero"]);
    let mut bytes = fs::read(&image).expect("readable");
    let bat = 3 << 20;
    let pages = (bytes.len() - bat) / 4096;
    assert!(pages > 2000, "several batches");
    for page in 0..pages {
        bytes[bat + page * 4096 + 1] = 0xff;
    }
    fs::write(&image, &bytes).expect("room");
    let found = report(&image, &[], CORRUPT);
    let faults = found["corruptions"].as_u64().expect("a number");
    assert!(faults > 2000, "{faults}");
    assert_eq!(found["repairable"], faults + found["notes"].as_u64().expect("a number"));
    let kept = found["findings"].as_array().expect("an array");
    assert_eq!(kept.iter().filter(|finding| finding["severity"] == "corruption").count(), 1000);
    assert!(on("check", &image, &[]).stdout.contains(&format!("... and {} more", faults - 1000)));
    report(&image, &["--repair"], SOUND);
    assert_eq!(super::info(&image)["blocks"]["zero"], 1 << 20);
}

/// What `create` makes is sound, and told so in one line.
#[test]
fn what_create_makes_is_sound() {
    let bench = Bench::new();
    for (name, options) in [
        ("a.vhdx", &["--size", "10G"][..]),
        ("b.vhdx", &["--size", "64T", "--block-size", "256M"]),
        ("c.vhdx", &["--size", "33M", "--type", "fixed"]),
        ("d.vhdx", &["--size", "9G", "--logical-sector-size", "4096", "--block-state", "zero"]),
    ] {
        let image = bench.image(name, options);
        let before = Snapshot::of(&image);
        let canonical = image.canonicalize().expect("there");
        assert_eq!(on("check", &image, &[]).succeeded(), format!("{}: sound\n", canonical.display()));
        on("check", &image, &["--repair"]).succeeded();
        before.assert_kept(&image);
    }
}

/// Nothing is said of what cannot be told: that is a failure, and never the status of a corruption.
#[test]
fn what_cannot_be_told_is_a_failure() {
    let bench = Bench::new();
    let good = good(&bench);
    let image = bench.path("a.vhdx");
    let unreadable: [(Damage, &str); 4] = [
        (|b| *b = b"What is this?".repeat(9000), "not-vhdx"),
        (Bytes::clear, "not-vhdx"),
        (|b| headers(b, 66, &2_u16.to_le_bytes()), "unsupported"),
        (unknown_region, "unsupported"),
    ];
    for (damage, kind) in unreadable {
        let mut bytes = good.clone();
        damage(&mut bytes);
        fs::write(&image, &bytes).expect("room");
        let before = Snapshot::of(&image);
        assert_eq!(on("check", &image, &["--json"]).failed_as_json()["kind"], kind);
        on("check", &image, &["--repair"]).failed(UNKNOWN);
        before.assert_kept(&image);
    }
    let misused = run(&["check", "--bogus"]);
    assert_eq!((misused.status, misused.stdout.as_str()), (Some(UNKNOWN), ""));
    assert!(misused.stderr.contains("--bogus"), "{}", misused.stderr);
    fs::write(&image, &good).expect("room");
    let held = ImageFile::open(&image, Access::ReadWrite, Duration::ZERO).expect("free");
    for options in [&[][..], &["--repair"]] {
        let message = on("check", &image, options).failed(UNKNOWN);
        assert!(message.contains(&format!("(pid {})", std::process::id())), "{message}");
    }
    drop(held);
    let _reader = ImageFile::open(&image, Access::ReadOnly, Duration::ZERO).expect("free");
    on("check", &image, &[]).succeeded();
    on("check", &image, &["--repair"]).failed(UNKNOWN);
}

/// Where QEMU finds a fault, so do we; images of others are sound.
#[test]
fn images_of_others_are_sound() {
    let bench = Bench::new();
    for name in ["ext2", "fat-parent", "fat-differential", "ntfs-fixed", "ntfs-dynamic", "iotest-dynamic-1G"]
    {
        let image = bench.path(&format!("{name}.vhdx"));
        images::unpack(name, &image);
        let before = Snapshot::of(&image);
        let report = report(&image, &[], SOUND);
        let notes = u64::from(name == "fat-differential");
        assert_eq!(
            (&report["complete"], &report["notes"]),
            (&true.into(), &notes.into()),
            "{name}: {report:#}"
        );
        before.assert_kept(&image);
    }
}

/// QEMU's check judges a part of what ours does: an image it finds corrupt, we do.
#[test]
fn what_qemu_finds_is_found() {
    if !has("qemu-img") {
        return skipped("qemu-img is not installed: no check is compared with QEMU's");
    }
    let bench = Bench::new();
    let good = good(&bench);
    let image = bench.path("bad.vhdx");
    let mut refused = 0;
    for (name, damage, status, ..) in CASES {
        let mut bytes = good.clone();
        damage(&mut bytes);
        fs::write(&image, &bytes).expect("room");
        let judged = Command::new("qemu-img").args(["check", "-q", "-f", "vhdx"]).arg(&image).output();
        let sound = judged.expect("it runs").status.success();
        // To QEMU a dirty log is a fault, and it has no parents.
        let known = ["a dirty log", "a child"].contains(&name);
        assert!(sound || status == CORRUPT || known, "{name}: QEMU finds a fault here");
        refused += u32::from(!sound);
    }
    assert!(refused > 5, "QEMU found {refused} faults only");
}

/// A file that lost its end has one remedy, which is true: no command opens it. Made longer again by hand, it
/// is sound in structure, and what may be lost is said.
#[test]
fn a_file_that_was_cut_short_is_not_called_whole() {
    let bench = Bench::new();
    let mut bytes = good(&bench);
    for number in 0..8 {
        block(&mut bytes, number, ((4 + number as u64) * MIB) | PRESENT);
    }
    bytes.resize(12 << 20, 0x77);
    let image = bench.path("cut.vhdx");
    fs::write(&image, &bytes).expect("room");
    assert_eq!(report(&image, &[], SOUND)["notes"], 0);
    let file = File::options().write(true).open(&image).expect("there");
    file.set_len(7 << 20).expect("it can be cut");
    let found = report(&image, &[], CORRUPT);
    for finding in found["findings"].as_array().expect("an array") {
        let remedy = finding["remedy"].as_str().expect("text");
        assert!(remedy.contains("copy it again") && !remedy.contains("readable"), "{finding}");
    }
    assert!(on("info", &image, &[]).failed(UNKNOWN).contains("copy it again"));
    file.set_len(12 << 20).expect("it can be made longer");
    let found = report(&image, &[], SOUND);
    let what = found["findings"][0]["what"].as_str().expect("a note");
    assert!(what.starts_with("5 blocks") && what.contains("their data is lost"), "{what}");
}

/// A chain of three in one folder; the leaf comes first.
fn chain_of_three(bench: &Bench) -> [PathBuf; 3] {
    let base = bench.image("base.vhdx", &["--size", "64M", "--block-size", "1M"]);
    let middle = bench.image("middle.vhdx", &["--parent", base.to_str().expect("UTF-8")]);
    let leaf = bench.image("leaf.vhdx", &["--parent", middle.to_str().expect("UTF-8")]);
    [leaf, middle, base].map(|path| path.canonicalize().expect("there"))
}

fn change(image: &Path, damage: impl FnOnce(&mut Bytes)) {
    let mut bytes = fs::read(image).expect("readable");
    damage(&mut bytes);
    fs::write(image, bytes).expect("room");
}

/// The parents that were examined, their own child first.
fn parents(report: &Value) -> Vec<&str> {
    let parents = report["parents"].as_array().expect("an array").iter();
    parents.map(|parent| parent["image"].as_str().expect("text")).collect()
}

/// Every image of a chain is examined, and none of them is touched.
#[test]
fn a_sound_chain_is_examined_to_its_end() {
    let bench = Bench::new();
    let chain @ [leaf, middle, base] = &chain_of_three(&bench);
    let before = chain.each_ref().map(|path| Snapshot::of(path));
    let found = report(leaf, &[], SOUND);
    assert_eq!(parents(&found), [middle, base].map(|path| path.to_str().expect("UTF-8")));
    assert_eq!((&found["chain_fault"], &found["complete"]), (&Value::Null, &true.into()));
    for parent in found["parents"].as_array().expect("an array") {
        assert_eq!((&parent["complete"], &parent["corruptions"]), (&true.into(), &0.into()), "{parent:#}");
    }
    let text = on("check", leaf, &[]).succeeded();
    for parent in [middle, base] {
        assert!(text.contains(&format!("parent {}: sound", parent.display())), "{text}");
    }
    assert_eq!(parents(&report(base, &[], SOUND)), [""; 0]);
    let misused = on("check", base, &["--parent", "middle.vhdx"]).failed(UNKNOWN);
    assert!(misused.contains("given as a parent"), "{misused}");
    before.into_iter().zip(chain).for_each(|(before, path)| before.assert_kept(path));
}

/// What becomes of the last parent; the kind of the fault, and what it says, the linkage apart.
#[test]
fn a_broken_chain_is_told_with_its_reason() {
    type Fault = fn(&Bench, &Path);
    let faults: [(&str, Fault, &str, &str); 4] = [
        (
            "written since",
            |_, base| change(base, |b| headers(b, DATA_WRITE_GUID, &[9; 16])),
            "mismatch",
            "DataWriteGuid",
        ),
        ("nowhere", |_, base| fs::remove_file(base).expect("there"), "not-found", "none of the places"),
        ("other sectors", other_sectors, "corrupt", "sectors of 4096 bytes"),
        ("unreadable", |_, base| change(base, |b| b[METADATA..BAT].fill(0)), "corrupt", "metadata table"),
    ];
    for (name, fault, kind, part) in faults {
        let bench = Bench::new();
        let [leaf, middle, base] = &chain_of_three(&bench);
        let of_base = super::info(base)["data_write_guid"].as_str().expect("text").to_owned();
        fault(&bench, base);
        let found = report(leaf, &[], UNSOUND_CHAIN);
        assert_eq!(
            (parents(&found), &found["corruptions"]),
            (vec![middle.to_str().expect("UTF-8")], &0.into())
        );
        let told = &found["chain_fault"];
        let message = told["message"].as_str().expect("text");
        assert!(told["kind"] == kind && message.contains(part), "{name}: {told:#}");
        let remedy = told["remedy"].as_str().expect("text");
        if kind == "mismatch" {
            let there = Uuid::from_bytes_le([9; 16]).to_string();
            let lower = message.to_lowercase();
            assert!(
                lower.contains(&of_base) && !lower.contains(&there),
                "the message says what was not named: {message}"
            );
            let named =
                ["--parent", middle.to_str().expect("UTF-8"), "--parent", base.to_str().expect("UTF-8")];
            let told =
                report(leaf, &named, UNSOUND_CHAIN)["chain_fault"]["message"].to_string().to_lowercase();
            assert!(told.contains(&of_base) && told.contains(&there), "both GUIDs: {told}");
            assert!(remedy.contains("--parent"), "{remedy}");
        }
        let text = on("check", leaf, &[]);
        assert_eq!((text.status, text.stderr.as_str()), (Some(UNSOUND_CHAIN), ""), "{name}");
        assert!(
            text.stdout.contains(&format!("the chain is broken: {message}\n  try: {remedy}")),
            "{}",
            text.stdout
        );
    }
}

/// A base with the same DataWriteGuid, and sectors of another size.
fn other_sectors(bench: &Bench, base: &Path) {
    let guid = fs::read(base).expect("readable")[HEADERS[0] + DATA_WRITE_GUID..][..16].to_vec();
    let other = bench.image("other.vhdx", &["--size", "64M", "--logical-sector-size", "4096"]);
    change(&other, |bytes| headers(bytes, DATA_WRITE_GUID, &guid));
    fs::rename(other, base).expect("one folder");
}

/// The search for parents follows the options; an image is not its own ancestor.
#[test]
fn parents_are_looked_for_where_they_are_said_to_be() {
    let bench = Bench::new();
    let [leaf, middle, base] = &chain_of_three(&bench);
    let moved = bench.path("elsewhere.vhdx");
    fs::rename(base, &moved).expect("one folder");
    let [middle, moved] = [middle, &moved].map(|path| path.to_str().expect("UTF-8"));
    report(leaf, &[], UNSOUND_CHAIN);
    assert_eq!(report(leaf, &["--parent", middle, "--parent", moved], SOUND)["chain_fault"], Value::Null);
    let cycle = report(leaf, &["--parent", leaf.to_str().expect("UTF-8")], UNSOUND_CHAIN);
    let message = cycle["chain_fault"]["message"].as_str().expect("text");
    assert!(message.contains("its own ancestor"), "{message}");
    assert_eq!(parents(&cycle), [""; 0]);
    let _held = ImageFile::open(Path::new(middle), Access::ReadWrite, Duration::ZERO).expect("free");
    let in_use = report(leaf, &[], UNSOUND_CHAIN);
    assert_eq!(in_use["chain_fault"]["kind"], "in-use", "{in_use:#}");
}

/// A fault of a parent makes the whole unsound, and is mended where it is named, not by way of a child.
#[test]
fn a_damaged_parent_is_reported_and_left_as_it_is() {
    let bench = Bench::new();
    let [leaf, middle, base] = &chain_of_three(&bench);
    change(base, |b| b[REGION_TABLES[0] + 9] ^= 1);
    change(middle, |b| b[HEADERS[0] + 100] ^= 1);
    change(leaf, |b| b[HEADERS[0] + 100] ^= 1);
    assert_eq!(report(leaf, &[], CORRUPT)["chain_fault"], Value::Null, "its own corruption comes first");
    let before = [middle, base].map(|path| Snapshot::of(path));
    let repaired = report(leaf, &["--repair"], UNSOUND_CHAIN);
    assert_eq!((&repaired["corruptions"], &repaired["before"]["corruptions"]), (&0.into(), &1.into()));
    let text = on("check", leaf, &["--repair"]).stdout;
    assert!(text.contains("never changes parents"), "{text}");
    before.into_iter().zip([middle, base]).for_each(|(before, path)| before.assert_kept(path));
    for (index, parent) in [middle, base].into_iter().enumerate() {
        assert_eq!(
            report(leaf, &[], UNSOUND_CHAIN)["parents"][index]["corruptions"],
            1,
            "{}",
            parent.display()
        );
        assert!(text.contains(&format!("check --repair {}", parent.display())), "{text}");
        report(parent, &["--repair"], if index == 0 { UNSOUND_CHAIN } else { SOUND });
    }
    report(leaf, &[], SOUND);
}
