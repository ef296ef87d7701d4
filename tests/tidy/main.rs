//! Promises defended here: the folders of `src` show the architecture, and what the project says of its own
//! style is true. `cargo test --test tidy -- --nocapture figures` prints what can be counted.

mod figures;
mod imports;
mod source;

use std::collections::BTreeMap;
use std::path::Path;

use imports::{Imports, circles};
use source::{Function, Source, files, text};

/// The folders and files of `src`, each of which uses only those before it.
const ORDER: [&str; 15] = [
    "printable",
    "error",
    "simulation",
    "atomic",
    "machine",
    "format",
    "disk",
    "image",
    "chain",
    "engine",
    "operations",
    "device",
    "system",
    "cli",
    "main",
];

/// Circles that are still to be opened: the folder, and the files in it that use each other. A circle that
/// has become smaller is still this one.
const OPEN: [(&str, &[&str]); 0] = [];

/// The most lines of a function.
const MAX_FUNCTION_LINES: usize = 60;

/// The most columns of a line of Rust and of a script.
const MAX_COLUMNS: usize = 110;
const MAX_SCRIPT_COLUMNS: usize = 120;

/// The only files that have `unsafe` in them.
const UNSAFE: [&str; 8] = [
    "src/device/control/mod.rs",
    "src/device/queue/buffers.rs",
    "src/device/queue/ring.rs",
    "src/device/region.rs",
    "src/device/sys.rs",
    "src/disk/ring.rs",
    "tests/simulator/fuzz/coverage.rs",
    "tests/simulator/memory.rs",
];

/// Plants that the simulator asks for, not the program, and plants that break a rule in one place and its
/// assertion in others.
const PLANTS_OF_THE_SIMULATOR: [&str; 3] = ["LongEntry", "NoFence", "SharedDescription"];
const PLANTS_IN_PLACES: [(&str, usize); 4] =
    [("KeepLaterEntries", 2), ("ReplayBeforeTail", 2), ("RevealParents", 2), ("TrustKilled", 3)];

/// Words that are not plain English in a manual.
const BANNED: [&str; 15] = [
    "shall",
    "any more",
    "nobody",
    "goes on",
    "gone on",
    "went on",
    "has not the",
    "tells",
    "is told",
    "are told",
    "was told",
    "looked for",
    "to who",
    "for who",
    ". who",
];

#[test]
fn folders_use_only_those_before_them() {
    let place = |name: &str| {
        let place = ORDER.iter().position(|known| *known == name);
        place.unwrap_or_else(|| panic!("src/{name} has no place in the order"))
    };
    let uses = Imports::read().uses();
    let wrong: Vec<_> = uses[""].iter().filter(|(user, used)| place(used) > place(user)).collect();
    assert!(wrong.is_empty(), "(user, used): {wrong:?}");
}

#[test]
fn files_use_each_other_in_no_circle() {
    let mut new = Vec::new();
    let mut left = vec![false; OPEN.len()];
    for (folder, uses) in Imports::read().uses() {
        for circle in circles(&uses) {
            let lies_in = |(at, files): &(&str, &[&str])| {
                *at == folder && circle.iter().all(|file| files.contains(&file.as_str()))
            };
            match OPEN.iter().position(lies_in) {
                Some(known) => left[known] = true,
                None => new.push(format!("{folder}: {}", circle.into_iter().collect::<Vec<_>>().join(" "))),
            }
        }
    }
    assert!(new.is_empty(), "new circles:\n{}", new.join("\n"));
    let gone: Vec<_> = OPEN.iter().zip(left).filter(|(_, left)| !left).map(|(known, _)| known).collect();
    assert!(gone.is_empty(), "these circles are open now and must be taken from the list: {gone:?}");
}

#[test]
fn a_function_fits_a_screen() {
    let mut long = Vec::new();
    for source in Source::all("") {
        for function in source.functions().iter().filter(|function| function.lines > MAX_FUNCTION_LINES) {
            let Function { name, line, lines } = function;
            long.push(format!("{}:{line}: {name} has {lines} lines", source.path.display()));
        }
    }
    assert!(long.is_empty(), "longer than {MAX_FUNCTION_LINES} lines:\n{}", long.join("\n"));
}

