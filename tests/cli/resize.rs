//! Promises defended here: a disk gets the size that is asked for, and QEMU reads in it what was there and
//! zeros behind; what would be lost is named, and nothing is lost unless that is insisted upon.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use vhdx_ublk::disk::{Access, ImageFile};

use crate::images::unpack;
use crate::relink::{base, child_of};
use crate::skip::skipped;
use crate::{Bench, MIB, Ran, Snapshot, has, info, on, qemu, run};

fn resize(image: &Path, size: &str, options: &[&str]) -> Ran {
    on("resize", image, &[&["--size", size][..], options].concat())
}

fn size_of(image: &Path) -> u64 {
    info(image)["virtual_size"].as_u64().expect("a size")
}

fn assert_sound(image: &Path) {
    let report: Value = serde_json::from_str(&on("check", image, &["--json"]).succeeded()).expect("JSON");
    assert_eq!((&report["leaks"], &report["corruptions"]), (&json!(0), &json!(0)), "{report}");
}

/// Writes a pattern to `MiB`, which are in the disk.
fn write(image: &Path, mibs: &[u64]) {
    let mut command = Command::new("qemu-io");
    command.args(["-f", "vhdx"]);
    for mib in mibs {
        command.args(["-c", &format!("write -P {} {mib}M 1M", mib % 200 + 1)]);
    }
    assert!(command.arg(image).output().expect("it runs").status.success());
}

/// What QEMU reads without a word: the pattern of each of `mibs`, and zeros in the last MiB of the disk.
fn assert_spots(image: &Path, mibs: &[u64], size: u64) {
    let mut command = Command::new("qemu-io");
    command.args(["-r", "-f", "vhdx", "-c", &format!("read -P 0 {} 1M", size - MIB)]);
    for mib in mibs {
        command.args(["-c", &format!("read -P {} {mib}M 1M", mib % 200 + 1)]);
    }
    let output = command.arg(image).output().expect("it runs");
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && !shown.contains("failed"), "{shown}");
}

/// QEMU finds no fault, and the same content as in `raw`, made as long. It reads all of it.
fn assert_reads(image: &Path, raw: &Path, size: u64) {
    let seen: Value = serde_json::from_str(&qemu(&["info", "--output=json"], image)).expect("JSON");
    assert_eq!(seen["virtual-size"], size);
    qemu(&["check"], image);
    assert_sound(image);
    if size > 8 << 30 {
        return assert_spots(image, &WRITTEN, size);
    }
    File::options().write(true).open(raw).expect("ours").set_len(size).expect("room");
    let raw = raw.to_str().expect("UTF-8");
    qemu(&["compare", "-f", "raw", "-F", "vhdx", raw], image);
}

/// MiB that are written before a disk is resized.
const WRITTEN: [u64; 5] = [0, 1, 14, 31, 32];

#[test]
fn qemu_reads_what_was_there_and_zeros_behind() {
    if !has("qemu-img") || !has("qemu-io") {
        return skipped("qemu-img and qemu-io are not installed: no other program has read resized images");
    }
    let bench = Bench::new();
    let dynamic = &["--size", "1G", "--block-size", "1M"][..];
    for (name, options, sizes) in [
        ("dynamic", dynamic, &["64T", "700M", "+512", "-1024", "300M"][..]),
        ("fixed", &["--size", "33M", "--type", "fixed"], &["70M", "31M", "+4M"]),
        ("zeroed", &["--size", "33M", "--block-state", "zero"], &["300G", "17M"]),
    ] {
        let image = bench.image(&format!("{name}.vhdx"), options);
        write(&image, &WRITTEN);
        let raw = bench.path(&format!("{name}.raw"));
        qemu(&["convert", "-O", "raw", "-f", "vhdx", image.to_str().expect("UTF-8")], &raw);
        for size in sizes {
            resize(&image, size, &["--force"]).succeeded();
            assert_reads(&image, &raw, size_of(&image));
        }
    }
}

/// In the new part of a child nothing of its parent shows, after the merge either.
#[test]
fn a_child_hides_what_its_parent_has_behind_its_old_end() {
    if !has("qemu-io") {
        return skipped("qemu-io is not installed: no content was written");
    }
    let bench = Bench::new();
    let base = bench.image("base.vhdx", &["--size", "40M", "--block-size", "1M"]);
    write(&base, &(0..40).collect::<Vec<_>>());
    let child = child_of(&bench, &base, "child.vhdx");
    let odd = (13 << 20) + 512;
    resize(&child, &odd.to_string(), &["--force"]).succeeded();
    resize(&child, "+40M", &[]).succeeded();
    assert_sound(&child);
    assert_eq!(on("merge", &child, &[]).status, Some(0));
    assert_eq!(size_of(&base), odd + (40 << 20));
    let reads = [format!("read -P 14 {} 512", 13 << 20), format!("read -P 0 {odd} 40M")];
    let mut command = Command::new("qemu-io");
    command.args(["-r", "-f", "vhdx", "-c", &reads[0], "-c", &reads[1]]);
    let output = command.arg(&base).output().expect("it runs");
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && !shown.contains("failed"), "{shown}");
}

