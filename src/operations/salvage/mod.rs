//! Salvaging a damaged image: a copy of what is left of its disk, and a list of what is not.
//!
//! The source is only read. What cannot be known of the disk is zeros in the copy, and listed in a mapfile;
//! no byte that is wrong is listed as right, as far as the structures that are left say.
//!
//! Order: the copy is synced and gets its name first, then the mapfile. A power cut between the two leaves a
//! copy without its mapfile, and never a mapfile of a copy that is not whole.

mod copy;
mod mapfile;
mod output;
mod remains;
mod tally;

use std::fs::File;
use std::io::{self, BufWriter};
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

pub use copy::{ImageTarget, RawTarget, Target, copy};
pub use mapfile::Mapfile;
pub use remains::{Remains, RemainsLayer, Status, Totals};
pub use tally::{PartitionTally, Tally};

use self::copy::Named;
use self::output::{Output, is_image, is_mapfile};
use super::{Devices, Watch, contents, locked, replaced, room};
use crate::chain::{self, Relative, Search};
use crate::disk::{Access, Disk, HostFile, ImageFile, PAGE_BYTES, Reactor, UringDisk};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::metadata::Metadata;
use crate::image::{BlockMap, DEFAULT_LOG_LENGTH, InitialState, NewImage, Note, Salvaged};

/// A damaged image that is open, with its parents as far as they were found.
pub struct Damaged {
    files: Vec<Arc<ImageFile>>,
    remains: Remains<UringDisk>,
    missing_parent: Option<Error>,
    left_session: Option<Error>,
}

/// What the copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Form {
    /// The disk itself.
    Raw,
    /// A dynamic image.
    Vhdx,
}

/// What is made of a damaged image.
pub struct Copy {
    /// What the copy is.
    pub form: Form,
    /// The file that gets the content of the disk.
    pub target: PathBuf,
    /// The file that lists which bytes came back.
    pub mapfile: Option<PathBuf>,
    /// Whether files that are there are replaced.
    pub replace: bool,
    /// Whether what is a guess is used.
    pub assume: bool,
}

/// An image of the chain while its parents are searched for.
struct Member {
    file: Arc<ImageFile>,
    image: Salvaged,
    /// One that no child knows, if the image's own is lost.
    data_write_guid: Uuid,
}

impl Member {
    fn read(file: Arc<ImageFile>, reactor: &Reactor) -> Result<Self> {
        let image = reactor.block_on(Salvaged::read(&reactor.disk(file.clone()))).file(file.path())?;
        let data_write_guid = image.data_write_guid().unwrap_or_else(Uuid::new_v4);
        Ok(Self { file, image, data_write_guid })
    }
}

impl Relative for Member {
    fn metadata(&self) -> &Metadata {
        self.image.metadata()
    }

    fn data_write_guid(&self) -> Uuid {
        self.data_write_guid
    }

    fn resident_bytes(&self) -> u64 {
        self.image.resident_bytes()
    }

    fn path(&self) -> &Path {
        self.file.path()
    }
}

impl Damaged {
    /// Opens the image at `path`, and its parents where `search` leads to them. All of them are locked for
    /// reading.
    ///
    /// # Errors
    ///
    /// Those of [`Salvaged::read`]; [`Kind::InUse`] if another process writes to the image, or a device waits
    /// for a new daemon to serve it. What is wrong with a parent is no error.
    pub fn open(path: &Path, search: &Search, reactor: &Reactor, devices: &dyn Devices) -> Result<Self> {
        let lock = |path: &Path| locked::lock(path, Access::ReadOnly, devices);
        let file = lock(path)?;
        replaced::refuse_foreign_links(path, &file)?;
        Self::read(Arc::new(file), search, reactor, lock, devices)
    }

    /// Reads the image in `file`, which is locked, and its parents where `search` leads to them; `open` opens
    /// and locks them.
    ///
    /// # Errors
    ///
    /// Those of [`Salvaged::read`]. What is wrong with a parent is no error.
    pub fn read(
        file: Arc<ImageFile>,
        search: &Search,
        reactor: &Reactor,
        mut open: impl FnMut(&Path) -> Result<ImageFile>,
        devices: &dyn Devices,
    ) -> Result<Self> {
        let leaf = Member::read(file, reactor)?;
        let left_session = devices.refuse_orphan(&leaf.file, None).err();
        let mut parents = Vec::new();
        let open = |path: &Path| Member::read(Arc::new(open(path)?), reactor);
        let missing_parent = match chain::follow_parents(&leaf, search, &mut parents, open) {
            Err(error) if error.kind() == Kind::Usage => return Err(error),
            followed => followed.err(),
        };
        let members = std::iter::once(leaf).chain(parents);
        let (files, images): (Vec<_>, Vec<_>) = members.map(|member| (member.file, member.image)).unzip();
        let disks = files.iter().map(|file| reactor.disk(Arc::clone(file)));
        let layers = disks.zip(images).map(|(disk, image)| RemainsLayer { disk, image });
        let remains = Remains::new(layers.collect());
        Ok(Self { files, remains, missing_parent, left_session })
    }

