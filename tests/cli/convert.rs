//! What is converted is the same disk, to this program and to others. Sources stay as they are, and no
//! unfinished target is left.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use uuid::Uuid;
use vhdx_ublk::format::log::{Change, NewEntry};

use super::damage::{BAT, Bytes, LOG, PRESENT, headers, put};
use super::merge::Layer;
use super::relink::child_of;
use super::{Bench, MIB, Ran, Snapshot, has, images, program, qemu, run, skipped};

/// What a target is like, and the name by which QEMU knows its format.
const TARGETS: [(&str, &[&str], &str); 6] = [
    ("dynamic.vhdx", &[], "vhdx"),
    ("fixed.vhdx", &["--type", "fixed", "--block-size", "1M"], "vhdx"),
    ("large.vhdx", &["--block-size", "32M"], "vhdx"),
    ("dynamic.vhd", &[], "vpc"),
    ("fixed.vhd", &["--type", "fixed"], "vpc"),
    ("disk.raw", &[], "raw"),
];

fn convert(source: &Path, target: &Path, options: &[&str]) -> Ran {
    let quiet = ["convert", "--progress", "none"];
    program().args(quiet).args(options).arg(source).arg(target).output().expect("it runs").into()
}

/// The exit status of `compare`, and what it prints.
fn compare(one: &Path, other: &Path, options: &[&str]) -> (Option<i32>, String) {
    let quiet = ["compare", "--progress", "none"];
    let ran = program().args(quiet).args(options).arg(one).arg(other).output().expect("it runs");
    let Ran { status, stdout, stderr } = ran.into();
    (status, stdout + &stderr)
}

fn assert_same(one: &Path, other: &Path) {
    let (status, text) = compare(one, other, &["--strict"]);
    assert_eq!(status, Some(0), "{} and {}: {text}", one.display(), other.display());
}

/// A disk of 37 MiB and a sector: data of all lengths, stored zeros, and holes.
fn raw_disk(bench: &Bench, name: &str) -> PathBuf {
    let path = bench.path(name);
    let file = File::create(&path).expect("room");
    file.set_len(37 * MIB + 512).expect("room");
    let mut rng = fastrand::Rng::with_seed(5);
    for length in [512, 1024, 4096, 5120, 65_536, 1 << 20, 3 << 20] {
        let mut bytes = vec![0; length];
        rng.fill(&mut bytes);
        file.write_all_at(&bytes, rng.u64(0..(37 * MIB - length as u64) / 512) * 512).expect("room");
    }
    file.write_all_at(&[7; 512], 37 * MIB).expect("room");
    file.write_all_at(&vec![0; 2 << 20], 21 * MIB).expect("room");
    path
}

/// Each target from a raw disk, and each from each of these; QEMU finds the same disk in all of them.
#[test]
fn every_format_becomes_every_other_one() {
    let bench = Bench::new();
    let raw = raw_disk(&bench, "a.raw");
    let before = Snapshot::of(&raw);
    for (from, options, _) in TARGETS {
        let from = bench.path(&format!("from-{from}"));
        convert(&raw, &from, options).succeeded();
        let first = Snapshot::of(&from);
        assert_same(&raw, &from);
        for (to, options, format) in TARGETS {
            let to = bench.path(to);
            convert(&from, &to, &[options, &["--force", "--verify"]].concat()).succeeded();
            assert_same(&to, &raw);
            assert_eq!(fs::metadata(&to).expect("there").permissions().mode() & 0o777, 0o600);
            if has("qemu-img") {
                qemu(&["compare", "-f", "raw", "-F", format, raw.to_str().expect("UTF-8")], &to);
            }
            if format == "vhdx" {
                assert!(run(&["check".as_ref(), to.as_os_str()]).succeeded().contains("sound"));
            }
        }
        first.assert_kept(&from);
    }
    before.assert_kept(&raw);
    assert!(bench.names().iter().all(|name| !name.starts_with('.')), "{:?}", bench.names());
    if !has("qemu-img") {
        skipped("qemu-img is not installed: no other program has read what was converted");
    }
}

