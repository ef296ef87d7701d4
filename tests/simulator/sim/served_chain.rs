//! A chain that is served: a guest, fronts, the engine of the leaf, and every image in a file of its own.
//!
//! The world of single images ([`super::world`]) knows what lies below one by an oracle. Here the files below
//! are written, too, so a crash leaves all of them as they are at that moment, and the chain is read as the
//! format says it ([`super::layers`]).

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use fastrand::Rng;
use smol::future::yield_now;
use vhdx_ublk::chain::ReadLayer;
use vhdx_ublk::engine::front::{Front, Op, Request};
use vhdx_ublk::engine::message::{ToEngine, ToFront};
use vhdx_ublk::engine::port::{FileIo, FileOp, PieceId, Port, Ticket};
use vhdx_ublk::engine::shared::{LEAF, Shared};
use vhdx_ublk::engine::waiting::Bell;
use vhdx_ublk::engine::{Engine, Fronts, Outcome, Setup};
use vhdx_ublk::error::Result;
use vhdx_ublk::format::locator::ParentLocator;
use vhdx_ublk::image::{BlockMap, Image, SessionMemory, WritableImage};
use vhdx_ublk::operations::merge::{Child, Files, Link, LiveMerge, Served};

use super::disk::{Effect, Owner, Profile, SimDisk};
use super::fates::Fates;
use super::layers::{self, Chain, Shape, data_write_guid, guids, open_chain, says};
use super::marks::Marks;
use super::store::Store;
use super::tasks::{OwnedTasks, SimTasks, block_on};
use super::violation::violated;
use super::world::death::place;

const DEPTH: u16 = 3;

/// Steps in which anything that was begun must come to its end.
const MAX_STEPS: usize = 1_000_000;

/// The files, by name.
#[derive(Clone, Default)]
pub struct Folder(Rc<RefCell<BTreeMap<PathBuf, File>>>);

#[derive(Clone)]
struct File {
    disk: SimDisk,
    /// Its name is gone, unless the power is cut. Its space is not there for those that have it open.
    removed: bool,
}

impl Folder {
    pub fn of(stores: &BTreeMap<PathBuf, Store>) -> Self {
        let folder = Self::default();
        for (path, store) in stores {
            folder.add(path, store.clone());
        }
        folder
    }

    fn add(&self, path: &Path, store: Store) {
        let file = File { disk: SimDisk::new(store, false, true, 512), removed: false };
        self.0.borrow_mut().insert(path.to_owned(), file);
    }

    pub fn has(&self, path: &Path) -> bool {
        self.0.borrow().get(path).is_some_and(|file| !file.removed)
    }

    fn disks(&self) -> Vec<SimDisk> {
        self.0.borrow().values().map(|file| file.disk.clone()).collect()
    }

    /// The file that a reader has open.
    fn opened(&self, path: &Path) -> SimDisk {
        if !self.has(path) {
            violated(format!("{} is read, and gone", path.display()));
        }
        self.disk(path)
    }

    pub fn content(&self) -> BTreeMap<PathBuf, Store> {
        let files = self.0.borrow();
        let there = files.iter().filter(|(_, file)| !file.removed);
        there.map(|(path, file)| (path.clone(), file.disk.content())).collect()
    }

    /// Counts what changed what a power cut may leave.
    fn version(&self) -> (u64, usize, usize) {
        let files = self.0.borrow();
        let changes = files.values().map(|file| file.disk.versions().0).sum();
        (changes, files.len(), files.values().filter(|file| file.removed).count())
    }

    fn cut(&self, profile: Profile, rng: &mut Rng) -> BTreeMap<PathBuf, Store> {
        let files = self.0.borrow();
        let mut left = BTreeMap::new();
        for (path, file) in files.iter() {
            if !(file.removed && rng.bool()) {
                left.insert(path.clone(), file.disk.cut(profile, rng));
            }
        }
        left
    }
}

impl Files for Folder {
    type Disk = SimDisk;

    fn disk(&self, path: &Path) -> SimDisk {
        self.0.borrow()[path].disk.clone()
    }

    async fn remove(&self, path: &Path) -> Result<()> {
        let disk = self.disk(path);
        if (0..disk.operations()).any(|index| disk.front_op(index).0) {
            violated(format!("{} is removed while a front reads it", path.display()));
        }
        self.0.borrow_mut().get_mut(path).expect("it was there").removed = true;
        yield_now().await;
        self.0.borrow_mut().remove(path);
        Ok(())
    }

