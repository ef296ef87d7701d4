//! Making an image's file smaller, at rest.
//!
//! What has children may be compacted: its disk does not change, nor does its DataWriteGuid. Its lock says
//! whether a process or a device uses it, or a child of it.

pub mod plan;
mod run;
mod survey;
mod zeros;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Devices, Watch, locked, replaced, room};
use crate::chain::{self, Member, ReadLayer, Search};
use crate::disk::{Access, Disk, ImageFile, Reactor, Sparse, UringDisk, host_bytes};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::metadata::DiskType;
use crate::image::Image;

pub use run::{Compaction, Done, outline};
pub use survey::{Fixed, movable};

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steps {
    /// Blocks that read as zeros give up their space.
    pub zeros: bool,
    /// Blocks move so that the file can end earlier.
    pub length: bool,
    /// Blocks move so that they are in the order of the disk, which shortens the file, too.
    pub defragment: bool,
}

/// What the user wants to be compacted.
pub struct Request {
    /// The image.
    pub image: PathBuf,
    /// Where its parents are.
    pub search: Search,
    /// What is to be done.
    pub steps: Steps,
    /// The file gets no holes, and those that it has are filled.
    pub dense: bool,
    /// The most bytes that are copied in a second.
    pub max_rate: Option<u64>,
    /// Only say what would be done.
    pub dry_run: bool,
}

/// What a file takes, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// On its host.
    pub host: u64,
    /// As a copy to a file system without holes would.
    pub length: u64,
}

/// What has become of an image.
pub struct Compacted {
    /// Its file, as an absolute path without symbolic links.
    pub path: PathBuf,
    /// Its type.
    pub kind: DiskType,
    /// What the file took.
    pub before: Figures,
    /// What it takes now; nothing if nothing was to be changed.
    pub after: Option<Figures>,
    /// What was done, or would be.
    pub done: Done,
    /// The bytes of holes that were filled, or that would be.
    pub filled_bytes: u64,
    /// Why blocks that are partially present were not searched for zeros.
    pub unread: Option<Error>,
}

impl Figures {
    /// What an open file takes now.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        Ok(Self { host: host_bytes(&found), length: found.len() })
    }
}

impl Request {
    /// Compacts the image, or says what that would do.
    ///
    /// # Errors
    ///
    /// Those of locking and reading the image; [`Kind::Usage`] if more parents are given than there are; I/O
    /// errors, want of room included: the disk reads as before, what was won stays won, and the image can be
    /// compacted again.
    pub fn run(&self, reactor: &Reactor, devices: &dyn Devices, watch: &impl Watch) -> Result<Compacted> {
        let access = if self.dry_run { Access::ReadOnly } else { Access::ReadWrite };
        let leaf = locked::open(reactor, &self.image, access, devices)?;
        if !self.dry_run {
            replaced::refuse_foreign_links(&self.image, &*leaf.file)?;
        }
        let kind = leaf.image.metadata.kind();
        let (parents, unread) = match self.parents(&leaf, reactor, devices) {
            Ok(parents) => (parents, None),
            Err(error) if error.kind() == Kind::Usage || !self.search.parents.is_empty() => {
                return Err(error);
            }
            Err(error) => (Vec::new(), Some(error)),
        };
        let file = leaf.file.clone();
        let path = file.path().to_owned();
        if self.dense {
            file.set_sparse(Sparse::No);
        }
        let before = figures(&file).doing("looking at the image").file(&path)?;
        let done = if self.dry_run {
            let disk = reactor.disk(file.clone());
            let Member { image, .. } = leaf;
            reactor.block_on(async {
                image.read_bitmaps(&disk).await?;
                outline(image, disk, parents, self.steps, watch).await
            })
        } else {
            leaf.image.check_writable().file(&path)?;
            drop(leaf);
            self.compact(&file, parents, reactor, watch)
        };
        let done = done.file(&path).map_err(with_remedy)?;
        let filled_bytes = if self.dense && !done.stopped { self.fill(&file, reactor, watch)? } else { 0 };
        let after = if self.dry_run { None } else { Some(figures(&file).doing("looking at the image")?) };
        Ok(Compacted { path, kind, before, after, done, filled_bytes, unread })
    }

    fn compact(
        &self,
        file: &Arc<ImageFile>,
        parents: Vec<ReadLayer<UringDisk>>,
        reactor: &Reactor,
        watch: &impl Watch,
    ) -> Result<Done> {
        let (disk, new_guid) = (|| reactor.disk(file.clone()), Uuid::new_v4);
        reactor.block_on(async {
            let image = Image::open_for_writing(&disk(), new_guid).await?;
            let (tasks, max_rate) = (reactor.executor().clone(), self.max_rate);
            Compaction { image, disk, parents, max_rate, tasks, new_guid }.run(self.steps, watch).await
        })
    }

    /// Fills the holes of the file; how many bytes they are. A kill leaves some of them filled.
    fn fill(&self, file: &Arc<ImageFile>, reactor: &Reactor, watch: &impl Watch) -> Result<u64> {
        let Figures { host, length } = figures(file).doing("looking at the image").file(file.path())?;
        let holes = length.saturating_sub(host);
        // What such a host says of the space that a file takes may be its length.
        if self.dry_run || holes == 0 && !file.is_on_host_that_marks() {
            return Ok(holes);
        }
        room::require(file.host_room(), holes, "filling the holes needs").file(file.path())?;
        let disk = reactor.disk(file.clone());
        let filling = async {
            let mut at = Some(0);
            while let Some(from) = at.filter(|_| !watch.stop_requested()) {
                watch.progress(from.min(length), length);
                at = disk.fill_hole(from).await?;
            }
            disk.sync().await
        };
        reactor.block_on(filling).doing("filling the holes of the file").file(file.path())?;
        if !watch.stop_requested() {
            file.unmark_sparse()?;
        }
        Ok(holes)
    }

    /// The parents of `leaf`, if what it reads as matters.
    fn parents(
        &self,
        leaf: &Member,
        reactor: &Reactor,
        devices: &dyn Devices,
    ) -> Result<Vec<ReadLayer<UringDisk>>> {
        if !self.steps.zeros || leaf.image.metadata.kind() != DiskType::Differencing {
            return Ok(Vec::new());
        }
        let open = |path: &Path| {
            let member = locked::open(reactor, path, Access::ReadOnly, devices)?;
            reactor.block_on(member.image.read_bitmaps(&reactor.disk(member.file.clone()))).file(path)?;
            Ok(member)
        };
        let parents = chain::open_parents(leaf, &self.search, open)?;
        let layer =
            |Member { file, image }| ReadLayer { disk: reactor.disk(file), map: image.into_map().into() };
        Ok(parents.into_iter().map(layer).collect())
    }
}

fn figures(file: &ImageFile) -> io::Result<Figures> {
    Ok(Figures { host: file.host_bytes()?, length: file.length()? })
}

/// A compaction that failed is done again.
fn with_remedy(error: Error) -> Error {
    match error.kind() {
        Kind::NoSpace => error.remedy(
            "free some space on the file system of the image, a few hundred MiB at most, and compact again; \
             nothing is lost, and what was won is kept",
        ),
        Kind::Io => error.remedy("the disk reads as before: find the cause (dmesg), and compact again"),
        _ => error,
    }
}
