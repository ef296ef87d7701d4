//! Promises defended here: every request is completed exactly once, whatever fails beneath it; what must not
//! fail poisons the device when it does, and nothing else does; what was acknowledged as flushed before a
//! failure is there after it.

#[allow(dead_code, reason = "the simulator serves several tests, none of which needs all of it")]
mod sim;

use std::ops::RangeInclusive;

use fastrand::Rng;
use sim::disk::{Effect, Fault, Injection, Owner, Profile};
use sim::lineage::descent;
use sim::world::{Activation, Beginning, Config, World, check_recovery, new_image};
use vhdx_ublk::engine::front::Op;
use vhdx_ublk::engine::shared::Session;

/// Operations of a workload that are hit, one after the other.
const OPERATIONS: u64 = 200;

/// How often a front repeats one piece after `EAGAIN` or `EINTR`.
const RETRIES: u32 = 16;

/// What a fault may do to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Harm {
    /// The guest does not notice.
    None,
    /// One request fails.
    OneRequest,
    /// One request fails, or none where there is another way.
    AtMostOne,
    /// Every later write and flush fails.
    Poison,
}

fn anything(_: Owner, _: &Effect) -> bool {
    true
}

fn front(owner: Owner, _: &Effect) -> bool {
    matches!(owner, Owner::Front(..))
}

fn long_transfer(owner: Owner, effect: &Effect) -> bool {
    let length = match effect {
        Effect::Read { length, .. } | Effect::Given { length, .. } => *length,
        Effect::Write { bytes, .. } => bytes.len(),
        _ => 0,
    };
    front(owner, effect) && length > 8192
}

fn sync(_: Owner, effect: &Effect) -> bool {
    matches!(effect, Effect::Sync)
}

fn space(_: Owner, effect: &Effect) -> bool {
    matches!(effect, Effect::Resize(_) | Effect::Nothing)
}

/// Where the metadata of the images ends, bytes: header section, log, metadata region and BAT have 1 MiB each.
const METADATA_END: u64 = 4 << 20;

/// What the failure of an operation must do, by the rule: syncs, durable writes and metadata writes poison.
fn harm(beginning: Beginning, owner: Owner, effect: &Effect) -> Harm {
    // Only a child that begins so has blocks filled from its parents, and no sector bitmap written.
    let fills = beginning == Beginning::LeftOver;
    match (owner, effect) {
        // A block that is filled: nothing names it yet.
        (Owner::Engine, Effect::Write { offset, .. }) if fills && *offset >= METADATA_END => Harm::OneRequest,
        (_, Effect::Sync | Effect::Write { durable: true, .. }) | (Owner::Engine, Effect::Write { .. }) => {
            Harm::Poison
        }
        (Owner::Front(..), Effect::Read { .. } | Effect::Given { .. } | Effect::Write { .. }) => {
            Harm::OneRequest
        }
        _ => Harm::AtMostOne,
    }
}

/// A workload with one fault in it.
struct Run {
    world: World,
    rng: Rng,
}

impl Run {
    fn new(config: &Config, seed: u64, fault: Fault, hits: fn(Owner, &Effect) -> bool, after: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let content = new_image(config, &mut rng);
        let mut world = World::open(config.clone(), content, config.oracle(), rng.fork());
        world.disk().inject(Injection { fault, hits, after, seed: seed ^ after });
        world.drain();
        Self { world, rng }
    }

    /// `false` if the workload ended before the fault's turn came.
    fn check(self, expected: Option<Harm>) -> bool {
        let Some((owner, effect)) = self.world.disk().struck() else {
            assert!(self.world.failures.is_empty());
            return false;
        };
        let expected = expected.unwrap_or_else(|| harm(self.world.config.beginning, owner, &effect));
        match expected {
            Harm::Poison => self.check_poisoned(),
            Harm::OneRequest => self.check_alive(1..=1),
            Harm::AtMostOne => self.check_alive(0..=1),
            Harm::None => self.check_alive(0..=0),
        }
        true
    }

    /// One request of the test's own; its `errno`, or 0.
    fn try_one(&mut self, op: Op, length: u64) -> i32 {
        let before = self.world.failures.len();
        self.world.request(op, 0, length);
        self.world.drain();
        self.world.failures.get(before).map_or(0, |(_, errno)| *errno)
    }

    fn check_alive(mut self, failures: RangeInclusive<usize>) {
        let found = &self.world.failures;
        assert!(failures.contains(&found.len()), "{:?} failed after {:?}", found, self.world.disk().struck());
        assert_ne!(self.world.session(), Session::Poisoned, "after {:?}", self.world.disk().struck());
        assert_eq!(self.try_one(Op::Write { durable: true }, 4096), 0, "writes go on");
        assert_eq!(self.try_one(Op::Flush, 0), 0, "flushes go on");
        self.check_cuts();
        let content = self.world.close();
        let closed = check_recovery(
            &self.world.config,
            &content,
            &mut self.world.oracle,
            &mut self.rng,
            &mut Activation::default(),
        );
        closed.unwrap_or_else(|why| panic!("after a clean close: {why}"));
    }

