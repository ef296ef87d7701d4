//! What a device has done, put together from its queues, its engine and its syncs.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::disk::tally::{Histogram, Times};
use crate::engine::port_counts::{PortCounts, Requests, Shortage, Traffic};
use crate::engine::shared::Shared;
use crate::engine::{Counters, Levels};

/// What a device has done since its daemon began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Stats {
    /// What has gone through its queues.
    pub traffic: Traffic,
    /// What its engine has done.
    pub engine: Counters,
    /// What its engine has before it.
    pub levels: Levels,
    /// How long syncs of the image have taken, the engine's and the queues' own.
    pub syncs: Times,
}

/// Where the parts of a device count.
#[derive(Clone, Default)]
pub(super) struct Sources {
    /// One for each queue.
    pub(super) queues: Arc<[Arc<PortCounts>]>,
    /// The engine's syncs.
    pub(super) syncs: Arc<Histogram>,
}

impl Sources {
    /// Those of a device with so many `queues`, whose engine counts its syncs in `syncs`.
    pub(super) fn new(queues: u16, syncs: Arc<Histogram>) -> Self {
        Self { queues: (0..queues).map(|_| Arc::default()).collect(), syncs }
    }

    /// The requests that have come.
    pub(super) fn requests(&self) -> Requests {
        let of_each = self.queues.iter().map(|queue| queue.traffic(0).requests);
        of_each.fold(Requests::default(), |sum, requests| sum.plus(&requests))
    }

    /// The requests that wait for room, if any do.
    pub(super) fn shortage(&self) -> Option<Shortage> {
        self.queues.iter().filter_map(|queue| queue.shortage()).reduce(Shortage::plus)
    }

    /// What they have counted, on a device that serves `shared`.
    pub(super) fn stats(&self, shared: &Shared) -> Stats {
        let layers = shared.layers().count();
        let mut traffic = Traffic::default();
        self.queues.iter().for_each(|queue| traffic.add(&queue.traffic(layers)));
        let activity = shared.activity();
        let mut syncs = self.syncs.times();
        self.queues.iter().for_each(|queue| syncs.add(&queue.syncs()));
        Stats { traffic, engine: activity.counters(), levels: activity.levels(), syncs }
    }
}
