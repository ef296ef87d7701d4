//! Recovers every file that a power cut may leave at a moment, and holds what is found against the promises.
//!
//! An image is recovered by the program's own open and replay, once per distinct image; what recovery found
//! is its *outcome*: the mapping of every block and the file's length. Whatever led to it, an outcome is
//! judged once per moment: each sector under it, with each value that the sector's own fate allows.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::RangeInclusive;

use fastrand::Rng;
use uuid::Uuid;
use vhdx_ublk::format::bat::{BatEntry, Geometry, PayloadState};
use vhdx_ublk::format::{header, region};
use vhdx_ublk::image::{BlockMap, FoundLog, Image, Layout, check, payload_extent};

use super::disk::{AtRisk, Effect, SimDisk, apply};
use super::images::{Choice, Coverage, Images, Limits, Risk, hash_store};
use super::lineage::Lineage;
use super::marks::Marks;
use super::medium::Medium;
use super::oracle::{Oracle, decode};
use super::places::Places;
use super::store::Store;
use super::tasks::block_on;
use super::world::Config;

/// The GUID that every recovery writes: two recoveries that do the same are then seen to be the same.
const RECOVERY_GUID: Uuid = Uuid::from_u128(0xfeed);

/// Bits flipped per image.
const ROTTEN_BITS: u32 = 24;

/// How hard to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effort {
    pub limits: Limits,
    /// How many power cuts may hit one recovery.
    pub depth: u32,
    /// Torn sectors of writes in flight are images too.
    pub garbage: bool,
}

impl Effort {
    /// What a test run affords.
    pub const TEST: Self = Self { limits: Limits { all: 512, samples: 64 }, depth: 1, garbage: true };
    /// What a night affords.
    pub const LONG: Self = Self { limits: Limits { all: 1 << 14, samples: 4096 }, depth: 2, garbage: true };
}

/// What recovery makes of an image.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Outcome {
    /// Of the disk, bytes.
    size: u64,
    words: Vec<Found>,
    length: u64,
}

/// A watched block's entry and, if it is partially present, the sectors it has, as runs.
type Found = (u64, Vec<(u64, u64)>);

/// An outcome that is possible now, under one length of the file at the cut, and an image that leads to it.
struct Possible {
    outcome: usize,
    length: u64,
    choice: Choice,
}

/// What the images of a disk's life led to.
pub struct Judge {
    blocks: Vec<u64>,
    geometry: Geometry,
    lineage: Lineage,
    layout: Layout,
    places: Places,
    unit: usize,
    effort: Effort,
    rng: Rng,
    /// The outcome of every image seen, and how many power cuts have hit its recovery.
    seen: HashMap<u64, (usize, u32)>,
    outcomes: Vec<Outcome>,
    known: BTreeMap<Outcome, usize>,
    /// Recoveries that power cuts have attacked, by what they did.
    attacked: HashSet<(u64, u32)>,
    now: Option<Images>,
    possible: Vec<Possible>,
    versions: (u64, u64, u64),
    /// The sizes that the disk may have, bytes.
    sizes: RangeInclusive<u64>,
    base: Option<(u64, Store, u64)>,
    pub marks: Marks,
}

impl Judge {
    /// A judge of images of this shape.
    pub fn new(config: &Config, geometry: Geometry, layout: Layout, effort: Effort, rng: Rng) -> Self {
        Self {
            blocks: config.blocks.clone(),
            geometry,
            lineage: Lineage::of(config),
            places: Places::below(layout.bat.end()),
            layout,
            unit: if config.image.logical_sector_size == 4096 { 4096 } else { 512 },
            effort,
            rng,
            seen: HashMap::new(),
            outcomes: Vec::new(),
            known: BTreeMap::new(),
            attacked: HashSet::new(),
            now: None,
            possible: Vec::new(),
            versions: (u64::MAX, u64::MAX, u64::MAX),
            sizes: geometry.virtual_size()..=geometry.virtual_size(),
            base: None,
            marks: Marks::default(),
        }
    }

    /// Distinct images recovered so far.
    pub fn distinct(&self) -> u64 {
        self.seen.len() as u64
    }

    /// The next life's disk and oracle count from the start again.
    pub fn next_life(&mut self) {
        self.versions = (u64::MAX, u64::MAX, u64::MAX);
        self.base = None;
    }

    /// From now on the images are those of a child of the image so far.
    pub fn descend(&mut self, config: &Config, geometry: Geometry, layout: Layout) {
        (self.lineage, self.geometry, self.layout) = (Lineage::of(config), geometry, layout);
        self.next_life();
    }

