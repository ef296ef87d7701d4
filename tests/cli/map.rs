//! Promises defended here: `map` says of a disk what `qemu-img map` would if it knew the format, in its
//! words; what it calls data is at the offset that it names, and what it calls zero is zero.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use vhdx_ublk::disk::{Access, ImageFile};

use crate::images::unpack;
use crate::skip::skipped;
use crate::{Bench, MIB, create, has, info, on, run};

const BLOCK: u64 = 2 * MIB;

/// What becomes of a block.
#[derive(Clone, Copy, PartialEq)]
pub enum Block {
    Data,
    /// It has space, and its host stores nothing.
    Hollow,
    /// No space, and this number for its state.
    State(u8),
}

/// Gives `block` of an image in blocks of 2 MiB its state, and space at the end of the file.
pub fn set(image: &Path, block: u64, to: Block) {
    let bat = info(image)["regions"].as_array().expect("a list")[0]["offset"].as_u64().expect("a number");
    let file = File::options().read(true).write(true).open(image).expect("ours");
    let end = file.metadata().expect("there").len();
    let entry = match to {
        Block::State(state) => state.into(),
        Block::Data | Block::Hollow => end | 6,
    };
    if to == Block::Data {
        let bytes = vec![u8::try_from(block + 1).expect("few"); usize::try_from(BLOCK).expect("small")];
        file.write_all_at(&bytes, end).expect("room");
    }
    if to == Block::Hollow {
        file.set_len(end + BLOCK).expect("room");
    }
    file.write_all_at(&entry.to_le_bytes(), bat + 8 * block).expect("room");
}

fn map(image: &Path) -> Vec<Value> {
    serde_json::from_str(&on("map", image, &["--json"]).succeeded()).expect("a list")
}

fn qemu(arguments: &[&str], image: &Path) -> String {
    let output = Command::new(arguments[0]).args(&arguments[1..]).arg(image).output().expect("it runs");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("it writes UTF-8")
}

/// QEMU's map of `image`, in the words of QEMU 8.2 and later: those before it say of no extent whether it is
/// compressed.
fn qemu_map(image: &Path) -> Vec<Value> {
    let text = qemu(&["qemu-img", "map", "--output=json"], image);
    let mut extents: Vec<Value> = serde_json::from_str(&text).expect("a list");
    for extent in &mut extents {
        let extent = extent.as_object_mut().expect("a list of objects");
        extent.entry("compressed").or_insert(false.into());
    }
    extents
}

/// What QEMU reads of `image` is where the map says that it is.
fn compare_with_qemu(image: &Path) {
    let raw = image.with_extension("raw");
    qemu(&["qemu-img", "convert", "-O", "raw", image.to_str().expect("UTF-8")], &raw);
    let (content, file) = (fs::read(&raw).expect("it reads"), fs::read(image).expect("it reads"));
    let mut at = 0;
    for extent in map(image) {
        let number = |key: &str| usize::try_from(extent[key].as_u64().expect("a number")).expect("small");
        assert_eq!(number("start"), at, "{extent}");
        let here = &content[at..at + number("length")];
        match &extent["offset"] {
            Value::Null => assert_eq!((&extent["data"], &extent["zero"]), (&json!(false), &json!(true))),
            _ => assert!(here == &file[number("offset")..][..here.len()], "{extent}"),
        }
        if extent["zero"] == true {
            assert!(here.iter().all(|byte| *byte == 0), "{extent}");
        }
        at += here.len();
    }
    assert_eq!(at, content.len(), "the extents are the disk");
    // QEMU itself sees one extent of data, in the same words.
    let whole = json!({"start": 0, "length": at, "depth": 0, "present": true, "zero": false,
        "data": true, "compressed": false});
    assert_eq!(qemu_map(image), [whole]);
}

