//! The layers of a chain that are only read: found, locked, and read as they are.

use std::path::Path;
use std::sync::Arc;

use super::registry::Entry;
use super::session;
use crate::chain::{self, Search};
use crate::disk::{ImageFile, PayloadIo, Reactor, UringDisk};
use crate::engine::Parent;
use crate::error::{Error, Kind, Locate, Result};
use crate::format::metadata::Metadata;
use crate::image::{BlockMap, Image, ReadImage};

/// How the parents of an image are found and opened.
#[derive(Clone)]
pub struct Parents {
    /// Where to look for them.
    pub search: Search,
    /// Opens and locks one of them.
    pub open: fn(&Path) -> Result<ImageFile>,
}

/// A layer that is only read.
pub(super) struct ReadLayer {
    pub(super) file: Arc<ImageFile>,
    pub(super) image: ReadImage,
}

/// A child whose parents are to be found.
struct Child<'a> {
    image: &'a Image,
    path: &'a Path,
}

impl chain::Layer for Child<'_> {
    fn image(&self) -> &Image {
        self.image
    }

    fn path(&self) -> &Path {
        self.path
    }
}

impl chain::Layer for ReadLayer {
    fn image(&self) -> &Image {
        &self.image
    }

    fn path(&self) -> &Path {
        self.file.path()
    }
}

impl Parents {
    /// The parents of a device's image, where its first daemon found them.
    pub fn of_device(entry: &Entry, open: fn(&Path) -> Result<ImageFile>) -> Self {
        Self { search: Search { parents: entry.parents.clone(), ..Search::default() }, open }
    }

    /// The parents of `image`, which is in the file at `path`, nearest first.
    ///
    /// # Errors
    ///
    /// Those of [`chain::open_parents`] and of [`ReadLayer::open`].
    pub(super) fn of(&self, image: &Image, path: &Path, reactor: &Reactor) -> Result<Vec<ReadLayer>> {
        let open = |path: &Path| ReadLayer::open(reactor, Arc::new((self.open)(path)?));
        chain::open_parents(&Child { image, path }, &self.search, open)
    }
}

impl ReadLayer {
    /// Reads the image in `file`, a dirty log in memory.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with it; [`crate::error::Kind::InUse`] if a killed daemon left a session of it.
    pub(super) fn open(reactor: &Reactor, file: Arc<ImageFile>) -> Result<Self> {
        let disk = reactor.disk(file.clone());
        let read = async {
            let image = read_image(&disk).await?;
            image.read_bitmaps(&disk).await?;
            Ok(image)
        };
        let image = reactor.block_on(read).file(file.path())?;
        session::refuse_orphan(&file, Some(&image))?;
        Ok(Self { file, image })
    }

    /// Where its content is. Its file is for payload I/O from now on.
    pub(super) fn into_map(self) -> Result<(Arc<ImageFile>, BlockMap)> {
        choose_payload_io(&self.file, &self.image.metadata)?;
        Ok((self.file, self.image.into_map()))
    }
}

/// What the engine needs of the parents, and the files that keep them locked.
pub(super) type EngineParents = (Vec<Parent<UringDisk>>, Arc<[Arc<ImageFile>]>);

/// The parents as an engine on `reactor` reads them.
pub(super) fn for_engine(reactor: &Reactor, parents: Vec<ReadLayer>) -> Result<EngineParents> {
    let layers = parents.into_iter().map(ReadLayer::into_map).collect::<Result<Vec<_>>>()?;
    let files = layers.iter().map(|(file, _)| file.clone()).collect();
    let parents = layers.into_iter().map(|(file, map)| Parent { disk: reactor.disk(file), map: map.into() });
    Ok((parents.collect(), files))
}

/// Reads and checks the image on `disk`, and replays a dirty log in memory.
pub(super) async fn read_image(disk: &UringDisk) -> Result<ReadImage> {
    let image = Image::read(disk).await?;
    if image.metadata.virtual_size == 0 {
        let message = "the virtual disk is empty, and the kernel has no such devices";
        return Err(Error::new(Kind::Unsupported, message).in_structure("metadata"));
    }
    Ok(image)
}

/// Uses direct I/O for the payload where the host has it. Otherwise warns and returns `true`.
pub(super) fn choose_payload_io(file: &ImageFile, metadata: &Metadata) -> Result<bool> {
    if let PayloadIo::Buffered { reason } = file.enable_direct(metadata.logical_sector_size)? {
        let path = file.path().display();
        tracing::warn!("{path}: no direct I/O, the disk's data goes through the host's page cache: {reason}");
        return Ok(true);
    }
    Ok(false)
}
