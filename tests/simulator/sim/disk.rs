//! The simulated disk: what a file on a disk with a volatile cache may do.
//!
//! * An operation may take effect on the medium from the moment it is issued; it is seen by reads when it has
//!   completed. The test chooses the order of completions.
//! * A sync makes durable what had *completed before the sync was issued*; the rest stays at risk.
//! * After a cut, the medium holds what was durable and any subset of what was at risk, sector by sector; of
//!   two writes to one sector either may have come last if neither was durable. The length is any length the
//!   file has passed through since the last sync, independently of the data.
//! * Writes that have completed may be lost before they are durable; which sync reports it, and when, see
//!   `errors`.
//! * There may be no room for a write: see `room`. Of one that is refused a part may be there all the same.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::task::{Poll, Waker};

use fastrand::Rng;
use vhdx_ublk::disk::{Buffer, Disk, ReadDisk};
use vhdx_ublk::engine::port::PieceId;
use vhdx_ublk::simulation::{Plant, planted};

use super::errors::{Descriptions, Through};
use super::judge::lengths;
use super::places::Places;
use super::room::Room;
use super::store::Store;
use super::violation::violated;

/// The numbers of "try again", of an I/O error, of a host without room and of what was not begun.
pub const EAGAIN: i32 = 11;
pub const EIO: i32 = 5;
pub const ENOSPC: i32 = 28;
const ECANCELED: i32 = 125;

/// How a cut treats what was at risk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Profile {
    /// P0: all of it is lost, or all of it is there.
    NoneOrAll,
    /// P1: whole writes are lost or there.
    Writes,
    /// P2: each sector of 512 bytes is lost or there.
    Sectors512,
    /// P3: each sector of 4096 bytes is lost or there.
    Sectors4096,
    /// P5: the length goes its own way, data as in P2.
    Length,
}

impl Profile {
    pub const ALL: [Self; 5] =
        [Self::NoneOrAll, Self::Writes, Self::Sectors512, Self::Sectors4096, Self::Length];
}

/// Who waits for an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    Engine,
    Front(usize, PieceId),
}

/// What an operation does.
#[derive(Clone, Debug)]
pub enum Effect {
    Read {
        offset: u64,
        length: usize,
    },
    Write {
        offset: u64,
        bytes: Rc<Vec<u8>>,
        durable: bool,
    },
    Zero {
        offset: u64,
        length: u64,
        /// The range is a hole then.
        gives_back: bool,
    },
    Resize(u64),
    /// A request's data comes from elsewhere; the file has no part in it.
    Given {
        bytes: Rc<Vec<u8>>,
        length: usize,
    },
    Sync,
    /// The range has its place on the host then; no byte changes.
    Reserve {
        offset: u64,
        length: u64,
    },
}

#[derive(Clone, Debug)]
struct Op {
    id: u64,
    owner: Owner,
    effect: Effect,
    /// For a sync: everything that had completed when it was issued has a smaller number.
    covers: u64,
    /// Of a sync: the description to which the host reports what it has lost.
    through: Through,
    /// Ends long after others: what was looked up before it may be gone by then.
    slow: bool,
}

/// A change that is not durable yet.
#[derive(Clone, Debug)]
pub struct AtRisk {
    pub op: u64,
    /// Its place in the order of completions; none while in flight.
    completed: Option<u64>,
    pub effect: Effect,
    /// Ranges that a later durable write has settled: this change can no longer come back there.
    settled: Vec<Range<u64>>,
}

impl Effect {
    /// The operation's own number.
    pub fn digest(&self) -> u64 {
        let fold = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(23);
        match self {
            Self::Read { offset, length } => fold(fold(1, *offset), *length as u64),
            Self::Write { offset, bytes, durable } => {
                let words = bytes.chunks_exact(8);
                let words = words.map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")));
                words.fold(fold(2 + u64::from(*durable), *offset), fold)
            }
            Self::Zero { offset, length, .. } => fold(fold(4, *offset), *length),
            Self::Resize(length) => fold(5, *length),
            Self::Sync => fold(6, 0),
            Self::Reserve { offset, length } => fold(fold(7, *offset), *length),
            Self::Given { length, .. } => fold(8, *length as u64),
        }
    }
}

impl AtRisk {
    /// Where its bytes go.
    pub fn start(&self) -> Option<u64> {
        match self.effect {
            Effect::Write { offset, .. } | Effect::Zero { offset, .. } => Some(offset),
            _ => None,
        }
    }

    /// Whether it cannot be lost while the power is on: it is no data, or has not completed.
    fn stays(&self) -> bool {
        self.completed.is_none() || !matches!(self.effect, Effect::Write { .. })
    }

    /// Whether it has not completed.
    pub fn in_flight(&self) -> bool {
        self.completed.is_none()
    }

