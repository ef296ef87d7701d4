//! Converting a disk: into another format, or into an image of its own.
//!
//! A target is written in its final form, beside its name, and without a log: it is nothing until it is
//! whole. Order:
//!
//! 1. everything is refused that can be: before that, nothing is made;
//! 2. the blocks are written, then the metadata, and all of it is synced;
//! 3. if that is wanted, the target is read back and compared with its source;
//! 4. the target gets its name. A power cut before that leaves a file `.vhdx-ublk-*.tmp`, and what had the
//!    name before.
//!
//! A target that exists, a block device or a raw file, is overwritten in place and has no such protection.
//!
//! The memory is a few pieces, the maps of the source, and at most 8 bytes for each block of the target.

mod copy;
mod feed;
mod kinship;
mod measure;
mod shape;
mod target;
mod vhd_draft;

use std::path::PathBuf;

use super::compare::compare;
use super::source::{DiskFormat, PLAIN, Sectors, Source, SourceRequest};
use super::{Devices, Watch};
use crate::disk::{Reactor, Sparse};
use crate::error::{Error, Kind, Locate, Result};
use copy::{Copied, Copy};
use feed::Feed;
use target::Target;

pub use measure::{Measured, measure};
pub use shape::Shape;

/// Where the disk comes from.
#[derive(Clone, Debug)]
pub enum Input {
    /// From a file or a block device.
    Disk(SourceRequest),
    /// A raw disk, from standard input.
    Stream {
        /// Whether it is a raw disk even if it looks like an image.
        any_content: bool,
    },
}

/// Where it goes.
#[derive(Clone, Debug)]
pub enum Output {
    /// Into a new file.
    File {
        /// Its name.
        path: PathBuf,
        /// Whether a file that has the name is replaced.
        replace: bool,
    },
    /// Into a block device or a raw file that exists.
    Existing(PathBuf),
    /// Raw, to standard output.
    Stream,
}

/// A conversion that is to be made.
pub struct Conversion {
    /// Where the disk comes from.
    pub input: Input,
    /// Where it goes.
    pub output: Output,
    /// What it becomes.
    pub shape: Shape,
    /// Whether the file of the target may have holes.
    pub sparse: Sparse,
    /// Whether the target is read back and compared.
    pub verify: bool,
    /// Whether the conversion begins although the room may be too small.
    pub ignore_room: bool,
}

/// What a conversion has made, or would make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Converted {
    /// Bytes of the disk; unknown for a stream that was not read yet.
    pub size: Option<u64>,
    /// What the target takes; unknown for a stream.
    pub measured: Option<Measured>,
    /// Bytes that were written to the target, its metadata apart.
    pub written: u64,
    /// Bytes that the target shares with the source.
    pub shared: u64,
}

impl Conversion {
    /// Converts.
    ///
    /// # Errors
    ///
    /// Those of opening the source; [`Kind::Unsupported`] if the target cannot hold the disk;
    /// [`Kind::Exists`] if there is a file that is not to be replaced; [`Kind::InUse`] if it is in use or has
    /// children; [`Kind::Usage`] if it belongs to the source; [`Kind::NoSpace`]; those of reading and
    /// writing. What was there before is there then, unless the target existed, and no unfinished file.
    pub fn run(&self, devices: &dyn Devices, watch: &dyn Watch) -> Result<Converted> {
        let reactor = Reactor::new()?;
        let (source, planned) = self.prepare(&reactor, devices)?;
        let target = Target::begin(self, source.as_ref(), planned, devices)?;
        target.remover().into_iter().for_each(|remover| watch.unfinished(remover));
        let sectors = source.as_ref().map_or(PLAIN, Source::sectors);
        let layout = target.layout(self, sectors, planned, &reactor).map_err(|error| self.explain(error))?;
        let over_old = target.capacity();
        let with_zeros = over_old.is_some() || matches!(self.output, Output::Stream);
        let feed = match &source {
            Some(source) => {
                let size = over_old.or(planned.size).expect("a disk has a size");
                Feed::of_disk(source, size, with_zeros)
            }
            None => Feed::of_stream(with_zeros, self.takes_any_content(), self.shape.most())?,
        };
        let copy = Copy::new(feed, source.as_ref(), target.file(), layout, over_old.is_some());
        let Copied { layout, size, written, shared } =
            copy.run(watch).map_err(|error| self.explain(error))?;
        if size == 0 {
            let error = Error::new(Kind::Unsupported, "standard input has no bytes: the disk has no sectors");
            return Err(error.remedy("see whether the program before the pipe has failed"));
        }
        let size = if source.is_some() { size } else { self.shape.disk_size(size, sectors)? };
        let finished = target.finish(layout, size, &reactor);
        finished.map_err(|error| self.explain(error))?;
        if let Some(source) = source.as_ref().filter(|_| self.verify)
            && let Some(made) = target.read_back(self.shape.format, &reactor)?
        {
            verify(source, &made, watch)?;
        }
        target.name(source.as_ref())?;
        Ok(Converted { size: Some(size), measured: planned.measured, written, shared })
    }

