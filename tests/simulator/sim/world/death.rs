//! The daemon is killed, and a successor takes over.
//!
//! What survives: the session's memory, and the file as the host's cache has it. I/O in flight may still
//! land, in whole or in part, until the lock is granted. Nothing else survives; the guest's requests in
//! flight are repeated to the successor, or fail.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use uuid::Uuid;
use vhdx_ublk::chain::ReadLayer;
use vhdx_ublk::engine::{Engine, Setup};
use vhdx_ublk::error::Error;
use vhdx_ublk::image::{Image, Mismatch, Place, SessionMemory, WritableImage};
use vhdx_ublk::simulation::{Plant, planted};

use super::{Faults, Inbox, Seen, World, front, guids, read_sector};
use crate::sim::disk::{Abandoned, SimDisk};
use crate::sim::violation::violated;

/// Where the image is, as far as anybody asks, since the `boot`-th start of the kernel.
pub fn place(boot: u128) -> Place {
    Place { boot: Uuid::from_u128(boot), inode: 2, device: 1, file_system: 0, path: "/image.vhdx".into() }
}

/// How many daemons are killed before one serves again, at most.
const DEATHS_IN_A_ROW: u32 = 5;

/// At which step of an opening a daemon is killed, at most: a log half full takes most of them to replay.
const LAST_STEP: usize = 180;

/// Moves the block map of `image` into memory that outlives the daemon. Where what a death cuts short is
/// lost, the data goes through the host's page cache.
pub(super) fn start_session(image: &mut WritableImage, faults: Faults) -> SessionMemory {
    let memory = SessionMemory::private(image.map.geometry());
    image.start_session(memory.clone(), &image.owner(place(1))).expect("there is memory");
    if faults.lost_with_death {
        memory.note_page_cache();
    }
    memory
}

impl World {
    /// Kills the daemon. Returns when a successor serves, and has shown that it lost nothing acknowledged; or
    /// when it refuses, since the host has lost something.
    pub fn die(&mut self) {
        self.die_again(|world, deaths| {
            let dies = deaths < DEATHS_IN_A_ROW && world.rng.bool();
            dies.then(|| world.rng.usize(..LAST_STEP))
        });
    }

    /// The same; `killed_at` says of a successor, by how many were killed before it, at which step of its
    /// opening it is killed, if at any.
    pub fn die_again(&mut self, mut killed_at: impl FnMut(&mut Self, u32) -> Option<usize>) {
        self.marks.hit("daemon deaths");
        if self.held.take().is_some() {
            self.marks.hit("deaths while fronts are held");
        }
        self.deaths += 1;
        if self.config.faults.lost_with_death {
            self.disk.lose_what_dies();
        }
        self.mark_counters();
        let (mut late, mut deaths) = (self.end_process(), 1);
        self.make_room_for_successor();
        let opened = loop {
            let step = killed_at(self, deaths);
            match self.open_again(step) {
                Some(Ok(opened)) => break opened,
                Some(Err(_)) if self.disk.is_doubtful() => return self.stay_dead(),
                Some(Err(why)) => violated(format!("the successor refuses: {why}")),
                None => {}
            }
            self.marks.hit("deaths in a recovery");
            late.extend(self.end_process());
            deaths += 1;
        };
        for abandoned in late {
            self.disk.land(abandoned, &mut self.rng);
        }
        self.serve(opened);
        self.compare();
        self.repeat_requests();
    }

    /// Takes the process away. What of its I/O lands later than the lock allows is returned: nothing.
    fn end_process(&mut self) -> Vec<Abandoned> {
        self.tasks.die();
        self.batch = None;
        self.posted.ends.clear();
        let mut abandoned = self.disk.abandon();
        if planted(Plant::NoFence) {
            return abandoned;
        }
        self.rng.shuffle(&mut abandoned);
        for operation in abandoned {
            self.disk.land(operation, &mut self.rng);
            self.look_at_cuts();
        }
        Vec::new()
    }

    /// Opens the image as the successor does, step by step; none if it is killed before it has.
    fn open_again(&mut self, killed_at: Option<usize>) -> Option<Result<Resumed, Error>> {
        self.disk.open_anew();
        let (disk, memory, guids) = (self.disk.clone(), self.memory.clone(), guids(&mut self.rng));
        let opening = self.tasks.start(resume(disk, memory, self.config.faults, guids));
        let mut steps = 0;
        loop {
            if let Some(opened) = opening.borrow_mut().take() {
                return Some(opened);
            }
            if killed_at.is_some_and(|killed_at| steps >= killed_at) {
                return None;
            }
            steps += 1;
            assert!(steps < 1_000_000, "the successor does not come to rest");
            let ops = self.disk.operations();
            match self.rng.usize(..(self.tasks.ready() + ops).max(1)) {
                task if task < self.tasks.ready() => self.tasks.run(task),
                op => drop(self.disk.complete(op - self.tasks.ready())),
            }
            self.look_at_cuts();
        }
    }