/// What others have made is the same disk to QEMU.
#[test]
fn images_of_others_are_converted() {
    if !has("qemu-img") {
        return skipped("qemu-img is not installed: no other program has read what was converted");
    }
    let bench = Bench::new();
    for name in ["ext2", "fat-parent", "ntfs-fixed", "ntfs-dynamic", "iotest-dynamic-1G"] {
        let image = bench.path("image.vhdx");
        images::unpack(name, &image);
        let before = Snapshot::of(&image);
        for (target, format) in [("flat.raw", "raw"), ("flat.vhd", "vpc"), ("flat.vhdx", "vhdx")] {
            let target = bench.path(target);
            convert(&image, &target, &["--force"]).succeeded();
            qemu(&["compare", "-f", "vhdx", "-F", format, image.to_str().expect("UTF-8")], &target);
        }
        before.assert_kept(&image);
    }
    let vhd = bench.path("of-qemu.vhd");
    for subformat in ["dynamic", "fixed"] {
        let options = format!("subformat={subformat}");
        let raw = raw_disk(&bench, "a.raw");
        let made = ["convert", "-f", "raw", "-O", "vpc", "-o", &options, raw.to_str().expect("UTF-8")];
        qemu(&made, &vhd);
        let (status, text) = compare(&raw, &vhd, &[]);
        assert_eq!(status, Some(0), "{text}");
    }
}

const LOG_GUID: Uuid = Uuid::from_u128(0x5eed);

/// Has the log of an image, and nothing else, say that a slot of the BAT has changed.
fn log_slot(image: &Path, slot: usize, entry: u64) {
    let mut bytes: Bytes = fs::read(image).expect("readable");
    let mut page = Box::new([0; 4096]);
    page.copy_from_slice(&bytes[BAT..BAT + 4096]);
    page[8 * slot..][..8].copy_from_slice(&entry.to_le_bytes());
    let changes = [Change::Data { file_offset: BAT as u64, page }];
    let length = bytes.len() as u64;
    let entry = NewEntry {
        sequence_number: 1,
        tail: 0,
        log_guid: LOG_GUID,
        flushed_file_offset: length,
        last_file_offset: length,
        changes: &changes,
    };
    put(&mut bytes, LOG, &entry.encode());
    headers(&mut bytes, 48, &LOG_GUID.to_bytes_le());
    fs::write(image, bytes).expect("room");
}

/// Five layers with whole, partial and zero blocks, of which the leaf's log is dirty, become one disk; none
/// of them changes.
#[test]
fn a_chain_with_a_dirty_log_is_flattened() {
    let bench = Bench::new();
    let mut disk = vec![0; 16 << 20];
    let mut layers =
        vec![bench.image("0.vhdx", &["--size", "16M", "--block-size", "1M", "--log-size", "1M"])];
    let mut layer = Layer { path: &layers[0], disk: &mut disk };
    (0..6).for_each(|block| layer.whole(block, 0x10 + u8::try_from(block).expect("small")));
    for number in 1..5 {
        let child = child_of(&bench, &layers[number - 1], &format!("{number}.vhdx"));
        let mut layer = Layer { path: &child, disk: &mut disk };
        let fill = 0x20 * u8::try_from(number + 1).expect("small");
        layer.zero(number as u64);
        layer.whole(7 + number as u64, fill);
        layer.part(5, fill + 1);
        layers.push(child);
    }
    let leaf = &layers[4];
    let at = Layer { path: leaf, disk: &mut disk }.append(&vec![0x77; 1 << 20]);
    log_slot(leaf, 14, at | PRESENT);
    disk[14 << 20..15 << 20].fill(0x77);
    let before: Vec<_> = layers.iter().map(|layer| Snapshot::of(layer)).collect();
    let raw = bench.path("flat.raw");
    convert(leaf, &raw, &["--verify"]).succeeded();
    assert!(fs::read(&raw).expect("readable") == disk, "the chain is another disk");
    let flat = bench.path("flat.vhdx");
    convert(leaf, &flat, &["--block-size", "4M"]).succeeded();
    for (before, layer) in before.into_iter().zip(&layers) {
        assert_same(&flat, leaf);
        before.assert_kept(layer);
    }
    let own = convert(leaf, &layers[1], &["--force"]).failed(2);
    assert!(own.contains("one of its parents"), "{own}");
    fs::rename(&layers[2], bench.path("moved.vhdx")).expect("ours");
    convert(leaf, &bench.path("b.raw"), &[]).failed(1);
    assert!(!bench.path("b.raw").exists());
}

