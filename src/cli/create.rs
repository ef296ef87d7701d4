//! `create`: creates a new image.

use std::path::PathBuf;
use std::thread;

use clap::ValueEnum;
use schemars::JsonSchema;
use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::device::path::WrittenPath;
use vhdx_ublk::disk::{Remover, Sparse};
use vhdx_ublk::error::{Doing, Error, Kind, Result};
use vhdx_ublk::format::MAX_VIRTUAL_SIZE;
use vhdx_ublk::image::{InitialState, NewImage};
use vhdx_ublk::operations::create::Creation;
use vhdx_ublk::printable::shell;

use super::{output, size};

/// Create a new, empty image.
///
/// A size is a number of bytes, or a number with a unit: K, M, G, T (or KiB, MiB, ...), powers of 1024.
#[derive(clap::Args)]
#[command(after_help = AFTER_HELP)]
pub struct Create {
    /// The file to create
    image: PathBuf,
    /// Only produces an error that names --size
    #[arg(hide = true, value_name = "SIZE", value_parser = size::misplaced)]
    _misplaced: Option<u64>,
    /// Size of the virtual disk, up to 64T; a differencing image has the size of its parent
    #[arg(short, long, value_parser = size::parse_disk)]
    #[arg(allow_negative_numbers = true)]
    size: Option<u64>,
    /// When blocks get space: on the first write (dynamic), all of them now (fixed), or when they first
    /// differ from the parent (differencing) [default: dynamic; with --parent differencing]
    #[arg(short = 't', long = "type", value_enum, value_name = "TYPE")]
    disk_type: Option<DiskType>,
    /// The parent of a differencing image. It must not change after this
    #[arg(
        short,
        long,
        value_name = "FILE",
        conflicts_with_all = ["size", "logical_sector_size", "block_state"]
    )]
    #[arg(conflicts_with = "physical_sector_size")]
    parent: Option<PathBuf>,
    /// Unit in which the disk gets space: a power of two from 1M to 256M. Small blocks waste less space under
    /// Linux file systems; New-VHD of Windows uses 32M
    #[arg(long, value_name = "SIZE", value_parser = size::parse_block, default_value = "2M")]
    block_size: u32,
    /// Size of the metadata log: a multiple of 1M, up to 1G
    #[arg(long, value_name = "SIZE", value_parser = size::parse_log, default_value = "1M")]
    log_size: u32,
    /// Smallest unit of I/O in bytes: 512 or 4096
    #[arg(long, value_name = "BYTES", value_parser = size::parse_sector, default_value = "512")]
    logical_sector_size: u32,
    /// Best unit of I/O in bytes: 512 or 4096
    #[arg(long, value_name = "BYTES", value_parser = size::parse_sector, default_value = "4096")]
    physical_sector_size: u32,
    /// Initial state of the blocks of a dynamic image: not-present, as Windows creates them, or zero
    /// [default: not-present]
    #[arg(long, value_enum, value_name = "STATE", hide_possible_values = true)]
    block_state: Option<BlockState>,
    /// Permissions of the image in octal, as in 640. They never exceed those of the parent or of the replaced
    /// file [default: 600, or those of the replaced file]
    #[arg(long, value_parser = parse_mode)]
    mode: Option<u32>,
    /// Whether the file may have holes: Windows refuses an image whose file is sparse. `auto` makes none on
    /// NTFS and over SMB, where a hole marks the file as sparse
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto")]
    sparse: Sparse,
    /// Replace an existing image or empty file, but no other file. If the new image cannot be finished, the
    /// old file stays
    #[arg(short, long)]
    force: bool,
    /// As JSON: one object, errors too
    #[arg(long)]
    json: bool,
}

const AFTER_HELP: &str = "\
Examples:
  vhdx-ublk create disk.vhdx --size 10G
  vhdx-ublk create disk.vhdx --size 1T --type fixed --logical-sector-size 4096
  vhdx-ublk create child.vhdx --type differencing --parent disk.vhdx

JSON: image, parent (null or a path); `vhdx-ublk info --json` has the rest.
Exit status: 0 the image is created, 1 failure (no unfinished file is left), 2 wrong usage.";

