//! Creating an image.
//!
//! A file under the image's name is either what was there before or the whole new image: an image that could
//! not be finished, for an error or a signal, is removed, and one that replaces another is made beside it and
//! renamed. After a power cut there may be an unfinished file, which is not a valid image.
//!
//! The folder may be anybody's: nothing is changed by path. Only its owner may open the new file until it is
//! whole.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::children::children;
use super::inspect::{Inspected, identify, inspect_locked};
use super::{Devices, replaced, room};
use crate::chain::{self, Search};
use crate::disk::{
    Access, ImageFile, Place, REPLACE, Reactor, Remover, Sparse, Unfinished, dangling, folder_of,
};
use crate::error::{Error, Kind, Locate, Result};
use crate::image::NewImage;
use crate::printable::human_size;

/// Permissions by default: a user who may read an image may lock it, and keep a device from it.
const PRIVATE: u32 = 0o600;

/// All permissions that a file has.
const EVERYTHING: u32 = 0o777;

/// An image that is to be created.
pub struct Creation {
    /// The new file.
    pub image: PathBuf,
    /// What it is like. With a `parent` it is a child, and has that one's disk size and sectors.
    pub new: NewImage,
    /// The image that it is a child of.
    pub parent: Option<PathBuf>,
    /// The file's permissions; the parent's, and those of the file that it replaces, are never exceeded. By
    /// default they are 0600, or those of the file that it replaces.
    pub mode: Option<u32>,
    /// Whether it replaces an image or an empty file that is there.
    pub replace: bool,
    /// Whether the file may have holes.
    pub sparse: Sparse,
}

impl Creation {
    /// Creates the image. `watch` gets what removes the unfinished file if the process must end.
    ///
    /// # Errors
    ///
    /// [`Kind::Exists`] if there is a file that is not to be replaced; [`Kind::InUse`] if the file to be
    /// replaced is in use or has children; what is wrong with the parent; those of writing the file. What was
    /// there before is there then, and no unfinished file.
    pub fn run(self, devices: &dyn Devices, watch: impl FnOnce(Remover) -> Result<()>) -> Result<()> {
        let parent = self.parent.as_deref().map(|parent| inspect_locked(parent, devices)).transpose()?;
        let old = if self.replace { self.lock_old(devices)? } else { None };
        let place = match &old {
            Some(old) => Place::of_file(old)?,
            None => dangling(&self.image).map_or_else(|| Place::of(&self.image), Err)?,
        };
        let Self { image, mut new, mode, sparse, .. } = self;
        let mut most = EVERYTHING;
        if let Some((parent, file)) = &parent {
            // The child knows it by a GUID that a killed process may have left in the host's cache only:
            // after a power cut the parent would have the one before.
            file.sync_found()?;
            new = child_of(parent, &new, &place)?;
            // What the child does not have itself is read from the parent.
            most = file.mode()? | PRIVATE;
        }
        let reactor = Reactor::new()?;
        let unfinished = Unfinished::default();
        watch(unfinished.remover())?;
        if let Some(old) = &old {
            let beside = place.beside(format!(".vhdx-ublk-{}.tmp", Uuid::new_v4().simple()).as_ref())?;
            let file = unfinished.create(beside)?;
            file.set_sparse(sparse);
            write(&new, &reactor, &file).file(&image)?;
            file.resemble(old, mode.unwrap_or(EVERYTHING) & most)?;
            return unfinished.replace(&place, old);
        }
        let file = unfinished.create(place).map_err(|error| match error.kind() {
            Kind::Exists => error.remedy(REPLACE),
            _ => error,
        })?;
        file.set_sparse(sparse);
        write(&new, &reactor, &file).file(&image)?;
        file.permit(mode.unwrap_or(PRIVATE) & most)?;
        unfinished.persist()?;
        unfinished.keep();
        Ok(())
    }

    /// Locks the file that is to be replaced, if there is one: no process uses it or can begin to.
    fn lock_old(&self, devices: &dyn Devices) -> Result<Option<ImageFile>> {
        self.refuse_relatives(devices)?;
        match ImageFile::open(&self.image, Access::ReadWrite, Duration::ZERO) {
            Ok(file) => replaced::require(&self.image, &file).map(|()| Some(file)),
            Err(error) if error.kind() == Kind::NotFound => dangling(&self.image).map_or(Ok(None), Err),
            Err(error) => Err(devices.with_holder(error, &self.image)),
        }
    }

    /// Others may be made of the image that is to be replaced, the new one's parent among them.
    fn refuse_relatives(&self, devices: &dyn Devices) -> Result<()> {
        let search = Search::default();
        let Ok(old) = identify(&self.image) else { return Ok(()) };
        let mut parents = Vec::new();
        if let Some(parent) = &self.parent {
            let parent = identify(parent)?;
            // As far as the chain leads: a broken one is reported elsewhere.
            let _ = chain::follow_parents(&parent, &search, &mut parents, identify);
            parents.push(parent);
        }
        let children = children(&old, &search, devices);
        let message = match &children[..] {
            _ if parents.iter().any(|parent| chain::same_file(&parent.path, &old.path)) => {
                "the new image would be a descendant of the image that it replaces".to_owned()
            }
            [] => return Ok(()),
            [child, ..] => format!("it is the parent of {}, which would become unreadable", child.display()),
        };
        let remedy = "choose another name, or remove the file yourself if its children may be lost";
        Err(Error::new(Kind::InUse, message).file(&old.path).remedy(remedy))
    }
}

/// `new` as a child of `parent`, in the file at `place`.
fn child_of(parent: &Inspected, new: &NewImage, place: &Place) -> Result<NewImage> {
    let followed = chain::follow_parents(parent, &Search::default(), &mut Vec::new(), identify);
    if let Err(error) = followed {
        tracing::warn!("the chain of the parent is broken, and so is that of the new image: {error:#}");
    }
    let metadata = &parent.image.metadata;
    Ok(NewImage {
        virtual_size: metadata.virtual_size,
        logical_sector_size: metadata.logical_sector_size,
        physical_sector_size: metadata.physical_sector_size,
        parent: Some(chain::parent_ref(parent, folder_of(place.path()))?),
        ..new.clone()
    })
}

fn write(new: &NewImage, reactor: &Reactor, file: &Arc<ImageFile>) -> Result<()> {
    if new.fixed {
        let needs = format!("a fixed image of {} needs", human_size(new.virtual_size));
        let refused = room::require(file.host_room(), new.virtual_size, &needs);
        refused.map_err(|error| error.remedy("free space on the file system, or use --type dynamic"))?;
    }
    let disk = reactor.disk(file.clone());
    reactor.block_on(new.write(&disk, Uuid::new_v4))
}