#[test]
fn a_line_fits_its_columns() {
    none("lines are too long", |path, line| {
        // A row of a table is one line.
        let row = ["//! |", "/// |"].into_iter().any(|begin| line.trim_start().starts_with(begin));
        let most = match path.extension().and_then(|extension| extension.to_str()) {
            Some("md" | "svg") => usize::MAX,
            Some("rs") if row => usize::MAX,
            Some("rs") => MAX_COLUMNS,
            _ => MAX_SCRIPT_COLUMNS,
        };
        usize::from(line.chars().count() > most)
    });
}

#[test]
fn unsafe_code_is_where_it_is_known_to_be() {
    let has_unsafe = |source: &Source| source.words().any(|word| word == "unsafe");
    let found: Vec<_> =
        Source::all("").filter(|source| has_unsafe(source)).map(|source| &source.path).collect();
    assert_eq!(found, UNSAFE.map(Path::new));
}

#[test]
fn a_plant_is_asked_for_in_one_place() {
    let mut asked: BTreeMap<String, usize> = BTreeMap::new();
    let (switches, program): (Vec<_>, Vec<_>) =
        Source::all("src").partition(|source| source.path.ends_with("simulation.rs"));
    for source in &program {
        let words: Vec<_> = source.words().collect();
        for name in words.windows(3).filter(|words| words[..2] == ["Plant", "::"]) {
            *asked.entry(name[2].into()).or_default() += 1;
        }
    }
    let words: Vec<_> = switches.iter().flat_map(|source| source.words()).collect();
    let all = words.windows(4).filter(|words| words[..2] == ["Self", "::"] && words[3] == ",");
    for name in all.map(|words| words[2]) {
        let exception = PLANTS_IN_PLACES.iter().find(|(known, _)| *known == name).map(|(_, places)| *places);
        let places = exception.unwrap_or(usize::from(!PLANTS_OF_THE_SIMULATOR.contains(&name)));
        assert_eq!(asked.get(name).copied().unwrap_or(0), places, "places that ask for {name}");
    }
}

#[test]
fn every_dependency_is_used() {
    let manifest = text(Path::new("Cargo.toml")).expect("it is text");
    let mut section = "";
    let mut unused = Vec::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            section = line;
        }
        let Some((name, _)) = line.split_once(" = ") else { continue };
        let name = name.replace('-', "_");
        let used = match section {
            "[dependencies]" => Source::all("src").any(|source| source.words().any(|word| word == name)),
            "[dev-dependencies]" => ["src", "tests", "benches"]
                .into_iter()
                .flat_map(files)
                .any(|path| text(&path).is_some_and(|text| text.contains(&name))),
            _ => true,
        };
        if !used {
            unused.push(name);
        }
    }
    assert!(unused.is_empty(), "in Cargo.toml and not used: {unused:?}");
}

#[test]
fn the_language_is_plain() {
    none("banned words", |_, line| {
        let line = line.to_lowercase();
        BANNED.iter().map(|banned| whole_words(&line, banned)).sum()
    });
}

/// How often `words` stand in `line` as whole words.
fn whole_words(line: &str, words: &str) -> usize {
    let inside = |character: Option<char>| {
        character.is_some_and(|character| character.is_alphanumeric() || character == '_')
    };
    let whole = |at: &usize| {
        let (before, after) = (&line[..*at], &line[at + words.len()..]);
        !inside(after.chars().next()) && (words.starts_with('.') || !inside(before.chars().next_back()))
    };
    line.match_indices(words).map(|(at, _)| at).filter(whole).count()
}

/// Nothing is found by `count` in any line.
fn none(what: &str, count: impl Fn(&Path, &str) -> usize) {
    let mut found = Vec::new();
    let folders = [".ci", "src", "tests", "benches", "tools", "README.md"];
    for path in folders.into_iter().flat_map(files).filter(|path| !path.starts_with("tests/tidy")) {
        for (line, number) in text(&path).iter().flat_map(|text| text.lines()).zip(1..) {
            if count(&path, line) > 0 {
                found.push(format!("{}:{number}: {line}", path.display()));
            }
        }
    }
    assert!(found.is_empty(), "{what}:\n{}", found.join("\n"));
}