    /// Whether it may still change the byte at `place`.
    pub fn reaches(&self, place: u64) -> bool {
        let range = match &self.effect {
            Effect::Write { offset, bytes, .. } => *offset..*offset + bytes.len() as u64,
            Effect::Zero { offset, length, .. } => *offset..*offset + *length,
            _ => return false,
        };
        range.contains(&place) && !self.settled.iter().any(|settled| settled.contains(&place))
    }
}

/// What goes wrong once with one operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails with this `errno`, so often in a row; some of it may have happened all the same.
    Error { errno: i32, times: u32 },
    /// It ends after a part, though the file does not end there. What a front meets, and the engine never.
    Short,
}

/// A fault that waits for its operation.
#[derive(Clone, Copy, Debug)]
pub struct Injection {
    pub fault: Fault,
    /// Which operations it may hit.
    pub hits: fn(Owner, &Effect) -> bool,
    /// How many of those it lets pass.
    pub after: u64,
    /// Decides what a failed operation has done nevertheless.
    pub seed: u64,
}

/// What the disk did, for the activation report.
#[derive(Clone, Copy, Debug, Default)]
pub struct Activity {
    pub syncs: u64,
    pub writes: u64,
    pub resizes: u64,
    pub durable_writes: u64,
    pub zeroes: u64,
}

#[derive(Default)]
struct State {
    /// What reads see.
    cache: Store,
    /// What survives any cut.
    durable: Store,
    at_risk: Vec<AtRisk>,
    in_flight: Vec<Op>,
    completions: u64,
    next_op: u64,
    waiting: Vec<(u64, Waker)>,
    results: Vec<(u64, io::Result<Buffer>)>,
    activity: Activity,
    /// Count what changes the files that a cut may leave: any of them, those that differ in metadata, those
    /// that differ in what is durable.
    versions: (u64, u64),
    durable_version: u64,
    /// Of a file without holes: what was added and is not durable, and how much had completed by then.
    added: Vec<(Range<u64>, u64)>,
    /// Where metadata is.
    places: Places,
    trace: u64,
    injection: Option<Injection>,
    struck: Option<(Owner, Effect)>,
    descriptions: Descriptions,
    room: Room,
    host: Host,
}

/// What the host knows of lost data beyond this file's own syncs.
#[derive(Clone, Copy, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
struct Host {
    /// The next sync of a killed process fails, and the error with it.
    loses: bool,
    /// The file system was not asked since data was lost.
    lost: bool,
    /// It is being asked.
    asked: bool,
    /// Data was lost, or the answer was: a successor may refuse.
    doubtful: bool,
}

/// A handle on the disk; clones share it.
#[derive(Clone)]
pub struct SimDisk {
    state: Rc<RefCell<State>>,
    /// Operations end at once: for opening an image outside the world's schedule.
    immediate: Rc<Cell<bool>>,
    /// Half of the syncs are slow.
    slow_syncs: Rc<Cell<bool>>,
    can_punch: bool,
    /// The file must have no holes.
    dense: Rc<Cell<bool>>,
    /// A lost write is reported only to the description that it came by.
    reports_to_writer_only: Rc<Cell<bool>>,
    /// The medium writes no less than this at once, bytes.
    sector_size: u32,
}

/// An operation whose process has died.
pub struct Abandoned(Op);

/// The end of an operation that a front waits for.
pub struct FrontDone {
    pub front: usize,
    pub piece: PieceId,
    pub result: i32,
    /// What a read found.
    pub bytes: Option<Vec<u8>>,
}

impl SimDisk {
    /// A disk that holds `content`, all of it durable.
    pub fn new(content: Store, immediate: bool, can_punch: bool, sector_size: u32) -> Self {
        let state = State { cache: content.clone(), durable: content, ..State::default() };
        Self {
            state: Rc::new(RefCell::new(state)),
            immediate: Rc::new(Cell::new(immediate)),
            slow_syncs: Rc::default(),
            can_punch,
            dense: Rc::default(),
            reports_to_writer_only: Rc::default(),
            sector_size,
        }
    }

    /// From now on operations wait for the world, or no longer do.
    pub fn set_immediate(&self, immediate: bool) {
        self.immediate.set(immediate);
    }

    /// From now on half of the syncs are slow: much happens while one is under way.
    pub fn slow_syncs(&self, slow: bool) {
        self.slow_syncs.set(slow);
    }

    /// From now on a sync or a durable write of a process that was killed may fail: what it should have made
    /// durable is lost, and only that process gets the error.
    pub fn lose_what_dies(&self) {
        self.state.borrow_mut().host.loses = true;
    }

    /// Whether a successor has a reason to refuse.
    pub fn is_doubtful(&self) -> bool {
        self.state.borrow().host.doubtful
    }

    /// What reads see now.
    pub fn content(&self) -> Store {
        self.state.borrow().cache.clone()
    }

    /// Everything that was asked of the disk and when it ended, as one number.
    pub fn trace(&self) -> u64 {
        self.state.borrow().trace
    }

    /// Counts of what changed the files that a cut may leave: any of them, and those that differ in metadata.
    pub fn versions(&self) -> (u64, u64) {
        self.state.borrow().versions
    }

