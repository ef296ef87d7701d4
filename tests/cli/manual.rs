//! Promises defended here: every command has a man page that `man` shows without a warning; the completions
//! complete; every example that a help text shows works.

use super::{Bench, Ran, create, has, program, run};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::skip::skipped;

/// Sections that every page has.
const SECTIONS: [&str; 6] = ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "SEE ALSO"];

/// The commands that `--help` lists.
pub fn commands(of: &[&str]) -> Vec<String> {
    let help = run(&[of, &["--help"]].concat()).succeeded();
    let lines = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|l| !l.is_empty());
    let names = lines.filter_map(|line| line.strip_prefix("  ")?.split(' ').next().map(str::to_owned));
    names.filter(|name| !name.is_empty()).collect()
}

/// The pages, by the names of their files.
fn pages(bench: &Bench) -> Vec<(String, String)> {
    let folder = bench.path("man8");
    run(&["generate".as_ref(), "man".as_ref(), folder.as_os_str()]).succeeded();
    let items = fs::read_dir(&folder).expect("made").map(|item| item.expect("readable").path());
    let page = |path: std::path::PathBuf| {
        let name = path.file_name().expect("a file").to_str().expect("UTF-8").to_owned();
        (name, fs::read_to_string(path).expect("readable"))
    };
    let mut pages: Vec<_> = items.map(page).collect();
    pages.sort();
    pages
}

#[test]
fn every_command_has_a_page_with_every_section() {
    let bench = Bench::new();
    let pages = pages(&bench);
    let names: BTreeSet<_> = pages.iter().map(|(name, _)| name.clone()).collect();
    let mut expected = BTreeSet::from(["vhdx-ublk.8".to_owned()]);
    for command in commands(&[]) {
        expected.extend(commands(&[&command]).iter().map(|sub| format!("vhdx-ublk-{command}-{sub}.8")));
        expected.insert(format!("vhdx-ublk-{command}.8"));
    }
    assert_eq!(names, expected);
    for (name, text) in &pages {
        let has = |section: &str| text.lines().any(|line| line.trim_matches('"').ends_with(section));
        let missing: Vec<_> = SECTIONS.iter().filter(|section| !has(section)).collect();
        assert!(missing.is_empty(), "{name} has no {missing:?}");
        assert!(has("EXAMPLES") || has("COMMANDS"), "{name} shows no example");
        assert!(!text.contains(r"\-\-serve"), "{name} shows a hidden option");
    }
}

/// The notes of a page are paragraphs as in the help, and what JSON has is a section of its own.
#[test]
fn notes_are_paragraphs() {
    const LONGEST: usize = 900;
    let bench = Bench::new();
    for (name, text) in pages(&bench) {
        let has = |section: &str| {
            text.contains(&format!(".SH \"{section}\"")) || text.contains(&format!(".SH {section}\n"))
        };
        assert_eq!(has("JSON OUTPUT"), text.contains(r"\-\-json\fR"), "{name}");
        let Some((_, notes)) = text.split_once(".SH NOTES\n") else { continue };
        let notes = notes.split("\n.SH ").next().unwrap_or_default();
        for paragraph in notes.split(".PP\n") {
            assert!(paragraph.len() < LONGEST, "{name}: {paragraph}");
        }
    }
    let page = |name: &str| pages(&bench).into_iter().find(|(page, _)| page == name).expect("a page").1;
    let paragraph = ".PP\nFor a block that is longer than each free run";
    assert!(page("vhdx-ublk-compact.8").contains(paragraph));
}

/// What a page refers to is there: pages of ours, each with its section.
#[test]
fn pages_refer_to_pages_that_exist() {
    let bench = Bench::new();
    let pages = pages(&bench);
    for (name, text) in &pages {
        let related = text.split(".SH \"SEE ALSO\"").nth(1).expect("the last section").replace('\\', "");
        let related: Vec<_> = related.trim().split(", ").collect();
        for page in related {
            let page = page.replace("fB", "").replace("fR", "");
            let (page, section) = page.trim_end_matches(')').split_once('(').expect("a page and its section");
            assert!(!page.is_empty() && section.len() == 1, "{name}: {page}");
            let ours = page.starts_with("vhdx-ublk");
            assert!(
                !ours || pages.iter().any(|(file, _)| *file == format!("{page}.{section}")),
                "{name}: {page}"
            );
        }
    }
}

