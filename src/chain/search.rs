//! Where a parent may be.

use std::fs;
use std::path::{Path, PathBuf};

use super::looks::{Found, Looks};
use super::path::{self, PathMap};
use crate::disk::{HostFile, folder_of, in_time};
use crate::format::locator::{ABSOLUTE_WIN32_PATH, ParentLocator, RELATIVE_PATH, VOLUME_PATH};

/// What the user says about where parents are.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// The parents themselves, the leaf's first; there is no search.
    pub parents: Vec<PathBuf>,
    /// Where Windows' drives, volumes and shares are.
    pub maps: Vec<PathMap>,
    /// Only what is in the folder of the image is looked at and opened.
    pub beside_only: bool,
    /// What the search has looked at.
    pub looks: Looks,
}

impl Search {
    /// The same search, once more.
    pub(super) fn anew(&self) -> Self {
        Self { looks: Looks::default(), ..self.clone() }
    }

    /// The files that may be the parent that `locator` names, of the child at `child`, likeliest first.
    pub(super) fn candidates(&self, child: &Path, locator: &ParentLocator) -> Vec<Candidate> {
        let folder = folder_of(child);
        let relative = locator.get(RELATIVE_PATH).map(|text| path::join(folder, text));
        let absolute = ABSOLUTE_KEYS.into_iter().filter_map(|key| locator.get(key));
        let absolute = absolute.flat_map(|text| self.mapped(text));
        // Even a look at a path that the image chooses can have effects, as where it leads to a share.
        let chosen = relative.into_iter().chain(absolute).filter(|_| !self.beside_only);
        let keys = [RELATIVE_PATH, ABSOLUTE_WIN32_PATH, VOLUME_PATH].into_iter();
        let beside = keys.filter_map(|key| path::name(locator.get(key)?)).map(|name| folder.join(name));
        let named = chosen.map(|path| (path, false));
        let mut found: Vec<Candidate> = Vec::new();
        for (path, guessed) in named.chain(beside.map(|path| (path, true))) {
            if let Some(Found { path, file }) = self.looks.existing(&path, guessed)
                && (!self.beside_only || is_beside(child, &path))
                && !found.iter().any(|earlier| earlier.path == path)
            {
                found.push(Candidate { path, file: Some(file), guessed });
            }
        }
        found
    }

    /// Says which maps know none of the absolute paths in `locators`: a slip of the pen, or a drive that no
    /// image is on.
    pub(super) fn warn_of_idle_maps(&self, locators: &[&ParentLocator]) {
        let keys = |locator: &&ParentLocator| ABSOLUTE_KEYS.map(|key| locator.get(key).map(str::to_owned));
        let texts: Vec<String> = locators.iter().flat_map(keys).flatten().collect();
        for map in &self.maps {
            if !texts.iter().any(|text| map.apply(text).is_some()) {
                tracing::warn!("--parent-map {map} matches no path in the images of this chain");
            }
        }
    }

    /// Whether the absolute path `text` leads somewhere here, and not to `parent`.
    pub(super) fn misleads(&self, text: &str, parent: &Path) -> bool {
        let found = self.mapped(text);
        let leads_there = |found: PathBuf, parent| in_time(move || HostFile::at(&found).ok() == Some(parent));
        let Ok(parent) = HostFile::at(parent) else { return false };
        !found.is_empty() && !found.into_iter().any(|found| leads_there(found, parent).unwrap_or(false))
    }

    /// An absolute path is one of this machine's, or what the maps make of it.
    fn mapped(&self, text: &str) -> Vec<PathBuf> {
        if text.starts_with('/') && !text.starts_with("//") {
            return vec![text.into()];
        }
        self.maps.iter().filter_map(|map| map.apply(text)).collect()
    }
}

/// Whether both files are in one folder, where the paths lead.
fn is_beside(child: &Path, other: &Path) -> bool {
    let folder = |path: PathBuf| fs::canonicalize(path).ok().map(|path| folder_of(&path).to_owned());
    let paths = [child.to_owned(), other.to_owned()];
    matches!(in_time(move || paths.map(folder)), Ok([Some(child), Some(other)]) if child == other)
}

