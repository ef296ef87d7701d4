//! A copy of the image that is merged into stands in for it, so that its other children keep it as it is.
//!
//! Each step is durable before the next, and the chain reads as before at every moment:
//!
//! 1. the copy gets its name when it is whole and synced. It is the same image to its children;
//! 2. the lowest of the merged layers names the copy as its parent;
//! 3. the layers are merged into the copy, as into any parent.
//!
//! A second run takes a file that is there for its own only if that is the parent already, or has the same
//! content, byte by byte.

use std::path::Path;

use super::{Beside, LockedChain, Request};
use crate::chain::{self, Layer};
use crate::disk::{Access, Disk, HostFile, Place, Reactor, folder_of};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::operations::duplicate::Duplicate;
use crate::operations::inspect::inspect;
use crate::operations::likeness::is_alike;
use crate::operations::{Devices, Watch, locked, naming};

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
        if !self.has_parent(path)? {
            let chain = LockedChain::lock(self, Beside::Keep, reactor, devices)?;
            let place = Place::of(path)?;
            if place.is_taken()? {
                refuse_other(&chain, &place, reactor, devices)?;
            } else {
                // Side by side, one path leads to the parent of both.
                let moves = folder_of(place.path()) != folder_of(chain.target());
                let parent = chain.below.first().map(Layer::path).filter(|_| moves);
                let needed = chain.target.file.host_bytes().doing("reading the attributes of the image");
                let needed = needed.file(chain.target())?;
                let made = Duplicate { of: &chain.target, at: &place, parent, needed }.make(reactor, watch);
                made.map_err(with_remedy)?;
            }
            let lowest = chain.layers.last().expect("a merge has a layer");
            naming::name_parent(lowest, lowest.path(), place.path(), None, reactor)?;
        }
        self.into = Some(path.to_owned());
        Ok(())
    }

    /// Whether the file at `path` is one of the child's parents.
    fn has_parent(&self, path: &Path) -> Result<bool> {
        let Ok(file) = HostFile::at(path) else { return Ok(false) };
        let parents = chain::open_parents(&inspect(&self.child)?, &self.search, inspect)?;
        Ok(parents.iter().any(|parent| parent.file == file))
    }
}

/// Refuses what is at `place`, unless it is the copy that an earlier run has made.
fn refuse_other(chain: &LockedChain, place: &Place, reactor: &Reactor, devices: &dyn Devices) -> Result<()> {
    let there = locked::open(reactor, place.path(), Access::ReadOnly, devices);
    match there {
        Ok(there) if is_alike(&chain.target, &there, reactor)? => {
            // A link leads to nothing that this command has made.
            place.require(&there.file)?;
            let synced = reactor.block_on(reactor.disk(there.file.clone()).sync());
            synced.doing("syncing the copy").file(place.path())?;
            place.sync()
        }
        Err(error) if error.kind() == Kind::InUse => Err(error),
        _ => {
            let error = Error::new(Kind::Exists, "there is another file already").file(place.path());
            Err(error.remedy("choose another name for the copy"))
        }
    }
}

fn with_remedy(error: Error) -> Error {
    match error.kind() {
        Kind::NoSpace => error.remedy("free space, and merge again; the chain is as it was"),
        Kind::Stopped => error.remedy("the chain is as it was; the same command begins again"),
        _ => error,
    }
}