#[test]
fn man_shows_every_page_without_a_warning() {
    if !has("man") {
        return skipped("man is not installed: the man pages were not shown");
    }
    let bench = Bench::new();
    for (name, _) in pages(&bench) {
        for width in ["60", "120"] {
            let mut man = Command::new("man");
            man.args(["--warnings", "-E", "UTF-8", "-Tutf8", "-Z", "-l"]).arg(bench.path("man8").join(&name));
            man.env("MANWIDTH", width).env("LC_ALL", "C.UTF-8").env("MANROFFSEQ", "").stdin(Stdio::null());
            let shown = Ran::from(man.output().expect("it runs"));
            assert_eq!((shown.status, shown.stderr.as_str()), (Some(0), ""), "{name} at {width} columns");
        }
    }
}

/// Files of the same names are replaced; what a link leads to is not written to.
#[test]
fn pages_are_replaced_and_links_are_not_followed() {
    let bench = Bench::new();
    let (folder, other) = (bench.path("man8"), bench.path("other"));
    fs::create_dir(&folder).expect("a folder");
    fs::write(&other, "mine").expect("writable");
    symlink(&other, folder.join("vhdx-ublk.8")).expect("a link");
    fs::write(folder.join("vhdx-ublk-add.8"), "old").expect("writable");
    let pages = pages(&bench);
    assert!(pages.iter().all(|(_, text)| text.contains(".TH ")));
    assert_eq!(fs::read_to_string(&other).expect("there"), "mine");
    let file = bench.path("file");
    fs::write(&file, "mine").expect("writable");
    let refused: Ran =
        program().args(["generate", "man"]).arg(file.join("x")).output().expect("it runs").into();
    assert_eq!(refused.status, Some(1));
    assert!(refused.stderr.contains("file/x"), "{}", refused.stderr);
}

#[test]
fn completions_complete() {
    let bench = Bench::new();
    let folder = bench.path("completions");
    run(&["generate".as_ref(), "completions".as_ref(), folder.as_os_str()]).succeeded();
    let bash = folder.join("vhdx-ublk.bash");
    for (words, expected) in [
        (&["vhdx-ublk", "conv"][..], "convert"),
        (&["vhdx-ublk", "add", "--read"], "--read-only"),
        (&["vhdx-ublk", "session", "dis"], "discard"),
        (&["vhdx-ublk", "create", "x.vhdx", "--type", "dif"], "differencing"),
        // Bash completes the name of a file if there is no other answer.
        (&["vhdx-ublk", "info", ""], ""),
        (&["vhdx-ublk", "info", "di"], ""),
    ] {
        let last = words.len() - 1;
        let script = format!(
            ". {}; COMP_WORDS=({}); COMP_CWORD={last}; \
             _vhdx__ublk__files vhdx-ublk '{}' '{}'; echo \"${{COMPREPLY[*]}}\"; complete -p vhdx-ublk",
            bash.display(),
            words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" "),
            words[last],
            words[last - 1],
        );
        let answer: Ran = Command::new("bash").args(["-c", &script]).output().expect("bash runs").into();
        let answer = answer.succeeded();
        let (offered, bound) = answer.split_once('\n').expect("two lines");
        assert_eq!(offered, expected, "{words:?}");
        assert!(bound.contains("-o default") && bound.contains("_vhdx__ublk__files"), "{bound}");
    }
    for (shell, file) in [("zsh", "_vhdx-ublk"), ("fish", "vhdx-ublk.fish")] {
        if !has(shell) {
            skipped(&format!("{shell} is not installed: its completions were not read"));
            continue;
        }
        let read = Command::new(shell).arg("-n").arg(folder.join(file)).output().expect("it runs");
        assert_eq!(Ran::from(read).succeeded(), "");
    }
}

/// Commands whose examples need devices, and with them a kernel with ublk, or change `/etc`: the laboratory
/// runs those.
const WITH_DEVICES: [&str; 16] = [
    "add", "del", "list", "recover", "session", "snapshot", "features", "upgrade", "stats", "metrics",
    "doctor", "mount", "umount", "enable", "disable", "start",
];

