//! The images that a move would cost their parent.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::Traveller;
use crate::chain::{self, Layer, Search};
use crate::disk::folder_of;
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::operations::Devices;
use crate::operations::inspect::identify_neighbour;
use crate::printable::shell;

/// Refuses the move if an image beside the chain, or one that a device uses, is a child of one of its images
/// and does not move with it. What cannot be read may be such a child.
pub(super) fn refuse_children(travellers: &[Traveller], devices: &dyn Devices) -> Result<()> {
    let moving = || travellers.iter().filter(|traveller| !traveller.stays);
    let folders: BTreeSet<&Path> = moving().map(|traveller| folder_of(traveller.from.path())).collect();
    let mut others = Vec::new();
    for folder in folders {
        others.extend(files_in(folder)?);
    }
    others.extend(moving().flat_map(|traveller| devices.children(traveller.member.path())));
    let is_known = |path: &Path| {
        let places = travellers.iter().flat_map(|traveller| [traveller.from.path(), traveller.to.path()]);
        places.into_iter().any(|place| chain::same_file(place, path))
    };
    let search = Search::default();
    for path in others.into_iter().filter(|path| !is_known(path)) {
        let other = match identify_neighbour(&path) {
            Ok(other) => other,
            Err(error) if matches!(error.kind(), Kind::Permission | Kind::Io) => {
                return Err(error.remedy("it may be a child of an image that moves: make it readable"));
            }
            Err(_) => continue,
        };
        let parent = moving().find(|parent| chain::is_child(&other, &parent.member, &search));
        if let Some(parent) = parent {
            let parent = parent.from.path().display();
            let message = format!("its parent is {parent}, which the move would take away");
            let remedy = format!(
                "move that one, its parents come along: `vhdx-ublk move {} FOLDER`; of several children, \
                 merge all but one first",
                shell(&path)
            );
            return Err(Error::new(Kind::InUse, message).file(&path).remedy(remedy));
        }
    }
    Ok(())
}

/// The files in `folder`, in the order of their names.
fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).doing("searching for other children").file(folder)?;
    let is_file = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_file());
    let files = entries.filter_map(std::result::Result::ok).filter(is_file).map(|entry| entry.path());
    let mut files: Vec<PathBuf> = files.collect();
    files.sort();
    Ok(files)
}