    /// Counts what changed what is durable.
    pub fn durable_version(&self) -> u64 {
        self.state.borrow().durable_version
    }

    /// Says where metadata is.
    pub fn set_metadata(&self, places: Places) {
        self.state.borrow_mut().places = places;
    }

    /// There is a sector bitmap at byte `place`: metadata from now on.
    pub fn add_bitmap(&self, place: u64) {
        let mut state = self.state.borrow_mut();
        if state.places.add_bitmap(place) {
            state.changed(&Effect::Sync);
        }
    }

    /// Where metadata is.
    pub fn metadata(&self) -> Places {
        self.state.borrow().places.clone()
    }

    /// Shows what is durable, what is at risk, and the lengths that the file may have after a cut.
    pub fn at_risk<T>(&self, look: impl FnOnce(&Store, &[AtRisk], Vec<u64>) -> T) -> T {
        let state = self.state.borrow();
        let lengths = lengths(state.durable.length, state.at_risk.iter().map(|change| &change.effect));
        look(&state.durable, &state.at_risk, lengths)
    }

    /// Completes the `index`-th operation, which a front waits for, with an error. `EAGAIN` has not begun it;
    /// any other error may have done any of it.
    pub fn fail(&self, index: usize, errno: i32) -> FrontDone {
        let mut state = self.state.borrow_mut();
        let op = state.in_flight.remove(index);
        state.trace =
            state.trace.rotate_left(5) ^ op.id.wrapping_mul(0x1_0001) ^ u64::from(errno.unsigned_abs());
        let Owner::Front(front, piece) = op.owner else { panic!("the engine's disk retries by itself") };
        if errno == EAGAIN {
            state.at_risk.retain(|change| change.op != op.id);
        } else {
            state.completions += 1;
            let number = state.completions;
            if let Some(change) = state.at_risk.iter_mut().find(|change| change.op == op.id) {
                change.completed = Some(number);
            }
        }
        state.changed(&op.effect);
        FrontDone { front, piece, result: -errno, bytes: None }
    }

    /// Fails the `index`-th operation, a sync: of what it should have made durable, some sectors are on the
    /// medium and the rest never will be, though reads still see it. No other description gets the error.
    pub fn fail_sync(&self, index: usize, rng: &mut Rng) -> Option<FrontDone> {
        let mut state = self.state.borrow_mut();
        let op = state.in_flight.remove(index);
        state.lose(op.covers, rng);
        if let Owner::Front(front, piece) = op.owner {
            return Some(FrontDone { front, piece, result: -EIO, bytes: None });
        }
        state.results.push((op.id, Err(io::Error::from_raw_os_error(EIO))));
        if let Some(place) = state.waiting.iter().position(|(id, _)| *id == op.id) {
            state.waiting.swap_remove(place).1.wake();
        }
        None
    }

    /// A durable write or a front's sync, the `index`-th operation, fails as the device's cache cannot be
    /// flushed: what was there is gone, and no other description gets an error.
    pub fn lose_device_cache(&self, index: usize) -> FrontDone {
        self.state.borrow_mut().at_risk.retain(AtRisk::stays);
        self.fail(index, EIO)
    }

    /// Writing back some of what has completed fails; the next sync by each description fails with `errno`.
    /// Whether there was anything.
    pub fn lose(&self, errno: i32, rng: &mut Rng) -> bool {
        let mut state = self.state.borrow_mut();
        let before = state.at_risk.len();
        let all = rng.bool();
        state.at_risk.retain(|change| change.stays() || !all && rng.bool());
        let lost = state.at_risk.len() < before;
        if lost {
            state.descriptions.lose(errno);
            state.changed(&Effect::Sync);
        }
        lost
    }

    /// Another process opens the file.
    pub fn open_anew(&self) {
        self.state.borrow_mut().descriptions.open_anew();
    }

    /// From now on a hole breaks a promise.
    pub fn forbid_holes(&self) {
        self.dense.set(true);
    }

    /// From now on a lost write is reported only to the description that it came by.
    pub fn report_to_writer_only(&self) {
        self.reports_to_writer_only.set(true);
    }

    /// From now on the holes of the file count, and on a host that copies on write overwrites, too.
    pub fn watch_room(&self, copies: bool) {
        let mut state = self.state.borrow_mut();
        let stored: Vec<u64> = state.cache.stored().map(|(offset, _)| offset).collect();
        state.room.watch(stored.into_iter(), copies);
    }

    /// The host has no room left, or has some again.
    pub fn set_full(&self, full: bool) {
        self.state.borrow_mut().room.set_full(full);
    }

    /// The room of the host.
    pub fn room<T>(&self, look: impl FnOnce(&Room) -> T) -> T {
        look(&self.state.borrow().room)
    }

    /// How many operations are in flight.
    pub fn operations(&self) -> usize {
        self.state.borrow().in_flight.len()
    }

