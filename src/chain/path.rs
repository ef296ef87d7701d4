//! Paths that Windows wrote, on this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use unicode_normalization::UnicodeNormalization;

use crate::disk::HostFile;

/// Where something that Windows knows under a drive letter, a volume or a share is mounted here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathMap {
    /// How the Windows path begins, with slashes, without one at its end.
    from: String,
    /// What stands for that here.
    to: PathBuf,
}

impl FromStr for PathMap {
    type Err = String;

    /// Reads `FROM=TO`: `C:\=/mnt/c`.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not FROM=TO, as in 'C:\\=/mnt/c'");
        let (from, to) = text.split_once('=').ok_or_else(wrong)?;
        let from = with_slashes(from).trim_end_matches('/').to_owned();
        if from.is_empty() || to.is_empty() {
            return Err(wrong());
        }
        Ok(Self { from, to: to.into() })
    }
}

impl std::fmt::Display for PathMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}={}", self.from, self.to.display())
    }
}

impl PathMap {
    /// What `path` is here, if this map knows it.
    pub(super) fn apply(&self, path: &str) -> Option<PathBuf> {
        let path = with_slashes(path);
        let (start, rest) = path.split_at_checked(self.from.len())?;
        let fits = start.to_lowercase() == self.from.to_lowercase();
        (fits && (rest.is_empty() || rest.starts_with('/'))).then(|| join(&self.to, rest))
    }
}

/// What `path`, which begins at `folder`, is here.
pub(super) fn join(folder: &Path, path: &str) -> PathBuf {
    let path = with_slashes(path);
    let mut joined = folder.to_owned();
    for component in path.split('/') {
        match component {
            "" | "." => {}
            ".." => joined.push(".."),
            name => joined.push(name),
        }
    }
    joined
}

/// The last component of a path that Windows wrote.
pub(super) fn name(path: &str) -> Option<String> {
    let path = with_slashes(path);
    let name = path.rsplit('/').next().unwrap_or_default();
    (!name.is_empty() && name != "." && name != "..").then(|| name.to_owned())
}

/// Whether both paths lead to one file.
pub fn same_file(one: &Path, other: &Path) -> bool {
    matches!((HostFile::at(one), HostFile::at(other)), (Ok(one), Ok(other)) if one == other)
}

/// `path`, or what differs from it only in what Windows or another host does not tell apart: the case of
/// letters, and whether an accent is a part of its letter or a character of its own (macOS writes names that
/// way).
pub(super) fn existing(path: &Path) -> Option<PathBuf> {
    if path.exists() {
        return Some(path.to_owned());
    }
    let mut found = PathBuf::new();
    for component in path.components() {
        let next = found.join(component);
        found =
            if next.exists() { next } else { spelled_otherwise(&found, component.as_os_str().to_str()?)? };
    }
    Some(found)
}

fn spelled_otherwise(folder: &Path, name: &str) -> Option<PathBuf> {
    let spelling = |name: &str| name.nfc().collect::<String>().to_lowercase();
    let wanted = spelling(name);
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let entries = fs::read_dir(folder).ok()?.filter_map(Result::ok);
    // Where several differ only in that, the same one every time.
    let fits = |name: &std::ffi::OsString| name.to_str().is_some_and(|name| spelling(name) == wanted);
    entries.map(|entry| entry.file_name()).filter(fits).min().map(|name| folder.join(name))
}

fn with_slashes(path: &str) -> String {
    path.replace('\\', "/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_replaces_a_beginning_whatever_its_case_and_slashes() {
        let map: PathMap = r"C:\=/mnt/c".parse().expect("a good map");
        assert_eq!(map.apply(r"c:\Images\base.vhdx"), Some("/mnt/c/Images/base.vhdx".into()));
        assert_eq!(map.apply("C:/"), Some("/mnt/c".into()));
        assert_eq!(map.apply(r"D:\base.vhdx"), None);
        let volume = r"\\?\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\=/data";
        let volume: PathMap = volume.parse().expect("a good map");
        let path = r"\\?\Volume{26A21BDA-a627-11d7-9931-806e6f6e6963}\x\b.vhdx";
        assert_eq!(volume.apply(path), Some("/data/x/b.vhdx".into()));
        let share: PathMap = r"\\server\disks=/net".parse().expect("a good map");
        assert_eq!(share.apply(r"\\server\disks\b.vhdx"), Some("/net/b.vhdx".into()));
        assert_eq!(share.apply(r"\\server\disks2\b.vhdx"), None, "a component goes whole");
        for wrong in ["C:", "=/mnt", r"\=/mnt", "C:="] {
            assert!(wrong.parse::<PathMap>().is_err(), "{wrong}");
        }
        assert_eq!(map.to_string().parse(), Ok(map));
    }

    #[test]
    fn a_path_starts_at_its_folder_and_goes_up() {
        let folder = Path::new("/images/a");
        assert_eq!(join(folder, r".\base.vhdx"), Path::new("/images/a/base.vhdx"));
        assert_eq!(join(folder, r"..\b\base.vhdx"), Path::new("/images/a/../b/base.vhdx"));
        assert_eq!(name(r"C:\x\base.vhdx"), Some("base.vhdx".into()));
        assert_eq!((name(r"C:\x\"), name("..")), (None, None));
    }

    #[test]
    fn letters_of_another_case_name_the_same_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let there = folder.path().join("Disks/Base.VHDX");
        fs::create_dir(folder.path().join("Disks")).expect("a folder");
        fs::write(&there, "").expect("a file");
        assert_eq!(existing(&folder.path().join("disks/base.vhdx")), Some(there.clone()));
        assert_eq!(existing(&there), Some(there));
        assert_eq!(existing(&folder.path().join("disks/other.vhdx")), None);
    }

    /// Windows writes `ü` as one character, macOS as two: both are one name.
    #[test]
    fn accents_of_another_spelling_name_the_same_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let (decomposed, composed) = ("Gra\u{308}ser u\u{308}.vhdx", "gr\u{e4}ser \u{fc}.vhdx");
        let there = folder.path().join(decomposed);
        fs::write(&there, "").expect("a file");
        assert_eq!(existing(&folder.path().join(composed)), Some(there));
        let there = folder.path().join("\u{c5}.vhdx");
        fs::write(&there, "").expect("a file");
        assert_eq!(existing(&folder.path().join("A\u{30a}.vhdx")), Some(there));
    }
}
