//! What is compacted reads as before, whenever it is killed, and its file is as long as was said.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::Value;
use vhdx_ublk::disk::{Access, ImageFile};

use super::{Bench, MIB, Snapshot, create, has, on, program, qemu, run, skipped};

/// Where an image with a log of 1 MiB has its BAT, and its first block.
const BAT: u64 = 3 * MIB;
const END: u64 = 4 * MIB;

/// Blocks of 1 MiB with data, and those of them that hold only zeros.
const BLOCKS: u64 = 24;
const ZEROS: u64 = BLOCKS / 4;

/// An image with free space before each of its blocks, the last of the disk first.
fn fragmented(bench: &Bench, name: &str) -> PathBuf {
    let image = bench.image(name, &["--size", "64M", "--block-size", "1M"]);
    let file = OpenOptions::new().write(true).open(&image).expect("ours");
    for block in 0..BLOCKS {
        let place = END + (2 * (BLOCKS - block) - 1) * MIB;
        let byte = if block % 4 == 0 { 0 } else { u8::try_from(block).expect("few") };
        file.write_all_at(&vec![byte; 1 << 20], place).expect("room");
        file.write_all_at(&(place | 6).to_le_bytes(), BAT + 8 * block).expect("room");
    }
    image
}

fn compact(image: &Path, options: &[&str]) -> Value {
    let options = [&["--json", "--progress", "none"], options].concat();
    serde_json::from_str(&on("compact", image, &options).succeeded()).expect("one JSON value")
}

/// By this program, and by QEMU if it is there.
fn assert_same(image: &Path, before: &Path) {
    run(&["compare".as_ref(), image.as_os_str(), before.as_os_str()]).succeeded();
    if has("qemu-img") {
        qemu(&["compare", "-f", "vhdx", "-F", "vhdx", before.to_str().expect("UTF-8")], image);
    } else {
        skipped("qemu-img is not installed: no other program has read what was compacted");
    }
}

#[test]
fn a_compacted_image_is_short_and_reads_as_before() {
    for options in [&[][..], &["--zeros", "--defragment"]] {
        let bench = Bench::new();
        let (image, before) = (fragmented(&bench, "a.vhdx"), bench.path("before.vhdx"));
        fs::copy(&image, &before).expect("room");
        let said = compact(&image, &[options, &["--dry-run"]].concat());
        assert!(
            fs::read(&image).expect("there") == fs::read(&before).expect("there"),
            "a dry run changes it"
        );
        let done = compact(&image, options);
        for key in ["file_bytes_after", "zero_blocks", "moves", "moved_bytes", "free_bytes"] {
            assert_eq!(done[key], said[key], "{key}");
        }
        let length = END + (BLOCKS - ZEROS) * MIB;
        assert_eq!((&done["file_bytes_after"], &done["zero_blocks"]), (&length.into(), &ZEROS.into()));
        assert_eq!(fs::metadata(&image).expect("there").len(), length);
        assert_same(&image, &before);
        on("check", &image, &[]).succeeded();
        let compacted = Snapshot::of(&image);
        let again = on("compact", &image, &[options, &["--progress", "none"]].concat()).succeeded();
        assert!(again.contains("as before"), "{again}");
        compacted.assert_kept(&image);
    }
}

/// What lies scattered in a block takes no more of the host in its new place: pages of zeros are holes. What
/// lies before the blocks gets all its space when the image is written.
#[test]
fn a_moved_block_takes_no_more_of_the_host() {
    const MOVED: u64 = 24;
    const PAGES: u64 = 16;
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "64M", "--block-size", "1M"]);
    let file = OpenOptions::new().write(true).open(&image).expect("ours");
    for block in 0..MOVED {
        // Each behind a free place of its size.
        let place = END + (2 * (MOVED - block) - 1) * MIB;
        for page in 0..PAGES {
            let byte = u8::try_from(block + 1).expect("few");
            file.write_all_at(&[byte; 4096], place + page * (MIB / PAGES)).expect("room");
        }
        file.write_all_at(&(place | 6).to_le_bytes(), BAT + 8 * block).expect("room");
    }
    file.set_len(END + 2 * MOVED * MIB).expect("room");
    file.sync_all().expect("room");
    let before = bench.path("before.vhdx");
    fs::copy(&image, &before).expect("room");
    let done = compact(&image, &[]);
    let bytes = |key: &str| done[key].as_u64().expect("a number");
    assert!(bytes("moves") >= MOVED / 2, "{done}");
    assert!(bytes("host_bytes_after") <= bytes("host_bytes_before") + END, "{done}");
    assert_same(&image, &before);
}

/// Each step alone, and what it leaves for the other one.
#[test]
fn a_step_that_was_not_named_is_not_taken() {
    let bench = Bench::new();
    let image = fragmented(&bench, "a.vhdx");
    let length = fs::metadata(&image).expect("there").len();
    assert_eq!(compact(&image, &["--zeros"])["moves"], 0);
    assert!(fs::metadata(&image).expect("there").len() >= length - 2 * MIB, "the file is cut at most");
    let done = compact(&image, &["--length"]);
    assert_eq!((&done["zero_blocks"], &done["free_bytes"]), (&0.into(), &0.into()));
}

/// At any moment; the next command continues.
#[test]
fn a_killed_compaction_is_done_again() {
    let bench = Bench::new();
    let (image, before) = (fragmented(&bench, "a.vhdx"), bench.path("before.vhdx"));
    fs::copy(&image, &before).expect("room");
    for round in 0..6 {
        let mut command = program();
        command.args(["compact", "--max-rate", "4M"]).arg(&image);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it runs");
        thread::sleep(Duration::from_millis(60 * round));
        child.kill().expect("ours");
        child.wait().expect("ours");
        run(&["compare".as_ref(), image.as_os_str(), before.as_os_str()]).succeeded();
    }
    let done = compact(&image, &[]);
    assert_eq!(done["file_bytes_after"], END + (BLOCKS - ZEROS) * MIB);
    assert_same(&image, &before);
}

/// Its disk is the same, so its children need not know; but not while one of them is in use.
#[test]
fn a_parent_is_compacted_and_its_child_stays_valid() {
    let bench = Bench::new();
    let (parent, child) = (fragmented(&bench, "a.vhdx"), bench.path("b.vhdx"));
    create(&child, &["--parent", parent.to_str().expect("UTF-8")]).succeeded();
    let lock = ImageFile::open(&parent, Access::ReadOnly, Duration::ZERO).expect("it is free");
    let before = Snapshot::of(&parent);
    let refused = on("compact", &parent, &[]).failed(1);
    assert!(refused.contains("has it open") && refused.contains("first end its use"), "{refused}");
    before.assert_kept(&parent);
    drop(lock);
    compact(&parent, &[]);
    on("check", &child, &[]).succeeded();
    assert_eq!(compact(&child, &[])["unread_parents"], Value::Null);
}

/// What a fixed image promises is kept.
#[test]
fn a_fixed_image_keeps_its_space() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "8M", "--type", "fixed"]);
    let before = Snapshot::of(&image);
    let said = on("compact", &image, &[]).succeeded();
    assert!(said.contains("keeps the space of all its blocks"), "{said}");
    before.assert_kept(&image);
}

#[test]
fn a_rate_of_nothing_is_wrong_usage() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhdx-ublk"));
    let output = command.args(["compact", "a.vhdx", "--max-rate", "0"]).output().expect("it runs");
    assert_eq!(output.status.code(), Some(2));
}
