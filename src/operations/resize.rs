//! Resizing the disk of an image at rest.
//!
//! The image is locked for writing, its parents for reading, and all that forbids the change is found first:
//! children that would no longer recognise it, partitions and volumes behind the new end, a file system
//! without room for a fixed image. Then the image changes as a whole or not at all
//! ([`WritableImage::resize`](crate::image::WritableImage::resize)); the same request again finds it done.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::children::children;
use super::contents::{self, Contents};
use super::{Devices, locked, room};
use crate::chain::{self, Content, Member, ReadLayer, Search};
use crate::disk::{Access, HostFile, Reactor, UringDisk};
use crate::error::{Error, Kind, Locate, Result};
use crate::format::MAX_VIRTUAL_SIZE;
use crate::format::metadata::{DiskType, Metadata};
use crate::image::{Image, Location, Resize, check, repair};
use crate::printable::{both_sizes, human_size, shell};

/// The size that a disk is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// So many bytes.
    To(u64),
    /// So many bytes more.
    More(u64),
    /// So many bytes fewer.
    Fewer(u64),
    /// What the partitions and volumes on it need.
    Minimum,
}

impl Size {
    /// The size that is meant of a disk of `before` bytes in sectors of `sector` bytes, which can shrink to
    /// `minimum` as far as that is known.
    ///
    /// # Errors
    ///
    /// [`Kind::Usage`] if no disk has such a size; [`Kind::Unsupported`] if the smallest one is not known.
    pub fn of_disk(self, before: u64, sector: u32, minimum: Option<u64>) -> Result<u64> {
        let usage = |message: String| Error::new(Kind::Usage, message);
        let sector = u64::from(sector);
        let after = match self {
            Self::To(bytes) => Some(bytes),
            Self::More(bytes) => before.checked_add(bytes),
            Self::Fewer(bytes) => Some(before.saturating_sub(bytes)),
            Self::Minimum => Some(minimum.map_or_else(|| Err(unknown()), Ok)?.min(before)),
        };
        let after = after.filter(|after| *after <= MAX_VIRTUAL_SIZE);
        let Some(after) = after else { return Err(usage("a disk cannot be larger than 64 TiB".into())) };
        if after == 0 {
            let error = usage(format!("nothing of the disk of {} bytes would be left", both_sizes(before)));
            return Err(error.remedy("leave at least one sector: `vhdx-ublk info` shows what the disk needs"));
        }
        if !after.is_multiple_of(sector) {
            let message = format!("a disk of {after} bytes is no whole number of sectors of {sector} bytes");
            return Err(usage(message).remedy(format!("--size {}", after.next_multiple_of(sector))));
        }
        Ok(after)
    }
}

/// What the user wants to be resized.
pub struct Request {
    /// The image.
    pub image: PathBuf,
    /// The size of its disk.
    pub size: Size,
    /// Where its parents are.
    pub search: Search,
    /// Whether its children may become unreadable, and what lies behind the new end may be lost.
    pub force: bool,
}

/// An image that is ready to be resized, locked with its parents.
pub struct LockedImage {
    path: PathBuf,
    file: HostFile,
    /// The disk as it is; its layers carry the locks.
    content: Content<UringDisk>,
    parent_bytes: u64,
    before: u64,
    after: u64,
    found: Contents,
}