    fn copied(&self, _: u64) -> Outcome {
        Ok(())
    }
}

/// What a merge asks of the device, and how it learns that it is done.
#[derive(Clone, Default)]
struct Orders(Rc<RefCell<Option<Order>>>, Rc<Bell>);

enum Order {
    Drop(Option<Link>),
    Relink(Link),
}

impl Served for Orders {
    fn has_taken_over(&self) {}

    async fn drop_layer(&self, link: Option<Link>) -> Result<()> {
        *self.0.borrow_mut() = Some(Order::Drop(link));
        self.1.wait().await;
        Ok(())
    }

    async fn relink(&self, link: Link) -> Result<()> {
        *self.0.borrow_mut() = Some(Order::Relink(link));
        self.1.wait().await;
        Ok(())
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
    value: u64,
    issued: u64,
}

/// A front, and the files of the chain that its queue has.
struct Host {
    front: Front,
    files: Vec<PathBuf>,
    next: Option<(Arc<Shared>, Vec<PathBuf>)>,
    to_engine: VecDeque<ToEngine>,
    buffers: Vec<Vec<u8>>,
    active: Vec<Option<Active>>,
    completed: Vec<(u16, Outcome<u32>)>,
}

struct SimPort<'a> {
    index: usize,
    folder: &'a Folder,
    files: &'a mut Vec<PathBuf>,
    next: &'a mut Option<(Arc<Shared>, Vec<PathBuf>)>,
    to_engine: &'a mut VecDeque<ToEngine>,
    buffers: &'a [Vec<u8>],
    completed: &'a mut Vec<(u16, Outcome<u32>)>,
}

impl Port for SimPort<'_> {
    fn submit(&mut self, piece: PieceId, io: FileIo) {
        let (offset, length) = (io.file_offset, io.length as usize);
        let effect = match io.op {
            FileOp::Read => Effect::Read { offset, length },
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
        let layer = if io.op == FileOp::FillZero { LEAF } else { io.layer };
        let disk = self.folder.opened(&self.files[usize::from(layer)]);
        disk.issue(Owner::Front(self.index, piece), effect, false);
    }

    fn change_leaf(&mut self) -> Option<Arc<Shared>> {
        let (shared, files) = self.next.take()?;
        *self.files = files;
        Some(shared)
    }

    fn send(&mut self, message: ToEngine) {
        self.to_engine.push_back(message);
    }

    fn complete(&mut self, ticket: Ticket, result: Outcome<u32>) {
        self.completed.push((ticket.tag(), result));
    }
}

/// How often what happens: at one step in so many, or never.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    pub death: u32,
    /// How many of a hundred changes are followed by a power cut that is judged.
    pub cuts: u32,
}

/// See the module's head.
pub struct ServedChain {
    pub folder: Folder,
    /// The device's entry: the chain, its leaf first. It outlives the daemon.
    pub entry: Vec<PathBuf>,
    rates: Rates,
    rng: Rng,
    tasks: OwnedTasks,
    inbox: Rc<Inbox>,
    engine: Rc<Engine<SimDisk>>,
    hosts: Vec<Host>,
    memory: SessionMemory,
    fates: Fates,
    watched: Vec<u64>,
    held: Option<usize>,
    merging: Option<Merging>,
    /// A layer of the entry whose merge was cut: no other merge may begin.
    unfinished: Option<PathBuf>,
    pub deaths: u64,
    made: usize,
    version: (u64, usize, usize),
    pub marks: Marks,
}

struct Merging {
    orders: Orders,
    layer: PathBuf,
    result: Rc<RefCell<Option<Result<()>>>>,
}

impl ServedChain {
    /// Serves the chain that begins at `leaf`, with `fronts` queues.
    pub fn open(
        folder: Folder,
        leaf: &Path,
        fates: Fates,
        (fronts, rates): (usize, Rates),
        seed: u64,
    ) -> Self {
        let rng = Rng::with_seed(seed);
        let (entry, _) = open_chain(&folder.content(), leaf);
        let (tasks, inbox) = (OwnedTasks::default(), new_inbox(fronts));
        let mut image = opened_for_writing(&folder.disk(leaf), rng.clone().u64(..));
        let memory = start_session(&mut image);
        let parents = fresh_parents(&folder, &entry);
        let engine = new_engine(&folder, &entry, image, parents, (&tasks, &inbox, seed));
        let watched = fates.sectors();
        let hosts = (0..fronts).map(|_| Host::new(&engine, &entry)).collect();
        Self {
            folder,
            entry,
            rates,
            rng,
            tasks,
            inbox,
            engine,
            hosts,
            memory,
            fates,
            watched,
            held: None,
            merging: None,
            unfinished: None,
            deaths: 0,
            made: 0,
            version: (0, 0, 0),
            marks: Marks::default(),
        }
    }

