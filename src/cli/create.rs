//! `create`: makes a new image.
//!
//! A file under the image's name is either what was there before or the whole new image: an image that could
//! not be finished, for an error or a signal, is removed, and one that replaces another is made beside it and
//! renamed. After a power cut there may be an unfinished file; nobody takes it for an image.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use clap::ValueEnum;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use uuid::Uuid;

use vhdx_ublk::chain::{self, Search};
use vhdx_ublk::disk::{Access, ImageFile, Reactor, folder_of, inherit, sync_folder_of};
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::image::{InitialState, NewImage};

use super::look::{self, Seen};
use super::{holders, size};

/// Make a new, empty image.
///
/// Sizes are numbers of bytes, or have a unit: K, M, G, T (or KiB, MiB, ...), powers of 1024.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Create {
    /// The file to make
    image: PathBuf,
    /// Only the error that it ends in
    #[arg(hide = true, value_name = "SIZE", value_parser = size::misplaced)]
    _misplaced: Option<u64>,
    /// Size of the disk, up to 64T; a differencing image has its parent's
    #[arg(short, long, value_parser = size::parse_disk)]
    #[arg(allow_negative_numbers = true)]
    size: Option<u64>,
    /// Whether blocks get space when they are written (dynamic), now, all of them (fixed), or when they come to
    /// differ from the parent's (differencing)
    /// [default: dynamic; with --parent differencing]
    #[arg(short = 't', long = "type", value_enum, value_name = "TYPE")]
    disk_type: Option<DiskType>,
    /// The image that a differencing one is the child of. It must not be written any more
    #[arg(short, long, value_name = "FILE", conflicts_with_all = ["size", "logical_sector_size", "block_state"])]
    #[arg(conflicts_with = "physical_sector_size")]
    parent: Option<PathBuf>,
    /// Unit in which space is given to the disk: a power of two from 1M to 256M. Small blocks keep Linux file
    /// systems small; Windows' New-VHD takes 32M
    #[arg(long, value_name = "SIZE", value_parser = size::parse_block, default_value = "2M")]
    block_size: u32,
    /// Size of the log that keeps the image whole: a multiple of 1M, up to 1G
    #[arg(long, value_name = "SIZE", value_parser = size::parse_log, default_value = "1M")]
    log_size: u32,
    /// Smallest unit of I/O, bytes: 512 or 4096
    #[arg(long, value_name = "BYTES", value_parser = parse_sector, default_value = "512")]
    logical_sector_size: u32,
    /// Best unit of I/O, bytes: 512 or 4096
    #[arg(long, value_name = "BYTES", value_parser = parse_sector, default_value = "4096")]
    physical_sector_size: u32,
    /// State of the blocks of a dynamic image: not-present, as Windows makes them, or zero [default:
    /// not-present]
    #[arg(long, value_enum, value_name = "STATE", hide_possible_values = true)]
    block_state: Option<BlockState>,
    /// Replace the file if there is one; it survives if the new image cannot be finished
    #[arg(short, long)]
    force: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk create disk.vhdx --size 10G
  vhdx-ublk create disk.vhdx --size 1T --type fixed --logical-sector-size 4096
  vhdx-ublk create child.vhdx --type differencing --parent disk.vhdx

Exit status: 0 the image is made, 1 failure (and no half-made file is left), 2 wrong usage.";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DiskType {
    Dynamic,
    Fixed,
    Differencing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum BlockState {
    NotPresent,
    Zero,
}

fn parse_sector(text: &str) -> std::result::Result<u32, String> {
    match size::parse(text)? {
        512 => Ok(512),
        4096 => Ok(4096),
        _ => Err("a sector has 512 or 4096 bytes".into()),
    }
}