/// Options with which other commands need them, too.
const NEED_DEVICES: [&str; 3] = [" --trim", " --grow-fs", " /dev/ublkb0"];

/// What examples name, and what the test has in its place.
const STAND_INS: [(&str, &str); 7] = [
    ("https://example.org/", "file://$PWD/"),
    ("/backup/", "backup/"),
    ("/srv/disks", "srv/disks"),
    ("/dev/sdx", "sdx"),
    ("--size 1T", "--size 64M"),
    ("losetup --find --show --partscan", "test -s"),
    ("/snapshots/", "snapshots/"),
];

/// The lines below `Examples:`; a line that is indented further continues the one above.
fn examples(of: &[&str]) -> Vec<String> {
    let help = run(&[of, &["--help"]].concat()).succeeded();
    let lines = help.lines().skip_while(|line| *line != "Examples:").skip(1).take_while(|l| !l.is_empty());
    lines
        .filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' ')))
        .map(|line| {
            // The comment is set off by two spaces.
            line.split("  ").next().unwrap_or(line).to_owned()
        })
        .collect()
}

/// What examples name, and what each is a child of; all are in one folder.
const FILES: [(&str, Option<&str>); 14] = [
    ("disk.raw", None),
    ("disk.vhdx", None),
    ("copy.vhdx", None),
    ("flat.vhd", None),
    ("base/win.vhdx", None),
    ("moved/base.vhdx", None),
    ("backup/base.vhdx", None),
    ("child.vhdx", Some("disk.vhdx")),
    ("child.avhdx", Some("disk.vhdx")),
    ("monday.vhdx", Some("disk.vhdx")),
    ("monday.avhdx", Some("disk.vhdx")),
    ("checkpoint.avhdx", Some("child.avhdx")),
    ("newest.avhdx", Some("checkpoint.avhdx")),
    ("vm/disk.avhdx", Some("vm/disk.vhdx")),
];

/// The names of [`FILES`] that an example reads. What it makes must not be there.
fn reads(line: &str) -> Vec<&'static str> {
    let words: Vec<_> = line.split([' ', '/']).collect();
    let named = FILES.iter().map(|(name, _)| *name).filter(|name| line.contains(name));
    let at = |name: &str| line.find(name).unwrap_or(usize::MAX);
    match words.iter().skip_while(|word| **word != "vhdx-ublk").nth(1) {
        Some(&"create") => named.filter(|name| at(name) > at("--parent")).collect(),
        Some(&"convert" | &"salvage") => named.min_by_key(|name| at(name)).into_iter().collect(),
        _ if line.contains("*.vhdx") => vec!["disk.vhdx", "child.avhdx"],
        _ => named.collect(),
    }
}

/// A folder of its own for an example, with what the example reads. All disks hold one file system.
fn folder_for(line: &str, disk: &Path) -> Bench {
    let bench = Bench::new();
    for name in ["vm", "base", "moved", "backup", "srv", "srv/disks", "snapshots"] {
        fs::create_dir(bench.path(name)).expect("a folder");
    }
    fs::copy(disk, bench.path("sdx")).expect("a copy");
    for name in reads(line) {
        make(&bench, name, line, disk);
    }
    if line.contains("merge monday.vhdx") {
        child(&bench, "tuesday.vhdx", "monday.vhdx");
    }
    bench
}

fn child(bench: &Bench, name: &str, parent: &str) {
    let parent = bench.path(parent);
    create(&bench.path(name), &["--parent", parent.to_str().expect("UTF-8")]).succeeded();
}