/// A disk with sectors of 4096 bytes keeps them, and its raw file is said to lack that.
#[test]
fn sectors_are_kept_or_their_change_is_said() {
    let bench = Bench::new();
    let raw = bench.path("a.raw");
    fs::write(&raw, [&[9; 8192][..], &vec![0; 3 << 20], &[8; 4096]].concat()).expect("room");
    let native = bench.path("4k.vhdx");
    let noted = convert(&raw, &native, &["--logical-sector-size", "4096"]);
    assert!(noted.status == Some(0) && noted.stderr.contains("partition tables"), "{}", noted.stderr);
    let again = bench.path("again.vhdx");
    convert(&native, &again, &[]).succeeded();
    let shown: Value =
        serde_json::from_str(&run(&["info".as_ref(), "--json".as_ref(), again.as_os_str()]).stdout)
            .expect("JSON");
    assert_eq!(shown["logical_sector_size"], 4096);
    let noted = convert(&again, &bench.path("b.raw"), &[]);
    assert!(noted.status == Some(0) && noted.stderr.contains("--sector-size 4096"), "{}", noted.stderr);
    assert!(fs::read(&raw).expect("readable") == fs::read(bench.path("b.raw")).expect("readable"));
    OpenOptions::new().append(true).open(&raw).expect("ours").write_all(&[1; 700]).expect("room");
    let refused = convert(&raw, &bench.path("odd.vhdx"), &["--logical-sector-size", "4096"]).failed(1);
    assert!(refused.contains("no whole number of sectors"), "{refused}");
    let padded = convert(&raw, &bench.path("odd.vhdx"), &[]);
    assert!(padded.status == Some(0) && padded.stderr.contains("324 bytes of zeros"), "{}", padded.stderr);
}

/// Azure takes a fixed VHD of whole MiB whose footer says exactly that.
#[test]
fn a_vhd_for_azure_has_whole_mib() {
    let bench = Bench::new();
    let raw = raw_disk(&bench, "a.raw");
    let target = bench.path("a.vhd");
    let noted = convert(&raw, &target, &["--azure"]);
    assert!(noted.status == Some(0) && noted.stderr.contains("whole MiB"), "{}", noted.stderr);
    let bytes = fs::read(&target).expect("readable");
    assert_eq!(bytes.len() as u64, 38 * MIB + 512);
    let footer = &bytes[38 << 20..];
    assert_eq!(footer[48..56], (38 * MIB).to_be_bytes(), "the size in the footer");
    if has("qemu-img") {
        let seen: Value =
            serde_json::from_str(&qemu(&["info", "-f", "vpc", "--output=json"], &target)).expect("JSON");
        assert_eq!(seen["virtual-size"], 38 * MIB, "QEMU agrees on the exact size");
    }
    let small = bench.path("small.raw");
    File::create(&small).expect("room").set_len(19 * MIB).expect("room");
    assert!(convert(&small, &bench.path("b.vhd"), &["--azure"]).failed(1).contains("at least 20 MiB"));
    let large = bench.image("large.vhdx", &["--size", "3T"]);
    assert!(convert(&large, &bench.path("b.vhd"), &[]).failed(1).contains("at most"), "2040 GiB");
    assert!(!bench.path("b.vhd").exists());
}

/// Streams: a raw disk comes and goes, its size known at the end only.
#[test]
fn a_disk_passes_through_pipes() {
    let bench = Bench::new();
    let raw = raw_disk(&bench, "a.raw");
    for (name, options, format) in TARGETS {
        let target = bench.path(name);
        let mut command = program();
        command.arg("convert").args(options).arg("-").arg(&target);
        let mut from = Command::new("cat").arg(&raw).stdout(Stdio::piped()).spawn().expect("it runs");
        let pipe = from.stdout.take().expect("piped");
        Ran::from(command.stdin(pipe).output().expect("it runs")).succeeded();
        assert!(from.wait().expect("it ends").success());
        assert_same(&target, &raw);
        if has("qemu-img") {
            qemu(&["compare", "-f", "raw", "-F", format, raw.to_str().expect("UTF-8")], &target);
        }
        let output = program().arg("convert").arg(&target).arg("-").output().expect("it runs");
        assert!(output.status.success() && output.stdout == fs::read(&raw).expect("readable"), "{name}");
    }
}

