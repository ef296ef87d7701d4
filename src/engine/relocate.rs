//! Moving blocks and sector bitmaps to other places in the file, which changes no byte of the disk.
//!
//! Moves are made in batches. Of each batch, in this order:
//!
//! 1. the new places are granted, and read as zero but for what is copied. The file grows first if they lie
//!    behind its end;
//! 2. each block is marked as moving. From then on it is read where it is, and a front that would change it
//!    asks the engine, which answers once it has moved;
//! 3. every front answers a barrier: what was looked up before the mark has ended. Without that, a write
//!    could reach the old place when its part of it is copied already;
//! 4. what the host has stored of the old places is copied, several pieces at once: holes stay holes;
//! 5. the new mappings are published, in one step with the marks of their pages, and fully present blocks
//!    move no longer;
//! 6. a commit syncs the copies before it writes the entry that has the mappings. Without that sync, a power
//!    cut could keep the entry and lose the copies: the blocks would show what was at their new places;
//! 7. a partially present block moves until that entry is durable. A sector that is written to its new place
//!    has a bit, and the page of the bit may be logged before the page that has the place: a power cut in
//!    between would show the sector at the old place, which does not have it;
//! 8. the old places leave quarantine once the entry is durable, and what was looked up there has ended. If
//!    they were used again earlier, a power cut would bring the old mappings back, onto the content of other
//!    blocks; or a read would find it there.
//!
//! A power cut before step 6 leaves copies that nothing names, which is space without an owner. A kill, or a
//! host without room for the entry, leaves marks in the session: whoever would change such a block asks, and
//! the answer comes when its entry is durable.
//!
//! A sector bitmap moves as it is in the file, so none of its bits may be on their way there: neither waits a
//! page of it for the log, nor is one in it. A replay would write such a page to the old place, over what is
//! there by then. In a session that serves no fronts no bit changes; in one that does, bitmaps stay.
//!
//! [Rule 102](crate::design::vhdx_rules#rule-102).

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use nix::errno::Errno;

use super::shared::{LEAF, Session};
use super::waiting::Promise;
use super::{Engine, Outcome, errno, for_guest, too_long_is_full};
use crate::disk::{Buffer, Disk, PAGE_BYTES, is_zero};
use crate::format::bat::{BITMAP_BLOCK_SIZE, PayloadState};
use crate::format::{MIB, index};
use crate::image::{Content, Extent, Mapping, Page};
use crate::simulation::{Plant, planted};

/// Pieces that are copied at once: together the memory that a batch takes, in MiB.
const LANES: usize = 8;

/// The same while fronts serve requests, which share the disk.
const LANES_UNDER_LOAD: usize = 2;

/// Bytes of a piece.
const PIECE: u64 = MIB;

/// Of a piece, runs of so many zero bytes are not written: they stay holes. Hosts store pages: with longer
/// runs, what lies scattered in a block would take more space in its new place than in the old one.
const HOLE: usize = PAGE_BYTES;

const _: () = assert!(PIECE.is_multiple_of(HOLE as u64), "whole pages");

/// What has a place in the file and can get another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Occupant {
    /// A payload block, fully or partially present.
    Block(u64),
    /// The sector bitmap of a chunk.
    Bitmap(u64),
}

impl Occupant {
    /// The block that it is.
    fn block(self) -> Option<u64> {
        match self {
            Self::Block(block) => Some(block),
            Self::Bitmap(_) => None,
        }
    }

    /// How much space it takes, bytes.
    fn length(self, block_size: u64) -> u64 {
        match self {
            Self::Block(_) => block_size,
            Self::Bitmap(_) => BITMAP_BLOCK_SIZE,
        }
    }
}

/// A move: what is moved, and the bytes of the file where it starts before and afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// What is moved.
    pub what: Occupant,
    /// The place that it was seen at.
    pub from: u64,
    /// Its new place.
    pub to: u64,
}

/// A move whose new place is granted.
#[derive(Clone, Copy)]
struct Relocation {
    what: Occupant,
    from: Extent,
    to: Extent,
    granted: Content,
}

/// What is copied at once.
#[derive(Clone, Copy)]
struct Piece {
    from: u64,
    to: u64,
    length: usize,
}