    /// Begins to merge layer number `layer` of the chain, which is not its leaf nor its base; or the one
    /// whose merge was cut, if it is there.
    pub fn merge(&mut self, layer: usize) {
        let unfinished = self.unfinished.as_ref();
        let unfinished = unfinished.and_then(|left| self.entry.iter().position(|path| path == left));
        let layer = unfinished.unwrap_or(layer);
        self.unfinished = Some(self.entry[layer].clone());
        assert!(self.merging.is_none() && (1..self.entry.len() - 1).contains(&layer), "layer {layer}");
        let child = match layer {
            1 => {
                let leaf = layers::opened(&self.folder.content()[&self.entry[0]]).expect("an image");
                let locator = leaf.metadata.parent_locator.clone();
                Child::Leaf(self.entry[0].clone(), locator.expect("a child"))
            }
            _ => Child::Layer(self.entry[layer - 1].clone()),
        };
        self.marks.hit(if layer == 1 { "merges of the leaf's parent" } else { "merges of a layer below" });
        let merge = LiveMerge {
            layer: self.entry[layer].clone(),
            target: self.entry[layer + 1].clone(),
            below: self.entry[layer + 2..].to_vec(),
            child,
        };
        let (orders, files, tasks) = (Orders::default(), self.folder.clone(), self.tasks.clone());
        let (served, layer, guids) = (orders.clone(), merge.layer.clone(), guids(self.rng.u64(..)));
        let result = self.tasks.start(async move { merge.run(&files, &served, tasks, guids).await });
        self.merging = Some(Merging { orders, layer, result });
    }

    /// Steps until the merge has ended, or the daemon was killed; whether it has ended.
    pub fn finish_merge(&mut self) -> bool {
        let deaths = self.deaths;
        self.step_until("the merge ends", |world| world.deaths > deaths || world.has_merged());
        if self.deaths > deaths {
            return false;
        }
        let Merging { layer, result, .. } = self.merging.take().expect("begun");
        let merged = result.borrow_mut().take().expect("it has ended");
        merged.unwrap_or_else(|error| violated(format!("the merge fails: {error:#}")));
        if self.folder.has(&layer) {
            violated(format!("{} is still there", layer.display()));
        }
        self.marks.hit("merges that end");
        true
    }

    fn has_merged(&self) -> bool {
        self.merging.as_ref().is_some_and(|merging| merging.result.borrow().is_some())
    }

    fn step_until(&mut self, what: &str, is_done: impl Fn(&Self) -> bool) {
        let mut steps = 0;
        while !is_done(self) {
            steps += 1;
            self.step();
            if steps > MAX_STEPS {
                violated(format!("it never comes that {what}"));
            }
        }
    }

    /// Takes `count` random steps.
    pub fn run(&mut self, count: usize) {
        (0..count).for_each(|_| self.step());
    }

    fn step(&mut self) {
        if self.rates.death > 0 && self.rng.u32(..self.rates.death) == 0 {
            return self.die();
        }
        let order = self.merging.as_ref().and_then(|merging| merging.orders.0.borrow_mut().take());
        if let Some(order) = order {
            return self.obey(order);
        }
        let disks = self.folder.disks();
        let ops: Vec<(usize, usize)> = (0..disks.len())
            .flat_map(|disk| (0..disks[disk].operations()).map(move |index| (disk, index)))
            .collect();
        let ready = self.tasks.ready();
        let inbox = self.inbox.0.borrow().iter().map(VecDeque::len).collect::<Vec<_>>();
        let to_front: Vec<usize> = (0..self.hosts.len()).filter(|&index| inbox[index] > 0).collect();
        let to_engine: Vec<usize> =
            (0..self.hosts.len()).filter(|&index| !self.hosts[index].to_engine.is_empty()).collect();
        let idle = self.idle_tags();
        let counts =
            [ready * 2, ops.len(), to_front.len() * 2, to_engine.len() * 2, usize::from(!idle.is_empty())];
        let mut pick = self.rng.usize(..counts.iter().sum::<usize>().max(1));
        let kind = counts.iter().position(|&count| {
            let here = pick < count;
            pick = pick.wrapping_sub(if here { 0 } else { count });
            here
        });
        match kind {
            Some(0) => self.tasks.run(pick / 2),
            Some(1) => self.complete(&disks[ops[pick].0], ops[pick].1),
            Some(2) => self.deliver_to_front(to_front[pick / 2]),
            Some(3) => self.deliver_to_engine(to_engine[pick / 2]),
            Some(_) => self.new_request(&idle),
            None => {}
        }
        self.look();
    }

