//! A disk that is read from any format: a VHDX chain, a VHD, a raw file or a block device.
//!
//! Whatever the format, a source is some files and the places of the disk's bytes in them, so that all that
//! reads disks is written once. Sources are locked for reading, and not a byte of them is changed: dirty logs
//! are replayed in memory.
//!
//! A [`Walk`] finds places, on one thread; any number of threads read them.

mod format;
mod vhd;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::opened::OpenChain;
use super::{Devices, locked, replaced};
use crate::chain::{Content, Member, ReadLayer, Search};
use crate::disk::{Access, BlockDevice, HostFile, ImageFile, Reactor, SharedFile, Stretch};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::index;
use crate::format::metadata::Metadata;
use crate::format::vhd::SECTOR;
use crate::image::Location;
use vhd::{Bitmap, Vhd};

use format::probe_named;
pub use format::{DiskFormat, FROM_QCOW2, TO_QCOW2};
pub(super) use format::{probe, refuse_images};

/// What is to be read.
#[derive(Clone, Debug)]
pub struct SourceRequest {
    /// The file or the block device.
    pub path: PathBuf,
    /// Its format; by default what its first and last bytes look like.
    pub format: Option<DiskFormat>,
    /// Where the parents of a VHDX are.
    pub search: Search,
}

/// An open disk.
pub struct Source {
    map: Map,
    files: Vec<SharedFile>,
    /// What keeps writers away.
    locks: Vec<Arc<ImageFile>>,
    /// The number of the block device that it is.
    device: Option<u64>,
    /// Bytes of the disk, whole sectors.
    size: u64,
    /// Zeros at its end that the file does not have.
    padding: u64,
    sectors: Sectors,
    format: DiskFormat,
}

/// Bytes of the sectors of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sectors {
    /// The smallest unit of I/O.
    pub logical: u32,
    /// The best unit of I/O.
    pub physical: u32,
}

/// What is said of a device that others may write to.
const IN_USE: &str = "the device is mounted, or another device uses it: what is written meanwhile may be \
    read in part (unmount it first, or read a snapshot of it)";

/// Where the bytes of the disk are.
enum Map {
    /// At the same offset of the only file.
    Same,
    Vhd(Vhd),
    Chain(Content<()>),
}

/// Bytes of the disk that lie together in one of the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Where they begin on the disk.
    pub start: u64,
    /// How many there are.
    pub length: u64,
    /// The number of the file.
    pub file: usize,
    /// Where they begin in it.
    pub offset: u64,
}

/// What disks without a format have, and VHDs, whose format does not say.
pub(super) const PLAIN: Sectors = Sectors { logical: 512, physical: 4096 };

/// The other sectors that an image may have.
const LARGE: Sectors = Sectors { logical: 4096, physical: 4096 };

impl From<&Metadata> for Sectors {
    fn from(metadata: &Metadata) -> Self {
        Self { logical: metadata.logical_sector_size, physical: metadata.physical_sector_size }
    }
}

impl Source {
    /// Opens and locks the disk.
    ///
    /// # Errors
    ///
    /// Those of finding, locking and reading the files; [`Kind::Unsupported`] for a format that is not read.
    pub fn open(request: &SourceRequest, reactor: &Reactor, devices: &dyn Devices) -> Result<Self> {
        let path = &request.path;
        if BlockDevice::is_at(path) {
            let device = BlockDevice::open(path, Access::ReadOnly)?;
            replaced::refuse_foreign_links(path, device.file())?;
            if device.is_in_use() {
                tracing::warn!("{}: {IN_USE}", path.display());
            }
            return Self::of_device(&device, request.format);
        }
        let file = locked::lock(path, Access::ReadOnly, devices)?;
        replaced::refuse_foreign_links(path, &file)?;
        let format = match request.format {
            Some(format) => format,
            None => probe_named(path, &file)?,
        };
        if format != DiskFormat::Vhdx {
            return Self::of_file(Arc::new(file), format);
        }
        // Another reader's lock does not keep this one out, and what it opens is what it examines.
        let chain = OpenChain::read(path, &request.search, reactor, devices)?;
        let layers = chain.content().layers().iter();
        let layers = layers.map(|layer| ReadLayer { disk: (), map: layer.map.clone() }).collect();
        let locks = chain.layers().iter().map(|layer| layer.file.clone()).collect();
        Self::of_layers(layers, locks, (&chain.leaf().metadata).into())
    }

