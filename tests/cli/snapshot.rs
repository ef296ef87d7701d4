//! Promises defended here: `snapshot list` shows the chain and what branches off; `snapshot revert` makes a
//! child of an image of the chain, changes no other, and removes only what was asked for and nothing needs.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Bench, create, info, run};

/// A chain, and a branch at its middle: base, one, two; one, other.
fn family(bench: &Bench) -> [PathBuf; 4] {
    let base = bench.image("base.vhdx", &["--size", "10M"]);
    let child = |name: &str, parent: &Path| {
        let path = bench.path(name);
        create(&path, &["--parent", parent.to_str().expect("UTF-8")]).succeeded();
        path
    };
    let one = child("one.vhdx", &base);
    let (two, other) = (child("two.vhdx", &one), child("other.vhdx", &one));
    [base, one, two, other]
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("one JSON value")
}

#[test]
fn the_chain_is_listed_with_what_branches_off() {
    let bench = Bench::new();
    let [base, one, two, other] = family(&bench);
    let listed = json(&run(&["snapshot", "list", text(&two), "--json"]).succeeded());
    let layers = listed["layers"].as_array().expect("a list");
    let seen: Vec<_> = layers
        .iter()
        .map(|layer| (layer["image"].as_str(), layer["parent"].as_str(), layer["in_chain"].as_bool()))
        .collect();
    let line = |image, parent, in_chain| (Some(image), parent, Some(in_chain));
    assert_eq!(
        seen,
        [
            line(text(&base), None, true),
            line(text(&one), Some(text(&base)), true),
            line(text(&other), Some(text(&one)), false),
            line(text(&two), Some(text(&one)), true)
        ]
    );
    assert_eq!((&listed["broken"], &layers[0]["virtual_size"]), (&Value::Null, &(10_u64 << 20).into()));
    assert!(layers.iter().all(|layer| layer["host_bytes"].as_u64() > Some(0)), "{layers:?}");
    let shown = run(&["snapshot", "list", text(&one)]).succeeded();
    let names: Vec<_> = shown.lines().skip(1).map(|line| line.split("  ").next()).collect();
    assert_eq!(names[0], Some(text(&base)));
    assert!(shown.contains("└─ one.vhdx") && shown.contains("├─ other.vhdx"), "{shown}");
}

#[test]
fn a_chain_that_ends_early_is_listed_and_is_a_failure() {
    let bench = Bench::new();
    let [base, _, two, _] = family(&bench);
    fs::remove_file(base).expect("there");
    let (shown, error) = run(&["snapshot", "list", text(&two)]).broke_off();
    assert!(shown.contains("one.vhdx") && shown.contains("two.vhdx"), "{shown}");
    assert!(error.contains("base.vhdx"), "{error}");
}

#[test]
fn a_return_makes_a_child_and_keeps_what_is_given_up() {
    let bench = Bench::new();
    let [base, one, two, other] = family(&bench);
    let bytes = || [&base, &one, &two, &other].map(|path| fs::read(path).expect("it stays"));
    let before = bytes();
    let done = json(&run(&["snapshot", "revert", text(&two), text(&base), "--json"]).succeeded());
    assert_eq!(done["image"], text(&bench.path("base-1.vhdx")));
    assert_eq!((&done["device"], &done["parent"]), (&Value::Null, &text(&base).into()));
    assert_eq!(done["given_up"], Value::from(vec![text(&two), text(&one)]));
    assert_eq!(done["removed"], Value::from(Vec::<Value>::new()));
    assert!(bytes() == before, "no other image is changed");
    assert_eq!(info(&bench.path("base-1.vhdx"))["virtual_size"], 10 << 20);
    let next = bench.path("next.vhdx");
    let said = run(&["snapshot", "revert", text(&two), text(&one), text(&next)]).succeeded();
    assert!(next.exists() && said.contains("given up, and kept: "), "{said}");
}

#[test]
fn what_is_discarded_ends_where_another_child_begins() {
    let bench = Bench::new();
    let [base, one, two, other] = family(&bench);
    let done = run(&["snapshot", "revert", text(&two), text(&base), "--discard", "--json"]);
    assert_eq!(done.status, Some(0));
    assert_eq!(json(&done.stdout)["removed"], Value::from(vec![text(&two)]));
    assert!(done.stderr.contains("other.vhdx"), "{}", done.stderr);
    assert!(!two.exists() && one.exists() && other.exists());
    let done = run(&["snapshot", "revert", text(&other), text(&base), "--discard", "--json"]).succeeded();
    assert_eq!(json(&done)["removed"], Value::from(vec![text(&other), text(&one)]));
    assert_eq!(bench.names(), ["base-1.vhdx", "base-2.vhdx", "base.vhdx"]);
}

#[test]
fn only_an_image_below_can_be_returned_to() {
    let bench = Bench::new();
    let [_, one, two, other] = family(&bench);
    let before = bench.names();
    let refused = |from: &Path, to: &Path, why: &str| {
        let error = run(&["snapshot", "revert", text(from), text(to)]).failed(1);
        assert!(error.contains(why) && error.contains("snapshot list"), "{error}");
    };
    refused(&two, &two, "nothing lies above it");
    refused(&two, &other, "it is not in the chain");
    refused(&one, &two, "it is not in the chain");
    let error = run(&["snapshot", "revert", text(&two), text(&one), text(&other)]).failed(1);
    assert!(error.contains("other.vhdx"), "{error}");
    assert_eq!(bench.names(), before);
}
