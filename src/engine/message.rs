//! The messages between the fronts and the engine.
//!
//! Two FIFO queues join each front to the engine. A tag has at most one request outstanding and gets exactly
//! one reply; ranges, not blocks, are asked for. With one barrier, one fence and one hold outstanding at
//! most, `depth + 3` places are enough in either direction, so a push cannot fail and never waits for room.

use super::Outcome;

/// From a front to the engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToEngine {
    /// A tag asks for something and waits for its [`ToFront::Reply`].
    Ask {
        /// The tag that waits.
        tag: u16,
        /// What it asks for.
        ask: Ask,
    },
    /// Every piece that was looked up before the last [`ToFront::Barrier`] has ended.
    BarrierDone,
    /// Every durable write and sync that was in flight at the last [`ToFront::Fence`] has ended.
    Fenced,
    /// No request is being served, and none will be before [`ToFront::Release`].
    Held,
}

/// What the engine can do for a tag. Blocks are counted from the start of the virtual disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Open the session: the first modification of any kind waits for it.
    OpenSession,
    /// Give blocks `first..first + count` space; those that have some keep it.
    Allocate {
        /// First block.
        first: u64,
        /// Number of blocks.
        count: u64,
    },
    /// Make whole blocks `first..first + count` read as zero and give their space back. Blocks that read as
    /// zero already stay as they are.
    Unmap {
        /// First block.
        first: u64,
        /// Number of blocks.
        count: u64,
        /// Blocks that have no space become ZERO too, so that every reader sees zeros, not only this one.
        define_absent: bool,
    },
    /// Make those of blocks `first..first + count` ZERO that have no space and no parent's content; the
    /// others stay as they are.
    ZeroAbsent {
        /// First block.
        first: u64,
        /// Number of blocks.
        count: u64,
        /// All of each block is to read as zero, whatever the parents have.
        whole: bool,
    },
    /// Make everything that was acknowledged before this request durable.
    Flush,
    /// The front has synced for a flush: wait until the end of every durable write and sync that is under way
    /// has been seen.
    Fence,
}

/// From the engine to a front.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToFront {
    /// The one answer to an [`ToEngine::Ask`]. It carries a status only: the front looks the block up again.
    Reply {
        /// The tag that asked.
        tag: u16,
        /// What has become of it.
        result: Outcome,
    },
    /// Answer with [`ToEngine::BarrierDone`] once every piece looked up before this message has ended.
    Barrier,
    /// Answer with [`ToEngine::Fenced`] once every durable write and sync in flight now has ended.
    Fence,
    /// Begin no more requests, and answer with [`ToEngine::Held`] once those begun have ended.
    Hold,
    /// Begin requests again, on the image that is served from now on.
    Release,
}
