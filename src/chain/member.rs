//! An image of a chain whose file is open and locked.

use std::path::Path;
use std::sync::Arc;

use super::relative::Layer;
use crate::disk::{ImageFile, Reactor};
use crate::error::{Locate, Result};
use crate::image::{Image, ReadImage};

/// An image that no other process writes, nor reads either if its file is locked for writing.
pub struct Member {
    /// The file, which carries the lock.
    pub file: Arc<ImageFile>,
    /// The image, its log replayed in memory.
    pub image: ReadImage,
}

impl Member {
    /// Reads the image in `file`.
    ///
    /// # Errors
    ///
    /// Those of [`Image::read`].
    pub fn read(reactor: &Reactor, file: Arc<ImageFile>) -> Result<Self> {
        let image = reactor.block_on(Image::read(&reactor.disk(file.clone()))).file(file.path())?;
        Ok(Self { file, image })
    }
}

impl Layer for Member {
    fn image(&self) -> &Image {
        &self.image
    }

    fn path(&self) -> &Path {
        self.file.path()
    }
}