    fn complete(&mut self, disk: &SimDisk, index: usize) {
        let Some(done) = disk.complete(index) else { return };
        if let Some(bytes) = done.bytes {
            let host = &mut self.hosts[done.front];
            let at = host.front.buffer_place(done.piece);
            host.buffers[usize::from(done.piece.tag)][at..at + bytes.len()].copy_from_slice(&bytes);
        }
        self.with_front(done.front, |front, port| front.io_done(done.piece, done.result, port));
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
        let Host { front, files, next, to_engine, buffers, completed, .. } = &mut self.hosts[index];
        let mut port = SimPort { index, folder: &self.folder, files, next, to_engine, buffers, completed };
        act(front, &mut port);
        for (tag, result) in std::mem::take(&mut self.hosts[index].completed) {
            self.acknowledge(index, tag, result);
        }
    }

    fn idle_tags(&self) -> Vec<(usize, u16)> {
        let all = (0..self.hosts.len()).flat_map(|index| (0..DEPTH).map(move |tag| (index, tag)));
        all.filter(|&(index, tag)| self.hosts[index].active[usize::from(tag)].is_none()).collect()
    }

    /// A request of a few sectors that no other one under way touches.
    fn new_request(&mut self, idle: &[(usize, u16)]) {
        let (index, tag) = idle[self.rng.usize(..idle.len())];
        let first = self.watched[self.rng.usize(..self.watched.len())];
        let size = self.engine.shared().geometry().virtual_size();
        let length = (self.rng.u64(1..10) * 512).min(size - first * 512);
        let op = match self.rng.u32(..10) {
            0..4 => Op::Write { durable: self.rng.u32(..5) == 0 },
            4..8 => Op::Read,
            8 => Op::WriteZeroes { keep_space: self.rng.bool() },
            _ => Op::Flush,
        };
        let request = match op {
            Op::Flush => Request { op, offset: 0, length: 0 },
            _ => Request { op, offset: first * 512, length },
        };
        let active = self.hosts.iter().flat_map(|host| host.active.iter().flatten());
        let mut others = active.map(|active| active.request);
        let clash = |other: Request| {
            other.offset < request.offset + request.length && request.offset < other.offset + other.length
        };
        if op == Op::Flush || !others.any(clash) {
            self.start(index, tag, request);
        }
    }

    fn start(&mut self, index: usize, tag: u16, request: Request) {
        let sectors = request.offset / 512..(request.offset + request.length) / 512;
        let mut value = 0;
        match request.op {
            Op::Write { .. } => {
                value = self.fates.new_value();
                let mut buffer = vec![0; buffer_bytes(request.length)];
                for (sector, bytes) in sectors.clone().zip(buffer.chunks_mut(512)) {
                    bytes[..8].copy_from_slice(&(value | sector).to_le_bytes());
                }
                self.hosts[index].buffers[usize::from(tag)] = buffer;
            }
            Op::Read => {
                self.hosts[index].buffers[usize::from(tag)] = vec![0xee; buffer_bytes(request.length)];
            }
            _ => {}
        }
        match request.op {
            Op::Write { .. } => sectors.for_each(|sector| self.fates.issue(sector, value | sector)),
            Op::WriteZeroes { .. } => sectors.for_each(|sector| self.fates.issue(sector, 0)),
            _ => {}
        }
        let issued = self.fates.now();
        self.hosts[index].active[usize::from(tag)] = Some(Active { request, value, issued });
        self.with_front(index, |front, port| front.start(tag, request, port));
    }

