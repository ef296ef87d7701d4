//! Copying a disk into its target, by several threads.
//!
//! A thread takes the next piece, reads it, and looks for what is not zero in it. Then it waits for the turn
//! of the piece, in which a block gets space: so blocks lie in the file in the order of the disk, however the
//! threads race. It writes after its turn, beside the others. No piece is read twice, and zeros are not
//! written, unless old content would show.

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::feed::{Content, Feed, Piece};
use super::vhd_draft::VhdDraft;
use crate::disk::{Buffer, PAGE_BYTES, SharedFile, is_zero};
use crate::error::{Doing, Error, Kind, Result};
use crate::format::index;
use crate::image::Draft;
use crate::operations::Watch;
use crate::operations::source::{Part, Source};
use crate::operations::workers::{PIECE, Turns, Workers};

/// The shortest run of zeros within a piece that is left out: leaving out less makes a file of many parts.
const GAP: usize = 64 << 10;

/// The most zeros that are written to a stream at once.
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// Where the bytes of the disk lie in the target.
pub(super) enum Layout {
    /// At the same offset.
    Same {
        /// The bytes that there are, if they cannot become more.
        capacity: Option<u64>,
    },
    Vhdx(Draft),
    Vhd(VhdDraft),
    /// One behind the other, on standard output.
    Stream(File),
}

/// What a copy reads and writes.
pub(super) struct Copy<'a> {
    feed: Mutex<Feed<'a>>,
    source: Option<&'a Source>,
    /// None for standard output.
    file: Option<&'a SharedFile>,
    turns: Turns<Layout>,
    workers: Workers,
    /// Whether the target holds old content, which zeros must cover.
    over_old: bool,
    written: AtomicU64,
    shared: AtomicU64,
}

/// What was copied.
pub(super) struct Copied {
    pub(super) layout: Layout,
    /// Bytes of the disk.
    pub(super) size: u64,
    /// Bytes that were written.
    pub(super) written: u64,
    /// Bytes whose blocks both files share.
    pub(super) shared: u64,
}

impl<'a> Copy<'a> {
    /// A copy of what `feed` gives, from `source` if it is not a stream.
    pub(super) fn new(
        feed: Feed<'a>,
        source: Option<&'a Source>,
        file: Option<&'a SharedFile>,
        layout: Layout,
        over_old: bool,
    ) -> Self {
        assert_eq!(file.is_none(), matches!(layout, Layout::Stream(_)), "all but a stream has a file");
        let total = feed.size();
        Self {
            feed: feed.into(),
            source,
            file,
            turns: Turns::new(layout),
            workers: Workers::new(total),
            over_old,
            written: AtomicU64::new(0),
            shared: AtomicU64::new(0),
        }
    }

    /// Copies everything. Nothing is durable yet.
    ///
    /// # Errors
    ///
    /// Those of reading and writing; [`Kind::Stopped`] if `watch` asks for that.
    pub(super) fn run(self, watch: &dyn Watch) -> Result<Copied> {
        self.workers.run(watch, || self.work().inspect_err(|_| self.turns.break_off()))?;
        let feed = self.feed.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(Copied {
            layout: self.turns.into_inner(),
            size: feed.at(),
            written: self.written.into_inner(),
            shared: self.shared.into_inner(),
        })
    }

    fn work(&self) -> Result<()> {
        let mut buffer = Buffer::zeroed(index(PIECE));
        while let Some(piece) = self.next(&mut buffer)? {
            self.workers.reached(piece.range.start);
            let Some(()) = self.copy(&piece, &mut buffer)? else { break };
        }
        Ok(())
    }

    fn next(&self, buffer: &mut [u8]) -> Result<Option<Piece>> {
        if self.workers.is_stopped() {
            return Ok(None);
        }
        self.feed.lock().unwrap_or_else(PoisonError::into_inner).next(buffer, || self.workers.is_stopped())
    }

    /// Copies one piece; nothing if an earlier one has failed.
    fn copy(&self, piece: &Piece, buffer: &mut [u8]) -> Result<Option<()>> {
        let Piece { number, range, content } = piece;
        let length = range.end - range.start;
        match content {
            Content::Zeros => {
                let taken = self.turns.take(*number, |layout| match layout {
                    Layout::Stream(output) => print_zeros(output, length),
                    _ => Ok(()),
                });
                let (Some(()), Some(file)) = (taken?, self.file) else { return Ok(Some(())) };
                return file.zero(range.clone()).map(Some);
            }
            Content::Parts(parts) => {
                if let Some((source, part)) = self.shareable(range, parts) {
                    return self.share(piece, source, part, buffer);
                }
                let source = self.source.expect("a stream has no parts");
                source.read(parts, range.start, &mut buffer[..index(length)])?;
            }
            Content::Here => {}
        }
        self.write(piece, &buffer[..index(length)])
    }

