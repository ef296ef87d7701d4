//! Looks at paths that images choose, within bounds.
//!
//! Whoever made an image chooses the paths in it, and may own the folders that these lead to: with any number
//! of names in them, or on a file system that never answers. So one search looks at a bounded number of
//! names, in folders that it reads once for each name that it looks for, and waits for a silent file system
//! twice at most: at a path that an image names, and beside the image.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use unicode_normalization::UnicodeNormalization;

use crate::disk::{HostFile, in_time};

/// The most names that one search compares with those it looks for: about half a second's work, and more than
/// a folder of images has.
pub const MAX_NAMES: usize = 1 << 18;

/// The looks of one search; clones share its bounds.
#[derive(Clone, Debug, Default)]
pub struct Looks(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    names: Names,
    /// Looks that were not answered.
    silent: usize,
}

/// What is known of the names in folders.
#[derive(Debug, Default)]
struct Names {
    /// How many were compared.
    compared: usize,
    /// The name in a folder that is spelled so, if there is one.
    known: BTreeMap<(u64, u64, String), Option<OsString>>,
}

/// A path that leads to a file.
pub(super) struct Found {
    pub(super) path: PathBuf,
    pub(super) file: HostFile,
}

impl Looks {
    /// `path`, or what differs from it only in what Windows or another host does not tell apart: the case of
    /// letters, and whether an accent is a part of its letter or a character of its own (macOS writes names
    /// that way). `beside` the image only its own folder is looked at.
    pub(super) fn existing(&self, path: &Path, beside: bool) -> Option<Found> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.silent > usize::from(beside) {
            return None;
        }
        let (mut names, compared, wanted) =
            (mem::take(&mut state.names), state.names.compared, path.to_owned());
        let looked = in_time(move || {
            let found = names.find(&wanted);
            (names, found)
        });
        match looked {
            Ok((names, found)) => {
                state.names = names;
                found
            }
            Err(error) => {
                tracing::warn!("{}: looking for a parent: {error:#}", path.display());
                state.names.compared = compared;
                state.silent += 1;
                None
            }
        }
    }
}

impl Names {
    fn find(&mut self, path: &Path) -> Option<Found> {
        if let Ok(file) = HostFile::at(path) {
            return Some(Found { path: path.to_owned(), file });
        }
        let mut found = PathBuf::new();
        for component in path.components() {
            let next = found.join(component);
            let is_there = next.exists();
            found = if is_there {
                next
            } else {
                self.spelled_otherwise(&found, component.as_os_str().to_str()?)?
            };
        }
        let file = HostFile::at(&found).ok()?;
        Some(Found { path: found, file })
    }

    fn spelled_otherwise(&mut self, folder: &Path, name: &str) -> Option<PathBuf> {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let HostFile { device, inode } = HostFile::at(folder).ok()?;
        let key = (device, inode, spelling(name));
        if !self.known.contains_key(&key) {
            let found = self.search(folder, &key.2).ok()?;
            self.known.insert(key.clone(), found);
        }
        self.known[&key].as_ref().map(|name| folder.join(name))
    }

    /// The name in `folder` that is spelled as `wanted` is, if there is one; an error if the search ends
    /// before that is known. Where several differ only in that, the same one every time.
    fn search(&mut self, folder: &Path, wanted: &str) -> io::Result<Option<OsString>> {
        let mut least: Option<OsString> = None;
        for name in fs::read_dir(folder)?.filter_map(Result::ok).map(|entry| entry.file_name()) {
            if self.compared == MAX_NAMES {
                tracing::warn!(
                    "{}: after {MAX_NAMES} names no more are looked at: a parent whose name is spelled \
                     otherwise is not found, unless it is named with --parent",
                    folder.display()
                );
                return Err(io::ErrorKind::QuotaExceeded.into());
            }
            self.compared += 1;
            let fits = name.to_str().is_some_and(|name| spelling(name) == wanted);
            if fits && least.as_ref().is_none_or(|least| name < *least) {
                least = Some(name);
            }
        }
        Ok(least)
    }
}

fn spelling(name: &str) -> String {
    name.nfc().collect::<String>().to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn existing(path: &Path) -> Option<PathBuf> {
        Looks::default().existing(path, false).map(|found| found.path)
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

    /// A path of one name again and again, in a folder that leads to itself: each look for a name reads a
    /// folder once.
    #[test]
    fn a_folder_is_read_once_for_a_name() {
        let folder = tempfile::tempdir().expect("a folder");
        std::os::unix::fs::symlink(".", folder.path().join("x")).expect("room");
        (0..50).for_each(|name| fs::write(folder.path().join(name.to_string()), "").expect("room"));
        let looks = Looks::default();
        let path = folder.path().join("X/".repeat(30)).join("BASE.vhdx");
        for _ in 0..5 {
            assert!(looks.existing(&path, false).is_none());
        }
        let compared = |looks: &Looks| looks.0.lock().expect("unharmed").names.compared;
        assert_eq!(compared(&looks), 2 * 51, "for x and for the base");
        fs::write(folder.path().join("base.vhdx"), "").expect("room");
        assert_eq!(existing(&path), Some(folder.path().join("x/".repeat(30)).join("base.vhdx")));
    }

    /// The last names of a search are those of its bound; what is spelled as it was wanted is found all the
    /// same, and another search begins anew.
    #[test]
    fn a_search_looks_at_a_bounded_number_of_names() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["a", "b", "c", "Base.vhdx"] {
            fs::write(folder.path().join(name), "").expect("room");
        }
        let looks = Looks::default();
        looks.0.lock().expect("unharmed").names.compared = MAX_NAMES - 3;
        let [exact, other] = ["Base.vhdx", "BASE.vhdx"].map(|name| folder.path().join(name));
        assert!(looks.existing(&other, false).is_none() && looks.clone().existing(&other, true).is_none());
        assert_eq!(looks.0.lock().expect("unharmed").names.compared, MAX_NAMES);
        assert_eq!(looks.existing(&exact, false).map(|found| found.path), Some(exact.clone()));
        assert_eq!(existing(&other), Some(exact));
    }

    /// A file system that has not answered is not asked again, but for what is beside the image.
    #[test]
    fn a_silent_file_system_is_not_asked_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        fs::write(&path, "").expect("room");
        let looks = Looks::default();
        for (silent, [named, beside]) in [[true, true], [false, true], [false, false]].into_iter().enumerate()
        {
            looks.0.lock().expect("unharmed").silent = silent;
            let found = |beside| looks.existing(&path, beside).is_some();
            assert_eq!([found(false), found(true)], [named, beside], "{silent} were silent");
        }
    }
}