    /// The image's file.
    pub fn path(&self) -> &Path {
        self.files[0].path()
    }

    /// What is damaged, in which file, and which readings were taken.
    pub fn notes(&self) -> impl Iterator<Item = (&Path, &Note)> {
        let images = self.files.iter().zip(self.remains.images());
        images.flat_map(|(file, image)| image.notes().iter().map(|note| (file.path(), note)))
    }

    /// Why a parent is missing, if one is: what only it has is not known.
    pub fn missing_parent(&self) -> Option<&Error> {
        self.missing_parent.as_ref()
    }

    /// That a killed daemon left writes in its session, if it did: the file does not have them.
    pub fn left_session(&self) -> Option<&Error> {
        self.left_session.as_ref()
    }

    /// The size of the virtual disk, bytes.
    pub fn virtual_size(&self) -> u64 {
        self.remains.virtual_size()
    }

    /// How many images were found, the image itself included.
    pub fn image_count(&self) -> usize {
        self.files.len()
    }

    /// How much will come back if all of the files can be read.
    pub fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        self.remains.plan(|range, status| totals.add(range.end - range.start, status));
        totals
    }

    /// The image itself.
    pub fn leaf(&self) -> &Salvaged {
        self.remains.leaf()
    }

    /// The files and what is left in them, the image's own first: for a reader that fails where bytes are
    /// lost.
    ///
    /// # Errors
    ///
    /// Those of [`Salvaged::into_map`].
    pub fn into_maps(self) -> Result<Vec<(Arc<ImageFile>, BlockMap)>> {
        let layers = self.files.into_iter().zip(self.remains.into_layers());
        let maps = layers.map(|(file, layer)| {
            let map = layer.image.into_map().file(file.path())?;
            Ok((file, map))
        });
        maps.collect()
    }

    /// What will come back if all of the files can be read.
    pub fn plan(&self, reactor: &Reactor) -> Tally {
        let mut tally = self.tally(reactor);
        self.remains.plan(|range, status| tally.add(&range, status));
        tally
    }

    /// Nothing yet, with the partitions of the disk as far as its table came back.
    fn tally(&self, reactor: &Reactor) -> Tally {
        Tally::of(&reactor.block_on(contents::find(&self.remains)))
    }

    /// Copies what is left.
    ///
    /// # Errors
    ///
    /// [`Kind::Corrupt`] if guesses are needed and not allowed; [`Kind::Exists`] if there is a file that is
    /// not to be replaced; [`Kind::NoSpace`] if the file system has no room for the copy; [`Kind::Stopped`];
    /// errors of the host. No unfinished file is left.
    pub fn copy(
        &self,
        copy: &Copy,
        reactor: &Reactor,
        watch: &dyn Watch,
        devices: &dyn Devices,
    ) -> Result<Tally> {
        if !copy.assume {
            self.refuse_guesses()?;
        }
        for output in std::iter::once(&copy.target).chain(&copy.mapfile) {
            self.refuse_source(output)?;
        }
        let target = Output::begin(&copy.target, copy.replace, is_image, devices)?;
        self.check_room(target.file()).file(&copy.target)?;
        let mapfile = copy.mapfile.as_ref();
        let mapfile =
            mapfile.map(|path| Output::begin(path, copy.replace, is_mapfile, devices)).transpose()?;
        for output in [Some(&target), mapfile.as_ref()].into_iter().flatten() {
            watch.unfinished(output.remover());
        }
        let mut list = mapfile.as_ref().map(begin_list).transpose()?;
        let mut tally = self.tally(reactor);
        let record = |range: Range<u64>, status: Status| {
            tally.add(&range, status);
            let listed = list.as_mut().map_or(Ok(()), |list| list.add(range, status));
            listed.doing("writing the mapfile").file(copy.mapfile.as_deref().unwrap_or(&copy.target))
        };
        let disk = reactor.disk(Arc::clone(target.file()));
        let written = reactor.block_on(async {
            match copy.form {
                Form::Raw => self.write_raw((&copy.target, &disk), record, watch).await,
                Form::Vhdx => self.write_image((&copy.target, &disk), record, watch).await,
            }
        });
        let totals = written.file(self.path())?;
        assert_eq!(totals, tally.totals, "what was counted is what was listed");
        target.finish()?;
        if let (Some(list), Some(mapfile)) = (list, mapfile) {
            if list.is_cut() {
                let message = "it is full: its last entry is the rest of the disk, and says nothing of it";
                tracing::warn!("{}: {message}", mapfile.path().display());
            }
            let written = list.finish().and_then(|list| list.into_inner().map_err(io::Error::from));
            written.and_then(|file| file.sync_all()).doing("writing the mapfile")?;
            mapfile.finish()?;
        }
        Ok(tally)
    }

    /// Refuses an output at `path` that would replace what is read.
    fn refuse_source(&self, path: &Path) -> Result<()> {
        let Ok(found) = HostFile::at(path) else { return Ok(()) };
        let is_read = self.files.iter().any(|file| file.identity() == found);
        if is_read { Err(replaced::own_source(path)) } else { Ok(()) }
    }

    async fn write_raw(
        &self,
        (path, disk): (&Path, &UringDisk),
        mut record: impl FnMut(Range<u64>, Status) -> Result<()>,
        watch: &dyn Watch,
    ) -> Result<Totals> {
        let size = self.virtual_size();
        let whole = size.next_multiple_of(PAGE_BYTES as u64);
        disk.grow(whole).await.doing("making the copy").file(path)?;
        let mut target = Named { target: RawTarget(disk), path };
        let totals = copy(&self.remains, &mut target, &mut record, watch).await?;
        disk.truncate(size).await.doing("making the copy").file(path)?;
        disk.sync().await.doing("syncing the copy").file(path)?;
        Ok(totals)
    }

    async fn write_image(
        &self,
        (path, disk): (&Path, &UringDisk),
        mut record: impl FnMut(Range<u64>, Status) -> Result<()>,
        watch: &dyn Watch,
    ) -> Result<Totals> {
        let metadata = self.remains.leaf().metadata();
        let new = NewImage {
            virtual_size: metadata.virtual_size,
            fixed: false,
            block_size: metadata.block_size,
            log_length: DEFAULT_LOG_LENGTH,
            logical_sector_size: metadata.logical_sector_size,
            physical_sector_size: metadata.physical_sector_size,
            initial_state: InitialState::NotPresent,
            parent: None,
        };
        let mut target = Named { target: ImageTarget::new(disk, &new)?, path };
        let totals = copy(&self.remains, &mut target, &mut record, watch).await?;
        target.target.finish(Uuid::new_v4).await.file(path)?;
        Ok(totals)
    }

    /// Refuses an image that can be read only with guesses.
    ///
    /// # Errors
    ///
    /// [`Kind::Corrupt`], with the guesses.
    pub fn refuse_guesses(&self) -> Result<()> {
        let guesses: Vec<&str> =
            self.notes().filter(|(_, note)| note.is_guess).map(|(_, note)| &*note.what).collect();
        if guesses.is_empty() {
            return Ok(());
        }
        let message = format!("it can be read only with guesses: {}", guesses.join("; "));
        let remedy = "`--assume` uses them; the source is not changed, so that other guesses stay possible";
        Err(Error::new(Kind::Corrupt, message).file(self.path()).remedy(remedy))
    }

    /// Refuses a copy that cannot fit: what the files have on their hosts, at most what the disk has in them.
    fn check_room(&self, target: &ImageFile) -> Result<()> {
        let mut stored = 0_u64;
        for file in &self.files {
            stored = stored.saturating_add(file.host_bytes().doing("reading the file's size")?);
        }
        let needed = stored.min(self.remains.plan(|_, _| ()));
        room::require(target.host_room(), needed, "the copy needs at most")
    }
}

fn begin_list(mapfile: &Output) -> Result<Mapfile<BufWriter<File>>> {
    let file = mapfile.file().as_fd().try_clone_to_owned().doing("writing the mapfile")?;
    Mapfile::begin(BufWriter::new(File::from(file))).doing("writing the mapfile")
}
