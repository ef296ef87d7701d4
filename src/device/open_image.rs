//! An image opened for a device: what the fronts share, and the disk as the kernel sees it.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::control::Control;
use super::errands::Errands;
use super::layers::{self, Parents};
use super::leaf_handover::LeafHandover;
use super::mailbox::EngineEnds;
use super::options::{Parameters, Salvage};
use super::order::{CompactOrder, GrowOrder, MergeOrder, SnapshotOrder};
use super::spare_buffers::SpareBuffers;
use super::spec::{DeviceSpec, EngineHandle};
use crate::disk::tally::Histogram;
use crate::disk::{HostFile, ImageFile, Reactor};
use crate::engine::shared::Shared;
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::metadata::{DiskType, Metadata};

/// An image that a device can serve.
#[derive(Clone)]
pub struct OpenImage {
    /// What the fronts and the engine share.
    pub shared: Arc<Shared>,
    /// The disk as the kernel sees it.
    pub parameters: Parameters,
    /// The image's FileWriteGuid.
    pub file_write_guid: Uuid,
    /// The identifier of the disk.
    pub disk_id: Uuid,
    /// Whether another daemon could continue if this process is killed.
    pub recoverable: bool,
    /// What is left of a damaged image is shown.
    pub salvage: Option<Salvage>,
    /// How long syncs of the image take.
    pub sync_times: Arc<Histogram>,
    /// The parents' files, nearest first, locked as long as this lives.
    pub(super) parents: Arc<[Arc<ImageFile>]>,
}

impl OpenImage {
    /// Opens the image in `file` for reading, and its parents. Nothing is written, not even their logs.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the images; those of [`crate::chain::open_parents`]; [`Kind::InUse`] if a
    /// killed daemon left a session of one; those of [`Control::open`].
    pub fn read_only(file: Arc<ImageFile>, parents: &Parents) -> Result<Self> {
        let reactor = Reactor::new()?;
        file.read_anew();
        let leaf = layers::read(&reactor, file)?;
        let parents = parents.of(&leaf.image, leaf.file.path(), &reactor, &Errands::default())?;
        Control::open()?;
        let fixed = leaf.image.metadata.kind() == DiskType::Fixed;
        let files = std::iter::once(&leaf).chain(&parents).map(|member| &*member.file);
        let parameters = parameters(files, &leaf.image.metadata, true)?;
        let file_write_guid = leaf.image.header.header.file_write_guid;
        let disk_id = leaf.image.metadata.disk_id;
        let (_, leaf) = layers::into_map(leaf)?;
        let parents = parents.into_iter().map(layers::into_map).collect::<Result<Vec<_>>>()?;
        let (parents, maps): (Vec<_>, Vec<_>) = parents.into_iter().unzip();
        let maps = maps.into_iter().map(Arc::new).collect();
        let shared = Arc::new(Shared::of_chain(leaf.into(), maps, true, fixed));
        let (sync_times, parents) = (Arc::default(), parents.into());
        Ok(Self {
            shared,
            parameters,
            file_write_guid,
            disk_id,
            recoverable: true,
            salvage: None,
            sync_times,
            parents,
        })
    }

    /// The parents as they were opened: another file may have such a path by now.
    pub fn parent_files(&self) -> Vec<HostFile> {
        self.parents.iter().map(|parent| parent.identity()).collect()
    }

    /// What [`super::daemon::serve`] needs.
    ///
    /// # Errors
    ///
    /// When the process has no file descriptor left.
    pub fn spec(&self, file: &Arc<ImageFile>) -> Result<DeviceSpec> {
        let files = std::iter::once(&**file).chain(self.parents.iter().map(Arc::as_ref));
        Ok(DeviceSpec {
            sparse: file.sparse(),
            path: file.path().to_owned(),
            images: files.map(same_description).collect::<Result<_>>()?,
            leaf: file.clone(),
            image_file: file.identity(),
            parents: self.parents.iter().map(|parent| parent.path().to_owned()).collect(),
            parent_files: self.parent_files(),
            shared: Arc::downgrade(&self.shared),
            parameters: self.parameters,
            file_write_guid: self.file_write_guid,
            disk_id: self.disk_id,
            recoverable: self.recoverable,
            salvage: self.salvage,
            sync_times: self.sync_times.clone(),
            spare: SpareBuffers::default(),
        })
    }
}

/// Another descriptor of the same open file description: it shares the lock and the flags.
fn same_description(file: &ImageFile) -> Result<File> {
    let same = file.as_fd().try_clone_to_owned().doing("duplicating the image's descriptor");
    same.map(File::from).file(file.path())
}

/// The disk as the kernel sees it, with its data in `files`.
pub(super) fn parameters<'a>(
    files: impl Iterator<Item = &'a ImageFile>,
    metadata: &Metadata,
    read_only: bool,
) -> Result<Parameters> {
    let alignments = files.map(|file| file.memory_alignment(metadata.logical_sector_size));
    Ok(Parameters {
        size_bytes: metadata.virtual_size,
        logical_sector_bytes: metadata.logical_sector_size,
        physical_sector_bytes: metadata.physical_sector_size,
        read_only,
        memory_alignment_bytes: alignments.collect::<Result<Vec<_>>>()?.into_iter().max().unwrap_or(1),
    })
}

/// Replaces the engine of a read-only device, whose fronts never send anything. Keeps its ends of the
/// mailboxes.
pub struct NoEngine {
    _ends: EngineEnds,
    salvage: Option<Salvage>,
}

impl NoEngine {
    /// For a device of `opened`, which is only read.
    pub fn new(opened: &OpenImage, ends: EngineEnds) -> Self {
        Self { _ends: ends, salvage: opened.salvage }
    }

    /// Why a device is not changed, of which `consequence` follows if it is read-only.
    fn refusal(&self, device: u32, consequence: &str) -> Error {
        let message = match self.salvage {
            Some(_) => format!(
                "/dev/ublkb{device} shows what is left of a damaged image, to which nothing is written"
            ),
            None => format!("/dev/ublkb{device} is read-only: {consequence}"),
        };
        Error::new(Kind::Unsupported, message)
    }
}

impl EngineHandle for NoEngine {
    fn handover(&self) -> LeafHandover {
        LeafHandover::default()
    }

    fn settle(&self, _hold: bool, _patience: Duration) -> Result<()> {
        Ok(())
    }

    fn grow(&self, order: GrowOrder) {
        let error = self.refusal(order.device, "its disk keeps its size");
        let remedy = match self.salvage {
            Some(_) => "`vhdx-ublk salvage` makes an image of it, which can be resized",
            None => "remove the device (`vhdx-ublk del`), then resize its image",
        };
        (order.ended)(Err(error.remedy(remedy)), order.reply);
    }

    fn merge(&self, order: MergeOrder) {
        let error = self.refusal(order.device, "so are the layers of its chain");
        order.end(Err(error.remedy("remove the device (`vhdx-ublk del`), then merge its layers")));
    }

    fn compact(&self, order: CompactOrder) {
        let error = self.refusal(order.device, "nothing is written to its image");
        (order.ended)(Err(error.remedy("remove the device (`vhdx-ublk del`), then compact its image")));
    }

    fn snapshot(&self, order: SnapshotOrder) {
        let mut error = self.refusal(order.device, "a snapshot would be identical");
        if self.salvage.is_some() {
            error = error.remedy("`vhdx-ublk salvage` makes an image of it, which can be written");
        }
        order.reply.send(Err(error));
    }

    fn close(self) -> Result<()> {
        Ok(())
    }
}
