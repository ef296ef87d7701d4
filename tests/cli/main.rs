//! The promises of the command line that need no ublk: exit statuses, what is printed where, and that no file
//! is changed, left behind or overwritten that should not be.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use skip::skipped;
use tempfile::TempDir;
use vhdx_ublk::disk::{Access, ImageFile};

mod check;
mod compact;
mod convert;
mod damage;
mod images;
mod info;
mod intruder;
mod manual;
mod map;
mod merge;
mod move_chain;
mod probes;
mod relink;
mod resize;
mod salvage;
mod schema;
mod set;
mod shortage;
#[path = "../skip/mod.rs"]
mod skip;
mod snapshot;
mod watch;

const MIB: u64 = 1 << 20;

/// What no test shares with another.
struct Bench(TempDir);

impl Bench {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary folder"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A fresh image.
    fn image(&self, name: &str, options: &[&str]) -> PathBuf {
        let path = self.path(name);
        create(&path, options).succeeded();
        path
    }

    fn names(&self) -> Vec<String> {
        let items = fs::read_dir(self.0.path()).expect("readable");
        let name = |item: std::io::Result<fs::DirEntry>| item.expect("readable").file_name().into_string();
        let mut names: Vec<_> = items.map(|item| name(item).expect("ours are UTF-8")).collect();
        names.sort();
        names
    }
}

/// What a command did.
struct Ran {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).expect("the program writes UTF-8");
        Self { status: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }
}

impl Ran {
    /// Exit status 0, and nothing on standard error.
    fn succeeded(self) -> String {
        assert_eq!((self.status, self.stderr.as_str()), (Some(0), ""), "{}", self.stdout);
        self.stdout
    }

    /// This exit status, a message with a remedy on standard error, and nothing on standard output.
    fn failed(self, status: i32) -> String {
        assert_eq!((self.status, self.stdout.as_str()), (Some(status), ""), "{}", self.stderr);
        assert!(
            self.stderr.starts_with("vhdx-ublk: ") && self.stderr.contains("\n  try: "),
            "{}",
            self.stderr
        );
        self.stderr
    }

    /// Something printed, then exit status 1 and a message: what was printed, and that.
    fn broke_off(self) -> (String, String) {
        assert!(self.status == Some(1) && !self.stdout.is_empty(), "{}", self.stderr);
        assert!(self.stderr.starts_with("vhdx-ublk: "), "{}", self.stderr);
        (self.stdout, self.stderr)
    }

    /// Refused by the parser of the command line.
    fn misused(self) -> String {
        assert_eq!((self.status, self.stdout.as_str()), (Some(2), ""), "{}", self.stderr);
        self.stderr
    }

    /// An error as JSON on standard output, and nothing on standard error.
    fn failed_as_json(self) -> Value {
        assert_eq!((self.status, self.stderr.as_str()), (Some(1), ""), "{}", self.stdout);
        let value: Value = serde_json::from_str(&self.stdout).expect("one JSON value");
        assert_eq!(value.as_object().map(serde_json::Map::len), Some(1));
        value["error"].clone()
    }
}

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhdx-ublk"));
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

fn run<A: AsRef<OsStr>>(arguments: &[A]) -> Ran {
    program().args(arguments).output().expect("it runs").into()
}

fn on(command: &str, image: &Path, options: &[&str]) -> Ran {
    program().arg(command).args(options).arg("--").arg(image).output().expect("it runs").into()
}

fn create(image: &Path, options: &[&str]) -> Ran {
    on("create", image, options)
}

fn info(image: &Path) -> Value {
    serde_json::from_str(&on("info", image, &["--json"]).succeeded()).expect("one JSON value")
}

fn has(tool: &str) -> bool {
    Command::new(tool).arg("--version").output().is_ok_and(|output| output.status.success())
}

/// The bytes and times of a file, to see that neither has changed.
#[derive(PartialEq)]
struct Snapshot {
    bytes: Vec<u8>,
    times: [(i64, i64); 3],
}

impl Snapshot {
    fn of(path: &Path) -> Self {
        let bytes = fs::read(path).expect("readable");
        let found = fs::metadata(path).expect("there");
        let times = [
            (found.atime(), found.atime_nsec()),
            (found.mtime(), found.mtime_nsec()),
            (found.ctime(), found.ctime_nsec()),
        ];
        Self { bytes, times }
    }

    fn assert_kept(&self, path: &Path) {
        let found = fs::metadata(path).expect("there");
        let now = [
            (found.atime(), found.atime_nsec()),
            (found.mtime(), found.mtime_nsec()),
            (found.ctime(), found.ctime_nsec()),
        ];
        assert_eq!(self.times, now, "times of {}", path.display());
        assert!(self.bytes == fs::read(path).expect("readable"), "bytes of {}", path.display());
    }
}

