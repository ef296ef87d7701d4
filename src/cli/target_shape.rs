//! The options that say what a target is like.

use clap::ValueEnum;

use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::operations::convert::Shape;
use vhdx_ublk::operations::source::DiskFormat;

use super::size;

/// Options of the commands that make targets.
#[derive(clap::Args)]
pub struct ShapeOptions {
    /// When the blocks of a VHDX or VHD get space: when they have data (dynamic), or all of them now (fixed)
    /// [default: dynamic]
    #[arg(short = 't', long = "type", value_enum, value_name = "TYPE")]
    disk_type: Option<DiskType>,
    /// Block size of a VHDX: a power of two from 1M to 256M [default: 2M]
    #[arg(long, value_name = "SIZE", value_parser = size::parse_block)]
    block_size: Option<u32>,
    /// Logical sector size of a VHDX in bytes: 512 or 4096 [default: that of the source]
    #[arg(long, value_name = "BYTES", value_parser = size::parse_sector)]
    logical_sector_size: Option<u32>,
    /// Make a VHD that Azure takes: fixed, and a whole number of MiB, from 20M to 32T
    #[arg(long)]
    azure: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum DiskType {
    Dynamic,
    Fixed,
}

impl ShapeOptions {
    /// Whether the target is for Azure.
    pub fn azure(&self) -> bool {
        self.azure
    }

    /// What a target in this `format` is like.
    ///
    /// # Errors
    ///
    /// [`Kind::Usage`] if the options do not fit the format.
    pub fn shape(&self, format: DiskFormat) -> Result<Shape> {
        let usage = |message: &str| Err(Error::new(Kind::Usage, message));
        if format == DiskFormat::Raw && self.disk_type.is_some() {
            return usage("--type requires a VHDX or a VHD");
        }
        if format != DiskFormat::Vhdx && (self.block_size.is_some() || self.logical_sector_size.is_some()) {
            return usage("--block-size and --logical-sector-size require a VHDX");
        }
        if self.azure && format != DiskFormat::Vhd {
            return usage("--azure makes a VHD: use --to vhd");
        }
        if self.azure && self.disk_type == Some(DiskType::Dynamic) {
            return usage("Azure takes fixed VHDs only");
        }
        Ok(Shape {
            format,
            fixed: self.azure || self.disk_type == Some(DiskType::Fixed),
            block_size: self.block_size,
            logical_sector_size: self.logical_sector_size,
            azure: self.azure,
        })
    }
}
