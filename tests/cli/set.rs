//! Promises defended here: `set` changes the values that it is given and nothing else, and costs no child its
//! parent unasked.

use std::time::Duration;

use vhdx_ublk::disk::{Access, ImageFile};

use crate::{Bench, Snapshot, create, info, on, run};

#[test]
fn values_change_and_nothing_else_does() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "1G", "--physical-sector-size", "512"]);
    let before = info(&image);
    let id = "01234567-89ab-cdef-0123-456789abcdef";
    let printed = on("set", &image, &["--disk-id", id, "--physical-sector-size", "4096"]).succeeded();
    assert_eq!(printed, format!("{id}\n"));
    let after = info(&image);
    assert_eq!((&after["disk_id"], &after["physical_sector_size"]), (&id.into(), &4096.into()));
    assert_ne!(after["data_write_guid"], before["data_write_guid"], "a guest sees another disk");
    let kept =
        ["virtual_size", "block_size", "logical_sector_size", "blocks", "regions", "file_size", "type"];
    for key in kept {
        assert_eq!(after[key], before[key], "{key}");
    }
    on("check", &image, &[]).succeeded();
    let same = Snapshot::of(&image);
    assert_eq!(on("set", &image, &["--physical-sector-size", "4096"]).succeeded(), "");
    same.assert_kept(&image);
    let new = on("set", &image, &["--disk-id", "new"]).succeeded();
    assert_eq!(info(&image)["disk_id"], new.trim());
    assert_ne!(new.trim(), id);
}

#[test]
fn wrong_values_and_images_in_use_are_refused() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "1G", "--logical-sector-size", "4096"]);
    let before = Snapshot::of(&image);
    let nothing = on("set", &image, &[]).failed(2);
    assert!(nothing.contains("--disk-id") && nothing.contains("--physical-sector-size"), "{nothing}");
    on("set", &image, &["--disk-id", "old"]).misused();
    on("set", &image, &["--physical-sector-size", "1024"]).misused();
    on("set", &image, &["--physical-sector-size", "512"]).failed(2);
    on("set", &image, &["--disk-id", "00000000-0000-0000-0000-000000000000"]).failed(2);
    let held = ImageFile::open(&image, Access::ReadOnly, Duration::ZERO).expect("free");
    assert_eq!(on("set", &image, &["--disk-id", "new"]).status, Some(1));
    drop(held);
    before.assert_kept(&image);
}

#[test]
fn a_parent_stays_as_its_children_know_it() {
    let bench = Bench::new();
    let parent = bench.image("a.vhdx", &["--size", "1G"]);
    let child = bench.path("b.vhdx");
    create(&child, &["--parent", parent.to_str().expect("UTF-8")]).succeeded();
    let before = Snapshot::of(&parent);
    let message = on("set", &parent, &["--disk-id", "new"]).failed(1);
    assert!(message.contains("b.vhdx") && message.contains("--force"), "{message}");
    before.assert_kept(&parent);
    on("set", &child, &["--disk-id", "new"]).succeeded();
    on("check", &child, &[]).succeeded();
    let forced = on("set", &parent, &["--disk-id", "new", "--force"]);
    assert!(forced.status == Some(0) && forced.stderr.contains("b.vhdx"), "{}", forced.stderr);
    on("info", &child, &["--chain"]).broke_off();
    let [parent, relinked] = [&parent, &child].map(|path| path.to_str().expect("UTF-8"));
    run(&["relink", "--ignore-mismatch", relinked, parent]).succeeded();
    on("info", &child, &["--chain"]).succeeded();
}
