//! What a target will take.

use schemars::JsonSchema;
use serde::Serialize;

use super::shape::Shape;
use super::vhd_draft;
use crate::error::Result;
use crate::format::vhd;
use crate::operations::source::{DiskFormat, Source, Walk};

/// The bytes that a target will take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Measured {
    /// At most, with the data that the disk has now. Data that turns out to be zero takes less.
    pub required: u64,
    /// When every block of the disk has data.
    pub fully_allocated: u64,
}

/// Measures what `source` will take in a target of `shape`.
///
/// # Errors
///
/// [`Kind::Unsupported`](crate::error::Kind::Unsupported) if the format cannot hold the disk; those of
/// looking at the source.
pub fn measure(source: &Source, shape: &Shape) -> Result<Measured> {
    let size = shape.disk_size(source.size(), source.sectors())?;
    match shape.format {
        DiskFormat::Raw => Ok(Measured { required: data_bytes(source)?, fully_allocated: size }),
        DiskFormat::Vhd if shape.fixed => {
            let length = size + vhd::FOOTER_SIZE as u64;
            Ok(Measured { required: length, fully_allocated: length })
        }
        DiskFormat::Vhd => {
            let block_size = u64::from(vhd::DEFAULT_BLOCK_SIZE);
            let length = |blocks| vhd_draft::dynamic_length(size, blocks);
            let required = length(blocks_with_data(source, block_size)?);
            Ok(Measured { required, fully_allocated: length(size.div_ceil(block_size)) })
        }
        DiskFormat::Vhdx => {
            let draft = shape.image(size, source.sectors()).draft()?;
            let block_size = draft.block_size();
            if shape.fixed {
                return Ok(Measured { required: draft.length(), fully_allocated: draft.length() });
            }
            let length = |blocks: u64| draft.length() + blocks * block_size;
            let required = length(blocks_with_data(source, block_size)?);
            Ok(Measured { required, fully_allocated: length(size.div_ceil(block_size)) })
        }
    }
}

/// Bytes that may not be zero.
fn data_bytes(source: &Source) -> Result<u64> {
    let mut walk = Walk::new(source);
    let (mut at, mut bytes) = (walk.next_data(0)?, 0);
    while at < source.size() {
        let end = walk.data_end(at)?;
        bytes += end - at;
        at = walk.next_data(end)?;
    }
    Ok(bytes)
}

/// Blocks of `block_size` bytes that have such bytes.
fn blocks_with_data(source: &Source, block_size: u64) -> Result<u64> {
    let mut walk = Walk::new(source);
    let (mut at, mut blocks) = (walk.next_data(0)?, 0);
    while at < source.size() {
        let end = walk.data_end(at)?.next_multiple_of(block_size);
        blocks += end / block_size - at / block_size;
        at = walk.next_data(end.min(source.size()))?;
    }
    Ok(blocks)
}
