//! A sector that is in the file is read where it was written: a front looks it up while its block, which is
//! partially present, moves and the sector is written at the new place.

use std::collections::BTreeMap;
use std::sync::Arc;

use loom::sync::Mutex;
use loom::thread;
use vhdx_ublk::atomic::start_threads;
use vhdx_ublk::format::MIB;
use vhdx_ublk::format::bat::{BatEntry, Geometry};
use vhdx_ublk::image::{BlockMap, Location, locate};

use crate::explore::{Model, came_to};
use crate::front::SECTOR;

pub const STALE: &str = "the bytes of whoever had the space before";

pub const MODEL: Model = Model {
    name: "a sector of a block that moves",
    threads: 2,
    preemptions: None,
    outcomes: &["not there yet", "at the new place"],
    run,
};

const PLACES: [u64; 2] = [MIB, 4 * MIB];

/// What is in the file, by its offset; nothing that counts anywhere else.
type File = Mutex<BTreeMap<u64, u64>>;

const WRITTEN: u64 = 1;

/// The place that is left is in quarantine: it is not given to anything else before the reader has answered a
/// barrier, which it does after its read.
fn read(map: &BlockMap, file: &File) {
    match locate(0, map, 0, SECTOR) {
        (Location::Below, SECTOR) => came_to("not there yet"),
        (Location::File { offset, .. }, SECTOR) => {
            let found = file.lock().expect("no panic holds it").get(&offset).copied();
            assert_eq!(found, Some(WRITTEN), "{STALE}");
            came_to("at the new place");
        }
        other => panic!("{other:?}"),
    }
}

/// No front wrote when the move began, so its barrier is answered. The write waited for its end.
fn move_and_write(map: &BlockMap, file: &File) {
    map.begin_move(0);
    map.move_block(0, PLACES[1]);
    map.end_move(0);
    file.lock().expect("no panic holds it").insert(PLACES[1], WRITTEN);
    map.bitmaps().set(map.geometry(), 0, 0..1);
}

fn run() {
    let geometry = Geometry::new(MIB, 1 << 20, 512, true);
    let map = BlockMap::empty(geometry);
    map.bitmaps().make_room(&geometry, 0).expect("memory");
    map.publish(0, BatEntry::partially_present(PLACES[0]));
    // In memory only, the words are loom's from now on.
    map.bitmaps().set(&geometry, 0, 63..64);
    let (map, file) = (Arc::new(map), Arc::new(File::default()));
    start_threads();
    let reader = thread::spawn({
        let (map, file) = (map.clone(), file.clone());
        move || read(&map, &file)
    });
    move_and_write(&map, &file);
    reader.join().expect("no panic");
}
