//! One device in one thread: a guest, fronts, the engine, the disk. Every message delivery, every completion
//! and every wake-up is chosen by the seed.

pub mod death;
mod grow;
mod moves;
mod shortage;
mod snapshot;

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use fastrand::Rng;
use nix::errno::Errno;
use uuid::Uuid;
use vhdx_ublk::chain::ReadLayer;
use vhdx_ublk::engine::front::{Front, Op, Request};
use vhdx_ublk::engine::message::{ToEngine, ToFront};
use vhdx_ublk::engine::port::{FileIo, FileOp, PieceId, Port, Ticket};
use vhdx_ublk::engine::shared::{LEAF, Session, Shared};
use vhdx_ublk::engine::{Counters, Engine, Fronts, Outcome, Setup};
use vhdx_ublk::format::bat::{BatEntry, PayloadState};
use vhdx_ublk::image::{
    BlockMap, FoundLog, Image, InitialState, Layout, NewImage, SessionMemory, WritableImage, check,
};

use super::disk::{EAGAIN, EIO, ENOSPC, Effect, FrontDone, Owner, Profile, SimDisk};
use super::judge::{Effort, Judge};
use super::lineage::Lineage;
use super::marks::Marks;
use super::oracle::{Oracle, Value, WATCHED, decode, stamp};
use super::places::Places;
use super::room::Room;
use super::store::Store;
use super::tasks::{OwnedTasks, block_on};
use super::violation::violated;

/// How often in a row the host does not begin a piece of a front, which gives it up after 16 repetitions.
const REFUSALS_MAX: u32 = 16;

/// The shape of a run.
#[derive(Clone, Debug)]
pub struct Config {
    pub image: NewImage,
    pub fronts: usize,
    pub depth: u16,
    pub can_punch: bool,
    /// Requests per life; a life ends with a cut or a clean close.
    pub requests: usize,
    /// The blocks that requests go to: a window at either side of a chunk border, or anything.
    pub blocks: Vec<u64>,
    /// The sizes that the disk gets one after the other while it is served, bytes.
    pub sizes: Vec<u64>,
    /// Sectors watched at each of three places of a block.
    pub width: u64,
    /// The most descriptors of a log entry, if not as many as usual: see `set_descriptors_per_entry`.
    pub descriptors: Option<usize>,
    /// What a child begins with.
    pub beginning: Beginning,
    /// What the parents of a child hold that was made by a snapshot.
    pub frozen: Option<Arc<Lineage>>,
    /// What goes wrong below.
    pub faults: Faults,
    /// How many of each kind of request are made, in parts of their sum: see [`Config::ALL_KINDS`].
    pub weights: [u32; 6],
}

/// What a child begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beginning {
    /// No block, and no sector bitmap.
    Nothing,
    /// Some blocks partially present, with bits of other blocks beside theirs that mean nothing.
    Partial,
    /// No block, and sector bitmaps full of bits that mean nothing.
    LeftOver,
}

/// What goes wrong below the program.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fault of its own")]
pub struct Faults {
    /// One front I/O in so many must be tried again; 0 for none.
    pub again: u32,
    /// One sync fails.
    pub sync: bool,
    /// One durable write fails.
    pub durable_write: bool,
    /// Half of the syncs take long.
    pub slow_syncs: bool,
    /// One front I/O in so many takes long.
    pub slow_io: u32,
    /// The daemon is killed at one step in so many; 0 for never.
    pub death: u32,
    /// A snapshot is taken at one step in so many; 0 for never.
    pub snapshot: u32,
    /// The disk grows at one step in so many, to the next of its sizes; 0 for never.
    pub grow: u32,
    /// Blocks begin to move at one step in so many; 0 for never.
    pub moves: u32,
    /// What blocks have lost is committed without a flush at one step in so many; 0 for never.
    pub lost_space: u32,
    /// The first sync or durable write that a death cuts short may fail, and no later sync gets the error.
    pub lost_with_death: bool,
    /// One end of a front's I/O in so many is posted, and its thread sees it long after; 0 for none.
    pub unseen: u32,
    /// What is lost, once.
    pub loss: Option<Loss>,
    /// The host has no room left, or has some again, at one step in so many; 0 if it always has.
    pub full: u32,
    /// What needs room there.
    pub host: HostKind,
    /// Requests wait until the host has room.
    pub waits: bool,
}

/// What is lost, and which process gets the error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Writes that the host has accepted; the next sync fails.
    Writes,
    /// The device's cache, as a durable write fails; nothing else gets the error.
    Cache,
}

/// What needs room on a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostKind {
    /// What fills a hole.
    Sparse,
    /// Overwrites, too: it copies on write.
    Copying,
    /// As a sparse one, and Windows would refuse the file for a hole: there must be none.
    Dense,
}

impl Faults {
    /// Nothing fails; what is slow now and then is ordinary.
    pub const NONE: Self = Self {
        again: 0,
        sync: false,
        durable_write: false,
        slow_syncs: false,
        slow_io: 6,
        death: 0,
        snapshot: 0,
        grow: 0,
        moves: 0,
        lost_space: 0,
        lost_with_death: false,
        unseen: 0,
        loss: None,
        full: 0,
        host: HostKind::Sparse,
        waits: false,
    };
}

impl Config {
    /// Weights of write, durable write, read, flush, discard and write zeroes.
    pub const ALL_KINDS: [u32; 6] = [50, 10, 18, 18, 12, 12];

    /// An oracle that knows an empty disk of this shape.
    pub fn oracle(&self) -> Oracle {
        let oracle =
            Oracle::new(u64::from(self.image.block_size / self.image.logical_sector_size), self.width);
        oracle.descending(Lineage::of(self))
    }

