//! The pieces that a disk is copied in, in its order.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use crate::error::{Doing, Error, Kind, Result};
use crate::format::index;
use crate::format::vhd::SECTOR;
use crate::operations::source::{Part, Source, Walk, refuse_images};
use crate::operations::workers::PIECE;

/// The longest run of zeros that is one piece: a host may take long to make them.
const ZEROS: u64 = 256 << 20;

/// Milliseconds for which a stream is waited for until the work can be stopped.
const PERIOD: u8 = 100;

/// Pieces begin on a multiple of this where they can.
const UNIT: u64 = 4096;

/// Some bytes of the disk, never more than those of one block of the target.
pub(super) struct Piece {
    /// Pieces are numbered from 0.
    pub(super) number: u64,
    pub(super) range: Range<u64>,
    pub(super) content: Content,
}

/// What a piece holds.
pub(super) enum Content {
    /// Zeros, of any length.
    Zeros,
    /// What lies in these places, and zeros between.
    Parts(Vec<Part>),
    /// What was put into the buffer.
    Here,
}

/// Where pieces come from.
pub(super) struct Feed<'a> {
    from: From<'a>,
    /// Whether zeros are pieces, too.
    with_zeros: bool,
    at: u64,
    number: u64,
    /// Where the target's disk ends, if that is known.
    size: Option<u64>,
}

enum From<'a> {
    Disk {
        walk: Walk<'a>,
        source_size: u64,
    },
    /// Whatever it begins with, and how long it may be.
    Stream {
        input: File,
        any_content: bool,
        most: u64,
    },
}

impl<'a> Feed<'a> {
    /// The pieces of `source`, whose copy has `size` bytes.
    pub(super) fn of_disk(source: &'a Source, size: u64, with_zeros: bool) -> Self {
        assert!(size >= source.size(), "nothing is left out");
        let from = From::Disk { walk: Walk::new(source), source_size: source.size() };
        Self { from, with_zeros, at: 0, number: 0, size: Some(size) }
    }

    /// The pieces of standard input, until it ends: at most `most` bytes, and no image unless it may have
    /// `any_content`.
    ///
    /// # Errors
    ///
    /// When the process has no descriptor left.
    pub(super) fn of_stream(with_zeros: bool, any_content: bool, most: u64) -> Result<Self> {
        // Without the buffer of the standard library, which a poll does not see.
        let input = io::stdin().as_fd().try_clone_to_owned().doing("opening standard input")?;
        let from = From::Stream { input: input.into(), any_content, most };
        Ok(Self { from, with_zeros, at: 0, number: 0, size: None })
    }

    /// How many bytes of the disk there were so far.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// The bytes of the target's disk; 0 if that is not known yet.
    pub(super) fn size(&self) -> u64 {
        self.size.unwrap_or(0)
    }

    /// The next piece; a stream's is put into `buffer`, which has room for one. No stream is waited for once
    /// the work `is_stopped`.
    ///
    /// # Errors
    ///
    /// Those of finding places, and of reading the stream.
    pub(super) fn next(&mut self, buffer: &mut [u8], is_stopped: impl Fn() -> bool) -> Result<Option<Piece>> {
        let (range, content) = match &mut self.from {
            From::Stream { input, any_content, most } => {
                let length = fill(input, buffer, is_stopped)?;
                if self.at == 0 && !*any_content {
                    refuse_images(&buffer[..index(length)])?;
                }
                if length > *most - self.at {
                    let message =
                        format!("standard input is longer than {most} bytes, which the target can hold");
                    return Err(Error::new(Kind::Unsupported, message).remedy("convert to raw"));
                }
                (self.at..self.at + length, Content::Here)
            }
            From::Disk { walk, source_size } => {
                let size = self.size.expect("a disk has a size");
                let data = walk.next_data(self.at.min(*source_size))?;
                let (nothing, start) = (data == *source_size, (data / UNIT * UNIT).max(self.at));
                if start > self.at && self.with_zeros || nothing {
                    let end = if nothing { size } else { start };
                    let from = if self.with_zeros { self.at } else { end };
                    (from..end.min(from + ZEROS), Content::Zeros)
                } else {
                    let end = ((start / PIECE + 1) * PIECE).min(*source_size);
                    (start..end, Content::Parts(walk.parts(start..end)?))
                }
            }
        };
        self.at = range.end;
        if range.is_empty() {
            return Ok(None);
        }
        self.number += 1;
        Ok(Some(Piece { number: self.number - 1, range, content }))
    }
}

/// Fills `buffer` from the stream as far as it has that much, and with zeros to a whole sector.
fn fill(stream: &mut File, buffer: &mut [u8], is_stopped: impl Fn() -> bool) -> Result<u64> {
    const READING: &str = "reading standard input";
    let mut done = 0;
    while done < buffer.len() {
        let mut ready = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PERIOD) {
            Ok(0) | Err(Errno::EINTR) if is_stopped() => break,
            Ok(0) | Err(Errno::EINTR) => continue,
            ready => ready.map(drop).doing(READING)?,
        }
        match stream.read(&mut buffer[done..]) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).doing(READING),
        }
    }
    let padded = (done as u64).next_multiple_of(SECTOR);
    buffer[done..index(padded)].fill(0);
    Ok(padded)
}
