//! What an operation asks about the block devices of the machine that use images.
//!
//! Devices stand above the operations, so that their answers come from outside.

use std::path::{Path, PathBuf};

use crate::disk::{Access, ImageFile};
use crate::error::{Error, Result};
use crate::image::Image;

/// The devices of the machine, as far as they have to do with images.
pub trait Devices {
    /// Whether a living daemon serves the file at `path`, or a child of it: its lock will not become free
    /// soon.
    fn serve(&self, path: &Path) -> bool;

    /// The images that devices serve or read as children of the file at `path`, wherever they are.
    fn children(&self, path: &Path) -> Vec<PathBuf>;

    /// Refuses `image`, which the caller has locked for `access`, if a device waits for a new daemon to serve
    /// it: the file alone does not hold everything that was acknowledged.
    ///
    /// # Errors
    ///
    /// [`Kind::InUse`](crate::error::Kind::InUse), with the ways out; when the devices cannot be read.
    fn refuse_abandoned(&self, image: &ImageFile, access: Access) -> Result<()>;

    /// Refuses the image in `file`, which the caller has locked, if a killed daemon left a session of it. A
    /// session that does not fit `image`, as it was opened, does not count.
    ///
    /// # Errors
    ///
    /// [`Kind::InUse`](crate::error::Kind::InUse) if there is a session, or one that cannot be read.
    fn refuse_orphan(&self, file: &ImageFile, image: Option<&Image>) -> Result<()>;

    /// Adds to `error` which device or process has the image at `path`, if it is in use.
    fn with_holder(&self, error: Error, path: &Path) -> Error;
}

/// A machine without devices.
#[cfg(test)]
pub(super) struct NoDevices;

#[cfg(test)]
impl Devices for NoDevices {
    fn serve(&self, _: &Path) -> bool {
        false
    }

    fn children(&self, _: &Path) -> Vec<PathBuf> {
        Vec::new()
    }

    fn refuse_abandoned(&self, _: &ImageFile, _: Access) -> Result<()> {
        Ok(())
    }

    fn refuse_orphan(&self, _: &ImageFile, _: Option<&Image>) -> Result<()> {
        Ok(())
    }

    fn with_holder(&self, error: Error, _: &Path) -> Error {
        error
    }
}
