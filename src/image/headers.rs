//! The two headers and the steps of their update.

use super::view::sync;
use crate::disk::{Buffer, Disk};
use crate::error::{Doing, Error, Locate, Result};
use crate::format::header::{Current, Header, OFFSETS, SIZE};

/// Sequence numbers a session may use up: an image beyond this comes from no writer that counts by one.
const SEQUENCE_ROOM: u64 = 1 << 32;

const _: () = assert!(OFFSETS[0] + SIZE as u64 <= OFFSETS[1], "the slots lie apart");
const _: () = assert!(OFFSETS.len() == 2, "an update alternates between two slots");

/// The current header and the slot that holds it.
///
/// A change reaches the file by [`Headers::next_slot`] once per slot, each written and synced before the next
/// is asked for: both slots are never in flight at once, so a torn one always has a valid neighbour.
#[derive(Clone, Debug)]
pub struct Headers {
    current: Header,
    slot: usize,
    /// The other slot may hold a change that was given up.
    in_doubt: bool,
}

impl Headers {
    /// How many slots an update writes, one after the other.
    pub const SLOTS: usize = OFFSETS.len();

    /// Starts from the header found at open.
    ///
    /// # Errors
    /// Corrupt if its sequence number leaves no room for a session's updates.
    pub fn new(current: &Current) -> Result<Self> {
        assert!(current.slot < Self::SLOTS, "slot {} is one of two", current.slot);
        if current.header.sequence_number.checked_add(SEQUENCE_ROOM).is_none() {
            let message = format!("sequence number {} leaves no room", current.header.sequence_number);
            return Err(Error::corrupt("header", message)
                .at(OFFSETS[current.slot])
                .remedy("open the image read-only and copy it"));
        }
        Ok(Self { current: current.header.clone(), slot: current.slot, in_doubt: false })
    }

    /// The same after a change was given up whose first write failed: that may be in the file, whole or torn.
    #[must_use]
    pub fn in_doubt(self) -> Self {
        Self { in_doubt: true, ..self }
    }

    /// Whether a change that was given up may be in the file.
    pub fn are_in_doubt(&self) -> bool {
        self.in_doubt
    }

    /// The header as of the last change.
    pub fn current(&self) -> &Header {
        &self.current
    }

    /// Changes both headers on `disk`, one after the other, each durable before the next.
    pub(super) async fn update<D: Disk>(&mut self, disk: &D, change: impl FnOnce(&mut Header)) -> Result<()> {
        let (slot, number) = (self.slot, self.current.sequence_number);
        self.change(change);
        for _ in 0..Self::SLOTS {
            let (offset, page) = self.next_slot();
            disk.write(offset, page).await.doing("writing a header").at(offset)?;
            sync(disk).await?;
        }
        assert_eq!(self.slot, slot, "both slots were written");
        assert_eq!(self.current.sequence_number, number + Self::SLOTS as u64, "each by its own number");
        Ok(())
    }

    /// Changes the header in memory.
    pub fn change(&mut self, change: impl FnOnce(&mut Header)) {
        let fixed = |header: &Header| (header.sequence_number, header.log_offset, header.log_length);
        let before = fixed(&self.current);
        change(&mut self.current);
        assert_eq!(fixed(&self.current), before, "a change is of GUIDs");
    }

    /// The next write of an update: its file offset and bytes. It goes to the slot that is not current and
    /// becomes the current one.
    pub fn next_slot(&mut self) -> (u64, Buffer) {
        self.current.sequence_number += 1;
        self.slot ^= 1;
        self.in_doubt = false;
        assert!(self.slot < Self::SLOTS, "slot {} is one of two", self.slot);
        (OFFSETS[self.slot], Buffer::copy_of(&self.current.encode()))
    }
}