    /// The places of the operations in flight that are syncs.
    pub fn syncs(&self) -> Vec<usize> {
        let state = self.state.borrow();
        (0..state.in_flight.len()).filter(|&at| matches!(state.in_flight[at].effect, Effect::Sync)).collect()
    }

    /// Whether a front waits for the `index`-th operation, and whether it is a durable write.
    pub fn front_op(&self, index: usize) -> (bool, bool) {
        let state = self.state.borrow();
        let op = &state.in_flight[index];
        let durable = matches!(op.effect, Effect::Write { durable: true, .. });
        (matches!(op.owner, Owner::Front(..)), durable)
    }

    /// Whose the `index`-th operation is, a front's: the front, the tag, and the piece of its request.
    pub fn front_piece(&self, index: usize) -> (usize, u16, u8) {
        match self.state.borrow().in_flight[index].owner {
            Owner::Front(front, piece) => (front, piece.tag, piece.piece),
            Owner::Engine => panic!("it is the engine's"),
        }
    }

    /// Whether the `index`-th operation is a front's sync.
    pub fn is_front_sync(&self, index: usize) -> bool {
        let state = self.state.borrow();
        let op = &state.in_flight[index];
        matches!(op.owner, Owner::Front(..)) && matches!(op.effect, Effect::Sync)
    }

    /// Lets a fault wait for its operation.
    pub fn inject(&self, injection: Injection) {
        self.state.borrow_mut().injection = Some(injection);
    }

    /// The operation that the fault has hit.
    pub fn struck(&self) -> Option<(Owner, Effect)> {
        self.state.borrow().struck.clone()
    }

    /// Takes the fault back, and says which operation it has hit.
    pub fn disarm(&self) -> Option<(Owner, Effect)> {
        let mut state = self.state.borrow_mut();
        state.injection = None;
        state.struck.take()
    }

    pub fn activity(&self) -> Activity {
        self.state.borrow().activity
    }

    /// The places of the operations in flight that are slow, or that are not; with or without syncs.
    pub fn places(&self, slow: bool, syncs: bool) -> Vec<usize> {
        let state = self.state.borrow();
        let wanted = |op: &Op| op.slow == slow && (syncs || !matches!(op.effect, Effect::Sync));
        (0..state.in_flight.len()).filter(|&place| wanted(&state.in_flight[place])).collect()
    }

    /// Starts an operation.
    pub fn issue(&self, owner: Owner, effect: Effect, slow: bool) -> u64 {
        let through = match (owner, &effect) {
            (Owner::Front(front, _), Effect::Sync) => Through::Queue(front),
            _ => Through::Shared,
        };
        self.issue_through(owner, effect, slow, through)
    }

    fn issue_through(&self, owner: Owner, effect: Effect, slow: bool, through: Through) -> u64 {
        self.check_density(owner, &effect);
        let mut state = self.state.borrow_mut();
        let id = state.next_op;
        state.next_op += 1;
        let covers = state.completions;
        state.trace = state.trace.rotate_left(5) ^ effect.digest();
        state.issued(&effect);
        if matches!(effect, Effect::Write { .. } | Effect::Zero { .. } | Effect::Resize(_)) {
            state.at_risk.push(AtRisk {
                op: id,
                completed: None,
                effect: effect.clone(),
                settled: Vec::new(),
            });
        }
        state.in_flight.push(Op { id, owner, effect, covers, through, slow });
        id
    }

    /// A hole that is punched stays, and a server may punch one to zero a range; the engine's own zeroing is
    /// the disk's affair, which knows the host.
    fn check_density(&self, owner: Owner, effect: &Effect) {
        if let Effect::Write { offset, bytes, .. } = effect {
            let range = *offset..*offset + bytes.len() as u64;
            let mut added =
                self.state.borrow().added.iter().map(|(added, _)| added.clone()).collect::<Vec<_>>();
            added.retain(|added| added.start < range.end && range.start < added.end);
            if let Some(added) = added.first() {
                violated(format!(
                    "{owner:?} writes {range:?} in {added:?}, which may hold anything after a cut"
                ));
            }
        }
        let Effect::Zero { offset, length, gives_back } = *effect else { return };
        if self.dense.get() && (gives_back || owner != Owner::Engine) {
            violated(format!("{owner:?} makes a hole of {length} bytes at {offset} in a dense file"));
        }
    }