/// `info` shows the options that `create` was given.
#[test]
fn what_create_makes_info_shows() {
    let bench = Bench::new();
    let cases = [
        ("10G", 10 * 1024 * MIB, "dynamic", "2M", 2 * MIB, "not-present"),
        ("513K", 513 << 10, "dynamic", "1M", MIB, "zero"),
        ("64T", 64 * 1024 * 1024 * MIB, "dynamic", "256M", 256 * MIB, "not-present"),
        ("9MiB", 9 * MIB, "fixed", "2M", 2 * MIB, ""),
    ];
    for (index, (size, bytes, kind, block, block_bytes, state)) in cases.into_iter().enumerate() {
        let mut options = vec!["--size", size, "--type", kind, "--block-size", block, "--log-size", "3M"];
        if !state.is_empty() {
            options.extend(["--block-state", state]);
        }
        let info = info(&bench.image(&format!("{index}.vhdx"), &options));
        let total = bytes.div_ceil(block_bytes);
        let in_state = |name: &str| if name.replace('-', "_") == state.replace('-', "_") { total } else { 0 };
        assert_eq!(info["format"], "vhdx");
        assert_eq!(info["type"], kind);
        assert_eq!(info["virtual_size"], bytes);
        assert_eq!(info["block_size"], block_bytes);
        assert_eq!(
            (&info["logical_sector_size"], &info["physical_sector_size"]),
            (&512.into(), &4096.into())
        );
        assert_eq!(
            info["log"],
            serde_json::json!({"state": "clean", "size": 3 * MIB, "offset": MIB, "entries": 0})
        );
        assert_eq!(info["blocks"]["total"], total);
        assert_eq!(info["blocks"]["allocated"], if kind == "fixed" { total } else { 0 });
        assert_eq!(info["blocks"]["zero"], in_state("zero"));
        assert_eq!(info["blocks"]["not_present"], in_state("not_present"));
        if kind == "fixed" {
            assert!(info["host_bytes"].as_u64() >= Some(bytes), "its space is provisioned");
        }
    }
}

/// On its way to Windows a file has no holes, and is the same image.
#[test]
fn a_dense_file_has_no_holes() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "64M", "--type", "fixed", "--log-size", "9M"]);
    let before = fs::read(&image).expect("readable");
    let answer = on("compact", &image, &["--length", "--dense", "--json"]).succeeded();
    let answer: Value = serde_json::from_str(&answer).expect("one JSON value");
    let found = fs::metadata(&image).expect("there");
    assert!(found.blocks() * 512 >= found.len(), "{answer}");
    assert!(answer["filled_bytes"].as_u64() >= Some(8 * MIB), "{answer}");
    let after = fs::read(&image).expect("readable");
    assert!(before[4 << 20..] == after[4 << 20..]);
    on("check", &image, &[]).succeeded();
}

/// The keys that scripts rely on.
#[test]
fn info_as_json_has_every_key() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "1G", "--logical-sector-size", "4096"]);
    let info = info(&image);
    for key in ["disk_id", "file_write_guid", "data_write_guid"] {
        let text = info[key].as_str().expect("text");
        assert!(text.len() == 36 && text.chars().all(|c| c == '-' || c.is_ascii_hexdigit()), "{key}: {text}");
    }
    assert_eq!(info["logical_sector_size"], 4096);
    assert_eq!(info["creator"], concat!("vhdx-ublk ", env!("CARGO_PKG_VERSION")));
    assert_eq!(info["image"].as_str().map(Path::new), Some(&*image.canonicalize().expect("there")));
    assert_eq!(info["file_size"], fs::metadata(&image).expect("there").len());
    for key in ["host_bytes", "header_sequence", "fragmentation"] {
        assert!(info[key].is_u64(), "{key}");
    }
    for state in ["total", "allocated", "zero", "not_present", "unmapped", "undefined", "partial"] {
        assert!(info["blocks"][state].is_u64(), "{state}");
    }
    let names: Vec<_> = info["regions"].as_array().expect("an array").iter().map(|r| &r["name"]).collect();
    assert_eq!(names, ["BAT", "metadata"]);
    for key in ["parent", "attached"] {
        assert!(info.as_object().expect("an object").contains_key(key) && info[key].is_null(), "{key}");
    }
    assert_eq!(info["in_use"], false);
}

#[test]
fn info_for_people_gives_bytes_and_a_unit() {
    let bench = Bench::new();
    let text = on("info", &bench.image("a.vhdx", &["--size", "10G"]), &[]).succeeded();
    for line in [
        "format:          VHDX, dynamic",
        "virtual size:    10737418240 (10 GiB)",
        "block size:      2097152 (2 MiB)",
        "blocks:          5120 in total: 0 allocated, 5120 not present",
    ] {
        assert!(text.lines().any(|found| found == line), "{line:?} is missing in\n{text}");
    }
}

/// A look leaves no trace, not even a time.
#[test]
fn info_changes_nothing() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "1G"]);
    let before = Snapshot::of(&image);
    info(&image);
    on("info", &image, &[]).succeeded();
    before.assert_kept(&image);
}

