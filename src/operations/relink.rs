//! Relinking: a child names another file as its parent.

use std::path::Path;

use super::{Devices, inspect, locked, naming};
use crate::chain::{self, Layer, Member, Search};
use crate::disk::{Access, Reactor};
use crate::error::{Error, Kind, Locate, Result};
use crate::format::locator::PARENT_LINKAGE2;

/// Has the image at `child` name the image at `parent` as its parent. Only the child's metadata changes, as a
/// whole or not at all; a child that names the file already does not change. With `ignore_mismatch` the
/// parent may be another image than the child was made of.
///
/// # Errors
///
/// [`Kind::Usage`] if the child would be its own ancestor; [`Kind::Mismatch`] if `parent` is another image,
/// or was written since; those of locking, reading and amending the images.
pub fn relink(child: &Path, parent: &Path, ignore_mismatch: bool, devices: &dyn Devices) -> Result<()> {
    let reactor = Reactor::new()?;
    let child = locked::open_named(&reactor, child, devices)?;
    // The child's lock would keep this process itself out.
    if chain::same_file(child.path(), parent) {
        return Err(own_ancestor(&child));
    }
    let parent = locked::open(&reactor, parent, Access::ReadOnly, devices)?;
    child.image.check_writable().file(child.path())?;
    let mut locator = chain::with_parent(&child, &parent, ignore_mismatch)?;
    // A merge into another file that was cut is given up: this parent is as it was before.
    let is_as_before =
        locator.linkage().is_ok_and(|linkage| linkage == parent.image.header.header.data_write_guid);
    if is_as_before && locator.linkage2().is_some() {
        locator.remove(PARENT_LINKAGE2);
    }
    refuse_cycle(&child, &parent)?;
    if child.image.metadata.parent_locator.as_ref() == Some(&locator) {
        return Ok(());
    }
    // The child will know it by a GUID that a killed process may have left in the host's cache only: after a
    // power cut the parent would have the one before.
    parent.file.sync_found()?;
    naming::amend(&child.file, locator, &reactor)
}

/// Refuses a parent whose own chain leads to the child. A chain that ends early may be what is being mended.
fn refuse_cycle(child: &Member, parent: &Member) -> Result<()> {
    let mut returns = false;
    let open = |path: &Path| {
        returns |= chain::same_file(child.path(), path);
        inspect::inspect(path)
    };
    let opened = chain::open_parents(parent, &Search::default(), open).map(drop);
    if returns {
        return Err(own_ancestor(child));
    }
    if let Err(error) = opened {
        tracing::warn!("the chain of the parent is broken: {error:#}");
    }
    Ok(())
}

fn own_ancestor(child: &Member) -> Error {
    let message = "the image would be its own ancestor";
    Error::new(Kind::Usage, message)
        .file(child.path())
        .remedy("name the image that the child was created from")
}