    /// The disk in `file`, which the caller has made in this `format`, without parents, and has locked.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the file.
    pub fn of_made(file: Arc<ImageFile>, format: DiskFormat, reactor: &Reactor) -> Result<Self> {
        if format != DiskFormat::Vhdx {
            return Self::of_file(file, format);
        }
        let Member { file, image } = Member::read(reactor, file)?;
        let sectors = Sectors::from(&image.metadata);
        Self::of_layers(vec![ReadLayer { disk: (), map: image.into_map().into() }], vec![file], sectors)
    }

    /// The disk in `file`, which is not a VHDX.
    fn of_file(file: Arc<ImageFile>, format: DiskFormat) -> Result<Self> {
        let bytes = SharedFile::of(&file)?;
        let length = file.length().doing("reading the size of the file").file(file.path())?;
        let (map, size) = match format {
            DiskFormat::Raw => (Map::Same, length.next_multiple_of(SECTOR)),
            DiskFormat::Vhd => {
                let vhd = Vhd::read(&file, &bytes)?;
                let size = vhd.size;
                (Map::Vhd(vhd), size)
            }
            DiskFormat::Vhdx => unreachable!("a VHDX is a chain"),
        };
        let padding = if format == DiskFormat::Raw { size - length } else { 0 };
        let (files, locks) = (vec![bytes.past_cache()], vec![file]);
        Ok(Self { map, files, locks, device: None, size, padding, sectors: PLAIN, format })
    }

    /// The block device as a disk.
    ///
    /// # Errors
    ///
    /// [`Kind::Usage`] if it is to be read in another `format`.
    pub fn of_device(device: &BlockDevice, format: Option<DiskFormat>) -> Result<Self> {
        if let Some(format) = format.filter(|&format| format != DiskFormat::Raw) {
            let message = format!("a block device is read as a raw disk, not as {format}");
            return Err(Error::new(Kind::Usage, message).file(device.path()).remedy("leave --from out"));
        }
        Ok(Self {
            map: Map::Same,
            files: vec![SharedFile::of_device(device)?.past_cache()],
            locks: Vec::new(),
            device: Some(device.number()),
            size: device.length(),
            padding: 0,
            sectors: if device.sector_size() == LARGE.logical { LARGE } else { PLAIN },
            format: DiskFormat::Raw,
        })
    }

    fn of_layers(layers: Vec<ReadLayer<()>>, locks: Vec<Arc<ImageFile>>, sectors: Sectors) -> Result<Self> {
        let content = Content::new(layers);
        let files = locks.iter().map(|file| Ok(SharedFile::of(file)?.past_cache())).collect::<Result<_>>()?;
        let size = content.virtual_size();
        let (map, format) = (Map::Chain(content), DiskFormat::Vhdx);
        Ok(Self { map, files, locks, device: None, size, padding: 0, sectors, format })
    }

    /// Bytes of the disk: whole sectors.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Zeros at the end of the disk that its file does not have, which ends within a sector.
    pub fn padding(&self) -> u64 {
        self.padding
    }

    /// The sectors of the disk.
    pub fn sectors(&self) -> Sectors {
        self.sectors
    }

    /// The format.
    pub fn format(&self) -> DiskFormat {
        self.format
    }

    /// The file or device that was named.
    pub fn path(&self) -> &Path {
        self.files[0].path()
    }

    /// The files that places are in.
    pub fn files(&self) -> &[SharedFile] {
        &self.files
    }

    /// Whether `file` is one of the files.
    pub fn has(&self, file: HostFile) -> bool {
        self.locks.iter().any(|lock| lock.identity() == file)
    }

    /// The number of the block device that it is.
    pub fn device(&self) -> Option<u64> {
        self.device
    }

    /// Whether it is the block device of this number.
    pub fn is_device(&self, number: u64) -> bool {
        self.device == Some(number)
    }

