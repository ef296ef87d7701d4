//! Where the bytes of a virtual range are, by what one image says.

use super::BlockMap;
use crate::format::bat::PayloadState;
use crate::simulation::{Plant, planted};

/// Where bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// In the file of this layer, at this offset.
    File {
        /// The layer.
        layer: u8,
        /// Offset in its file, bytes.
        offset: u64,
    },
    /// Nowhere: every reader sees zeros.
    Zero,
    /// Nowhere: they read as zero here, and may read as something else elsewhere.
    Undefined,
    /// In the layer below, or nowhere if there is none.
    Below,
    /// They were somewhere, and it is not known where: only maps of salvaged images say so.
    Lost,
}

/// Where the bytes from `from` on are by `map`, the map of layer number `layer`, and for how many that holds,
/// up to `end` or the end of its block.
pub fn locate(layer: u8, map: &BlockMap, from: u64, end: u64) -> (Location, u64) {
    let geometry = map.geometry();
    debug_assert!(from < end && end <= geometry.virtual_size(), "bytes {from} to {end} of layer {layer}");
    let block = geometry.block_of_offset(from);
    let within = geometry.offset_in_block(from);
    let length = (geometry.block_size() - within).min(end - from);
    let entry = map.load(block).entry;
    let here = || Location::File { layer, offset: entry.offset() + within };
    match entry.payload_state() {
        Some(PayloadState::FullyPresent) => (here(), length),
        Some(PayloadState::PartiallyPresent) => {
            let (present, length) = sectors(map, block, within, length);
            if !present {
                return (Location::Below, length);
            }
            // The block may have moved meanwhile, and the sector been written at its new place only: at the
            // old one are the bytes of whoever had the space before. It does not move again before this
            // thread has answered a barrier.
            if map.load(block).entry != entry && !planted(Plant::TrustFoundPlace) {
                return locate(layer, map, from, end);
            }
            (here(), length)
        }
        Some(PayloadState::NotPresent) if geometry.is_differencing() => (Location::Below, length),
        Some(PayloadState::Zero) => (Location::Zero, length),
        None => (Location::Lost, length),
        _ => (Location::Undefined, length),
    }
}

/// Whether the sectors from byte `within` of `block` on are in its layer's file, and for how many bytes that
/// holds, up to `length`.
fn sectors(map: &BlockMap, block: u64, within: u64, length: u64) -> (bool, u64) {
    let geometry = map.geometry();
    let sector = u64::from(geometry.logical_sector_size());
    let (here, next) = map.bitmaps().run(geometry, block, within / sector, (within + length) / sector);
    debug_assert!(next * sector > within, "a run of sectors has at least one");
    (here, next * sector - within)
}