/// QEMU opens what we make, and finds nothing wrong with it.
#[test]
fn qemu_accepts_what_create_makes() {
    if !has("qemu-img") {
        return skipped("qemu-img is not installed: no other program has read the images that create makes");
    }
    let bench = Bench::new();
    let image = bench.path("a.vhdx");
    let sizes = [("1M", MIB), ("2M", 2 * MIB), ("32M", 32 * MIB), ("256M", 256 * MIB)];
    for (block, block_bytes) in sizes {
        for (size, bytes, more) in [
            ("64T", 64 * 1024 * 1024 * MIB, &[][..]),
            ("100M", 100 * MIB, &["--block-state", "zero"]),
            ("5G", 5120 * MIB, &["--block-state", "zero", "--log-size", "8M"]),
            ("1000K", 1000 << 10, &["--physical-sector-size", "512"]),
            ("33M", 33 * MIB, &["--type", "fixed"]),
        ] {
            let options = [&["--force", "--size", size, "--block-size", block][..], more].concat();
            create(&image, &options).succeeded();
            let seen = qemu(&["info", "--output=json"], &image);
            let seen: Value = serde_json::from_str(&seen).expect("JSON");
            assert_eq!(
                (&seen["format"], &seen["virtual-size"]),
                (&"vhdx".into(), &bytes.into()),
                "{options:?}"
            );
            assert_eq!(seen["cluster-size"], block_bytes);
            assert_eq!(seen["dirty-flag"], false);
            qemu(&["check"], &image);
        }
    }
}

fn qemu(arguments: &[&str], image: &Path) -> String {
    let output = Command::new("qemu-img").args(arguments).arg(image).output().expect("it runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// A child has its parent's disk and a way to it, in whatever folder it is; the parent stays as it is.
#[test]
fn a_child_is_made_of_its_parent_and_leaves_it_alone() {
    let bench = Bench::new();
    let parent = bench.path("base.vhdx");
    create(&parent, &["--size", "5G", "--logical-sector-size", "4096"]).succeeded();
    let (before, of_parent) = (Snapshot::of(&parent), info(&parent));
    fs::create_dir(bench.path("children")).expect("a folder");
    let child = bench.path("children/child.vhdx");
    let named = parent.to_str().expect("UTF-8");
    create(&child, &["--parent", named, "--block-size", "1M"]).succeeded();
    let of_child = info(&child);
    for same in ["virtual_size", "logical_sector_size", "physical_sector_size", "disk_id"] {
        assert_eq!(of_child[same], of_parent[same], "{same}");
    }
    assert_eq!((&of_child["type"], &of_child["block_size"]), (&"differencing".into(), &MIB.into()));
    assert_eq!(of_child["parent"]["relative_path"], r"..\base.vhdx");
    let linkage = of_child["parent"]["parent_linkage"].as_str().expect("a linkage");
    assert_eq!(Some(linkage.trim_matches(['{', '}'])), of_parent["data_write_guid"].as_str());
    on("info", &child, &["--chain"]).succeeded();
    on("check", &child, &[]).succeeded();
    before.assert_kept(&parent);
    let other = bench.path("other.vhdx");
    for wrong in [
        &["--type", "differencing", "--size", "1G"][..],
        &["--type", "differencing"],
        &["--type", "dynamic"],
        &["--type", "fixed", "--parent", named],
        &["--size", "5G", "--parent", named],
        &["--logical-sector-size", "512", "--parent", named],
    ] {
        create(&other, wrong).misused();
        assert!(!other.exists(), "{wrong:?}");
    }
}

/// Wrong sizes and combinations are wrong usage, and make no file.
#[test]
fn numbers_that_make_no_image_make_no_file() {
    let bench = Bench::new();
    let image = bench.path("a.vhdx");
    for size in
        ["", "0", "G", "-1", "1.5G", "10X", "10GB", "65T", "16E", "99999999999999999999", "0x10", "1 G"]
    {
        let message = create(&image, &["--size", size]).misused();
        assert!(message.contains("--size"), "{message}");
    }
    for wrong in [
        ["--block-size", "3M"],
        ["--block-size", "512K"],
        ["--block-size", "512M"],
        ["--log-size", "0"],
        ["--log-size", "1025M"],
        ["--log-size", "1500K"],
        ["--logical-sector-size", "1024"],
        ["--physical-sector-size", "8K"],
        ["--type", "differencing"],
        ["--block-state", "full"],
    ] {
        let message = create(&image, &["--size", "1G", wrong[0], wrong[1]]).misused();
        assert!(message.contains(wrong[0]), "{message}");
    }
    for wrong in [
        &["--size", "513"][..],
        &["--size", "4608", "--logical-sector-size", "4096"],
        &["--size", "1G", "--logical-sector-size", "4096", "--physical-sector-size", "512"],
        &["--size", "1G", "--type", "fixed", "--block-state", "zero"],
    ] {
        create(&image, wrong).failed(2);
    }
    assert!(bench.names().is_empty(), "{:?}", bench.names());
}

#[test]
fn a_size_that_is_no_option_is_told_where_it_goes() {
    let bench = Bench::new();
    let image = bench.path("a.vhdx");
    let message = create(&image, &[]).failed(2);
    assert!(message.contains("--size"), "{message}");
    let after = |word: &str| program().arg("create").arg(&image).arg(word).output().expect("it runs");
    let message = Ran::from(after("10G")).misused();
    assert!(message.contains("--size 10G"), "{message}");
    let message = Ran::from(after("b.vhdx")).misused();
    assert!(message.contains("one image") && !message.contains("--size b"), "{message}");
    assert!(bench.names().is_empty(), "{:?}", bench.names());
}

/// A VHDX is made only under a name that does not promise another format.
#[test]
fn a_name_of_another_format_is_refused_with_advice() {
    let bench = Bench::new();
    for (name, advice) in [
        ("a.vhd", "vhdx-ublk convert"),
        ("a.VHD", "vhdx-ublk convert"),
        ("a.raw", "truncate"),
        ("a.img", "truncate"),
        ("a.qcow2", "qemu-img create"),
        ("a.vmdk", "qemu-img create"),
        ("a.vdi", "qemu-img create"),
    ] {
        let message = create(&bench.path(name), &["--size", "1M", "--force"]).failed(2);
        assert!(message.contains("name it ") && message.contains(".vhdx; "), "{name}: {message}");
        assert!(message.contains(advice), "{name}: {message}");
    }
    for name in ["a.vhdx", "a.avhdx", "a", "a.disk"] {
        create(&bench.path(name), &["--size", "1M"]).succeeded();
    }
    assert_eq!(bench.names(), ["a", "a.avhdx", "a.disk", "a.vhdx"]);
}

/// With --json, wrong usage is JSON too, wherever --json stands; a name behind `--` is no option.
#[test]
fn wrong_usage_is_json_where_json_is_wanted() {
    for (wrong, status, remedy) in [
        (&["compare", "a.vhdx", "--json"][..], 2, "vhdx-ublk compare --help"),
        (&["info", "--json"], 2, "vhdx-ublk info --help"),
        (&["check", "--json", "--bogus", "a.vhdx"], 1, "vhdx-ublk check --help"),
        (&["session", "list", "--json", "--bogus"], 2, "vhdx-ublk session list --help"),
        (&["compact", "a.vhdx", "--json", "--max-rate", "0"], 2, "vhdx-ublk compact --help"),
    ] {
        let ran = run(wrong);
        assert_eq!((ran.status, ran.stderr.as_str()), (Some(status), ""), "{wrong:?}: {}", ran.stdout);
        let value: Value = serde_json::from_str(&ran.stdout).expect("one JSON value");
        let error = &value["error"];
        assert_eq!((&error["kind"], &error["remedy"]), (&"usage".into(), &remedy.into()), "{error}");
        let message = error["message"].as_str().expect("a text");
        assert!(
            !message.is_empty() && !message.contains("Usage") && !message.contains("error:"),
            "{message}"
        );
    }
    run(&["compare", "a.vhdx", "--", "--json", "b", "c"]).misused();
}

#[test]
fn wrong_usage_exits_with_2() {
    let nothing: [&str; 0] = [];
    run(&nothing).misused();
    for wrong in [
        &["bogus"][..],
        &["create", "x.vhdx"],
        &["info"],
        &["del"],
        &["del", "--all", "0"],
        &["add"],
        &["add", "x", "--queues", "0"],
        &["add", "x", "--queues", "65"],
        &["add", "x", "--depth", "0"],
        &["add", "x", "--depth", "4097"],
        &["list", "--bogus"],
    ] {
        run(wrong).misused();
    }
    assert!(run(&["--help"]).succeeded().contains("vhdx-ublk create disk.vhdx --size 10G"));
    let first = ["add", "del", "list", "create", "info", "map", "set", "check", "relink", "merge", "move"];
    for command in first.into_iter().chain(["features"]) {
        let help = run(&[command, "--help"]).succeeded();
        assert!(help.contains("Exit status:") && !help.contains("--serve"), "{help}");
    }
}

/// Nothing is overwritten unless that was asked for; then by the whole new image.
#[test]
fn an_existing_file_is_replaced_by_force_only() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "1G"]);
    fs::set_permissions(&image, fs::Permissions::from_mode(0o640)).expect("ours");
    let before = Snapshot::of(&image);
    let message = create(&image, &["--size", "2G"]).failed(1);
    assert!(message.contains("a.vhdx") && message.contains("--force"), "{message}");
    before.assert_kept(&image);
    let first = info(&image)["disk_id"].clone();
    create(&image, &["--size", "2G", "--force"]).succeeded();
    assert_eq!(info(&image)["virtual_size"], 2048 * MIB);
    assert_ne!(info(&image)["disk_id"], first);
    assert_eq!(fs::metadata(&image).expect("there").mode() & 0o777, 0o640);
    create(&bench.path("b.vhdx"), &["--size", "2G", "--force"]).succeeded();
    assert_eq!(bench.names(), ["a.vhdx", "b.vhdx"]);
}

