//! The children of an image, which a write to it would make unreadable.

use std::path::{Path, PathBuf};

use super::Devices;
use super::inspect::{identify, identify_neighbour};
use crate::chain::{self, Relative, Search};
use crate::error::{Error, Kind, Result};
use crate::printable::shell;

/// The images that were made of `image`, as it is now: those beside it, and those that devices have as its
/// children, wherever they are.
pub fn children(image: &dyn Relative, search: &Search, devices: &dyn Devices) -> Vec<PathBuf> {
    let mut found = chain::children_beside(image, search, identify_neighbour);
    let is_child = |path: &PathBuf| identify(path).is_ok_and(|child| chain::is_made_of(&child, image));
    for path in devices.children(image.path()).into_iter().filter(is_child) {
        if !found.contains(&path) {
            found.push(path);
        }
    }
    found
}

/// Refuses to write to the image at `path` if images were made of it; with `force` it only warns.
///
/// # Errors
///
/// [`Kind::InUse`] if there are children, and not `force`; what is wrong with the image.
pub fn refuse_parent(path: &Path, search: &Search, force: bool, devices: &dyn Devices) -> Result<()> {
    let image = identify(path)?;
    let children = children(&image, search, devices);
    if children.is_empty() {
        return Ok(());
    }
    let children: Vec<String> = children.iter().map(|child| child.display().to_string()).collect();
    let children = children.join(", ");
    if force {
        tracing::warn!(
            "{}: it is the parent of {children}: the first write makes its children unreadable",
            path.display()
        );
        return Ok(());
    }
    let message = format!("it is the parent of {children}: writing to it would make its children unreadable");
    let remedy = format!(
        "add a child of it (`vhdx-ublk create --parent {0} CHILD.vhdx`), or use --read-only or --force",
        shell(path)
    );
    Err(Error::new(Kind::InUse, message).file(path).remedy(remedy))
}

/// Refuses to replace the file at `path` if images were made of the image in it.
///
/// # Errors
///
/// [`Kind::InUse`] if there are children.
pub(super) fn refuse_replacing_parent(path: &Path, devices: &dyn Devices) -> Result<()> {
    let Ok(old) = identify(path) else { return Ok(()) };
    let children = children(&old, &Search::default(), devices);
    let Some(child) = children.first() else { return Ok(()) };
    let message = format!("it is the parent of {}, which would become unreadable", child.display());
    let remedy = "choose another name, or remove the file yourself if its children may be lost";
    Err(Error::new(Kind::InUse, message).file(path).remedy(remedy))
}