    /// A small dynamic disk with 512-byte sectors.
    pub fn small() -> Self {
        Self {
            image: NewImage {
                virtual_size: (6 << 20) + 4096,
                fixed: false,
                block_size: 1 << 20,
                log_length: 1 << 20,
                logical_sector_size: 512,
                physical_sector_size: 4096,
                initial_state: InitialState::NotPresent,
                parent: None,
            },
            fronts: 2,
            depth: 4,
            can_punch: true,
            requests: 120,
            blocks: (0..7).collect(),
            sizes: Vec::new(),
            width: WATCHED,
            descriptors: None,
            beginning: Beginning::Nothing,
            frozen: None,
            faults: Faults::NONE,
            weights: Self::ALL_KINDS,
        }
    }
}

struct Inbox(RefCell<Vec<VecDeque<ToFront>>>);

impl Fronts for Inbox {
    fn send(&self, front: usize, message: ToFront) {
        self.0.borrow_mut()[front].push_back(message);
    }

    fn count(&self) -> usize {
        self.0.borrow().len()
    }
}

struct Active {
    request: Request,
    value: Value,
    issued: u64,
    /// How often the host had refused something when it was issued.
    refusals: u64,
    /// For a read: what each sector could hold when it was issued.
    readable: Vec<Vec<Value>>,
}

struct Host {
    front: Front,
    /// What it continues with after a hold.
    next: Option<Arc<Shared>>,
    to_engine: VecDeque<ToEngine>,
    buffers: Vec<Vec<u8>>,
    active: Vec<Option<Active>>,
    completed: Vec<(u16, i32)>,
}

struct SimPort<'a> {
    index: usize,
    disk: &'a SimDisk,
    parents: &'a [Store],
    next: &'a mut Option<Arc<Shared>>,
    slow_io: u32,
    rng: &'a mut Rng,
    to_engine: &'a mut VecDeque<ToEngine>,
    buffers: &'a mut [Vec<u8>],
    completed: &'a mut Vec<(u16, i32)>,
}

impl Port for SimPort<'_> {
    fn submit(&mut self, piece: PieceId, io: FileIo) {
        let (offset, length) = (io.file_offset, io.length as usize);
        let effect = match io.op {
            FileOp::Read if io.layer == LEAF => Effect::Read { offset, length },
            FileOp::Read => {
                let mut bytes = vec![0; length];
                self.parents[usize::from(io.layer) - 1].read(offset, &mut bytes);
                Effect::Given { bytes: Rc::new(bytes), length }
            }
            FileOp::FillZero => Effect::Given { bytes: Rc::new(vec![0; length]), length },
            FileOp::Write { durable } => {
                let from = io.buffer_offset as usize;
                let bytes = self.buffers[usize::from(piece.tag)][from..from + length].to_vec();
                Effect::Write { offset, bytes: Rc::new(bytes), durable }
            }
            FileOp::WriteZeros => Effect::Write { offset, bytes: Rc::new(vec![0; length]), durable: false },
            FileOp::ZeroRange | FileOp::PunchHole => {
                Effect::Zero { offset, length: length as u64, gives_back: io.op == FileOp::PunchHole }
            }
            FileOp::Sync => Effect::Sync,
        };
        let slow = self.rng.u32(..self.slow_io) == 0;
        self.disk.issue(Owner::Front(self.index, piece), effect, slow);
    }

    fn change_leaf(&mut self) -> Option<Arc<Shared>> {
        self.next.take()
    }

    fn send(&mut self, message: ToEngine) {
        self.to_engine.push_back(message);
    }

    fn complete(&mut self, ticket: Ticket, result: Outcome<u32>) {
        let result = result.map_or_else(|errno| -(errno as i32), u32::cast_signed);
        self.completed.push((ticket.tag(), result));
    }
}

/// The parent, if there is one, as an engine has it, and its file.
fn parents(lineage: &Lineage) -> (Vec<ReadLayer<SimDisk>>, Vec<Store>) {
    let Some((file, map)) = lineage.parent() else { return (Vec::new(), Vec::new()) };
    (vec![ReadLayer { disk: SimDisk::new(file.clone(), true, true, 512), map: map.into() }], vec![file])
}

/// What a run has exercised; a knob that never moved fails the test that looks at this.
#[derive(Clone, Copy, Debug, Default)]
pub struct Activation {
    pub lives: u64,
    pub clean_closes: u64,
    pub states: u64,
    pub replays: u64,
    pub counters: Counters,
    pub syncs: u64,
    pub durable_writes: u64,
}

impl Activation {
    fn add(&mut self, counters: Counters) {
        let sum = &mut self.counters;
        sum.syncs += counters.syncs;
        sum.commits += counters.commits;
        sum.logs += counters.logs;
        sum.entries += counters.entries;
        sum.pages += counters.pages;
        sum.grants += counters.grants;
        sum.recycled_grants += counters.recycled_grants;
        sum.fills += counters.fills;
        sum.bitmaps += counters.bitmaps;
        sum.promotions += counters.promotions;
        sum.grows += counters.grows;
        sum.unmapped += counters.unmapped;
        sum.released += counters.released;
        sum.barriers += counters.barriers;
    }
}