/// Neither the new image's own ancestor nor an image that others are made of is replaced.
#[test]
fn force_replaces_nobodys_parent() {
    let bench = Bench::new();
    let base = bench.image("base.vhdx", &["--size", "64M"]);
    let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let middle = bench.image("middle.vhdx", &["--parent", &text(&base)]);
    let leaf = bench.image("leaf.vhdx", &["--parent", &text(&middle)]);
    let before = [&base, &middle].map(|path| Snapshot::of(path));
    for (image, parent) in [(&base, &leaf), (&middle, &leaf), (&base, &middle), (&base, &base)] {
        let message = create(image, &["--parent", &text(parent), "--force"]).failed(1);
        assert!(message.contains("a descendant of the image that it replaces"), "{message}");
    }
    let message = create(&base, &["--size", "1G", "--force"]).failed(1);
    assert!(message.contains("it is the parent of") && message.contains("middle.vhdx"), "{message}");
    let [of_base, of_middle] = before;
    of_base.assert_kept(&base);
    of_middle.assert_kept(&middle);
    create(&leaf, &["--parent", &text(&middle), "--force"]).succeeded();
}

/// A link of the user's own is followed, not replaced.
#[test]
fn force_replaces_what_a_link_leads_to() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "1G"]);
    let link = bench.path("link");
    std::os::unix::fs::symlink(&image, &link).expect("room");
    create(&link, &["--size", "2G"]).failed(1);
    create(&link, &["--size", "2G", "--force"]).succeeded();
    assert!(fs::symlink_metadata(&link).expect("there").is_symlink());
    assert_eq!(info(&image)["virtual_size"], 2048 * MIB);
}

