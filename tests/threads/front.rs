//! A queue's thread: a front that serves one write, and what it exchanges with the engine.

use std::sync::Arc;

use vhdx_ublk::engine::Outcome;
use vhdx_ublk::engine::front::{Front, Op, Request};
use vhdx_ublk::engine::message::{ToEngine, ToFront};
use vhdx_ublk::engine::port::{FileIo, PieceId, Port, Ticket};
use vhdx_ublk::engine::shared::Shared;

use crate::post::Post;

pub const SECTOR: u64 = 512;

/// What an engine hears from its fronts.
#[derive(Debug)]
pub enum Said {
    Message(ToEngine),
    /// The front's request is complete.
    Done,
}

/// The way from a front to the engine, and back. Nothing follows `None`.
pub struct Line {
    pub front: usize,
    pub to_engine: Arc<Post<(usize, Said)>>,
    pub to_front: Arc<Post<Option<ToFront>>>,
}

/// What a front has handed to its thread.
struct Queue {
    line: Line,
    piece: Option<(PieceId, FileIo)>,
    result: Option<Outcome<u32>>,
}

impl Port for Queue {
    fn submit(&mut self, piece: PieceId, io: FileIo) {
        assert!(self.piece.replace((piece, io)).is_none(), "one piece at a time");
    }

    fn send(&mut self, message: ToEngine) {
        self.line.to_engine.send((self.line.front, Said::Message(message)));
    }

    fn change_leaf(&mut self) -> Option<Arc<Shared>> {
        None
    }

    fn complete(&mut self, _: Ticket, result: Outcome<u32>) {
        assert!(self.result.replace(result).is_none(), "a request is completed once");
    }
}

/// Writes `sector`; `host` does the file I/O and says how it ended. A message may come before the end of the
/// I/O, and to all fronts but the first before the request. Messages are taken until there are no more.
/// Returns the end of the request.
pub fn write(
    shared: Arc<Shared>,
    line: Line,
    sector: u64,
    durable: bool,
    host: impl Fn(FileIo) -> i32,
) -> Outcome<u32> {
    let mut front = Front::new(shared, 1);
    let mut queue = Queue { line, piece: None, result: None };
    let request = Request { op: Op::Write { durable }, offset: sector * SECTOR, length: SECTOR };
    if queue.line.front > 0 {
        take_one(&mut front, &mut queue);
    }
    front.start(0, request, &mut queue);
    take_one(&mut front, &mut queue);
    let mut is_done = false;
    loop {
        while let Some((id, io)) = queue.piece.take() {
            front.io_done(id, host(io), &mut queue);
        }
        if queue.result.is_some() && !std::mem::replace(&mut is_done, true) {
            queue.line.to_engine.send((queue.line.front, Said::Done));
        }
        match queue.line.to_front.receive() {
            Some(message) => front.receive(message, &mut queue),
            None => break,
        }
    }
    assert!(front.is_idle(), "the engine waits for what it has asked");
    queue.result.expect("the request is complete")
}

fn take_one(front: &mut Front, queue: &mut Queue) {
    if let Some(message) = queue.line.to_front.look() {
        front.receive(message.expect("the request is not complete"), queue);
    }
}