    /// Completes the `index`-th operation in flight. What a front waits for is returned; the engine is woken.
    pub fn complete(&self, index: usize) -> Option<FrontDone> {
        let mut state = self.state.borrow_mut();
        let mut op = state.in_flight.remove(index);
        state.trace = state.trace.rotate_left(5) ^ op.id.wrapping_mul(0x1_0001);
        let failed = state.strike(&mut op).or_else(|| state.refuse(&op, self.sector_size));
        let failed = failed.or_else(|| state.tell(&op));
        let bytes = if failed.is_some() { None } else { state.perform(&op) };
        if failed.is_some() || matches!(op.effect, Effect::Sync | Effect::Write { durable: true, .. }) {
            state.changed(&op.effect);
        }
        if failed.is_none() && matches!(op.effect, Effect::Sync) {
            state.added.retain(|(_, completed)| *completed > op.covers);
        }
        match op.owner {
            Owner::Front(front, piece) => {
                let done = match &op.effect {
                    Effect::Read { .. } | Effect::Given { .. } => bytes.as_ref().map_or(0, Vec::len),
                    Effect::Write { bytes, .. } => bytes.len(),
                    _ => 0,
                };
                let done = i32::try_from(done).expect("at most 1 MiB");
                Some(FrontDone { front, piece, result: failed.map_or(done, |errno| -errno), bytes })
            }
            Owner::Engine => {
                let buffer = bytes.map_or_else(|| Buffer::zeroed(0), |bytes| Buffer::copy_of(&bytes));
                let result = failed.map_or(Ok(buffer), |errno| Err(io::Error::from_raw_os_error(errno)));
                state.results.push((op.id, result));
                if let Some(place) = state.waiting.iter().position(|(id, _)| *id == op.id) {
                    state.waiting.swap_remove(place).1.wake();
                }
                None
            }
        }
    }

    /// One of the files that a power cut at this moment may leave.
    pub fn cut(&self, profile: Profile, rng: &mut Rng) -> Store {
        let state = self.state.borrow();
        let lengths: Vec<u64> = std::iter::once(state.durable.length)
            .chain(state.at_risk.iter().filter_map(|change| match change.effect {
                Effect::Resize(length) => Some(length),
                _ => None,
            }))
            .collect();
        let profile = match profile {
            Profile::Sectors512 | Profile::Length if self.sector_size == 4096 => Profile::Sectors4096,
            other => other,
        };
        let all = rng.bool();
        let keep_rate = rng.f64();
        let length = match profile {
            Profile::NoneOrAll => {
                if all {
                    *lengths.last().expect("never empty")
                } else {
                    lengths[0]
                }
            }
            _ => lengths[rng.usize(..lengths.len())],
        };
        let mut store = state.durable.clone();
        // Data that reached the medium under a longer length is there if that length is.
        store.resize(store.length.max(length));
        let mut order: Vec<&AtRisk> = state.at_risk.iter().collect();
        if profile != Profile::NoneOrAll && rng.bool() {
            rng.shuffle(&mut order);
        }
        for change in order {
            persist(&mut store, &change.effect, profile, all, keep_rate, rng);
            keep_settled(&mut store, &state.durable, &change.settled);
        }
        store.resize(length);
        store
    }

    /// The process has died: nothing waits for the operations in flight. They are returned, to land
    /// while the lock is still held.
    pub fn abandon(&self) -> Vec<Abandoned> {
        let mut state = self.state.borrow_mut();
        state.waiting.clear();
        state.results.clear();
        if std::mem::take(&mut state.host.asked) {
            (state.host.lost, state.host.doubtful) = (false, true);
        }
        state.in_flight.drain(..).map(Abandoned).collect()
    }

    /// An operation of a dead process ends: it was never begun, is done, or is done in part.
    pub fn land(&self, Abandoned(op): Abandoned, rng: &mut Rng) {
        let mut state = self.state.borrow_mut();
        state.trace = state.trace.rotate_left(5) ^ op.id.wrapping_mul(0x1_0003);
        let reports = matches!(op.effect, Effect::Sync | Effect::Write { durable: true, .. });
        if reports && state.host.loses && rng.bool() {
            state.at_risk.retain(|change| change.op != op.id);
            state.host = Host { lost: true, doubtful: true, loses: false, ..state.host };
            return state.lose(op.covers, rng);
        }
        match (rng.u32(..3), &op.effect) {
            (0, _) => drop(state.perform(&op)),
            (1, Effect::Write { offset, bytes, .. }) => {
                state.at_risk.retain(|change| change.op != op.id);
                let unit = self.sector_size as usize;
                for (index, part) in bytes.chunks(unit).enumerate().filter(|_| rng.bool()) {
                    state.land_part(offset + (index * unit) as u64, part);
                }
            }
            _ => state.at_risk.retain(|change| change.op != op.id),
        }
        state.changed(&op.effect);
    }

    async fn run(&self, effect: Effect) -> io::Result<Buffer> {
        let through = if planted(Plant::SharedDescription) { Through::Shared } else { Through::Own };
        let number = self.state.borrow().activity.syncs;
        let slow = matches!(effect, Effect::Sync) && self.slow_syncs.get() && number.is_multiple_of(2);
        let id = self.issue_through(Owner::Engine, effect, slow, through);
        if self.immediate.get() {
            let index = self.state.borrow().in_flight.iter().position(|op| op.id == id).expect("just issued");
            self.complete(index);
        }
        poll_fn(|context| {
            let mut state = self.state.borrow_mut();
            if let Some(place) = state.results.iter().position(|(other, _)| *other == id) {
                return Poll::Ready(state.results.swap_remove(place).1);
            }
            state.waiting.retain(|(other, _)| *other != id);
            state.waiting.push((id, context.waker().clone()));
            Poll::Pending
        })
        .await
    }
}

