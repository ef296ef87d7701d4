//! The target of a conversion: a new file, or what exists already, or standard output.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use nix::sys::stat::fstat;
use nix::unistd::geteuid;
use uuid::Uuid;

use super::copy::Layout;
use super::vhd_draft::VhdDraft;
use super::{Conversion, Converted, Output, Shape, kinship};
use crate::disk::{
    Access, BlockDevice, CHOOSE, Disk, HostFile, HostRoom, ImageFile, Place, REPLACE, Reactor, ReadDisk,
    Remover, SharedFile, Sparse, Unfinished, dangling, folder_of, missing_folder, taken,
};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::operations::children::refuse_replacing_parent;
use crate::operations::source::{DiskFormat, Sectors, Source, probe};
use crate::operations::{Devices, locked, replaced, room};
use crate::printable::{both_sizes, shell};

/// What a file lets its owner do in any case.
const PRIVATE: u32 = 0o600;

/// An open target.
pub(super) enum Target {
    New(NewTarget),
    Old(OldTarget),
    Stream,
}

/// A file that is made beside the name that it will have.
pub(super) struct NewTarget {
    unfinished: Unfinished,
    image: Arc<ImageFile>,
    file: SharedFile,
    place: Place,
    /// What has the name now.
    old: Option<ImageFile>,
}

/// A block device or a raw file that is overwritten.
pub(super) struct OldTarget {
    held: Held,
    file: SharedFile,
    /// The bytes that it has.
    capacity: u64,
}

/// What keeps others away from it.
enum Held {
    Device(BlockDevice),
    File(Arc<ImageFile>),
}

/// Fails if the target must not or cannot be made. Nothing is changed.
///
/// # Errors
///
/// As [`Conversion::run`].
pub(super) fn check(
    conversion: &Conversion,
    source: Option<&Source>,
    planned: Converted,
    devices: &dyn Devices,
) -> Result<()> {
    match &conversion.output {
        Output::Stream => Ok(()),
        Output::Existing(path) => {
            OldTarget::open(path, &conversion.shape, source, planned.size, devices).map(drop)
        }
        Output::File { path, replace } => {
            lock_old(path, *replace, conversion.shape.format, source, devices)?;
            check_room(conversion, path, planned)
        }
    }
}

impl Target {
    /// Opens the target, or makes its file.
    ///
    /// # Errors
    ///
    /// As [`Conversion::run`].
    pub(super) fn begin(
        conversion: &Conversion,
        source: Option<&Source>,
        planned: Converted,
        devices: &dyn Devices,
    ) -> Result<Self> {
        let shape = &conversion.shape;
        match &conversion.output {
            Output::Stream => Ok(Self::Stream),
            Output::Existing(path) => {
                OldTarget::open(path, shape, source, planned.size, devices).map(Self::Old)
            }
            Output::File { path, replace } => {
                let old = lock_old(path, *replace, shape.format, source, devices)?;
                check_room(conversion, path, planned)?;
                NewTarget::make(path, old, conversion.sparse).map(Self::New)
            }
        }
    }

    /// The file that is written, unless it is a stream.
    pub(super) fn file(&self) -> Option<&SharedFile> {
        match self {
            Self::New(NewTarget { file, .. }) | Self::Old(OldTarget { file, .. }) => Some(file),
            Self::Stream => None,
        }
    }

    /// What removes the target if the program must end; nothing where it was there before.
    pub(super) fn remover(&self) -> Option<Remover> {
        match self {
            Self::New(new) => Some(new.unfinished.remover()),
            Self::Old(_) | Self::Stream => None,
        }
    }

    /// The bytes of what is overwritten, if it has old content.
    pub(super) fn capacity(&self) -> Option<u64> {
        match self {
            Self::Old(old) => Some(old.capacity),
            Self::New(_) | Self::Stream => None,
        }
    }

