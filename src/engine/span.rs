//! Where the bytes of a virtual range are: in one of the chain's files, or nowhere.

use std::ops::Range;

use super::shared::{LEAF, Shared};
use crate::format::bat::PayloadState;
use crate::image::{Location, Mapping, locate, payload_extent};
use crate::simulation::{Plant, planted};

/// Consecutive virtual bytes that one piece can serve.
#[derive(Clone, Copy)]
pub(super) struct Span {
    pub(super) location: Location,
    pub(super) durable: bool,
    /// A block is partially present: what is written has to be marked.
    pub(super) partial: bool,
    /// A block is on its way to another place: nothing may change it.
    pub(super) moving: bool,
    pub(super) length: u32,
}

impl Span {
    /// The span from virtual offset `from` to the end of its block or to `end`, as a writer sees it: in the
    /// space that the leaf has for it.
    #[inline]
    pub(super) fn in_leaf(shared: &Shared, from: u64, end: u64) -> Self {
        debug_assert!(from < end && end <= shared.geometry().virtual_size(), "bytes {from} to {end}");
        let geometry = shared.geometry();
        let block = geometry.block_of_offset(from);
        let within = geometry.offset_in_block(from);
        let length = (geometry.block_size() - within).min(end - from);
        let Mapping { entry, durable, moving } = shared.map.load(block);
        let state = entry.payload_state();
        let here = || Location::File { layer: LEAF, offset: entry.offset() + within };
        let location = match state {
            Some(PayloadState::FullyPresent) => here(),
            Some(PayloadState::Zero) => Location::Zero,
            Some(PayloadState::PartiallyPresent) if geometry.is_differencing() => here(),
            Some(PayloadState::NotPresent) if geometry.is_differencing() => Location::Below,
            None => Location::Lost,
            _ => Location::Undefined,
        };
        let partial = state == Some(PayloadState::PartiallyPresent);
        let length = u32::try_from(length).expect("a block has at most 256 MiB");
        Self { location, durable: durable && !partial, partial, moving, length }
    }

    /// The same for a reader: from the layer that has the content, shorter where a block is spread over
    /// several.
    #[inline]
    pub(super) fn in_chain(shared: &Shared, from: u64, end: u64) -> Self {
        let span = Self::in_leaf(shared, from, end);
        if span.partial || span.location == Location::Below {
            Self::layer_by_layer(shared, from, from + u64::from(span.length))
        } else {
            span
        }
    }

    /// Layer by layer, until one has the content.
    fn layer_by_layer(shared: &Shared, from: u64, mut end: u64) -> Self {
        let span = |location, length| {
            let length = u32::try_from(length).expect("a block has at most 256 MiB");
            Self { location, durable: false, partial: false, moving: false, length }
        };
        for (layer, map) in std::iter::once((LEAF, shared.map.as_ref())).chain(shared.parents()) {
            // A parent may be smaller than its child: what it does not have reads as zero.
            if from >= map.geometry().virtual_size() {
                break;
            }
            match locate(layer, map, from, end.min(map.geometry().virtual_size())) {
                (Location::Below, length) => end = from + length,
                (location, length) => return span(location, length),
            }
        }
        span(Location::Undefined, end - from)
    }

    /// Whether the bytes lie in a file.
    pub(super) fn is_present(&self) -> bool {
        matches!(self.location, Location::File { .. })
    }

    /// Whether the bytes can be changed where they lie in the file.
    pub(super) fn is_changeable(&self) -> bool {
        self.is_present() && (!self.moving || planted(Plant::IgnoreMove))
    }

    /// Whether one piece can serve this span and `next`, which follows it.
    pub(super) fn continues_with(&self, next: &Self) -> bool {
        match (self.location, next.location) {
            (Location::File { layer, offset }, next @ Location::File { .. }) => {
                next == Location::File { layer, offset: offset + u64::from(self.length) }
            }
            (Location::File { .. } | Location::Lost, _) | (_, Location::File { .. } | Location::Lost) => {
                false
            }
            _ => true,
        }
    }
}

/// Whether the entry of `block` has to change for all of it to read as zeros: it has space; or, in a child,
/// its parents have content; or other readers may see something else (`define_absent`).
///
/// `looks` is how many entries of the parents may still be looked at. When none are left, the parents are
/// assumed to have content.
pub(super) fn to_unmap(shared: &Shared, block: u64, define_absent: bool, looks: &mut u32) -> bool {
    let entry = shared.map.load(block).entry;
    match entry.payload_state() {
        Some(PayloadState::Zero) => false,
        _ if payload_extent(entry, shared.geometry()).is_some() => !planted(Plant::SkipPresent),
        _ if define_absent => true,
        Some(PayloadState::NotPresent) if shared.geometry().is_differencing() => {
            shows_parents(shared, block, looks) && !planted(Plant::KeepParents)
        }
        _ => false,
    }
}

/// The first of `blocks` of which [`to_unmap`] is true.
pub(super) fn first_to_unmap(
    shared: &Shared,
    blocks: Range<u64>,
    define_absent: bool,
    looks: &mut u32,
) -> Option<u64> {
    let absent_stay = !define_absent && !shared.geometry().is_differencing();
    let mut block = blocks.start;
    loop {
        if absent_stay {
            block = shared.map.first_set(block..blocks.end);
        }
        if block == blocks.end {
            return None;
        }
        *looks = looks.saturating_sub(1);
        if *looks == 0 || to_unmap(shared, block, define_absent, looks) {
            return Some(block);
        }
        block += 1;
    }
}

/// Whether any of `block`, absent in the leaf, lies in a parent's file. What no layer has reads as zeros.
pub(super) fn shows_parents(shared: &Shared, block: u64, looks: &mut u32) -> bool {
    let geometry = shared.geometry();
    let mut at = block * geometry.block_size();
    let end = (at + geometry.block_size()).min(geometry.virtual_size());
    let layers = u32::try_from(shared.layers().count()).expect("at most 256");
    while at < end {
        let span = Span::in_chain(shared, at, end);
        *looks = looks.saturating_sub(layers);
        if span.is_present() || *looks == 0 {
            return true;
        }
        at += u64::from(span.length);
    }
    false
}