    fn check_poisoned(mut self) {
        let struck = self.world.disk().struck();
        assert_eq!(self.world.session(), Session::Poisoned, "after {struck:?}");
        assert_eq!(self.try_one(Op::Write { durable: false }, 4096), libc::EIO);
        assert_eq!(self.try_one(Op::Write { durable: true }, 4096), libc::EIO);
        assert_eq!(self.try_one(Op::Flush, 0), libc::EIO);
        assert_eq!(self.try_one(Op::WriteZeroes { keep_space: false }, 1 << 20), libc::EIO);
        assert_eq!(self.try_one(Op::Read, 4096), 0, "reads go on");
        self.check_cuts();
        assert_eq!(self.world.try_close(), Err(libc::EIO), "a poisoned image is never closed clean");
        self.check_cuts();
    }

    /// The power fails now: what was flushed is there.
    fn check_cuts(&mut self) {
        for _ in 0..2 {
            let profile = Profile::ALL[self.rng.usize(..Profile::ALL.len())];
            let content = self.world.disk().cut(profile, &mut self.rng);
            let (config, mut oracle) = (&self.world.config, self.world.oracle.clone());
            let recovered =
                check_recovery(config, &content, &mut oracle, &mut self.rng, &mut Activation::default());
            let struck = self.world.disk().struck();
            recovered.unwrap_or_else(|why| panic!("{profile:?} after {struck:?} failed: {why}"));
        }
    }
}

fn configs() -> [Config; 4] {
    let small = Config { requests: 220, ..Config::small() };
    let mut child = small.clone();
    child.image.parent = Some(descent());
    let mut other = Config { can_punch: false, ..small.clone() };
    other.image.logical_sector_size = 4096;
    let filled = Config { beginning: Beginning::LeftOver, ..child.clone() };
    [small, other, child, filled]
}

/// Hits the first `count` operations that can be hit, in turn; returns how many workloads had so many.
fn hit_each(count: u64, fault: Fault, hits: fn(Owner, &Effect) -> bool, expected: Option<Harm>) -> u64 {
    let mut struck = 0;
    for config in configs() {
        for index in 0..count {
            let seed = index % 7;
            let run =
                std::panic::catch_unwind(|| Run::new(&config, seed, fault, hits, index).check(expected));
            let hit = run.unwrap_or_else(|panic| {
                eprintln!("{fault:?} at operation {index} of seed {seed}, punching: {}", config.can_punch);
                std::panic::resume_unwind(panic)
            });
            struck += u64::from(hit);
        }
    }
    println!("{fault:?}: {struck} workloads hit");
    struck
}

#[test]
fn an_io_error_anywhere_fails_one_request_or_poisons() {
    let struck = hit_each(OPERATIONS, Fault::Error { errno: libc::EIO, times: 1 }, anything, None);
    assert_eq!(struck, 4 * OPERATIONS, "the workload has too few operations");
}

#[test]
fn no_space_anywhere_fails_one_request_or_poisons() {
    let struck = hit_each(OPERATIONS, Fault::Error { errno: libc::ENOSPC, times: 1 }, anything, None);
    assert_eq!(struck, 4 * OPERATIONS, "the workload has too few operations");
}

#[test]
fn no_space_for_a_longer_file_fails_that_write_and_nothing_else() {
    let struck = hit_each(10, Fault::Error { errno: libc::ENOSPC, times: 1 }, space, Some(Harm::AtMostOne));
    assert!(struck >= 6, "the workload hardly grows: {struck}");
}

#[test]
fn a_failed_sync_poisons_and_is_never_repeated() {
    let struck = hit_each(40, Fault::Error { errno: libc::EIO, times: 1 }, sync, Some(Harm::Poison));
    assert!(struck >= 30, "the workload hardly syncs: {struck}");
}

#[test]
fn short_transfers_go_on_unnoticed() {
    let struck = hit_each(40, Fault::Short, long_transfer, Some(Harm::None));
    assert!(struck >= 50, "the workload has too few long transfers: {struck}");
}

#[test]
fn interruptions_are_repeated_unnoticed() {
    for errno in [libc::EAGAIN, libc::EINTR] {
        for times in [1, RETRIES] {
            let struck = hit_each(OPERATIONS / 2, Fault::Error { errno, times }, front, Some(Harm::None));
            assert!(struck >= 100, "the fronts have too few operations: {struck}");
        }
    }
}

#[test]
fn interruptions_without_end_fail_like_any_error() {
    let struck =
        hit_each(OPERATIONS / 2, Fault::Error { errno: libc::EAGAIN, times: RETRIES + 1 }, front, None);
    assert!(struck >= 100, "the fronts have too few operations: {struck}");
}