    /// Where the disk's bytes go. The file of a disk of known size gets the space that it must have from the
    /// start.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub(super) fn layout(
        &self,
        conversion: &Conversion,
        sectors: Sectors,
        planned: Converted,
        reactor: &Reactor,
    ) -> Result<Layout> {
        let new = match self {
            Self::Stream => {
                let output = io::stdout().as_fd().try_clone_to_owned().doing("opening standard output")?;
                return Ok(Layout::Stream(File::from(output)));
            }
            Self::Old(old) => return Ok(Layout::Same { capacity: Some(old.capacity) }),
            Self::New(new) => new,
        };
        let shape = &conversion.shape;
        let layout = match (shape.format, planned.size) {
            (DiskFormat::Raw, _) => Layout::Same { capacity: None },
            (DiskFormat::Vhd, size) => Layout::Vhd(VhdDraft::new(shape.fixed, size)),
            (DiskFormat::Vhdx, Some(size)) => Layout::Vhdx(shape.image(size, sectors).draft()?),
            (DiskFormat::Vhdx, None) => Layout::Vhdx(shape.image(0, sectors).draft_of_unknown_size()?),
        };
        // Hosts let direct writes run side by side only within the length of the file.
        let ahead = new.file.is_written_past_cache() && !conversion.ignore_room;
        let reserve = reserves(conversion);
        let length = match (shape.format, planned.measured) {
            (DiskFormat::Raw, Some(measured)) => measured.fully_allocated,
            (_, Some(measured)) if new.image.is_dense() || shape.fixed || ahead => measured.required,
            _ => 0,
        };
        let disk = reactor.disk(new.image.clone());
        let made = reactor.block_on(async {
            disk.grow(length).await?;
            if reserve { disk.reserve(0, length).await } else { Ok(()) }
        });
        made.doing("making the file").file(new.place.path())?;
        Ok(layout)
    }

    /// Writes what is missing when a disk of `size` bytes is in the target, and makes all of it durable.
    ///
    /// # Errors
    ///
    /// What the operating system says.
    pub(super) fn finish(&self, layout: Layout, size: u64, reactor: &Reactor) -> Result<()> {
        match (self, layout) {
            (Self::New(new), Layout::Vhdx(draft)) => new.finish_vhdx(draft, size, reactor),
            (Self::New(new), Layout::Vhd(draft)) => {
                draft.finish(&new.file, size)?;
                new.file.sync()
            }
            (Self::New(new), Layout::Same { .. }) => {
                let disk = reactor.disk(new.image.clone());
                let grown = reactor.block_on(disk.grow(size));
                grown.doing("setting the length of the file").file(new.place.path())?;
                new.file.sync()
            }
            (Self::Old(old), Layout::Same { .. }) => {
                old.file.zero(size..old.capacity)?;
                old.file.sync()
            }
            (Self::Stream, Layout::Stream(_)) => Ok(()),
            _ => unreachable!("each target has made its layout"),
        }
    }

    /// The target as a disk, from what the host has stored of it; its path. Nothing for a stream.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with it.
    pub(super) fn read_back(&self, format: DiskFormat, reactor: &Reactor) -> Result<Option<Source>> {
        let file = match self {
            Self::Stream => return Ok(None),
            Self::New(new) => &new.image,
            Self::Old(OldTarget { held: Held::File(image), .. }) => image,
            Self::Old(OldTarget { held: Held::Device(device), file, .. }) => {
                file.read_anew();
                return Source::of_device(device, None).map(Some);
            }
        };
        file.read_anew();
        Source::of_made(file.clone(), format, reactor).map(Some)
    }

    /// Gives a new file its name.
    ///
    /// # Errors
    ///
    /// [`Kind::Exists`] if something else has the name by now; what the operating system says.
    pub(super) fn name(self, source: Option<&Source>) -> Result<()> {
        let Self::New(NewTarget { unfinished, image, place, old, .. }) = self else { return Ok(()) };
        let Some(old) = old else { return unfinished.name(&place).map_err(exists) };
        let owner = fstat(&old).doing("examining the file").file(place.path())?.st_uid;
        let most = match source {
            Some(source) => readers_of(source, owner)?,
            None => (owner == geteuid().as_raw()).then_some(0o777),
        };
        if let Some(most) = most {
            image.resemble(&old, most | PRIVATE)?;
        } else {
            let path = place.path().display();
            tracing::warn!(
                "{path}: it becomes yours, and only you can read it, as its owner does not own the source; \
                 to give it back: chown {owner} {}",
                shell(place.path())
            );
        }
        unfinished.replace(&place, &old)
    }
}

/// What all files of `source` let others do, if `owner` may read what is in them: the owner of each, or this
/// user.
fn readers_of(source: &Source, owner: u32) -> Result<Option<u32>> {
    let mut most = 0o777;
    for file in source.files() {
        let (of_file, mode) = file.owner_and_mode()?;
        if owner != of_file && owner != geteuid().as_raw() {
            return Ok(None);
        }
        most &= mode;
    }
    Ok(Some(most))
}

impl NewTarget {
    fn make(path: &Path, old: Option<ImageFile>, sparse: Sparse) -> Result<Self> {
        let place = match &old {
            Some(old) => Place::of_file(old)?,
            None => Place::of(path)?,
        };
        let unfinished = Unfinished::default();
        let name = OsString::from(format!(".vhdx-ublk-{}.tmp", Uuid::new_v4().simple()));
        let image = unfinished.create(place.beside(&name)?)?;
        image.set_sparse(sparse);
        let file = SharedFile::of(&image)?.called(place.path()).written_past_cache();
        Ok(Self { unfinished, image, file, place, old })
    }

    fn finish_vhdx(&self, mut draft: crate::image::Draft, size: u64, reactor: &Reactor) -> Result<()> {
        draft.set_size(size)?;
        let disk = reactor.disk(self.image.clone());
        let finished = async {
            // The file got more than turned out to be needed, where data was zero.
            if disk.length().await.doing("reading the length of the file")? > draft.length() {
                disk.truncate(draft.length()).await.doing("cutting the file")?;
            }
            draft.finish(&disk, Uuid::new_v4).await
        };
        reactor.block_on(finished).file(self.place.path())
    }
}

