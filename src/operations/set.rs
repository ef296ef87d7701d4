//! Changing what an image says of its disk: its identifier and its physical sector.
//!
//! A guest sees both, so the DataWriteGuid changes before them ([rule
//! 15](crate::design::vhdx_rules#rule-15)): the children of the image, if it has any, do not recognise it
//! from then on. They have values of their own, and show nothing of a change here.
//!
//! The steps are those of [`WritableImage::resize`](crate::image::WritableImage::resize): a cut leaves the
//! old values or the new ones.

use std::path::Path;

use uuid::Uuid;

use super::children::children;
use super::{Devices, locked};
use crate::chain::{Layer, Search};
use crate::disk::Reactor;
use crate::error::{Error, Kind, Locate, Result};
use crate::format::metadata::Metadata;
use crate::image::{Image, Resize};
use crate::printable::shell;

/// What is to change.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    /// The new identifier of the disk.
    pub disk_id: Option<Uuid>,
    /// The new size of a physical sector, bytes.
    pub physical_sector_size: Option<u32>,
    /// Whether children may lose their parent.
    pub force: bool,
}

/// Changes the image at `path`. If it says all that already, nothing is written.
///
/// # Errors
///
/// [`Kind::Usage`] if a value is none that an image can have; [`Kind::InUse`] if the image is in use, or has
/// children and they may not be lost; those of reading and writing the image.
pub fn set(path: &Path, settings: Settings, devices: &dyn Devices) -> Result<()> {
    let reactor = Reactor::new()?;
    let member = locked::open_named(&reactor, path, devices)?;
    let old = &member.image.metadata;
    let metadata = Metadata {
        disk_id: settings.disk_id.unwrap_or(old.disk_id),
        physical_sector_size: settings.physical_sector_size.unwrap_or(old.physical_sector_size),
        ..old.clone()
    };
    if metadata == *old {
        return Ok(());
    }
    refuse_values(settings, old).file(member.path())?;
    member.image.check_writable().file(member.path())?;
    let children = children(&member, &Search::default(), devices);
    if let Some(child) = children.first() {
        let message =
            format!("it is the parent of {}, which would not recognise it any longer", child.display());
        if !settings.force {
            let remedy = format!(
                "change the child, which has values of its own: `vhdx-ublk set {}`; or use --force, and then \
                 `vhdx-ublk relink --ignore-mismatch` for each child",
                shell(child)
            );
            return Err(Error::new(Kind::InUse, message).file(member.path()).remedy(remedy));
        }
        tracing::warn!("{}: {message}", member.path().display());
    }
    let disk = reactor.disk(member.file.clone());
    let change = async {
        let image = Image::open_for_writing(&disk, Uuid::new_v4).await?;
        let to = Resize { metadata, parent_bytes: 0, data_write: Some(Uuid::new_v4()), zero_from: None };
        image.resize(&disk, &to, Uuid::new_v4).await
    };
    reactor.block_on(change).map(drop).file(member.path())
}

/// Refuses what says nothing, or contradicts the rest.
fn refuse_values(settings: Settings, old: &Metadata) -> Result<()> {
    if settings.disk_id.is_some_and(|id| id.is_nil()) {
        return Err(Error::new(Kind::Usage, "a disk id of zeros identifies nothing"));
    }
    let (logical, physical) = (old.logical_sector_size, settings.physical_sector_size);
    if physical.is_some_and(|physical| physical < logical) {
        let message = format!("a physical sector cannot be smaller than a logical one of {logical} bytes");
        return Err(Error::new(Kind::Usage, message));
    }
    Ok(())
}