    /// From now on the disk may have one of these sizes.
    pub fn expect_sizes(&mut self, sizes: RangeInclusive<u64>) {
        self.sizes = sizes;
        self.versions.2 = u64::MAX;
    }

    /// The power may be cut now: everything that this may leave keeps the promises.
    ///
    /// # Errors
    /// The first broken promise.
    pub fn look(&mut self, disk: &SimDisk, oracle: &Oracle) -> Result<(), String> {
        let (all, metadata) = disk.versions();
        let versions = (all, metadata, oracle.version());
        if versions == self.versions {
            return Ok(());
        }
        self.marks.hit("moments");
        if metadata != self.versions.1 {
            self.places = disk.metadata();
            self.recover_all(disk)?;
        }
        self.versions = versions;
        self.judge_all(disk, oracle)
    }

    fn recover_all(&mut self, disk: &SimDisk) -> Result<(), String> {
        let (images, coverage) = disk.at_risk(|durable, changes, lengths| {
            self.mark_changes(changes);
            let (base, hash) = self.base_of(disk, durable);
            let risks = self.risks(changes);
            Images::new(base, hash, &risks, lengths, self.unit, self.effort.limits, &mut self.rng)
        });
        self.marks.hit(match coverage {
            Coverage::All => "moments with every image",
            Coverage::Classes => "moments with log entries whole, absent or broken",
            Coverage::Sampled => "moments with sampled images",
        });
        self.possible.clear();
        let mut found = BTreeSet::new();
        for choice in images.choices(coverage, self.effort.limits, &mut self.rng) {
            self.marks.hit("images");
            let outcome = match self.recover_once(&images, &choice) {
                Ok(outcome) => outcome,
                Err(why) => return Err(self.least(&images, &choice, &why)),
            };
            let length = images.length(&choice);
            if found.insert((outcome, length)) {
                self.possible.push(Possible { outcome, length, choice });
            }
        }
        self.now = Some(images);
        Ok(())
    }

    fn base_of(&mut self, disk: &SimDisk, durable: &Store) -> (Store, u64) {
        let version = disk.durable_version();
        if self.base.as_ref().is_none_or(|(known, ..)| *known != version) {
            let store = self.places.part_of(durable);
            let hash = hash_store(&store, self.unit);
            self.base = Some((version, store, hash));
        }
        let (_, store, hash) = self.base.as_ref().expect("just set");
        (store.clone(), *hash)
    }