#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct World {
    pub config: Config,
    rng: Rng,
    disk: SimDisk,
    /// The parents' files, its own first.
    parents: Vec<Store>,
    lineage: Lineage,
    tasks: OwnedTasks,
    inbox: Rc<Inbox>,
    engine: Rc<Engine<SimDisk>>,
    hosts: Vec<Host>,
    pub oracle: Oracle,
    issued: usize,
    pub activation: Activation,
    /// Syncs do not complete.
    pub hold_syncs: bool,
    /// Requests that failed, which only an injected fault may cause, with their positive `errno`.
    pub failures: Vec<(Op, i32)>,
    /// What was on the disk before this life may be anything.
    pub foreign: bool,
    trace: u64,
    layout: Layout,
    judge: Option<Judge>,
    /// When the guest got the first answer that something has failed for good.
    failed_at: Option<u64>,
    /// A fault was injected that must poison the device.
    injected: bool,
    seen: Seen,
    pub marks: Marks,
    /// What outlives the daemon.
    memory: SessionMemory,
    deaths: u64,
    /// The number of the one that has no successor.
    last_death: Option<u64>,
    /// How many fronts hold, while they are asked to.
    held: Option<usize>,
    snapshots: usize,
    /// Blocks that are moving.
    batch: Option<moves::Batch>,
    batches: usize,
    pub posted: Posted,
    /// How often each piece of a front was to be tried again since it was last done.
    refusals: BTreeMap<(usize, u16, u8), u32>,
    /// Requests that wait for room were failed, as the device ends.
    waits_ended: bool,
}

/// What has ended for fronts and was not seen yet.
#[derive(Default)]
pub struct Posted {
    ends: Vec<FrontDone>,
    /// All that ends is posted, and no thread sees it.
    pub held: bool,
}

/// What the last step found, to see what the next one changes.
#[derive(Default)]
struct Seen {
    entries: Vec<BatEntry>,
    counters: Counters,
}

/// GUIDs from the run's own randomness.
fn guids(rng: &mut Rng) -> impl FnMut() -> Uuid + 'static {
    let mut rng = rng.fork();
    move || Uuid::from_u128(rng.u128(1..))
}

/// A new image as `config` wants it.
pub fn new_image(config: &Config, rng: &mut Rng) -> Store {
    let disk = SimDisk::new(Store::default(), true, config.can_punch, config.image.logical_sector_size);
    block_on(config.image.write(&disk, guids(rng))).expect("the configuration is legal");
    Lineage::of(config).begin(disk.content())
}

/// An image that a world serves.
struct Opened {
    image: WritableImage,
    disk: SimDisk,
    memory: SessionMemory,
}

fn open_image(config: &Config, content: Store, guids: &mut impl FnMut() -> Uuid) -> Opened {
    let disk = SimDisk::new(content, true, config.can_punch, config.image.logical_sector_size);
    let mut image = block_on(Image::open_for_writing(&disk, guids)).expect("the image opens");
    block_on(image.read_bitmaps(&disk)).expect("they are there");
    let memory = death::start_session(&mut image, config.faults);
    disk.set_immediate(false);
    disk.slow_syncs(config.faults.slow_syncs);
    disk.open_anew();
    if config.faults.full > 0 {
        disk.watch_room(config.faults.host == HostKind::Copying);
    }
    if config.faults.host == HostKind::Dense {
        disk.forbid_holes();
    }
    disk.set_metadata(Places::below(image.layout.bat.end()));
    Opened { image, disk, memory }
}

impl World {
    /// A world that opens the image in `content` for writing.
    pub fn open(config: Config, content: Store, oracle: Oracle, mut rng: Rng) -> Self {
        let mut guids = guids(&mut rng);
        let Opened { image, disk, memory } = open_image(&config, content, &mut guids);
        let layout = image.layout;
        let tasks = OwnedTasks::default();
        let inbox = Rc::new(Inbox(RefCell::new(vec![VecDeque::new(); config.fronts])));
        let lineage = Lineage::of(&config);
        let (parents, parent_files) = parents(&lineage);
        let engine = Engine::new(Setup {
            image,
            disk: disk.clone(),
            parents,
            tasks: tasks.clone(),
            fronts: inbox.clone(),
            guids: Box::new(guids),
        });
        let engine = engine.expect("the image is writable");
        let hosts = (0..config.fronts).map(|_| Host::new(engine.shared().clone(), &config)).collect();
        let activation = Activation::default();
        Self {
            config,
            rng,
            disk,
            parents: parent_files,
            lineage,
            tasks,
            inbox,
            engine,
            hosts,
            oracle,
            issued: 0,
            activation,
            hold_syncs: false,
            failures: Vec::new(),
            foreign: false,
            trace: 0,
            layout,
            judge: None,
            failed_at: None,
            injected: false,
            seen: Seen::default(),
            marks: Marks::default(),
            memory,
            deaths: 0,
            last_death: None,
            held: None,
            snapshots: 0,
            batch: None,
            batches: 0,
            posted: Posted::default(),
            refusals: BTreeMap::new(),
            waits_ended: false,
        }
    }

    /// Everything that was decided, and everything that was asked of the disk, as one number.
    pub fn trace(&self) -> u64 {
        self.trace ^ self.disk.trace()
    }

    /// A judge for this world's image, to look at every moment of it.
    pub fn new_judge(&mut self, effort: Effort) -> Judge {
        let geometry = *self.engine.shared().geometry();
        Judge::new(&self.config, geometry, self.layout, effort, self.rng.fork())
    }

    /// From now on every moment is looked at.
    pub fn watch(&mut self, mut judge: Judge) {
        judge.next_life();
        self.judge = Some(judge);
        self.look();
    }

    /// Ends the watch.
    pub fn unwatch(&mut self) -> Option<Judge> {
        self.judge.take()
    }

    /// Flips bits in the closed image.
    pub fn rot(&mut self) {
        if let Some(Err(why)) = self.judge.as_mut().map(|judge| judge.rot(&self.disk)) {
            violated(why);
        }
    }

    /// Whether a fault was injected after which the image cannot be closed.
    pub fn is_broken(&self) -> bool {
        self.injected
    }

    fn look(&mut self) {
        self.mark_transitions();
        self.find_bitmaps();
        let Some(judge) = &mut self.judge else { return };
        if let Err(why) = judge.look(&self.disk, &self.oracle) {
            violated(format!("after a power cut: {why}"));
        }
    }

