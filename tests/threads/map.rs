//! Whoever has seen a mapping sees that its page has entries, and a mapping that counts as durable is in the
//! log as it is: two fronts look blocks up, which the engine maps, moves and logs.

use std::sync::Arc;

use loom::sync::Mutex;
use loom::thread;
use vhdx_ublk::atomic::start_threads;
use vhdx_ublk::format::MIB;
use vhdx_ublk::format::bat::{BatEntry, Geometry};
use vhdx_ublk::image::BlockMap;

use crate::explore::{Model, came_to};

pub const PASSED_OVER: &str = "a block that was seen is passed over";
pub const NOT_LOGGED: &str = "a durable mapping is not the one that was logged";

/// Looking blocks up.
pub const MODEL: Model = Model {
    name: "block map",
    threads: 3,
    preemptions: None,
    outcomes: &["absent", "not durable", "durable"],
    run,
};

/// What a power cut leaves of the mapping.
type Log = Mutex<BatEntry>;

/// A front looks the block up, for a durable write among others.
fn look_up(map: &BlockMap, log: &Log) {
    let found = map.load(0);
    if found.entry == BatEntry::not_present() {
        return came_to("absent");
    }
    assert_eq!(map.first_set(0..1), 0, "{PASSED_OVER}");
    if !found.durable {
        return came_to("not durable");
    }
    assert_eq!(*log.lock().expect("no panic holds it"), found.entry, "{NOT_LOGGED}");
    came_to("durable");
}

/// The engine maps the block and logs that; meanwhile the block moves.
fn map_and_move(map: &BlockMap, log: &Log) {
    map.publish(0, BatEntry::present(MIB));
    let copy = map.copy_page(0);
    map.move_block(0, 4 * MIB);
    *log.lock().expect("no panic holds it") = BatEntry::read(copy[..8].try_into().expect("eight bytes"));
    map.mark_durable(0, &copy);
}

fn run() {
    let map = Arc::new(BlockMap::empty(Geometry::new(MIB, 1 << 20, 512, false)));
    let log = Arc::new(Mutex::new(BatEntry::not_present()));
    // In memory only, the slot is loom's from now on.
    map.begin_move(0);
    map.end_move(0);
    start_threads();
    let threads = [0, 1].map(|_| {
        let (map, log) = (map.clone(), log.clone());
        thread::spawn(move || look_up(&map, &log))
    });
    map_and_move(&map, &log);
    // A cut keeps the older mapping or the newer one until that is logged, too.
    let copy = map.copy_page(0);
    *log.lock().expect("no panic holds it") = map.load(0).entry;
    map.mark_durable(0, &copy);
    for thread in threads {
        thread.join().expect("no panic");
    }
    assert!(map.load(0).durable, "what stays as it was logged is durable");
}
