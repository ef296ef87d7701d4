//! Copying what children have into the image they were made of.
//!
//! A child above has whatever is copied, so the content of the chain stays the same. Blocks of a child that
//! are zero, or that say nothing, become zero here: skipped, they would show what is here. A child ends where
//! its own disk ends: what a layer above shows there is zero too.

use std::rc::Rc;

use nix::errno::Errno;

use super::shared::Session;
use super::{Engine, Outcome, errno};
use crate::chain::ReadLayer;
use crate::disk::{Buffer, Disk, PAGE_BYTES, read_sectors};
use crate::format::bat::PayloadState;
use crate::format::{MIB, index};
use crate::image::{Location, locate};
use crate::simulation::{Plant, planted};

impl<D: Disk + 'static> Engine<D> {
    /// Copies into the image what `layers` have in `0..end`, the first before the second and so on. Calls
    /// `copied` with the number of bytes that are done; an error from it ends the copy. The session must be
    /// open.
    ///
    /// # Errors
    /// A positive `errno`; the uppermost layer still reads as before.
    pub async fn absorb(
        self: &Rc<Self>,
        layers: &[ReadLayer<D>],
        end: u64,
        copied: &impl Fn(u64) -> Outcome,
    ) -> Outcome {
        assert!(end <= self.shared.geometry().virtual_size(), "the image is as large as what it takes in");
        assert_ne!(self.shared.session(), Session::Idle, "the session opens before the first change");
        if self.shared.fixed {
            self.allocate(0, self.shared.geometry().block_count()).await?;
        }
        let mut at = 0;
        while at < end {
            self.check_poison()?;
            let (content, past) = longest(layers, at, end);
            match content {
                Location::File { layer, offset } => {
                    self.copy_in(&layers[usize::from(layer)].disk, offset, at, past).await?;
                }
                Location::Zero | Location::Undefined => self.make_zero(at, past, end).await?,
                Location::Below => {}
                Location::Lost => return Err(Errno::EIO),
            }
            at = past;
            copied(at)?;
        }
        Ok(())
    }

    /// Copies what lies at `offset` of `disk` to `from..to`.
    async fn copy_in(self: &Rc<Self>, disk: &D, mut offset: u64, from: u64, to: u64) -> Outcome {
        for (from, to) in pieces(from, to) {
            let mut bytes = vec![0; index(to - from)];
            read_sectors(disk, offset, &mut bytes).await.map_err(|error| errno(&error))?;
            self.put(from, &bytes).await?;
            offset += to - from;
        }
        Ok(())
    }

    /// Makes `from..to` zero. A block that reaches behind `end` ends there.
    async fn make_zero(self: &Rc<Self>, from: u64, to: u64, end: u64) -> Outcome {
        assert!(from < to && to <= end, "bytes {from} to {to} of {end}");
        let size = self.shared.geometry().block_size();
        let past = if to == end { to.div_ceil(size) } else { to / size };
        let first = from.div_ceil(size);
        if first >= past || self.shared.fixed {
            return self.put_zeros(from, to).await;
        }
        self.put_zeros(from, first * size).await?;
        self.unmap(first, past - first, true).await?;
        self.put_zeros((past * size).min(to), to).await
    }

    /// Zeroes parts of blocks; those that have nothing stay without space.
    async fn put_zeros(self: &Rc<Self>, from: u64, to: u64) -> Outcome {
        for (from, to) in pieces(from, to) {
            let block = self.shared.geometry().block_of_offset(from);
            self.zero_absent(block, 1, false).await?;
            if self.shared.map.load(block).entry.payload_state() != Some(PayloadState::Zero) {
                self.put(from, &vec![0; index(to - from)]).await?;
            }
        }
        Ok(())
    }

    /// Writes `bytes`, which are in one block, at virtual offset `at`. No other task writes meanwhile:
    /// sectors that share their page are written again as they are.
    async fn put(self: &Rc<Self>, at: u64, bytes: &[u8]) -> Outcome {
        let geometry = self.shared.geometry();
        let block = geometry.block_of_offset(at);
        let last = geometry.block_of_offset(at + bytes.len() as u64 - 1);
        assert_eq!(block, last, "what is written at once is in one block");
        self.allocate(block, 1).await?;
        let place = self.shared.map.load(block).entry.offset() + geometry.offset_in_block(at);
        let before = index(place % PAGE_BYTES as u64);
        let page = place - before as u64;
        let length = (before + bytes.len()).next_multiple_of(PAGE_BYTES);
        let mut pages = if length == bytes.len() {
            Buffer::zeroed(length)
        } else {
            self.disk.read(page, length).await.map_err(|error| errno(&error))?
        };
        pages[before..][..bytes.len()].copy_from_slice(bytes);
        self.disk.write(page, pages).await.map_err(|error| errno(&error))?;
        if !planted(Plant::ForgetMergedBits) {
            self.shared.mark_written(at, at + bytes.len() as u64);
        }
        Ok(())
    }
}

/// `from..to` in pieces of 1 MiB at most, each in one block: blocks are whole MiB.
fn pieces(from: u64, to: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut at = from;
    std::iter::from_fn(move || {
        let piece = (at, to.min((at / MIB + 1) * MIB));
        (at < to).then(|| {
            at = piece.1;
            piece
        })
    })
}

/// Where the bytes from `from` on are, and how far that holds, up to `end`.
fn longest<D>(layers: &[ReadLayer<D>], from: u64, end: u64) -> (Location, u64) {
    let (location, mut past) = first_of(layers, from, end);
    while past < end && !matches!(location, Location::File { .. }) {
        let (next, next_past) = first_of(layers, past, end);
        if next != location {
            break;
        }
        past = next_past;
    }
    (location, past)
}

/// The same, of the blocks that `from` is in only. What a layer does not define becomes zero.
fn first_of<D>(layers: &[ReadLayer<D>], from: u64, mut end: u64) -> (Location, u64) {
    for (layer, ReadLayer { map, .. }) in (0..).zip(layers) {
        let size = map.geometry().virtual_size();
        if from >= size {
            return (Location::Zero, end);
        }
        match locate(layer, map, from, end.min(size)) {
            (Location::Below, length) => end = from + length,
            (Location::Undefined, length) => return (Location::Zero, from + length),
            (location, length) => return (location, from + length),
        }
    }
    (Location::Below, end)
}