    /// Sector bitmaps that have been begun are metadata.
    fn find_bitmaps(&self) {
        let map = &self.engine.shared().map;
        let blocks = self.config.blocks.iter().filter(|block| **block < map.geometry().block_count());
        let chunks = blocks.map(|block| map.geometry().chunk_of_block(*block));
        let places =
            chunks.filter(|_| map.geometry().is_differencing()).filter_map(|chunk| map.bitmap_place(chunk));
        places.for_each(|place| self.disk.add_bitmap(place));
    }

    fn mark_transitions(&mut self) {
        let map = &self.engine.shared().map;
        let inside = self.config.blocks.iter().filter(|block| **block < map.geometry().block_count());
        let now: Vec<BatEntry> = inside.map(|&block| map.load(block).entry).collect();
        for (old, new) in self.seen.entries.iter().zip(&now).filter(|(old, new)| old != new) {
            self.marks.hit(match (old.payload_state(), new.payload_state()) {
                (Some(PayloadState::NotPresent), Some(PayloadState::FullyPresent)) => {
                    "not present to present"
                }
                (Some(PayloadState::NotPresent), Some(PayloadState::PartiallyPresent)) => {
                    "not present to partial"
                }
                (Some(PayloadState::NotPresent), Some(PayloadState::Zero)) => "not present to zero",
                (Some(PayloadState::Zero), Some(PayloadState::FullyPresent)) => "zero to present",
                (Some(PayloadState::FullyPresent), Some(PayloadState::Zero)) => "present to zero",
                (Some(PayloadState::PartiallyPresent), Some(PayloadState::FullyPresent)) => {
                    "partial to present"
                }
                (Some(PayloadState::PartiallyPresent), Some(PayloadState::Zero)) => "partial to zero",
                _ if self.config.faults.moves > 0 && moves::is_move(*old, *new) => "a block has moved",
                _ if self.foreign => "a state that others left changes",
                other => violated(format!("a block changed its state as none may: {other:?}")),
            });
        }
        let counters = self.engine.counters();
        if counters.entries > self.seen.counters.entries && counters.commits == self.seen.counters.commits {
            self.marks.hit("a cycle of several entries");
        }
        self.seen = Seen { entries: now, counters };
    }

    /// Takes one random step; `false` when nothing is left to do.
    pub fn step(&mut self) -> bool {
        self.trouble();
        if self.is_interrupted() {
            return true;
        }
        let tasks = self.tasks.ready();
        let (ops, slow) = (self.disk.places(false, !self.hold_syncs), self.disk.places(true, true));
        let to_front: Vec<usize> =
            (0..self.hosts.len()).filter(|&index| !self.inbox.0.borrow()[index].is_empty()).collect();
        let to_engine: Vec<usize> =
            (0..self.hosts.len()).filter(|&index| !self.hosts[index].to_engine.is_empty()).collect();
        let new = usize::from(self.issued < self.config.requests && self.idle_tag().is_some());
        // A slow operation ends now and then, and when there is nothing else to do.
        let rest = tasks + ops.len() + to_front.len() + to_engine.len() + new;
        let late = if !slow.is_empty() && (rest == 0 || self.rng.u32(..200) == 0) { slow.len() } else { 0 };
        let seen =
            !self.posted.ends.is_empty() && !self.posted.held && (rest == 0 || self.rng.u32(..80) == 0);
        let seen = if seen { self.posted.ends.len() } else { 0 };
        let short = self.tries_again(rest);
        let weights = [
            tasks * 3,
            ops.len() * 2,
            to_front.len() * 3,
            to_engine.len() * 3,
            new * 2,
            late * 5,
            seen * 5,
            short.len(),
        ];
        let total: usize = weights.iter().sum();
        if total == 0 {
            return false;
        }
        let mut pick = self.rng.usize(..total);
        let kind = weights.iter().position(|&weight| {
            let here = pick < weight;
            pick = pick.wrapping_sub(if here { 0 } else { weight });
            here
        });
        self.trace =
            self.trace.wrapping_mul(0x100_0000_01b3) ^ (pick as u64) ^ ((kind.unwrap_or(9) as u64) << 32);
        match kind.expect("below the total") {
            0 => self.tasks.run(pick / 3),
            1 => self.complete_op(ops[pick / 2]),
            5 => self.complete_op(slow[pick / 5]),
            6 => {
                let done = self.posted.ends.swap_remove(pick / 5);
                self.see(done);
            }
            7 => self.try_again(short[pick]),
            2 => self.deliver_to_front(to_front[pick / 3]),
            3 => self.deliver_to_engine(to_engine[pick / 3]),
            _ => self.new_request(),
        }
        self.look();
        self.check_refusals();
        true
    }

    /// The daemon is killed now, or does something that holds the fronts.
    fn is_interrupted(&mut self) -> bool {
        if self.config.faults.death > 0 && self.rng.u32(..self.config.faults.death) == 0 {
            self.die();
            return true;
        }
        let snapshot = self.config.faults.snapshot;
        let may = self.held.is_none()
            && self.snapshots < snapshot::MAX_SNAPSHOTS
            && self.issued < self.config.requests;
        if snapshot > 0 && may && self.rng.u32(..snapshot) == 0 {
            self.snapshot();
            return true;
        }
        if self.grows_now() {
            self.grow();
            return true;
        }
        if self.moves_now() {
            self.begin_batch();
            return true;
        }
        let lost_space = self.config.faults.lost_space;
        if lost_space > 0 && self.rng.u32(..lost_space) == 0 {
            self.commit_lost_space();
            return true;
        }
        false
    }

