//! The layers of a chain that are only read: found, locked, and read as they are.

use std::path::Path;
use std::sync::Arc;

use super::errands::Errands;
use super::registry::Entry;
use super::session;
use crate::chain::{self, Member, ReadLayer, Search};
use crate::disk::{ImageFile, PayloadIo, Reactor, UringDisk};
use crate::error::{Error, Kind, Locate, Result};
use crate::format::metadata::Metadata;
use crate::image::{BlockMap, Image, ReadImage};

/// How the parents of an image are found and opened.
#[derive(Clone)]
pub struct Parents {
    /// Where to look for them.
    pub search: Search,
    /// Opens and locks one of them. It may ask the driver.
    pub open: fn(&Path) -> Result<ImageFile>,
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
    /// Those of [`chain::open_parents`] and of [`read`].
    pub(super) fn of(
        &self,
        image: &Image,
        path: &Path,
        reactor: &Reactor,
        errands: &Errands,
    ) -> Result<Vec<Member>> {
        let open = |path: &Path| {
            let (open, path) = (self.open, path.to_owned());
            read(reactor, Arc::new(errands.run(move || open(&path))?))
        };
        chain::open_parents(&(image, path), &self.search, open)
    }
}

/// Reads the image in `file`, a dirty log in memory, and its sector bitmaps.
///
/// # Errors
///
/// Whatever is wrong with it; [`Kind::InUse`] if a killed daemon left a session of it.
pub(super) fn read(reactor: &Reactor, file: Arc<ImageFile>) -> Result<Member> {
    let member = Member::read(reactor, file)?;
    let Member { file, image } = &member;
    refuse_empty(&image.metadata).file(file.path())?;
    reactor.block_on(image.read_bitmaps(&reactor.disk(file.clone()))).file(file.path())?;
    session::refuse_orphan(file, Some(image))?;
    Ok(member)
}

/// Where the content of `member` is. Its file is for payload I/O from now on.
pub(super) fn into_map(member: Member) -> Result<(Arc<ImageFile>, BlockMap)> {
    choose_payload_io(&member.file, &member.image.metadata)?;
    Ok((member.file, member.image.into_map()))
}

/// What the engine needs of the parents, and the files that keep them locked.
pub(super) type EngineParents = (Vec<ReadLayer<UringDisk>>, Arc<[Arc<ImageFile>]>);

/// The parents as an engine on `reactor` reads them.
pub(super) fn for_engine(reactor: &Reactor, parents: Vec<Member>) -> Result<EngineParents> {
    let layers = parents.into_iter().map(into_map).collect::<Result<Vec<_>>>()?;
    let files = layers.iter().map(|(file, _)| file.clone()).collect();
    let parents =
        layers.into_iter().map(|(file, map)| ReadLayer { disk: reactor.disk(file), map: map.into() });
    Ok((parents.collect(), files))
}

/// Reads and checks the image on `disk`, and replays a dirty log in memory.
pub(super) async fn read_image(disk: &UringDisk) -> Result<ReadImage> {
    let image = Image::read(disk).await?;
    refuse_empty(&image.metadata)?;
    Ok(image)
}

/// Refuses a disk without a byte.
pub(super) fn refuse_empty(metadata: &Metadata) -> Result<()> {
    if metadata.virtual_size > 0 {
        return Ok(());
    }
    let message = "the virtual disk is empty, and the kernel has no such devices";
    Err(Error::new(Kind::Unsupported, message).in_structure("metadata"))
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
