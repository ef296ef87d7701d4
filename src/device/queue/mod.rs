//! The queues of a device: each is a thread that carries requests between the kernel and its front.
//!
//! `thread` is a queue's life, `ring` its `io_uring`, `buffers` the data of its requests; `descriptor` and
//! `token` are the pure parts: what the kernel requests, and what a completion belongs to.

mod buffers;
mod descriptor;
mod ring;
mod thread;
mod token;

pub(super) use buffers::{BufferIndex, Transfer};
pub(super) use ring::RingSetup;
pub(super) use thread::{Queue, QueueSetup, Report};
