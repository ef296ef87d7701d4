//! Where a parent may be.

use std::path::{Path, PathBuf};

use super::path::{self, PathMap};
use crate::format::locator::{ABSOLUTE_WIN32_PATH, ParentLocator, RELATIVE_PATH, VOLUME_PATH};

/// What the user says about where parents are.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// The parents themselves, the leaf's first; they are not looked for.
    pub parents: Vec<PathBuf>,
    /// Where Windows' drives, volumes and shares are.
    pub maps: Vec<PathMap>,
}

impl Search {
    /// The files that may be the parent that `locator` names, of the child at `child`, likeliest first: by
    /// relative path, volume path, absolute path, and by its name beside the child.
    pub(super) fn candidates(&self, child: &Path, locator: &ParentLocator) -> Vec<PathBuf> {
        let folder = child.parent().unwrap_or(Path::new("."));
        let relative = locator.get(RELATIVE_PATH).map(|text| path::join(folder, text));
        let absolute = [VOLUME_PATH, ABSOLUTE_WIN32_PATH].into_iter().filter_map(|key| locator.get(key));
        let absolute = absolute.flat_map(|text| self.mapped(text));
        let keys = [RELATIVE_PATH, ABSOLUTE_WIN32_PATH, VOLUME_PATH].into_iter();
        let beside = keys.filter_map(|key| path::name(locator.get(key)?)).map(|name| folder.join(name));
        let mut found: Vec<PathBuf> = Vec::new();
        for path in relative.into_iter().chain(absolute).chain(beside) {
            if let Some(path) = path::existing(&path)
                && !found.contains(&path)
            {
                found.push(path);
            }
        }
        found
    }

    /// Whether the absolute path `text` leads somewhere here, and not to `parent`.
    pub(super) fn misleads(&self, text: &str, parent: &Path) -> bool {
        let found = self.mapped(text);
        !found.is_empty() && !found.iter().any(|found| path::same_file(found, parent))
    }

    /// An absolute path is one of this machine's, or what the maps make of it.
    fn mapped(&self, text: &str) -> Vec<PathBuf> {
        if text.starts_with('/') && !text.starts_with("//") {
            return vec![text.into()];
        }
        self.maps.iter().filter_map(|map| map.apply(text)).collect()
    }
}

/// Whether the relative path in `locator` leads from `child` to `parent`.
pub(super) fn is_direct(child: &Path, locator: &ParentLocator, parent: &Path) -> bool {
    let folder = child.parent().unwrap_or(Path::new("."));
    let found = locator.get(RELATIVE_PATH).and_then(|text| path::existing(&path::join(folder, text)));
    found.is_some_and(|found| path::same_file(&found, parent))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn locator(entries: &[(&str, &str)]) -> ParentLocator {
        let entries = entries.iter().map(|&(key, value)| (key.into(), value.into())).collect();
        ParentLocator { entries }
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
        assert_eq!(search.candidates(&child, &locator), [up.clone(), at("children/base.vhdx")]);
        let map = format!(r"C:\={}", at("c").display());
        search.maps = vec![map.parse().expect("a good map")];
        assert_eq!(search.candidates(&child, &locator), [up, at("c/base.vhdx"), at("children/base.vhdx")]);
    }

    #[test]
    fn no_share_is_looked_for_unless_it_is_mapped() {
        let locator = locator(&[(ABSOLUTE_WIN32_PATH, r"\\etc\passwd")]);
        assert_eq!(
            Search::default().candidates(Path::new("/nowhere/child.vhdx"), &locator),
            [] as [&Path; 0]
        );
    }
}
