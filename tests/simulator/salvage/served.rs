//! What a device gives out of a damaged chain, by the front that serves it: the copy's bytes, and an error in
//! each sector of which a byte is lost.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use vhdx_ublk::disk::ReadDisk;
use vhdx_ublk::engine::Outcome as Ended;
use vhdx_ublk::engine::front::{Front, Op, Request};
use vhdx_ublk::engine::message::ToEngine;
use vhdx_ublk::engine::port::{FileIo, FileOp, PieceId, Port, Ticket};
use vhdx_ublk::engine::shared::Shared;
use vhdx_ublk::error::Kind;
use vhdx_ublk::operations::salvage::{RemainsLayer, Status};

use super::Outcome;
use crate::craft::MIB;
use crate::sim::tasks::block_on;

/// Above this many MiB not each of them is read.
const MOST_MIB: u64 = 4096;

/// The most sectors that one outcome is compared in.
const MOST_SECTORS: usize = 20_000;

/// The files of a chain, and the one request under way.
struct Files<D> {
    disks: Vec<D>,
    buffer: Vec<u8>,
    pieces: Vec<(PieceId, FileIo)>,
    result: Option<Ended<u32>>,
}

impl<D: ReadDisk> Files<D> {
    /// What the host answers.
    fn answer(&mut self, io: FileIo) -> i32 {
        let FileIo { op, layer, file_offset, buffer_offset, length } = io;
        let target = &mut self.buffer[buffer_offset as usize..][..length as usize];
        if op == FileOp::FillZero {
            target.fill(0);
            return length.cast_signed();
        }
        assert_eq!(op, FileOp::Read, "nothing is written");
        let disk = &self.disks[usize::from(layer)];
        let end = block_on(disk.length()).expect("known");
        let stored = end.saturating_sub(file_offset).min(length.into());
        let start = file_offset - file_offset % 4096;
        let past = (file_offset + stored).next_multiple_of(4096).max(start);
        let bytes = |count: u64| usize::try_from(count).expect("a request");
        if stored > 0 {
            let Ok(read) = block_on(disk.read(start, bytes(past - start))) else { return -libc::EIO };
            target[..bytes(stored)].copy_from_slice(&read[bytes(file_offset - start)..][..bytes(stored)]);
        }
        i32::try_from(stored).expect("a request")
    }
}

impl<D: ReadDisk> Port for Files<D> {
    fn submit(&mut self, piece: PieceId, io: FileIo) {
        self.pieces.push((piece, io));
    }

    fn send(&mut self, message: ToEngine) {
        panic!("a reader asks the engine nothing: {message:?}");
    }

    fn change_leaf(&mut self) -> Option<Arc<Shared>> {
        None
    }

    fn complete(&mut self, _: Ticket, result: Ended<u32>) {
        assert!(self.result.replace(result).is_none(), "a request is completed once");
    }
}

/// Reads `range` of the device, if that does not fail.
fn read<D: ReadDisk>(front: &mut Front, files: &mut Files<D>, range: &Range<u64>) -> Option<Vec<u8>> {
    let length = range.end - range.start;
    files.buffer = vec![0xee; usize::try_from(length).expect("a request")];
    front.start(0, Request { op: Op::Read, offset: range.start, length }, files);
    while let Some((piece, io)) = files.pieces.pop() {
        let result = files.answer(io);
        front.io_done(piece, result, files);
    }
    match files.result.take().expect("nothing is left to wait for") {
        Ok(done) => {
            assert_eq!(u64::from(done), length, "all of {range:?}");
            Some(std::mem::take(&mut files.buffer))
        }
        Err(errno) => {
            assert_eq!(errno as i32, libc::EIO, "{range:?}");
            None
        }
    }
}

/// Asserts that a device of the chain gives out what `outcome` has.
pub fn assert_same<D: ReadDisk>(layers: Vec<RemainsLayer<D>>, outcome: &Outcome) {
    let sector = u64::from(layers[0].image.metadata().logical_sector_size);
    let (mut disks, mut maps) = (Vec::new(), Vec::new());
    for RemainsLayer { disk, image } in layers {
        let map = match image.into_map() {
            Ok(map) => map,
            // Only a copy has what the log has of the payload.
            Err(error) if error.kind() == Kind::Unsupported => return,
            Err(error) => panic!("{error:#}"),
        };
        disks.push(disk);
        maps.push(Arc::new(map));
    }
    let leaf = maps.remove(0);
    let size = leaf.geometry().virtual_size();
    let mut front = Front::new(Arc::new(Shared::of_chain(leaf, maps.into(), true, false)), 1);
    let mut files = Files { disks, buffer: Vec::new(), pieces: Vec::new(), result: None };
    for start in places(outcome, size, sector) {
        // The sector alone, and with the next one.
        for end in [start + sector, start + 2 * sector] {
            let range = start..end.min(size);
            let first = outcome.runs.partition_point(|(run, _)| run.end <= range.start);
            let runs = outcome.runs[first..].iter().take_while(|(run, _)| run.start < range.end);
            let is_lost = runs.clone().any(|(_, status)| *status == Status::Lost);
            let mut expected = vec![0; usize::try_from(range.end - range.start).expect("two sectors")];
            outcome.copy.read(range.start, &mut expected);
            let found = read(&mut front, &mut files, &range);
            assert_eq!(found.is_none(), is_lost, "{range:?}: {:?}", runs.collect::<Vec<_>>());
            assert!(found.is_none_or(|found| found == expected), "{range:?} has other bytes than the copy");
        }
    }
}

/// The sectors that are compared: at both ends of each run, in each stored page of the copy, and in each MiB
/// of a disk that is not too large.
fn places(outcome: &Outcome, size: u64, sector: u64) -> BTreeSet<u64> {
    let borders = outcome.runs.iter().flat_map(|(run, _)| {
        let middle = run.start.midpoint(run.end);
        [run.start, middle, run.end - 1, run.end.saturating_sub(sector + 1)]
    });
    let grid = (0..size.min(MOST_MIB * MIB)).step_by(1 << 20);
    let pages = outcome.copy.stored().map(|(at, _)| at);
    let inside = pages.flat_map(|at| (at..at + 4096).step_by(usize::try_from(sector).expect("small")));
    let places = borders.take(MOST_SECTORS).chain(grid).chain(inside.take(MOST_SECTORS));
    places.filter(|at| *at < size).map(|at| at - at % sector).collect()
}
