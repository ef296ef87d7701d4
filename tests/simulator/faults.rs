//! Promises defended here, as the contract makes them: every request ends once, whatever fails beneath it; a
//! failed sync ends all writing, and so does a durable write or one of metadata that fails for anything but
//! want of room or memory; nothing else does; no space on the host fails that write and nothing else, and
//! when there is room again everything works; what was acknowledged as flushed before a failure is there
//! after it.

use std::ops::RangeInclusive;

use fastrand::Rng;
use nix::errno::Errno;
use vhdx_ublk::engine::front::Op;
use vhdx_ublk::engine::shared::Session;

use crate::sim::disk::{Effect, Fault, Injection, Owner, Profile};
use crate::sim::lineage::descent;
use crate::sim::room::Room;
use crate::sim::short_logs::ShortLogs;
use crate::sim::violation::violated;
use crate::sim::world::{Activation, Beginning, Config, Faults, HostKind, World, check_recovery, new_image};

/// Operations of a workload that are hit, one after the other.
const OPERATIONS: u64 = 200;

/// Bytes of a log that a few rounds fill.
const SHORT_LOG: u32 = 64 << 10;

/// Weights of requests, see [`Config::ALL_KINDS`].
const OFTEN_FLUSHED: [u32; 6] = [50, 10, 10, 40, 12, 12];

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
    /// Requests fail that wait for it, and no later one.
    ThoseWaiting,
    /// Every later write and flush fails.
    Poison,
}

/// What a host without room or memory says, or one that has not begun an operation.
const REFUSALS: [i32; 4] = [libc::ENOSPC, libc::EDQUOT, libc::ENOMEM, libc::ECANCELED];

fn anything(_: Owner, _: &Effect) -> bool {
    true
}

/// What a front repeats: anything but a sync.
fn front(owner: Owner, effect: &Effect) -> bool {
    matches!(owner, Owner::Front(..)) && !matches!(effect, Effect::Sync)
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
    matches!(effect, Effect::Resize(_) | Effect::Reserve { .. })
}

/// Where the metadata of the images ends, bytes: header section, log, metadata region and BAT have 1 MiB
/// each.
const METADATA_END: u64 = 4 << 20;

/// Where their BAT begins.
const BAT: u64 = METADATA_END - (1 << 20);

/// A page that goes in its place.
fn in_place(owner: Owner, effect: &Effect) -> bool {
    owner == Owner::Engine
        && matches!(effect, Effect::Write { offset, .. } if (BAT..METADATA_END).contains(offset))
}