    /// The changes of metadata. A write in flight may leave torn sectors: log entries are protected by their
    /// checksum, headers by their twin, the BAT and sector bitmaps by the log, which has every page before it
    /// is written in place.
    fn risks<'a>(&self, changes: &'a [AtRisk]) -> Vec<Risk<'a>> {
        let inside =
            changes.iter().filter(|change| change.start().is_some_and(|start| self.places.has(start)));
        inside
            .map(|change| {
                let start = change.start().expect("just seen");
                let log = (self.layout.log.offset..self.layout.log.end()).contains(&start);
                let logged = start >= self.layout.bat.offset;
                let torn = (log || logged) && change.in_flight() || header::OFFSETS.contains(&start);
                Risk { op: change.op, effect: &change.effect, garbage: torn && self.effort.garbage, log }
            })
            .collect()
    }

    fn recover_once(&mut self, images: &Images, choice: &Choice) -> Result<usize, String> {
        if !self.seen.contains_key(&images.hash(choice)) {
            self.mark_profile(images, choice);
        }
        self.outcome_of(images, choice, self.effort.depth)
    }

    /// What recovery makes of an image, whose recovery `depth` power cuts have hit from here on.
    fn outcome_of(&mut self, images: &Images, choice: &Choice, depth: u32) -> Result<usize, String> {
        let hash = images.hash(choice);
        if let Some((outcome, hit)) = self.seen.get(&hash)
            && *hit >= depth
        {
            return Ok(*outcome);
        }
        let store = images.store(choice);
        let (outcome, ops) = self.recover(store.clone())?;
        let outcome = self.intern(outcome);
        self.seen.insert(hash, (outcome, depth));
        self.attack(&store, &ops, outcome, depth)?;
        Ok(outcome)
    }

    fn mark_profile(&mut self, images: &Images, choice: &Choice) {
        let partial = images.is_partial(choice);
        self.marks.hit(if partial { "P2 parts of what was at risk" } else { "P0 none or all of it" });
        if partial && images.is_of_whole_writes(choice) {
            self.marks.hit("P1 whole writes");
        }
        if self.unit == 4096 && partial {
            self.marks.hit("P3 sectors of 4096 bytes");
        }
        if images.has_garbage(choice) {
            self.marks.hit("P4 torn sectors");
        }
        if images.has_own_length(choice) {
            self.marks.hit("P5 a length of its own");
        }
    }

    /// Opens the image as the next process would.
    fn recover(&mut self, store: Store) -> Result<(Outcome, Vec<Effect>), String> {
        let found_length = store.length;
        let medium = Medium::new(store, self.places.clone());
        let image = block_on(Image::open_for_writing(&medium, || RECOVERY_GUID));
        let image = image.map_err(|error| format!("the image does not open: {error}"))?;
        match image.found_log {
            FoundLog::Virgin => {
                return Err("the headers name a log that has no entry: others call that corrupt".into());
            }
            FoundLog::Dirty(_) => self.marks.hit("replays"),
            FoundLog::Clean => {}
        }
        block_on(image.read_bitmaps(&medium)).map_err(|error| format!("no bitmaps: {error}"))?;
        let words: Vec<_> = self.blocks.iter().map(|&block| found_in(&image.map, block)).collect();
        let length = image.layout.file_length;
        for &(word, _) in &words {
            let extent = payload_extent(BatEntry(word), &self.geometry);
            if let Some(extent) = extent.filter(|extent| extent.end() > length) {
                return Err(format!("a block lies at {extent:?}, the file ends at {length}"));
            }
            if extent.is_some_and(|extent| extent.end() > found_length) {
                return Err(format!("others do not extend the file, of {found_length} bytes, to {extent:?}"));
            }
        }
        let outcome = Outcome { size: image.metadata.virtual_size, words, length };
        if !self.known.contains_key(&outcome) {
            self.examine(&medium)?;
        }
        Ok((outcome, medium.into_ops()))
    }

    /// What recovery leaves is sound in every structure.
    fn examine(&mut self, medium: &Medium) -> Result<(), String> {
        self.marks.hit("recovered images examined whole");
        let report = block_on(check(medium)).map_err(|error| format!("the examination fails: {error}"))?;
        if report.corruptions > 0 || !report.complete {
            return Err(format!("not sound after recovery: {:?}", report.findings));
        }
        Ok(())
    }

    fn intern(&mut self, outcome: Outcome) -> usize {
        let next = self.outcomes.len();
        let index = *self.known.entry(outcome.clone()).or_insert(next);
        if index == next {
            self.outcomes.push(outcome);
        }
        index
    }

    /// Cuts the power at every step of a recovery that did `ops`, `depth` times over: what the next recovery
    /// finds is the same.
    fn attack(&mut self, start: &Store, ops: &[Effect], expected: usize, depth: u32) -> Result<(), String> {
        if depth == 0 || ops.is_empty() || !self.attacked.insert((hash_ops(ops), depth)) {
            return Ok(());
        }
        let mut durable = start.clone();
        for epoch in ops.split_inclusive(|op| matches!(op, Effect::Sync)) {
            let changes = match epoch {
                [changes @ .., Effect::Sync] => changes,
                unfinished => unfinished,
            };
            self.cut_recovery(&durable, changes, expected, depth)?;
            for change in changes {
                apply(&mut durable, change);
            }
        }
        Ok(())
    }

    /// Every file that a power cut between two syncs of a recovery may leave.
    fn cut_recovery(
        &mut self,
        durable: &Store,
        changes: &[Effect],
        expected: usize,
        depth: u32,
    ) -> Result<(), String> {
        let risks = (0..).zip(changes).map(|(op, effect)| {
            let torn = matches!(effect, Effect::Write { offset, .. } if header::OFFSETS.contains(offset));
            Risk { op, effect, garbage: torn && self.effort.garbage, log: false }
        });
        let risks: Vec<Risk<'_>> = risks.collect();
        let lengths = lengths(durable.length, changes.iter());
        let (limits, hash) = (self.effort.limits, hash_store(durable, self.unit));
        let (images, coverage) =
            Images::new(durable.clone(), hash, &risks, lengths, self.unit, limits, &mut self.rng);
        for choice in images.choices(coverage, limits, &mut self.rng) {
            self.marks.hit("cuts in a recovery");
            if self.effort.depth > depth {
                self.marks.hit("cuts in the recovery from a cut in a recovery");
            }
            let found = self.outcome_of(&images, &choice, depth - 1).map_err(|why| {
                format!("after a power cut in recovery: {why}; {}", images.describe(&choice))
            })?;
            if found != expected {
                return Err(format!(
                    "a power cut in recovery changes what recovery finds: {:?} became {:?}; {}",
                    self.outcomes[expected],
                    self.outcomes[found],
                    images.describe(&choice)
                ));
            }
        }
        Ok(())
    }

    /// Flips bits in what a checksum or a reserved field protects of the closed image on `disk`: it is
    /// refused, or read as if nothing had happened.
    ///
    /// # Errors
    /// A flipped bit that changes what is read.
    pub fn rot(&mut self, disk: &SimDisk) -> Result<(), String> {
        self.places = disk.metadata();
        let whole = self.places.part_of(&disk.content());
        let (expected, _) = self.recover(whole.clone())?;
        for _ in 0..ROTTEN_BITS {
            let (at, bit) = self.rotting_bit();
            let mut store = whole.clone();
            let mut byte = [0];
            store.read(at, &mut byte);
            store.write(at, &[byte[0] ^ 1 << bit]);
            match self.recover(store) {
                Err(_) => self.marks.hit("P7 bit rot refused"),
                Ok((found, _)) if found == expected => self.marks.hit("P7 bit rot that does not matter"),
                Ok((found, _)) => {
                    return Err(format!("bit {bit} of byte {at} flipped turns {expected:?} into {found:?}"));
                }
            }
        }
        Ok(())
    }

    fn rotting_bit(&mut self) -> (u64, u32) {
        let rng = &mut self.rng;
        let bit = rng.u32(..8);
        match rng.u32(..4) {
            0 => (rng.u64(..8), bit),
            1 => (header::OFFSETS[rng.usize(..2)] + rng.u64(..header::SIZE as u64), bit),
            2 => (region::OFFSETS[rng.usize(..2)] + rng.u64(..region::SIZE as u64), bit),
            // Bits 8 to 15 of a BAT entry are reserved.
            _ => {
                let block = self.blocks[rng.usize(..self.blocks.len())];
                (self.layout.bat.offset + self.geometry.payload_slot(block) * 8 + 1, bit)
            }
        }
    }

    fn judge_all(&mut self, disk: &SimDisk, oracle: &Oracle) -> Result<(), String> {
        let mut judged: HashSet<(usize, &Found, u64, u64)> = HashSet::new();
        let broken = disk.at_risk(|durable, changes, _| {
            let is_payload = |change: &&AtRisk| change.start().is_some_and(|start| !self.places.has(start));
            let payload: Vec<&AtRisk> = changes.iter().filter(is_payload).collect();
            for possible in &self.possible {
                let Outcome { size, words, .. } = &self.outcomes[possible.outcome];
                if !self.sizes.contains(size) {
                    let why = format!("the disk has {size} bytes, not {:?}", self.sizes);
                    return Err((possible.choice.clone(), why));
                }
                for (place, word) in words.iter().enumerate() {
                    if !judged.insert((place, word, possible.length, *size)) {
                        continue;
                    }
                    let view = Payload { durable, changes: &payload, length: possible.length };
                    match self.judge_block((self.blocks[place], *size), word, &view, oracle) {
                        Ok(values) => self.marks.add("payload sectors judged", values),
                        Err(why) => return Err((possible.choice.clone(), why)),
                    }
                }
            }
            Ok(())
        });
        match (broken, &self.now) {
            (Err((choice, why)), Some(images)) => Err(format!("{why}; {}", images.describe(&choice))),
            (Err((_, why)), None) => Err(why),
            (Ok(()), _) => Ok(()),
        }
    }

    /// Judges every watched sector of a block of a disk of `size` bytes under one mapping, with each value
    /// its own fate allows.
    fn judge_block(
        &self,
        (block, size): (u64, u64),
        (word, here): &Found,
        view: &Payload<'_>,
        oracle: &Oracle,
    ) -> Result<u64, String> {
        let sector_size = u64::from(self.geometry.logical_sector_size());
        let entry = BatEntry(*word);
        let start = block * self.geometry.block_size();
        let end = (start + self.geometry.block_size()).min(size);
        let mut judged = 0;
        for sector in oracle.watched_in(start / sector_size, end / sector_size) {
            judged += if let Some(value) =
                self.lineage.elsewhere(entry, sector, || is_in(here, sector - start / sector_size))
            {
                judge_value(sector, Ok(value), oracle).map(|()| 1)?
            } else {
                let place = entry.offset() + sector * sector_size - start;
                view.judge_sector(sector, place, sector_size, oracle)?
            };
        }
        Ok(judged)
    }

    /// The failing image with as little of it at risk as still fails, in words.
    fn least(&self, images: &Images, choice: &Choice, why: &str) -> String {
        let least = images.shrink(choice, |choice| {
            let medium = Medium::new(images.store(choice), self.places.clone());
            match block_on(Image::open_for_writing(&medium, || RECOVERY_GUID)) {
                Ok(image) => image.found_log == FoundLog::Virgin,
                Err(_) => true,
            }
        });
        format!("{why}; {}", images.describe(&least))
    }

    fn mark_changes(&mut self, changes: &[AtRisk]) {
        let Some(newest) = changes.last() else { return };
        match &newest.effect {
            Effect::Resize(_) => self.marks.hit("a length at risk"),
            Effect::Write { offset, .. } if *offset < self.layout.bat.end() => match *offset {
                offset if offset == header::OFFSETS[0] => self.marks.hit("header 1 at risk"),
                offset if offset == header::OFFSETS[1] => self.marks.hit("header 2 at risk"),
                offset if offset >= self.layout.bat.offset => self.marks.hit("a BAT page at risk in place"),
                _ => self.marks.hit("a log entry at risk"),
            },
            _ => {}
        }
    }
}

