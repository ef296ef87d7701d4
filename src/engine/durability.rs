//! What completed syncs prove.
//!
//! A sync proves something only of what had completed when it was *issued*: the length of the file, the bytes
//! that were written, the space that was punched. [`Durability::issue`] notes these before the sync,
//! [`Durability::completed`] takes them for durable after it. The note of a sync that failed is dropped: such
//! a sync proves nothing, and is never repeated.
//!
//! Each issue ends an *epoch*. What was written in an epoch is durable once a sync that ended it, or a later
//! one, has completed.

use std::cell::{Cell, RefCell};

use crate::image::Extent;

/// See the module's head. Lengths in bytes.
#[derive(Debug)]
pub(super) struct Durability {
    /// The file's length; every extension up to it has completed.
    file_length: Cell<u64>,
    /// The part of it that no power cut takes away.
    stable_length: Cell<u64>,
    /// The present epoch; the first one is 1.
    epoch: Cell<u64>,
    /// The newest epoch in which payload was written that a log entry relies on: zeroed or filled space,
    /// sectors whose bits go to the log. 0 if there was none.
    payload_epoch: Cell<u64>,
    /// The newest epoch of which everything is durable.
    synced_epoch: Cell<u64>,
    /// Space that reads as zero after every power cut, once a sync has covered it.
    punched_unsynced: RefCell<Vec<Extent>>,
    /// The lengths to which the file was shortened.
    cuts: RefCell<Vec<u64>>,
}

/// What a sync under way proves when it completes.
#[derive(Debug)]
#[must_use = "a completed sync proves it"]
pub(super) struct Issued {
    length: u64,
    /// How often the file had been shortened.
    cuts: usize,
    epoch: u64,
    punched: Vec<Extent>,
}

impl Issued {
    /// The epoch that ends with it.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }
}

/// What must be durable before the log may name some pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reliance {
    epoch: u64,
    length: u64,
}

impl Durability {
    /// Of a file found `length` bytes long. No sync has proved anything yet. With `unsynced_payload`, an
    /// earlier process may have written payload that no sync covers.
    pub(super) fn found(length: u64, unsynced_payload: bool) -> Self {
        Self {
            file_length: Cell::new(length),
            stable_length: Cell::new(0),
            epoch: Cell::new(1),
            payload_epoch: Cell::new(u64::from(unsynced_payload)),
            synced_epoch: Cell::new(0),
            punched_unsynced: RefCell::default(),
            cuts: RefCell::default(),
        }
    }

    /// The file's length, bytes.
    pub(super) fn file_length(&self) -> u64 {
        self.file_length.get()
    }

    /// A length of the file that no power cut undercuts, bytes.
    pub(super) fn stable_length(&self) -> u64 {
        self.stable_length.get()
    }

    /// The file has been extended to `length`, or was not shortened from there after all.
    pub(super) fn grown(&self, length: u64) {
        assert!(length > self.file_length.get(), "a file grows to {length} bytes");
        self.file_length.set(length);
    }

    /// The file is about to be shortened to `length`: a sync under way proves no more than that.
    pub(super) fn shortened(&self, length: u64) {
        assert!(length < self.file_length.get(), "a file is shortened to {length} bytes");
        self.cuts.borrow_mut().push(length);
        self.file_length.set(length);
        self.stable_length.update(|stable| stable.min(length));
    }