    fn acknowledge(&mut self, index: usize, tag: u16, result: Outcome<u32>) {
        let Active { request, value, issued } =
            self.hosts[index].active[usize::from(tag)].take().expect("completed once");
        if let Err(errno) = result {
            violated(format!("{request:?} failed: {errno}"));
        }
        let sectors = request.offset / 512..(request.offset + request.length) / 512;
        match request.op {
            Op::Flush => self.fates.flushed(issued),
            Op::Write { durable } => {
                sectors.clone().for_each(|sector| self.fates.acknowledge(sector, value | sector));
                if durable {
                    sectors.for_each(|sector| self.fates.settle(sector));
                }
            }
            Op::WriteZeroes { .. } => sectors.for_each(|sector| self.fates.acknowledge(sector, 0)),
            _ => {
                self.marks.hit("reads");
                let buffer = &self.hosts[index].buffers[usize::from(tag)];
                for (sector, bytes) in sectors.zip(buffer.chunks(512)) {
                    let found = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
                    self.fates.require_now(sector, found, "a read");
                }
            }
        }
    }
}

impl ServedChain {
    /// A power cut now leaves the chain whole, by the paths of its images.
    fn look(&mut self) {
        let version = self.folder.version();
        if version == self.version || self.rng.u32(..100) >= self.rates.cuts {
            return;
        }
        self.version = version;
        let profile = Profile::ALL[self.rng.usize(..Profile::ALL.len())];
        let left = self.folder.cut(profile, &mut self.rng);
        self.judge(&left);
        self.marks.hit(if self.merging.is_some() { "images in a merge" } else { "images" });
        if self.held.is_some() {
            self.marks.hit("images while fronts are held");
        }
    }

    fn judge(&self, left: &BTreeMap<PathBuf, Store>) {
        let (_, chain) = open_chain(left, &self.entry[0]);
        for &sector in &self.watched {
            self.fates.require_after_cut(sector, says(&chain, sector));
        }
    }

    /// Cuts the power. What is left is served by another device, once it was judged.
    pub fn cut(mut self, seed: u64) -> Self {
        let profile = Profile::ALL[self.rng.usize(..Profile::ALL.len())];
        let left = self.folder.cut(profile, &mut self.rng);
        self.judge(&left);
        let (_, chain) = open_chain(&left, &self.entry[0]);
        self.watched.iter().for_each(|&sector| self.fates.collapse(sector, says(&chain, sector)));
        let (fronts, rates, leaf) = (self.hosts.len(), self.rates, self.entry[0].clone());
        let mut next = Self::open(Folder::of(&left), &leaf, self.fates, (fronts, rates), seed);
        (next.marks, next.made) = (self.marks, self.made);
        next.marks.hit("power cuts that are served again");
        next
    }

    /// The daemon is killed. A successor serves the chain that the entry names.
    pub fn die(&mut self) {
        self.marks.hit(if self.merging.is_some() { "deaths in a merge" } else { "deaths" });
        if self.merging.is_some() && self.held.is_some() {
            self.marks.hit("deaths while the layer is dropped");
        }
        (self.deaths, self.held, self.merging) = (self.deaths + 1, None, None);
        self.tasks.die();
        for disk in self.folder.disks() {
            let mut abandoned = disk.abandon();
            self.rng.shuffle(&mut abandoned);
            for op in abandoned {
                disk.land(op, &mut self.rng);
            }
        }
        self.folder.0.borrow_mut().retain(|_, file| !file.removed);
        let disk = self.folder.disk(&self.entry[0]);
        let now = SimDisk::new(disk.content(), true, true, 512);
        let looked =
            block_on(Image::read(&now)).unwrap_or_else(|error| violated(format!("the leaf: {error:#}")));
        let carried = looked.header.header.file_write_guid;
        if let Err(mismatch) = self.memory.check(&looked.owner(place(1)), carried) {
            violated(format!("the successor's memory does not fit: {mismatch:?}"));
        }
        disk.set_immediate(true);
        let resumed = WritableImage::resume(&disk, self.memory.clone(), carried, guids(self.rng.u64(..)));
        let image = block_on(resumed).unwrap_or_else(|error| violated(format!("no successor: {error:#}")));
        disk.set_immediate(false);
        self.inbox = new_inbox(self.hosts.len());
        let parents = fresh_parents(&self.folder, &self.entry);
        let seed = self.rng.u64(..);
        self.engine = new_engine(&self.folder, &self.entry, image, parents, (&self.tasks, &self.inbox, seed));
        self.repeat_requests();
    }