impl<D: Disk + 'static> Engine<D> {
    /// Makes `moves`, no two of which overlap, but for those whose block is no longer where it was seen, or
    /// whose new place is no longer free. When it returns, they are durable and the old places are free. The
    /// session must be open. One caller at a time. See the module's head.
    ///
    /// Returns those that were made.
    ///
    /// # Errors
    /// A positive `errno`; the disk reads as before, and the session may be poisoned.
    pub async fn relocate(self: &Rc<Self>, moves: &[Move]) -> Outcome<Vec<Move>> {
        assert_ne!(self.shared.session(), Session::Idle, "the session opens before the first change");
        self.check_poison()?;
        let relocations = self.grant_places(moves).await?;
        let blocks: Vec<u64> = relocations.iter().filter_map(|relocation| relocation.what.block()).collect();
        let moving = self.turns.blocks.exclusively_all(&blocks, self.relocate_granted(relocations));
        let relocations = moving.await?;
        self.reclaim().await?;
        let made = |relocation: &Relocation| Move {
            what: relocation.what,
            from: relocation.from.offset,
            to: relocation.to.offset,
        };
        Ok(relocations.iter().map(made).collect())
    }

    /// Steps 2 to 7, while nothing else changes the blocks.
    async fn relocate_granted(self: &Rc<Self>, mut relocations: Vec<Relocation>) -> Outcome<Vec<Relocation>> {
        let gone = relocations.extract_if(.., |relocation| !self.is_there(relocation));
        self.free_places(gone);
        let blocks: Vec<u64> = relocations.iter().filter_map(|relocation| relocation.what.block()).collect();
        if let Err(errno) = self.end_moves(&blocks).await {
            self.give_places_back(relocations).await;
            return Err(errno);
        }
        for block in &blocks {
            self.shared.map.begin_move(*block);
        }
        if !planted(Plant::EarlyCopy) {
            self.await_pieces().await;
        }
        if let Err(errno) = self.fill_new_places(&relocations).await {
            for block in blocks {
                self.shared.map.end_move(block);
            }
            self.give_places_back(relocations).await;
            return Err(errno);
        }
        if !planted(Plant::SkipMoveSync) {
            self.durability.payload_written();
        }
        for relocation in &relocations {
            self.publish_move(relocation);
        }
        self.end_moves(&blocks).await?;
        Ok(relocations)
    }

    /// Takes the marks of moves that have ended off: step 7, or what an earlier process or failure has left.
    async fn end_moves(self: &Rc<Self>, blocks: &[u64]) -> Outcome {
        for block in blocks.iter().filter(|block| self.shared.map.load(**block).moving) {
            self.end_move(*block).await?;
        }
        Ok(())
    }

    /// The same for one block, which nothing else changes. Where no front writes, no bit is set.
    pub(super) async fn end_move(self: &Rc<Self>, block: u64) -> Outcome {
        let Mapping { entry, durable, .. } = self.shared.map.load(block);
        let partial = entry.payload_state() == Some(PayloadState::PartiallyPresent);
        if partial && !durable && self.fronts.count() > 0 && !planted(Plant::EarlyBits) {
            self.flush().await?;
        }
        self.shared.map.end_move(block);
        Ok(())
    }

    fn free_places(&self, relocations: impl IntoIterator<Item = Relocation>) {
        let mut space = self.space.borrow_mut();
        relocations.into_iter().for_each(|relocation| space.free(relocation.to, Content::Recycled));
    }

    /// A host that had no room for all of a batch may need what the rest of it took.
    async fn give_places_back(self: &Rc<Self>, relocations: Vec<Relocation>) {
        if self.check_poison().is_err() {
            return self.free_places(relocations);
        }
        for relocation in relocations {
            self.give_back(relocation.to).await;
        }
    }

    /// Unmaps `blocks`, which read as zeros, and the content that undefined and unmapped blocks still name.
    /// When it returns, that is durable and their space is free. The session must be open.
    ///
    /// # Errors
    /// As [`Self::relocate`].
    pub async fn give_up(self: &Rc<Self>, blocks: &[u64]) -> Outcome {
        assert_ne!(self.shared.session(), Session::Idle, "the session opens before the first change");
        for run in blocks.chunk_by(|block, next| block + 1 == *next) {
            self.unmap(run[0], run.len() as u64, false).await?;
        }
        self.reclaim().await
    }

    /// What occupies the file now, and what is free.
    pub fn space(&self) -> crate::image::Space {
        self.empty_pool();
        self.space.borrow().clone()
    }

    /// Step 1: takes the new places that are free, in a file that is long enough for them.
    async fn grant_places(self: &Rc<Self>, moves: &[Move]) -> Outcome<Vec<Relocation>> {
        let _turn = self.turns.growth.enter().await;
        let relocations = moves.iter().map(|Move { what, from, to }| {
            let length = what.length(self.shared.geometry().block_size());
            let (from, to) = (Extent { offset: *from, length }, Extent { offset: *to, length });
            assert!(to.end() <= from.offset || from.end() <= to.offset, "{what:?} moves onto itself");
            Relocation { what: *what, from, to, granted: Content::Recycled }
        });
        let mut relocations: Vec<Relocation> = relocations.collect();
        let end = relocations.iter().map(|relocation| relocation.to.end()).max().unwrap_or(0);
        if end > self.durability.file_length() {
            self.grow_to(end).await.map_err(too_long_is_full)?;
        }
        let mut space = self.space.borrow_mut();
        relocations.retain_mut(|relocation| match space.take_at(relocation.to) {
            Some(grant) => {
                relocation.granted = grant.content;
                true
            }
            None => false,
        });
        Ok(relocations)
    }

    /// Whether what is to be moved is where it was seen.
    fn is_there(&self, relocation: &Relocation) -> bool {
        match relocation.what {
            Occupant::Block(block) => {
                let entry = self.shared.map.load(block).entry;
                self.has_space(entry) && self.space_of(entry) == Some(relocation.from)
            }
            Occupant::Bitmap(chunk) => {
                assert_eq!(self.fronts.count(), 0, "a bitmap whose bits may change stays");
                assert!(!self.dirty.has_bits_of(chunk), "bits of chunk {chunk} are on their way to the file");
                self.shared.map.bitmap_place(chunk) == Some(relocation.from.offset)
            }
        }
    }

    /// Step 4.
    async fn fill_new_places(self: &Rc<Self>, relocations: &[Relocation]) -> Outcome {
        let mut pieces = Vec::new();
        if self.fronts.count() > 0 && !self.disk.takes_space_back() {
            // A host that keeps what was written to itself may call it a hole until then.
            self.sync().await?;
        }
        for relocation in relocations {
            self.clear(relocation.to, relocation.granted).await?;
            if self.is_dense() || matches!(relocation.what, Occupant::Bitmap(_)) {
                self.reserve(relocation.to).await?;
            }
            self.find_pieces(relocation, &mut pieces).await?;
        }
        self.in_lanes(pieces, |engine, piece| async move { engine.copy_piece(piece).await }).await?;
        self.check_poison()
    }

    /// Whether blocks have all their space on the host.
    fn is_dense(&self) -> bool {
        self.shared.fixed || !self.disk.may_have_holes()
    }

    /// Makes granted space read as zero, as a hole where the host has them.
    async fn clear(&self, place: Extent, content: Content) -> Outcome {
        let stored = match content {
            Content::KnownZero => None,
            Content::Recycled => self.disk.next_data(place.offset).await.map_err(|error| errno(&error))?,
        };
        if stored.is_none_or(|stored| stored >= place.end()) {
            return Ok(());
        }
        if self.shared.can_punch() {
            match self.disk.punch(place.offset, place.length).await {
                Ok(true) => return Ok(()),
                Ok(false) => self.shared.forget_punch(),
                Err(error) => return Err(for_guest(errno(&error))),
            }
        }
        self.disk.zero(place.offset, place.length).await.map_err(|error| for_guest(errno(&error)))
    }

    /// What the host has stored of the old place, in pieces.
    async fn find_pieces(&self, relocation: &Relocation, pieces: &mut Vec<Piece>) -> Outcome {
        let Relocation { from, to, .. } = *relocation;
        if matches!(relocation.what, Occupant::Bitmap(_)) && planted(Plant::MoveBareBitmap) {
            return Ok(());
        }
        let length = self.disk.length().await.map_err(|error| errno(&error))?;
        if length < from.end() && self.shared.has_lost(LEAF, length..from.end()) {
            return Err(Errno::EIO);
        }
        let mut at = from.offset;
        while let Some(stored) = self.disk.next_data(at).await.map_err(|error| errno(&error))? {
            if stored >= from.end() {
                break;
            }
            let start = stored - stored % PAGE_BYTES as u64;
            let end = (start - start % PIECE + PIECE).min(from.end());
            pieces.push(Piece {
                from: start,
                to: to.offset + (start - from.offset),
                length: index(end - start),
            });
            at = end;
        }
        Ok(())
    }

    /// Copies a piece, but for its pages of zeros.
    async fn copy_piece(&self, piece: Piece) -> Outcome {
        let Piece { from, to, length } = piece;
        let bytes = self.disk.read(from, length).await.map_err(|error| errno(&error))?;
        let put = async |at: usize, bytes: Buffer| {
            let written = self.disk.write(to + at as u64, bytes).await;
            written.map_err(|error| for_guest(errno(&error)))
        };
        let is_hole = |part: &[u8]| !self.is_dense() && is_zero(part);
        if !bytes.chunks(HOLE).any(is_hole) {
            return put(0, bytes).await;
        }
        let mut at = 0;
        for run in bytes.chunks(HOLE).collect::<Vec<_>>().chunk_by(|one, next| is_hole(one) == is_hole(next))
        {
            let run_length: usize = run.iter().map(|part| part.len()).sum();
            if !is_hole(run[0]) {
                put(at, Buffer::copy_of(&bytes[at..at + run_length])).await?;
            }
            at += run_length;
        }
        Ok(())
    }

    /// Step 5 of one move.
    fn publish_move(self: &Rc<Self>, relocation: &Relocation) {
        let Relocation { what, from, to, .. } = *relocation;
        assert!(self.space.borrow().is_used(to.offset..to.end()), "a new place is taken before it is named");
        assert!(to.end() <= self.durability.file_length(), "a new place lies in the file");
        let map = &self.shared.map;
        match what {
            Occupant::Block(block) => {
                self.mark(Page::Bat(map.page_of(block)));
                map.move_block(block, to.offset);
            }
            Occupant::Bitmap(chunk) => {
                self.mark(Page::Bat(map.page_of_bitmap(chunk)));
                map.move_bitmap(chunk, to.offset);
            }
        }
        if planted(Plant::ReuseMovedEarly) {
            self.space.borrow_mut().free(from, Content::Recycled);
        } else if planted(Plant::ForgetReaders) {
            self.start(move |engine| async move {
                if engine.flush().await.is_ok() {
                    engine.space.borrow_mut().free(from, Content::Recycled);
                }
            });
        } else {
            self.reclaim.lost(from);
        }
        self.count(|counters| counters.moves.add(1));
    }

    /// Does `work` for each of `jobs`, a few at a time, until one of them fails.
    pub(super) async fn in_lanes<J: 'static, F: Future<Output = Outcome> + 'static>(
        self: &Rc<Self>,
        jobs: Vec<J>,
        work: impl Fn(Rc<Self>, J) -> F + 'static,
    ) -> Outcome {
        let most = if self.fronts.count() > 0 { LANES_UNDER_LOAD } else { LANES };
        let lanes = jobs.len().min(most);
        let (jobs, work) = (Rc::new(RefCell::new(VecDeque::from(jobs))), Rc::new(work));
        let ends: Vec<Promise<Outcome>> = (0..lanes)
            .map(|_| {
                let end = Promise::default();
                let (jobs, work, ended) = (jobs.clone(), work.clone(), end.clone());
                self.start(move |engine| async move {
                    let next = || jobs.borrow_mut().pop_front();
                    let mut outcome = Ok(());
                    while outcome.is_ok()
                        && let Some(job) = next()
                    {
                        outcome = work(engine.clone(), job).await;
                    }
                    if outcome.is_err() {
                        jobs.borrow_mut().clear();
                    }
                    ended.keep(outcome);
                });
                end
            })
            .collect();
        let mut outcome = Ok(());
        for end in ends {
            outcome = outcome.and(end.wait().await);
        }
        outcome
    }
}
