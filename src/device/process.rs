//! A process, and not a later one of the same number.
//!
//! The crate `procfs` is not used: it parses fifty fields, and one odd field would make a daemon look dead.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};

/// A process, and not a later one of the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its number.
    pub pid: u32,
    /// When it was started, in the kernel's ticks since boot.
    pub start_time: u64,
    /// The PID namespace in which it has that number; 0 if it was not recorded.
    #[serde(default)]
    pub namespace: u64,
}

/// What can be seen of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It runs, or waits.
    Runs,
    /// It was stopped by a signal or a debugger, and does nothing until it is continued.
    Stopped,
    /// It has ended.
    Ended,
    /// It belongs to another PID namespace: it cannot be seen whether it runs.
    Hidden,
}

impl ProcessId {
    /// This process.
    ///
    /// # Errors
    ///
    /// If `/proc` is not mounted.
    pub fn this() -> Result<Self> {
        let pid = std::process::id();
        let (_, start_time) =
            read(pid).ok_or_else(|| Error::new(Kind::Io, "/proc does not say when this process began"))?;
        Ok(Self { pid, start_time, namespace: namespace() })
    }

    /// What can be seen of it.
    pub fn life(&self) -> Life {
        if self.namespace != 0 && self.namespace != namespace() {
            return Life::Hidden;
        }
        match read(self.pid) {
            Some((life, start_time)) if start_time == self.start_time => life,
            _ => Life::Ended,
        }
    }

    /// Whether it has ended with all of its threads. One that ends later than the first keeps the files of
    /// the process open until then.
    pub fn has_left(&self) -> bool {
        let threads = || fs::read_dir(format!("/proc/{}/task", self.pid)).map_or(0, Iterator::count);
        self.life() == Life::Ended
            && (threads() <= 1 || read(self.pid).is_none_or(|(_, start)| start != self.start_time))
    }

    /// Whether it can be seen to run, or to be stopped.
    pub fn is_alive(&self) -> bool {
        matches!(self.life(), Life::Runs | Life::Stopped)
    }
}

/// The PID namespace of this process; 0 if `/proc` does not have it.
fn namespace() -> u64 {
    fs::metadata("/proc/self/ns/pid").map_or(0, |found| found.ino())
}

/// The process that now has this number, and when it was started.
fn read(pid: u32) -> Option<(Life, u64)> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Fields 3 and 22 of `/proc/PID/stat`: its state and start time. Field 2 is the program's name in
/// parentheses and may hold anything, so fields are counted from the last parenthesis. A zombie has ended.
fn parse_stat(stat: &str) -> Option<(Life, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let life = match fields.next()? {
        "Z" | "X" => Life::Ended,
        "T" | "t" => Life::Stopped,
        _ => Life::Runs,
    };
    Some((life, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_programs_name_cannot_forge_its_start_time() {
        let stat = |name: &str, state: &str| format!("77 ({name}) {state} {} 4242 0", "0 ".repeat(18).trim());
        assert_eq!(parse_stat(&stat("fio", "S")), Some((Life::Runs, 4242)));
        assert_eq!(parse_stat(&stat("a) S 1 2 (b", "R")), Some((Life::Runs, 4242)));
        assert_eq!(parse_stat(&stat("fio", "T")), Some((Life::Stopped, 4242)));
        assert_eq!(parse_stat(&stat("fio", "Z")), Some((Life::Ended, 4242)));
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn this_process_is_alive_and_a_later_one_of_its_number_would_not_be_it() {
        let this = ProcessId::this().expect("/proc");
        assert_eq!((this.life(), this.has_left()), (Life::Runs, false));
        let later = ProcessId { start_time: this.start_time + 1, ..this };
        assert_eq!((later.life(), later.has_left()), (Life::Ended, true));
    }

    #[test]
    fn a_process_of_another_namespace_is_not_taken_for_one_of_this() {
        let this = ProcessId::this().expect("/proc");
        let other = ProcessId { namespace: this.namespace + 1, ..this };
        assert_eq!(other.life(), Life::Hidden);
        assert!(!other.is_alive());
    }
}
