//! Making an absent block of a differencing image whole with what its parents have, where it cannot become
//! partially present ([`super::partial`]).
//!
//! It is filled in new space, which nothing names before all of it is there, and which no entry names before
//! a sync has covered it. So a block is either as its parents say, or whole.

use std::rc::Rc;

use nix::errno::Errno;

use super::span::Span;
use super::{Engine, Outcome, errno, for_guest};
use crate::disk::{Buffer, Disk, PAGE_BYTES, read_sectors};
use crate::format::bat::{BatEntry, PayloadState};
use crate::format::{MIB, index};
use crate::image::{Extent, Location};
use crate::simulation::{Plant, planted};

impl<D: Disk + 'static> Engine<D> {
    /// Whether some of a block's content, by its entry, is in the parents.
    pub(super) fn needs_parents(&self, entry: BatEntry) -> bool {
        let below = [PayloadState::NotPresent, PayloadState::PartiallyPresent].map(Some);
        self.shared.geometry().is_differencing() && below.contains(&entry.payload_state())
    }

    /// Puts the content of `block` into `space`, which reads as zero. Nothing changes `block` meanwhile.
    pub(super) async fn fill(self: &Rc<Self>, block: u64, space: Extent) -> Outcome {
        assert_eq!(
            space.length,
            self.shared.geometry().block_size(),
            "a block is filled in space of its size"
        );
        let start = block * space.length;
        let end = (start + space.length).min(self.shared.geometry().virtual_size());
        for from in (start..end).step_by(usize::try_from(MIB).expect("1 MiB")) {
            self.check_poison()?;
            if let Some(bytes) = self.content(from, end.min(from + MIB)).await? {
                let place = space.offset + (from - start);
                self.disk.write(place, bytes).await.map_err(|error| for_guest(errno(&error)))?;
            }
        }
        Ok(())
    }

    /// The bytes of `from..end`, which is in one block, up to the next whole page; nothing if all of it is
    /// zero.
    async fn content(&self, from: u64, end: u64) -> Outcome<Option<Buffer>> {
        assert!(from < end && end - from <= MIB, "a piece of a block, from {from} to {end}");
        let mut bytes: Option<Buffer> = None;
        let mut at = from;
        while at < end {
            let span = Span::in_chain(&self.shared, at, end);
            if let Location::File { layer, offset } = span.location
                && !planted(Plant::ForgetParents)
            {
                let length = index(end - from).next_multiple_of(PAGE_BYTES);
                let bytes = bytes.get_or_insert_with(|| Buffer::zeroed(length));
                let target = &mut bytes[index(at - from)..][..span.length as usize];
                self.copy_out(layer, offset, target).await?;
            }
            at += u64::from(span.length);
        }
        Ok(bytes)
    }

    /// Reads what lies at `offset` of a layer's file, and starts and ends at any sector.
    async fn copy_out(&self, layer: u8, offset: u64, target: &mut [u8]) -> Outcome {
        let disk = match usize::from(layer).checked_sub(1) {
            None => &self.disk,
            Some(parent) => &self.parents[parent],
        };
        let end = offset + target.len() as u64;
        let length = disk.length().await.map_err(|error| errno(&error))?;
        if length < end && self.shared.has_lost(layer, length..end) {
            return Err(Errno::EIO);
        }
        read_sectors(disk, offset, target).await.map_err(|error| errno(&error))
    }
}