impl OldTarget {
    fn open(
        path: &Path,
        shape: &Shape,
        source: Option<&Source>,
        size: Option<u64>,
        devices: &dyn Devices,
    ) -> Result<Self> {
        assert_eq!(shape.format, DiskFormat::Raw, "what exists is overwritten with the disk itself");
        let target = if BlockDevice::is_at(path) {
            let device = BlockDevice::open(path, Access::ReadWrite)?;
            if source.is_some_and(|source| kinship::holds(device.number(), source)) {
                return Err(replaced::own_source(path));
            }
            replaced::refuse_foreign_links(path, device.file())?;
            if let Some(source) = source.filter(|source| source.sectors().logical != device.sector_size()) {
                tracing::warn!(
                    "{}: it has sectors of {} bytes, and the disk of {}: partition tables count in sectors, \
                     and may not be understood",
                    path.display(),
                    device.sector_size(),
                    source.sectors().logical
                );
            }
            let file = SharedFile::of_device(&device)?.written_past_cache();
            Self { capacity: device.length(), file, held: Held::Device(device) }
        } else {
            Self::open_file(path, source, devices)?
        };
        let Some(size) = size.filter(|&size| size > target.capacity) else { return Ok(target) };
        let message =
            format!("it has {} bytes, and the disk {}", both_sizes(target.capacity), both_sizes(size));
        Err(Error::new(Kind::NoSpace, message).file(path).remedy("name a larger target"))
    }

    fn open_file(path: &Path, source: Option<&Source>, devices: &dyn Devices) -> Result<Self> {
        refuse_source(path, source)?;
        let image = locked::lock(path, Access::ReadWrite, devices)?;
        replaced::refuse_foreign_links(path, &image)?;
        if probe(&image)? != DiskFormat::Raw {
            let message = "it is an image, and --existing writes the disk itself";
            let remedy = format!(
                "leave --existing out and replace it with --force; or serve it (`vhdx-ublk add {}`) and name \
                 its device",
                shell(path)
            );
            return Err(Error::new(Kind::Unsupported, message).file(path).remedy(remedy));
        }
        let capacity = image.length().doing("reading the size of the file").file(path)?;
        let file = SharedFile::of(&image)?.written_past_cache();
        Ok(Self { held: Held::File(Arc::new(image)), file, capacity })
    }
}

/// Locks the file that is to be replaced, if there is one, and refuses one that must not be.
fn lock_old(
    path: &Path,
    replace: bool,
    format: DiskFormat,
    source: Option<&Source>,
    devices: &dyn Devices,
) -> Result<Option<ImageFile>> {
    refuse_source(path, source)?;
    if std::fs::symlink_metadata(path).is_err() {
        return Ok(None);
    }
    if let Some(error) = dangling(path) {
        return Err(error);
    }
    if !replace {
        return Err(exists(taken(path)));
    }
    refuse_replacing_parent(path, devices)?;
    let old = locked::lock(path, Access::ReadWrite, devices)?;
    replaced::refuse_foreign_links(path, &old)?;
    let is_empty = old.length().doing("reading the size of the file").file(path)? == 0;
    let is_image = || probe(&old).is_ok_and(|found| found != DiskFormat::Raw);
    if is_empty || format == DiskFormat::Raw || is_image() {
        return Ok(Some(old));
    }
    let message =
        format!("it is not a disk image, and --force replaces only images and empty files by a {format}");
    Err(Error::new(Kind::Unsupported, message).file(path).remedy(CHOOSE))
}

fn refuse_source(path: &Path, source: Option<&Source>) -> Result<()> {
    let Ok(found) = HostFile::at(path) else { return Ok(()) };
    if source.is_some_and(|source| source.has(found)) { Err(replaced::own_source(path)) } else { Ok(()) }
}

fn exists(error: Error) -> Error {
    match error.kind() {
        Kind::Exists => error.remedy(REPLACE),
        _ => error,
    }
}

/// Whether the target has all its space from the start.
fn reserves(conversion: &Conversion) -> bool {
    let Conversion { shape, sparse, .. } = conversion;
    shape.fixed && (*sparse == Sparse::No || *sparse == Sparse::Auto && !shape.azure)
}

fn check_room(conversion: &Conversion, path: &Path, planned: Converted) -> Result<()> {
    let Some(measured) = planned.measured.filter(|_| !conversion.ignore_room) else { return Ok(()) };
    let needed = match conversion.shape.format {
        DiskFormat::Raw if conversion.sparse == Sparse::No => measured.fully_allocated,
        // It is as sparse as a raw file, whatever its length.
        DiskFormat::Vhd if conversion.shape.fixed && !reserves(conversion) => return Ok(()),
        _ => measured.required,
    };
    let required = room::require(HostRoom::at(folder_of(path)), needed, "the target needs at most");
    required.map_err(|error| match missing_folder(error, folder_of(path)).file(path) {
        error if error.kind() == Kind::NoSpace => error.remedy(
            "free space; or, if much of the disk is zeros that its file has stored, begin all the same: \
             --ignore-room",
        ),
        error => error,
    })
}
