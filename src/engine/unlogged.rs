//! Whether something was acknowledged that a sync of the file alone does not make durable. If there is no
//! such thing, the front that gets a flush syncs the file itself, through a description of its queue's own,
//! and no other thread is woken.
//!
//! What a flush has to wait for beside such a sync, and how a front knows of it:
//!
//! | what | known by |
//! |---|---|
//! | pages that the log lacks by the engine's doing: first writes, discards, moves, blocks made whole, what a session has left | the flag, which is set before the change is visible |
//! | blocks that fronts have given space | the marks of their pages, which are made before a write there is done |
//! | pages that a cycle logs, or that a failed one could not log | the flag, until a cycle has ended that leaves none |
//! | bits of sectors that fronts have set | the marks of their pages, too; a cycle sets the flag before it takes any |
//! | what a killed process wrote | the flag, with which every engine begins |
//! | punched space, which is free again after the engine's next sync | the flag |
//! | a host that reports a lost write only to the description that it came by | the flag, which is never cleared then |
//! | a session that is not open | the session word |
//! | durable writes and syncs under way, whose failure may be the only sign of a lost cache | their count: see [`super::sync`] |
//!
//! A flush waits for nothing else. A round that is in the log and not in its place, or not synced there, is
//! durable in the log; the next commit confirms it. A header in doubt is settled before a commit relies on
//! it, and there is something to log then. Space in quarantine has lost its block in a page that is dirty. A
//! length matters to mappings, which are in dirty pages until it is stable. A snapshot, a growth, a merge and
//! a close hold the fronts: no flush is under way, and the engine that follows begins with the flag set.
//!
//! The order of loads and stores. A guest writes through queue A and then, when that is acknowledged, flushes
//! through queue B. A loads a mapping (acquire) that the engine has published (release) after it had set the
//! flag; and the kernel puts A's end of the write before B's start of the flush. So B finds the flag as it
//! was set then, or as the engine, which alone stores it, has stored it since: it is cleared only after the
//! sync that made the page durable. Of A's marks B finds the count, or its decrease by a cycle (acquire and
//! release), which had set the flag before. So B loads the count first and the flag after it.
//!
//! A may have found a mapping that another front, C, has published (release) and not marked yet. C had
//! counted itself into the page before. A looks at the page's word after the mapping. If it finds a front in
//! it, A marks the page itself. Otherwise C has left it (acquire and release): A sees C's mark, counted; or
//! that a cycle has taken it, and the flag that the cycle had set before.

use crate::atomic::{AtomicBool, Ordering};

/// See the module's head.
pub struct Unlogged(AtomicBool);

impl Default for Unlogged {
    /// That of an engine that begins.
    fn default() -> Self {
        Self(AtomicBool::new(true))
    }
}

impl Unlogged {
    /// The engine is about to make something visible that a flush has to log, or to take marks of fronts.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Everything that was made visible is durable.
    pub fn clear(&self) {
        self.0.store(false, Ordering::Release);
    }

    /// Whether the engine has something to log.
    #[inline]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}