/// What an operation that fails with `errno` may do.
fn harm(beginning: Beginning, owner: Owner, effect: &Effect, errno: i32) -> Harm {
    // Only a child that begins so has blocks filled from its parents, and no sector bitmap written.
    let fills = beginning == Beginning::LeftOver;
    let payload = |offset: u64| fills && offset >= METADATA_END;
    match (owner, effect) {
        (Owner::Engine, Effect::Write { .. }) if REFUSALS.contains(&errno) => Harm::ThoseWaiting,
        // A block that is filled: nothing names it yet.
        (Owner::Engine, Effect::Write { offset, .. }) if payload(*offset) => Harm::OneRequest,
        // The kernel has no thread for it, and has not begun it.
        (Owner::Front(..), Effect::Sync) if errno == libc::ECANCELED => Harm::None,
        (_, Effect::Sync) | (Owner::Engine, Effect::Write { .. }) => Harm::Poison,
        (Owner::Front(..), Effect::Write { durable: true, .. }) if !REFUSALS.contains(&errno) => Harm::Poison,
        (Owner::Front(..), Effect::Read { .. } | Effect::Given { .. } | Effect::Write { .. })
            if errno == libc::EIO =>
        {
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
    fn check(self, fault: Fault, expected: Option<Harm>) -> bool {
        let Some((owner, effect)) = self.world.disk().struck() else {
            assert!(self.world.failures.is_empty());
            return false;
        };
        let errno = match fault {
            Fault::Error { errno, .. } => errno,
            Fault::Short => 0,
        };
        let expected = expected.unwrap_or_else(|| harm(self.world.config.beginning, owner, &effect, errno));
        let in_flight = self.world.config.fronts * usize::from(self.world.config.depth);
        match expected {
            Harm::Poison => self.check_poisoned(),
            Harm::OneRequest => self.check_alive(1..=1),
            Harm::AtMostOne => self.check_alive(0..=1),
            Harm::ThoseWaiting => self.check_alive(0..=in_flight),
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
        assert_eq!(self.world.try_close(), Err(Errno::EIO), "a poisoned image is never closed clean");
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

/// Hits the first `count` operations that can be hit with `fault`, as [`hit_in_turn`] does.
fn hit_each(count: u64, fault: Fault, hits: fn(Owner, &Effect) -> bool, expected: Option<Harm>) -> u64 {
    hit_in_turn(count, &[fault], hits, expected)
}

/// Hits the first `count` operations that can be hit, each with the next of `faults`; returns how many
/// workloads had so many.
fn hit_in_turn(
    count: u64,
    faults: &[Fault],
    hits: fn(Owner, &Effect) -> bool,
    expected: Option<Harm>,
) -> u64 {
    hit_in(&configs(), count, faults, hits, expected)
}

fn hit_in(
    configs: &[Config],
    count: u64,
    faults: &[Fault],
    hits: fn(Owner, &Effect) -> bool,
    expected: Option<Harm>,
) -> u64 {
    let mut struck = 0;
    for config in configs {
        for (index, &fault) in (0..count).zip(faults.iter().cycle()) {
            let seed = index % 7;
            let run = std::panic::catch_unwind(|| {
                Run::new(config, seed, fault, hits, index).check(fault, expected)
            });
            let hit = run.unwrap_or_else(|panic| {
                eprintln!("{fault:?} at operation {index} of seed {seed}, punching: {}", config.can_punch);
                std::panic::resume_unwind(panic)
            });
            struck += u64::from(hit);
        }
    }
    println!("{faults:?}: {struck} workloads hit");
    struck
}

#[test]
fn an_io_error_anywhere_fails_one_request_or_poisons() {
    let struck = hit_each(OPERATIONS, Fault::Error { errno: libc::EIO, times: 1 }, anything, None);
    assert_eq!(struck, 4 * OPERATIONS, "the workload has too few operations");
}

/// At any operation: a log entry, a page in its place, a header, a reservation, a durable write.
#[test]
fn a_refusal_anywhere_fails_who_waits_for_it_and_nothing_else() {
    for errno in REFUSALS {
        let operations = if errno == libc::ENOSPC { OPERATIONS } else { OPERATIONS / 4 };
        let struck = hit_each(operations, Fault::Error { errno, times: 1 }, anything, None);
        assert_eq!(struck, 4 * operations, "the workload has too few operations");
    }
}

#[test]
fn no_space_for_a_longer_file_fails_that_write_and_nothing_else() {
    let struck = hit_each(10, Fault::Error { errno: libc::ENOSPC, times: 1 }, space, Some(Harm::AtMostOne));
    assert!(struck >= 6, "the workload hardly grows: {struck}");
}

/// In a log that is soon full, pages go in their places while requests come.
#[test]
fn a_page_that_cannot_go_in_its_place_poisons_but_for_want_of_room() {
    let _short = ShortLogs::new(None);
    let mut configs = configs();
    for config in &mut configs {
        config.image.log_length = SHORT_LOG;
        (config.weights, config.requests) = (OFTEN_FLUSHED, 400);
    }
    let mut struck = 0;
    for errno in [libc::EIO, libc::ENOSPC, libc::EDQUOT] {
        let fault = Fault::Error { errno, times: 1 };
        struck += hit_in(&configs, 10, &[fault], in_place, None);
    }
    assert!(struck >= 100, "hardly a page goes in its place: {struck}");
}

/// Whatever it fails with: what it did not make durable may be gone.
#[test]
fn a_failed_sync_poisons_and_is_never_repeated() {
    for errno in [libc::EIO, libc::ENOSPC, libc::ENOMEM, libc::EINTR] {
        let struck = hit_each(20, Fault::Error { errno, times: 1 }, sync, Some(Harm::Poison));
        assert!(struck >= 20, "the workload hardly syncs: {struck}");
    }
}

/// A limit of processes on the host, say: what the kernel has not begun has lost nothing.
#[test]
fn a_front_s_sync_that_was_not_begun_is_the_engine_s() {
    for seed in 0..20 {
        let mut rng = Rng::with_seed(seed);
        let mut world = world_with_overwrite(&mut rng);
        let fault = Fault::Error { errno: libc::ECANCELED, times: 1 };
        let hits = |owner: Owner, effect: &Effect| matches!(owner, Owner::Front(..)) && sync(owner, effect);
        world.disk().inject(Injection { fault, hits, after: 0, seed });
        world.request(Op::Flush, 0, 0);
        world.drain();
        assert!(world.disk().struck().is_some(), "there is nothing to log");
        Run { world, rng }.check_alive(0..=0);
    }
}

#[test]
fn short_transfers_go_on_unnoticed() {
    let struck = hit_each(40, Fault::Short, long_transfer, Some(Harm::None));
    assert!(struck >= 50, "the workload has too few long transfers: {struck}");
}

#[test]
fn interruptions_are_repeated_unnoticed() {
    for times in [1, RETRIES] {
        let faults = [libc::EAGAIN, libc::EINTR, libc::ENOMEM, libc::ECANCELED]
            .map(|errno| Fault::Error { errno, times });
        let struck = hit_in_turn(OPERATIONS / 2, &faults, front, Some(Harm::None));
        assert!(struck >= 100, "the fronts have too few operations: {struck}");
    }
}

/// A disk that grows while it is served: the fault hits the operation `index` of that. `false` if there are
/// not so many.
fn grow_struck(config: &Config, errno: i32, index: u64) -> bool {
    let mut rng = Rng::with_seed(index % 5);
    let content = new_image(config, &mut rng);
    let mut world = World::open(config.clone(), content, config.oracle(), rng.fork());
    world.drain();
    let (from, to) = (config.image.virtual_size, config.sizes[0]);
    let injection =
        Injection { fault: Fault::Error { errno, times: 1 }, hits: anything, after: index, seed: index };
    let (decided, grown) = world.grow_struck(to, injection);
    let struck = world.disk().struck();
    let Some((_, effect)) = &struck else {
        assert!(decided && grown, "nothing has failed");
        return false;
    };
    let what = format!("operation {index}, {effect:?}, errno {errno}");
    let size = world.size_in_file();
    let is_poisoned = world.session() == Session::Poisoned;
    match (decided, grown) {
        (_, true) => assert!(!is_poisoned && size == to, "{what}"),
        (true, false) => assert!(is_poisoned && (size == from || size == to), "{what}: {size} bytes"),
        (false, false) => {
            assert_eq!(size, from, "{what}: nothing has changed");
            let may_poison = matches!(effect, Effect::Sync | Effect::Write { .. });
            assert!(!is_poisoned || may_poison, "{what} poisons");
        }
    }
    let run = Run { world, rng };
    if is_poisoned {
        run.check_poisoned();
    } else {
        run.check_alive(0..=0);
    }
    true
}

#[test]
fn a_fault_in_a_growth_changes_nothing_or_poisons_and_loses_nothing() {
    let sizes = vec![(9 << 20) + 4096];
    let [small, _, child, _] = configs();
    let mut fixed = small.clone();
    fixed.image.fixed = true;
    for config in [small, child, fixed] {
        let config = Config { sizes: sizes.clone(), requests: 40, ..config };
        for errno in [libc::EIO, libc::ENOSPC] {
            let count = (0..10_000).take_while(|index| grow_struck(&config, errno, *index)).count();
            println!("{count} operations of a growth were hit with errno {errno}");
            assert!(count >= 50, "a growth has only {count} operations");
        }
    }
}

/// What lies behind the last block that is used was a block's once. A host that does not shorten the file by
/// it leaves it there, and a block that gets the space then must not show it.
#[test]
fn a_file_that_keeps_its_end_shows_nothing_of_it() {
    let mut kept = 0;
    for seed in 0..8 {
        let config = Config { can_punch: false, requests: 0, ..Config::small() };
        let content = new_image(&config, &mut Rng::with_seed(seed));
        let mut world = World::open(config.clone(), content, config.oracle(), Rng::with_seed(seed));
        let ask = |world: &mut World, op, block: u64, length| {
            world.request(op, block << 20, length);
            world.drain();
        };
        for block in 0..3 {
            ask(&mut world, Op::Write { durable: false }, block, 1 << 20);
        }
        ask(&mut world, Op::Flush, 0, 0);
        for block in [1, 2] {
            ask(&mut world, Op::Discard, block, 1 << 20);
        }
        ask(&mut world, Op::Flush, 0, 0);
        let length = world.disk().content().length;
        world.keep_size(9 << 20);
        kept += u64::from(world.disk().content().length == length);
        for block in [3, 4] {
            ask(&mut world, Op::Write { durable: false }, block, 4096);
            ask(&mut world, Op::Read, block, 1 << 20);
        }
    }
    assert!(kept > 0, "every file was shortened");
}

/// A durable write that is never begun is tried as an ordinary one, and succeeds or fails as that.
#[test]
fn interruptions_without_end_fail_that_request_and_nothing_else() {
    let faults = [libc::EAGAIN, libc::ENOMEM].map(|errno| Fault::Error { errno, times: RETRIES + 1 });
    let struck = hit_in_turn(OPERATIONS / 2, &faults, front, Some(Harm::AtMostOne));
    assert!(struck >= 100, "the fronts have too few operations: {struck}");
}

/// Hosts whose room the test takes away and gives back.
fn sparse_and_copying(config: &Config) -> [Config; 2] {
    [HostKind::Sparse, HostKind::Copying].map(|host| {
        let mut config = config.clone();
        // The test does it; chance, as good as never.
        (config.faults.full, config.faults.host) = (u32::MAX, host);
        config
    })
}

/// The host is full for a while, with holes where data and metadata go: in that time writes fail, and on a
/// host that copies on write flushes, too. Nothing is poisoned, and once there is room all of it works, also
/// what was refused.
#[test]
fn a_full_host_fails_writes_while_it_is_full_and_harms_nothing() {
    let (mut refusals, mut worked) = (0, 0);
    for config in configs().iter().flat_map(sparse_and_copying) {
        for (seed, before) in (0..12).flat_map(|seed| [0, 5, 60].map(|before| (seed, before))) {
            let mut rng = Rng::with_seed(seed);
            let content = new_image(&config, &mut rng);
            let some = Config { requests: before, ..config.clone() };
            let mut world = World::open(some, content, config.oracle(), rng.fork());
            world.drain();
            world.disk().set_full(true);
            world.config.requests = 160;
            world.drain();
            worked += usize::from(world.failures.len() < 100);
            assert!(world.failures.iter().all(|(_, errno)| *errno == libc::ENOSPC), "{:?}", world.failures);
            assert_ne!(world.session(), Session::Poisoned, "seed {seed}, {before} before, {config:?}");
            refusals += world.disk().room(Room::refusals);
            world.disk().set_full(false);
            let mut run = Run { world, rng };
            for op in [Op::Write { durable: true }, Op::Write { durable: false }] {
                assert_eq!(run.try_one(op, 1 << 20), 0, "{op:?} of a block when there is room");
            }
            assert_eq!(run.try_one(Op::Flush, 0), 0, "a flush when there is room");
            run.check_cuts();
            run.world.close();
        }
    }
    println!("{refusals} operations refused");
    assert!(refusals > 5000, "hardly anything needed room: {refusals}");
    assert!(worked > 0, "nothing works on a full host");
}

/// Where requests wait for room, those do that a host without room refuses. A file that gets no longer, by
/// the format or a limit of the host, never will, and what needs that fails.
#[test]
fn what_may_find_room_later_waits_and_nothing_else() {
    let longer = |_: Owner, effect: &Effect| matches!(effect, Effect::Resize(_));
    for (errno, waiting) in [(libc::ENOSPC, 1), (libc::EDQUOT, 1), (libc::EFBIG, 0), (libc::EIO, 0)] {
        let config =
            Config { requests: 0, faults: Faults { waits: true, ..Faults::NONE }, ..Config::small() };
        let mut rng = Rng::with_seed(1);
        let content = new_image(&config, &mut rng);
        let mut world = World::open(config.clone(), content, config.oracle(), rng.fork());
        let fault = Fault::Error { errno, times: u32::MAX };
        world.disk().inject(Injection { fault, hits: longer, after: 0, seed: 1 });
        world.request(Op::Write { durable: false }, 0, 4096);
        for _ in 0..1000 {
            world.step();
        }
        let says = if errno == libc::EIO { libc::EIO } else { libc::ENOSPC };
        let failures = vec![(Op::Write { durable: false }, says); 1 - waiting];
        assert_eq!((world.short_of_room(), &world.failures), (waiting, &failures), "errno {errno}");
        assert_ne!(world.session(), Session::Poisoned);
        world.end_waits();
        // One that is being tried again at that moment fails when it has found no room.
        world.drain();
        assert_eq!(world.failures, [(Op::Write { durable: false }, says)], "errno {errno}");
        world.close();
    }
}

/// Of thousands that wait, one that ends has all others follow, on the small stack of a thread.
#[test]
fn what_waits_for_room_fails_once_writing_fails_for_good() {
    let thread = std::thread::Builder::new().stack_size(512 << 10).spawn(fail_what_waits);
    thread.expect("memory").join().expect("it does not panic");
}

fn fail_what_waits() {
    const WRITES: u64 = 1999;
    let faults = Faults { waits: true, full: u32::MAX, ..Faults::NONE };
    let config = Config { requests: 0, fronts: 1, depth: 2000, faults, ..Config::small() };
    let mut rng = Rng::with_seed(1);
    let content = new_image(&config, &mut rng);
    let mut world = World::open(config.clone(), content, config.oracle(), rng.fork());
    world.request(Op::Write { durable: false }, 0, 4096);
    world.drain();
    world.disk().set_full(true);
    (0..WRITES).for_each(|n| world.request(Op::Write { durable: false }, (1 << 20) + n * 512, 512));
    while world.short_of_room() < usize::try_from(WRITES).expect("few") {
        assert!(world.step());
    }
    assert!(world.failures.is_empty());
    world.lose(libc::EIO);
    world.request(Op::Flush, 0, 0);
    world.drain();
    assert_eq!((world.session(), world.short_of_room()), (Session::Poisoned, 0));
    assert!(world.failures.iter().all(|(_, errno)| *errno == libc::EIO), "{:?}", world.failures);
    assert_eq!(world.failures.len() as u64, WRITES + 1);
}

/// A block that is there, durably, and was overwritten since.
fn world_with_overwrite(rng: &mut Rng) -> World {
    let config = Config { requests: 0, ..Config::small() };
    let content = new_image(&config, rng);
    let mut world = World::open(config.clone(), content, config.oracle(), rng.fork());
    for (op, offset, length) in
        [(Op::Write { durable: false }, 0, 4096), (Op::Flush, 0, 0), (Op::Write { durable: false }, 0, 4096)]
    {
        world.request(op, offset, length);
        world.drain();
    }
    world
}

/// The same, with a durable write under way.
fn world_with_unflushed_write(rng: &mut Rng) -> World {
    let mut world = world_with_overwrite(rng);
    world.request(Op::Write { durable: true }, 64 << 10, 4096);
    while world.disk().operations() == 0 {
        assert!(world.step());
    }
    world
}

/// The failure is posted to a front whose thread does not run; meanwhile a flush comes through another queue.
fn flush_beside_unseen_failure(fail: impl Fn(&mut World), seed: u64) {
    let mut rng = Rng::with_seed(seed);
    let mut world = world_with_unflushed_write(&mut rng);
    fail(&mut world);
    world.request(Op::Flush, 0, 0);
    while world.step() {}
    world.posted.held = false;
    world.drain();
    assert_eq!(world.session(), Session::Poisoned);
    assert!(world.failures.contains(&(Op::Flush, libc::EIO)), "the flush succeeded: {:?}", world.failures);
    Run { world, rng }.check_cuts();
}

/// Linux reports a lost write once per open file description, and a durable write may be the one that gets
/// the error.
#[test]
fn no_flush_succeeds_after_another_was_told_of_lost_data() {
    for (seed, errno) in (0..20).flat_map(|seed| [libc::EIO, libc::ENOSPC].map(|errno| (seed, errno))) {
        let lose = |world: &mut World| {
            world.lose(errno);
            world.posted.held = true;
        };
        flush_beside_unseen_failure(lose, seed);
    }
}

/// A front's own sync for a flush is under way when a durable write loses the device's cache, and succeeds.
#[test]
pub fn no_front_s_sync_succeeds_beside_a_durable_write_that_has_lost_the_cache() {
    for seed in 0..20 {
        let mut rng = Rng::with_seed(seed);
        let mut world = world_with_overwrite(&mut rng);
        world.request(Op::Flush, 0, 0);
        assert!(world.disk().is_front_sync(0), "there is nothing to log");
        world.request(Op::Write { durable: true }, 64 << 10, 4096);
        world.lose_device_cache();
        world.posted.held = false;
        world.drain();
        if !world.failures.contains(&(Op::Flush, libc::EIO)) {
            violated(format!("the flush succeeded, and what it covers is lost: {:?}", world.failures));
        }
        assert_eq!(world.session(), Session::Poisoned);
        Run { world, rng }.check_cuts();
    }
}

/// A device whose cache could not be flushed has lost it, and may flush what is left without a word.
#[test]
fn no_flush_succeeds_after_a_durable_write_has_lost_the_device_s_cache() {
    for seed in 0..20 {
        flush_beside_unseen_failure(World::lose_device_cache, seed);
    }
}
