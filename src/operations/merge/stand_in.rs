//! A copy of the image that is merged into stands in for it, so that its other children keep it as it is.
//!
//! Each step is durable before the next, and the chain reads as before at every moment:
//!
//! 1. the copy gets its name when it is whole and synced. It is the same image to its children;
//! 2. the lowest of the merged layers names the copy as its parent;
//! 3. the layers are merged into the copy, as into any parent.
//!
//! A second run takes a file that is there for its own only if it has the same content, byte by byte, and is
//! no image of the chain; or if it is the parent already, and the layer above it says so: with its new parent
//! that layer gets a second linkage, which is otherwise that of a merge under way. The first images of a
//! chain are thus never taken for a copy, whatever name or link leads to them.

use std::path::{Path, PathBuf};

use super::{Beside, LockedChain, Request};
use crate::chain::{self, Layer, Member};
use crate::disk::{Access, CHOOSE, Disk, HostFile, Place, Reactor, folder_of, taken};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::guid;
use crate::format::locator::{PARENT_LINKAGE, PARENT_LINKAGE2, ParentLocator};
use crate::format::metadata::Metadata;
use crate::operations::duplicate::Duplicate;
use crate::operations::inspect::{Inspected, inspect};
use crate::operations::likeness::is_alike;
use crate::operations::{Devices, Watch, locked, naming, place_of_new};

impl Request {
    /// Steps 1 and 2, after which the request is to merge into the copy at `path`.
    ///
    /// # Errors
    ///
    /// Those of [`LockedChain::open`], but for the target's other children; [`Kind::Exists`] if there is
    /// another file at `path`; [`Kind::NoSpace`]; [`Kind::Stopped`]: the chain is as it was then.
    pub fn copy_target(
        &mut self,
        path: &Path,
        reactor: &Reactor,
        devices: &dyn Devices,
        watch: &impl Watch,
    ) -> Result<()> {
        let place = place_of_new(path)?;
        self.lead_to_copy(&place)?;
        let copy = if let Some(copy) = self.own_copy(&place)? {
            copy
        } else {
            let copy = self.make_copy(&place, reactor, devices, watch)?;
            self.lead_to_copy(&place)?;
            copy
        };
        (self.into, self.copied) = (Some(path.to_owned()), Some(copy));
        Ok(())
    }

    /// If a layer names what is at `place` as its parent, and says that a merge is under way, that takes the
    /// place of the original among the parents that the user has named: these lead past it otherwise. Layers
    /// between them are merged by then.
    fn lead_to_copy(&mut self, place: &Place) -> Result<()> {
        let parents = &self.search.parents;
        let is_into = |into: &PathBuf| parents.iter().position(|parent| chain::same_file(parent, into));
        let original = self.into.as_ref().map_or(Some(0), is_into);
        let end = original.map_or(parents.len(), |original| parents.len().min(original + 1));
        let above = original.map_or(end + 1, |_| end);
        let layers = std::iter::once(&self.child).chain(&parents[..end]).take(above);
        for (number, layer) in layers.enumerate() {
            let Inspected { image, path, .. } = inspect(layer)?;
            let locator = image.metadata.parent_locator.as_ref();
            if is_announced(&image.metadata)
                && locator.is_some_and(|locator| chain::is_direct(&path, locator, place.path()))
            {
                self.search.parents.splice(number..end, [place.path().to_owned()]);
                break;
            }
        }
        Ok(())
    }

    /// The file at `place`, if it is the parent that an earlier run has made.
    fn own_copy(&self, place: &Place) -> Result<Option<HostFile>> {
        let Some(file) = place.occupant()? else { return Ok(None) };
        let leaf = inspect(&self.child)?;
        let parents = chain::open_parents(&leaf, &self.search, inspect)?;
        let images: Vec<&Inspected> = std::iter::once(&leaf).chain(&parents).collect();
        match images.iter().position(|image| image.file == file) {
            None => Ok(None),
            Some(number) if number > 0 && is_announced(&images[number - 1].image.metadata) => Ok(Some(file)),
            Some(_) => Err(of_the_chain(place)),
        }
    }