/// A signal, a full target and a failed start leave nothing, and what had the name stays.
#[test]
fn no_unfinished_target_is_left() {
    let bench = Bench::new();
    let raw = raw_disk(&bench, "a.raw");
    let kept = bench.image("kept.vhdx", &["--size", "1M"]);
    let before = Snapshot::of(&kept);
    let script =
        format!("ulimit -f 4096; exec {} convert --force a.raw kept.vhdx", env!("CARGO_BIN_EXE_vhdx-ublk"));
    let full = Command::new("sh").args(["-c", &script]).current_dir(raw.parent().expect("a folder")).output();
    let full: Ran = full.expect("it runs").into();
    assert!(full.failed(1).contains("ulimit -f"), "a limit of 2 MiB");
    let mut command = program();
    command.arg("convert").arg("--force").arg("-").arg(&kept).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("it runs");
    // It stays open: the stream has not ended.
    let mut pipe = child.stdin.take().expect("piped");
    pipe.write_all(&vec![1; 2 << 20]).expect("room");
    while bench.names().len() < 3 {
        thread::sleep(Duration::from_millis(10));
    }
    kill(Pid::from_raw(i32::try_from(child.id()).expect("a process")), Signal::SIGTERM).expect("ours");
    assert_eq!(child.wait().expect("it ends").code(), Some(1));
    before.assert_kept(&kept);
    assert_eq!(bench.names(), ["a.raw", "kept.vhdx"]);
    convert(&raw, &kept, &[]).failed(1);
    convert(&raw, &bench.path("a.qcow2"), &[]).failed(1);
    convert(&raw, &bench.path("unnamed"), &[]).failed(2);
    convert(&raw, &raw, &["--force"]).failed(2);
    fs::write(bench.path("notes.txt"), "mine").expect("room");
    convert(&raw, &bench.path("notes.txt"), &["--to", "vhdx", "--force"]).failed(1);
    assert_eq!(bench.names(), ["a.raw", "kept.vhdx", "notes.txt"]);
}

/// Old content of an existing target shows nowhere, behind the disk's end neither.
#[test]
fn an_existing_target_is_overwritten_whole() {
    let bench = Bench::new();
    let raw = raw_disk(&bench, "a.raw");
    let image = bench.path("a.vhdx");
    convert(&raw, &image, &[]).succeeded();
    let target = bench.path("old.raw");
    fs::write(&target, vec![0xee; 40 << 20]).expect("room");
    let inode = fs::metadata(&target).expect("there").ino();
    convert(&image, &target, &["--existing", "--verify"]).succeeded();
    let found = fs::metadata(&target).expect("there");
    assert_eq!((found.ino(), found.len()), (inode, 40 * MIB));
    let (status, text) = compare(&target, &raw, &[]);
    assert!(status == Some(0) && text.contains("larger, all of them zeros"), "{text}");
    assert_eq!(compare(&target, &raw, &["--strict"]).0, Some(1));
    File::create(&target).expect("ours").set_len(MIB).expect("room");
    assert!(convert(&image, &target, &["--existing"]).failed(1).contains("larger target"));
    assert!(convert(&raw, &image, &["--existing", "--to", "raw"]).failed(1).contains("it is an image"));
}

/// What does not fit is not left out, be it zeros: the disk would be another one.
#[test]
fn a_stream_longer_than_its_target_is_refused() {
    let bench = Bench::new();
    let (long, target) = (bench.path("long.raw"), bench.path("old.raw"));
    let mut bytes = vec![7; 512 << 10];
    bytes.resize(7 << 20, 0);
    fs::write(&long, bytes).expect("room");
    fs::write(&target, vec![0xee; 1 << 20]).expect("room");
    let mut command = program();
    command.args(["convert", "--existing", "-"]).arg(&target).stdin(File::open(&long).expect("ours"));
    let message = Ran::from(command.output().expect("it runs")).failed(1);
    assert!(message.contains("old.raw") && message.contains("larger target"), "{message}");
}