impl Create {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let parent = self.parent.as_deref().map(look::look_at_rest).transpose()?;
        let new = match &parent {
            Some((parent, _locked)) => self.plan_child(parent)?,
            None => self.plan()?,
        };
        let reactor = Reactor::new()?;
        if self.force {
            return self.replace(&new, &reactor);
        }
        let unfinished = Unfinished::default();
        unfinished.remove_on_signals()?;
        let file = unfinished.create(&self.image).map_err(|error| match error.kind() {
            Kind::Exists => error.remedy("choose another name, or let --force replace it"),
            _ => error,
        })?;
        write(&new, &reactor, file).map_err(|error| error.file(&self.image))?;
        unfinished.finished();
        sync_folder_of(&self.image)
    }

    /// A child of `parent`: its content is all there is.
    fn plan_child(&self, parent: &Seen) -> Result<NewImage> {
        if self.disk_type.is_some_and(|chosen| chosen != DiskType::Differencing) {
            return usage("only a differencing image has a parent");
        }
        let folder = fs::canonicalize(folder_of(&self.image));
        let folder = folder.map_err(|error| Error::io("finding the folder", error).file(&self.image))?;
        let ancestors =
            chain::follow_parents(parent, &Search::default(), &mut Vec::new(), look::identify_unlocked);
        if let Err(error) = ancestors {
            tracing::warn!("the parent cannot be opened as things are, and so the new image cannot: {error}");
        }
        let metadata = &parent.image.metadata;
        Ok(NewImage {
            virtual_size: metadata.virtual_size,
            fixed: false,
            block_size: self.block_size,
            log_length: self.log_size,
            logical_sector_size: metadata.logical_sector_size,
            physical_sector_size: metadata.physical_sector_size,
            initial_state: InitialState::NotPresent,
            parent: Some(chain::descent(parent, &folder)?),
        })
    }

    /// What the options mean together.
    fn plan(&self) -> Result<NewImage> {
        if self.disk_type == Some(DiskType::Differencing) {
            return usage("--type differencing needs a --parent");
        }
        let Some(size) = self.size else { return usage("a disk needs a --size") };
        if !size.is_multiple_of(self.logical_sector_size.into()) {
            return usage("the size is no whole number of logical sectors");
        }
        if self.physical_sector_size < self.logical_sector_size {
            return usage("physical sectors are no smaller than logical ones");
        }
        let fixed = self.disk_type == Some(DiskType::Fixed);
        if fixed && self.block_state.is_some() {
            return usage("--block-state is for dynamic images: a fixed one has all its blocks");
        }
        Ok(NewImage {
            virtual_size: size,
            fixed,
            block_size: self.block_size,
            log_length: self.log_size,
            logical_sector_size: self.logical_sector_size,
            physical_sector_size: self.physical_sector_size,
            initial_state: match self.block_state {
                Some(BlockState::Zero) => InitialState::Zero,
                Some(BlockState::NotPresent) | None => InitialState::NotPresent,
            },
            parent: None,
        })
    }

    /// Makes the image beside the file that has its name, then puts it in that file's place.
    fn replace(&self, new: &NewImage, reactor: &Reactor) -> Result<()> {
        self.refuse_relatives()?;
        let old = self.lock_old()?;
        let target = old.as_ref().map_or(self.image.as_path(), ImageFile::path);
        let beside = target.with_file_name(format!(".vhdx-ublk-{}.tmp", Uuid::new_v4().simple()));
        let unfinished = Unfinished::default();
        unfinished.remove_on_signals()?;
        let file = unfinished.create(&beside)?;
        write(new, reactor, file).map_err(|error| error.file(&self.image))?;
        if old.is_some() {
            inherit(target, &beside)?;
        }
        fs::rename(&beside, target).map_err(|error| Error::io("replacing the file", error).file(target))?;
        unfinished.finished();
        sync_folder_of(target)
    }

    /// Others may be made of the image that is to be replaced, the new one's parent among them.
    fn refuse_relatives(&self) -> Result<()> {
        let search = Search::default();
        let Ok(old) = look::identify_unlocked(&self.image) else { return Ok(()) };
        let mut ancestors = Vec::new();
        if let Some(parent) = &self.parent {
            let parent = look::identify_unlocked(parent)?;
            // As far as the chain leads: that it is broken is told elsewhere.
            let _ = chain::follow_parents(&parent, &search, &mut ancestors, look::identify_unlocked);
            ancestors.push(parent);
        }
        let children = holders::children(&old, &search);
        let message = match &children[..] {
            _ if ancestors.iter().any(|ancestor| chain::same_file(&ancestor.path, &old.path)) => {
                "the new image would descend from the one that it replaces".to_owned()
            }
            [] => return Ok(()),
            [child, ..] => format!("it is the parent of {}, which would not open any more", child.display()),
        };
        let remedy = "choose another name; or remove it yourself, if what was made of it may be lost";
        Err(Error::new(Kind::InUse, message).file(&old.path).remedy(remedy))
    }

    /// Opens the file that is to be replaced, so that nobody can begin to use it, and nobody does.
    fn lock_old(&self) -> Result<Option<ImageFile>> {
        match ImageFile::open(&self.image, Access::ReadWrite, Duration::ZERO) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(holders::explain(error, &self.image)),
        }
    }
}

