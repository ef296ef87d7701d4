//! Promises defended here: every command that says something has `--json` and a schema; what is printed fits
//! it; fields and words are only ever added; no name is lost in JSON, whatever bytes it has.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::{Bench, create, program, run};
use crate::skip::skipped;

/// Commands without `--json`: what these print has a form of its own.
const WITHOUT: [&str; 2] = ["help", "metrics"];

/// Schemas of what no command prints by itself.
const OF_ALL: [&str; 2] = ["error", "progress"];

/// What was printed so far: one field, or one word that a field may have, a line.
const PRINTED: &str = include_str!("../formats/json.txt");

fn schemas(bench: &Bench) -> Vec<(String, Value)> {
    let folder = bench.path("schema");
    run(&["generate".as_ref(), "schema".as_ref(), folder.as_os_str()]).succeeded();
    let files = fs::read_dir(&folder).expect("made").map(|item| item.expect("readable").path());
    let mut schemas: Vec<_> =
        files.map(|path| (stem(&path), json(&fs::read(&path).expect("readable")))).collect();
    schemas.sort_by(|one, other| one.0.cmp(&other.0));
    schemas
}

fn stem(path: &Path) -> String {
    path.file_stem().and_then(OsStr::to_str).expect("a name").to_owned()
}

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(bytes)))
}

/// The names, with dashes, of the commands whose help shows `--json`, and of the others.
fn commands(of: &[&str]) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut with, mut without) = (BTreeSet::new(), BTreeSet::new());
    for name in super::manual::commands(of) {
        let words = [of, &[&name]].concat();
        let help = run(&[&words[..], &["--help"]].concat()).succeeded();
        let has_more = !super::manual::commands(&words).is_empty();
        if help.contains("--json") {
            with.insert(words.join("-"));
        } else if !has_more {
            without.insert(words.join("-"));
        }
        if has_more {
            let (more, others) = commands(&words);
            with.extend(more);
            without.extend(others);
        }
    }
    (with, without)
}

#[test]
fn every_command_that_prints_json_has_a_schema() {
    let bench = Bench::new();
    let (with, without) = commands(&[]);
    let named: BTreeSet<_> = schemas(&bench).into_iter().map(|(name, _)| name).collect();
    assert_eq!(named, &with | &OF_ALL.map(str::to_owned).into());
    assert_eq!(without, WITHOUT.map(str::to_owned).into());
}

/// What the page about JSON describes, for all commands: names, and errors.
const OF_EVERY_COMMAND: [&str; 2] = ["WrittenPath", "Failure"];

/// The names of all fields that `schema` has.
fn fields(schema: &Value, root: &Value, names: &mut BTreeSet<String>) {
    let definition = schema["$ref"].as_str().and_then(|name| name.strip_prefix("#/$defs/"));
    if let Some(name) = definition.filter(|name| !OF_EVERY_COMMAND.contains(name)) {
        fields(&root["$defs"][name], root, names);
    }
    for part in ["anyOf", "oneOf", "allOf"].into_iter().filter_map(|key| schema[key].as_array()).flatten() {
        fields(part, root, names);
    }
    if schema["items"].is_object() {
        fields(&schema["items"], root, names);
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        names.insert(name.clone());
        fields(field, root, names);
    }
}