/// An image that somebody has open is neither replaced nor served, and the holder is named.
#[test]
fn an_image_in_use_is_left_alone_and_its_holder_named() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "1G"]);
    let before = Snapshot::of(&image);
    let holder = format!("(pid {})", std::process::id());
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let held = ImageFile::open(&image, access, Duration::ZERO).expect("free");
        let message = create(&image, &["--size", "2G", "--force"]).failed(1);
        assert!(message.contains("a.vhdx: another program has it open"), "{message}");
        assert!(message.contains(&holder), "{message}");
        drop(held);
    }
    let held = ImageFile::open(&image, Access::ReadWrite, Duration::ZERO).expect("free");
    let Ran { status, stdout, stderr } = on("add", &image, &[]);
    assert_eq!((status, stdout.as_str()), (Some(1), ""), "{stderr}");
    assert!(stderr.contains("waiting up to 5 s") && stderr.contains(&holder), "{stderr}");
    drop(held);
    before.assert_kept(&image);
    assert_eq!(bench.names(), ["a.vhdx"]);
}

/// A look is allowed while somebody writes, and says so.
#[test]
fn info_works_beside_a_writer() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "1G"]);
    let before = Snapshot::of(&image);
    let held = ImageFile::open(&image, Access::ReadWrite, Duration::ZERO).expect("free");
    let seen = info(&image);
    assert_eq!((&seen["in_use"], &seen["virtual_size"]), (&true.into(), &(1024 * MIB).into()));
    let holder = format!("(pid {})", std::process::id());
    let users = seen["used_by"].as_array().expect("an array");
    assert!(users.iter().any(|user| user.as_str().is_some_and(|user| user.contains(&holder))), "{users:?}");
    let text = on("info", &image, &[]).succeeded();
    assert!(text.contains("figures may be out of date") && text.contains(&holder), "{text}");
    drop(held);
    before.assert_kept(&image);
}

/// A file system without room fails the image and gets its space back.
#[test]
fn without_room_no_file_is_left() {
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else {
        return skipped("no /dev/shm to run out of room on");
    };
    let room = nix::sys::statvfs::statvfs(folder.path()).expect("mounted");
    if room.blocks() == 0 || room.blocks() * room.fragment_size() > 1 << 40 {
        return skipped("/dev/shm has no bound to run into");
    }
    let image = folder.path().join("a.vhdx");
    let message = create(&image, &["--size", "2T", "--type", "fixed"]).failed(1);
    assert!(message.contains("a.vhdx") && message.contains("2 TiB") && message.contains("free"), "{message}");
    assert!(!image.exists());
    create(&image, &["--size", "1G"]).succeeded();
    let before = Snapshot::of(&image);
    create(&image, &["--size", "2T", "--type", "fixed", "--force"]).failed(1);
    before.assert_kept(&image);
    assert_eq!(fs::read_dir(folder.path()).expect("readable").count(), 1, "no remains");
}