    /// The host loses writes, or its room, or gets some again.
    fn trouble(&mut self) {
        let faults = self.config.faults;
        if faults.loss == Some(Loss::Writes) && self.rng.u32(..150) == 0 {
            let errno = if self.rng.bool() { EIO } else { ENOSPC };
            if self.disk.lose(errno, &mut self.rng) {
                self.marks.hit("the host loses writes");
                (self.config.faults.loss, self.injected) = (None, true);
            }
        }
        if faults.full > 0 && self.rng.u32(..faults.full) == 0 {
            let full = self.disk.room(Room::is_full);
            self.marks.hit(if full { "the host has room again" } else { "the host is full" });
            self.disk.set_full(!full);
        }
        if self.ends_waits_now() {
            self.end_waits();
        }
    }

    /// Whatever there is no room for, nothing is poisoned.
    fn check_refusals(&self) {
        if self.config.faults.full > 0 && !self.injected && self.session() == Session::Poisoned {
            violated("the device was poisoned for want of room".into());
        }
    }

    /// From now on the host has room.
    fn make_room(&mut self) {
        if std::mem::take(&mut self.config.faults.full) > 0 {
            self.disk.set_full(false);
        }
    }

    /// Steps until nothing is left to do.
    pub fn drain(&mut self) {
        let mut steps = 0_u64;
        while self.step() {
            steps += 1;
            assert!(steps < 10_000_000, "the world does not come to rest");
        }
        for host in &self.hosts {
            if !host.front.is_idle() {
                violated("a request was never completed".into());
            }
        }
    }

    /// Closes the image cleanly and returns the file.
    pub fn close(&mut self) -> Store {
        self.make_room();
        let closed = self.try_close();
        if closed.is_ok() {
            self.activation.clean_closes += 1;
            self.look_at_the_end();
            self.look_for_leaks();
        } else if !self.injected {
            violated(format!("the image does not close: {closed:?}"));
        }
        self.disk.content()
    }

    /// An image that was written and closed ends where its last structure does.
    fn look_at_the_end(&mut self) {
        if self.disk.struck().is_some() || self.session() == Session::Idle {
            return;
        }
        let disk = SimDisk::new(self.disk.content(), true, true, self.config.image.logical_sector_size);
        let image = block_on(Image::read(&disk)).expect("a closed image");
        let (end, length) = (image.space.used_end(), image.layout.file_length);
        if length > end {
            violated(format!("a closed image is {length} bytes long and ends at byte {end}"));
        }
    }

    /// Whatever power cuts have left behind, an image that was written and closed takes no room on the host
    /// that nothing names.
    fn look_for_leaks(&mut self) {
        let punches = self.config.can_punch && self.config.faults.host != HostKind::Dense;
        if !punches || self.disk.struck().is_some() || self.session() == Session::Idle {
            return;
        }
        let disk = SimDisk::new(self.disk.content(), true, true, self.config.image.logical_sector_size);
        let report = block_on(check(&disk)).expect("a VHDX");
        if report.leaks > 0 {
            violated(format!("a closed image leaks: {:?}", report.findings));
        }
        self.marks.hit("closed images without leaks");
    }

    /// Closes the image, clean or not.
    pub fn try_close(&mut self) -> Outcome {
        self.config.requests = 0;
        self.drain();
        loop {
            if self.last_death.is_some() {
                return Err(Errno::EIO);
            }
            let (engine, deaths) = (self.engine.clone(), self.deaths);
            let closed = self.tasks.start(async move { engine.close().await });
            self.drain();
            // A successor closes what a killed one has begun to.
            if self.deaths == deaths {
                return closed.borrow_mut().take().expect("closing comes to an end");
            }
        }
    }

    /// What outlives the daemon.
    pub fn memory(&self) -> &SessionMemory {
        &self.memory
    }

    /// The host loses what it has accepted and not made durable, and the next sync fails with `errno`.
    pub fn lose(&mut self, errno: i32) {
        let mut rng = self.rng.fork();
        while !self.disk.lose(errno, &mut rng) {}
        self.injected = true;
    }

    /// The durable write under way fails as the device loses its cache.
    pub fn lose_device_cache(&mut self) {
        let durable = (0..self.disk.operations()).find(|index| self.disk.front_op(*index).1);
        let done = self.disk.lose_device_cache(durable.expect("a durable write is under way"));
        (self.injected, self.posted.held) = (true, true);
        self.posted.ends.push(done);
    }

    /// Where the session stands.
    pub fn session(&self) -> Session {
        self.engine.shared().session()
    }

    /// What a device does some time after blocks have lost space.
    pub fn commit_lost_space(&mut self) {
        let lost = self.engine.shared().activity().levels().quarantined_bytes;
        self.marks.add("commits of lost space", u64::from(lost > 0));
        self.engine.commit_lost_space();
    }

    /// The disk beneath.
    pub fn disk(&self) -> &SimDisk {
        &self.disk
    }

    /// What this life has exercised.
    pub fn finish(&mut self) -> Activation {
        let mut activation = std::mem::take(&mut self.activation);
        activation.lives += 1;
        activation.add(self.engine.counters());
        activation.syncs += self.disk.activity().syncs;
        activation.durable_writes += self.disk.activity().durable_writes;
        self.mark_counters();
        activation
    }

    fn mark_counters(&mut self) {
        let counters = self.engine.counters();
        self.marks.add("blocks granted", counters.grants);
        self.marks.add("blocks that fronts give space", self.claims());
        self.marks.add("blocks granted recycled space", counters.recycled_grants);
        self.marks.add("blocks filled from the parent", counters.fills);
        self.marks.add("sector bitmaps begun", counters.bitmaps);
        self.marks.add("partial blocks made whole", counters.promotions);
        self.marks.add("the file grows", counters.grows);
        self.marks.add("blocks quarantined", counters.unmapped);
        self.marks.add("extents out of quarantine", counters.released);
        self.marks.add("barriers", counters.barriers);
        self.marks.add("commit cycles", counters.commits);
        self.marks.add("the log starts again", counters.logs.saturating_sub(1));
        self.marks.add("durable writes", self.disk.activity().durable_writes);
    }

