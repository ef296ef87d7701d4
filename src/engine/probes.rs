//! The static probes of a daemon, to which `bpftrace`, `perf` and `gdb` attach: each is one no-operation and
//! a note in the program, as long as nothing is attached.
//!
//! The guide ([`watch`](crate::guide::watch)) promises their names and arguments, the numbers of kinds and
//! reasons among them. A start and its end are seen on the same thread.

use probe::probe;

use super::Outcome;

/// A request has come.
#[inline]
pub(super) fn request_start(tag: u16, kind: usize, offset: u64, length: u64) {
    probe!(vhdx_ublk, request__start, tag, kind, offset, length);
}

/// It ends, with this many bytes.
#[inline]
pub(super) fn request_end(tag: u16, result: Outcome<u32>) {
    probe!(vhdx_ublk, request__end, tag, result.map_or_else(|errno| -(errno as i32), u32::cast_signed));
}

/// A request needs the engine.
#[inline]
pub(super) fn ask_start(tag: u16, reason: usize) {
    probe!(vhdx_ublk, ask__start, tag, reason);
}

/// The engine has answered.
#[inline]
pub(super) fn ask_end(tag: u16, reason: usize) {
    probe!(vhdx_ublk, ask__end, tag, reason);
}

/// A commit cycle has closed its set: `pages` of metadata, for `waiters` flushes and other tasks.
#[inline]
pub(super) fn commit_start(pages: usize, waiters: usize) {
    probe!(vhdx_ublk, commit__start, pages, waiters);
}

/// The cycle has ended.
#[inline]
pub(super) fn commit_end(outcome: Outcome) {
    probe!(vhdx_ublk, commit__end, error_number(outcome));
}

/// A sync of the image is about to be issued.
#[inline]
pub(super) fn sync_start(epoch: u64) {
    probe!(vhdx_ublk, sync__start, epoch);
}

/// It has ended.
#[inline]
pub(super) fn sync_end(epoch: u64, outcome: Outcome) {
    probe!(vhdx_ublk, sync__end, epoch, error_number(outcome));
}

/// A barrier goes out to so many queues.
#[inline]
pub(super) fn barrier_start(queues: usize) {
    probe!(vhdx_ublk, barrier__start, queues);
}

/// The last of them has answered.
#[inline]
pub(super) fn barrier_end() {
    probe!(vhdx_ublk, barrier__end);
}

fn error_number(outcome: Outcome) -> i32 {
    outcome.err().map_or(0, |errno| errno as i32)
}
