//! What a guest has written is where its block is after a move: two fronts write sectors of a block while the
//! engine moves it.

use std::collections::BTreeMap;
use std::sync::Arc;

use loom::sync::Mutex;
use loom::thread;
use vhdx_ublk::atomic::start_threads;
use vhdx_ublk::engine::message::{ToEngine, ToFront};
use vhdx_ublk::engine::shared::Shared;
use vhdx_ublk::format::MIB;
use vhdx_ublk::format::bat::{BatEntry, Geometry};
use vhdx_ublk::image::BlockMap;

use crate::explore::{Model, came_to};
use crate::front::{Line, SECTOR, Said, write};
use crate::post::Post;

pub const LEFT_BEHIND: &str = "was written to the place that the block has left";

pub const MODEL: Model = Model {
    name: "a block that moves",
    threads: 3,
    preemptions: Some(2),
    outcomes: &["a write before the move", "a write after the move"],
    run,
};

/// The sectors of the file that were written, by their offset.
type File = Mutex<BTreeMap<u64, u64>>;

const PLACES: [u64; 2] = [MIB, 4 * MIB];

fn move_block(shared: &Shared, file: &File, from: &Post<(usize, Said)>, to: &[Arc<Post<Option<ToFront>>>]) {
    shared.map.begin_move(0);
    for front in to {
        front.send(Some(ToFront::Barrier));
    }
    let (mut answers, mut done, mut asks) = (0, 0, Vec::new());
    while done < to.len() || answers < to.len() {
        match from.receive() {
            (_, Said::Message(ToEngine::BarrierDone)) => answers += 1,
            (front, Said::Message(ToEngine::Ask { tag, .. })) => asks.push((front, tag)),
            (_, Said::Done) => done += 1,
            other => panic!("{other:?}"),
        }
        let moved = shared.map.load(0).entry.offset() == PLACES[1];
        if answers == to.len() && !moved {
            let mut file = file.lock().expect("no panic holds it");
            for sector in 0..2 {
                if let Some(content) = file.get(&(PLACES[0] + sector * SECTOR)).copied() {
                    file.insert(PLACES[1] + sector * SECTOR, content);
                }
            }
            drop(file);
            shared.map.move_block(0, PLACES[1]);
        }
        if answers == to.len() {
            for (front, tag) in asks.drain(..) {
                to[front].send(Some(ToFront::Reply { tag, result: Ok(()) }));
            }
        }
    }
    for front in to {
        front.send(None);
    }
}

fn run() {
    let map = BlockMap::empty(Geometry::new(MIB, 1 << 20, 512, false));
    map.publish(0, BatEntry::present(PLACES[0]));
    let shared = Arc::new(Shared::new(map, false, false));
    shared.open_session();
    let file = Arc::new(File::new(BTreeMap::new()));
    let to_engine = Arc::new(Post::new());
    let to_fronts = [0, 1].map(|_| Arc::new(Post::new()));
    start_threads();
    let threads = [0, 1].map(|front| {
        let line = Line { front, to_engine: to_engine.clone(), to_front: to_fronts[front].clone() };
        let (shared, file) = (shared.clone(), file.clone());
        thread::spawn(move || {
            let host = |io: vhdx_ublk::engine::port::FileIo| {
                let early = io.file_offset < PLACES[1];
                came_to(if early { MODEL.outcomes[0] } else { MODEL.outcomes[1] });
                file.lock().expect("no panic holds it").insert(io.file_offset, front as u64);
                io.length.cast_signed()
            };
            assert_eq!(write(shared, line, front as u64, false, host), Ok(512));
        })
    });
    move_block(&shared, &file, &to_engine, &to_fronts);
    for thread in threads {
        thread.join().expect("no panic");
    }
    let file = file.lock().expect("no panic holds it");
    for sector in 0..2 {
        let found = file.get(&(PLACES[1] + sector * SECTOR));
        assert_eq!(found, Some(&sector), "sector {sector} {LEFT_BEHIND}");
    }
}