    /// Counters of the engine so far.
    pub fn counters(&self) -> Counters {
        self.engine.counters()
    }

    /// How many blocks the fronts have given space without asking the engine.
    pub fn claims(&self) -> u64 {
        self.engine.shared().activity().claims()
    }

    /// Cuts the power `count` times at this moment, recovers each file and checks it; returns one of them
    /// with the oracle that has seen it.
    pub fn cut(&mut self, count: usize) -> Option<(Store, Oracle)> {
        let mut chosen = None;
        for _ in 0..count {
            let profile = Profile::ALL[self.rng.usize(..Profile::ALL.len())];
            let content = self.disk.cut(profile, &mut self.rng);
            let mut oracle = self.oracle.clone();
            let recovered =
                check_recovery(&self.config, &content, &mut oracle, &mut self.rng, &mut self.activation);
            self.activation.states += 1;
            match recovered {
                Ok(recovered) => chosen = Some((recovered, oracle)),
                Err(why) => violated(format!("after a cut with profile {profile:?}: {why}")),
            }
        }
        chosen
    }

    /// A file that a cut at this moment may leave, for other programs to judge.
    pub fn cut_file(&mut self) -> Store {
        let profile = Profile::ALL[self.rng.usize(..Profile::ALL.len())];
        self.disk.cut(profile, &mut self.rng)
    }

    /// Starts a request of the caller's own on an idle tag, and returns it.
    pub fn request(&mut self, op: Op, offset: u64, length: u64) {
        let (host, tag) = self.idle_tag().expect("a tag is idle");
        self.start(host, tag, Request { op, offset, length });
    }

    fn idle_tag(&self) -> Option<(usize, u16)> {
        let mut idle = Vec::new();
        for (index, host) in self.hosts.iter().enumerate() {
            for (tag, active) in host.active.iter().enumerate() {
                if active.is_none() {
                    idle.push((index, u16::try_from(tag).expect("small")));
                }
            }
        }
        (!idle.is_empty()).then(|| idle[self.issued.wrapping_mul(7) % idle.len()])
    }

    fn new_request(&mut self) {
        let (host, tag) = self.idle_tag().expect("checked by the caller");
        self.issued += 1;
        for _ in 0..20 {
            let request = self.random_request();
            if !self.overlaps(&request) {
                return self.start(host, tag, request);
            }
        }
    }

    fn random_request(&mut self) -> Request {
        let sector = u64::from(self.config.image.logical_sector_size);
        let block_size = u64::from(self.config.image.block_size);
        let size = self.config.image.virtual_size;
        let inside: Vec<u64> =
            self.config.blocks.iter().copied().filter(|block| block * block_size < size).collect();
        let start = inside[self.rng.usize(..inside.len())] * block_size;
        let block_end = (start + block_size).min(size);
        let sectors_in_block = (block_end - start) / sector;
        let places = [0, sectors_in_block / 2, sectors_in_block.saturating_sub(WATCHED)];
        let place =
            start + (places[self.rng.usize(..3)] + self.rng.u64(..WATCHED.min(sectors_in_block))) * sector;
        let place = place.min(block_end - sector);
        let (offset, length) = match self.rng.u32(..40) {
            0 => (start, block_end - start),
            1..5 => (start, sector),
            5..9 => (block_end - sector, sector),
            9..13 if start > 0 => (start - 2 * sector, 4 * sector),
            13..17 => (place, 32 << 10),
            _ => (place, self.rng.u64(1..16) * sector),
        };
        let length = length.min(size - offset).min(1 << 20);
        let op = match self.random_kind() {
            0 => Op::Write { durable: false },
            1 => Op::Write { durable: true },
            2 => Op::Read,
            3 => return Request { op: Op::Flush, offset: 0, length: 0 },
            // One that waits until the disk has grown may no longer reach to the end of its last block.
            4 if self.config.faults.grow > 0 && (self.held.is_some() || self.config.faults.waits) => Op::Read,
            4 => Op::Discard,
            _ => Op::WriteZeroes { keep_space: self.rng.bool() },
        };
        match op {
            // Whole blocks, and several of them, are what unmapping is about.
            Op::Discard | Op::WriteZeroes { .. } if self.rng.bool() => {
                let blocks = self.rng.u64(1..4);
                Request { op, offset: start, length: (blocks * block_size).min(size - start) }
            }
            _ => Request { op, offset, length },
        }
    }

    fn random_kind(&mut self) -> usize {
        let mut pick = self.rng.u32(..self.config.weights.iter().sum::<u32>());
        let kinds = self.config.weights.iter().position(|&weight| {
            let here = pick < weight;
            pick = pick.wrapping_sub(if here { 0 } else { weight });
            here
        });
        kinds.expect("below the sum")
    }

    /// A guest does not change sectors that another change of its own is on its way to; but it may discard
    /// them, and get either.
    pub fn overlaps(&self, request: &Request) -> bool {
        let changes = |op: Op| !matches!(op, Op::Read | Op::Flush);
        self.hosts.iter().flat_map(|host| host.active.iter().flatten()).any(|active| {
            let other = &active.request;
            changes(other.op)
                && changes(request.op)
                && !(matches!(other.op, Op::Write { .. }) && request.op == Op::Discard)
                && request.offset < other.offset + other.length
                && other.offset < request.offset + request.length
        })
    }