fn make(bench: &Bench, name: &str, line: &str, disk: &Path) {
    let path = bench.path(name);
    let parent = FILES.iter().find(|(known, _)| *known == name).and_then(|(_, parent)| *parent);
    // `--parent` names the one from which it was made.
    let named = (name == "vm/disk.avhdx" && line.contains("base/win.vhdx")).then_some("base/win.vhdx");
    match named.or(parent) {
        _ if path.exists() => {}
        Some(parent) => {
            make(bench, parent, line, disk);
            child(bench, name, parent);
        }
        None if name == "disk.raw" => _ = fs::copy(disk, path).expect("a copy"),
        None => {
            _ = run(&["convert".as_ref(), "--progress=none".as_ref(), disk.as_os_str(), path.as_os_str()])
                .succeeded();
        }
    }
    if line.contains("relink") || line.contains("--parent backup/base.vhdx") {
        // The parent is elsewhere by now.
        for moved in ["moved/base.vhdx", "backup/base.vhdx"] {
            if bench.path("disk.vhdx").exists() {
                fs::copy(bench.path("disk.vhdx"), bench.path(moved)).expect("a copy");
            }
        }
    }
}

/// Runs one example; says what went wrong.
fn try_example(folder: &Path, line: &str) -> Result<(), String> {
    let program = Path::new(env!("CARGO_BIN_EXE_vhdx-ublk")).parent().expect("a folder");
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap_or_default());
    let mut bash = Command::new("bash");
    bash.args(["-euo", "pipefail", "-c", line]).env("PATH", path).current_dir(folder);
    let output = bash.stdin(Stdio::null()).output().expect("bash runs");
    let text = String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{line}: {}: {text}", output.status)) }
}

#[test]
fn every_example_of_a_help_text_works() {
    for tool in ["man", "curl", "ddrescuelog", "mkfs.ext4"] {
        if Command::new(tool).arg("--version").output().is_err() {
            return skipped(&format!("{tool} is not installed: the examples of the help texts were not run"));
        }
    }
    let (mut bench, mut wrong, mut count) = (Bench::new(), Vec::new(), 0);
    let made = Bench::new();
    let disk = made.path("disk.raw");
    fs::File::create(&disk).and_then(|file| file.set_len(64 << 20)).expect("a raw disk");
    let made = Command::new("mkfs.ext4").arg("-q").arg(&disk).status().expect("it runs");
    assert!(made.success());
    let on_files = |command: &String| !WITH_DEVICES.contains(&command.as_str());
    for command in commands(&[]).into_iter().filter(on_files).chain([String::new()]) {
        let of: Vec<_> = [command.as_str()].into_iter().filter(|command| !command.is_empty()).collect();
        for example in examples(&of) {
            let line = STAND_INS.iter().fold(example, |line, (from, to)| line.replace(from, to));
            let mut words = line.split(['(', ' ']).skip_while(|word| *word != "vhdx-ublk").skip(1);
            match words.next() {
                Some(word) if WITH_DEVICES.contains(&word) => continue,
                Some(_) if NEED_DEVICES.iter().any(|option| line.contains(option)) => continue,
                Some(_) => bench = folder_for(&line, &disk),
                None => {} // it is about what the example above has made
            }
            count += 1;
            wrong.extend(try_example(bench.0.path(), &line).err());
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count > 35, "only {count} examples were found");
}

/// The words that people try are names of commands, and `help` explains tasks and commands.
#[test]
fn help_explains_tasks_and_commands() {
    let list = run(&["help"]).succeeded();
    for task in ["shrink", "grow", "backup", "guest", "windows", "export", "upgrade", "boot", "watch"] {
        assert!(list.contains(&format!("\n  {task} ")), "{list}");
        let page = run(&["help", task]).succeeded();
        let title = page.lines().next().expect("a title");
        assert!(list.contains(title.trim_end_matches('.')) && page.contains("vhdx-ublk "), "{page}");
    }
    assert_eq!(run(&["help", "convert"]).succeeded(), run(&["convert", "--help"]).succeeded());
    let listed = run(&["help", "session", "list"]).succeeded();
    assert_eq!(listed, run(&["session", "list", "--help"]).succeeded());
    let message = run(&["help", "bogus"]).failed(2);
    assert!(message.contains("bogus"), "{message}");
    for (name, command) in [
        ("attach", "add"),
        ("detach", "del"),
        ("rm", "del"),
        ("stop", "del"),
        ("ls", "list"),
        ("shrink", "compact"),
        ("grow", "resize"),
    ] {
        let help = run(&[name, "--help"]).succeeded();
        assert_eq!(help, run(&[command, "--help"]).succeeded());
        assert!(run(&["--help"]).succeeded().contains(name), "{name}");
    }
}
