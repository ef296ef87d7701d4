//! What an engine has done and what it has before it, for others to read.
//!
//! Nothing depends on it. The engine's thread is the only one that writes a number, but for the blocks that
//! fronts give space.

use std::sync::atomic::{AtomicU64, Ordering};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Engine;
use crate::disk::Disk;
use crate::disk::tally::Tally;

/// Counters of what the engine has done, for `stats`, tests, benchmarks and the closing log line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(bound = "T: JsonSchema + Serialize + Default")]
pub struct Counters<T = u64> {
    /// Syncs of the image file.
    pub syncs: T,
    /// Commit cycles that logged something.
    pub commits: T,
    /// Rounds of these cycles.
    pub rounds: T,
    /// Logs begun: the session's first, and each time it started again.
    pub logs: T,
    /// Log entries written.
    pub entries: T,
    /// Pages of the BAT and of sector bitmaps logged.
    pub pages: T,
    /// Blocks granted space.
    pub grants: T,
    /// Grants of recycled space, which had to be zeroed.
    pub recycled_grants: T,
    /// Grants that were filled with the parents' content.
    pub fills: T,
    /// Sector bitmaps begun.
    pub bitmaps: T,
    /// Blocks of which all sectors have come to be there.
    pub promotions: T,
    /// Extensions of the file.
    pub grows: T,
    /// Blocks that lost their space.
    pub unmapped: T,
    /// Blocks and sector bitmaps that have got another place.
    pub moves: T,
    /// Extents that came out of quarantine.
    pub released: T,
    /// Barriers sent.
    pub barriers: T,
}

impl<T> Counters<T> {
    /// `join` of each counter and its twin.
    fn zip<U, V>(&self, other: &Counters<U>, join: impl Fn(&T, &U) -> V) -> Counters<V> {
        Counters {
            syncs: join(&self.syncs, &other.syncs),
            commits: join(&self.commits, &other.commits),
            rounds: join(&self.rounds, &other.rounds),
            logs: join(&self.logs, &other.logs),
            entries: join(&self.entries, &other.entries),
            pages: join(&self.pages, &other.pages),
            grants: join(&self.grants, &other.grants),
            recycled_grants: join(&self.recycled_grants, &other.recycled_grants),
            fills: join(&self.fills, &other.fills),
            bitmaps: join(&self.bitmaps, &other.bitmaps),
            promotions: join(&self.promotions, &other.promotions),
            grows: join(&self.grows, &other.grows),
            unmapped: join(&self.unmapped, &other.unmapped),
            moves: join(&self.moves, &other.moves),
            released: join(&self.released, &other.released),
            barriers: join(&self.barriers, &other.barriers),
        }
    }
}

/// What the engine has before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(bound = "T: JsonSchema + Serialize + Default")]
pub struct Levels<T = u64> {
    /// The log's length, bytes.
    pub log_bytes: T,
    /// How far it is filled, bytes; when it is full, it starts again.
    pub log_used_bytes: T,
    /// Pages that have changed and are not in the log.
    pub dirty_pages: T,
    /// Unmapped space that may not be used yet, bytes.
    pub quarantined_bytes: T,
}

/// See the module's head.
#[derive(Debug, Default)]
pub struct Activity {
    counters: Counters<Tally>,
    levels: Levels<Tally>,
    /// Blocks that fronts have given space.
    claims: AtomicU64,
}

impl Activity {
    /// What has been done so far.
    pub fn counters(&self) -> Counters {
        let mut counters = self.counters.zip(&self.counters, |count, _| count.get());
        counters.grants += self.claims();
        counters
    }

    /// How many blocks fronts have given space.
    pub fn claims(&self) -> u64 {
        self.claims.load(Ordering::Relaxed)
    }

    /// A front has given a block space.
    pub(super) fn claimed(&self) {
        self.claims.fetch_add(1, Ordering::Relaxed);
    }

    /// What is to be done.
    pub fn levels(&self) -> Levels {
        let Levels { log_bytes, log_used_bytes, dirty_pages, quarantined_bytes } = &self.levels;
        Levels {
            log_bytes: log_bytes.get(),
            log_used_bytes: log_used_bytes.get(),
            dirty_pages: dirty_pages.get(),
            quarantined_bytes: quarantined_bytes.get(),
        }
    }

    /// Counts on from `before`: this engine does the work of that one, after a snapshot.
    pub fn continue_from(&self, before: &Self) {
        self.counters.zip(&before.counters(), |count, before| count.add(*before));
    }
}

impl<D: Disk + 'static> Engine<D> {
    /// Notes something that was done.
    pub(super) fn count(&self, change: impl FnOnce(&Counters<Tally>)) {
        change(&self.shared.activity().counters);
    }

    /// Notes what is to be done now.
    pub(super) fn note_levels(&self) {
        let levels = &self.shared.activity().levels;
        levels.log_bytes.set(self.layout.log.length);
        levels.log_used_bytes.set(self.journal.used_bytes());
        levels.dirty_pages.set(self.dirty.count() as u64);
        levels.quarantined_bytes.set(self.reclaim.quarantined_bytes());
    }
}