impl State {
    /// Of what had completed when `covers` changes had, some sectors reach the medium, and the rest never
    /// will, though reads still see it.
    fn lose(&mut self, covers: u64, rng: &mut Rng) {
        let covered = |change: &AtRisk| change.completed.is_some_and(|completed| completed <= covers);
        let (lost, left): (Vec<AtRisk>, Vec<AtRisk>) = self.at_risk.drain(..).partition(covered);
        self.at_risk = left;
        let keep_rate = if rng.bool() { 0.0 } else { rng.f64() };
        for change in lost {
            let newer = self.durable.clone();
            match change.effect {
                Effect::Resize(length) if rng.f64() < keep_rate => self.durable.resize(length),
                ref other => persist(&mut self.durable, other, Profile::Sectors512, false, keep_rate, rng),
            }
            keep_settled(&mut self.durable, &newer, &change.settled);
        }
        self.changed(&Effect::Sync);
    }

    /// A part of a dead process's write is done.
    fn land_part(&mut self, offset: u64, part: &[u8]) {
        let effect = Effect::Write { offset, bytes: Rc::new(part.to_vec()), durable: false };
        apply(&mut self.cache, &effect);
        self.completions += 1;
        let (op, completed) = (self.next_op, Some(self.completions));
        self.next_op += 1;
        self.at_risk.push(AtRisk { op, completed, effect, settled: Vec::new() });
    }

    /// A change is at risk that was not before.
    fn issued(&mut self, effect: &Effect) {
        let metadata = match effect {
            Effect::Write { offset, .. } | Effect::Zero { offset, .. } => self.places.has(*offset),
            Effect::Resize(_) => true,
            Effect::Read { .. } | Effect::Given { .. } | Effect::Sync | Effect::Reserve { .. } => return,
        };
        self.versions.0 += 1;
        self.versions.1 += u64::from(metadata);
    }

    /// Something is durable, or no longer at risk.
    fn changed(&mut self, effect: &Effect) {
        self.versions.0 += 1;
        self.durable_version += 1;
        self.versions.1 += u64::from(matches!(effect, Effect::Sync | Effect::Write { durable: true, .. }));
    }

    /// Lets a completed operation be seen; returns what a read found.
    fn perform(&mut self, op: &Op) -> Option<Vec<u8>> {
        self.completions += 1;
        let number = self.completions;
        match &op.effect {
            Effect::Read { offset, length } => {
                let mut bytes = vec![0; *length];
                self.cache.read(*offset, &mut bytes);
                if matches!(op.owner, Owner::Front(..)) {
                    let left =
                        usize::try_from(self.cache.length.saturating_sub(*offset)).unwrap_or(usize::MAX);
                    bytes.truncate(left);
                }
                return Some(bytes);
            }
            Effect::Given { bytes, length } => return Some(bytes[..*length].to_vec()),
            Effect::Sync => {
                self.activity.syncs += 1;
                self.settle(|change| change.completed.is_some_and(|completed| completed <= op.covers));
            }
            Effect::Write { offset, bytes, durable } => {
                apply(&mut self.cache, &op.effect);
                self.activity.writes += 1;
                if *durable {
                    self.activity.durable_writes += 1;
                    let length = self.cache.length;
                    self.durable.resize(length.max(self.durable.length));
                    self.settle(|change| change.op == op.id);
                    let earlier = |change: &&mut AtRisk| {
                        change.completed.is_some_and(|completed| completed <= op.covers)
                    };
                    for change in self.at_risk.iter_mut().filter(earlier) {
                        change.settled.push(*offset..*offset + bytes.len() as u64);
                    }
                }
            }
            Effect::Zero { offset, length, gives_back } => {
                apply(&mut self.cache, &op.effect);
                if *gives_back {
                    self.room.give_back(*offset, *length);
                }
                self.activity.zeroes += 1;
            }
            Effect::Resize(_) => {
                apply(&mut self.cache, &op.effect);
                self.activity.resizes += 1;
            }
            Effect::Reserve { .. } => {}
        }
        if let Some(change) = self.at_risk.iter_mut().find(|change| change.op == op.id) {
            change.completed = Some(number);
        }
        None
    }

    /// Refuses `op` if the host has no room for it. What does not need any may be there all the same, in
    /// part.
    fn refuse(&mut self, op: &Op, sector: u32) -> Option<i32> {
        let found = match &op.effect {
            Effect::Write { offset, bytes, .. } => self.room.take(*offset, bytes.len() as u64, true),
            Effect::Zero { offset, length, gives_back: false } | Effect::Reserve { offset, length } => {
                self.room.take(*offset, *length, false)
            }
            _ => true,
        };
        if found {
            return None;
        }
        self.at_risk.retain(|change| change.op != op.id);
        let chance = |number: u64| (number ^ op.id).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 62;
        if let Effect::Write { offset, bytes, .. } = &op.effect
            && chance(1) > 0
        {
            let unit = if chance(1) == 1 { sector as usize } else { 4096 };
            for (place, part) in (*offset..).step_by(unit).zip(bytes.chunks(unit)) {
                if self.room.holds(place, part.len() as u64) && chance(place) > 1 {
                    self.land_part(place, part);
                }
            }
        }
        Some(ENOSPC)
    }

