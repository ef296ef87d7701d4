//! What each virtual sector may hold, now and after a power cut.
//!
//! Every sector written carries a stamp: its own number, the write's id and a checksum. So a wrong sector
//! shows which promise it broke: lost (an older id than the flush allows), teleported (another sector's
//! number), torn (checksum), stale (an id never issued here).

use std::collections::BTreeMap;
use std::ops::Range;

use super::lineage::Lineage;

/// What a sector holds: 0 is zeros, anything else the id of the write that filled it.
pub type Value = u64;

#[derive(Clone, Debug)]
struct Entry {
    value: Value,
    acknowledged: Option<u64>,
    /// An advisory discard may leave what was there before.
    supersedes: bool,
}

/// The histories of the sectors that are watched: some at either end of each block and some in its middle,
/// which is where the borders of requests fall. Whatever is wrong with a block is wrong there.
#[derive(Clone)]
pub struct Oracle {
    sectors: BTreeMap<u64, Vec<Entry>>,
    /// Every change of a sector with the time it was issued: a slow read may find what has come and gone.
    changes: BTreeMap<u64, Vec<(Value, u64)>>,
    sectors_per_block: u64,
    clock: u64,
    next_id: u64,
    /// Changes whenever less is allowed than before.
    version: u64,
    /// Sectors watched at each of the three places of a block.
    width: u64,
    lineage: Lineage,
}

/// Sectors watched at each of the three places of a block.
pub const WATCHED: u64 = 16;

impl Oracle {
    /// An oracle for blocks of so many sectors, which watches `width` of them at three places of each.
    pub fn new(sectors_per_block: u64, width: u64) -> Self {
        Self {
            sectors: BTreeMap::new(),
            changes: BTreeMap::new(),
            sectors_per_block,
            clock: 0,
            next_id: 0,
            version: 0,
            width,
            lineage: Lineage::default(),
        }
    }

    /// The same for a disk that begins with what `lineage` says.
    pub fn descending(self, lineage: Lineage) -> Self {
        Self { lineage, ..self }
    }

    /// Changes whenever less is allowed than before.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The watched sectors in `first..end`, which is a block or a part of one.
    pub fn watched_in(&self, first: u64, end: u64) -> impl Iterator<Item = u64> + use<> {
        let block = first - first % self.sectors_per_block;
        let (middle, last) =
            (block + self.sectors_per_block / 2, block + self.sectors_per_block - self.width);
        [block, middle, last]
            .into_iter()
            .flat_map({
                let width = self.width;
                move |from| from..from + width
            })
            .filter(move |sector| (first..end).contains(sector))
    }

    /// Whether a write to `sector` has been issued and not acknowledged.
    pub fn is_being_written(&self, sector: u64) -> bool {
        let history = self.sectors.get(&sector).into_iter().flatten();
        history.rev().any(|entry| entry.acknowledged.is_none())
    }

