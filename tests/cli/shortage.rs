//! What the machine lacks is said, with what helps, and costs no file: descriptors, room for the output,
//! `/proc`, names that fit.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};

use super::relink::base;
use super::{Bench, Ran, on, program, run};

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("readable");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("readable").file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

/// A command that runs out of descriptors at any point leaves nothing, and can be given again.
#[test]
fn without_descriptors_nothing_is_left_behind() {
    let bench = Bench::new();
    let parent = base(&bench, "base.vhdx");
    let (parent, target) = (parent.to_str().expect("UTF-8"), bench.path("made"));
    let made = target.to_str().expect("UTF-8");
    let commands: [&[&str]; 4] = [
        &["create", made, "--size", "1G"],
        &["create", made, "--parent", parent],
        &["convert", parent, made, "--to", "vhdx"],
        &["salvage", parent, made],
    ];
    for command in commands {
        let (mut refused, mut done) = (0, 0);
        for limit in 4..40 {
            let script = format!("ulimit -n {limit}; exec \"$0\" \"$@\"");
            let mut limited = Command::new("sh");
            limited.args(["-c", &script]).arg(program().get_program()).args(command);
            let ran = Ran::from(limited.output().expect("it runs"));
            if ran.status == Some(0) {
                done += 1;
                fs::remove_file(&target).expect("it was made");
            } else {
                refused += 1;
            }
            assert_eq!(names(bench.0.path()), ["base.vhdx"], "{command:?} with {limit}: {}", ran.stderr);
        }
        assert!(refused > 0 && done > 0, "{command:?}: refused {refused} times, done {done} times");
    }
}

fn to_full(arguments: &[&str]) -> Ran {
    let full = File::options().write(true).open("/dev/full").expect("there");
    program().args(arguments).stdout(Stdio::from(full)).output().expect("it runs").into()
}

/// An answer that cannot be written is a failure, and standard error says why.
#[test]
fn an_answer_that_cannot_be_written_is_a_failure_that_is_told() {
    let bench = Bench::new();
    let image = base(&bench, "base.vhdx");
    let image = image.to_str().expect("UTF-8");
    let commands: [&[&str]; 8] = [
        &["info", image],
        &["info", image, "--json"],
        &["check", image, "--json"],
        &["map", image, "--json"],
        &["list", "--json"],
        &["--version"],
        &["--help"],
        &["help", "backup"],
    ];
    for command in commands {
        let ran = to_full(command);
        assert_eq!(ran.status, Some(1), "{command:?}: {}", ran.stderr);
        for part in ["vhdx-ublk: writing the output", "No space left", "where standard output is written"] {
            assert!(ran.stderr.contains(part), "{command:?}: {part} is not in: {}", ran.stderr);
        }
    }
    let ran = to_full(&["info", "nowhere.vhdx", "--json"]);
    assert!(ran.status == Some(1) && ran.stderr.contains("nowhere.vhdx"), "{}", ran.stderr);
}

/// Where /proc is not mounted that is what is said, and not that the image is not there.
#[test]
fn a_machine_without_proc_is_told_so() {
    let bench = Bench::new();
    let image = base(&bench, "base.vhdx");
    let inside = |script: &str| -> Ran {
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", &format!("umount -l /proc && {script}")]);
        command.arg(program().get_program()).arg(&image).output().expect("util-linux is there").into()
    };
    if inside("true").status != Some(0) {
        return super::skipped("no mount can be taken away: a machine without /proc is not tested");
    }
    for command in ["compact", "info", "check", "resize --size 2G", "create --force --size 1G"] {
        let message = inside(&format!("exec \"$0\" {command} \"$1\"")).failed(1);
        assert!(message.contains("mount -t proc proc /proc"), "{command}: {message}");
    }
}

/// What is wrong with the name of a target is said before anything is copied, and what helps.
#[test]
fn a_target_that_cannot_be_is_refused_at_once() {
    let bench = Bench::new();
    let source = base(&bench, "base.vhdx");
    let source = source.to_str().expect("UTF-8");
    symlink("gone", bench.path("dangling")).expect("room");
    symlink("round", bench.path("round")).expect("room");
    let before = names(bench.0.path());
    let long = "x".repeat(256);
    let cases = [
        ("dangling", "there is no file where it leads", "remove the link"),
        ("round/x", "Too many levels", "namei -l"),
        ("base.vhdx/x", "Not a directory", "should be a folder"),
        (&long, "File name too long", "choose a shorter name"),
    ];
    for (name, what, remedy) in cases {
        let target = bench.path(name);
        let target = target.to_str().expect("UTF-8");
        let commands: [&[&str]; 4] = [
            &["create", "--size", "1G", target],
            &["create", "--force", "--size", "1G", target],
            &["convert", "--force", source, target, "--to", "vhdx"],
            &["salvage", "--force", source, target],
        ];
        for command in commands {
            let message = run(command).failed(1);
            assert!(message.contains(what) && message.contains(remedy), "{command:?}: {message}");
            assert!(!message.contains("--force"), "it would not help: {message}");
            assert_eq!(names(bench.0.path()), before, "{command:?}");
        }
    }
}

/// An image can be made of paths; what is said of them is a few lines.
#[test]
fn a_hostile_child_does_not_flood_its_reader() {
    let bench = Bench::new();
    let parent = base(&bench, "base.vhdx");
    let child = super::relink::child_of(&bench, &parent, "child.vhdx");
    super::merge::relocate(&child, |locator| {
        for key in ["relative_path", "volume_path", "a_path", "b_path", "c_path"] {
            locator.set(key, format!("{key}{}", "\u{fffd}".repeat(30_000)));
        }
    });
    let ran = on("check", &child, &[]);
    let all = ran.stdout.len() + ran.stderr.len();
    assert!(all < 8 << 10, "{all} bytes");
    let told = ran.stdout + &ran.stderr;
    assert!(told.contains("relative_path") && told.contains("volume_path"), "{told}");
    assert!(!told.contains("a_path"), "no key of anybody else's: {told}");
}
