//! The bytes of a damaged file: what can be read of them, and which are missing.

use std::cell::Cell;
use std::io;
use std::ops::Range;

use crate::disk::{Buffer, PAGE_BYTES, ReadDisk};
use crate::error::{Doing, Locate, Result};
use crate::format::index;
use crate::image::overlay::Overlay;

const PAGE: u64 = PAGE_BYTES as u64;

/// What a host says of bytes that its medium does not give out. Every other error is one of the moment, and
/// no reason to take the bytes for lost.
const MEDIUM: [i32; 8] = [
    libc::EIO,
    libc::ENODATA,
    libc::EBADMSG,
    libc::EILSEQ,
    libc::EUCLEAN,
    libc::EREMOTEIO,
    libc::ETIMEDOUT,
    libc::ENOLINK,
];

/// A file, and the replayed log over it.
pub(super) struct Source<'a, D> {
    pub(super) disk: &'a D,
    pub(super) overlay: Option<&'a Overlay>,
    /// How long the file is, bytes: what lies behind is missing.
    pub(super) length: u64,
}

/// What was read.
pub(super) struct Found {
    /// The bytes, zeros where they are missing.
    pub(super) bytes: Buffer,
    /// Which of the file's bytes are missing, ascending.
    pub(super) missing: Vec<Range<u64>>,
}

impl Found {
    /// Whether the file's bytes in `range` were all read.
    pub(super) fn has(&self, range: &Range<u64>) -> bool {
        !self.missing.iter().any(|missing| missing.start < range.end && range.start < missing.end)
    }
}

impl<D: ReadDisk> Source<'_, D> {
    /// Reads `length` bytes at `offset`, both whole pages.
    ///
    /// # Errors
    /// Errors of the host that say nothing of its medium.
    pub(super) async fn read(&self, offset: u64, length: usize) -> Result<Found> {
        assert!(
            offset.is_multiple_of(PAGE) && length.is_multiple_of(PAGE_BYTES),
            "{length} bytes at {offset}"
        );
        let end = offset + length as u64;
        let inside = self.length.clamp(offset, end);
        let readable = index(inside - offset).next_multiple_of(PAGE_BYTES);
        let read = read_around(self.disk, offset, readable).await;
        let (mut bytes, mut missing) = read.doing("reading").at(offset)?;
        if readable < length {
            let mut longer = Buffer::zeroed(length);
            longer[..readable].copy_from_slice(&bytes);
            bytes = longer;
        }
        add(&mut missing, inside..end);
        if let Some(overlay) = self.overlay {
            overlay.patch(offset, &mut bytes);
            missing = uncovered(&missing, overlay);
        }
        assert!(missing.iter().all(|range| offset <= range.start && range.end <= end), "of what was read");
        Ok(Found { bytes, missing })
    }
}

/// What of `missing` the log does not have either.
fn uncovered(missing: &[Range<u64>], overlay: &Overlay) -> Vec<Range<u64>> {
    let mut left = Vec::new();
    for range in missing {
        let mut at = range.start;
        while at < range.end {
            let next = ((at / PAGE + 1) * PAGE).min(range.end);
            if !overlay.covers(at - at % PAGE) {
                add(&mut left, at..next);
            }
            at = next;
        }
    }
    left
}

/// Appends `range` to ascending `ranges`; neighbours become one.
fn add(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        _ if range.is_empty() => {}
        Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
        _ => ranges.push(range),
    }
}

/// Reads `length` bytes at `offset`, page by page where the medium does not give them out at once: zeros
/// stand for the pages that it does not give out at all.
async fn read_around<D: ReadDisk>(
    disk: &D,
    offset: u64,
    length: usize,
) -> io::Result<(Buffer, Vec<Range<u64>>)> {
    let mut bytes = Buffer::zeroed(length);
    let mut missing = Vec::new();
    let mut left: Vec<Range<u64>> = std::iter::once(offset..offset + length as u64).collect();
    while let Some(part) = left.pop().filter(|part| !part.is_empty()) {
        let size = index(part.end - part.start);
        match disk.read(part.start, size).await {
            Ok(read) => bytes[index(part.start - offset)..][..size].copy_from_slice(&read),
            Err(error) if !error.raw_os_error().is_some_and(|number| MEDIUM.contains(&number)) => {
                return Err(error);
            }
            Err(_) if size <= PAGE_BYTES => add(&mut missing, part),
            Err(_) => {
                let middle = part.start + (size as u64 / 2).next_multiple_of(PAGE);
                left.extend([middle..part.end, part.start..middle]);
            }
        }
    }
    Ok((bytes, missing))
}

/// A file in which zeros stand for what cannot be read.
pub(super) struct Forgiving<'a, D> {
    disk: &'a D,
    has_forgiven: Cell<bool>,
}

impl<'a, D> Forgiving<'a, D> {
    pub(super) fn new(disk: &'a D) -> Self {
        Self { disk, has_forgiven: Cell::new(false) }
    }

    /// Whether something could not be read.
    pub(super) fn has_forgiven(&self) -> bool {
        self.has_forgiven.get()
    }
}

impl<D: ReadDisk> ReadDisk for Forgiving<'_, D> {
    async fn read(&self, offset: u64, length: usize) -> io::Result<Buffer> {
        let (bytes, missing) = read_around(self.disk, offset, length).await?;
        self.has_forgiven.set(self.has_forgiven.get() || !missing.is_empty());
        Ok(bytes)
    }

    async fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.disk.next_data(offset).await
    }

    async fn length(&self) -> io::Result<u64> {
        self.disk.length().await
    }

    fn takes_space_back(&self) -> bool {
        false
    }
}