    fn repeat_requests(&mut self) {
        for index in 0..self.hosts.len() {
            let fresh = Host::new(&self.engine, &self.entry);
            let Host { active, buffers, .. } = std::mem::replace(&mut self.hosts[index], fresh);
            (self.hosts[index].active, self.hosts[index].buffers) = (active, buffers);
            for tag in 0..DEPTH {
                let active = self.hosts[index].active[usize::from(tag)].as_ref();
                if let Some(request) = active.map(|active| active.request) {
                    self.with_front(index, |front, port| front.start(tag, request, port));
                }
            }
        }
    }

    /// Holds the fronts. `false` if the daemon was killed.
    fn hold(&mut self) -> bool {
        self.held = Some(0);
        (0..self.hosts.len()).for_each(|front| self.inbox.send(front, ToFront::Hold));
        let deaths = self.deaths;
        let all = self.hosts.len();
        self.step_until("the fronts hold", |world| world.deaths > deaths || world.held == Some(all));
        self.deaths == deaths
    }

    fn release(&mut self) {
        self.held = None;
        (0..self.hosts.len()).for_each(|front| self.inbox.send(front, ToFront::Release));
    }

    /// What becomes of `task`; none if the daemon was killed before.
    fn drive<T: 'static>(&mut self, task: impl Future<Output = T> + 'static) -> Option<T> {
        let (deaths, result) = (self.deaths, self.tasks.start(task));
        self.step_until("it is done", |world| world.deaths > deaths || result.borrow().is_some());
        if self.deaths > deaths { None } else { result.borrow_mut().take() }
    }

    /// As the device does it. A killed one does the rest no more.
    fn obey(&mut self, order: Order) {
        let _ = match order {
            Order::Drop(link) => {
                let layer = self.merging.as_ref().expect("it has asked").layer.clone();
                self.exchange(link, Some(&layer))
            }
            Order::Relink(link) => self.exchange(Some(link), None),
        };
    }

    fn exchange(&mut self, link: Option<Link>, layer: Option<&Path>) -> Option<()> {
        if !self.hold() {
            return None;
        }
        let (engine, disk) = (self.engine.clone(), self.folder.disk(&self.entry[0]));
        let image = self.drive(async move {
            engine.rest().await.unwrap_or_else(|errno| violated(format!("no rest: {errno}")));
            let change = |_: &WritableImage, locator: Option<&mut ParentLocator>| {
                link.map_or(Ok(()), |link| link.put_into(locator.expect("a child")))
            };
            let image = engine.relink(change).await?;
            image.read_bitmaps(&disk).await?;
            Ok(image) as Result<_>
        })?;
        let mut image = image.unwrap_or_else(|error| violated(format!("no relink: {error:#}")));
        if self.dies_now() {
            return None;
        }
        let mut maps: Vec<_> = self.engine.shared().layers().skip(1).cloned().collect();
        if let Some(layer) = layer {
            let number = self.entry.iter().position(|path| path == layer).expect("it is in the chain");
            self.entry.remove(number);
            maps.remove(number - 1);
            maps[number - 1] = fresh_map(&self.folder, &self.entry[number]);
        }
        if self.dies_now() {
            return None;
        }
        self.memory = start_session(&mut image);
        let parents = maps.into_iter().zip(&self.entry[1..]);
        let parents = parents.map(|(map, path)| ReadLayer { disk: self.folder.disk(path), map }).collect();
        self.continue_with(image, parents);
        self.merging.as_ref().expect("it waits").orders.1.ring();
        Some(())
    }

    /// The fronts continue with a new engine.
    fn continue_with(&mut self, image: WritableImage, parents: Vec<ReadLayer<SimDisk>>) {
        let (seed, old) = (self.rng.u64(..), self.engine.clone());
        self.engine = new_engine(&self.folder, &self.entry, image, parents, (&self.tasks, &self.inbox, seed));
        self.tasks.start(async move { old.leave().await });
        for host in &mut self.hosts {
            host.next = Some((self.engine.shared().clone(), self.entry.clone()));
        }
        self.release();
    }

    fn dies_now(&mut self) -> bool {
        let dies = self.rates.death > 0 && self.rng.u32(..6) == 0;
        if dies {
            self.die();
        }
        dies
    }

    /// Takes a snapshot: a new leaf over the one so far.
    pub fn snapshot(&mut self, shape: Shape) {
        if !self.hold() {
            return;
        }
        let engine = self.engine.clone();
        if self.drive(async move { engine.rest().await }).is_none() {
            return;
        }
        self.made += 1;
        let leaf = PathBuf::from(format!("/snapshot{}.vhdx", self.made));
        let shape = Shape { virtual_size: self.engine.shared().geometry().virtual_size(), ..shape };
        let parent = (self.entry[0].clone(), self.engine.data_write_guid());
        self.folder.add(&leaf, layers::empty(&mut self.rng, shape, Some(parent)));
        let mut image = opened_for_writing(&self.folder.disk(&leaf), self.rng.u64(..));
        self.memory = start_session(&mut image);
        let maps = self.engine.shared().layers().cloned();
        let parents = maps.zip(&self.entry);
        let parents = parents.map(|(map, path)| ReadLayer { disk: self.folder.disk(path), map }).collect();
        self.entry.insert(0, leaf);
        self.marks.hit("snapshots");
        self.continue_with(image, parents);
    }
}