fn usage<T>(message: &str) -> Result<T> {
    Err(Error::new(Kind::Usage, message).remedy("vhdx-ublk create --help"))
}

fn write(new: &NewImage, reactor: &Reactor, file: ImageFile) -> Result<()> {
    if new.fixed {
        check_room(new, &file)?;
    }
    let disk = reactor.disk(Arc::new(file));
    reactor.block_on(new.write(&disk, Uuid::new_v4))
}

/// Refuses what cannot succeed before it fills the file system.
fn check_room(new: &NewImage, file: &ImageFile) -> Result<()> {
    let room =
        file.host_room().map_err(|error| Error::io("asking for the room on the file system", error))?;
    let reserved = if nix::unistd::geteuid().is_root() { room.reserved_bytes } else { 0 };
    let available = room.available_bytes.saturating_add(reserved);
    // Some file systems do not say; making the file will.
    if available == 0 || available >= new.virtual_size {
        return Ok(());
    }
    let message = format!(
        "a fixed image takes all of its {} now, and the file system has {} left",
        size::human(new.virtual_size),
        size::human(available)
    );
    Err(Error::new(Kind::NoSpace, message).remedy("make room, or choose --type dynamic"))
}

/// A file that is removed unless it gets finished.
#[derive(Default)]
struct Unfinished(Arc<Mutex<Option<PathBuf>>>);

impl Unfinished {
    /// Makes the file.
    fn create(&self, path: &Path) -> Result<ImageFile> {
        let mut made = lock(&self.0);
        let file = ImageFile::create_new(path)?;
        *made = Some(path.to_owned());
        Ok(file)
    }

    /// From now on a signal that ends the program removes the file first.
    fn remove_on_signals(&self) -> Result<()> {
        let failed = |error| Error::io("preparing for signals", error);
        let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).map_err(failed)?;
        let made = self.0.clone();
        let watch = move || {
            if let Some(signal) = signals.forever().next() {
                let mut made = lock(&made); // nothing is finished any more
                remove(made.take());
                let _ = signal_hook::low_level::emulate_default_handler(signal);
            }
        };
        thread::Builder::new().name("signals".into()).spawn(watch).map(drop).map_err(failed)
    }

    /// The file stays.
    fn finished(self) {
        *lock(&self.0) = None;
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        remove(lock(&self.0).take());
    }
}

fn lock(made: &Mutex<Option<PathBuf>>) -> MutexGuard<'_, Option<PathBuf>> {
    made.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remove(made: Option<PathBuf>) {
    let Some(path) = made else { return };
    if let Err(error) = fs::remove_file(&path) {
        tracing::warn!("{}: the unfinished image could not be removed: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finished_is_removed_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("a.vhdx");
        let unfinished = Unfinished::default();
        unfinished.create(&path).expect("free");
        drop(unfinished);
        assert!(!path.exists());
        let unfinished = Unfinished::default();
        unfinished.create(&path).expect("free");
        unfinished.finished();
        assert!(path.exists());
        let second = Unfinished::default();
        second.create(&path).expect_err("taken");
        drop(second);
        assert!(path.exists(), "not ours to remove");
    }
}
