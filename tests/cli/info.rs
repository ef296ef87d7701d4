//! Promises defended here: `info` shows what is on a disk, through all layers, and damage there is a line.

use std::fs;
use std::process::Command;

use serde_json::{Value, json};

use crate::images::unpack;
use crate::skip::skipped;
use crate::{Bench, Snapshot, create, has, info, on, run};

#[test]
fn partitions_and_volumes_of_images_by_others_are_shown() {
    let bench = Bench::new();
    let cases = [
        ("ext2", 4 << 20, json!(null), "ext2", "ext2_test"),
        ("fat-parent", 3 << 20, json!("mbr"), "vfat", "TESTVOLUME"),
        ("fat-differential", 3 << 20, json!("mbr"), "vfat", "TESTVOLUME"),
        ("ntfs-fixed", 3 << 20, json!("mbr"), "ntfs", "TestVolume"),
        ("ntfs-dynamic", 3 << 20, json!("mbr"), "ntfs", "TestVolume"),
    ];
    for (name, least, table, kind, label) in cases {
        let image = bench.path(&format!("{name}.vhdx"));
        unpack(name, &image);
        let seen = info(&image);
        let contents = &seen["contents"];
        assert_eq!((&seen["minimum_size"], &contents["faults"]), (&json!(least), &json!([])), "{name}");
        let volume = match &contents["table"] {
            Value::Null => &contents["volume"],
            found => {
                assert_eq!((&found["kind"], &contents["volume"]), (&table, &json!(null)));
                assert_eq!(found["partitions"][0]["start"], 65536);
                &found["partitions"][0]["volume"]
            }
        };
        assert_eq!((&volume["kind"], &volume["label"]), (&json!(kind), &json!(label)), "{name}");
        let text = on("info", &image, &[]).succeeded();
        assert!(text.contains(label) && text.contains("minimum size:"), "{text}");
    }
}

/// What a child has hides what its parent has; what only the parent has is read from there, if it is there.
#[test]
fn the_disk_of_a_chain_is_seen_through_all_layers() {
    if !has("qemu-io") {
        return skipped("qemu-io is not installed: no content was written");
    }
    let bench = Bench::new();
    let base = bench.image("base.vhdx", &["--size", "64M"]);
    let magic = bench.path("magic");
    fs::write(&magic, [&[0; 4086][..], b"SWAPSPACE2"].concat()).expect("room");
    let write = format!("write -s {} 0 4096", magic.display());
    let done = Command::new("qemu-io").args(["-f", "vhdx", "-c", &write]).arg(&base).output();
    assert!(done.expect("it runs").status.success());
    let child = bench.path("child.vhdx");
    let parent = base.to_str().expect("UTF-8");
    create(&child, &["--parent", parent]).succeeded();
    let before = Snapshot::of(&child);
    assert_eq!(info(&child)["contents"]["volume"]["kind"], "swap");
    fs::rename(&base, bench.path("moved.vhdx")).expect("ours");
    let seen = info(&child);
    assert_eq!((&seen["minimum_size"], &seen["type"]), (&json!(null), &json!("differencing")));
    let faults = seen["contents"]["faults"].as_array().expect("a list");
    assert!(faults[0].as_str().is_some_and(|fault| fault.contains("parents")), "{faults:?}");
    before.assert_kept(&child);
}

#[test]
fn several_images_are_shown_and_one_that_fails_does_not_hide_the_others() {
    let bench = Bench::new();
    let base = bench.image("base.vhdx", &["--size", "1G"]);
    let child = bench.path("child.vhdx");
    create(&child, &["--parent", base.to_str().expect("UTF-8")]).succeeded();
    let missing = bench.path("missing.vhdx");
    let [base, child, missing] = [&base, &child, &missing].map(|path| path.to_str().expect("UTF-8"));
    let lines = run(&["info", "--brief", base, child]).succeeded();
    let rows: Vec<Vec<&str>> = lines.lines().map(|line| line.split("  ").map(str::trim).collect()).collect();
    let rows: Vec<Vec<&str>> =
        rows.into_iter().map(|row| row.into_iter().filter(|cell| !cell.is_empty()).collect()).collect();
    assert_eq!(rows[0], ["IMAGE", "TYPE", "SIZE", "ON HOST", "FREE", "PARENT"]);
    assert_eq!(rows[1][..3], [base, "dynamic", "1 GiB"]);
    assert_eq!((rows[1][5], rows[2][1], rows[2][5]), ("-", "differencing", r".\base.vhdx"));
    let both = run(&["info", base, child]).succeeded();
    assert_eq!(both.matches("virtual size:").count(), 2, "{both}");
    let (printed, message) = run(&["info", "--brief", base, missing, child]).broke_off();
    assert_eq!(printed.lines().count(), 3);
    assert!(message.contains("missing.vhdx"), "{message}");
    let found = run(&["info", "--json", base, missing]);
    let found: Value = serde_json::from_str(&found.stdout).expect("one value, errors too");
    assert_eq!(found["images"][0]["type"], "dynamic");
    assert_eq!(found["images"][1]["error"]["kind"], "not-found");
    let refused = run(&["info", "--brief", "--json", base]);
    assert_eq!((refused.status, refused.stderr.as_str()), (Some(2), ""));
    let refused: Value = serde_json::from_str(&refused.stdout).expect("wrong usage is JSON, too");
    assert_eq!(refused["error"]["kind"], "usage");
}

#[test]
fn parents_without_the_chain_are_wrong_usage_of_info() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "64M"]);
    let refusal = on("info", &image, &["--parent", "b.vhdx"]).failed(2);
    assert!(refusal.contains("try: vhdx-ublk info --help"), "{refusal}");
}
