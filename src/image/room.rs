//! Space for what an image at rest gets: free runs of the file, or what it grows by.
//!
//! Order: [`Room::make`] has the host make room first, which changes nothing that an image is, and is undone
//! if there is not enough; [`Room::clear`] makes the space zero; then it is filled, and only a later log
//! entry names it. A cut before that leaves free space, or an unused end.

use super::open::Image;
use super::space::{Extent, MAX_FILE_BYTES, Space};
use crate::disk::{Disk, PAGE_BYTES};
use crate::error::{Error, Kind, Result};
use crate::format::MIB;

/// What the host does for a piece of space.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Provision {
    /// It keeps room for it: a later write there does not fail for want of room.
    Now,
    /// It finds room when something is written there.
    Later,
}

/// See the module's head.
pub(super) struct Room {
    space: Space,
    /// Length of the file as it was found.
    found_length: u64,
    /// From there on it reads as zero after every power cut.
    zero_from: u64,
    taken: Vec<(Extent, Provision)>,
}

impl Room {
    /// None of the space of `image` is taken yet. What lies behind the end of its file reads as zero, and
    /// what lies behind `zero_from`.
    pub(super) fn of(image: &Image, zero_from: Option<u64>) -> Self {
        let found_length = image.layout.file_length;
        let end = found_length.next_multiple_of(PAGE_BYTES as u64);
        let zero_from = zero_from.map_or(end, |from| from.min(end));
        Self { space: image.space.clone(), found_length, zero_from, taken: Vec::new() }
    }

    /// Takes `length` bytes in one piece: the lowest free run that holds them, or what lies behind all else.
    pub(super) fn take(&mut self, length: u64, provision: Provision) -> Result<Extent> {
        if let Some(grant) = self.space.take(length) {
            self.taken.push((grant.extent, provision));
            return Ok(grant.extent);
        }
        let extent = Extent { offset: self.space.used_end(), length };
        self.take_at(extent, provision)?;
        Ok(extent)
    }

    /// Takes `extent`, of which nothing is used.
    pub(super) fn take_at(&mut self, extent: Extent, provision: Provision) -> Result<()> {
        if extent.offset.checked_add(extent.length).is_none_or(|end| end > MAX_FILE_BYTES) {
            let message = format!("the file would be longer than {MAX_FILE_BYTES} bytes");
            return Err(Error::new(Kind::Unsupported, message));
        }
        assert_eq!(self.space.claim(extent), None, "{extent:?} is free");
        self.taken.push((extent, provision));
        Ok(())
    }

    /// Takes room for `count` blocks of `size` bytes, in as few pieces as there are free runs.
    pub(super) fn take_blocks(&mut self, count: u64, size: u64, provision: Provision) -> Result<Vec<Extent>> {
        let (mut left, mut pieces) = (count, Vec::new());
        for run in self.space.free_runs() {
            let fit = left.min(run.length / size);
            if fit > 0 {
                pieces.push(Extent { offset: run.offset, length: fit * size });
                left -= fit;
            }
        }
        if left > 0 {
            // No file holds more blocks than a disk has: 64 TiB, and one.
            pieces.push(Extent { offset: self.space.used_end(), length: left * size });
        }
        for piece in &pieces {
            self.take_at(*piece, provision)?;
        }
        assert_eq!(pieces.iter().map(|piece| piece.length).sum::<u64>(), count * size, "each has its place");
        Ok(pieces)
    }

    /// How long the file must be, bytes.
    fn needed_length(&self) -> u64 {
        self.taken.iter().map(|(extent, _)| extent.end()).fold(self.found_length, u64::max)
    }

    /// Makes the file long enough, and has the host make room. If it cannot, the file is as long as before.
    pub(super) async fn make<D: Disk>(&self, disk: &D) -> Result<()> {
        let length = self.needed_length();
        if length > self.found_length {
            let grown = disk.grow(length).await;
            grown.map_err(|error| Error::io(format!("extending the file to {length} bytes"), error))?;
        }
        let reserved = self.reserve(disk).await;
        if reserved.is_err() {
            self.give_up(disk).await;
        }
        reserved
    }

    /// After [`Self::make`]: the file is as long as before. If that fails, it has an unused end.
    pub(super) async fn give_up<D: Disk>(&self, disk: &D) {
        if self.needed_length() > self.found_length {
            let _ = disk.truncate(self.found_length).await;
        }
    }

    async fn reserve<D: Disk>(&self, disk: &D) -> Result<()> {
        for (extent, provision) in &self.taken {
            if *provision == Provision::Now {
                let reserved = disk.reserve(extent.offset, extent.length).await;
                reserved.map_err(|error| {
                    let doing = format!("making room for {} bytes", extent.length);
                    Error::io(doing, error).at(extent.offset)
                })?;
            }
        }
        Ok(())
    }

    /// Makes the space zero, as far as it is not.
    pub(super) async fn clear<D: Disk>(&self, disk: &D) -> Result<()> {
        for (extent, provision) in &self.taken {
            let length = extent.end().min(self.zero_from).saturating_sub(extent.offset);
            if length > 0 {
                clear(disk, Extent { length, ..*extent }, *provision).await?;
            }
        }
        Ok(())
    }
}

async fn clear<D: Disk>(disk: &D, extent: Extent, provision: Provision) -> Result<()> {
    let zeroing = |error| Error::io("zeroing free space", error).at(extent.offset);
    if provision == Provision::Later && disk.punch(extent.offset, extent.length).await.map_err(zeroing)? {
        return Ok(());
    }
    disk.zero(extent.offset, extent.length).await.map_err(zeroing)
}

/// Makes `from..to` zero where the host stores something.
pub(super) async fn zero_stored<D: Disk>(disk: &D, from: u64, to: u64) -> Result<()> {
    let page = PAGE_BYTES as u64;
    assert!(from.is_multiple_of(page) && to.is_multiple_of(page), "pages are zeroed, {from} to {to}");
    let mut at = from;
    while at < to {
        let zeroing = |error| Error::io("zeroing what is unused", error).at(at);
        let found = disk.next_data(at).await.map_err(zeroing)?;
        let Some(found) = found.filter(|found| *found < to) else { break };
        let start = found - found % page;
        let end = to.min((start / MIB + 1) * MIB);
        assert!(end > at, "the search goes forward, from {at} to {end}");
        disk.zero(start, end - start).await.map_err(zeroing)?;
        at = end;
    }
    Ok(())
}

/// Punches every free run, as far as the host can. The log is empty, and durably so: no replay misses what is
/// given back.
pub(super) async fn punch_free_runs<D: Disk>(disk: &D, space: &Space) -> Result<()> {
    for run in space.free_runs() {
        assert!(!space.is_used(run.offset..run.end()), "{run:?} is free");
        let punched = disk.punch(run.offset, run.length).await;
        let punched = punched.map_err(|error| Error::io("giving space back", error).at(run.offset))?;
        if !punched {
            break; // the host cannot; the next examination says what is left
        }
    }
    Ok(())
}

/// Cuts the file to `length` bytes.
pub(super) async fn cut<D: Disk>(disk: &D, space: &Space, length: u64) -> Result<()> {
    assert!(length >= space.used_end(), "nothing that is used is cut off at {length}");
    let cut = disk.truncate(length).await;
    cut.map_err(|error| Error::io(format!("shortening the file to {length} bytes"), error))
}
