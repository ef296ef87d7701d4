//! How a child that moves names its parent.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use crate::chain::{self, Layer, Member};
use crate::disk::{ImageFile, Reactor};
use crate::error::{Error, Kind, Locate, Result};
use crate::format::locator::{ABSOLUTE_WIN32_PATH, ParentLocator};
use crate::format::metadata::Metadata;
use crate::image::Image;

/// Has `member`, which is the file `child` or will be, name the file `parent`, and the parent's `old` place,
/// if it has one; whether it did not before.
pub(super) fn name_parent(
    member: &Member,
    child: &Path,
    parent: &Path,
    old: Option<&Path>,
    reactor: &Reactor,
) -> Result<bool> {
    let locator = locator(member, child, parent, old)?;
    let changes = member.image.metadata.parent_locator.as_ref() != Some(&locator);
    if changes {
        amend(&member.file, locator, reactor)?;
    }
    Ok(changes)
}

/// Whether `member` has the path of its parent's old place, which a move gives it for a while.
pub(super) fn has_old_path(member: &Member) -> bool {
    let locator = member.image.metadata.parent_locator.as_ref();
    let path = locator.and_then(|locator| locator.get(ABSOLUTE_WIN32_PATH));
    path.is_some_and(|path| path.starts_with('/'))
}

/// What `member`, in the file `child`, says of its parent.
pub(super) fn locator(
    member: &Member,
    child: &Path,
    parent: &Path,
    old: Option<&Path>,
) -> Result<ParentLocator> {
    let locator = member.image.metadata.parent_locator.as_ref();
    let mut locator = locator.expect("a child has a parent").clone();
    chain::point_to(&mut locator, child, parent)?;
    if let Some(old) = old {
        let text = old.to_str().ok_or_else(|| {
            let message = "its path is not UTF-8: a child cannot record it";
            Error::new(Kind::Unsupported, message).file(old).remedy("rename it")
        })?;
        locator.set(ABSOLUTE_WIN32_PATH, text);
    }
    locator.check().file(member.path())?;
    member.image.check_writable().file(member.path())?;
    Ok(locator)
}

/// Gives the image in `file` this locator, as a whole or not at all.
pub(super) fn amend(file: &Arc<ImageFile>, locator: ParentLocator, reactor: &Reactor) -> Result<()> {
    let disk = reactor.disk(file.clone());
    let change = async {
        let image = Image::open_for_writing(&disk, Uuid::new_v4).await?;
        let metadata = Metadata { parent_locator: Some(locator), ..image.metadata.clone() };
        image.amend(&disk, &metadata, Uuid::new_v4).await
    };
    reactor.block_on(change).map(drop).file(file.path())
}
