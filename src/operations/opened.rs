//! A chain that is opened to read its content.

use std::path::Path;
use std::sync::Arc;

use super::{Devices, locked};
use crate::chain::{self, Content, Member, ReadLayer, Search};
use crate::disk::{Access, ImageFile, Reactor, UringDisk};
use crate::error::{Locate, Result};
use crate::format::metadata::Metadata;

/// An image with all its parents. No other process writes to any of them while it lives.
pub struct OpenChain {
    layers: Vec<OpenLayer>,
    content: Content<UringDisk>,
}

/// An image of such a chain.
pub struct OpenLayer {
    /// The file, which carries the lock.
    pub file: Arc<ImageFile>,
    /// The virtual disk, and the way to the parent.
    pub metadata: Metadata,
}

impl OpenChain {
    /// Opens the image at `path` and its parents, locked for reading. Dirty logs are replayed in memory.
    ///
    /// # Errors
    ///
    /// Those of finding and reading the images; [`Kind::InUse`](crate::error::Kind::InUse) if another process
    /// writes to one of them, or a killed daemon left a session of it.
    pub fn read(path: &Path, search: &Search, reactor: &Reactor, devices: &dyn Devices) -> Result<Self> {
        let open = |path: &Path| {
            let member = locked::open(reactor, path, Access::ReadOnly, devices)?;
            let disk = reactor.disk(member.file.clone());
            reactor.block_on(member.image.read_bitmaps(&disk)).file(path)?;
            Ok(member)
        };
        let leaf = open(path)?;
        let parents = chain::open_parents(&leaf, search, open)?;
        let members = || std::iter::once(&leaf).chain(&parents);
        let layers = members()
            .map(|Member { file, image }| OpenLayer { file: file.clone(), metadata: image.metadata.clone() });
        let layers = layers.collect();
        let content = std::iter::once(leaf).chain(parents).map(|Member { file, image }| ReadLayer {
            disk: reactor.disk(file),
            map: image.into_map().into(),
        });
        Ok(Self { layers, content: Content::new(content.collect()) })
    }

    /// The images, the leaf first.
    pub fn layers(&self) -> &[OpenLayer] {
        &self.layers
    }

    /// The image that was opened.
    pub fn leaf(&self) -> &OpenLayer {
        &self.layers[0]
    }

    /// What a reader of the leaf sees.
    pub fn content(&self) -> &Content<UringDisk> {
        &self.content
    }
}
