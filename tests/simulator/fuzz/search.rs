//! A hostile locator, searched for in a folder of files that are no images.
//!
//! * The search ends after a bounded number of looks, in a chain or an error, and the error is some lines at
//!   most.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nix::sys::stat::Mode as Permissions;
use uuid::Uuid;
use vhdx_ublk::chain::{Known, MAX_DEPTH, Search, open_parents};
use vhdx_ublk::error::{Error, Kind};
use vhdx_ublk::format::locator::{
    ABSOLUTE_WIN32_PATH, PARENT_LINKAGE, PARENT_LINKAGE2, ParentLocator, RELATIVE_PATH, VOLUME_PATH,
};
use vhdx_ublk::format::metadata::Metadata;
use vhdx_ublk::image::Identity;

use super::target::{Case, Outcome, Target, any_bytes};
use super::trial::REFUSED;

pub const TARGET: Target = Target {
    name: "search",
    seeds,
    change_bytes: any_bytes,
    run: |case, _| run(&case.bytes),
    endings: &[REFUSED, "found"],
};

/// Between the strings of a case: linkage, second linkage, relative, volume and absolute path, map.
const SEPARATOR: char = '\n';

/// Places that a locator's paths may lead to, per child.
const MOST_LOOKS: usize = 8 * MAX_DEPTH;

fn seeds() -> Vec<Case> {
    let linkage = Uuid::from_u128(6).braced().to_string();
    let paths = [
        (r".\parent.vhdx", r"\\?\Volume{1}\parent.vhdx", r"C:\images\parent.vhdx"),
        (r"..\loop\loop\parent.vhdx", r"\\?\Volume{1}\loop", r"\\server\share\pipe"),
        (r".\folder\..\PARENT.VHDX", r"\\?\Volume{1}\..\..\pipe", r"/etc/hostname"),
    ];
    let text = |(relative, volume, absolute)| {
        format!("{linkage}\n{{}}\n{relative}\n{volume}\n{absolute}\nC:\\=/tmp").into_bytes()
    };
    paths.into_iter().map(|paths| Case { files: Vec::new(), bytes: text(paths) }).collect()
}

/// A file, a folder, a pipe without a writer, links that lead round and nowhere.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    FOLDER
        .get_or_init(|| {
            let folder = tempfile::tempdir().expect("a folder");
            let at = |name: &str| folder.path().join(name);
            fs::write(at("child.vhdx"), "").expect("room");
            fs::write(at("parent.vhdx"), "").expect("room");
            fs::create_dir(at("folder")).expect("room");
            symlink(".", at("loop")).expect("room");
            symlink("nowhere", at("gone.vhdx")).expect("room");
            nix::unistd::mkfifo(&at("pipe"), Permissions::S_IRUSR).expect("room");
            folder
        })
        .path()
}

/// An image by a locator.
fn known(path: PathBuf, locator: Option<ParentLocator>, guid: Uuid) -> Known {
    let metadata = Metadata {
        block_size: 1 << 20,
        leave_blocks_allocated: false,
        has_parent: locator.is_some(),
        virtual_size: 1 << 30,
        disk_id: Uuid::from_u128(5),
        logical_sector_size: 512,
        physical_sector_size: 4096,
        parent_locator: locator,
    };
    Known { identity: Identity { metadata, data_write_guid: guid }, path, lock: () }
}

fn run(bytes: &[u8]) -> Outcome {
    let mut shape = DefaultHasher::new();
    let text = String::from_utf8_lossy(bytes).replace('\0', "");
    let mut parts = text.split(SEPARATOR);
    let mut locator = ParentLocator::default();
    for key in [PARENT_LINKAGE, PARENT_LINKAGE2, RELATIVE_PATH, VOLUME_PATH, ABSOLUTE_WIN32_PATH] {
        if let Some(value) = parts.next().filter(|value| !value.is_empty()) {
            locator.set(key, value);
        }
    }
    let maps = parts.filter_map(|map| map.parse().ok()).collect();
    let search = Search { maps, ..Search::default() };
    let leaf = known(folder().join("child.vhdx"), Some(locator.clone()), Uuid::from_u128(7));
    let mut looks = 0;
    let open = |path: &Path| {
        looks += 1;
        assert!(looks <= MOST_LOOKS, "the search does not end");
        if !path.is_file() {
            return Err(Error::new(Kind::NotVhdx, "it is no file").file(path));
        }
        Ok(known(path.to_owned(), None, Uuid::from_u128(6)))
    };
    let ending = match open_parents(&leaf, &search, open) {
        Ok(parents) => {
            assert_eq!(parents.len(), 1, "what has no parent ends a chain");
            "found"
        }
        Err(error) => {
            assert!(format!("{error:#}").len() <= 8 * 4096, "an error of {} bytes", error.to_string().len());
            (format!("{:?}", error.kind()), error.structure()).hash(&mut shape);
            REFUSED
        }
    };
    (ending, looks).hash(&mut shape);
    Outcome { ending, signature: shape.finish(), peak: 0 }
}