/// Whatever sector differs, `compare` finds it, and names its first byte.
#[test]
fn every_changed_sector_is_found() {
    let bench = Bench::new();
    let raw = raw_disk(&bench, "a.raw");
    let image = bench.path("a.vhdx");
    convert(&raw, &image, &[]).succeeded();
    let mut rng = fastrand::Rng::with_seed(3);
    let file = OpenOptions::new().read(true).write(true).open(&raw).expect("ours");
    let ends = [0, 511, 512, 37 * MIB + 511];
    for at in ends.into_iter().chain((0..30).map(|_| rng.u64(0..37 * MIB + 512))) {
        let mut old = [0];
        file.read_exact_at(&mut old, at).expect("there");
        file.write_all_at(&[old[0] ^ 0x40], at).expect("room");
        let (status, text) = compare(&raw, &image, &[]);
        assert!(status == Some(1) && text.ends_with(&format!(" byte {at}\n")), "byte {at}: {text}");
        file.write_all_at(&old, at).expect("room");
    }
    assert_same(&raw, &image);
    assert_eq!(compare(&raw, &bench.path("missing"), &[]).0, Some(2));
    let seen = program().args(["compare", "--json"]).args([&raw, &image]).output().expect("it runs");
    let seen: Value = serde_json::from_slice(&seen.stdout).expect("JSON");
    assert_eq!((&seen["same"], &seen["first_difference"]), (&Value::Bool(true), &Value::Null));
}

/// What `measure` says is what a disk without stored zeros takes, and never less than any disk takes.
#[test]
fn what_is_measured_is_what_it_takes() {
    let bench = Bench::new();
    let raw = raw_disk(&bench, "a.raw");
    let dense = bench.path("dense.raw");
    fs::write(&dense, vec![5; 9 << 20]).expect("room");
    for (source, exact) in [(&raw, false), (&dense, true)] {
        for (name, options, _) in TARGETS {
            let target = bench.path(name);
            convert(source, &target, &[options, &["--force"]].concat()).succeeded();
            let format = Path::new(name).extension().and_then(|end| end.to_str()).expect("a name");
            let measure = [&["measure", "--json", "--to", format], options].concat();
            let measured = program().args(measure).arg(source).output().expect("it runs");
            let measured: Value = serde_json::from_slice(&measured.stdout).expect("JSON");
            let found = fs::metadata(&target).expect("there");
            let taken = if format == "raw" { found.blocks() * 512 } else { found.len() };
            let required = measured["required"].as_u64().expect("a number");
            assert!(taken <= required && (!exact || taken == required), "{name}: {taken} of {measured}");
            assert!(measured["fully-allocated"].as_u64().expect("a number") >= required);
        }
    }
}

/// A VHD that was cut short is refused; a footer that is damaged is made up for by its copy, and that is
/// said.
#[test]
fn damaged_vhds_are_refused_or_read_as_far_as_is_certain() {
    let bench = Bench::new();
    let raw = raw_disk(&bench, "a.raw");
    for (name, options) in [("dynamic.vhd", &[][..]), ("fixed.vhd", &["--type", "fixed"])] {
        let image = bench.path(name);
        convert(&raw, &image, options).succeeded();
        let length = fs::metadata(&image).expect("there").len();
        let file = OpenOptions::new().write(true).open(&image).expect("ours");
        file.write_all_at(&[0xee], length - 100).expect("room");
        let (status, text) = compare(&raw, &image, &["--other-from", "vhd"]);
        if name == "dynamic.vhd" {
            assert!(status == Some(0) && text.contains("its copy at the front"), "{text}");
            file.set_len(length - 600_000).expect("shorter");
            let (status, text) = compare(&raw, &image, &[]);
            assert!(status == Some(2) && text.contains("a block ends at byte"), "{text}");
        } else {
            assert!(status == Some(2) && text.contains("--from raw"), "{text}");
        }
    }
}