#[test]
fn what_lies_behind_the_new_end_is_named() {
    let bench = Bench::new();
    let image = bench.path("ntfs.vhdx");
    unpack("ntfs-fixed", &image);
    let before = fs::read(&image).expect("readable");
    let message = resize(&image, "2M", &[]).failed(1);
    assert!(message.contains("partition 1") && message.contains(&(3 * MIB).to_string()), "{message}");
    assert!(message.contains("--force"), "{message}");
    assert!(before == fs::read(&image).expect("readable"), "a refusal changes nothing");
    resize(&image, "9M", &[]).succeeded();
    let shown = on("resize", &image, &["--minimum", "--dry-run", "--json"]).succeeded();
    let shown: Value = serde_json::from_str(&shown).expect("one JSON value");
    assert_eq!(
        (&shown["size_before"], &shown["size"], &shown["minimum_size"], &shown["dry_run"]),
        (&json!(9 * MIB), &json!(3 * MIB), &json!(3 * MIB), &json!(true))
    );
    assert_eq!(size_of(&image), 9 * MIB, "nothing was done");
    on("resize", &image, &["--minimum"]).succeeded();
    assert_eq!(size_of(&image), 3 * MIB);
    resize(&image, "2M", &["--force"]).succeeded();
    assert_eq!(size_of(&image), 2 * MIB);
    assert_sound(&image);
}

/// A power cut between the size and the end leaves space that nothing names: the same command gives it back.
#[test]
fn the_same_command_finishes_a_resize() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "64M"]);
    resize(&image, "32M", &[]).succeeded();
    let length = fs::metadata(&image).expect("there").len();
    File::options().write(true).open(&image).expect("ours").set_len(length + 8 * MIB).expect("room");
    let shown = resize(&image, "32M", &[]).succeeded();
    assert!(shown.contains("33554432 bytes (32 MiB), and stays"), "{shown}");
    assert_eq!(fs::metadata(&image).expect("there").len(), length);
    assert_sound(&image);
}

#[test]
fn data_that_is_not_recognised_is_not_cut_off() {
    if !has("qemu-io") {
        return skipped("qemu-io is not installed: no content was written");
    }
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "64M"]);
    on("resize", &image, &["--minimum"]).failed(1);
    resize(&image, "50M", &[]).succeeded();
    write(&image, &[20]);
    let message = resize(&image, "10M", &[]).failed(1);
    assert!(message.contains(&(20 * MIB).to_string()), "{message}");
    resize(&image, "22M", &[]).succeeded();
    resize(&image, "10M", &["--force"]).succeeded();
    assert_eq!(size_of(&image), 10 * MIB);
}

/// A dump of a disk with sectors of 4096 bytes has its GPT elsewhere, and partitions up to its end.
#[test]
fn a_disk_whose_gpt_is_not_found_is_not_cut() {
    let bench = Bench::new();
    let (raw, image) = (bench.path("a.raw"), bench.path("a.vhdx"));
    let mut protective = [0; 512];
    protective[446..462].copy_from_slice(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0xff, 0x3f, 0, 0]);
    protective[510..].copy_from_slice(&[0x55, 0xaa]);
    fs::write(&raw, protective).expect("room");
    File::options().write(true).open(&raw).expect("ours").set_len(64 * MIB).expect("room");
    run(&["convert", raw.to_str().expect("UTF-8"), image.to_str().expect("UTF-8")]).succeeded();
    assert!(on("info", &image, &[]).succeeded().contains("protects a GPT that is not found"));
    let message = resize(&image, "8M", &[]).failed(1);
    assert!(message.contains("protects a GPT that is not found"), "{message}");
    on("resize", &image, &["--minimum"]).succeeded();
    assert_eq!(size_of(&image), 64 * MIB);
    resize(&image, "8M", &["--force"]).succeeded();
    assert_eq!(size_of(&image), 8 * MIB);
}

#[test]
fn a_parent_and_an_image_in_use_are_left_alone() {
    let bench = Bench::new();
    let base = base(&bench, "base.vhdx");
    let child = child_of(&bench, &base, "child.vhdx");
    let before = Snapshot::of(&base);
    let message = resize(&base, "+1G", &[]).failed(1);
    assert!(message.contains("child.vhdx") && message.contains("--force"), "{message}");
    let lock = ImageFile::open(&child, Access::ReadWrite, Duration::ZERO).expect("free");
    resize(&child, "+1G", &[]).failed(1);
    drop(lock);
    before.assert_kept(&base);
    resize(&child, "+1G", &[]).succeeded();
    on("info", &child, &["--chain"]).succeeded();
    let forced = resize(&base, "+1G", &["--force"]);
    assert!(forced.status == Some(0) && forced.stderr.contains("child.vhdx"), "{}", forced.stderr);
    on("info", &child, &["--chain"]).broke_off();
}

#[test]
fn sizes_that_no_disk_can_have_are_refused() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "64M", "--type", "fixed"]);
    let before = fs::read(&image).expect("readable");
    for size in ["1000", "+1", "-1"] {
        let message = resize(&image, size, &[]).failed(2);
        assert!(message.contains("sectors"), "{message}");
    }
    let text = image.to_str().expect("UTF-8");
    assert!(run(&["resize", text, "+1G"]).misused().contains("--size +1G"));
    for size in ["65T", "0", "+0", "ten"] {
        resize(&image, size, &[]).misused();
    }
    assert_eq!(resize(&image, "+64T", &[]).status, Some(2));
    for size in ["-64M", "-1G"] {
        resize(&image, size, &[]).failed(2);
    }
    let message = resize(&image, "60T", &[]).failed(1);
    assert!(message.contains("missing"), "{message}");
    run(&["resize", text]).misused();
    resize(&image, "64M", &[]).succeeded();
    assert!(before == fs::read(&image).expect("readable"), "a refusal changes nothing");
}