    /// Reads `parts` of the disk into `bytes`, which begin at `start` on the disk; what no part covers is
    /// zeroed.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn read(&self, parts: &[Part], start: u64, bytes: &mut [u8]) -> Result<()> {
        let mut done = 0;
        for part in parts {
            let at = index(part.start - start);
            assert!(at >= done && part.length > 0, "parts are in order, {at} behind {done}");
            bytes[done..at].fill(0);
            done = at + index(part.length);
            self.files[part.file].read(part.offset, &mut bytes[at..done])?;
        }
        bytes[done..].fill(0);
        Ok(())
    }
}

/// Finds the places of a source, in ascending order for the most part.
pub struct Walk<'a> {
    source: &'a Source,
    /// What each file was last found to be like.
    stretches: Vec<Stretch>,
    bitmap: Bitmap,
}

impl<'a> Walk<'a> {
    /// A walk that begins anywhere.
    pub fn new(source: &'a Source) -> Self {
        let nowhere = Stretch { range: 0..0, stored: false };
        Self { source, stretches: vec![nowhere; source.files.len()], bitmap: Bitmap::default() }
    }

    /// The first byte from `from` on that may not be zero; the disk's size if there is none.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn next_data(&mut self, from: u64) -> Result<u64> {
        let mut at = from;
        while at < self.source.size {
            match self.place(at)? {
                (Some(_), _) => return Ok(at),
                (None, past) => at = past,
            }
        }
        Ok(at)
    }

    /// Where the data ends that byte `from` is in.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn data_end(&mut self, from: u64) -> Result<u64> {
        let mut at = from;
        while at < self.source.size {
            match self.place(at)? {
                (Some(_), past) => at = past,
                (None, _) => return Ok(at),
            }
        }
        Ok(at)
    }

    /// Gathers where the bytes of `range` are that may not be zero.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub fn parts(&mut self, range: Range<u64>) -> Result<Vec<Part>> {
        let mut parts: Vec<Part> = Vec::new();
        let end = range.end.min(self.source.size);
        let mut at = range.start;
        while at < end {
            let (place, past) = self.place(at)?;
            let past = past.min(end);
            if let Some((file, offset)) = place {
                let length = past - at;
                match parts.last_mut() {
                    Some(last) if last.is_before(at, file, offset) => last.length += length,
                    _ => parts.push(Part { start: at, length, file, offset }),
                }
            }
            at = past;
        }
        Ok(parts)
    }

    /// In which file and where in it byte `from` of the disk is, if it is anywhere and its file has stored
    /// it, and up to which byte of the disk that holds.
    fn place(&mut self, from: u64) -> Result<(Option<(usize, u64)>, u64)> {
        let Source { map, files, size, .. } = self.source;
        let (place, past) = match map {
            Map::Same => (Some((0, from)), *size),
            Map::Vhd(vhd) => {
                let (place, past) = vhd.place(&files[0], &mut self.bitmap, from)?;
                (place.map(|offset| (0, offset)), past)
            }
            Map::Chain(content) => match content.locate(from, *size) {
                (Location::File { layer, offset }, past) => (Some((layer.into(), offset)), past),
                (Location::Zero | Location::Undefined | Location::Below, past) => (None, past),
                (Location::Lost, _) => unreachable!("only a salvaged image has lost blocks"),
            },
        };
        assert!(past > from && past <= *size, "a walk advances, from {from} to {past}");
        let Some((file, offset)) = place else { return Ok((None, past)) };
        if !self.stretches[file].range.contains(&offset) {
            self.stretches[file] = files[file].stretch(offset)?;
        }
        let Stretch { range, stored } = &self.stretches[file];
        let past = past.min(from.saturating_add(range.end - offset));
        Ok((stored.then_some((file, offset)), past))
    }
}

impl Part {
    /// Whether byte `start` of the disk, at `offset` in `file`, is the one behind this part.
    fn is_before(&self, start: u64, file: usize, offset: u64) -> bool {
        self.start + self.length == start && self.file == file && self.offset + self.length == offset
    }
}
