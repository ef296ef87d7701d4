//! A block that a front has given space is in the log when a flush behind a write to it has ended: two fronts
//! write to one block that has none, each flushes, and a cycle of the engine's own runs beside them.

use std::sync::Arc;

use loom::sync::Mutex;
use loom::thread;
use vhdx_ublk::atomic::start_threads;
use vhdx_ublk::engine::shared::Shared;
use vhdx_ublk::format::MIB;
use vhdx_ublk::format::bat::{BatEntry, Geometry};
use vhdx_ublk::image::BlockMap;

use crate::explore::{Model, came_to};

pub const NOT_LOGGED: &str = "a mapping is in no copy";
pub const GONE: &str = "a mapping that a front has made is gone";

/// The first of two blocks gets its space.
pub const MODEL: Model = Model {
    name: "space from the pool",
    threads: 3,
    preemptions: Some(2),
    outcomes: &["its own flush copies the mapping", "another cycle has copied it", "it is durable by then"],
    run,
};

/// What the log has of the block.
type Log = Mutex<BatEntry>;

/// What a cycle logs, and what the log has by then. One cycle runs at a time.
fn cycle(shared: &Shared, log: &Log) -> (BatEntry, bool) {
    let mut logged = log.lock().expect("no panic holds it");
    let is_marked = !shared.marks.take().is_empty();
    if is_marked {
        let copy = shared.map.copy_page(0);
        *logged = BatEntry::read(copy[..8].try_into().expect("eight bytes"));
        shared.map.mark_durable(0, &copy);
    }
    (*logged, is_marked)
}

/// A front's write to the block ends, and a flush follows.
fn write_and_flush(shared: &Shared, log: &Log) {
    let mut found = shared.map.load(0);
    while found.entry == BatEntry::not_present() {
        // There is space for each front; the other one may be faster.
        shared.give_space(0);
        found = shared.map.load(0);
    }
    if found.durable {
        came_to(MODEL.outcomes[2]);
    } else {
        shared.found_mappings(0, 512);
    }
    let (logged, copied) = cycle(shared, log);
    assert_eq!(shared.map.load(0).entry, found.entry, "{GONE}");
    assert_eq!(logged, found.entry, "{NOT_LOGGED}");
    came_to(if copied { MODEL.outcomes[0] } else { MODEL.outcomes[1] });
}

fn run() {
    let map = BlockMap::empty(Geometry::new(2 * MIB, 1 << 20, 512, false));
    // In memory only, the slot is loom's from now on.
    map.begin_move(0);
    map.end_move(0);
    let shared = Arc::new(Shared::new(map, false, false));
    (1..4).for_each(|place| shared.pool.add(place * MIB));
    // The cycle has something to log, and says of the first block, too, that it is durable.
    assert!(shared.give_space(1));
    let log = Arc::new(Mutex::new(BatEntry::not_present()));
    start_threads();
    let threads = [(); 2].map(|()| {
        let (shared, log) = (shared.clone(), log.clone());
        thread::spawn(move || write_and_flush(&shared, &log))
    });
    cycle(&shared, &log);
    for thread in threads {
        thread.join().expect("no panic");
    }
}