/// A limit of the shell is an error with a remedy, not the program's end.
#[test]
fn limits_of_the_process_are_told() {
    let bench = Bench::new();
    let image = bench.image("old.vhdx", &["--size", "1G"]);
    let before = Snapshot::of(&image);
    let limited = |limit: &str, command: &str, image: &Path, options: &[&str]| {
        let mut shell = Command::new("sh");
        // A descriptor that this process was given is not to be the one that is left.
        let script = format!(r#"exec 3>&-; ulimit {limit}; exec "$0" "$@""#);
        shell.args(["-c", &script, env!("CARGO_BIN_EXE_vhdx-ublk"), command]).args(options).arg(image);
        Ran::from(shell.output().expect("it runs"))
    };
    let new = bench.path("new.vhdx");
    for (path, options) in [(&new, &["--size", "1G"][..]), (&image, &["--size", "1G", "--force"])] {
        let message = limited("-f 512", "create", path, options).failed(1);
        assert!(message.contains("File too large") && message.contains("ulimit -f"), "{message}");
    }
    assert_eq!(bench.names(), ["old.vhdx"]);
    before.assert_kept(&image);
    let message = limited("-n 4", "info", &image, &[]).failed(1);
    assert!(message.contains("Too many open files") && message.contains("ulimit -n"), "{message}");
}

/// Ctrl-C leaves no half-made file.
#[test]
fn an_interrupted_create_leaves_no_file() {
    let bench = Bench::new();
    let image = bench.image("old.vhdx", &["--size", "1G"]);
    let before = Snapshot::of(&image);
    for (name, force) in [("new.vhdx", None), ("old.vhdx", Some("--force"))] {
        // Half a GiB of BAT takes long enough to be interrupted.
        let options = ["--size", "64T", "--block-size", "1M", "--block-state", "zero"];
        let mut command = program();
        command.arg("create").args(options).args(force).arg(bench.path(name));
        let mut child = command.spawn().expect("it runs");
        let until = Instant::now() + Duration::from_secs(10);
        while bench.names().len() == 1 && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
        let pid = nix::unistd::Pid::from_raw(child.id().try_into().expect("a pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).expect("it runs still");
        let status = child.wait().expect("ours");
        assert_eq!(status.signal(), Some(2), "{status}");
        assert_eq!(bench.names(), ["old.vhdx"]);
    }
    before.assert_kept(&image);
}

/// What is no regular file is refused by name, without blocking.
#[test]
fn only_regular_files_are_images() {
    let bench = Bench::new();
    let fifo = bench.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("a FIFO can be made");
    for (path, what) in
        [(bench.0.path(), "a folder"), (&fifo, "a FIFO"), (Path::new("/dev/null"), "a character device")]
    {
        let name = path.display().to_string();
        for message in
            [on("info", path, &[]).stderr, on("add", path, &[]).stderr, on("add", path, &["-r"]).stderr]
        {
            assert!(message.contains(&name) && message.contains(what), "{message}");
        }
        assert_eq!(on("info", path, &["--json"]).failed_as_json()["kind"], "unsupported");
        assert_eq!(create(path, &["--size", "1G", "--force"]).status, Some(1));
        assert_eq!(create(path, &["--size", "1G"]).status, Some(1));
    }
    assert_eq!(bench.names(), ["fifo"]);
}

/// A path with a slash behind it is that of a folder: no file of that name is made. A folder is called that
/// at once, whether anything may be replaced or not.
#[test]
fn no_file_takes_the_place_of_a_folder() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "8M"]);
    fs::create_dir(bench.path("there")).expect("room");
    let source = image.to_str().expect("UTF-8");
    let commands: [&[&str]; 7] = [
        &["create", "--size", "8M"],
        &["create", "--size", "8M", "--force"],
        &["convert", source, "--to", "raw"],
        &["convert", source, "--to", "raw", "--force"],
        &["salvage", source],
        &["map", source, "--svg"],
        &["metrics", "--textfile"],
    ];
    for words in commands {
        for (target, what) in [
            ("gone/", "no such folder"),
            ("gone/.", "no such folder"),
            ("there/gone/", "no such folder"),
            ("there/", "folder"),
            ("there", "folder"),
        ] {
            let mut command = program();
            command.current_dir(bench.0.path()).args(words).arg(target);
            let ran = Ran::from(command.output().expect("it runs"));
            if words[0] == "metrics" && !target.ends_with("gone/") {
                assert_eq!(ran.status, Some(1), "{target}: {}", ran.stderr);
                continue;
            }
            let message = ran.failed(1);
            assert!(message.contains(what) && message.contains(target), "{words:?} {target}: {message}");
        }
    }
    assert_eq!(bench.names(), ["a.vhdx", "there"]);
    assert!(fs::read_dir(bench.path("there")).expect("readable").next().is_none());
    let message = on("info", &bench.path("there"), &[]).failed(1);
    assert!(message.contains("this is a folder") && message.contains("name a file in it"), "{message}");
}

/// A path is shown as it was typed, also where a command knows the absolute one when it fails.
#[test]
fn errors_call_a_file_as_the_user_does() {
    let bench = Bench::new();
    fs::write(bench.path("a raw.img"), vec![0; 1 << 20]).expect("room");
    for command in ["info", "check", "salvage", "merge", "set", "compact", "measure"] {
        for name in ["a raw.img", "./a raw.img", "../NAME/a raw.img"] {
            let folder = bench.0.path().file_name().and_then(OsStr::to_str).expect("UTF-8");
            let name = name.replace("NAME", folder);
            let mut words = vec![command, &name];
            words.extend(match command {
                "salvage" => &["--dry-run"][..],
                "set" => &["--disk-id", "new"],
                "measure" => &["--from", "vhdx", "--to", "raw"],
                _ => &[],
            });
            let ran = program().args(words).current_dir(bench.0.path()).output().expect("it runs");
            let message = Ran::from(ran).failed(1);
            assert!(message.starts_with(&format!("vhdx-ublk: {name}: ")), "{command} {name}: {message}");
            assert!(!message.contains("FILE"), "{message}");
        }
    }
}

/// Nothing is kept where a command has failed for want of an image, a line or a driver: as long as there is
/// no folder of devices, users convert their files without root.
#[test]
fn what_fails_makes_no_folder_of_devices() {
    let folder = Path::new("/run/vhdx-ublk");
    if !nix::unistd::geteuid().is_root() || folder.exists() || Path::new("/dev/ublk-control").exists() {
        return skipped("there are devices, or this is not root: what fails for want of them was not tried");
    }
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "8M"]);
    let (image, none, point) = (image.to_str().expect("UTF-8"), "no-such.vhdx", bench.path("point"));
    fs::create_dir(&point).expect("room");
    let point = point.to_str().expect("UTF-8");
    for words in [
        &["mount", "-r", image, point][..],
        &["mount", "-r", none, point],
        &["umount", point],
        &["add", image],
        &["add", none],
        &["disable", "no-such-disk"],
        &["start", "no-such-disk"],
        &["snapshot", image, none],
        &["del", "0"],
        &["recover", "0"],
        &["upgrade", "0"],
        &["features"],
    ] {
        assert_eq!(run(words).status, Some(1), "{words:?}");
        assert!(!folder.exists(), "{words:?} leaves {}", folder.display());
    }
    assert_eq!(run(&["compact", "--trim", image]).status, Some(1));
    assert!(!folder.exists(), "compact --trim leaves it");
}

