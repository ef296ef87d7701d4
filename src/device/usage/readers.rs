//! The processes that only read a file.

use crate::device::processes::{self, OpenFile, Process};
use crate::disk::HostFile;

/// The processes, except for this one, that have `file` open, none of them for writing: `cat (pid 123)`.
/// `None` if one can write it, or if none is seen: then the processes that lock it cannot be seen from here,
/// and may do anything.
pub fn only_readers(file: HostFile) -> Option<Vec<String>> {
    let mut readers = Vec::new();
    for pid in processes::others() {
        // Each descriptor is judged once: a writer may end, or pass its descriptor on, at any moment.
        let open = processes::open_files(pid).filter(|open| open.is(file));
        let accesses: Vec<Access> = open.filter_map(|open| access(&open)).collect();
        if accesses.contains(&Access::Writes) {
            return None;
        }
        if !accesses.is_empty() {
            readers.push(Process::of(pid).to_string());
        }
    }
    (!readers.is_empty()).then_some(readers)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Reads,
    Writes,
}

/// How a file is open; `None` if only its path is.
fn access(open: &OpenFile) -> Option<Access> {
    let flags = open.info("flags:").and_then(|flags| i32::from_str_radix(&flags, 8).ok());
    match flags {
        Some(flags) if flags & libc::O_PATH != 0 => None,
        Some(flags) if flags & libc::O_ACCMODE == libc::O_RDONLY => Some(Access::Reads),
        _ => Some(Access::Writes),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A process that has the file open, until it is ended.
    fn holder(file: File) -> Child {
        Command::new("sleep").arg("60").stdin(Stdio::from(file)).spawn().expect("it runs")
    }

    fn end(mut child: Child) {
        child.kill().expect("ours");
        child.wait().expect("ours");
    }

    #[test]
    fn readers_are_named_and_a_writer_is_not_one() {
        let image = tempfile::NamedTempFile::new().expect("a temporary file");
        let path = image.path().to_owned();
        let file = HostFile::at(&path).expect("there");
        assert_eq!(only_readers(file), None, "none is seen");
        let reader = holder(File::open(&path).expect("there"));
        let found = only_readers(file).expect("a reader");
        assert!(found.iter().any(|name| name.ends_with(&format!("(pid {})", reader.id()))), "{found:?}");
        let writer = holder(File::options().append(true).open(&path).expect("there"));
        assert_eq!(only_readers(file), None, "one can write");
        end(writer);
        end(reader);
    }
}