    /// The error by which `op` learns of lost writes, if it is a sync or a durable write. It has done nothing
    /// durable then.
    fn tell(&mut self, op: &Op) -> Option<i32> {
        let reports = matches!(op.effect, Effect::Sync | Effect::Write { durable: true, .. });
        let errno = if reports { self.descriptions.tell(op.through) } else { None };
        if errno.is_some()
            && let Effect::Write { offset, bytes, .. } = &op.effect
        {
            let effect = Effect::Write { offset: *offset, bytes: bytes.clone(), durable: false };
            self.perform(&Op { effect, ..op.clone() });
        }
        errno
    }

    /// Lets the fault hit `op` if it is its turn: a short operation shrinks, a failed one gives its `errno`.
    fn strike(&mut self, op: &mut Op) -> Option<i32> {
        let mut injection = self.injection.filter(|injection| (injection.hits)(op.owner, &op.effect))?;
        let first = self.struck.is_none();
        if first && injection.after > 0 {
            injection.after -= 1;
            self.injection = Some(injection);
            return None;
        }
        if !first && self.struck.as_ref().is_some_and(|(owner, _)| *owner != op.owner) {
            return None;
        }
        self.struck = Some((op.owner, op.effect.clone()));
        match injection.fault {
            Fault::Short => {
                self.injection = None;
                self.shorten(op, injection.seed);
                None
            }
            Fault::Error { errno, times } => {
                injection.fault = Fault::Error { errno, times: times - 1 };
                self.injection = (times > 1).then_some(injection);
                // The kernel has no thread for the sync, and nothing is lost.
                let begun = !(matches!(op.effect, Effect::Sync) && errno == ECANCELED);
                if begun {
                    self.fail(op, injection.seed);
                }
                Some(errno)
            }
        }
    }

    /// Leaves about half of a transfer; of a write not always whole sectors.
    fn shorten(&mut self, op: &mut Op, seed: u64) {
        match &mut op.effect {
            Effect::Read { length, .. } | Effect::Given { length, .. } => {
                *length = (*length / 2).next_multiple_of(4096).min(*length);
            }
            Effect::Write { bytes, .. } => {
                let odd = usize::from(seed.is_multiple_of(2)) * 100;
                let half = (bytes.len() / 2).next_multiple_of(4096) + odd;
                *bytes = Rc::new(bytes[..half.min(bytes.len())].to_vec());
            }
            _ => panic!("only transfers are short"),
        }
        if let Some(change) = self.at_risk.iter_mut().find(|change| change.op == op.id) {
            change.effect = op.effect.clone();
        }
    }

