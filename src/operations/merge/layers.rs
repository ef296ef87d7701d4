//! Merging layers of a chain into an image below them, the *target*, which takes their content over.
//!
//! A reader of the chain sees no change, wherever the merge is cut: whatever is written to the target, a
//! layer above has, until the layers are gone. The chain opens all the time, as the layer directly above the
//! target knows both GUIDs that the target may carry. Each step is durable before the next:
//!
//! 1. the images are synced, and that layer gets the target's DataWriteGuid of now and, as its second
//!    linkage, the one to come (the first is renewed for a merge that was cut before, after which the target
//!    may carry the second);
//! 2. a target that is smaller grows: the new part is zero, as a reader of the chain sees it;
//! 3. the target's session opens under the new DataWriteGuid; the content is copied; the target is closed;
//! 4. it takes the disk's size, if it was larger, and what else describes the disk;
//! 5. from the target upwards, each layer's child is made the target's own child, then the layer is removed:
//!    what the child does not have is in the target by now. At last the uppermost layer's children, if it
//!    has some, become the target's own, and it is removed;
//! 6. these children forget it.
//!
//! A merge that was cut finds the chain as it is by then, and does all of it again. Only between the two
//! parts of step 5 is there a layer that no longer belongs to a chain; it knows the target by its second
//! linkage. A child that was made the target's own still has the uppermost layer as its first linkage: from
//! then on only steps 5 and 6 are left, for the target must not change under that child. If the layer has
//! changed since, it is not the one that the child knows, and nothing is done.
//!
//! [Rule 106](crate::design::vhdx_rules#rule-106).

use std::path::{Path, PathBuf};
use std::rc::Rc;

use uuid::Uuid;

use crate::chain::{self, ReadLayer};
use crate::disk::{Disk, PAGE_BYTES};
use crate::engine::message::ToFront;
use crate::engine::waiting::Spawn;
use crate::engine::{Engine, Fronts, Outcome, Setup};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::guid;
use crate::format::locator::{PARENT_LINKAGE, PARENT_LINKAGE2, ParentLocator};
use crate::format::log::MAX_DESCRIPTORS_WRITTEN;
use crate::format::metadata::Metadata;
use crate::image::{Image, ReadImage, Resize, WritableImage};
use crate::simulation::{Plant, planted};

/// The files of a merge, by absolute paths. Each is one image of a chain, which no other process has open.
pub struct Merge {
    /// What is merged, the uppermost layer first.
    pub layers: Vec<PathBuf>,
    /// What takes it over.
    pub target: PathBuf,
    /// The target's parents, its own first.
    pub below: Vec<PathBuf>,
    /// The children of the uppermost layer, which become the target's own; those of a merge that was cut,
    /// too.
    pub children: Vec<PathBuf>,
}

/// What a merge asks of the world.
#[expect(async_fn_in_trait, reason = "one thread drives all of it: futures need not be Send")]
pub trait Files {
    /// What the images are on.
    type Disk: Disk + 'static;

    /// The file at `path`, opened and locked before.
    fn disk(&self, path: &Path) -> Self::Disk;

    /// Removes the file at `path`, durably.
    ///
    /// # Errors
    /// If it is still there, or may come back.
    async fn remove(&self, path: &Path) -> Result<()>;

    /// The first `bytes` of the disk are copied.
    ///
    /// # Errors
    /// `ECANCELED` if the merge is to stop.
    fn copied(&self, bytes: u64) -> Outcome;
}

impl Merge {
    /// Merges; see the module's head. The target's tasks run on `tasks`.
    ///
    /// # Errors
    /// Those of opening the images, before anything but their logs is written; I/O errors, no space included,
    /// after which the chain reads as before and the merge can be done again.
    pub async fn run<F: Files>(
        &self,
        files: &F,
        tasks: Rc<dyn Spawn>,
        new_guid: impl FnMut() -> Uuid + Clone + 'static,
    ) -> Result<()> {
        let mut known = Vec::new();
        for path in &self.children {
            let child = read(files, path).await?;
            let locator = child.metadata.parent_locator.clone().expect("a child has a parent");
            Link::check(&locator, path, &self.target)?;
            known.push(locator);
        }
        let guids = self.take_over(files, tasks, &known, new_guid.clone()).await?;
        self.remove_layers(files, guids, new_guid).await
    }

