//! `salvage`: a copy of what is left, a list of what is not, and a source that stays as it was.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::damage::{BAT, END, HEADERS, METADATA, REGION_TABLES};
use super::{Bench, Snapshot, has, program, run, skipped};

/// Bytes of the disk: a fixed one, whose blocks follow each other in the file.
const SIZE: usize = 8 << 20;

/// An image whose disk has no two pages alike, and that disk.
fn image(bench: &Bench) -> (PathBuf, Vec<u8>) {
    let path = bench.image("disk.vhdx", &["--size", "8M", "--type", "fixed", "--block-size", "1M"]);
    let word = |at: usize| (at as u64 / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    let disk: Vec<u8> = (0..SIZE).step_by(8).flat_map(word).collect();
    let mut bytes = fs::read(&path).expect("readable");
    bytes[END..].copy_from_slice(&disk);
    fs::write(&path, bytes).expect("ours");
    (path, disk)
}

/// Changes the image's bytes.
fn damage(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).expect("readable");
    change(&mut bytes);
    fs::write(path, bytes).expect("ours");
}

fn json(arguments: &[&str], paths: &[&Path]) -> Value {
    let output = program().arg("salvage").args(arguments).arg("--json").arg("--").args(paths).output();
    let ran = super::Ran::from(output.expect("it runs"));
    let report: Value = serde_json::from_str(&ran.stdout).expect("one JSON value");
    let whole = report["finished_bytes"] == report["virtual_size"];
    assert_eq!((ran.status, ran.stderr.as_str()), (Some(if whole { 0 } else { 3 }), ""), "{report}");
    report
}

/// What a plan says for people, of an image that does not come back whole.
fn with_losses(path: &Path) -> String {
    let ran = run(&["salvage".as_ref(), path.as_os_str(), "--dry-run".as_ref()]);
    assert_eq!((ran.status, ran.stderr.as_str()), (Some(3), ""), "{}", ran.stdout);
    ran.stdout
}

/// The mapfile's own tool reads it, and counts what the program counts.
#[test]
fn a_file_that_was_cut_gives_what_it_has() {
    let bench = Bench::new();
    let (path, disk) = image(&bench);
    let left = (5 << 20) + 12_345;
    damage(&path, |bytes| bytes.truncate(END + left));
    let before = Snapshot::of(&path);
    let (copy, map) = (bench.path("copy.raw"), bench.path("copy.map"));
    let report = json(&[&format!("--mapfile={}", map.display())], &[&path, &copy]);
    before.assert_kept(&path);
    assert_eq!(report["finished_bytes"], left);
    assert_eq!(report["lost_bytes"], SIZE - left);
    assert_eq!(report["unknown_bytes"], 0);
    assert_eq!(report["virtual_size"], SIZE);
    let copied = fs::read(&copy).expect("readable");
    assert!(copied.len() == SIZE && copied[..left] == disk[..left]);
    assert!(copied[left..].iter().all(|byte| *byte == 0), "zeros stand for what is lost");
    let names = ["copy.map", "copy.raw", "disk.vhdx"];
    assert_eq!(bench.names(), names, "nothing else is left");
    if !has("ddrescuelog") {
        return skipped("ddrescuelog (gddrescue) is missing, so that no other program read the mapfile");
    }
    let listed = Command::new("ddrescuelog").args(["--list-blocks=-", "--block-size=1"]).arg(&map).output();
    let listed = String::from_utf8(listed.expect("it runs").stdout).expect("text");
    let listed: Vec<usize> = listed.lines().map(|line| line.parse().expect("a number")).collect();
    assert_eq!(listed, (left..SIZE).collect::<Vec<_>>());
}

