//! `create`: creates a new image.

use std::path::PathBuf;
use std::thread;

use clap::ValueEnum;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::disk::Remover;
use vhdx_ublk::error::{Doing, Error, Kind, Result};
use vhdx_ublk::image::{InitialState, NewImage};
use vhdx_ublk::operations::create::Creation;

use super::size;

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
    /// When blocks get space: when they are first written (dynamic), all of them now (fixed), or when they
    /// first differ from the parent's (differencing) [default: dynamic; with --parent differencing]
    #[arg(short = 't', long = "type", value_enum, value_name = "TYPE")]
    disk_type: Option<DiskType>,
    /// The parent of a differencing image. It must not be written from then on
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
    /// Permissions of the image, in octal, as in 640. Its parent's, and those of the file that it replaces,
    /// are never exceeded [default: 600, or those of the file that it replaces]
    #[arg(long, value_parser = parse_mode)]
    mode: Option<u32>,
    /// Replace the image if there is one, or an empty file, and no other file; it survives if the new image
    /// cannot be finished
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

fn parse_mode(text: &str) -> std::result::Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| mode & !0o666 == 0 && mode & 0o600 == 0o600);
    mode.ok_or_else(|| {
        "a mode is three octal digits, the first a 6, without execution: 600, 640, 660, 644".into()
    })
}

impl Create {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let new = self.plan()?;
        let Self { image, parent, mode, force: replace, .. } = self;
        Creation { image, new, parent, mode, replace }.run(&Claims, remove_on_signals)
    }

    /// What the options mean together.
    fn plan(&self) -> Result<NewImage> {
        let differencing = self.disk_type == Some(DiskType::Differencing);
        if self.parent.is_some() && self.disk_type.is_some() && !differencing {
            return usage("only a differencing image has a parent");
        }
        if self.parent.is_none() && differencing {
            return usage("--type differencing needs a --parent");
        }
        // A child has its parent's.
        let size = self.size.or(self.parent.as_ref().map(|_| 0));
        let Some(virtual_size) = size else { return usage("a disk needs a --size") };
        if !virtual_size.is_multiple_of(self.logical_sector_size.into()) {
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
            virtual_size,
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
}

fn usage<T>(message: &str) -> Result<T> {
    Err(Error::new(Kind::Usage, message).remedy("vhdx-ublk create --help"))
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
