//! A session that is poisoned stays so, and no sync counts that a failed durable write has preceded.

use std::sync::Arc;

use loom::sync::Mutex;
use loom::thread;
use nix::errno::Errno;
use vhdx_ublk::atomic::start_threads;
use vhdx_ublk::engine::message::{ToEngine, ToFront};
use vhdx_ublk::engine::port::{FileIo, FileOp};
use vhdx_ublk::engine::shared::{Session, Shared};
use vhdx_ublk::format::MIB;
use vhdx_ublk::format::bat::{BatEntry, Geometry};
use vhdx_ublk::image::BlockMap;

use crate::explore::{Model, came_to};
use crate::front::{Line, Said, write};
use crate::post::Post;

pub const UNSEEN: &str = "a sync counts although the host has lost something before it";
pub const REVIVED: &str = "a poisoned session is open";

/// Two fronts write durably, and the host loses data under one of them: it says so to that write, and to no
/// sync. Meanwhile the engine syncs.
pub const SYNC: Model = Model {
    name: "a sync beside durable writes",
    threads: 3,
    preemptions: Some(2),
    outcomes: &["a sync before the loss", "a sync that counts for nothing", "a sync that waits for a write"],
    run: sync,
};

/// Two threads poison a session while the engine opens it.
pub const OPEN: Model = Model {
    name: "poison while a session opens",
    threads: 3,
    preemptions: None,
    outcomes: &["open, then poisoned", "poisoned first"],
    run: open,
};

fn shared() -> Arc<Shared> {
    let map = BlockMap::empty(Geometry::new(MIB, 1 << 20, 512, false));
    map.restore(0, &[BatEntry::present(MIB).write()]);
    Arc::new(Shared::new(map, false, false))
}

/// The engine's part of a sync: the host has done it, and says nothing of a loss.
fn sync_beside(
    shared: &Shared,
    lost: &Mutex<bool>,
    from: &Post<(usize, Said)>,
    to: &[Arc<Post<Option<ToFront>>>],
) {
    let lost = *lost.lock().expect("no panic holds it");
    let (mut owed, mut done) = (0, 0);
    if shared.has_unseen() {
        came_to(SYNC.outcomes[2]);
        for front in to {
            front.send(Some(ToFront::Fence));
        }
        owed = to.len();
    }
    let receive = |owed: &mut usize, done: &mut usize| match from.receive() {
        (_, Said::Message(ToEngine::Fenced)) => *owed -= 1,
        (_, Said::Done) => *done += 1,
        other => panic!("{other:?}"),
    };
    while owed > 0 {
        receive(&mut owed, &mut done);
    }
    let counts = shared.session() != Session::Poisoned;
    assert!(!(lost && counts), "{UNSEEN}");
    if lost {
        came_to(SYNC.outcomes[1]);
    } else {
        came_to(SYNC.outcomes[0]);
    }
    while done < to.len() {
        receive(&mut owed, &mut done);
    }
    for front in to {
        front.send(None);
    }
}

fn sync() {
    let shared = shared();
    shared.open_session();
    let lost = Arc::new(Mutex::new(false));
    let to_engine = Arc::new(Post::new());
    let to_fronts = [0, 1].map(|_| Arc::new(Post::new()));
    start_threads();
    let threads = [0, 1].map(|front| {
        let line = Line { front, to_engine: to_engine.clone(), to_front: to_fronts[front].clone() };
        let (shared, lost) = (shared.clone(), lost.clone());
        thread::spawn(move || {
            let host = |io: FileIo| {
                assert_eq!(io.op, FileOp::Write { durable: true });
                if front == 1 {
                    return io.length.cast_signed();
                }
                *lost.lock().expect("no panic holds it") = true;
                -(Errno::EIO as i32)
            };
            let result = write(shared, line, front as u64, true, host);
            assert!(result.is_ok() || result == Err(Errno::EIO));
            assert!(front == 1 || result == Err(Errno::EIO), "a lost write is reported");
        })
    });
    sync_beside(&shared, &lost, &to_engine, &to_fronts);
    for thread in threads {
        thread.join().expect("no panic");
    }
    assert_eq!(shared.session(), Session::Poisoned);
}

fn open() {
    let shared = shared();
    start_threads();
    let threads = [0, 1].map(|_| {
        let shared = shared.clone();
        thread::spawn(move || {
            let before = shared.session();
            let first = shared.poison();
            assert_eq!(shared.session(), Session::Poisoned, "{REVIVED}");
            (before, first)
        })
    });
    shared.open_session();
    if shared.session() == Session::Open {
        came_to(OPEN.outcomes[0]);
    }
    let found = threads.map(|thread| thread.join().expect("no panic"));
    if found.iter().all(|(before, _)| *before == Session::Idle) && shared.session() == Session::Poisoned {
        came_to(OPEN.outcomes[1]);
    }
    assert_eq!(shared.session(), Session::Poisoned, "{REVIVED}");
    assert_eq!(found.iter().filter(|(_, first)| *first).count(), 1, "one of two has poisoned it");
}
