//! Promise defended here: the program has the static probes that the guide names, with as many arguments.

use std::collections::BTreeSet;
use std::process::Command;

use super::skipped;

const PAGE: &str = include_str!("../../src/guide/watch.md");

/// The probes in the guide's table, with the numbers of their arguments.
fn promised() -> BTreeSet<(String, usize)> {
    let lines = PAGE.lines().skip_while(|line| *line != "| probe | arguments |").skip(2);
    let rows = lines.take_while(|line| line.starts_with('|')).map(|line| {
        let cells: Vec<_> = line.trim_matches('|').split('|').map(str::trim).collect();
        let count = if cells[1] == "none" { 0 } else { cells[1].split(',').count() };
        (cells[0].trim_matches('`').to_owned(), count)
    });
    rows.collect()
}

/// The probes in the notes of the program. The compiler may put one in several places.
fn found(notes: &str) -> BTreeSet<(String, usize)> {
    let mut fields = notes.lines().filter_map(|line| line.trim().split_once(':'));
    let mut probes = BTreeSet::new();
    while fields.by_ref().any(|field| field == ("Provider", " vhdx_ublk")) {
        let (_, name) = fields.by_ref().find(|(field, _)| *field == "Name").expect("a probe has a name");
        let (_, arguments) = fields.by_ref().find(|(field, _)| *field == "Arguments").expect("a list");
        probes.insert((name.trim().to_owned(), arguments.split_whitespace().count()));
    }
    probes
}

#[test]
fn the_program_has_the_probes_that_the_guide_promises() {
    let Ok(read) = Command::new("readelf").args(["--notes", env!("CARGO_BIN_EXE_vhdx-ublk")]).output() else {
        return skipped("there is no readelf");
    };
    let promised = promised();
    assert!(promised.len() >= 10, "{promised:?}");
    assert_eq!(found(&String::from_utf8_lossy(&read.stdout)), promised);
}
