//! What is where in an image's file, as far as a compaction has to know.

use uuid::Uuid;

use super::plan::Item;
use crate::engine::relocate::Occupant;
use crate::format::MIB;
use crate::format::bat::{BITMAP_BLOCK_SIZE, PayloadState};
use crate::format::guid;
use crate::format::metadata::DiskType;
use crate::image::{BlockMap, Extent, Image, Space, payload_extent};

/// Something that blocks cannot pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fixed {
    /// Where it is.
    pub place: Extent,
    /// What it is.
    pub name: &'static str,
    /// It is a region that can be moved.
    pub region: Option<Uuid>,
}

/// What blocks cannot pass: the log, the regions, and blocks of a fixed image that have no content.
pub fn fixed(image: &Image) -> Vec<Fixed> {
    let mut fixed = Vec::new();
    if image.layout.log.length > 0 {
        fixed.push(Fixed { place: image.layout.log, name: "log", region: None });
    }
    for region in image.regions.table.entries() {
        let place = Extent { offset: region.offset, length: region.length.into() };
        let (name, movable) = match region.guid {
            guid::REGION_BAT => ("BAT region", true),
            guid::REGION_METADATA => ("metadata region", true),
            _ => ("region of an unknown kind", false),
        };
        fixed.push(Fixed { place, name, region: movable.then_some(region.guid) });
    }
    assert!(fixed.len() >= 2, "every image has a BAT and metadata");
    if image.metadata.kind() == DiskType::Fixed {
        // Its blocks keep their space, also those without content.
        let old = blocks(&image.map).filter(|(_, state, _)| !has_content(*state));
        fixed.extend(old.map(|(_, _, place)| Fixed { place, name: "block without content", region: None }));
    }
    fixed
}

/// The blocks that have content of their own in the file, and the sector bitmaps.
pub fn items(map: &BlockMap) -> Vec<Item> {
    let geometry = map.geometry();
    let chunks = if geometry.is_differencing() { geometry.bitmap_block_count() } else { 0 };
    let bitmaps = (0..chunks).filter_map(|chunk| {
        let place = Extent { offset: map.bitmap_place(chunk)?, length: BITMAP_BLOCK_SIZE };
        Some(Item { place, what: Occupant::Bitmap(chunk) })
    });
    let blocks = blocks(map).filter(|(_, state, _)| has_content(*state));
    let blocks = blocks.map(|(block, _, place)| Item { place, what: Occupant::Block(block) });
    bitmaps.chain(blocks).collect()
}

/// The blocks that can move while the image is served, in file order, and whatever else is used in `space`,
/// as the file is now.
pub fn movable(map: &BlockMap, space: &Space) -> (Vec<Item>, Vec<Extent>) {
    let mut blocks: Vec<Item> = items(map);
    blocks.retain(|item| matches!(item.what, Occupant::Block(_)));
    blocks.sort_unstable();
    let (mut others, mut at) = (Vec::new(), MIB);
    let free = space.free_runs().chain([Extent { offset: space.used_end(), length: 0 }]);
    let taken = blocks.iter().map(|item| item.place);
    let mut known: Vec<Extent> = free.chain(taken).collect();
    known.sort_unstable();
    for place in known {
        if place.offset > at {
            others.push(Extent { offset: at, length: place.offset - at });
        }
        at = at.max(place.end());
    }
    (blocks, others)
}

/// The blocks that have content of their own; those that have only a part of it if `partial`.
pub fn present(map: &BlockMap, partial: bool) -> Vec<u64> {
    let wanted = |state| has_content(state) && (partial || state != PayloadState::PartiallyPresent);
    blocks(map).filter(|(_, state, _)| wanted(*state)).map(|(block, ..)| block).collect()
}

/// The blocks without content that still name space: what they held before.
pub fn old_content(map: &BlockMap) -> Vec<u64> {
    blocks(map).filter(|(_, state, _)| !has_content(*state)).map(|(block, ..)| block).collect()
}

fn has_content(state: PayloadState) -> bool {
    matches!(state, PayloadState::FullyPresent | PayloadState::PartiallyPresent)
}

/// The blocks that name space, in disk order, their states and their places.
fn blocks(map: &BlockMap) -> impl Iterator<Item = (u64, PayloadState, Extent)> {
    let (geometry, mut block) = (map.geometry(), 0);
    std::iter::from_fn(move || {
        loop {
            block = map.first_set(block..geometry.block_count());
            if block == geometry.block_count() {
                return None;
            }
            let (this, entry) = (block, map.load(block).entry);
            block += 1;
            if let (Some(state), Some(place)) = (entry.payload_state(), payload_extent(entry, geometry)) {
                return Some((this, state, place));
            }
        }
    })
}