/// Guesses are shown, and used only if the user agrees.
#[test]
fn guesses_need_consent() {
    let bench = Bench::new();
    let (path, disk) = image(&bench);
    damage(&path, |bytes| bytes[REGION_TABLES[0]..METADATA + (128 << 10)].fill(0x5a));
    let copy = bench.path("copy.raw");
    let error = run(&["salvage".as_ref(), path.as_os_str(), copy.as_os_str()]).failed(1);
    assert!(error.contains("by its shape") && error.contains("--assume"), "{error}");
    assert_eq!(bench.names(), ["disk.vhdx"]);
    let plan = json(&["--dry-run"], &[&path]);
    assert!(plan["notes"].as_array().expect("notes").iter().any(|note| note["is_guess"] == true), "{plan}");
    let report = json(&["--assume"], &[&path, &copy]);
    assert_eq!(report["finished_bytes"], SIZE, "{report}");
    assert!(fs::read(&copy).expect("readable") == disk);
    let again = run(&["salvage".as_ref(), path.as_os_str(), copy.as_os_str(), "--assume".as_ref()]).failed(1);
    assert!(again.contains("--force"), "{again}");
}

/// Bad news is in the text, too: what is lost, what is not known, and why.
#[test]
fn what_is_lost_is_said() {
    let bench = Bench::new();
    let (path, _) = image(&bench);
    damage(&path, |bytes| {
        bytes[HEADERS[0]..HEADERS[1] + 4096].fill(1);
        bytes[BAT + 8..BAT + 24].fill(0x5c);
    });
    let text = with_losses(&path);
    for part in [
        "can come back: 6291456 (6 MiB)",
        "lost:          2097152 (2 MiB)",
        "headers: neither",
        "cannot be true: 2",
    ] {
        assert!(text.contains(part), "{part} is missing: {text}");
    }
    let missing = run(&["salvage".as_ref(), path.as_os_str()]).misused();
    assert!(missing.contains("<TARGET>"), "{missing}");
}

/// The copy can be an image, which every reader takes, and which holds what a raw copy does.
#[test]
fn a_copy_can_be_an_image() {
    let bench = Bench::new();
    let (path, disk) = image(&bench);
    damage(&path, |bytes| bytes.truncate(END + (5 << 20) - 512));
    let copy = bench.path("copy.vhdx");
    let report = json(&[], &[&path, &copy]);
    assert_eq!(report["lost_bytes"], (3 << 20) + 512);
    super::on("check", &copy, &[]).succeeded();
    assert_eq!(super::info(&copy)["blocks"]["allocated"], 5);
    let raw = bench.path("copy.raw");
    run(&["salvage".as_ref(), copy.as_os_str(), raw.as_os_str()]).succeeded();
    let found = fs::read(&raw).expect("readable");
    let left = (5 << 20) - 512;
    assert!(found.len() == SIZE && found[..left] == disk[..left]);
    assert!(found[left..].iter().all(|byte| *byte == 0));
    if !has("qemu-img") {
        return skipped("qemu-img is missing, so that no other program read the copy");
    }
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-f", "raw", "-F", "vhdx"]).args([&raw, &copy]);
    assert!(compare.output().expect("it runs").status.success(), "QEMU reads the same disk");
}

/// A loss is counted by partition, so that it is known what it costs.
#[test]
fn lost_bytes_are_counted_by_partition() {
    let bench = Bench::new();
    let (path, _) = image(&bench);
    damage(&path, |bytes| {
        let sector = &mut bytes[END..END + 512];
        sector.fill(0);
        for (entry, start, length) in [(0, 2048_u32, 4096_u32), (1, 6144, 8192)] {
            let entry = &mut sector[446 + 16 * entry..][..16];
            entry[4] = 0x83;
            entry[8..12].copy_from_slice(&start.to_le_bytes());
            entry[12..].copy_from_slice(&length.to_le_bytes());
        }
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
        bytes.truncate(END + (5 << 20));
    });
    let report = json(&["--dry-run"], &[&path]);
    let lost: Vec<_> = report["partitions"].as_array().expect("partitions").iter().collect();
    let counts =
        |partition: &Value| ["number", "finished_bytes", "lost_bytes"].map(|key| partition[key].as_u64());
    assert_eq!(counts(lost[0]), [1, 2 << 20, 0].map(Some), "{report}");
    assert_eq!(counts(lost[1]), [2, 2 << 20, 2 << 20].map(Some), "{report}");
    let text = with_losses(&path);
    assert!(text.contains("partition 2: 2 MiB back, 2 MiB lost") && !text.contains("partition 1"), "{text}");
}

