//! The image that is served becomes the parent of a new one, while requests come.

use std::collections::BTreeMap;
use std::sync::Arc;

use fastrand::Rng;
use vhdx_ublk::chain::ReadLayer;
use vhdx_ublk::engine::message::ToFront;
use vhdx_ublk::engine::{Engine, Setup};
use vhdx_ublk::image::BlockMap;

use super::{Beginning, Config, Opened, Seen, World, check_recovery, guids, open_image, read_sector};
use crate::sim::disk::SimDisk;
use crate::sim::lineage::{Lineage, descent};
use crate::sim::oracle::Value;
use crate::sim::store::Store;
use crate::sim::tasks::block_on;
use crate::sim::violation::violated;

/// How many snapshots are taken of one device, at most.
pub(super) const MAX_SNAPSHOTS: usize = 3;

/// Steps in which a hold, or a freeze, must come to its end.
const MAX_STEPS: usize = 1_000_000;

impl World {
    /// Freezes the image and continues with a child of it, in the steps of the device's. Killed in between,
    /// its successor serves the image that was served then, and holds no front.
    pub(super) fn snapshot(&mut self) {
        self.marks.hit("snapshots");
        self.marks.add("requests that wait for room through a snapshot", self.short_of_room() as u64);
        let before = self.images_judged();
        let deaths = self.deaths;
        self.hold();
        if self.deaths == deaths {
            self.freeze();
        }
        if self.deaths > deaths {
            return;
        }
        self.marks.add("images inside a snapshot", self.images_judged() - before);
        let values = self.examine_frozen();
        if self.dies_now("deaths between freeze and rest") {
            return;
        }
        self.engine.shared().map.memory().rest();
        if self.dies_now("deaths between rest and switch") {
            return;
        }
        if self.rng.u32(..4) == 0 {
            self.marks.hit("snapshots that fail in the end");
        } else {
            self.descend(values);
            if self.dies_now("deaths between switch and release") {
                return;
            }
        }
        for front in 0..self.hosts.len() {
            self.inbox.0.borrow_mut()[front].push_back(ToFront::Release);
        }
    }

    pub(super) fn dies_now(&mut self, when: &'static str) -> bool {
        let dies = self.config.faults.death > 0 && self.rng.u32(..4) == 0;
        if dies {
            self.marks.hit(when);
            self.die();
        }
        dies
    }

    pub(super) fn images_judged(&self) -> u64 {
        self.judge.as_ref().map_or(0, |judge| judge.marks.count("images"))
    }

    pub(super) fn hold(&mut self) {
        self.held = Some(0);
        let deaths = self.deaths;
        self.await_batch();
        if self.deaths > deaths {
            return;
        }
        for front in 0..self.hosts.len() {
            self.inbox.0.borrow_mut()[front].push_back(ToFront::Hold);
        }
        self.step_until("the fronts hold", |world| {
            world.deaths > deaths || world.held == Some(world.hosts.len())
        });
        if self.deaths == deaths && (0..self.disk.operations()).any(|index| self.disk.front_op(index).0) {
            violated("a front says that it holds, and its I/O is still under way".into());
        }
    }

    pub(super) fn freeze(&mut self) {
        let engine = self.engine.clone();
        let frozen = self.tasks.start(async move { engine.freeze().await });
        let deaths = self.deaths;
        self.step_until("the image is frozen", |world| world.deaths > deaths || frozen.borrow().is_some());
        if self.deaths > deaths {
            return;
        }
        if frozen.borrow().as_ref().is_some_and(|frozen| *frozen != Ok(())) {
            violated("the image does not freeze".into());
        }
        self.held = None;
    }

    pub(super) fn step_until(&mut self, what: &str, is_done: impl Fn(&Self) -> bool) {
        let mut steps = 0;
        while !is_done(self) {
            steps += 1;
            if (!self.step() && !is_done(self)) || steps > MAX_STEPS {
                violated(format!("it never comes that {what}"));
            }
        }
    }

    /// What is frozen is durable and sound, and holds what was acknowledged and nothing else.
    fn examine_frozen(&mut self) -> BTreeMap<u64, Value> {
        let at_risk = self.disk.at_risk(|_, changes, _| changes.len());
        if at_risk > 0 {
            violated(format!("{at_risk} changes of a frozen image are not durable"));
        }
        let (content, mut oracle) = (self.disk.content(), self.oracle.clone());
        let sound = check_recovery(&self.config, &content, &mut oracle, &mut self.rng, &mut self.activation);
        sound.unwrap_or_else(|why| violated(format!("a frozen image: {why}")));
        let map = &self.engine.shared().map;
        let mut values = BTreeMap::new();
        for sector in self.oracle.touched() {
            let value = self.read_frozen(map, &content, sector);
            // What a death has failed may be there, or not, and so may what waits for room.
            let is_doubtful = self.deaths > 0 || self.waits_ended || self.short_of_room() > 0;
            let known =
                if is_doubtful { self.oracle.readable(sector) } else { self.oracle.acknowledged(sector) };
            if !known.contains(&value) {
                violated(format!("a frozen image: {}", self.oracle.explain(sector, value)));
            }
            values.insert(sector, value);
        }
        values
    }

    fn read_frozen(&self, map: &BlockMap, content: &Store, sector: u64) -> Value {
        read_sector(map, &self.lineage, content, sector)
            .unwrap_or_else(|why| violated(format!("a frozen image: {why}")))
    }

    /// Continues with a child of the frozen image, which holds `values`.
    fn descend(&mut self, values: BTreeMap<u64, Value>) {
        self.lineage = Lineage::frozen(values, self.lineage.clone());
        self.config.image.parent = Some(descent());
        self.config.beginning = Beginning::Nothing;
        self.config.frozen = Some(Arc::new(self.lineage.clone()));
        let (frozen, old) = (self.disk.content(), self.engine.clone());
        self.parents.insert(0, frozen);
        let disks = self.parents.iter().map(|file| SimDisk::new(file.clone(), true, true, 512));
        let maps = old.shared().layers().cloned();
        let parents = disks.zip(maps).map(|(disk, map)| ReadLayer { disk, map }).collect();
        let mut rng = self.rng.fork();
        let Opened { image, disk, memory } = new_leaf(&self.config, &mut rng);
        (self.disk, self.memory, self.layout) = (disk, memory, image.layout);
        let (disk, tasks, fronts) = (self.disk.clone(), self.tasks.clone(), self.inbox.clone());
        let guids = Box::new(guids(&mut rng));
        let engine = Engine::new(Setup { image, disk, parents, tasks, fronts, guids });
        self.engine = engine.expect("a new image is writable");
        for host in &mut self.hosts {
            host.next = Some(self.engine.shared().clone());
        }
        self.seen = Seen::default();
        self.snapshots += 1;
        if let Some(judge) = &mut self.judge {
            judge.descend(&self.config, *self.engine.shared().geometry(), self.layout);
        }
    }
}

fn new_leaf(config: &Config, rng: &mut Rng) -> Opened {
    let disk = SimDisk::new(Store::default(), true, config.can_punch, config.image.logical_sector_size);
    block_on(config.image.write(&disk, guids(rng))).expect("the configuration is legal");
    open_image(config, disk.content(), &mut guids(rng))
}
