//! A child names its parent wherever that was moved, and only its parent.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use vhdx_ublk::disk::{Access, ImageFile};

use super::{Bench, Ran, Snapshot, create, info, on, program};

pub fn base(bench: &Bench, name: &str) -> PathBuf {
    bench.image(name, &["--size", "16M", "--block-size", "2M"])
}

pub fn child_of(bench: &Bench, parent: &Path, name: &str) -> PathBuf {
    bench
        .image(name, &["--parent", parent.to_str().expect("UTF-8"), "--block-size", "1M", "--log-size", "1M"])
}

/// Runs `command` on `image` and what follows it.
fn with(command: &str, image: &Path, more: &[&Path], options: &[&str]) -> Ran {
    program().arg(command).args(options).arg(image).args(more).output().expect("it runs").into()
}

fn chain_of(image: &Path) -> Vec<String> {
    let chain = on("info", image, &["--chain", "--json"]).succeeded();
    let chain: Value = serde_json::from_str(&chain).expect("JSON");
    let names = chain["chain"].as_array().expect("an array").iter();
    names.map(|layer| layer["image"].as_str().expect("a path").to_owned()).collect()
}

/// After a move either end is found again, and what is right already is not touched.
#[test]
fn a_child_names_its_parent_where_it_is_now() {
    let bench = Bench::new();
    let parent = base(&bench, "base.vhdx");
    let child = child_of(&bench, &parent, "child.vhdx");
    let before = Snapshot::of(&child);
    with("relink", &child, &[&parent], &[]).succeeded();
    before.assert_kept(&child);
    fs::create_dir_all(bench.path("far/away")).expect("a folder");
    let moved = bench.path("far/away/another name.vhdx");
    fs::rename(&parent, &moved).expect("one file system");
    on("info", &child, &["--chain"]).broke_off();
    let of_parent = Snapshot::of(&moved);
    with("relink", &child, &[&moved], &[]).succeeded();
    of_parent.assert_kept(&moved);
    assert_eq!(chain_of(&child)[1], moved.canonicalize().expect("there").to_str().expect("UTF-8"));
    assert_eq!(info(&child)["parent"]["relative_path"], r".\far\away\another name.vhdx");
    assert_eq!(on("check", &child, &[]).status, Some(0));
    let before = Snapshot::of(&child);
    with("relink", &child, &[&moved], &[]).succeeded();
    before.assert_kept(&child);
}

/// Another image, or one that was written since, is refused with both GUIDs, and taken if that is insisted
/// upon.
#[test]
fn another_parent_is_taken_only_if_that_is_insisted_upon() {
    let bench = Bench::new();
    let (parent, other) = (base(&bench, "base.vhdx"), base(&bench, "other.vhdx"));
    let child = child_of(&bench, &parent, "child.vhdx");
    let before = Snapshot::of(&child);
    let message = with("relink", &child, &[&other], &[]).failed(1);
    let guid = |path: &Path| info(path)["data_write_guid"].as_str().expect("text").to_owned();
    for wanted in [guid(&parent), guid(&other), "--ignore-mismatch".into(), "other.vhdx".into()] {
        assert!(message.to_lowercase().contains(&wanted), "{wanted} is not in: {message}");
    }
    before.assert_kept(&child);
    with("relink", &child, &[&other], &["--ignore-mismatch"]).succeeded();
    assert!(chain_of(&child)[1].ends_with("other.vhdx"));
    let linkage = info(&child)["parent"]["parent_linkage"].as_str().expect("text").to_lowercase();
    assert_eq!(linkage.trim_matches(['{', '}']), guid(&other));
}

#[test]
fn what_is_no_parent_is_refused() {
    let bench = Bench::new();
    let parent = base(&bench, "base.vhdx");
    let child = child_of(&bench, &parent, "child.vhdx");
    let grandchild = child_of(&bench, &child, "grandchild.vhdx");
    let large = bench.path("large.vhdx");
    create(&large, &["--size", "16M", "--logical-sector-size", "4096"]).succeeded();
    let before = Snapshot::of(&child);
    let insist = ["--ignore-mismatch"];
    for its_own in [&child, &grandchild] {
        let message = with("relink", &child, &[its_own], &insist).failed(2);
        assert!(message.contains("its own ancestor"), "{message}");
    }
    assert!(with("relink", &child, &[&large], &insist).failed(1).contains("sectors of 4096 bytes"));
    assert!(with("relink", &parent, &[&child], &insist).failed(1).contains("not a differencing image"));
    let holder = format!("(pid {})", std::process::id());
    for (path, access) in [(&child, Access::ReadOnly), (&parent, Access::ReadWrite)] {
        let held = ImageFile::open(path, access, Duration::ZERO).expect("free");
        assert!(with("relink", &child, &[&parent], &[]).failed(1).contains(&holder));
        drop(held);
    }
    before.assert_kept(&child);
}

/// Where the parent is gone, its child is not taken for it because it has the same name.
#[test]
fn a_child_that_is_called_as_its_lost_parent_is_not_its_own_ancestor() {
    let bench = Bench::new();
    for folder in ["a", "b", "c"] {
        fs::create_dir(bench.path(folder)).expect("a folder");
    }
    let parent = base(&bench, "a/disk.vhdx");
    let child = child_of(&bench, &parent, "b/disk.vhdx");
    let leaf = child_of(&bench, &child, "a/leaf.vhdx");
    let moved = bench.path("c/moved.vhdx");
    fs::rename(&parent, &moved).expect("one file system");
    for image in [&child, &leaf] {
        let (_, message) = on("info", image, &["--chain"]).broke_off();
        assert!(message.contains(r"in none of the places it names: ..\a\disk.vhdx"), "{message}");
    }
    with("relink", &child, &[&moved], &[]).succeeded();
    assert_eq!(chain_of(&leaf).len(), 3);
}

/// A mistake in the drive's name is an error that names it.
#[test]
fn a_map_that_matches_nothing_is_told() {
    let bench = Bench::new();
    let parent = base(&bench, "base.vhdx");
    let child = child_of(&bench, &parent, "child.vhdx");
    let ran = on("info", &child, &["--chain", "--parent-map", "C=/x"]);
    assert_eq!(ran.status, Some(0));
    assert!(ran.stderr.contains("--parent-map C=/x matches no path"), "{}", ran.stderr);
}