    fn start(&mut self, index: usize, tag: u16, request: Request) {
        let sector = u64::from(self.config.image.logical_sector_size);
        let (first, count) = (request.offset / sector, request.length / sector);
        let (mut value, mut readable) = (0, Vec::new());
        let issued = self.oracle.now();
        match request.op {
            Op::Write { .. } => {
                value = self.oracle.new_id();
                self.oracle.issue(first, count, value, true);
                let buffer = &mut self.hosts[index].buffers[usize::from(tag)];
                buffer.resize(usize::try_from(request.length).expect("at most 1 MiB"), 0);
                for (number, bytes) in
                    (first..).zip(buffer.chunks_mut(usize::try_from(sector).expect("small")))
                {
                    stamp(number, value, bytes);
                }
            }
            Op::Read => {
                let length = usize::try_from(request.length).expect("at most 1 MiB");
                self.hosts[index].buffers[usize::from(tag)] = vec![0xee; length];
                readable = (first..first + count).map(|number| self.oracle.readable(number)).collect();
            }
            Op::Discard => self.oracle.discard(first, count, self.discarded_blocks(&request)),
            Op::WriteZeroes { .. } => self.oracle.issue(first, count, 0, true),
            Op::Flush => {}
        }
        let refusals = self.disk.room(Room::refusals);
        let active = Active { request, value, issued, refusals, readable };
        self.hosts[index].active[usize::from(tag)] = Some(active);
        self.with_front(index, |front, port| front.start(tag, request, port));
    }

    /// The sectors of the blocks that `request`, a discard, takes as a whole: those read as zeros when it is
    /// done.
    fn discarded_blocks(&self, request: &Request) -> Range<u64> {
        let NewImage { block_size, virtual_size, logical_sector_size, fixed, .. } = self.config.image;
        let block = u64::from(block_size);
        let end = request.offset + request.length;
        let from = request.offset.next_multiple_of(block);
        let to = if end == virtual_size { end } else { end - end % block };
        let sector = u64::from(logical_sector_size);
        if fixed || from >= to { 0..0 } else { from / sector..to / sector }
    }

    fn complete_op(&mut self, index: usize) {
        let Some(done) = self.end_op(index) else { return };
        let unseen = self.config.faults.unseen;
        if self.posted.held || unseen > 0 && self.rng.u32(..unseen) == 0 {
            self.marks.hit("ends that are posted and not seen");
            self.posted.ends.push(done);
        } else {
            self.see(done);
        }
    }

    /// A front's thread sees the end of its I/O.
    fn see(&mut self, FrontDone { front, piece, result, bytes }: FrontDone) {
        if let Some(bytes) = bytes {
            // The piece knows its place; the buffer is filled where the request's cursor was.
            let place = self.hosts[front].front.buffer_place(piece);
            self.hosts[front].buffers[usize::from(piece.tag)][place..place + bytes.len()]
                .copy_from_slice(&bytes);
        }
        self.with_front(front, |front, port| front.io_done(piece, result, port));
    }

    /// Whether a front's I/O is not begun: never so often in a row that the front gives up.
    fn must_try_again(&mut self, index: usize) -> bool {
        let again = self.config.faults.again;
        if again == 0 {
            return false;
        }
        let refusals = self.refusals.entry(self.disk.front_piece(index)).or_default();
        let refused = *refusals < REFUSALS_MAX && self.rng.u32(..again) == 0;
        *refusals = if refused { *refusals + 1 } else { 0 };
        refused
    }

    /// Lets an operation end, well or with an injected fault.
    fn end_op(&mut self, index: usize) -> Option<FrontDone> {
        let faults = self.config.faults;
        let (front, durable) = self.disk.front_op(index);
        let syncs = self.disk.is_front_sync(index);
        self.marks.add("syncs by a front", u64::from(syncs));
        if front && !syncs && self.must_try_again(index) {
            self.marks.hit("a front's I/O is tried again");
            return Some(self.disk.fail(index, EAGAIN));
        }
        if durable && faults.durable_write && self.rng.u32(..3) == 0 {
            self.marks.hit("a durable write fails");
            (self.config.faults.durable_write, self.injected) = (false, true);
            return Some(self.disk.fail(index, EIO));
        }
        let cached = self.disk.at_risk(|_, changes, _| changes.iter().any(|change| !change.in_flight()));
        if (durable || syncs) && faults.loss == Some(Loss::Cache) && cached && self.rng.u32(..3) == 0 {
            self.marks.hit("the device loses its cache");
            (self.config.faults.loss, self.injected) = (None, true);
            return Some(self.disk.lose_device_cache(index));
        }
        if faults.sync && self.disk.syncs().contains(&index) && self.rng.u32(..12) == 0 {
            self.marks.hit("P6 a sync fails");
            (self.config.faults.sync, self.injected) = (false, true);
            return self.disk.fail_sync(index, &mut self.rng);
        }
        self.disk.complete(index)
    }

    fn deliver_to_front(&mut self, index: usize) {
        let message = self.inbox.0.borrow_mut()[index].pop_front().expect("checked by the caller");
        self.with_front(index, |front, port| front.receive(message, port));
    }

    fn deliver_to_engine(&mut self, index: usize) {
        let message = self.hosts[index].to_engine.pop_front().expect("checked by the caller");
        match (message, &mut self.held) {
            (ToEngine::Held, Some(held)) => *held += 1,
            _ => self.engine.receive(index, message),
        }
    }

