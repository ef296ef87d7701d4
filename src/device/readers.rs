//! Who has a file open, and whether they can write it, as far as `/proc` tells.

use std::fs;
use std::path::{Path, PathBuf};

use super::registry::FileId;

/// The processes, this one aside, that have `file` open, none of them for writing: `cat (pid 123)`. Nothing if one
/// can write it, or if none is seen: then those who lock it are where this process cannot look, and may do anything.
pub fn only_readers(file: FileId) -> Option<Vec<String>> {
    let this = std::process::id();
    let mut readers = Vec::new();
    for pid in names_in(Path::new("/proc")).iter().filter_map(|name| name.parse::<u32>().ok()) {
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let open = names_in(&folder.join("fd")).into_iter().filter_map(|fd| opened(&folder, &fd, file));
        let open: Vec<Access> = open.collect();
        if pid == this || open.is_empty() {
            continue;
        }
        if open.contains(&Access::Writes) {
            return None;
        }
        let name = fs::read_to_string(folder.join("comm")).unwrap_or_default();
        readers.push(format!("{} (pid {pid})", name.trim_end()));
    }
    (!readers.is_empty()).then_some(readers)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Reads,
    Writes,
}

/// How the descriptor `fd` of the process in `folder` has `file` open, if it has.
fn opened(folder: &Path, fd: &str, file: FileId) -> Option<Access> {
    let info = fs::read_to_string(folder.join("fdinfo").join(fd)).ok()?;
    let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    // Known since Linux 5.14. It keeps file systems from being asked that have nothing to do with the file.
    if field("ino:").is_some_and(|inode| inode.parse() != Ok(file.inode)) {
        return None;
    }
    let link = folder.join("fd").join(fd);
    if !fs::read_link(&link).ok()?.is_absolute() || FileId::of(&fs::metadata(&link).ok()?) != file {
        return None;
    }
    let flags = field("flags:").and_then(|flags| i32::from_str_radix(flags, 8).ok());
    match flags {
        Some(flags) if flags & libc::O_PATH != 0 => None,
        Some(flags) if flags & libc::O_ACCMODE == libc::O_RDONLY => Some(Access::Reads),
        _ => Some(Access::Writes),
    }
}

fn names_in(folder: &Path) -> Vec<String> {
    let items = fs::read_dir(folder).into_iter().flatten().flatten();
    items.filter_map(|item| item.file_name().into_string().ok()).collect()
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
    fn readers_are_named_and_a_writer_is_told_from_them() {
        let image = tempfile::NamedTempFile::new().expect("a temporary file");
        let path = image.path().to_owned();
        let file = FileId::of(&fs::metadata(&path).expect("there"));
        assert_eq!(only_readers(file), None, "nobody is seen");
        let reader = holder(File::open(&path).expect("there"));
        let found = only_readers(file).expect("a reader");
        assert!(found.iter().any(|name| name.ends_with(&format!("(pid {})", reader.id()))), "{found:?}");
        let writer = holder(File::options().append(true).open(&path).expect("there"));
        assert_eq!(only_readers(file), None, "one can write");
        end(writer);
        end(reader);
    }
}