    fn watched(&self, first: u64, count: u64) -> impl Iterator<Item = u64> + use<> {
        let (per_block, width, end) = (self.sectors_per_block, self.width, first + count);
        (first / per_block..end.div_ceil(per_block)).flat_map(move |block| {
            let places = [0, per_block / 2, per_block - width].map(|within| block * per_block + within);
            places.into_iter().flat_map(move |place| place.max(first)..(place + width).min(end))
        })
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// The time now, for a flush or a read about to be issued.
    pub fn now(&mut self) -> u64 {
        self.tick()
    }

    /// A fresh id for a write about to be issued.
    pub fn new_id(&mut self) -> Value {
        self.next_id += 1;
        self.next_id
    }

    /// A write of `value` (0 for zeros) to sectors `first..first + count` is issued.
    pub fn issue(&mut self, first: u64, count: u64, value: Value, supersedes: bool) {
        self.change(first, count, value, |_, _| supersedes);
    }

    /// A discard of sectors `first..first + count` is issued. Those `in_whole_blocks` read as zeros when it
    /// is acknowledged, unless a write to them is under way, which may come before it or after it; of the
    /// others it may leave what was there.
    pub fn discard(&mut self, first: u64, count: u64, in_whole_blocks: Range<u64>) {
        self.change(first, count, 0, |sector, history| {
            in_whole_blocks.contains(&sector) && history.iter().all(|entry| entry.acknowledged.is_some())
        });
    }

    fn change(&mut self, first: u64, count: u64, value: Value, supersedes: impl Fn(u64, &[Entry]) -> bool) {
        let issued = self.tick();
        for sector in self.watched(first, count) {
            let history = self
                .sectors
                .entry(sector)
                .or_insert_with(|| vec![Entry::original(self.lineage.original(sector))]);
            let supersedes = supersedes(sector, history);
            history.push(Entry { value, acknowledged: None, supersedes });
            self.changes.entry(sector).or_default().push((value, issued));
        }
    }

    /// That write, the newest of `value` there, is acknowledged; `durable` as by FUA.
    pub fn acknowledge(&mut self, first: u64, count: u64, value: Value, durable: bool) {
        self.version += 1;
        let now = self.tick();
        for sector in self.watched(first, count) {
            let history = self.sectors.get_mut(&sector).expect("issued before");
            let place =
                history.iter().rposition(|entry| entry.value == value && entry.acknowledged.is_none());
            history[place.expect("issued before")].acknowledged = Some(now);
            if durable {
                history.drain(..place.expect("issued before"));
            }
        }
    }

    /// A flush that was issued at time `issued` is acknowledged: what was acknowledged before it survives.
    pub fn flushed(&mut self, issued: u64) {
        self.version += 1;
        for history in self.sectors.values_mut() {
            let floor = history.iter().rposition(|entry| {
                entry.supersedes && entry.acknowledged.is_some_and(|acknowledged| acknowledged < issued)
            });
            history.drain(..floor.unwrap_or(0));
        }
    }

    /// What a read of `sector` issued now may find, unless a change comes in between.
    pub fn readable(&self, sector: u64) -> Vec<Value> {
        let Some(history) = self.sectors.get(&sector) else { return vec![self.lineage.original(sector)] };
        let floor = history.iter().rposition(|entry| entry.supersedes && entry.acknowledged.is_some());
        history[floor.unwrap_or(0)..].iter().map(|entry| entry.value).collect()
    }

    /// What `sector` may hold if nothing counts that is not acknowledged.
    pub fn acknowledged(&self, sector: u64) -> Vec<Value> {
        let Some(history) = self.sectors.get(&sector) else { return vec![self.lineage.original(sector)] };
        let floor = history.iter().rposition(|entry| entry.supersedes && entry.acknowledged.is_some());
        let known = history[floor.unwrap_or(0)..].iter().filter(|entry| entry.acknowledged.is_some());
        known.map(|entry| entry.value).collect()
    }

    /// Whether `sector` is one whose history is kept.
    pub fn watches(&self, sector: u64) -> bool {
        self.watched(sector, 1).next().is_some()
    }

    /// Whether `value` came to `sector` by a change issued since time `since`.
    pub fn changed_to(&self, sector: u64, value: Value, since: u64) -> bool {
        let changes = self.changes.get(&sector).into_iter().flatten();
        changes.rev().take_while(|(_, issued)| *issued >= since).any(|(changed, _)| *changed == value)
    }

    /// Whether `value` may be in `sector` after a power cut now.
    pub fn may_survive(&self, sector: u64, value: Value) -> bool {
        match self.sectors.get(&sector) {
            Some(history) => history.iter().any(|entry| entry.value == value),
            None => value == self.lineage.original(sector),
        }
    }

    /// What was found in `sector` after a cut is what it holds from now on.
    pub fn collapse(&mut self, sector: u64, value: Value) {
        if let Some(history) = self.sectors.get_mut(&sector) {
            *history = vec![Entry::original(value)];
        }
    }

    /// Every sector that was touched.
    pub fn touched(&self) -> impl Iterator<Item = u64> + '_ {
        self.sectors.keys().copied()
    }

    /// Why `value` in `sector` is wrong, for the failing test's message.
    pub fn explain(&self, sector: u64, value: Value) -> String {
        format!("sector {sector} holds {value}, its history is {:?}", self.sectors.get(&sector))
    }
}

impl Entry {
    fn original(value: Value) -> Self {
        Self { value, acknowledged: Some(0), supersedes: true }
    }
}

/// The bytes of `sector` as write `id` fills it.
pub fn stamp(sector: u64, id: Value, bytes: &mut [u8]) {
    if id == 0 {
        return bytes.fill(0);
    }
    let check = mix(sector ^ mix(id));
    for (index, words) in bytes.chunks_exact_mut(32).enumerate() {
        words[..8].copy_from_slice(&sector.to_le_bytes());
        words[8..16].copy_from_slice(&id.to_le_bytes());
        words[16..24].copy_from_slice(&check.to_le_bytes());
        words[24..].copy_from_slice(&(check ^ index as u64).to_le_bytes());
    }
}

/// Which write filled the bytes found in `sector`; an error says what they are instead.
pub fn decode(sector: u64, bytes: &[u8]) -> Result<Value, String> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(0);
    }
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let (found, id) = (word(0), word(8));
    let check = mix(found ^ mix(id));
    let intact = bytes.chunks_exact(32).enumerate().all(|(index, words)| {
        let word = |at: usize| u64::from_le_bytes(words[at..at + 8].try_into().expect("eight bytes"));
        word(0) == found && word(8) == id && word(16) == check && word(24) == check ^ index as u64
    });
    if !intact {
        return Err(format!("sector {sector} is torn or foreign: it starts with sector {found}, id {id}"));
    }
    if found != sector {
        return Err(format!("sector {sector} holds data of sector {found} (id {id}): teleported"));
    }
    Ok(id)
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    (value ^ (value >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53) ^ (value >> 29)
}
