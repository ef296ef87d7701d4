//! What a conversion makes: the format of its target, and what that can hold.

use crate::error::{Error, Kind, Result};
use crate::format::MIB;
use crate::format::vhd;
use crate::image::{DEFAULT_BLOCK_SIZE, DEFAULT_LOG_LENGTH, InitialState, NewImage};
use crate::operations::source::{DiskFormat, Sectors};
use crate::printable::both_sizes;

/// The smallest disk that Azure takes, bytes (`DiskCreationData.UploadSizeBytes`).
const AZURE_LEAST: u64 = 20 * MIB;

/// The target as the user wants it.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Its format.
    pub format: DiskFormat,
    /// Whether it has all its space from the start; a raw file is what it is.
    pub fixed: bool,
    /// Bytes of a block of a VHDX.
    pub block_size: Option<u32>,
    /// Bytes of a logical sector of a VHDX, if not those of the source.
    pub logical_sector_size: Option<u32>,
    /// A fixed VHD as Azure takes it: whole MiB.
    pub azure: bool,
}

impl Shape {
    /// The size of the target's disk for one of `size` bytes in `sectors`.
    ///
    /// # Errors
    ///
    /// [`Kind::Unsupported`] if the format cannot hold the disk.
    pub(super) fn disk_size(&self, size: u64, sectors: Sectors) -> Result<u64> {
        let refuse =
            |message: String, remedy: &str| Err(Error::new(Kind::Unsupported, message).remedy(remedy));
        if size == 0 {
            return refuse("the disk has no sectors".into(), "name a disk that is not empty");
        }
        match self.format {
            DiskFormat::Raw => Ok(size),
            DiskFormat::Vhd => self.vhd_size(size),
            DiskFormat::Vhdx if size > crate::format::MAX_VIRTUAL_SIZE => {
                refuse(format!("a disk of {} bytes: VHDX ends at 64 TiB", both_sizes(size)), "convert to raw")
            }
            DiskFormat::Vhdx => {
                let sector = u64::from(self.logical(sectors));
                if !size.is_multiple_of(sector) {
                    let message =
                        format!("a disk of {size} bytes is no whole number of sectors of {sector} bytes");
                    return refuse(message, "keep sectors of 512 bytes: --logical-sector-size 512");
                }
                Ok(size)
            }
        }
    }

    /// The most bytes that a disk may have, whatever its size will be.
    pub(super) fn most(&self) -> u64 {
        match self.format {
            DiskFormat::Raw => u64::MAX,
            DiskFormat::Vhd if self.azure => vhd::MAX_FIXED_SIZE,
            DiskFormat::Vhd => vhd::MAX_DYNAMIC_SIZE,
            DiskFormat::Vhdx => crate::format::MAX_VIRTUAL_SIZE,
        }
    }

    fn vhd_size(&self, size: u64) -> Result<u64> {
        let (least, most) = (if self.azure { AZURE_LEAST } else { 0 }, self.most());
        let rounded = if self.azure { size.next_multiple_of(MIB) } else { size };
        let whose = if self.azure { "Azure takes" } else { "a VHD holds" };
        if rounded < least {
            let message = format!("a disk of {} bytes: {whose} at least 20 MiB", both_sizes(size));
            return Err(Error::new(Kind::Unsupported, message).remedy("make the disk larger first"));
        }
        if rounded > most {
            let most = both_sizes(most);
            let message = format!("a disk of {} bytes: {whose} at most {most}", both_sizes(size));
            return Err(
                Error::new(Kind::Unsupported, message).remedy("convert to VHDX, which ends at 64 TiB")
            );
        }
        Ok(rounded)
    }

    fn logical(&self, sectors: Sectors) -> u32 {
        self.logical_sector_size.unwrap_or(sectors.logical)
    }

    /// The sectors that the target's disk has for a source with these `sectors`.
    pub(super) fn sectors(&self, sectors: Sectors) -> Sectors {
        match self.format {
            DiskFormat::Vhdx => {
                let logical = self.logical(sectors);
                Sectors { logical, physical: sectors.physical.max(logical) }
            }
            DiskFormat::Vhd => Sectors { logical: 512, ..sectors },
            DiskFormat::Raw => sectors,
        }
    }

    /// The VHDX with a disk of `size` bytes.
    pub(super) fn image(&self, size: u64, sectors: Sectors) -> NewImage {
        let Sectors { logical, physical } = self.sectors(sectors);
        NewImage {
            virtual_size: size,
            fixed: self.fixed,
            block_size: self.block_size.unwrap_or(DEFAULT_BLOCK_SIZE),
            log_length: DEFAULT_LOG_LENGTH,
            logical_sector_size: logical,
            physical_sector_size: physical,
            initial_state: InitialState::NotPresent,
            parent: None,
        }
    }
}
