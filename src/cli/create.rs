//! `create`: makes a new image.
//!
//! A file under the image's name is either what was there before or the whole new image: an image that could
//! not be finished, for an error or a signal, is removed, and one that replaces another is made beside it and
//! renamed. After a power cut there may be an unfinished file; nobody takes it for an image.
//!
//! The folder may be anybody's: nothing is changed by path. Only its owner may open the new file until it is whole.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::ValueEnum;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use uuid::Uuid;

use vhdx_ublk::chain::{self, Search};
use vhdx_ublk::disk::{Access, ImageFile, Place, Reactor, Remover, Unfinished, folder_of};
use vhdx_ublk::error::{Doing, Error, Kind, Locate, Result};
use vhdx_ublk::image::{InitialState, NewImage};

use super::look::{self, Seen};
use super::{holders, replaced, size};

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
    /// Permissions of the image, in octal, as in 640. Its parent's, and those of the file that it replaces, are never
    /// exceeded [default: 600, or those of the file that it replaces]
    #[arg(long, value_parser = parse_mode)]
    mode: Option<u32>,
    /// Replace the image if there is one, or an empty file, and no other file; it survives if the new image cannot be
    /// finished
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

/// Permissions by default: who may read an image may lock it, and keep a device from it.
const PRIVATE: u32 = 0o600;

/// All permissions that a file has.
const EVERYTHING: u32 = 0o777;

/// The most that a child's file may permit: what it does not have itself is read from `parent`.
fn most(parent: Option<&ImageFile>) -> Result<u32> {
    parent.map_or(Ok(EVERYTHING), |parent| Ok(parent.mode()? | PRIVATE))
}

fn parse_mode(text: &str) -> std::result::Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| mode & !0o666 == 0 && mode & 0o600 == 0o600);
    mode.ok_or_else(|| {
        "a mode is three octal digits, the first a 6, without execution: 600, 640, 660, 644".into()
    })
}

impl Create {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let parent = self.parent.as_deref().map(look::look_at_rest).transpose()?;
        let old = if self.force { self.lock_old()? } else { None };
        let place = match &old {
            Some(old) => Place::of_file(old)?,
            None => Place::of(&self.image)?,
        };
        let new = match &parent {
            Some((parent, _locked)) => self.plan_child(parent, &place)?,
            None => self.plan()?,
        };
        let reactor = Reactor::new()?;
        let parent = parent.as_ref().map(|(_, file)| file);
        match &old {
            Some(old) => self.replace(&new, &reactor, parent, (old, &place)),
            None => self.make(&new, &reactor, parent, place),
        }
    }

    /// Makes the image where there is none.
    fn make(
        &self,
        new: &NewImage,
        reactor: &Reactor,
        parent: Option<&ImageFile>,
        place: Place,
    ) -> Result<()> {
        let unfinished = Unfinished::default();
        remove_on_signals(unfinished.remover())?;
        let file = unfinished.create(place).map_err(|error| match error.kind() {
            Kind::Exists => error.remedy("choose another name, or let --force replace it"),
            _ => error,
        })?;
        write(new, reactor, &file).file(&self.image)?;
        file.permit(self.mode.unwrap_or(PRIVATE) & most(parent)?)?;
        unfinished.settle()?;
        unfinished.keep();
        Ok(())
    }

    /// Makes the image beside `old`, then puts it in that file's place.
    fn replace(
        &self,
        new: &NewImage,
        reactor: &Reactor,
        parent: Option<&ImageFile>,
        (old, place): (&ImageFile, &Place),
    ) -> Result<()> {
        let beside = place.beside(format!(".vhdx-ublk-{}.tmp", Uuid::new_v4().simple()).as_ref())?;
        let unfinished = Unfinished::default();
        remove_on_signals(unfinished.remover())?;
        let file = unfinished.create(beside)?;
        write(new, reactor, &file).file(&self.image)?;
        file.resemble(old, self.mode.unwrap_or(EVERYTHING) & most(parent)?)?;
        unfinished.replace(place, old)
    }

    /// A child of `parent`: its content is all there is.
    fn plan_child(&self, parent: &Seen, place: &Place) -> Result<NewImage> {
        if self.disk_type.is_some_and(|chosen| chosen != DiskType::Differencing) {
            return usage("only a differencing image has a parent");
        }
        let ancestors =
            chain::follow_parents(parent, &Search::default(), &mut Vec::new(), look::identify_unlocked);
        if let Err(error) = ancestors {
            tracing::warn!(
                "the parent cannot be opened as things are, and so the new image cannot: {error:#}"
            );
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
            parent: Some(chain::descent(parent, folder_of(place.path()))?),
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
        self.refuse_relatives()?;
        match ImageFile::open(&self.image, Access::ReadWrite, Duration::ZERO) {
            Ok(file) => replaced::require(&self.image, &file).map(|()| Some(file)),
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(holders::explain(error, &self.image)),
        }
    }
}

fn usage<T>(message: &str) -> Result<T> {
    Err(Error::new(Kind::Usage, message).remedy("vhdx-ublk create --help"))
}

fn write(new: &NewImage, reactor: &Reactor, file: &Arc<ImageFile>) -> Result<()> {
    if new.fixed {
        check_room(new, file)?;
    }
    let disk = reactor.disk(file.clone());
    reactor.block_on(new.write(&disk, Uuid::new_v4))
}

/// Refuses what cannot succeed before it fills the file system.
fn check_room(new: &NewImage, file: &ImageFile) -> Result<()> {
    let room = file.host_room().doing("asking for the room on the file system")?;
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

/// What fails where signals cannot be watched for.
const WATCHING: &str = "preparing for signals";

/// From now on a signal that ends the program removes the file first.
fn remove_on_signals(remover: Remover) -> Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).doing(WATCHING)?;
    let watch = move || {
        if let Some(signal) = signals.forever().next() {
            remover.remove_and(|| {
                let _ = signal_hook::low_level::emulate_default_handler(signal);
            });
        }
    };
    thread::Builder::new().name("signals".into()).spawn(watch).map(drop).doing(WATCHING)
}
