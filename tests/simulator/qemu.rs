//! QEMU's tools as judges: they share no code with us.

use std::path::Path;
use std::process::{Command, Output};

use crate::skip::skipped;

/// `false`, and a loud word, where QEMU's tools are missing.
pub fn is_here() -> bool {
    let answers = |program: &str| {
        Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
    };
    let found = answers("qemu-img") && answers("qemu-io");
    if !found {
        skipped("qemu-img and qemu-io are not installed (Debian package qemu-utils)");
    }
    found
}

/// One of the tools, ended after two minutes: some logs make it search for ever.
pub fn command(program: &str) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "120", program]);
    command
}

/// Has QEMU replay the log of an image in place.
pub fn replay(image: &Path) -> Result<(), String> {
    let mut command = command("qemu-img");
    command.args(["check", "-q", "-f", "vhdx", "-r", "all"]).arg(image);
    run(&mut command).map(drop)
}

/// Runs one of the tools; what it printed, or what it complained of.
pub fn run(command: &mut Command) -> Result<Output, String> {
    let output = command.output().expect("the program starts");
    if output.status.success() {
        return Ok(output);
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)))
}