    /// Steps 1 to 4, unless they were done before, as one of the children, which say this of their parents,
    /// knows. Returns what the uppermost layer and the target, which has everything then, are known by.
    ///
    /// # Errors
    /// Those of [`Self::run`].
    pub(super) async fn take_over<F: Files>(
        &self,
        files: &F,
        tasks: Rc<dyn Spawn>,
        known: &[ParentLocator],
        new_guid: impl FnMut() -> Uuid + Clone + 'static,
    ) -> Result<Guids> {
        let data_write = new_guid.clone()();
        let mut layers = Vec::new();
        for path in &self.layers {
            layers.push(open(files, path, new_guid.clone()).await?);
        }
        let target = open(files, &self.target, new_guid.clone()).await?;
        let mut below = Vec::new();
        for path in &self.below {
            below.push(read(files, path).await?);
        }
        let disk = layers[0].metadata.clone();
        target.check_writable().file(&self.target)?;
        for (layer, path) in layers.iter().zip(&self.layers) {
            layer.check_writable().file(path)?;
        }
        for (layer, path) in layers.iter().zip(&self.layers).take(layers.len() - 1) {
            let locator = layer.metadata.parent_locator.as_ref().expect("a layer above another has a parent");
            Link::check(locator, path, &self.target)?;
        }
        let guids = Guids { layer: layers[0].header.header.data_write_guid, target: data_write };
        if is_copied(known, &layers[0], &target) {
            return Ok(Guids { target: target.header.header.data_write_guid, ..guids });
        }
        self.sync(files).await?;
        let lowest = layers.pop().expect("something is merged");
        layers.push(self.announce(files, lowest, &target, data_write, new_guid.clone()).await?);
        let parent_bytes = below.first().map_or(0, |parent| parent.metadata.virtual_size);
        let target = self.grow(files, target, (disk.virtual_size, parent_bytes), new_guid.clone()).await?;
        let layers = layers.into_iter().map(ReadImage::from).collect();
        let layers = parents(files, &self.layers, layers).await?;
        let below = parents(files, &self.below, below).await?;
        let engine = self.engine(files, target, below, tasks, new_guid.clone()).await?;
        self.copy(files, &engine, &layers, disk.virtual_size, data_write).await?;
        drop((engine, layers));
        self.describe(files, &disk, new_guid.clone()).await?;
        Ok(guids)
    }

    /// The images' children are made to know them by their GUIDs. A header that a killed process wrote may be
    /// in the host's cache only: a power cut would bring the one before back, which no child knows.
    async fn sync<F: Files>(&self, files: &F) -> Result<()> {
        for path in self.layers.iter().chain([&self.target]).filter(|_| !planted(Plant::RelyOnCache)) {
            let synced = files.disk(path).sync().await;
            synced.map_err(|error| Error::io("syncing what was written before", error)).file(path)?;
        }
        Ok(())
    }

    /// Step 1: the layer above the target knows it by what it is and by what it will be.
    async fn announce<F: Files>(
        &self,
        files: &F,
        lowest: WritableImage,
        target: &Image,
        data_write: Uuid,
        new_guid: impl FnMut() -> Uuid,
    ) -> Result<WritableImage> {
        let path = self.layers.last().expect("something is merged");
        let mut metadata = lowest.metadata.clone();
        let locator = metadata.parent_locator.as_mut().expect("a layer above another has a parent");
        locator.set(PARENT_LINKAGE, guid::print(target.header.header.data_write_guid));
        locator.set(PARENT_LINKAGE2, guid::print(data_write));
        amend(files, path, lowest, &metadata, new_guid).await
    }

    /// Step 2.
    async fn grow<F: Files>(
        &self,
        files: &F,
        target: WritableImage,
        (size, parent_bytes): (u64, u64),
        new_guid: impl FnMut() -> Uuid,
    ) -> Result<WritableImage> {
        let virtual_size = size.max(target.metadata.virtual_size);
        let metadata = Metadata { virtual_size, ..target.metadata.clone() };
        let to = Resize { metadata, parent_bytes, data_write: None, zero_from: None };
        target.resize(&files.disk(&self.target), &to, new_guid).await.file(&self.target)
    }

