//! A flush is a sync by its queue only if the log has every sector whose write was acknowledged: one front
//! marks a sector that it has written and acknowledges it, the guest flushes through another, and the engine
//! runs a cycle beside them.

use std::sync::Arc;

use loom::sync::Mutex;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;
use vhdx_ublk::atomic::start_threads;
use vhdx_ublk::engine::shared::Shared;
use vhdx_ublk::format::bat::{BatEntry, Geometry};
use vhdx_ublk::image::BlockMap;

use crate::explore::{Model, came_to};

pub const NOT_LOGGED: &str = "a flush passes over a sector that the log lacks";

/// The cycle says that it has something to log, takes the marks, logs, and says that all is logged.
pub const MODEL: Model = Model {
    name: "a flush beside a cycle",
    threads: 3,
    preemptions: None,
    outcomes: &["nothing was acknowledged", "the engine is asked", "the front syncs"],
    run: || run(cycle),
};

/// The same with a mistake in the cycle.
pub const TAKE_FIRST: Model = Model { run: || run(take_first), ..MODEL };

const SECTOR: u64 = 512;

/// What the log has of the first eight sectors.
type Log = Mutex<u8>;

fn cycle(shared: &Shared, log: &Log) {
    shared.unlogged.set();
    let is_marked = !shared.marks.take().is_empty();
    log_page(shared, log, is_marked);
    shared.unlogged.clear();
}

/// A mistake: the marks are gone before the flag is there.
fn take_first(shared: &Shared, log: &Log) {
    let is_marked = !shared.marks.take().is_empty();
    shared.unlogged.set();
    log_page(shared, log, is_marked);
    shared.unlogged.clear();
}

fn log_page(shared: &Shared, log: &Log, is_marked: bool) {
    if is_marked {
        *log.lock().expect("no panic holds it") = shared.map.bitmaps().copy_page(0, 0)[0];
    }
}

/// A flush, after the write if that was acknowledged.
fn flush(shared: &Shared, log: &Log, acknowledged: &AtomicBool) {
    if !acknowledged.load(Ordering::Acquire) {
        return came_to(MODEL.outcomes[0]);
    }
    if !shared.is_logged() {
        return came_to(MODEL.outcomes[1]);
    }
    assert_eq!(*log.lock().expect("no panic holds it") & 1, 1, "{NOT_LOGGED}");
    came_to(MODEL.outcomes[2]);
}

fn run(cycle: fn(&Shared, &Log)) {
    let geometry = Geometry::new(2 << 20, 1 << 20, 512, true);
    let map = BlockMap::empty(geometry);
    map.bitmaps().make_room(&geometry, 0).expect("memory");
    map.publish(0, BatEntry::partially_present(1 << 20));
    let shared = Arc::new(Shared::new(map, false, false));
    shared.mark_written(7 * SECTOR, 8 * SECTOR);
    let log = Arc::new(Log::new(0));
    cycle(&shared, &log);
    assert!(shared.is_logged());
    let acknowledged = Arc::new(AtomicBool::new(false));
    start_threads();
    let writing = {
        let (shared, acknowledged) = (shared.clone(), acknowledged.clone());
        thread::spawn(move || {
            shared.mark_written(0, SECTOR);
            acknowledged.store(true, Ordering::Release);
        })
    };
    let flushing = {
        let (shared, log) = (shared.clone(), log.clone());
        thread::spawn(move || flush(&shared, &log, &acknowledged))
    };
    cycle(&shared, &log);
    for thread in [writing, flushing] {
        thread.join().expect("no panic");
    }
}