/// The largest disk in GiB.
const MOST_GIB: u64 = MAX_VIRTUAL_SIZE >> 30;

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

fn parse_mode(text: &str) -> std::result::Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| mode & !0o666 == 0 && mode & 0o600 == 0o600);
    mode.ok_or_else(|| {
        "a mode must be three octal digits, the first a 6, without execution: 600, 640, 660, 644".into()
    })
}

/// What is printed as JSON.
#[derive(Serialize, JsonSchema)]
pub struct Answer {
    /// The new image, as it was named.
    image: WrittenPath,
    /// Its parent, as it was named.
    parent: Option<WrittenPath>,
}

impl Create {
    /// Runs the command.
    pub fn run(self) -> Result<()> {
        let new = self.plan()?;
        let Self { image, parent, mode, force: replace, sparse, json, .. } = self;
        let answer = Answer { image: WrittenPath::of(&image), parent: parent.as_ref().map(WrittenPath::of) };
        Creation { image, new, parent, mode, replace, sparse }.run(&Claims, remove_on_signals)?;
        if json { output::print_json(&answer) } else { Ok(()) }
    }

    /// Refuses a name that promises another format than the one that is made.
    fn refuse_name(&self) -> Result<()> {
        let end =
            self.image.extension().and_then(|end| end.to_str()).unwrap_or_default().to_ascii_lowercase();
        let (file, vhdx) = (shell(&self.image), shell(&self.image.with_extension("vhdx")));
        let size = self.size.map_or_else(|| "SIZE".to_owned(), |size| size.to_string());
        let other = match end.as_str() {
            "vhd" => format!("for a VHD, convert that: vhdx-ublk convert {vhdx} {file}"),
            "raw" | "img" => format!("for a raw disk: truncate --size {size} {file}"),
            "qcow2" | "vmdk" | "vdi" => format!("for this format: qemu-img create -f {end} {file} {size}"),
            _ => return Ok(()),
        };
        let remedy = format!("name it {vhdx}; {other}");
        let message = format!("create makes a VHDX, and the name of the file ends in .{end}");
        Err(Error::new(Kind::Usage, message).file(&self.image).remedy(remedy))
    }

    /// What the options mean together.
    fn plan(&self) -> Result<NewImage> {
        self.refuse_name()?;
        let differencing = self.disk_type == Some(DiskType::Differencing);
        if self.parent.is_some() && self.disk_type.is_some() && !differencing {
            return usage("only a differencing image can have a --parent");
        }
        if self.parent.is_none() && differencing {
            return usage("--type differencing requires --parent");
        }
        // A child has its parent's.
        let size = self.size.or(self.parent.as_ref().map(|_| 0));
        let Some(virtual_size) = size else { return usage("--size is required") };
        self.require_sectors(virtual_size)?;
        if self.physical_sector_size < self.logical_sector_size {
            return usage("the physical sector size must not be smaller than the logical one");
        }
        let fixed = self.disk_type == Some(DiskType::Fixed);
        if fixed && self.block_state.is_some() {
            return usage("--block-state requires a dynamic image: a fixed image has all its blocks");
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

impl Create {
    /// A number without a unit is one of bytes, and a small one is often meant as one of GiB.
    fn require_sectors(&self, size: u64) -> Result<()> {
        let sector = self.logical_sector_size;
        if size.is_multiple_of(sector.into()) {
            return Ok(());
        }
        let message = format!("a disk of {size} bytes is no whole number of sectors of {sector} bytes");
        let whole = size.next_multiple_of(sector.into());
        let remedy = match size {
            0..=MOST_GIB => format!("--size {size}G, or in bytes: --size {whole}"),
            _ => format!("--size {whole}"),
        };
        Err(Error::new(Kind::Usage, message).remedy(remedy))
    }
}

fn usage<T>(message: &str) -> Result<T> {
    Err(Error::new(Kind::Usage, message).remedy("vhdx-ublk create --help"))
}

/// What fails if signals cannot be watched.
const WATCHING: &str = "preparing for signals";

/// From now on, a signal that ends the program first removes the unfinished file.
pub fn remove_on_signals(remover: Remover) -> Result<()> {
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