    /// The only part of a piece, if it is the whole piece and may become a part of the target as it is.
    fn shareable(&self, range: &Range<u64>, parts: &[Part]) -> Option<(&'a SharedFile, Part)> {
        let [part] = *parts else { return None };
        let source = &self.source?.files()[part.file];
        let whole = part.start == range.start && part.start + part.length == range.end;
        let paged =
            [part.start, part.length, part.offset].iter().all(|at| at.is_multiple_of(PAGE_BYTES as u64));
        (whole && paged && self.file?.can_share_blocks(source)).then_some((source, part))
    }

    /// Has the target share the blocks of a piece with its source, or else copies it.
    fn share(&self, piece: &Piece, source: &SharedFile, part: Part, buffer: &mut [u8]) -> Result<Option<()>> {
        let turn = self.turns.take(piece.number, |layout| {
            layout.require(&piece.range)?;
            Ok(layout.place(&piece.range))
        });
        let Some(Some(place)) = turn? else { return Ok(None) };
        let file = self.file.expect("a stream shares nothing");
        if file.share_blocks(place, source, part.offset, part.length) {
            self.shared.fetch_add(part.length, Ordering::Relaxed);
            return Ok(Some(()));
        }
        let bytes = &mut buffer[..index(part.length)];
        source.read(part.offset, bytes)?;
        file.write(place, bytes)?;
        self.written.fetch_add(part.length, Ordering::Relaxed);
        Ok(Some(()))
    }

    /// Writes the `bytes` of a piece, in its turn.
    fn write(&self, piece: &Piece, bytes: &[u8]) -> Result<Option<()>> {
        let runs = runs(bytes);
        let turn = self.turns.take(piece.number, |layout| match layout {
            Layout::Stream(output) => print(output, bytes).map(|()| None),
            layout => {
                layout.require(&piece.range)?;
                Ok(if runs.is_empty() { None } else { layout.place(&piece.range) })
            }
        });
        let Some(place) = turn? else { return Ok(None) };
        let Some(file) = self.file else { return Ok(Some(())) };
        let Some(place) = place else {
            if self.over_old {
                file.zero(piece.range.clone())?;
            }
            return Ok(Some(()));
        };
        let mut done = 0;
        for run in &runs {
            self.cover(file, place, bytes, done..run.start)?;
            file.write(place + run.start as u64, &bytes[run.clone()])?;
            self.written.fetch_add(run.len() as u64, Ordering::Relaxed);
            done = run.end;
        }
        self.cover(file, place, bytes, done..bytes.len()).map(Some)
    }

    /// Has the zeros in `gap` of a piece cover the old content of its target.
    fn cover(&self, file: &SharedFile, place: u64, bytes: &[u8], gap: Range<usize>) -> Result<()> {
        if !self.over_old {
            return Ok(());
        }
        if gap.len() < GAP {
            return file.write(place + gap.start as u64, &bytes[gap]);
        }
        file.zero(place + gap.start as u64..place + gap.end as u64)
    }
}

impl Layout {
    /// Whether there is a place for `range`: zeros behind the end of a target would be lost as well.
    fn require(&self, range: &Range<u64>) -> Result<()> {
        match self {
            Self::Same { capacity: Some(capacity) } if range.end > *capacity => {
                let message = format!("the target has {capacity} bytes, and the disk more");
                Err(Error::new(Kind::NoSpace, message).remedy("name a larger target"))
            }
            _ => Ok(()),
        }
    }

    /// Where the bytes of `range` lie, in a block that gets space if it has none; nowhere in a stream.
    fn place(&mut self, range: &Range<u64>) -> Option<u64> {
        match self {
            Self::Same { .. } => Some(range.start),
            Self::Vhdx(draft) => Some(draft.place(range.start)),
            Self::Vhd(draft) => Some(draft.place(range.start)),
            Self::Stream(_) => None,
        }
    }
}

/// What of `bytes` is to be written: everything but long runs of zeros.
fn runs(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    for page in bytes.chunks(PAGE_BYTES) {
        let end = at + page.len();
        if !is_zero(page) {
            match runs.last_mut() {
                Some(last) if at - last.end < GAP => last.end = end,
                _ => runs.push(at..end),
            }
        }
        at = end;
    }
    runs
}

fn print(output: &mut File, bytes: &[u8]) -> Result<()> {
    output.write_all(bytes).doing("writing standard output")
}

fn print_zeros(output: &mut File, length: u64) -> Result<()> {
    let mut left = length;
    while left > 0 {
        let zeros = &ZEROS[..index(left.min(ZEROS.len() as u64))];
        print(output, zeros)?;
        left -= zeros.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_not_zero_is_in_a_run() {
        let mut bytes = vec![0; 1 << 20];
        assert!(runs(&bytes).is_empty());
        for at in [5000, 90_000, 100_000, 900_000, (1 << 20) - 1] {
            bytes[at] = 1;
        }
        let runs = runs(&bytes);
        assert_eq!(runs, [4096..8192, 86_016..102_400, 897_024..901_120, (1 << 20) - 4096..1 << 20]);
    }
}