    /// The target's engine. Nothing is written yet.
    async fn engine<F: Files>(
        &self,
        files: &F,
        target: WritableImage,
        below: Vec<ReadLayer<F::Disk>>,
        tasks: Rc<dyn Spawn>,
        new_guid: impl FnMut() -> Uuid + 'static,
    ) -> Result<Rc<Engine<F::Disk>>> {
        let disk = files.disk(&self.target);
        target.read_bitmaps(&disk).await.file(&self.target)?;
        let (fronts, guids) = (Rc::new(NoFronts), Box::new(new_guid));
        Engine::new(Setup { image: target, disk, parents: below, tasks, fronts, guids }).file(&self.target)
    }

    /// Step 3.
    async fn copy<F: Files>(
        &self,
        files: &F,
        engine: &Rc<Engine<F::Disk>>,
        layers: &[ReadLayer<F::Disk>],
        size: u64,
        data_write: Uuid,
    ) -> Result<()> {
        let copying = async {
            engine.open_session_as(Some(data_write)).await?;
            engine.absorb(layers, size, &|bytes| files.copied(bytes)).await
        };
        let copied = copying.await.doing("copying into the image");
        if planted(Plant::UnsyncedMerge) {
            return copied.file(&self.target);
        }
        let closed = engine.close().await.doing("closing the image");
        copied.and(closed).file(&self.target)
    }

    /// Step 4: the target describes the disk that it is now.
    async fn describe<F: Files>(
        &self,
        files: &F,
        disk: &Metadata,
        mut new_guid: impl FnMut() -> Uuid + Clone,
    ) -> Result<()> {
        let target = open(files, &self.target, new_guid.clone()).await?;
        let metadata = Metadata {
            virtual_size: disk.virtual_size,
            disk_id: disk.disk_id,
            physical_sector_size: disk.physical_sector_size,
            ..target.metadata.clone()
        };
        assert!(metadata.virtual_size <= target.metadata.virtual_size, "a smaller target has grown");
        let to = Resize { metadata, parent_bytes: 0, data_write: None, zero_from: None };
        target.resize(&files.disk(&self.target), &to, &mut new_guid).await.file(&self.target).map(drop)
    }

    /// Steps 5 and 6.
    async fn remove_layers<F: Files>(
        &self,
        files: &F,
        guids: Guids,
        new_guid: impl FnMut() -> Uuid + Clone,
    ) -> Result<()> {
        let adopt = |child: &Path| Link::Adopt { child: child.into(), target: self.target.clone(), guids };
        for pair in self.layers.windows(2).rev() {
            let (child, path) = (&pair[0], &pair[1]);
            let layer = read(files, path).await?.header.header.data_write_guid;
            let guids = Guids { layer, ..guids };
            let link = Link::Adopt { child: child.clone(), target: self.target.clone(), guids };
            relocate(files, child, &link, new_guid.clone()).await?;
            files.remove(path).await?;
        }
        for child in &self.children {
            relocate(files, child, &adopt(child), new_guid.clone()).await?;
        }
        files.remove(&self.layers[0]).await?;
        for path in &self.children {
            relocate(files, path, &Link::Settle(guids), new_guid.clone()).await?;
        }
        Ok(())
    }
}

/// The most bytes of a locator that one log entry changes with all that points to it: it may begin within a
/// page and end within another, and its entry in the table may lie across two.
const MAX_CHANGED: usize = (MAX_DESCRIPTORS_WRITTEN - 4) * PAGE_BYTES;

/// What children know a layer and the target by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guids {
    /// The DataWriteGuid of the layer.
    pub layer: Uuid,
    /// That of the target.
    pub target: Uuid,
}

/// Whether a merge that was cut has come to one of the uppermost layer's children, which say this of their
/// parents.
fn is_copied(known: &[ParentLocator], uppermost: &Image, target: &Image) -> bool {
    let [above, below] = [uppermost, target].map(|image| Some(image.header.header.data_write_guid));
    known.iter().any(|locator| locator.linkage().ok() == above && locator.linkage2() == below)
}