#[test]
fn extents_are_where_qemu_reads_them() {
    if !has("qemu-img") {
        return skipped("qemu-img is not installed: no map was compared");
    }
    let bench = Bench::new();
    for name in ["ext2", "fat-parent", "ntfs-fixed", "ntfs-dynamic"] {
        let image = bench.path(&format!("{name}.vhdx"));
        unpack(name, &image);
        compare_with_qemu(&image);
    }
    let image = every_state(&bench);
    compare_with_qemu(&image);
}

/// An image whose blocks have every state there is.
fn every_state(bench: &Bench) -> PathBuf {
    let image = bench.image("states.vhdx", &["--size", "20M"]);
    let states = [Block::Data, Block::Data, Block::State(2), Block::State(0), Block::State(3)];
    let states = states.into_iter().chain([Block::State(1), Block::Hollow, Block::Data]);
    for (block, state) in (0..).zip(states) {
        set(&image, block, state);
    }
    image
}

#[test]
fn every_state_of_a_block_has_its_words() {
    let bench = Bench::new();
    let image = every_state(&bench);
    let length = fs::metadata(&image).expect("there").len();
    let extent = |start: u64, length: u64, present: bool, data: bool, zero: bool, offset: Option<u64>| {
        let mut extent = json!({"start": start * BLOCK, "length": length * BLOCK, "depth": 0,
            "present": present, "zero": zero, "data": data, "compressed": false});
        if let Some(offset) = offset {
            extent["offset"] = offset.into();
        }
        extent
    };
    let expected = [
        extent(0, 2, true, true, false, Some(length - 4 * BLOCK)),
        extent(2, 1, true, false, true, None),
        extent(3, 1, false, false, true, None),
        extent(4, 2, true, false, true, None),
        extent(6, 1, true, true, true, Some(length - 2 * BLOCK)),
        extent(7, 1, true, true, false, Some(length - BLOCK)),
        extent(8, 2, false, false, true, None),
    ];
    assert_eq!(map(&image), expected);
    let text = on("map", &image, &[]).succeeded();
    let words: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words[0], ["6291456", "30.0%", "0", "data", "(6", "MiB)"]);
    assert_eq!(words[1], ["2097152", "10.0%", "2", "zero", "(2", "MiB)"]);
    assert_eq!(words[2], ["12582912", "60.0%", "3", "hole,zero", "(12", "MiB)"]);
    assert_eq!(words[4][..6], ["8388608", "40.0%", "layer", "0", "(8", "MiB):"]);
}

/// Chains of three layers and their likeness in qcow2: the same text, but for the offsets.
#[test]
fn a_chain_reads_like_one_that_qemu_knows() {
    if !has("qemu-img") || !has("qemu-io") {
        return skipped("qemu-img is not installed: no chain was compared");
    }
    let mut rng = fastrand::Rng::with_seed(5);
    for _ in 0..6 {
        let bench = Bench::new();
        let mut below: Option<[PathBuf; 2]> = None;
        for layer in 0..3 {
            let [ours, theirs] = ["vhdx", "qcow2"].map(|kind| bench.path(&format!("{layer}.{kind}")));
            let mut make = vec!["qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M"];
            if let Some([parent, backing]) = &below {
                create(&ours, &["--parent", parent.to_str().expect("UTF-8")]).succeeded();
                make.extend(["-F", "qcow2", "-b", backing.to_str().expect("UTF-8")]);
                qemu(&make, &theirs);
            } else {
                create(&ours, &["--size", "24M"]).succeeded();
                Command::new(make[0]).args(&make[1..]).arg(&theirs).arg("24M").status().expect("it runs");
            }
            // Backwards, so that no two blocks are neighbours in the file.
            for block in (0..12).rev() {
                let place = format!("{} {BLOCK}", block * BLOCK);
                match rng.u8(..4) {
                    0 => {
                        set(&ours, block, Block::Data);
                        qemu(&["qemu-io", "-f", "qcow2", "-c", &format!("write -P 1 {place}")], &theirs);
                    }
                    1 => {
                        set(&ours, block, Block::State(2));
                        qemu(&["qemu-io", "-f", "qcow2", "-c", &format!("write -z {place}")], &theirs);
                    }
                    _ => {}
                }
            }
            below = Some([ours, theirs]);
        }
        let [ours, theirs] = below.expect("three layers");
        let without_offset = |mut extents: Vec<Value>| {
            for extent in &mut extents {
                extent.as_object_mut().expect("a list of objects").remove("offset");
            }
            extents
        };
        assert_eq!(without_offset(map(&ours)), without_offset(qemu_map(&theirs)));
    }
}

