//! The programs of the machine that this one runs, as root.
//!
//! They get none of the caller's environment, whose variables could lead them to other files and programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where the programs of the machine are: the `PATH` of those that are run.
const FOLDERS: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Where its administrator puts others.
const OF_ADMINISTRATOR: &str = "/usr/local/sbin:/usr/local/bin";

/// A command that runs the program `name` of the machine.
pub fn command(name: &str) -> Command {
    at(&find(name).unwrap_or_else(|| Path::new("/usr/sbin").join(name)))
}

/// A command that runs the program at `path`.
pub(super) fn at(path: &Path) -> Command {
    let mut command = Command::new(path);
    command.env_clear().env("PATH", FOLDERS).env("LANG", "C");
    command
}

/// Where the program `name` is: in the folders of the machine, else in those of its administrator. The
/// caller's `PATH` does not count.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let folders = [FOLDERS, OF_ADMINISTRATOR].into_iter().flat_map(std::env::split_paths);
    let mut places = folders.map(|folder| folder.join(name));
    places.find(|place| fs::metadata(place).is_ok_and(|found| found.is_file()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_gets_nothing_of_the_environment() {
        let output = command("env").output().expect("every machine has it");
        let text = String::from_utf8(output.stdout).expect("these variables are text");
        let mut found: Vec<&str> = text.lines().collect();
        found.sort_unstable();
        assert_eq!(found, ["LANG=C", &format!("PATH={FOLDERS}")]);
    }

    #[test]
    fn programs_of_the_machine_come_before_others() {
        let found = find("sh").expect("every machine has it");
        assert!(std::env::split_paths(FOLDERS).any(|folder| found.starts_with(folder)), "{found:?}");
        let elsewhere = command("no-such-program");
        assert!(Path::new(elsewhere.get_program()).is_absolute(), "the caller's PATH is not searched");
    }
}