impl LockedImage {
    /// Locks the image of `request` and its parents, and refuses what must not or cannot be done. Nothing is
    /// written.
    ///
    /// # Errors
    ///
    /// Those of finding, locking and reading the images; [`Kind::Usage`] if a disk cannot have the size;
    /// [`Kind::InUse`] if the image has children, or a device serves it; [`Kind::Unsupported`] if something
    /// on the disk lies behind the new end; [`Kind::NoSpace`] if a fixed image lacks room.
    pub fn open(request: &Request, reactor: &Reactor, devices: &dyn Devices) -> Result<Self> {
        let leaf = locked::open_named(reactor, &request.image, devices)?;
        let path = leaf.file.path().to_owned();
        leaf.image.check_writable().file(&path)?;
        let open = |path: &Path| locked::open(reactor, path, Access::ReadOnly, devices);
        let parents = chain::open_parents(&leaf, &request.search, open)?;
        let metadata = leaf.image.metadata.clone();
        let before = metadata.virtual_size;
        let is_parent = refuse_children(&leaf, request, devices);
        let file = leaf.file.clone();
        let parent_bytes = parents.first().map_or(0, |parent| parent.image.metadata.virtual_size);
        let content = content(leaf, parents, reactor)?;
        let found = reactor.block_on(contents::find(&content));
        let sector = metadata.logical_sector_size;
        let after = request.size.of_disk(before, sector, found.minimum_size()).file(&path)?;
        if after != before {
            is_parent?;
        }
        if after < before && !request.force {
            refuse_loss(&path, &content, &found, after)?;
        }
        if after > before && metadata.kind() == DiskType::Fixed {
            let more = added_bytes(&metadata, after);
            let needs = format!("a fixed image that grows to {} needs", human_size(after));
            room::require(file.host_room(), more, &needs).map_err(with_remedy).file(&path)?;
        }
        Ok(Self { path, file: file.identity(), content, parent_bytes, before, after, found })
    }

    /// The file of the image.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which file that is.
    pub fn file(&self) -> HostFile {
        self.file
    }

    /// The size of the disk, bytes.
    pub fn before(&self) -> u64 {
        self.before
    }

    /// The size that it is to have, bytes.
    pub fn after(&self) -> u64 {
        self.after
    }

    /// What the partitions and volumes on the disk need, bytes, if any was recognised.
    pub fn minimum(&self) -> Option<u64> {
        self.found.minimum_size()
    }

    /// What is on the disk.
    pub fn contents(&self) -> &Contents {
        &self.found
    }

    /// Whether the second copy of a GPT is not at the end of the disk any longer.
    pub fn strands_gpt(&self) -> bool {
        self.found.has_gpt() && self.after != self.before
    }

    /// Resizes the disk. If it has the size, at most space is given back that an interrupted resize has left.
    ///
    /// # Errors
    ///
    /// Those of [`WritableImage::resize`](crate::image::WritableImage::resize): the disk reads as before, or
    /// as it is to be.
    pub fn resize(self, reactor: &Reactor) -> Result<()> {
        let disk = &self.content.layers()[0].disk;
        if self.after == self.before {
            return reactor.block_on(give_back(disk)).map_err(with_remedy).file(&self.path);
        }
        let change = async {
            let image = Image::open_for_writing(disk, Uuid::new_v4).await?;
            let metadata = Metadata { virtual_size: self.after, ..image.metadata.clone() };
            let data_write = Some(Uuid::new_v4());
            let to = Resize { metadata, parent_bytes: self.parent_bytes, data_write, zero_from: None };
            image.resize(disk, &to, Uuid::new_v4).await
        };
        reactor.block_on(change).map(drop).map_err(with_remedy).file(&self.path)
    }
}

/// Gives back what nothing in the image names, if that is all that is to be done in it.
async fn give_back(disk: &UringDisk) -> Result<()> {
    let found = check(disk).await?;
    if found.corruptions == 0 && (found.leaks > 0 || found.unused_tail_bytes > 0) {
        repair(disk, Uuid::new_v4).await?;
    }
    Ok(())
}

/// What a reader of the chain sees.
fn content(leaf: Member, parents: Vec<Member>, reactor: &Reactor) -> Result<Content<UringDisk>> {
    let mut layers = Vec::new();
    for Member { file, image } in std::iter::once(leaf).chain(parents) {
        let disk = reactor.disk(file.clone());
        reactor.block_on(image.read_bitmaps(&disk)).file(file.path())?;
        layers.push(ReadLayer { disk, map: image.into_map().into() });
    }
    Ok(Content::new(layers))
}

/// Refuses an image that others were made of: what they do not have themselves would no longer be what it
/// was.
fn refuse_children(leaf: &Member, request: &Request, devices: &dyn Devices) -> Result<()> {
    let found = children(leaf, &request.search, devices);
    if found.is_empty() {
        return Ok(());
    }
    let names: Vec<String> = found.iter().map(|child| child.display().to_string()).collect();
    let names = names.join(", ");
    let path = leaf.file.path();
    if request.force {
        tracing::warn!("{}: it is the parent of {names}, which can no longer be read", path.display());
        return Ok(());
    }
    let message = format!("it is the parent of {names}: resizing it would make its children unreadable");
    let remedy = format!(
        "resize the child, which may be larger than its parent, or merge it (`vhdx-ublk merge {}`) first; \
         --force gives the children up",
        shell(&found[0])
    );
    Err(Error::new(Kind::InUse, message).file(path).remedy(remedy))
}

