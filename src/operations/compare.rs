//! Comparing the content of two disks.
//!
//! Pieces are taken in the order of the disk, by several threads, and what neither disk has is passed over.
//! When a difference is found no further piece is taken; those under way are before it or end soon, so that
//! the first difference is the one that is named.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::Watch;
use super::source::{Part, Source, Walk};
use super::workers::{PIECE, Workers};
use crate::disk::Buffer;
use crate::error::Result;
use crate::format::index;

/// How two disks compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compared {
    /// The first byte that differs. Where one disk ends the other is compared with zeros.
    pub difference: Option<u64>,
    /// The sizes of the disks, bytes.
    pub sizes: [u64; 2],
    /// Bytes that were read of either.
    pub read: u64,
}

struct Comparison<'a> {
    sources: [&'a Source; 2],
    feed: Mutex<Feed<'a>>,
    workers: Workers,
    difference: AtomicU64,
    read: AtomicU64,
}

/// Where there may be differences.
struct Feed<'a> {
    sources: [&'a Source; 2],
    walks: [Walk<'a>; 2],
    at: u64,
    end: u64,
}

/// Some bytes of both disks, from this one on.
struct Piece {
    start: u64,
    length: usize,
    parts: [Vec<Part>; 2],
}

/// Compares two disks.
///
/// # Errors
///
/// Those of reading; [`Kind::Stopped`](crate::error::Kind::Stopped) if `watch` asks for that.
pub fn compare(one: &Source, other: &Source, watch: &dyn Watch) -> Result<Compared> {
    let sources = [one, other];
    let sizes = sources.map(Source::size);
    let end = sizes[0].max(sizes[1]);
    let comparison = Comparison {
        sources,
        feed: Feed { sources, walks: sources.map(Walk::new), at: 0, end }.into(),
        workers: Workers::new(end),
        difference: AtomicU64::new(u64::MAX),
        read: AtomicU64::new(0),
    };
    comparison.workers.run(watch, || comparison.work())?;
    let difference = Some(comparison.difference.into_inner()).filter(|&at| at != u64::MAX);
    assert!(difference.is_none_or(|at| at < end), "a difference is on one of the disks");
    Ok(Compared { difference, sizes, read: comparison.read.into_inner() })
}

impl Comparison<'_> {
    fn work(&self) -> Result<()> {
        let mut buffers = [Buffer::zeroed(index(PIECE)), Buffer::zeroed(index(PIECE))];
        while !self.workers.is_stopped() {
            let Some(piece) = self.feed.lock().unwrap_or_else(PoisonError::into_inner).next()? else { break };
            self.workers.reached(piece.start);
            for ((source, parts), buffer) in self.sources.iter().zip(&piece.parts).zip(&mut buffers) {
                source.read(parts, piece.start, &mut buffer[..piece.length])?;
                let read: u64 = parts.iter().map(|part| part.length).sum();
                self.read.fetch_add(read, Ordering::Relaxed);
            }
            let [one, other] = buffers.each_ref().map(|buffer| &buffer[..piece.length]);
            if one != other {
                let at = one.iter().zip(other).position(|(one, other)| one != other);
                let at = piece.start + at.expect("something differs") as u64;
                self.difference.fetch_min(at, Ordering::Relaxed);
                self.workers.stop();
            }
        }
        Ok(())
    }
}

impl Feed<'_> {
    fn next(&mut self) -> Result<Option<Piece>> {
        let mut start = self.end;
        for (source, walk) in self.sources.iter().zip(&mut self.walks) {
            if self.at < source.size() {
                let data = walk.next_data(self.at)?;
                start = start.min(if data < source.size() { data } else { self.end });
            }
        }
        if start == self.end {
            return Ok(None);
        }
        let end = ((start / PIECE + 1) * PIECE).min(self.end);
        self.at = end;
        let [one, other] = &mut self.walks;
        let parts = [one.parts(start..end)?, other.parts(start..end)?];
        Ok(Some(Piece { start, length: index(end - start), parts }))
    }
}