/// What the payload of the file may be after a cut that leaves `length` bytes.
struct Payload<'a> {
    durable: &'a Store,
    changes: &'a [&'a AtRisk],
    length: u64,
}

impl Payload<'_> {
    fn judge_sector(
        &self,
        sector: u64,
        place: u64,
        sector_size: u64,
        oracle: &Oracle,
    ) -> Result<u64, String> {
        let size = usize::try_from(sector_size).expect("small");
        if place + sector_size > self.length {
            return judge_value(sector, Ok(0), oracle).map(|()| 1);
        }
        let mut bytes = [0; 4096];
        self.durable.read_onto_zeros(place, &mut bytes[..size]);
        judge_value(sector, decode(sector, &bytes[..size]), oracle)?;
        let mut judged = 1;
        for change in self.changes.iter().filter(|change| change.reaches(place)) {
            judged += 1;
            match &change.effect {
                Effect::Write { offset, bytes, .. } => {
                    let from = usize::try_from(place - offset).expect("inside the write");
                    judge_value(sector, decode(sector, &bytes[from..from + size]), oracle)?;
                    // Its sectors may be torn, which only its own guest may see.
                    if change.in_flight() && !oracle.is_being_written(sector) {
                        return Err(format!("sector {sector} is under a write of somebody else"));
                    }
                }
                _ => judge_value(sector, Ok(0), oracle)?,
            }
        }
        Ok(judged)
    }
}

