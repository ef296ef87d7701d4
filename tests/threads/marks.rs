//! A sector whose write is done is in the copy of its bitmap that the next flush logs: two fronts mark the
//! sectors that they have written, each flushes, and a cycle of the engine's own runs beside them.

use std::sync::Arc;

use loom::sync::Mutex;
use loom::thread;
use vhdx_ublk::atomic::start_threads;
use vhdx_ublk::engine::shared::Shared;
use vhdx_ublk::format::bat::{BatEntry, Geometry};
use vhdx_ublk::image::{BlockMap, Page};

use crate::explore::{Model, came_to};

pub const LOST: &str = "is in no copy";

const OUTCOMES: &[&str] = &["its own flush copies the bit", "another cycle has copied it"];

/// Both write one sector: one of them may find it marked as present.
pub const ONE_SECTOR: Model = Model {
    name: "marks of one sector",
    threads: 3,
    preemptions: Some(2),
    outcomes: OUTCOMES,
    run: || run([0, 0], cycle),
};

/// Each writes a sector of its own, and the bits of both are in one word.
pub const TWO_SECTORS: Model = Model {
    name: "marks of two sectors",
    threads: 3,
    preemptions: Some(2),
    outcomes: OUTCOMES,
    run: || run([0, 1], cycle),
};

/// The same with a mistake in the cycle.
pub const COPY_FIRST: Model = Model { run: || run([0, 1], copy_first), ..TWO_SECTORS };

const SECTOR: u64 = 512;

/// A sector that is there from the start: its bit is in the word of the others.
const FIRST: u64 = 63;

/// What a cycle takes and copies, and what the log has by then of the first eight sectors. One cycle runs at
/// a time.
fn cycle(shared: &Shared, log: &Mutex<u8>) -> (u8, bool) {
    let mut logged = log.lock().expect("no panic holds it");
    let pages = shared.marks.take();
    for page in &pages {
        assert_eq!(*page, Page::Bitmap { chunk: 0, page: 0 });
        *logged = shared.map.bitmaps().copy_page(0, 0)[0];
    }
    (*logged, !pages.is_empty())
}

/// A mistake: the page is copied, and then the marks are taken.
fn copy_first(shared: &Shared, log: &Mutex<u8>) -> (u8, bool) {
    let mut logged = log.lock().expect("no panic holds it");
    let copy = shared.map.bitmaps().copy_page(0, 0)[0];
    let is_marked = !shared.marks.take().is_empty();
    if is_marked {
        *logged = copy;
    }
    (*logged, is_marked)
}

type Cycle = fn(&Shared, &Mutex<u8>) -> (u8, bool);

/// A front's write of `sector` ends, and a flush follows.
fn write_and_flush(shared: &Shared, log: &Mutex<u8>, sector: u64, cycle: Cycle) {
    shared.mark_written(sector * SECTOR, (sector + 1) * SECTOR);
    let (logged, copied) = cycle(shared, log);
    assert!(logged >> sector & 1 == 1, "sector {sector} {LOST}");
    came_to(if copied { OUTCOMES[0] } else { OUTCOMES[1] });
}

fn run(sectors: [u64; 2], cycle: Cycle) {
    let geometry = Geometry::new(2 << 20, 1 << 20, 512, true);
    let map = BlockMap::empty(geometry);
    map.bitmaps().make_room(&geometry, 0).expect("memory");
    map.publish(0, BatEntry::partially_present(1 << 20));
    let shared = Arc::new(Shared::new(map, false, false));
    shared.mark_written(FIRST * SECTOR, (FIRST + 1) * SECTOR);
    assert_eq!(shared.marks.take().len(), 1);
    let log = Arc::new(Mutex::new(0));
    start_threads();
    let threads = sectors.map(|sector| {
        let (shared, log) = (shared.clone(), log.clone());
        thread::spawn(move || write_and_flush(&shared, &log, sector, cycle))
    });
    cycle(&shared, &log);
    for thread in threads {
        thread.join().expect("no panic");
    }
    let (logged, _) = cycle(&shared, &log);
    assert_eq!(u64::from(logged), sectors.into_iter().fold(0, |bits, sector| bits | 1 << sector));
}