/// The advice for a damaged image leads to the command that saves it, and that command works as it is
/// printed.
#[test]
fn check_ends_with_the_command_that_saves_what_is_left() {
    let changes: [fn(&mut Vec<u8>); 5] = [
        |bytes| bytes.truncate(END + (5 << 20)),
        |bytes| bytes[BAT + 8] = 4,
        |bytes| bytes[HEADERS[0]..HEADERS[1] + 4096].fill(0),
        |bytes| bytes[METADATA..METADATA + 8].fill(0),
        |bytes| bytes.copy_within(BAT..BAT + 8, BAT + 8),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let bench = Bench::new();
        let (path, _) = image(&bench);
        damage(&path, change);
        let checked = super::on("check", &path, &[]);
        assert_eq!(checked.status, Some(2), "{number}: {}", checked.stderr);
        let mut lines = checked.stdout.lines().rev();
        let last = lines.next().expect("a line");
        let as_device = lines.next().and_then(|line| line.split_once("as a device: vhdx-ublk "));
        let (_, as_device) = as_device.unwrap_or_else(|| panic!("{number}: {}", checked.stdout));
        assert_eq!(as_device, format!("add --salvage {}", path.display()), "{number}");
        let (_, command) =
            last.split_once("can be copied: vhdx-ublk ").unwrap_or_else(|| panic!("{number}: {last}"));
        let copy = bench.path("COPY");
        let command = command.replace("COPY", copy.to_str().expect("UTF-8"));
        let words: Vec<&str> = command.split_whitespace().chain(["--assume"]).collect();
        assert!([Some(0), Some(3)].contains(&run(&words).status), "{number}");
        assert_eq!(fs::metadata(&copy).expect("there").len(), SIZE as u64, "{number}");
        let refused = super::on("info", &path, &[]).failed(1);
        assert!(refused.contains("vhdx-ublk salvage") && !refused.contains("backup"), "{number}: {refused}");
    }
}

/// `--force` replaces what it is meant for: an image by a copy, a mapfile by a mapfile, and no parent.
#[test]
fn nothing_else_is_replaced() {
    let bench = Bench::new();
    let (path, _) = image(&bench);
    let parent = bench.image("parent.vhdx", &["--size", "8M"]);
    let _child = bench.image("child.vhdx", &["--parent", parent.to_str().expect("UTF-8")]);
    let [other, text, map] = ["other.vhdx", "text", "copy.map"].map(|name| bench.path(name));
    bench.image("other.vhdx", &["--size", "8M"]);
    fs::write(&text, "mine").expect("room");
    let salvage = |target: &Path, options: &[String]| {
        let mut command = program();
        command.args(["salvage", "--force"]).args(options).arg(&path).arg(target);
        super::Ran::from(command.output().expect("it runs"))
    };
    assert!(salvage(&parent, &[]).failed(1).contains("the parent of"));
    assert!(salvage(&text, &[]).failed(1).contains("--force replaces"));
    let mapfile = |path: &Path| [format!("--mapfile={}", path.display())];
    let copy = bench.path("copy.raw");
    assert!(salvage(&copy, &mapfile(&other)).failed(1).contains("--force replaces"));
    assert!(!copy.exists(), "an unfinished copy is removed");
    salvage(&other, &mapfile(&map)).succeeded();
    salvage(&other, &mapfile(&map)).succeeded();
    assert_eq!(fs::read_to_string(&text).expect("readable"), "mine");
}

/// What keeps a copy from being made is said of the copy, and what is read stays.
#[test]
fn a_copy_that_cannot_be_made_is_named() {
    let bench = Bench::new();
    let (path, _) = image(&bench);
    let before = Snapshot::of(&path);
    for name in ["copy.vhd", "copy.qcow2"] {
        let refused = on_copy(&path, &bench.path(name), &[]).failed(2);
        assert!(refused.contains(name) && refused.contains("--to"), "{refused}");
    }
    let copy = bench.path("copy.avhdx");
    on_copy(&path, &copy, &[]).succeeded();
    super::on("check", &copy, &[]).succeeded();
    fs::remove_file(&copy).expect("ours");
    let refused = on_copy(&path, &path, &["--force"]).failed(2);
    assert!(refused.contains("it is the source"), "{refused}");
    let mapfile = format!("--mapfile={}", path.display());
    let refused = on_copy(&path, &bench.path("copy.raw"), &["--force", &mapfile]).failed(2);
    assert!(refused.contains("it is the source"), "{refused}");
    // No file may be longer than one MiB.
    let limited = "trap '' XFSZ; ulimit -f 2048; exec \"$0\" salvage \"$1\" \"$2\"";
    let mut shell = Command::new("sh");
    shell.args(["-c", limited, env!("CARGO_BIN_EXE_vhdx-ublk")]).args([&path, &bench.path("copy.raw")]);
    let refused = super::Ran::from(shell.output().expect("it runs")).failed(1);
    assert!(refused.contains("copy.raw") && !refused.contains("disk.vhdx"), "{refused}");
    before.assert_kept(&path);
    assert_eq!(bench.names(), ["disk.vhdx"], "nothing else is left");
}