#[test]
fn what_is_missing_is_said_to_be() {
    let bench = Bench::new();
    let image = bench.path("no/such.vhdx");
    for command in ["info", "add", "check", "merge"] {
        let message = on(command, &image, &[]).failed(1);
        assert!(message.contains("such.vhdx") && message.contains("No such file"), "{message}");
    }
    // A word may be the name of a device: one that ends as a file does is not.
    for image in [&image, Path::new("no-such.vhdx"), Path::new("./no-such")] {
        for (command, options) in
            [("compact", &[][..]), ("resize", &["--size", "1G"]), ("merge", &["--keep", "2"])]
        {
            let message = on(command, image, options).failed(1);
            assert!(message.contains("No such file") && message.contains("spelling"), "{message}");
        }
        for command in ["list", "revert"] {
            let words = ["snapshot".as_ref(), command.as_ref(), image.as_os_str(), "new.vhdx".as_ref()];
            let message = run(&words[..if command == "list" { 3 } else { 4 }]).failed(1);
            assert!(message.contains("No such file") && message.contains("spelling"), "{message}");
        }
    }
    create(&image, &["--size", "1G"]).failed(1);
    create(&image, &["--size", "1G", "--force"]).failed(1);
    let error = on("info", &image, &["--json"]).failed_as_json();
    assert_eq!(error["kind"], "not-found");
    assert!(
        error["remedy"].is_string() && error["file"].as_str().is_some_and(|file| file.ends_with("such.vhdx"))
    );
}

/// What is meant by the usage of other programs is said, with the command to use.
#[test]
fn what_was_meant_is_said() {
    let bench = Bench::new();
    let image = bench.image("a b.vhdx", &["--size", "8M"]);
    let at = |words: &[&str]| {
        let ran = program().args(words).current_dir(bench.0.path()).output().expect("it runs");
        Ran::from(ran)
    };
    let message = at(&["shrink", "a b.vhdx", "--size", "32M"]).failed(2);
    assert!(message.contains("vhdx-ublk resize 'a b.vhdx' --size 32M"), "{message}");
    let child = "vhdx-ublk create c.vhdx --parent 'a b.vhdx'";
    let message = at(&["snapshot", "a b.vhdx", "c.vhdx"]).failed(1);
    assert!(message.contains(child), "{message}");
    let message = at(&["snapshot", "create", "a b.vhdx", "c.vhdx"]).failed(2);
    assert!(message.contains(child), "{message}");
    let message = at(&["create", "c.vhdx", "--size", "10"]).failed(2);
    assert!(message.contains("10 bytes") && message.contains("--size 10G"), "{message}");
    let message = at(&["create", "c.vhdx", "--size", "100000"]).failed(2);
    assert!(message.contains("--size 100352") && !message.contains("100000G"), "{message}");
    let message = at(&["create", "c.vhd", "--size", "1G"]).failed(2);
    assert!(message.contains("vhdx-ublk convert c.vhdx c.vhd"), "{message}");
    assert_eq!(bench.names(), ["a b.vhdx"]);
    on("check", &image, &[]).succeeded();
}

/// Files of others are refused with that reason, and not changed.
#[test]
fn what_may_not_be_read_is_not_served() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "1G"]);
    fs::set_permissions(bench.0.path(), fs::Permissions::from_mode(0o755)).expect("ours");
    let before = Snapshot::of(&image);
    let as_nobody = |command: &str, options: &[&str]| {
        let mut program = program();
        program.arg(command).args(options).arg(&image);
        if nix::unistd::geteuid().is_root() {
            program.uid(65534).gid(65534);
        }
        program.output().map(Ran::from)
    };
    fs::set_permissions(&image, fs::Permissions::from_mode(0o000)).expect("ours");
    let Ok(read) = as_nobody("info", &[]) else {
        return skipped("root cannot run the program as another user: permissions are not tested");
    };
    let message = read.failed(1);
    assert!(message.contains("a.vhdx: opening the image: Permission denied"), "{message}");
    let message = as_nobody("add", &["--read-only"]).expect("it ran before").failed(1);
    assert!(message.contains("Permission denied"), "{message}");
    fs::set_permissions(&image, fs::Permissions::from_mode(0o444)).expect("ours");
    as_nobody("info", &[]).expect("it ran before").succeeded();
    as_nobody("add", &[]).expect("it ran before").failed(1);
    as_nobody("create", &["--size", "1G", "--force"]).expect("it ran before").failed(1);
    assert!(before.bytes == fs::read(&image).expect("readable"));
    assert_eq!(bench.names(), ["a.vhdx"]);
}

