//! A front on its own, whose file I/O ends whole and at once: what the front itself costs, and counting what
//! it does, is all it costs.

use std::sync::Arc;

use vhdx_ublk::engine::Outcome;
use vhdx_ublk::engine::front::{Front, MAX_PIECES, Request};
use vhdx_ublk::engine::message::ToEngine;
use vhdx_ublk::engine::port::{FileIo, FileOp, PieceId, Port, Ticket};
use vhdx_ublk::engine::port_counts::{PortCounts, Traffic};
use vhdx_ublk::engine::shared::Shared;
use vhdx_ublk::format::bat::{BatEntry, Geometry};
use vhdx_ublk::image::BlockMap;

pub const MIB: u64 = 1 << 20;

/// The map of a disk in blocks of 1 MiB, each of them in the file and durably so: block 0 lies at `place(0)`
/// bytes, and so on. Every page of the map is resident.
pub fn full_map(virtual_size: u64, place: impl Fn(u64) -> u64) -> BlockMap {
    let map = BlockMap::empty(Geometry::new(virtual_size, 1 << 20, 512, false));
    let geometry = *map.geometry();
    for block in 0..geometry.block_count() {
        map.restore(geometry.payload_slot(block), &[BatEntry::present(place(block)).write()]);
    }
    map
}

/// A front in an open session, and the end of what it starts.
pub struct Loopback {
    front: Front,
    ends: Ends,
}

/// The pieces under way.
struct Ends {
    pieces: [(PieceId, i32); MAX_PIECES],
    live: usize,
    /// Pieces so far.
    started: u64,
    result: Option<i32>,
    counts: PortCounts,
}

impl Port for Ends {
    fn change_leaf(&mut self) -> Option<Arc<Shared>> {
        None
    }

    fn submit(&mut self, piece: PieceId, io: FileIo) {
        assert_ne!(io.op, FileOp::FillZero, "{piece:?} misses: every block is in the file");
        self.counts.submits(io, 1);
        self.pieces[self.live] = (piece, io.length.cast_signed());
        self.live += 1;
        self.started += 1;
    }

    fn send(&mut self, message: ToEngine) {
        panic!("a hit asks the engine nothing: {message:?}");
    }

    fn complete(&mut self, ticket: Ticket, result: Outcome<u32>) {
        self.counts.ends(ticket.tag(), result);
        let result = result.map_or_else(|errno| -(errno as i32), u32::cast_signed);
        assert!(self.result.replace(result).is_none(), "a request is completed once");
    }
}

impl Loopback {
    pub fn new(map: BlockMap) -> Self {
        let shared = Arc::new(Shared::new(map, false, false));
        shared.open_session();
        let idle = (PieceId { tag: 0, piece: 0 }, 0);
        let ends = Ends {
            pieces: [idle; MAX_PIECES],
            live: 0,
            started: 0,
            result: None,
            counts: PortCounts::default(),
        };
        Self { front: Front::new(shared, 64), ends }
    }

    /// The result of one whole request.
    #[inline]
    pub fn request(&mut self, tag: u16, request: Request) -> i32 {
        self.ends.counts.begins(tag, request);
        self.front.start(tag, request, &mut self.ends);
        while self.ends.live > 0 {
            self.ends.live -= 1;
            let (piece, result) = self.ends.pieces[self.ends.live];
            self.front.io_done(piece, result, &mut self.ends);
        }
        self.ends.result.take().expect("nothing is left to wait for")
    }

    /// What was counted so far.
    #[allow(dead_code, reason = "a benchmark looks at nothing")]
    pub fn traffic(&self) -> Traffic {
        self.ends.counts.traffic(1)
    }

    /// Pieces of file I/O so far.
    pub fn started(&self) -> u64 {
        self.ends.started
    }
}