    /// A failed sync has made some of it durable and has forgotten the rest for good: no later sync brings it
    /// back. Anything else that failed has happened, or not.
    fn fail(&mut self, op: &Op, seed: u64) {
        let chance = |number: u64| (number ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 63 == 0;
        match op.effect {
            Effect::Sync => {
                let covered = |change: &AtRisk| change.completed.is_some_and(|number| number <= op.covers);
                self.settle(|change| covered(change) && chance(change.op));
                self.at_risk.retain(|change| !covered(change));
            }
            Effect::Write { .. } | Effect::Zero { .. } if chance(op.id) => {
                let happened = match &op.effect {
                    Effect::Write { offset, bytes, .. } => {
                        Effect::Write { offset: *offset, bytes: bytes.clone(), durable: false }
                    }
                    other => other.clone(),
                };
                self.perform(&Op { effect: happened, ..op.clone() });
            }
            _ => self.at_risk.retain(|change| change.op != op.id),
        }
    }

    /// Makes the changes that `covered` picks durable, in the order they completed.
    fn settle(&mut self, covered: impl Fn(&AtRisk) -> bool) {
        let (mut settled, left): (Vec<AtRisk>, Vec<AtRisk>) = self.at_risk.drain(..).partition(covered);
        self.at_risk = left;
        settled.sort_by_key(|change| change.completed);
        for change in settled {
            if change.settled.is_empty() {
                apply(&mut self.durable, &change.effect);
                continue;
            }
            let newer = self.durable.clone();
            apply(&mut self.durable, &change.effect);
            keep_settled(&mut self.durable, &newer, &change.settled);
        }
    }
}

/// Makes a change in a file.
pub fn apply(store: &mut Store, effect: &Effect) {
    match effect {
        Effect::Write { offset, bytes, .. } => store.write(*offset, bytes),
        Effect::Zero { offset, length, .. } => store.zero(*offset, *length),
        Effect::Resize(length) => store.resize(*length),
        Effect::Read { .. } | Effect::Given { .. } | Effect::Sync | Effect::Reserve { .. } => {}
    }
}

/// Puts back what a later durable write had settled before an older change came over it.
fn keep_settled(store: &mut Store, durable: &Store, settled: &[Range<u64>]) {
    for range in settled {
        let mut bytes = vec![0; usize::try_from(range.end - range.start).expect("at most 1 MiB")];
        durable.read(range.start, &mut bytes);
        store.write(range.start, &bytes);
    }
}

/// Lets a part of a change at risk reach the medium.
fn persist(store: &mut Store, effect: &Effect, profile: Profile, all: bool, keep_rate: f64, rng: &mut Rng) {
    let unit = match profile {
        Profile::NoneOrAll => {
            if all && !matches!(effect, Effect::Resize(_)) {
                apply(store, effect);
            }
            return;
        }
        Profile::Writes => {
            if rng.f64() < keep_rate && !matches!(effect, Effect::Resize(_)) {
                apply(store, effect);
            }
            return;
        }
        Profile::Sectors4096 => 4096,
        Profile::Sectors512 | Profile::Length => 512,
    };
    match effect {
        Effect::Write { offset, bytes, .. } => {
            for (index, sector) in bytes.chunks(unit).enumerate() {
                if rng.f64() < keep_rate {
                    store.write(offset + (index * unit) as u64, sector);
                }
            }
        }
        // Large and rare: in parts of 64 KiB.
        Effect::Zero { offset, length, .. } => {
            let mut at = *offset;
            while at < offset + length {
                let part = (64 << 10).min(offset + length - at);
                if rng.f64() < keep_rate {
                    store.zero(at, part);
                }
                at += part;
            }
        }
        Effect::Resize(_)
        | Effect::Read { .. }
        | Effect::Given { .. }
        | Effect::Sync
        | Effect::Reserve { .. } => {}
    }
}

impl ReadDisk for SimDisk {
    async fn read(&self, offset: u64, length: usize) -> io::Result<Buffer> {
        self.run(Effect::Read { offset, length }).await
    }

    async fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let state = self.state.borrow();
        // A host that is not known to take space back may call a hole what was written and not synced.
        let store = if self.can_punch { &state.cache } else { &state.durable };
        Ok(store.next_stored(offset).filter(|found| *found < state.cache.length))
    }

    async fn length(&self) -> io::Result<u64> {
        Ok(self.state.borrow().cache.length)
    }

    fn takes_space_back(&self) -> bool {
        self.can_punch && !self.dense.get()
    }
}

impl Disk for SimDisk {
    fn may_have_holes(&self) -> bool {
        !self.dense.get()
    }

    fn reports_losses_to_all(&self) -> bool {
        !self.reports_to_writer_only.get()
    }

    async fn write(&self, offset: u64, data: Buffer) -> io::Result<()> {
        let length = self.state.borrow().cache.length;
        assert!(offset.is_multiple_of(4096), "a write at {offset}");
        assert!(offset + data.len() as u64 <= length, "a write past the end of the file, at {offset}");
        let bytes = Rc::new(data.to_vec());
        self.run(Effect::Write { offset, bytes, durable: false }).await.map(drop)
    }

    async fn sync(&self) -> io::Result<()> {
        self.run(Effect::Sync).await.map(drop)
    }

    async fn sync_host(&self) -> io::Result<()> {
        self.state.borrow_mut().host.asked = true;
        self.run(Effect::Sync).await?;
        let host = &mut self.state.borrow_mut().host;
        host.asked = false;
        if std::mem::take(&mut host.lost) { Err(io::Error::from_raw_os_error(EIO)) } else { Ok(()) }
    }

    async fn grow(&self, length: u64) -> io::Result<()> {
        let before = self.state.borrow().cache.length;
        assert!(length > before, "growing to {length}");
        self.run(Effect::Resize(length)).await?;
        if self.dense.get() {
            let mut state = self.state.borrow_mut();
            let completed = state.completions;
            state.added.push((before..length, completed));
        }
        Ok(())
    }

    async fn truncate(&self, length: u64) -> io::Result<()> {
        assert!(length < self.state.borrow().cache.length, "shortening to {length}");
        self.run(Effect::Resize(length)).await.map(drop)
    }

    async fn reserve(&self, offset: u64, length: u64) -> io::Result<()> {
        self.run(Effect::Reserve { offset, length }).await.map(drop)
    }

    async fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        assert!(
            offset.is_multiple_of(4096) && length.is_multiple_of(4096),
            "zeroing {length} bytes at {offset}"
        );
        self.run(Effect::Zero { offset, length, gives_back: false }).await.map(drop)
    }

    async fn punch(&self, offset: u64, length: u64) -> io::Result<bool> {
        if !self.can_punch || self.dense.get() {
            return Ok(false);
        }
        self.run(Effect::Zero { offset, length, gives_back: true }).await.map(|_| true)
    }
}
