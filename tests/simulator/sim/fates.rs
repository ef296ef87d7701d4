//! What the sectors of a disk may hold: now, and after a power cut.

use std::collections::BTreeMap;

use super::violation::violated;

/// What was written into one sector, oldest first. The first of them is durable.
struct Fate(Vec<Written>);

struct Written {
    value: u64,
    /// When it was acknowledged.
    acknowledged: Option<u64>,
}

/// See the module's head.
pub struct Fates {
    sectors: BTreeMap<u64, Fate>,
    clock: u64,
    values: u64,
}

impl Fates {
    /// Those of a disk that durably holds this.
    pub fn of(disk: BTreeMap<u64, u64>) -> Self {
        let sectors = disk.into_iter().map(|(sector, value)| (sector, Fate::durable(value))).collect();
        Self { sectors, clock: 0, values: 0 }
    }

    /// The sectors that are known.
    pub fn sectors(&self) -> Vec<u64> {
        self.sectors.keys().copied().collect()
    }

    pub fn now(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A value that no sector has held; the number of a sector fits into it.
    pub fn new_value(&mut self) -> u64 {
        self.values += 1;
        1 << 63 | self.values << 24
    }

    pub fn issue(&mut self, sector: u64, value: u64) {
        let Some(fate) = self.sectors.get_mut(&sector) else { return };
        fate.0.push(Written { value, acknowledged: None });
    }

    pub fn acknowledge(&mut self, sector: u64, value: u64) {
        let now = self.now();
        let Some(fate) = self.sectors.get_mut(&sector) else { return };
        let last = fate.0.last_mut().filter(|last| last.value == value);
        last.expect("one write at a time").acknowledged = Some(now);
    }

    /// A flush that was issued at `issued` has succeeded.
    pub fn flushed(&mut self, issued: u64) {
        for fate in self.sectors.values_mut() {
            let kept = |written: &Written| written.acknowledged.is_some_and(|at| at <= issued);
            let first = fate.0.iter().rposition(kept).unwrap_or(0);
            fate.0.drain(..first);
        }
    }

    /// The last write is durable.
    pub fn settle(&mut self, sector: u64) {
        let Some(fate) = self.sectors.get_mut(&sector) else { return };
        fate.0.drain(..fate.0.len() - 1);
    }

    /// After a power cut the sector holds `value`.
    pub fn collapse(&mut self, sector: u64, value: u64) {
        self.sectors.insert(sector, Fate::durable(value));
    }

    /// Ends the run unless `value` is what the sector must hold.
    pub fn require_now(&self, sector: u64, value: u64, what: &str) {
        let Some(fate) = self.sectors.get(&sector) else { return };
        let last = fate.0.last().expect("it holds something").value;
        if value != last {
            violated(format!("{what} found {value:#x} in sector {sector}, not {last:#x}"));
        }
    }

    /// Ends the run unless a power cut may leave `value`.
    pub fn require_after_cut(&self, sector: u64, value: u64) {
        let Some(fate) = self.sectors.get(&sector) else { return };
        if !fate.0.iter().any(|written| written.value == value) {
            let may: Vec<String> = fate.0.iter().map(|written| format!("{:#x}", written.value)).collect();
            violated(format!("a power cut left {value:#x} in sector {sector}, not one of {may:?}"));
        }
    }
}

impl Fate {
    fn durable(value: u64) -> Self {
        Self(vec![Written { value, acknowledged: Some(0) }])
    }
}
