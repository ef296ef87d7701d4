//! The image that a device serves, and its engine, give way to others while requests wait.

use std::rc::Rc;
use std::time::Instant;

use super::fronts::{FrontInbox, Mailboxes};
use super::leaf_handover::{Leaf, LeafHandover};
use super::served_image::ServedImage;
use crate::disk::Reactor;

/// What the engine's thread needs for it.
pub(super) struct Exchange<'a> {
    pub(super) reactor: &'a Reactor,
    pub(super) inbox: &'a Rc<FrontInbox>,
    pub(super) fronts: &'a Rc<Mailboxes>,
    pub(super) handover: &'a LeafHandover,
}

impl Exchange<'_> {
    /// Holds the fronts, has `next` decide what is served from now on, and lets them continue with that, or
    /// with what they had if it fails. What was served before, and how long requests had to wait, in
    /// microseconds.
    pub(super) fn run<E>(
        &self,
        served: &mut ServedImage,
        next: impl FnOnce(&ServedImage) -> Result<ServedImage, E>,
    ) -> Result<(ServedImage, u64), E> {
        let started = Instant::now();
        self.inbox.hold(self.reactor, self.fronts);
        let next = next(served);
        if let Ok(next) = &next {
            let shared = next.engine.shared().clone();
            shared.activity().continue_from(served.engine.shared().activity());
            self.handover.set(Leaf { shared, file: next.file.clone() });
            self.inbox.change_engine(next.engine.clone());
        }
        self.fronts.release();
        let pause_us = u64::try_from(started.elapsed().as_micros()).expect("years are below 2^64");
        Ok((std::mem::replace(served, next?), pause_us))
    }
}
