//! Copying what is left of a disk.
//!
//! One window is read while the one before it is written. Zeros are not written: the target reads as zeros
//! where nothing was.

use std::ops::Range;
use std::path::Path;

use uuid::Uuid;

use super::remains::{Remains, Status, Totals, Window};
use crate::disk::{Buffer, Disk, PAGE_BYTES, ReadDisk};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::{MIB, index};
use crate::image::{Draft, NewImage};
use crate::operations::Watch;

/// The most that is read at once, bytes.
const WINDOW_BYTES: u64 = 4 * MIB;

/// The unit in which zeros are left out, bytes.
const UNIT: usize = 64 << 10;

/// A unit of zeros.
static ZEROS: [u8; UNIT] = [0; UNIT];

const _: () = assert!(UNIT.is_multiple_of(PAGE_BYTES), "whole pages are written");

/// Where the disk's bytes go.
#[expect(async_fn_in_trait, reason = "one thread drives all of it: futures need not be Send")]
pub trait Target {
    /// Writes `data`, whole pages, at byte `offset` of the disk. Offsets ascend.
    ///
    /// # Errors
    /// Those of the host.
    async fn write(&mut self, offset: u64, data: Buffer) -> Result<()>;
}

/// A file that has the disk's bytes and nothing else.
pub struct RawTarget<'a, D>(pub &'a D);

impl<D: Disk> Target for RawTarget<'_, D> {
    async fn write(&mut self, offset: u64, data: Buffer) -> Result<()> {
        self.0.write(offset, data).await.doing("writing the copy").at(offset)
    }
}

/// A target at `path`, which its errors name.
pub(super) struct Named<'a, T> {
    pub(super) target: T,
    pub(super) path: &'a Path,
}

impl<T: Target> Target for Named<'_, T> {
    async fn write(&mut self, offset: u64, data: Buffer) -> Result<()> {
        self.target.write(offset, data).await.file(self.path)
    }
}

/// A new dynamic image. Its blocks are written first, and everything that leads to them last.
pub struct ImageTarget<'a, D> {
    disk: &'a D,
    draft: Draft,
    /// How long the file is, bytes.
    length: u64,
}

/// How much the file of an image grows at least, bytes.
const GROWTH_BYTES: u64 = 64 * MIB;

impl<'a, D: Disk> ImageTarget<'a, D> {
    /// An image like `new` in the empty file of `disk`.
    ///
    /// # Errors
    /// Usage if the numbers are not those of a legal image.
    pub fn new(disk: &'a D, new: &NewImage) -> Result<Self> {
        assert!(!new.fixed && new.parent.is_none(), "blocks get space where the copy has data");
        Ok(Self { disk, draft: new.draft()?, length: 0 })
    }

    /// Finishes the image, durably.
    ///
    /// # Errors
    /// Those of the host.
    pub async fn finish(self, new_guid: impl FnMut() -> Uuid) -> Result<()> {
        let end = self.draft.length();
        self.draft.finish(self.disk, new_guid).await?;
        if self.length > end {
            self.disk.truncate(end).await.doing("making the copy")?;
        }
        self.disk.sync().await.doing("syncing the copy")
    }
}

impl<D: Disk> Target for ImageTarget<'_, D> {
    async fn write(&mut self, offset: u64, data: Buffer) -> Result<()> {
        let end = offset + data.len() as u64;
        let mut at = offset;
        while at < end {
            let past = ((at / self.draft.block_size() + 1) * self.draft.block_size()).min(end);
            let place = self.draft.place(at);
            if self.draft.length() > self.length {
                self.length = self.draft.length() + GROWTH_BYTES;
                self.disk.grow(self.length).await.doing("making the copy")?;
            }
            let bytes = Buffer::copy_of(&data[index(at - offset)..index(past - offset)]);
            self.disk.write(place, bytes).await.doing("writing the copy").at(place)?;
            at = past;
        }
        Ok(())
    }
}

/// Copies all that is left of `remains`. `record` gets what is known of the disk's bytes, in their order
/// and without a gap.
///
/// # Errors
/// Errors of the host that say nothing of the source's medium; those of `record`; [`Kind::Stopped`].
pub async fn copy<D: ReadDisk>(
    remains: &Remains<D>,
    target: &mut impl Target,
    record: &mut impl FnMut(Range<u64>, Status) -> Result<()>,
    watch: &dyn Watch,
) -> Result<Totals> {
    let to_read = remains.plan(|_, _| ());
    let mut totals = Totals::default();
    let (mut at, mut done, mut under_way) = (0, 0, None);
    let mut runs = Vec::new();
    loop {
        at = remains.next_stored(at, &mut runs);
        let end = ((at / WINDOW_BYTES + 1) * WINDOW_BYTES).min(remains.virtual_size());
        let read = async { if at < end { remains.read(at..end).await.map(Some) } else { Ok(None) } };
        let (window, written) = smol::future::zip(read, write(target, under_way.take())).await;
        written?;
        for (range, status) in runs.drain(..) {
            totals.add(range.end - range.start, status);
            record(range, status)?;
        }
        let Some(mut window) = window? else { break };
        runs.append(&mut window.runs);
        under_way = Some(window);
        done = to_read.min(done + (end - at));
        at = end;
        watch.progress(done, to_read);
        if watch.stop_requested() {
            let error = Error::new(Kind::Stopped, "salvaging was stopped, and nothing of the copy is kept");
            return Err(error.remedy("run the command again; it begins from the start"));
        }
    }
    assert_eq!(
        totals.finished_bytes + totals.lost_bytes + totals.unknown_bytes,
        remains.virtual_size(),
        "every byte of the disk has a status"
    );
    Ok(totals)
}

/// Writes what of `window` is not zero.
async fn write(target: &mut impl Target, window: Option<Window>) -> Result<()> {
    let Some(Window { start, bytes, .. }) = window else { return Ok(()) };
    let units: Vec<(usize, bool)> =
        bytes.chunks(UNIT).map(|unit| (unit.len(), *unit == ZEROS[..unit.len()])).collect();
    let mut at = 0;
    for run in units.chunk_by(|(_, zero), (_, next)| zero == next) {
        let length: usize = run.iter().map(|(length, _)| length).sum();
        if !run[0].1 {
            target.write(start + at as u64, Buffer::copy_of(&bytes[at..at + length])).await?;
        }
        at += length;
    }
    assert_eq!(index(at as u64), bytes.len(), "all of the window was looked at");
    Ok(())
}