/// Huge and empty disks pass by their data.
#[test]
fn a_sparse_disk_takes_as_little_as_its_data() {
    let bench = Bench::new();
    let huge = bench.image("huge.vhdx", &["--size", "64T"]);
    let target = bench.path("b.vhdx");
    convert(&huge, &target, &["--block-size", "1M", "--verify"]).succeeded();
    assert!(fs::metadata(&target).expect("there").blocks() * 512 < 8 * MIB);
    let raw = bench.path("a.raw");
    File::create(&raw).expect("room").set_len(8 << 40).expect("a host of large files");
    convert(&raw, &target, &["--force"]).succeeded();
    convert(&target, &raw, &["--force", "--verify"]).succeeded();
    assert!(fs::metadata(&raw).expect("there").blocks() * 512 < MIB);
}

/// What is clearly another kind of image is no raw disk, in a file or a pipe, unless the user says so.
#[test]
fn other_images_are_not_taken_for_raw_disks() {
    let bench = Bench::new();
    let target = bench.path("b.vhdx");
    let image = bench.path("damaged.img");
    fs::rename(bench.image("damaged.vhdx", &["--size", "8M"]), &image).expect("ours");
    OpenOptions::new()
        .write(true)
        .open(&image)
        .expect("ours")
        .write_all_at(&vec![0; 65_536], 0)
        .expect("room");
    let mut vdi = vec![0; 1 << 20];
    vdi[64..68].copy_from_slice(b"\x7f\x10\xda\xbe");
    fs::write(bench.path("a.img"), vdi).expect("room");
    fs::write(bench.path("a.vhd"), vec![7; 1 << 20]).expect("room");
    for (name, said) in [("damaged.img", "salvage"), ("a.img", "VDI"), ("a.vhd", "--from raw")] {
        let source = bench.path(name);
        let refused = convert(&source, &target, &[]).failed(1);
        assert!(refused.contains(said) && !target.exists(), "{refused}");
        convert(&source, &bench.path("b.raw"), &["--from", "raw", "--force"]).succeeded();
    }
    let whole = bench.image("whole.vhdx", &["--size", "8M"]);
    for (options, status) in [(&[][..], 1), (&["--from", "raw"], 0)] {
        let mut command = program();
        command.arg("convert").args(options).arg("-").arg(&target).stdin(File::open(&whole).expect("ours"));
        let ran: Ran = command.output().expect("it runs").into();
        assert!(ran.status == Some(status) && target.exists() == (status == 0), "{}", ran.stderr);
    }
}

/// All commands give one piece of advice about images of others, and it is a command that works.
#[test]
fn the_advice_about_other_images_can_be_followed() {
    if !has("qemu-img") {
        return skipped("qemu-img is not installed: the advice was not followed");
    }
    let bench = Bench::new();
    let raw = raw_disk(&bench, "a.raw");
    let (old, new) = (bench.path("old"), bench.path("new.vhdx"));
    for format in ["qcow2", "vmdk", "vdi"] {
        qemu(&["convert", "-f", "raw", "-O", format, raw.to_str().expect("UTF-8")], &old);
        let told = [
            run(&["info".as_ref(), old.as_os_str()]).failed(1),
            convert(&old, &new, &["--force"]).failed(1),
            run(&["measure", "--to", "raw", old.to_str().expect("UTF-8")]).failed(1),
        ];
        let advice = told.each_ref().map(|told| told.rsplit_once("try: ").expect("advice").1.trim());
        assert!(advice.iter().all(|other| *other == advice[0]), "{advice:?}");
        let command = advice[0].strip_prefix("convert it first: ").expect("a command");
        let words = command.split(' ').map(|word| match word {
            "OLD" => old.to_str().expect("UTF-8"),
            "NEW.vhdx" => new.to_str().expect("UTF-8"),
            word => word,
        });
        let words: Vec<&str> = words.collect();
        let ran = Command::new(words[0]).args(&words[1..]).output().expect("it runs");
        assert!(ran.status.success(), "{command}: {}", String::from_utf8_lossy(&ran.stderr));
        assert_same(&raw, &new);
    }
}