    fn with_front(&mut self, index: usize, act: impl FnOnce(&mut Front, &mut SimPort<'_>)) {
        let host = &mut self.hosts[index];
        let mut port = SimPort {
            index,
            disk: &self.disk,
            parents: &self.parents,
            next: &mut host.next,
            slow_io: self.config.faults.slow_io,
            rng: &mut self.rng,
            to_engine: &mut host.to_engine,
            buffers: &mut host.buffers,
            completed: &mut host.completed,
        };
        act(&mut host.front, &mut port);
        assert!(host.to_engine.len() <= usize::from(self.config.depth) + 3, "the mailbox has room by design");
        assert!(self.inbox.0.borrow()[index].len() <= usize::from(self.config.depth) + 3);
        for (tag, result) in std::mem::take(&mut self.hosts[index].completed) {
            self.acknowledge(index, tag, result);
        }
    }

    fn acknowledge(&mut self, index: usize, tag: u16, result: i32) {
        let sector = u64::from(self.config.image.logical_sector_size);
        let active = self.hosts[index].active[usize::from(tag)].take();
        let Active { request, value, issued, refusals, readable } =
            active.expect("a request is completed once");
        let (first, count) = (request.offset / sector, request.length / sector);
        let now = self.oracle.now();
        if result < 0 {
            let refused = result == -ENOSPC && self.disk.room(Room::refusals) > refusals;
            let copies = self.config.faults.host == HostKind::Copying;
            let needs_room = request.op != Op::Read && (request.op != Op::Flush || copies);
            let waits = self.config.faults.waits && result == -ENOSPC && request.op != Op::Read;
            if waits && !self.waits_ended && !self.injected && self.disk.struck().is_none() {
                violated(format!("{request:?} failed for want of room and does not wait"));
            }
            let expected = refused && needs_room || waits;
            if !self.injected && self.disk.struck().is_none() && !expected {
                violated(format!("{request:?} failed with {result} and nothing was injected"));
            }
            if self.injected {
                self.failed_at.get_or_insert(now);
            }
            return self.failures.push((request.op, -result));
        }
        let changes = request.op != Op::Read;
        if changes && self.failed_at.is_some_and(|failed| failed < issued) {
            violated(format!("{request:?} succeeded after the device had failed"));
        }
        assert!(!changes || self.session() != Session::Poisoned, "{request:?} succeeds on a poisoned device");
        match request.op {
            Op::Write { durable } => self.oracle.acknowledge(first, count, value, durable),
            Op::Discard | Op::WriteZeroes { .. } => self.oracle.acknowledge(first, count, 0, false),
            Op::Flush => self.oracle.flushed(issued),
            Op::Read => {
                let buffer = &self.hosts[index].buffers[usize::from(tag)];
                let sectors = buffer.chunks(usize::try_from(sector).expect("small")).zip(readable);
                for (number, (bytes, readable)) in (first..).zip(sectors) {
                    if self.foreign && readable.contains(&self.lineage.original(number)) {
                        continue;
                    }
                    // A short write ends inside a sector, and continues: in between the sector is neither.
                    let torn = self.disk.struck().is_some()
                        && (readable.len() > 1 || self.oracle.is_being_written(number));
                    let found = match decode(number, bytes) {
                        Err(_) if torn => continue,
                        found => found.unwrap_or_else(|why| violated(format!("a read found: {why}"))),
                    };
                    let legal = !self.oracle.watches(number)
                        || readable.contains(&found)
                        || self.oracle.changed_to(number, found, issued);
                    if !legal {
                        violated(format!("a read found: {}", self.oracle.explain(number, found)));
                    }
                }
            }
        }
    }
}

/// A front as `config` wants it.
fn front(shared: Arc<Shared>, config: &Config) -> Front {
    let front = Front::new(shared, config.depth);
    if config.faults.waits { front.waiting_for_room() } else { front }
}

impl Host {
    fn new(shared: Arc<Shared>, config: &Config) -> Self {
        let depth = config.depth;
        Self {
            front: front(shared, config),
            next: None,
            to_engine: VecDeque::new(),
            buffers: vec![Vec::new(); usize::from(depth)],
            active: (0..depth).map(|_| None).collect(),
            completed: Vec::new(),
        }
    }
}

/// Opens `content` as the next process would and compares every sector with the oracle, which afterwards
/// knows what was found. Returns the recovered file.
pub fn check_recovery(
    config: &Config,
    content: &Store,
    oracle: &mut Oracle,
    rng: &mut Rng,
    activation: &mut Activation,
) -> Result<Store, String> {
    let disk = SimDisk::new(content.clone(), true, config.can_punch, config.image.logical_sector_size);
    let image = block_on(Image::open_for_writing(&disk, guids(rng))).map_err(|error| format!("{error:#}"))?;
    if image.found_log == FoundLog::Virgin {
        return Err("the headers name a log that has no entry: others call that corrupt".into());
    }
    activation.replays += u64::from(image.found_log != FoundLog::Clean);
    let report = block_on(check(&disk)).map_err(|error| format!("{error:#}"))?;
    if report.beyond_repair > 0 || !report.complete {
        return Err(format!("not sound after recovery: {:?}", report.findings));
    }
    block_on(image.read_bitmaps(&disk)).map_err(|error| format!("{error:#}"))?;
    let recovered = disk.content();
    let touched: Vec<u64> = oracle.touched().collect();
    for sector in touched {
        let found = read_sector(&image.map, &Lineage::of(config), &recovered, sector)?;
        if !oracle.may_survive(sector, found) {
            return Err(oracle.explain(sector, found));
        }
        oracle.collapse(sector, found);
    }
    Ok(recovered)
}

/// What `sector` holds in the recovered file, or below it.
fn read_sector(map: &BlockMap, lineage: &Lineage, content: &Store, sector: u64) -> Result<Value, String> {
    let geometry = map.geometry();
    let size = geometry.logical_sector_size();
    let offset = sector * u64::from(size);
    if offset >= geometry.virtual_size() {
        return Err(format!("sector {sector} lies behind the end of the disk"));
    }
    let entry = map.load(geometry.block_of_offset(offset)).entry;
    let here = || {
        let within = geometry.offset_in_block(offset) / u64::from(size);
        map.bitmaps().has(geometry, geometry.block_of_offset(offset), within..within + 1)
    };
    if let Some(value) = lineage.elsewhere(entry, sector, here) {
        return Ok(value);
    }
    let mut bytes = vec![0; size as usize];
    content.read(entry.offset() + geometry.offset_in_block(offset), &mut bytes);
    decode(sector, &bytes)
}