    /// Steps 1 and 2 where there is no copy that is the parent. Returns the copy's file.
    fn make_copy(
        &self,
        place: &Place,
        reactor: &Reactor,
        devices: &dyn Devices,
        watch: &impl Watch,
    ) -> Result<HostFile> {
        let chain = LockedChain::lock(self, Beside::Keep, reactor, devices)?;
        chain.named_for(place)?;
        if place.is_taken()? {
            refuse_other(&chain, place, reactor, devices)?;
        } else {
            // Side by side, one path leads to the parent of both.
            let moves = folder_of(place.path()) != folder_of(chain.target());
            let parent = chain.below.first().map(Layer::path).filter(|_| moves);
            let needed = chain.target.file.host_bytes().doing("reading the attributes of the image");
            let needed = needed.file(chain.target())?;
            let like = &chain.layers[0];
            let made = Duplicate { of: &chain.target, at: place, like, parent, needed };
            made.make(reactor, watch).map_err(with_remedy)?;
        }
        let copy = place.occupant()?.filter(|copy| !chain.holds(*copy)).ok_or_else(|| of_the_chain(place))?;
        chain.name_copy(place, reactor)?;
        Ok(copy)
    }
}

impl LockedChain {
    /// Whether the file is that of one of its images.
    fn holds(&self, file: HostFile) -> bool {
        let mut images = self.layers.iter().chain([&self.target]).chain(&self.below).chain(&self.children);
        images.any(|image| image.file.identity() == file)
    }

    /// The lowest layer, and what it says of its parent once that is the copy at `place`.
    fn named_for(&self, place: &Place) -> Result<(&Member, ParentLocator)> {
        let lowest = self.layers.last().expect("a merge has a layer");
        let mut locator = naming::locator(lowest, lowest.path(), place.path(), None)?;
        let linkage = guid::print(self.target.image.header.header.data_write_guid);
        locator.set(PARENT_LINKAGE, linkage.clone());
        locator.set(PARENT_LINKAGE2, linkage);
        locator.check().file(lowest.path())?;
        Ok((lowest, locator))
    }

    /// Step 2.
    fn name_copy(&self, place: &Place, reactor: &Reactor) -> Result<()> {
        let (lowest, locator) = self.named_for(place)?;
        naming::amend(&lowest.file, locator, reactor)
    }
}

/// Whether the image knows that a merge into its parent is under way.
fn is_announced(metadata: &Metadata) -> bool {
    metadata.parent_locator.as_ref().is_some_and(|locator| locator.linkage2().is_some())
}

fn of_the_chain(place: &Place) -> Error {
    let message = "it is an image of the chain itself, not a copy";
    let error = Error::new(Kind::Exists, message).file(place.path());
    error.remedy("choose another name for the copy")
}

/// Refuses what is at `place`, unless it is the copy that an earlier run has made.
fn refuse_other(chain: &LockedChain, place: &Place, reactor: &Reactor, devices: &dyn Devices) -> Result<()> {
    let there = locked::open(reactor, place.path(), Access::ReadOnly, devices);
    match there {
        Ok(there) if is_alike(&chain.target, &there, reactor)? => {
            // A link leads to nothing that this command has made.
            place.require(&there.file)?;
            if chain.holds(there.file.identity()) {
                return Err(of_the_chain(place));
            }
            let synced = reactor.block_on(reactor.disk(there.file.clone()).sync());
            synced.doing("syncing the copy").file(place.path())?;
            place.sync()
        }
        Err(error) if error.kind() == Kind::InUse => Err(error),
        _ => Err(taken(place.path()).remedy(CHOOSE)),
    }
}

fn with_remedy(error: Error) -> Error {
    match error.kind() {
        Kind::NoSpace => error.remedy("free space, and merge again; the chain is as it was"),
        Kind::Stopped => error.remedy("the chain is as it was; the same command begins again"),
        _ => error,
    }
}