/// It ends with a line that says what was made; nothing comes between a disk and its pipe.
#[test]
fn a_conversion_says_what_it_has_made() {
    let bench = Bench::new();
    let raw = raw_disk(&bench, "a.raw");
    for (target, options, said) in [
        ("b.vhdx", &[][..], "b.vhdx: VHDX, dynamic, a disk of 37 MiB; "),
        ("c.vhd", &["--type", "fixed"], "c.vhd: VHD, fixed, a disk of 37 MiB; "),
        ("d.raw", &[], "d.raw: raw, a disk of 37 MiB; "),
    ] {
        let line = convert(&raw, &bench.path(target), options).succeeded();
        assert!(line.contains(said) && line.contains(" written") && line.ends_with(" s\n"), "{line}");
        assert_eq!(line.lines().count(), 1, "{line}");
    }
    let json = convert(&raw, &bench.path("e.vhdx"), &["--json"]).succeeded();
    let json: Value = serde_json::from_str(&json).expect("JSON");
    assert!(json["seconds"].as_f64().is_some_and(|seconds| seconds > 0.0), "{json}");
    let planned = convert(&raw, &bench.path("f.vhdx"), &["--json", "--dry-run"]).succeeded();
    let planned: Value = serde_json::from_str(&planned).expect("JSON");
    assert!(planned["seconds"].is_null(), "{planned}");
}

/// A stream becomes nothing that Azure does not take.
#[test]
fn a_stream_for_azure_has_whole_mib() {
    let bench = Bench::new();
    for (bytes, expected) in [((21 << 20) + 5, Some(22 * MIB + 512)), (1 << 20, None)] {
        let (raw, target) = (bench.path("a.raw"), bench.path("a.vhd"));
        File::create(&raw).expect("room").set_len(bytes).expect("room");
        let mut command = program();
        command.args(["convert", "--azure", "-"]).arg(&target).stdin(File::open(&raw).expect("ours"));
        let ran: Ran = command.output().expect("it runs").into();
        assert_eq!(fs::metadata(&target).ok().map(|found| found.len()), expected, "{}", ran.stderr);
        let _ = fs::remove_file(&target);
    }
}

/// The users of a file that is replaced get no more than those of the source have.
#[test]
fn a_replaced_file_shows_its_readers_nothing_new() {
    let bench = Bench::new();
    let (raw, target) = (raw_disk(&bench, "a.raw"), bench.path("b.vhdx"));
    convert(&raw, &target, &[]).succeeded();
    let permit = |path: &Path, mode: u32| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("ours");
    };
    let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    for (source, expected) in [(0o600, 0o600), (0o640, 0o640), (0o644, 0o644)] {
        permit(&target, 0o664);
        permit(&raw, source);
        convert(&raw, &target, &["--force"]).succeeded();
        assert_eq!(mode(&target), expected);
    }
    if nix::unistd::geteuid().is_root() {
        let stranger = Some(12_345);
        std::os::unix::fs::chown(&target, stranger, stranger).expect("root may");
        let noted = convert(&raw, &target, &["--force"]);
        assert!(noted.status == Some(0) && noted.stderr.contains("becomes yours"), "{}", noted.stderr);
        assert_eq!((fs::metadata(&target).expect("there").uid(), mode(&target)), (0, 0o600));
        let link = bench.path("link.raw");
        std::os::unix::fs::symlink(&raw, &link).expect("room");
        std::os::unix::fs::lchown(&link, stranger, stranger).expect("root may");
        for options in [&["--existing"][..], &["--force"]] {
            convert(&target, &link, options).failed(1);
        }
        convert(&link, &bench.path("c.raw"), &[]).failed(1);
    }
}

/// What helps is the folder, not free space.
#[test]
fn a_target_in_a_missing_folder_is_told_as_such() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "64M"]);
    let target = bench.path("none/b.raw");
    for options in [&[][..], &["--ignore-room"]] {
        let ran = program().arg("convert").args(options).args([&image, &target]).output().expect("it runs");
        let refusal = Ran::from(ran).failed(1);
        assert!(refusal.contains("there is no such folder"), "{refusal}");
        assert!(refusal.contains("create it first: mkdir -p "), "{refusal}");
    }
    assert_eq!(bench.names(), ["a.vhdx"]);
}

/// As of a pipe to `head`: the exit status shows it.
#[test]
fn a_reader_that_leaves_is_told_nothing() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "64M"]);
    let mut command = program();
    command.arg("convert").arg(&image).arg("-").stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("it runs");
    drop(child.stdout.take());
    let ran = child.wait_with_output().expect("it ends");
    assert_eq!((ran.status.code(), String::from_utf8_lossy(&ran.stderr)), (Some(1), "".into()));
}