    /// No daemon serves the device from now on: what it has not answered, it never will.
    fn stay_dead(&mut self) {
        self.marks.hit("successors that refuse what may be lost");
        (self.injected, self.issued) = (true, self.config.requests);
        self.last_death = Some(self.deaths);
        (self.config.faults.death, self.config.faults.snapshot) = (0, 0);
        self.memory.poison();
        self.inbox = Rc::new(Inbox(RefCell::new(vec![VecDeque::new(); self.config.fronts])));
        for host in &mut self.hosts {
            host.front = front(self.engine.shared().clone(), &self.config);
            host.to_engine.clear();
            host.active.fill_with(|| None);
        }
    }

    /// A power cut may follow at any moment, and takes the session away.
    fn look_at_cuts(&mut self) {
        self.find_bitmaps();
        let Some(judge) = &mut self.judge else { return };
        if let Err(why) = judge.look(&self.disk, &self.oracle) {
            violated(format!("after the daemon's death and a power cut: {why}"));
        }
    }

    /// What a successor writes before it serves needs room; without any it refuses, and may be started again.
    fn make_room_for_successor(&self) {
        if self.config.faults.full > 0 {
            self.disk.set_full(false);
        }
    }

    fn serve(&mut self, (image, memory): Resumed) {
        self.memory = memory;
        self.marks.add("pages that only the memory had", image.pending().pages.len() as u64);
        self.marks.add("space that only the file names", image.pending().unmapped.len() as u64);
        self.inbox = Rc::new(Inbox(RefCell::new(vec![VecDeque::new(); self.config.fronts])));
        let (disk, tasks, fronts) = (self.disk.clone(), self.tasks.clone(), self.inbox.clone());
        let maps = self.engine.shared().layers().skip(1).cloned();
        let files = self.parents.iter().map(|file| SimDisk::new(file.clone(), true, true, 512));
        let parents = files.zip(maps).map(|(disk, map)| ReadLayer { disk, map }).collect();
        let guids = Box::new(guids(&mut self.rng));
        let engine = Engine::new(Setup { image, disk, parents, tasks, fronts, guids });
        self.engine = engine.expect("the image is writable");
        self.seen = Seen::default();
    }

    /// Nothing that was acknowledged is lost, flushed or not.
    fn compare(&mut self) {
        let (content, map) = (self.disk.content(), &self.engine.shared().map);
        for sector in self.oracle.touched() {
            let found = read_sector(map, &self.lineage, &content, sector);
            let found = found.unwrap_or_else(|why| violated(format!("after a death: {why}")));
            if !self.oracle.readable(sector).contains(&found) {
                violated(format!("a death lost: {}", self.oracle.explain(sector, found)));
            }
        }
    }

    /// The kernel repeats what was in flight, or fails it.
    fn repeat_requests(&mut self) {
        let repeat = self.rng.bool();
        for index in 0..self.hosts.len() {
            let host = &mut self.hosts[index];
            host.front = front(self.engine.shared().clone(), &self.config);
            host.to_engine.clear();
            for tag in 0..self.config.depth {
                let active = &mut self.hosts[index].active[usize::from(tag)];
                match active.as_ref().map(|active| active.request) {
                    Some(request) if repeat => {
                        self.marks.hit("requests repeated to a successor");
                        self.with_front(index, |front, port| front.start(tag, request, port));
                    }
                    Some(_) => {
                        self.marks.hit("requests failed by a death");
                        *active = None;
                    }
                    None => {}
                }
            }
        }
    }
}

/// The image as the successor serves it, and the memory of its session.
type Resumed = (WritableImage, SessionMemory);

async fn resume(
    disk: SimDisk,
    memory: SessionMemory,
    faults: Faults,
    guids: impl FnMut() -> Uuid,
) -> Result<Resumed, Error> {
    let looked = Image::read(&disk).await?;
    let carried = looked.header.header.file_write_guid;
    match memory.check(&looked.owner(place(1)), carried) {
        Ok(()) => {
            let image = WritableImage::resume(&disk, memory.clone(), carried, guids).await?;
            Ok((image, memory))
        }
        Err(Mismatch::Grown) => {
            let mut image = WritableImage::resume(&disk, memory, carried, guids).await?;
            image.read_bitmaps(&disk).await?;
            let memory = start_session(&mut image, faults);
            Ok((image, memory))
        }
        Err(mismatch) => violated(format!("the successor's memory does not fit: {mismatch:?}")),
    }
}