fn on_copy(path: &Path, copy: &Path, options: &[&str]) -> super::Ran {
    super::Ran::from(program().arg("salvage").args(options).args([path, copy]).output().expect("it runs"))
}

/// A good image of another format is no damaged one.
#[test]
fn another_format_is_called_by_its_name() {
    let bench = Bench::new();
    let path = bench.path("disk.vhd");
    let mut bytes = vec![0; 1 << 20];
    bytes.extend(b"conectix".iter().copied().chain([0; 504]));
    fs::write(&path, bytes).expect("room");
    let error = run(&["salvage".as_ref(), path.as_os_str(), "--dry-run".as_ref()]).failed(1);
    assert!(error.contains("VHD") && !error.contains("photorec"), "{error}");
}

/// The device needs what the copy needs: consent to guesses, and something that leads to the disk. Whatever
/// comes of it, the image keeps every byte.
#[test]
fn a_device_of_what_is_left_needs_what_a_copy_needs() {
    let bench = Bench::new();
    let (path, _) = image(&bench);
    let name = path.to_str().expect("UTF-8");
    for wrong in [&["--salvage", "--force"][..], &["--assume"], &["--read-only", "--assume"]] {
        super::on("add", &path, wrong).misused();
    }
    damage(&path, |bytes| bytes[REGION_TABLES[0]..METADATA + (128 << 10)].fill(0x5a));
    let before = Snapshot::of(&path);
    let refused = super::on("add", &path, &["--salvage"]).failed(1);
    assert!(refused.contains("by its shape") && refused.contains("--assume"), "{refused}");
    // Every guess is said; then the machine needs the driver.
    let said = run(&["add", "--salvage", "--assume", name]).stderr;
    assert!(said.contains("BAT (a guess): it was found at byte"), "{said}");
    assert!(!said.contains("only with guesses"), "{said}");
    super::on("add", &path, &["--read-only"]).failed(1);
    before.assert_kept(&path);
    damage(&path, |bytes| bytes.truncate(METADATA));
    let refused = super::on("add", &path, &["--salvage", "--assume"]).failed(1);
    assert!(refused.contains("photorec") && refused.contains(name), "{refused}");
}

/// What is lost, what is not known, and that a parent is missing is said before the device is there.
#[test]
fn a_device_of_what_is_left_says_what_it_lacks() {
    let bench = Bench::new();
    let (path, _) = image(&bench);
    damage(&path, |bytes| bytes[BAT + 8..BAT + 24].fill(0x5c));
    let said = super::on("add", &path, &["--salvage"]).stderr;
    for part in ["cannot be true: 2", "2 MiB are lost, and reads of them fail"] {
        assert!(said.contains(part), "{part} is missing: {said}");
    }
    let parent = bench.image("parent.vhdx", &["--size", "8M"]);
    let child = bench.image("child.vhdx", &["--parent", parent.to_str().expect("UTF-8")]);
    fs::remove_file(&parent).expect("ours");
    let said = super::on("add", &child, &["--salvage"]).stderr;
    for part in ["a parent is missing", "8 MiB are not known"] {
        assert!(said.contains(part), "{part} is missing: {said}");
    }
    // A parent that the user names, and that the image does not have, is wrong usage.
    let name = child.to_str().expect("UTF-8");
    let wrong = super::on("add", &path, &["--salvage", &format!("--parent={name}")]);
    assert_eq!(wrong.status, Some(2), "{}", wrong.stderr);
}
