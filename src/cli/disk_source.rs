//! The options that say which disk is read, and how.

use std::path::PathBuf;

use clap::ValueEnum;

use vhdx_ublk::chain::Search;
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::operations::source::{DiskFormat, FROM_QCOW2, SourceRequest};

/// A format by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatName {
    /// The disk itself
    Raw,
    /// The older format of Windows
    Vhd,
    /// VHDX
    Vhdx,
    /// The format of QEMU, which is not supported: says how to convert it
    #[value(hide = true)]
    Qcow2,
}

impl FormatName {
    /// The format; `instead` says how to do without qcow2.
    ///
    /// # Errors
    ///
    /// [`Kind::Unsupported`] for qcow2.
    pub fn format(self, instead: &str) -> Result<DiskFormat> {
        match self {
            Self::Raw => Ok(DiskFormat::Raw),
            Self::Vhd => Ok(DiskFormat::Vhd),
            Self::Vhdx => Ok(DiskFormat::Vhdx),
            Self::Qcow2 => {
                Err(Error::new(Kind::Unsupported, "qcow2 is neither read nor written").remedy(instead))
            }
        }
    }

    /// The format that the name of a file ends with.
    pub fn of_name(path: &std::path::Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "vhdx" | "avhdx" => Some(Self::Vhdx),
            "vhd" => Some(Self::Vhd),
            "raw" | "img" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }
}

/// The disk in the file at `path`, in this format if one is given.
///
/// # Errors
///
/// Those of [`FormatName::format`].
pub fn request(path: PathBuf, format: Option<FormatName>, search: Search) -> Result<SourceRequest> {
    let format = format.map(|format| format.format(FROM_QCOW2)).transpose()?;
    Ok(SourceRequest { path, format, search })
}