/// The keys of paths that begin at a drive or a volume.
const ABSOLUTE_KEYS: [&str; 2] = [VOLUME_PATH, ABSOLUTE_WIN32_PATH];

/// A file that may be a parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) path: PathBuf,
    /// The file that was found there, unless the user has named it.
    pub(super) file: Option<HostFile>,
    /// The child does not name this place: it is beside the child, under the parent's name.
    pub(super) guessed: bool,
}

/// Whether the relative path in `locator` leads from `child` to `parent`.
pub fn is_direct(child: &Path, locator: &ParentLocator, parent: &Path) -> bool {
    let folder = folder_of(child);
    let named = locator.get(RELATIVE_PATH).map(|text| path::join(folder, text));
    let found = named.and_then(|path| Looks::default().existing(&path, false));
    found.is_some_and(|found| HostFile::at(parent).is_ok_and(|parent| parent == found.file))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locator(entries: &[(&str, &str)]) -> ParentLocator {
        let entries = entries.iter().map(|&(key, value)| (key.into(), value.into())).collect();
        ParentLocator { entries }
    }

    fn paths(search: &Search, child: &Path, locator: &ParentLocator) -> Vec<PathBuf> {
        search.candidates(child, locator).into_iter().map(|candidate| candidate.path).collect()
    }

    #[test]
    fn beside_the_image_is_where_the_path_leads() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("in")).expect("a folder");
        for file in ["in/child.vhdx", "in/base.vhdx", "base.vhdx"] {
            fs::write(at(file), "").expect("a file");
        }
        std::os::unix::fs::symlink(at("base.vhdx"), at("in/link.vhdx")).expect("a link");
        std::os::unix::fs::symlink(at("in"), at("in/round")).expect("a link");
        let beside_only = Search { beside_only: true, ..Search::default() };
        for named in ["base.vhdx", r"..\in\base.vhdx", r"..\base.vhdx", r"round\base.vhdx"] {
            let found = paths(&beside_only, &at("in/child.vhdx"), &locator(&[(RELATIVE_PATH, named)]));
            assert_eq!(found, [at("in/base.vhdx")], "{named}: no other path is looked at");
        }
        let link = locator(&[(RELATIVE_PATH, "link.vhdx")]);
        assert_eq!(paths(&beside_only, &at("in/child.vhdx"), &link), Vec::<PathBuf>::new());
        assert_eq!(paths(&Search::default(), &at("in/child.vhdx"), &link), [at("in/link.vhdx")]);
    }

    #[test]
    fn the_likeliest_place_comes_first_and_only_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        fs::create_dir(at("children")).expect("a folder");
        fs::create_dir(at("c")).expect("a folder");
        for file in ["base.vhdx", "c/base.vhdx", "children/base.vhdx"] {
            fs::write(at(file), "").expect("a file");
        }
        let locator = locator(&[
            (ABSOLUTE_WIN32_PATH, r"C:\base.vhdx"),
            (VOLUME_PATH, r"\\?\Volume{1}\base.vhdx"),
            (RELATIVE_PATH, r"..\BASE.vhdx"),
        ]);
        let child = at("children/child.vhdx");
        let mut search = Search::default();
        let up = at("children").join("../base.vhdx");
        assert_eq!(paths(&search, &child, &locator), [up.clone(), at("children/base.vhdx")]);
        let map = format!(r"C:\={}", at("c").display());
        search.maps = vec![map.parse().expect("a good map")];
        assert_eq!(paths(&search, &child, &locator), [up, at("c/base.vhdx"), at("children/base.vhdx")]);
    }

    #[test]
    fn no_share_is_looked_for_unless_it_is_mapped() {
        let locator = locator(&[(ABSOLUTE_WIN32_PATH, r"\\etc\passwd")]);
        let found = paths(&Search::default(), Path::new("/nowhere/child.vhdx"), &locator);
        assert_eq!(found, [] as [&Path; 0]);
    }
}