#[test]
fn what_has_changed_since_a_layer_is_what_the_layers_above_it_have() {
    let bench = Bench::new();
    let layers = ["base.vhdx", "middle.vhdx", "top.vhdx"].map(|name| bench.path(name));
    create(&layers[0], &["--size", "12M"]).succeeded();
    for pair in layers.windows(2) {
        create(&pair[1], &["--parent", pair[0].to_str().expect("UTF-8")]).succeeded();
    }
    set(&layers[0], 0, Block::Data);
    set(&layers[1], 1, Block::Data);
    set(&layers[1], 2, Block::Data);
    set(&layers[2], 2, Block::State(2));
    set(&layers[2], 4, Block::Data);
    let since =
        |layer: &Path| on("map", &layers[2], &["--since", layer.to_str().expect("UTF-8")]).succeeded();
    let line = |block: u64, state: &str| format!("{} {BLOCK} {state}\n", block * BLOCK);
    let top = line(2, "hole,zero") + &line(4, "data");
    assert_eq!(since(&layers[1]), top);
    assert_eq!(since(&layers[0]), line(1, "data") + &top);
    let options = ["--json", "--since", layers[1].to_str().expect("UTF-8")];
    let list: Value = serde_json::from_str(&on("map", &layers[2], &options).succeeded()).expect("a list");
    assert_eq!((list[0]["start"].as_u64(), list.as_array().map(Vec::len)), (Some(2 * BLOCK), Some(2)));
    let unchanged = bench.path("new.vhdx");
    create(&unchanged, &["--parent", layers[2].to_str().expect("UTF-8")]).succeeded();
    let options = ["--since", layers[2].to_str().expect("UTF-8")];
    assert_eq!(on("map", &unchanged, &options).succeeded(), "");
    assert_eq!(on("map", &unchanged, &[&["--json"][..], &options].concat()).succeeded(), "[]\n");
    on("map", &layers[1], &options).failed(2);
    on("map", &layers[2], &options).failed(2);
}

/// The sectors that Windows wrote to a child, by its sector bitmap.
#[test]
fn changes_are_found_by_sector() {
    let bench = Bench::new();
    let [parent, child] = ["fat-parent", "fat-differential"].map(|name| {
        let image = bench.path(&format!("{name}.vhdx"));
        unpack(name, &image);
        image
    });
    let options = ["--since", parent.to_str().expect("UTF-8")];
    let changed = on("map", &child, &options).succeeded();
    let places: Vec<Vec<&str>> = changed.lines().map(|line| line.split(' ').collect()).collect();
    assert_eq!(places[0], ["68608", "512", "data"]);
    assert_eq!(places.iter().map(|place| place[1].parse::<u64>().expect("bytes")).sum::<u64>(), 9216);
}