/// What a child is to say of its parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// The image at `child` is the child of the one at `target`. It still knows the layer that was between
    /// them.
    Adopt {
        /// The child's path.
        child: PathBuf,
        /// The target's.
        target: PathBuf,
        /// What they are known by.
        guids: Guids,
    },
    /// The layer is gone: the child knows its parent, the target, and nothing else.
    Settle(Guids),
}

impl Link {
    /// Checks that `locator`, of the image at `child`, has room for whatever a merge into `target` has it
    /// say. When it comes to that, the target has the content already.
    ///
    /// # Errors
    /// Those of [`ParentLocator::check`] and of [`Self::put_into`];
    /// [`Kind::Unsupported`] if no log entry could hold it.
    pub(super) fn check(locator: &ParentLocator, child: &Path, target: &Path) -> Result<()> {
        let guids = Guids { layer: Uuid::max(), target: Uuid::max() };
        let mut changed = locator.clone();
        let adopt = Self::Adopt { child: child.into(), target: target.into(), guids };
        adopt.put_into(&mut changed).and_then(|()| changed.check()).file(child)?;
        let length = changed.encode().len();
        if length > MAX_CHANGED {
            let message = format!("it has {length} bytes, and one log entry changes {MAX_CHANGED} at most");
            let error = Error::new(Kind::Unsupported, message).in_structure("parent locator").file(child);
            return Err(error.remedy("copy the disk into a new image, with `vhdx-ublk convert`"));
        }
        Ok(())
    }

    /// Has `locator` say it.
    ///
    /// # Errors
    /// [`Kind::Unsupported`] if the target's path cannot be written in
    /// UTF-16.
    pub fn put_into(&self, locator: &mut ParentLocator) -> Result<()> {
        match self {
            Self::Adopt { child, target, guids } => {
                // A merge that was cut before it was settled has left one of a layer that is gone.
                locator.set(PARENT_LINKAGE, guid::print(guids.layer));
                locator.set(PARENT_LINKAGE2, guid::print(guids.target));
                chain::point_to(locator, child, target)
            }
            Self::Settle(guids) => {
                locator.set(PARENT_LINKAGE, guid::print(guids.target));
                locator.remove(PARENT_LINKAGE2);
                Ok(())
            }
        }
    }
}

/// Changes what the image at `path` says of its parent.
pub(super) async fn relocate<F: Files>(
    files: &F,
    path: &Path,
    link: &Link,
    new_guid: impl FnMut() -> Uuid + Clone,
) -> Result<()> {
    let image = open(files, path, new_guid.clone()).await?;
    let mut metadata = image.metadata.clone();
    link.put_into(metadata.parent_locator.as_mut().expect("a child has a parent"))?;
    amend(files, path, image, &metadata, new_guid).await.map(drop)
}

/// The engine of a merge serves no fronts.
struct NoFronts;

impl Fronts for NoFronts {
    fn send(&self, front: usize, message: ToFront) {
        unreachable!("{message:?} to front {front} of none");
    }

    fn count(&self) -> usize {
        0
    }
}

pub(super) async fn read<F: Files>(files: &F, path: &Path) -> Result<ReadImage> {
    Image::read(&files.disk(path)).await.file(path)
}

async fn open<F: Files>(files: &F, path: &Path, new_guid: impl FnOnce() -> Uuid) -> Result<WritableImage> {
    Image::open_for_writing(&files.disk(path), new_guid).await.file(path)
}

async fn amend<F: Files>(
    files: &F,
    path: &Path,
    image: WritableImage,
    metadata: &Metadata,
    new_guid: impl FnMut() -> Uuid,
) -> Result<WritableImage> {
    image.amend(&files.disk(path), metadata, new_guid).await.file(path)
}

/// The images as an engine reads them.
async fn parents<F: Files>(
    files: &F,
    paths: &[PathBuf],
    images: Vec<ReadImage>,
) -> Result<Vec<ReadLayer<F::Disk>>> {
    let mut parents = Vec::new();
    for (path, image) in paths.iter().zip(images) {
        let disk = files.disk(path);
        image.read_bitmaps(&disk).await.file(path)?;
        parents.push(ReadLayer { disk, map: image.into_map().into() });
    }
    Ok(parents)
}
