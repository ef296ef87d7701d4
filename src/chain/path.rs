//! Paths that Windows wrote, on this machine.

use std::path::{Path, PathBuf};
use std::str::FromStr;

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
}