#[test]
fn a_picture_fits_a_screen_and_is_plain_where_no_terminal_is() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "64M"]);
    for block in [20, 3, 30] {
        set(&image, block, Block::Data);
    }
    // A hole in the file, which other blocks could fill.
    set(&image, 3, Block::State(2));
    let text = on("map", &image, &["--picture"]).succeeded();
    assert!(text.lines().count() <= 24 && text.lines().all(|line| line.chars().count() <= 80), "{text}");
    assert!(text.is_ascii() && !text.contains('\x1b'), "{text}");
    let rows: Vec<&str> = text.lines().collect();
    let file = rows.iter().position(|row| row.starts_with("file: ")).expect("the second part");
    let order = rows.iter().position(|row| row.starts_with("order: ")).expect("the third part");
    let kinds = |rows: &[&str]| rows.concat().chars().collect::<BTreeSet<char>>();
    // Blocks, the structures of the image, and a hole each have a sign of their own, which is explained.
    assert_eq!(kinds(&rows[1..file]), BTreeSet::from(['.', '0']), "{text}");
    assert_eq!(kinds(&rows[file + 1..order]), BTreeSet::from(['#', '.', '0']), "{text}");
    // Of two blocks, one is the first of the disk and the other one the last.
    assert_eq!(kinds(&rows[order + 1..rows.len() - 1]), BTreeSet::from(['#', '.', 'a', 'z']), "{text}");
    let blocks: String = rows[order + 1..rows.len() - 1].concat().replace(['#', '.'], "");
    assert!(blocks.starts_with('a') && blocks.ends_with('z'), "{text}");
    assert_eq!(
        rows[rows.len() - 1],
        "0 layer 0, # structures of the file, a first part, z last part, . empty"
    );
    let drawing = bench.path("a.svg");
    let options = ["--svg", drawing.to_str().expect("UTF-8")];
    assert_eq!(on("map", &image, &options).succeeded(), "");
    let svg = fs::read_to_string(&drawing).expect("text");
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && svg.contains("layer 0"), "{svg}");
    on("map", &image, &options).failed(1);
    assert_eq!(fs::read_to_string(&drawing).expect("text"), svg);
    assert_eq!(on("map", &image, &["--svg", "-"]).succeeded(), svg);
    on("map", &image, &["--svg", "-", "--picture"]).misused();
    assert_eq!(bench.names(), ["a.svg", "a.vhdx"]);
}

/// The order shows what `compact --defragment` is for: letters that go to and fro before, and from a to z
/// after.
#[test]
fn the_picture_of_a_file_shows_the_order_of_its_blocks() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "128M"]);
    // Every third block of the disk, then the next of each three, and so on.
    for block in (0..3).flat_map(|first| (first..42).step_by(3)) {
        set(&image, block, Block::Data);
    }
    let order = || {
        let text = on("map", &image, &["--picture"]).succeeded();
        let rows = text.lines().skip_while(|row| !row.starts_with("order: ")).skip(1).collect::<Vec<_>>();
        let mut letters: Vec<char> = rows[..rows.len() - 1].concat().chars().collect();
        letters.retain(char::is_ascii_alphabetic);
        letters.dedup();
        letters
    };
    let before = order();
    assert!(!before.is_sorted() && before.contains(&'a') && before.contains(&'z'), "{before:?}");
    let picture_before = on("map", &image, &["--svg", "-"]).succeeded();
    assert_eq!(on("compact", &image, &["--defragment"]).status, Some(0));
    assert_eq!(order(), ('a'..='z').collect::<Vec<_>>());
    let picture = on("map", &image, &["--svg", "-"]).succeeded();
    assert_ne!(picture, picture_before);
    // Blue comes first, then green, then red.
    let places = ["#0000ff", "#00ff00", "#ff0000"].map(|colour| picture.find(colour).expect("drawn"));
    assert!(places.is_sorted(), "{places:?}");
}

#[test]
fn a_large_empty_disk_is_one_extent_and_one_in_use_is_refused() {
    let bench = Bench::new();
    let image = bench.image("a.vhdx", &["--size", "64T", "--block-size", "1M"]);
    assert_eq!(map(&image).len(), 1);
    let child = bench.path("child.vhdx");
    create(&child, &["--parent", image.to_str().expect("UTF-8")]).succeeded();
    assert_eq!(map(&child).len(), 1);
    let held = ImageFile::open(&image, Access::ReadWrite, Duration::ZERO).expect("free");
    let refused = on("map", &image, &[]);
    assert!(refused.status == Some(1) && refused.stdout.is_empty(), "{}", refused.stdout);
    assert!(refused.stderr.contains("open for writing"), "{}", refused.stderr);
    drop(held);
    run(&["map", "--picture", "--since", "b.vhdx", "a.vhdx"]).misused();
}