    /// Does all that comes before the first write: what would be made, if nothing forbids it.
    ///
    /// # Errors
    ///
    /// As [`Self::run`].
    pub fn plan(&self, devices: &dyn Devices) -> Result<Converted> {
        let reactor = Reactor::new()?;
        let (source, planned) = self.prepare(&reactor, devices)?;
        target::check(self, source.as_ref(), planned, devices)?;
        Ok(planned)
    }

    /// Opens the source, and computes what it becomes.
    fn prepare(&self, reactor: &Reactor, devices: &dyn Devices) -> Result<(Option<Source>, Converted)> {
        let Input::Disk(request) = &self.input else {
            return Ok((None, Converted { size: None, measured: None, written: 0, shared: 0 }));
        };
        let source = Source::open(request, reactor, devices)?;
        let size = self.shape.disk_size(source.size(), source.sectors()).file(source.path())?;
        let measured = Some(measure(&source, &self.shape).file(source.path())?);
        self.note(&source, size);
        Ok((Some(source), Converted { size: Some(size), measured, written: 0, shared: 0 }))
    }

    fn takes_any_content(&self) -> bool {
        matches!(self.input, Input::Stream { any_content: true })
    }

    /// Says what the user may not expect.
    fn note(&self, source: &Source, size: u64) {
        let path = source.path().display();
        if source.padding() > 0 {
            tracing::warn!("{path}: it ends within a sector: {} bytes of zeros are added", source.padding());
        }
        if size > source.size() {
            let added = size - source.size();
            tracing::warn!("{path}: {added} bytes of zeros are added, so that the disk has whole MiB");
        }
        let (Sectors { logical: from, .. }, Sectors { logical: to, .. }) =
            (source.sectors(), self.shape.sectors(source.sectors()));
        if from != to {
            tracing::warn!(
                "{path}: its sectors of {from} bytes become sectors of {to}: partition tables count in \
                 sectors, and may not be understood"
            );
        } else if from != 512 && self.shape.format == DiskFormat::Raw {
            tracing::warn!(
                "{path}: the disk has sectors of {from} bytes, which a raw file does not say: attach it with \
                 losetup --sector-size {from}"
            );
        }
    }

    fn explain(&self, error: Error) -> Error {
        let error = match &self.output {
            Output::Existing(path) if error.file_path().is_none() => error.file(path),
            _ => error,
        };
        let kept = matches!(self.output, Output::File { .. });
        match error.kind() {
            Kind::NoSpace if kept => error.remedy(
                "free space on the file system, or raise the file size limit (`ulimit -f`; FAT ends at \
                 4 GiB); no unfinished target is left",
            ),
            Kind::Stopped if kept => error.remedy("run the command again; no unfinished target is left"),
            Kind::Stopped => error.remedy("run the command again: a part of the target is overwritten"),
            _ => error,
        }
    }
}

/// Fails unless the target reads as its source.
fn verify(source: &Source, target: &Source, watch: &dyn Watch) -> Result<()> {
    let Some(at) = compare(source, target, watch)?.difference else { return Ok(()) };
    let message =
        format!("it does not read back as its source: the first difference is at byte {at} of the disk");
    let error = Error::new(Kind::Io, message).file(target.path());
    Err(error.remedy("the host, its memory or its disk is failing: look at dmesg; the target is not kept"))
}
