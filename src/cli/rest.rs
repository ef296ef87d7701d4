//! An image at rest: locked by a command that reads all of it, or changes it, and looked at before anything is
//! written.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use vhdx_ublk::chain::Layer;
use vhdx_ublk::device::session;
use vhdx_ublk::disk::{Access, ImageFile, Reactor};
use vhdx_ublk::error::{Locate, Result};
use vhdx_ublk::image::{Image, ReadImage};

use super::holders;

/// An image that nobody else writes, and nobody else reads either if it is locked for writing.
pub struct AtRest {
    /// The file, which carries the lock.
    pub file: Arc<ImageFile>,
    /// The image, its log replayed in memory.
    pub image: ReadImage,
}

impl Layer for AtRest {
    fn image(&self) -> &Image {
        &self.image
    }

    fn path(&self) -> &Path {
        self.file.path()
    }
}

impl AtRest {
    /// Locks the image at `path` for `access`, and reads it.
    ///
    /// # Errors
    ///
    /// Those of [`lock`] and whatever is wrong with the image; [`vhdx_ublk::error::Kind::InUse`] if a killed daemon
    /// left a session of it.
    pub fn open(reactor: &Reactor, path: &Path, access: Access) -> Result<Self> {
        let file = Arc::new(lock(path, access)?);
        let disk = reactor.disk(file.clone());
        let image = reactor.block_on(Image::read(&disk)).file(file.path())?;
        session::refuse_orphan(&file, Some(&image))?;
        Ok(Self { file, image })
    }
}

/// How long another command may take to leave the image: one that only looks at it, or that is refused itself, does
/// soon, and of two that want it at once one gets it.
const LOCK_WAIT: Duration = Duration::from_secs(1);

/// Locks the image at `path` for `access`; a holder that may leave soon is waited for.
///
/// # Errors
///
/// [`vhdx_ublk::error::Kind::InUse`] if somebody has it, or a device of ours waits for its daemon to be replaced.
pub fn lock(path: &Path, access: Access) -> Result<ImageFile> {
    let wait = if holders::is_served(path) { Duration::ZERO } else { LOCK_WAIT };
    let file = ImageFile::open(path, access, wait).map_err(|error| holders::explain(error, path))?;
    holders::refuse_abandoned(&file, access)?;
    Ok(file)
}