/// The help of a command says what its JSON has, and so its man page.
#[test]
fn every_field_is_in_the_help() {
    let bench = Bench::new();
    let (mut missing, mut count) = (Vec::new(), 0);
    for (name, schema) in schemas(&bench).into_iter().filter(|(name, _)| !OF_ALL.contains(&&name[..])) {
        let words: Vec<_> = name.split('-').chain(["--help"]).collect();
        let help = run(&words).succeeded();
        let Some((_, told)) = help.split_once("\nJSON: ") else {
            missing.push(format!("{name}: no paragraph begins with JSON:"));
            continue;
        };
        let told: BTreeSet<_> =
            told.split(|character: char| !character.is_alphanumeric() && !"_-".contains(character)).collect();
        let mut names = BTreeSet::new();
        fields(&schema, &schema, &mut names);
        count += names.len();
        missing.extend(
            names.iter().filter(|field| !told.contains(&field[..])).map(|field| format!("{name}: {field}")),
        );
        let option = help.lines().skip_while(|line| !line.trim_start().starts_with("--json"));
        let option: String = option.take(2).collect();
        if !option.contains(" As JSON: ") {
            missing.push(format!("{name}: --json is described in other words"));
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
    assert!(count > 150, "only {count} fields");
}

/// Adds what `schema` allows at `place` to `lines`: `list[].id`, `list[].state = live`.
fn describe(schema: &Value, root: &Value, place: &str, lines: &mut BTreeSet<String>) {
    if let Some(name) = schema["$ref"].as_str().and_then(|name| name.strip_prefix("#/$defs/")) {
        describe(&root["$defs"][name], root, place, lines);
    }
    for part in ["anyOf", "oneOf", "allOf"].into_iter().filter_map(|key| schema[key].as_array()).flatten() {
        describe(part, root, place, lines);
    }
    if let Some(word) = schema["const"].as_str() {
        lines.insert(format!("{place} = {word}"));
    }
    for word in schema["enum"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        lines.insert(format!("{place} = {word}"));
    }
    if schema["items"].is_object() {
        describe(&schema["items"], root, &format!("{place}[]"), lines);
    }
    let types = schema["type"].as_array().cloned().unwrap_or_else(|| vec![schema["type"].clone()]);
    for kind in types.iter().filter_map(Value::as_str) {
        lines.insert(format!("{place}: {kind}"));
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let place = format!("{place}.{name}");
        let is_required = schema["required"].as_array().is_some_and(|names| names.contains(&name[..].into()));
        if is_required {
            lines.insert(format!("{place} is always there"));
        }
        describe(field, root, &place, lines);
    }
}

#[test]
fn fields_and_words_are_only_ever_added() {
    let bench = Bench::new();
    let mut now = BTreeSet::new();
    for (name, schema) in schemas(&bench) {
        describe(&schema, &schema, &name, &mut now);
    }
    let before: BTreeSet<String> = PRINTED.lines().map(str::to_owned).collect();
    let gone: Vec<_> = before.difference(&now).collect();
    assert!(gone.is_empty(), "programs may depend on these, which are printed no longer: {gone:#?}");
    let new: Vec<_> = now.difference(&before).map(String::as_str).collect();
    assert!(new.is_empty(), "these are new: put them into tests/formats/json.txt:\n{}", new.join("\n"));
}

/// What commands have printed, each in a file whose name begins with that of the schema.
struct Printed {
    folder: PathBuf,
    count: usize,
}

impl Printed {
    fn new(bench: &Bench) -> Self {
        let folder = bench.path("printed");
        fs::create_dir(&folder).expect("a folder");
        Self { folder, count: 0 }
    }

    /// Runs a command in the folder of the images, and keeps what it prints.
    fn by(&mut self, schema: &str, words: &[OsString]) -> Value {
        let mut command = program();
        command.current_dir(self.folder.parent().expect("the bench")).args(words).arg("--json");
        let printed = command.output().expect("it runs").stdout;
        self.count += 1;
        fs::write(self.folder.join(format!("{schema}.{}", self.count)), &printed).expect("writable");
        json(&printed)
    }
}

/// Each schema is one, and all that was printed fits.
const VALIDATE: &str = "
import json, pathlib, sys
import jsonschema
schemas, printed = map(pathlib.Path, sys.argv[1:])
for path in schemas.iterdir():
    jsonschema.Draft202012Validator.check_schema(json.loads(path.read_text()))
for path in printed.iterdir():
    schema = json.loads((schemas / (path.stem + '.json')).read_text())
    for error in jsonschema.Draft202012Validator(schema).iter_errors(json.loads(path.read_text())):
        sys.exit(f'{path.name}: {error}')
";

/// A name that is not UTF-8.
fn odd(name: &str) -> OsString {
    OsString::from_vec([name.as_bytes(), b"\xff.vhdx"].concat())
}

fn hex(name: &OsStr) -> String {
    let mut digits = String::new();
    for byte in name.as_bytes() {
        write!(digits, "{byte:02x}").expect("a string takes everything");
    }
    digits
}

fn words(words: &[&str], names: &[&OsStr]) -> Vec<OsString> {
    words.iter().map(OsString::from).chain(names.iter().map(OsString::from)).collect()
}

#[test]
fn what_is_printed_fits_its_schema_and_loses_no_name() {
    let bench = Bench::new();
    schemas(&bench);
    let mut printed = Printed::new(&bench);
    // A child records no name of a parent that is not UTF-8.
    let [base, child] = ["base.vhdx", "child.vhdx"].map(OsStr::new);
    let [leaf, copy, lost] = ["leaf", "copy", "lost"].map(odd);
    let [leaf, copy, lost] = [&*leaf, &*copy, &*lost];
    let moved = bench.path("folder").join(copy);
    fs::create_dir(bench.path("folder")).expect("a folder");
    let none = OsStr::new("");
    create(&bench.path("base.vhdx"), &["--size", "10M"]).succeeded();
    create(&bench.path("top.vhdx"), &["--parent", bench.path("base.vhdx").to_str().expect("UTF-8")])
        .succeeded();
    for (schema, options, files, name) in [
        ("create", &["create", "--parent"][..], &[base, child][..], none),
        ("create", &["create", "--parent"], &[child, leaf], leaf),
        ("relink", &["relink"], &[leaf, child], leaf),
        ("info", &["info"], &[leaf], leaf),
        ("info", &["info", "--chain"], &[leaf], leaf),
        ("info", &["info"], &[base, lost], lost),
        ("check", &["check"], &[leaf], leaf),
        ("error", &["check"], &[lost], lost),
        ("resize", &["resize", "--size", "12M"], &[leaf], leaf),
        ("set", &["set", "--disk-id", "new"], &[leaf], leaf),
        ("convert", &["convert"], &[leaf, copy], copy),
        ("compact", &["compact"], &[copy], copy),
        ("salvage", &["salvage", "--dry-run"], &[copy], copy),
        ("merge", &["merge"], &[leaf], leaf),
        ("del", &["del"], &[lost], lost),
        ("recover", &["recover"], &[lost], lost),
        ("umount", &["umount"], &[lost], lost),
        ("move", &["move"], &[copy, OsStr::new("folder")], copy),
        ("map", &["map"], &[moved.as_os_str()], none),
        ("measure", &["measure", "--to", "raw"], &[moved.as_os_str()], none),
        ("compare", &["compare"], &[moved.as_os_str(), moved.as_os_str()], none),
        ("doctor", &["doctor"], &[moved.as_os_str()], none),
        ("generate", &["generate", "schema", "again"], &[], none),
        ("list", &["list"], &[], none),
        ("stats", &["stats"], &[], none),
        ("session-list", &["session", "list"], &[], none),
        ("snapshot-list", &["snapshot", "list"], &[OsStr::new("top.vhdx")], none),
        ("snapshot-revert", &["snapshot", "revert"], &[OsStr::new("top.vhdx"), base], none),
    ] {
        let answer = printed.by(schema, &words(options, files)).to_string();
        assert!(answer.contains(&hex(name)), "{schema} loses {}: {answer}", name.display());
    }
    validate(&bench);
}

fn validate(bench: &Bench) {
    let python = |script: &str| {
        let mut python = Command::new("/usr/bin/python3");
        python.args(["-W", "error", "-c", script]).args([bench.path("schema"), bench.path("printed")]);
        python.output().expect("Python runs")
    };
    if !python("import jsonschema").status.success() {
        return skipped(
            "python3-jsonschema is not installed: what is printed was not held against its schema",
        );
    }
    let output = python(VALIDATE);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
