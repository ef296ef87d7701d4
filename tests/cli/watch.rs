//! Promises defended here: `doctor` and `metrics` change nothing that was not named, and their exit status
//! and their output agree.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use serde_json::Value;

use super::{Bench, Snapshot, run};

fn checks(ran: &super::Ran) -> (Option<i32>, Vec<Value>) {
    assert_eq!(ran.stderr, "");
    let checks: Vec<Value> = serde_json::from_str(&ran.stdout).expect("an array");
    for finding in &checks {
        let object = finding.as_object().expect("an object");
        assert_eq!(object.len(), 4, "{finding}");
        assert!(finding["check"].is_string() && finding["found"].is_string(), "{finding}");
        assert_eq!(finding["remedy"].is_null(), finding["fine"] == true, "{finding}");
    }
    (ran.status, checks)
}

fn check<'a>(checks: &'a [Value], name: &str) -> &'a Value {
    checks.iter().find(|finding| finding["check"] == name).unwrap_or_else(|| panic!("no check of the {name}"))
}

#[test]
fn doctor_shows_by_its_exit_status_whether_all_is_fine() {
    let (status, found) = checks(&run(&["doctor", "--json"]));
    let fine = found.iter().all(|finding| finding["fine"] == true);
    assert_eq!(status, Some(i32::from(!fine)));
    for name in ["kernel", "driver", "permissions", "io_uring", "room in /run", "locked memory", "udev rule"]
    {
        check(&found, name);
    }
    let text = run(&["doctor"]);
    assert_eq!((text.status, text.stderr.as_str()), (status, ""));
    assert!(text.stdout.lines().count() >= found.len(), "{}", text.stdout);
}

#[test]
fn doctor_leaves_the_image_and_its_folder_as_they_were() {
    let bench = Bench::new();
    let image = bench.image("disk.vhdx", &["--size", "64M"]);
    let before = Snapshot::of(&image);
    let path = image.to_str().expect("ours are UTF-8");
    let (_, found) = checks(&run(&["doctor", "--json", path]));
    for name in ["image", "lock", "chain", "sparse for Windows", "change tracking"] {
        assert_eq!(check(&found, name)["fine"], true, "{found:?}");
    }
    assert_eq!(check(&found, "image")["found"], "VHDX, dynamic, 64 MiB");
    for name in ["file system", "direct I/O", "giving space back", "sync", "space left"] {
        check(&found, name);
    }
    before.assert_kept(&image);
    assert_eq!(bench.names(), ["disk.vhdx"]);
}

#[test]
fn doctor_finds_what_is_wrong_with_an_image() {
    let bench = Bench::new();
    let parent = bench.image("parent.vhdx", &["--size", "64M"]);
    let child = bench.image("child.vhdx", &["--parent", parent.to_str().expect("UTF-8")]);
    let path = child.to_str().expect("ours are UTF-8");
    let (_, found) = checks(&run(&["doctor", "--json", path]));
    let chain = check(&found, "chain");
    assert!(
        chain["fine"] == true && chain["found"].as_str().is_some_and(|text| text.contains("parent.vhdx"))
    );
    fs::remove_file(&parent).expect("there");
    fs::write(bench.path("child.vhdx.rct"), "").expect("room");
    let (status, found) = checks(&run(&["doctor", "--json", path]));
    assert_eq!(status, Some(1));
    assert_eq!(
        (&check(&found, "chain")["fine"], &check(&found, "change tracking")["fine"]),
        (&false.into(), &false.into())
    );
    fs::write(bench.path("text.vhdx"), "no image").expect("room");
    let (status, found) =
        checks(&run(&["doctor", "--json", bench.path("text.vhdx").to_str().expect("UTF-8")]));
    assert_eq!((status, found.len()), (Some(1), 1));
    let (status, found) =
        checks(&run(&["doctor", "--json", bench.path("missing.vhdx").to_str().expect("UTF-8")]));
    assert_eq!((status, found.len()), (Some(1), 1));
    assert_eq!(found[0]["remedy"], "check the spelling of the path");
}

#[test]
fn metrics_end_as_the_format_demands_and_replace_nothing_but_a_file() {
    let text = run(&["metrics"]).succeeded();
    assert!(text.starts_with("# HELP vhdx_ublk_") && text.ends_with("# EOF\n"), "{text}");
    let bench = Bench::new();
    let (file, link) = (bench.path("vhdx.prom"), bench.path("link.prom"));
    let written = |path: &std::path::Path| run(&["metrics", "--textfile", path.to_str().expect("UTF-8")]);
    assert_eq!(written(&file).succeeded(), "");
    let found = fs::metadata(&file).expect("there");
    assert_eq!(found.permissions().mode() & 0o777, 0o644);
    assert!(fs::read_to_string(&file).expect("readable").ends_with("# EOF\n"));
    fs::write(bench.path("theirs"), "theirs").expect("room");
    symlink(bench.path("theirs"), &link).expect("room");
    written(&link).failed(1);
    assert_eq!(fs::read_to_string(bench.path("theirs")).expect("there"), "theirs");
    assert_eq!(bench.names(), ["link.prom", "theirs", "vhdx.prom"]);
}

#[test]
fn stats_of_what_is_no_device_are_an_error() {
    let bench = Bench::new();
    let image = bench.image("disk.vhdx", &["--size", "64M"]);
    run(&["stats", image.to_str().expect("UTF-8")]).failed(1);
    run(&["stats", "--json", "4711"]).failed_as_json();
}
