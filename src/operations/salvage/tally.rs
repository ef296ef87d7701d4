//! What came back, in all and by partition.

use std::ops::Range;

use schemars::JsonSchema;
use serde::Serialize;

use super::remains::{Status, Totals};
use crate::operations::contents::{Contents, Partition};

/// As many as tables have room for by default; each costs time for every run.
pub const MOST_PARTITIONS: usize = 128;

/// What came back of a disk.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Tally {
    /// In all.
    #[serde(flatten)]
    pub totals: Totals,
    /// By partition, those that are places for others left out: the first `MOST_PARTITIONS`.
    pub partitions: Vec<PartitionTally>,
}

/// What came back of a partition.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct PartitionTally {
    /// The partition.
    #[serde(flatten)]
    pub partition: Partition,
    /// Of its bytes.
    #[serde(flatten)]
    pub totals: Totals,
}

impl Tally {
    /// Nothing yet, of a disk with these `contents`.
    pub(super) fn of(contents: &Contents) -> Self {
        let partitions = contents.partitions().iter().filter(|partition| !partition.is_extended());
        let partitions = partitions.take(MOST_PARTITIONS);
        let tally = |partition: &Partition| PartitionTally {
            partition: partition.clone(),
            totals: Totals::default(),
        };
        Self { totals: Totals::default(), partitions: partitions.map(tally).collect() }
    }

    /// Counts the bytes in `range`.
    pub(super) fn add(&mut self, range: &Range<u64>, status: Status) {
        self.totals.add(range.end - range.start, status);
        for PartitionTally { partition, totals } in &mut self.partitions {
            let both = range.start.max(partition.start)..range.end.min(partition.end());
            totals.add(both.end.saturating_sub(both.start), status);
        }
    }
}