impl Host {
    fn new(engine: &Rc<Engine<SimDisk>>, entry: &[PathBuf]) -> Self {
        Self {
            front: Front::new(engine.shared().clone(), DEPTH),
            files: entry.to_vec(),
            next: None,
            to_engine: VecDeque::new(),
            buffers: vec![Vec::new(); usize::from(DEPTH)],
            active: (0..DEPTH).map(|_| None).collect(),
            completed: Vec::new(),
        }
    }
}

/// What a chain that was made holds.
pub fn fates_of(chain: &Chain) -> Fates {
    Fates::of(chain.disk())
}

fn buffer_bytes(length: u64) -> usize {
    length.try_into().expect("a request has a few MiB")
}

fn new_inbox(fronts: usize) -> Rc<Inbox> {
    Rc::new(Inbox(RefCell::new(vec![VecDeque::new(); fronts])))
}

fn opened_for_writing(disk: &SimDisk, seed: u64) -> WritableImage {
    disk.set_immediate(true);
    let image = block_on(Image::open_for_writing(disk, guids(seed)));
    let image = image.unwrap_or_else(|error| violated(format!("the leaf does not open: {error:#}")));
    block_on(image.read_bitmaps(disk)).expect("they are there");
    disk.set_immediate(false);
    image
}

fn start_session(image: &mut WritableImage) -> SessionMemory {
    let memory = SessionMemory::private(image.map.geometry());
    image.start_session(memory.clone(), &image.owner(place(1))).expect("there is memory");
    memory
}

fn fresh_map(folder: &Folder, path: &Path) -> Arc<BlockMap> {
    let opened = layers::read(&folder.disk(path).content());
    let opened = opened.unwrap_or_else(|error| violated(format!("{}: {error:#}", path.display())));
    opened.image.into_map().into()
}

/// The parents as a daemon finds them by its entry: each is what the one above it was made of.
fn fresh_parents(folder: &Folder, entry: &[PathBuf]) -> Vec<ReadLayer<SimDisk>> {
    let content = folder.content();
    for pair in entry.windows(2) {
        let child = layers::opened(&content[&pair[0]]).expect("an image");
        let Some(parent) = content.get(&pair[1]) else { violated(format!("{} is gone", pair[1].display())) };
        let locator = child.metadata.parent_locator.as_ref().expect("a child");
        let known = [locator.linkage().ok(), locator.linkage2()];
        if !known.contains(&Some(data_write_guid(parent))) {
            violated(format!("{} is not recognised by the entry: {locator:?}", pair[1].display()));
        }
    }
    let parents = entry[1..].iter();
    parents.map(|path| ReadLayer { disk: folder.disk(path), map: fresh_map(folder, path) }).collect()
}

fn new_engine(
    folder: &Folder,
    entry: &[PathBuf],
    image: WritableImage,
    parents: Vec<ReadLayer<SimDisk>>,
    (tasks, inbox, seed): (&Rc<SimTasks>, &Rc<Inbox>, u64),
) -> Rc<Engine<SimDisk>> {
    let (disk, tasks, fronts) = (folder.disk(&entry[0]), tasks.clone(), inbox.clone());
    let setup = Setup { image, disk, parents, tasks, fronts, guids: Box::new(guids(seed)) };
    Engine::new(setup).expect("the image is writable")
}
