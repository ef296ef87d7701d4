//! Blocks of the image that is served move to other places, and its file is cut, while requests come.

use std::cell::RefCell;
use std::rc::Rc;

use nix::errno::Errno;
use vhdx_ublk::engine::Outcome;
use vhdx_ublk::engine::relocate::{Move, Occupant};
use vhdx_ublk::format::bat::{BatEntry, PayloadState};
use vhdx_ublk::image::{Extent, payload_extent};

use super::World;
use crate::sim::violation::violated;

const MIB: u64 = 1 << 20;

/// Moves of a batch, at most.
const MOST: usize = 3;

/// Batches of a life, at most.
const MOST_BATCHES: usize = 20;

/// How many moves were made, and by how many bytes the file has become shorter.
type Ended = Outcome<(usize, u64)>;

/// A batch that is under way, and how many images were judged before it.
pub(super) struct Batch {
    outcome: Rc<RefCell<Option<Ended>>>,
    planned: usize,
    judged: u64,
    /// The new places that were holes.
    holes: Vec<Extent>,
}

/// Whether the entries are those of a block before and after a move.
pub(super) fn is_move(old: BatEntry, new: BatEntry) -> bool {
    let there = [PayloadState::FullyPresent, PayloadState::PartiallyPresent].map(Some);
    old.payload_state() == new.payload_state() && there.contains(&new.payload_state())
}

impl World {
    pub(super) fn moves_now(&mut self) -> bool {
        self.end_batch();
        let moves = self.config.faults.moves;
        let may = self.batch.is_none() && self.held.is_none() && self.batches < MOST_BATCHES;
        // An image that is being closed gets no requests.
        moves > 0 && may && self.config.requests > 0 && self.rng.u32(..moves) == 0
    }

    /// Begins to move some blocks, and may cut the file afterwards.
    pub(super) fn begin_batch(&mut self) {
        let moves = self.choose_moves();
        if moves.is_empty() {
            return;
        }
        self.batches += 1;
        let block_size = self.engine.shared().geometry().block_size();
        let places = moves.iter().map(|place| Extent { offset: place.to, length: block_size });
        let holes = places.filter(|place| self.disk.room(|room| room.is_hole(place.offset, place.length)));
        let holes = holes.collect();
        let (engine, cuts, planned) = (self.engine.clone(), self.rng.bool(), moves.len());
        let pool_is_empty = engine.without_pool();
        let outcome = self.tasks.start(async move {
            let _pool_is_empty = pool_is_empty;
            engine.open_session().await?;
            let made = engine.relocate(&moves).await?.len();
            let cut = if cuts { engine.cut().await? } else { 0 };
            Ok((made, cut))
        });
        let judged = self.images_judged();
        self.batch = Some(Batch { outcome, planned, judged, holes });
    }

    fn choose_moves(&mut self) -> Vec<Move> {
        let (engine, mut space) = (self.engine.clone(), self.engine.space());
        let map = &engine.shared().map;
        let end = space.used_end();
        let mut blocks: Vec<u64> = self
            .config
            .blocks
            .iter()
            .copied()
            .filter(|block| *block < map.geometry().block_count())
            .collect();
        self.rng.shuffle(&mut blocks);
        let mut moves = Vec::new();
        for block in blocks {
            let entry = map.load(block).entry;
            let Some(from) = payload_extent(entry, map.geometry()).filter(|_| is_move(entry, entry)) else {
                continue;
            };
            let free = if self.rng.bool() { space.take(from.length).map(|grant| grant.extent) } else { None };
            let behind = end + self.rng.u64(..4) * MIB;
            let to = free.unwrap_or(Extent { offset: behind, ..from });
            if free.is_some() || !space.is_used(to.offset..to.end()) {
                space.claim(to);
                moves.push(Move { what: Occupant::Block(block), from: from.offset, to: to.offset });
            }
            if moves.len() == MOST {
                break;
            }
        }
        moves
    }

    /// Takes the outcome of a batch that has ended.
    fn end_batch(&mut self) {
        let Some(outcome) = self.batch.as_ref().and_then(|batch| batch.outcome.borrow_mut().take()) else {
            return;
        };
        let Batch { planned, judged, holes, .. } = self.batch.take().expect("just seen");
        self.marks.add("images while blocks move", self.images_judged() - judged);
        match outcome {
            Ok((made, cut)) => {
                self.marks.add("blocks that move under load", made as u64);
                self.marks.add("moves that come too late", (planned - made) as u64);
                self.marks.add("cuts of a served file", u64::from(cut > 0));
            }
            Err(Errno::ENOSPC) if self.config.faults.full > 0 => self.check_room(&holes),
            Err(_) if self.injected => {}
            Err(errno) => violated(format!("blocks do not move: {errno}")),
        }
    }

    /// A batch that has found no room keeps none.
    fn check_room(&mut self, holes: &[Extent]) {
        self.marks.hit("batches that find no room");
        let space = self.engine.space();
        for place in holes.iter().filter(|place| !space.is_used(place.offset..place.end())) {
            if !self.disk.room(|room| room.is_hole(place.offset, place.length)) {
                violated(format!("a batch without room keeps what it has taken at {}", place.offset));
            }
        }
    }

    /// What holds the fronts waits for the batch that is under way.
    pub(super) fn await_batch(&mut self) {
        let deaths = self.deaths;
        self.step_until("the blocks have moved", |world| {
            world.deaths > deaths || world.batch.as_ref().is_none_or(|batch| batch.outcome.borrow().is_some())
        });
        self.end_batch();
    }
}