fn judge_value(sector: u64, found: Result<u64, String>, oracle: &Oracle) -> Result<(), String> {
    let found = found?;
    if oracle.may_survive(sector, found) { Ok(()) } else { Err(oracle.explain(sector, found)) }
}

fn is_in(runs: &[(u64, u64)], sector: u64) -> bool {
    runs.iter().any(|(start, end)| (*start..*end).contains(&sector))
}

/// The entry of `block`, zero if the disk ends before it, and the sectors that it has if it is partially
/// present.
fn found_in(map: &BlockMap, block: u64) -> Found {
    if block >= map.geometry().block_count() {
        return (0, Vec::new());
    }
    let (entry, geometry) = (map.load(block).entry, map.geometry());
    let mut runs = Vec::new();
    if entry.payload_state() == Some(PayloadState::PartiallyPresent) {
        let sectors = geometry.block_size() / u64::from(geometry.logical_sector_size());
        let mut at = 0;
        while at < sectors {
            let (here, next) = map.bitmaps().run(geometry, block, at, sectors);
            runs.extend(here.then_some((at, next)));
            at = next;
        }
    }
    (entry.0, runs)
}

/// The lengths that a file of `durable` bytes may have with `changes` at risk.
pub fn lengths<'a>(durable: u64, changes: impl Iterator<Item = &'a Effect>) -> Vec<u64> {
    let mut lengths = vec![durable];
    for change in changes {
        if let Effect::Resize(length) = change
            && !lengths.contains(length)
        {
            lengths.push(*length);
        }
    }
    lengths
}

fn hash_ops(ops: &[Effect]) -> u64 {
    let mut hash = 0_u64;
    for op in ops {
        hash = hash.rotate_left(7) ^ op.digest();
    }
    hash
}