/// What is on the disk is not recognised.
fn unknown() -> Error {
    let message = "no partition table and no volume is recognised on the disk: its smallest size is unknown";
    Error::new(Kind::Unsupported, message).remedy("say the size: --size SIZE")
}

/// Refuses an end of the disk before that of something on it.
fn refuse_loss(path: &Path, content: &Content<UringDisk>, found: &Contents, after: u64) -> Result<()> {
    let refused = |message: String, remedy: String| {
        Err(Error::new(Kind::Unsupported, message).file(path).remedy(remedy))
    };
    let Some(minimum) = found.minimum_size() else {
        let Some(at) = first_data(content, after) else { return Ok(()) };
        let message =
            format!("there is data at byte {at} of the disk, and nothing there is recognised as unused");
        let remedy = "shrink what is on the disk first, and use --force if nothing behind the new end counts";
        return refused(message, remedy.into());
    };
    if after < minimum {
        let message = format!("{}, and the disk would end at byte {after}", what_needs(found, after));
        let remedy = format!(
            "the smallest size is --size {minimum}; to go below, first shrink what is on the disk; \
             --force loses what lies behind the new end"
        );
        return refused(message, remedy);
    }
    // Without its second copy a GPT is as good: it stays behind whenever a disk has shrunk.
    let is_doubt = |fault: &&String| !fault.starts_with("the backup GPT ");
    if let Some(fault) = found.faults.iter().find(is_doubt) {
        let message = format!("what is on the disk is not certain: {fault}");
        let remedy = "repair the partition table first, or use --force if nothing behind the new end counts";
        return refused(message, remedy.into());
    }
    Ok(())
}

/// What of the disk would not fit `after` bytes.
fn what_needs(found: &Contents, after: u64) -> String {
    let behind = found.partitions().iter().filter(|partition| partition.end() > after);
    if let Some(last) = behind.max_by_key(|partition| partition.end()) {
        let name = last.name.as_ref().map(|name| format!(" {name:?}")).unwrap_or_default();
        return format!("partition {}{name} ends at byte {}", last.number, last.end());
    }
    match &found.volume {
        Some(volume) => {
            let size = volume.size.map(|size| format!(" of {}", both_sizes(size))).unwrap_or_default();
            format!("the disk holds a volume{size}: {}", volume.kind.name())
        }
        None if found.has_gpt() => {
            "the second copy of the partition table needs room behind the last partition".into()
        }
        None => found
            .faults
            .first()
            .map_or_else(|| "the table does not say where the data of the disk ends".into(), String::clone),
    }
}

/// The first byte from `from` on that a file has.
fn first_data(content: &Content<UringDisk>, from: u64) -> Option<u64> {
    let (mut at, end) = (from, content.virtual_size());
    while at < end {
        match content.locate(at, end) {
            (Location::File { .. }, _) => return Some(at),
            (_, past) => at = past,
        }
    }
    None
}

/// What the new blocks of a disk of `after` bytes take.
fn added_bytes(metadata: &Metadata, after: u64) -> u64 {
    let block = u64::from(metadata.block_size);
    let blocks = |bytes: u64| bytes.div_ceil(block);
    assert!(after > metadata.virtual_size, "the disk grows");
    (blocks(after) - blocks(metadata.virtual_size)) * block
}

/// A resize that failed is done again.
fn with_remedy(error: Error) -> Error {
    match error.kind() {
        Kind::NoSpace => error.remedy(
            "free space on the file system, or raise the file size limit (`ulimit -f`; FAT ends at 4 GiB), \
             and resize again; the disk reads as before",
        ),
        Kind::Io => error
            .remedy("find the cause (dmesg), and resize again: the disk reads as before or as it is to be"),
        _ => error,
    }
}