/// Without the driver nothing happens, and that is said.
#[test]
fn add_without_a_driver_says_so_and_changes_nothing() {
    if Path::new("/dev/ublk-control").exists() {
        // No fault of the machine's: the laboratory tests `add` with a driver.
        println!("this kernel has ublk: `add` without a driver is not tested");
        return;
    }
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "1G"]);
    let before = Snapshot::of(&image);
    for options in
        [&[][..], &["--read-only"], &["--foreground"], &["--foreground", "--read-only"], &["--depth", "4096"]]
    {
        let message = on("add", &image, options).failed(1);
        assert!(
            message.contains("kernel offers no ublk") && message.contains("modprobe ublk_drv"),
            "{message}"
        );
    }
    before.assert_kept(&image);
    ImageFile::open(&image, Access::ReadWrite, Duration::ZERO).expect("it is held no longer");
    assert_eq!(run(&["features", "--json"]).failed_as_json()["kind"], "no-driver");
    assert!(run(&["features"]).failed(1).contains("modprobe"));
    assert_eq!(run(&["list", "--json"]).succeeded(), "[]\n");
    assert_eq!(run(&["list"]).succeeded(), "");
    run(&["del", "0"]).failed(1);
    run(&["del", "--all"]).succeeded();
}

/// A reader that leaves early is no reason to crash.
#[test]
fn a_closed_pipe_is_no_failure() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "1G"]);
    let mut child = program().arg("info").arg(&image).stdout(Stdio::piped()).spawn().expect("it runs");
    drop(child.stdout.take());
    assert!(child.wait().expect("ours").success());
}

/// Images made by others, and what their table says of them.
#[test]
fn images_of_others_are_read() {
    let bench = Bench::new();
    for (name, kind, size, block) in [
        ("ext2", "dynamic", 4 * MIB, 8 * MIB),
        ("fat-parent", "fixed", 4 * MIB, 2 * MIB),
        ("fat-differential", "differencing", 4 * MIB, 2 * MIB),
        ("ntfs-fixed", "fixed", 4 * MIB, 2 * MIB),
        ("ntfs-dynamic", "dynamic", 4 * MIB, 32 * MIB),
        ("iotest-dynamic-1G", "dynamic", 1024 * MIB, 32 * MIB),
    ] {
        let image = bench.path(&format!("{name}.vhdx"));
        images::unpack(name, &image);
        let before = Snapshot::of(&image);
        let seen = info(&image);
        assert_eq!((&seen["type"], &seen["virtual_size"]), (&kind.into(), &size.into()), "{name}");
        assert_eq!(seen["block_size"], block, "{name}");
        on("info", &image, &[]).succeeded();
        assert_eq!(seen["parent"].is_object(), kind == "differencing");
        if kind == "differencing" {
            assert_eq!(seen["parent"]["relative_path"], r".\fat-parent.vhdx");
            let chain = on("info", &image, &["--chain", "--json"]).succeeded();
            let chain: Value = serde_json::from_str(&chain).expect("JSON");
            let types: Vec<_> = (0..2).map(|layer| chain["chain"][layer]["type"].as_str()).collect();
            assert_eq!(types, [Some("differencing"), Some("fixed")]);
            let elsewhere = image.with_file_name("elsewhere");
            fs::create_dir(&elsewhere).expect("a folder");
            let alone = elsewhere.join("alone.vhdx");
            fs::copy(&image, &alone).expect("room");
            let (printed, message) = on("info", &alone, &["--chain"]).broke_off();
            assert!(printed.contains("alone.vhdx") && message.contains("--parent-map"), "{message}");
            assert!(printed.contains("what its parents have is unknown"), "{printed}");
            let said = "in none of the places";
            assert!(message.contains(said) && !printed.contains(said), "it is said once: {printed}");
            on("info", &alone, &["--chain", "--json"]).failed_as_json();
            let parent = bench.path("fat-parent.vhdx");
            on("info", &alone, &["--chain", "--parent", parent.to_str().expect("UTF-8")]).succeeded();
        }
        before.assert_kept(&image);
    }
}

/// What is in the way, or missing, has the same words in every command that makes a file, and nothing is
/// left.
#[test]
fn a_file_in_the_way_and_a_missing_folder_have_one_wording() {
    let bench = Bench::new();
    let base = bench.image("base.vhdx", &["--size", "8M"]);
    let child = bench.image("child.vhdx", &["--parent", base.to_str().expect("UTF-8")]);
    let taken = bench.path("taken.vhdx");
    fs::write(&taken, "mine").expect("room");
    let nowhere = bench.path("nowhere").join("new.vhdx");
    for (place, words) in [(&taken, "there is a file already"), (&nowhere, "there is no such folder")] {
        let copy = format!("--copy={}", place.display());
        let svg = format!("--svg={}", place.display());
        let [base, child] = [&base, &child].map(|path| path.to_str().expect("UTF-8"));
        let place = place.to_str().expect("UTF-8");
        for arguments in [
            &["create", "--size", "8M", place][..],
            &["convert", base, place],
            &["salvage", base, place],
            &["merge", child, &copy],
            &["map", base, &svg],
        ] {
            let message = run(arguments).failed(1);
            assert!(message.contains(words), "{arguments:?}: {message}");
            let remedy =
                if words.contains("folder") { "create it first: mkdir -p" } else { "choose another name" };
            assert!(message.contains(remedy), "{arguments:?}: {message}");
        }
    }
    assert_eq!(fs::read_to_string(&taken).expect("readable"), "mine");
    assert_eq!(bench.names(), ["base.vhdx", "child.vhdx", "taken.vhdx"]);
}