    /// The present epoch: the one of everything written until now and not before it began.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch.get()
    }

    /// Whether everything that was written in `epoch`, and before, survives a power cut.
    pub(super) fn is_durable(&self, epoch: u64) -> bool {
        epoch <= self.synced_epoch.get()
    }

    /// Payload was written that a log entry may rely on from now on.
    pub(super) fn payload_written(&self) {
        self.payload_epoch.set(self.epoch.get());
    }

    /// The host has taken back the content of `extent`, which belongs to nothing.
    pub(super) fn punched(&self, extent: Extent) {
        self.punched_unsynced.borrow_mut().push(extent);
    }

    /// Whether space waits for a sync to be known as zeros.
    pub(super) fn has_punched(&self) -> bool {
        !self.punched_unsynced.borrow().is_empty()
    }

    /// What pages copied now rely on; `used_end` is the end of the space in use.
    pub(super) fn reliance(&self, used_end: u64) -> Reliance {
        // A tolerated last block may reach past the end of the file: a length that never was cannot be
        // stable.
        Reliance { epoch: self.payload_epoch.get(), length: used_end.min(self.file_length.get()) }
    }

    /// Whether the payload of `reliance` survives a power cut.
    pub(super) fn covers_payload(&self, reliance: Reliance) -> bool {
        self.is_durable(reliance.epoch)
    }

    /// Whether the file is as long after a power cut. (Replay restores a lost length; QEMU's does not.)
    pub(super) fn covers_length(&self, reliance: Reliance) -> bool {
        self.stable_length.get() >= reliance.length
    }

    /// A sync is about to be issued.
    pub(super) fn issue(&self) -> Issued {
        let epoch = self.epoch.get();
        self.epoch.set(epoch + 1);
        let cuts = self.cuts.borrow().len();
        Issued { length: self.file_length.get(), cuts, epoch, punched: self.punched_unsynced.take() }
    }

    /// The sync has completed. Returns the space that is known to read as zero from now on.
    pub(super) fn completed(&self, issued: Issued) -> Vec<Extent> {
        let cuts = &self.cuts.borrow()[issued.cuts..];
        let length = cuts.iter().fold(issued.length, |length, cut| length.min(*cut));
        // Syncs may complete in another order than they were issued in: what is proved stays proved.
        self.stable_length.update(|stable| stable.max(length));
        self.synced_epoch.update(|synced| synced.max(issued.epoch));
        assert!(self.stable_length <= self.file_length, "a length is stable that the file does not have");
        assert!(self.synced_epoch < self.epoch, "a sync has completed that was not issued");
        issued.punched
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever happens in whatever order, pages are covered exactly when a completed sync was issued
        /// after the last change that they rely on.
        #[test]
        fn only_a_sync_issued_later_covers_a_change(
            steps in prop::collection::vec((0..5_u8, any::<u8>()), 0..60)
        ) {
            let durability = Durability::found(1, false);
            let (mut wrote, mut grew, mut synced) = (0, 1, 0);
            let (mut under_way, mut copies) = (Vec::new(), Vec::new());
            for (now, (step, choice)) in (2..).zip(steps) {
                match step {
                    0 => (durability.payload_written(), wrote = now).0,
                    1 => (durability.grown(durability.file_length() + 1), grew = now).0,
                    2 => under_way.push((now, durability.issue())),
                    3 if !under_way.is_empty() => {
                        let one = usize::from(choice) % under_way.len();
                        let (issued_at, issued) = under_way.swap_remove(one);
                        synced = synced.max(issued_at);
                        durability.completed(issued);
                    }
                    _ => copies.push((wrote, grew, durability.reliance(u64::MAX))),
                }
                for (wrote, grew, reliance) in &copies {
                    prop_assert_eq!(durability.covers_payload(*reliance), *wrote <= synced);
                    prop_assert_eq!(durability.covers_length(*reliance), *grew <= synced);
                }
            }
        }
    }

    #[test]
    fn punched_space_is_known_zero_after_a_sync_issued_later() {
        let durability = Durability::found(8 << 20, false);
        let extent = Extent { offset: 4 << 20, length: 1 << 20 };
        let early = durability.issue();
        durability.punched(extent);
        assert_eq!(durability.completed(early), []);
        let issued = durability.issue();
        assert_eq!(durability.completed(issued), [extent]);
        let again = durability.issue();
        assert_eq!(durability.completed(again), []);
    }
}
