//! Opening the writable session, and activating the log in it.
//!
//! Both are lazy: an image that is opened for writing and not written stays as it is, byte for byte.

use std::ops::Range;
use std::rc::Rc;

use uuid::Uuid;

use super::log::LogSpace;
use super::shared::Session;
use super::{Engine, Outcome, errno, for_guest};
use crate::disk::{Buffer, Disk, PAGE_BYTES};
use crate::format::MIB;
use crate::format::bat::BITMAP_BLOCK_SIZE;
use crate::format::header::OFFSETS;
use crate::format::log::NewEntry;
use crate::image::Extent;
use crate::simulation::{Plant, planted};

/// Where the headers are in the file, bytes.
const HEADERS: Range<u64> = OFFSETS[0]..OFFSETS[1] + PAGE_BYTES as u64;

impl<D: Disk + 'static> Engine<D> {
    /// The first modification of any kind waits for this.
    ///
    /// # Errors
    /// If the host has failed: nothing was modified then, or the device is poisoned.
    pub async fn open_session(self: &Rc<Self>) -> Outcome {
        self.open_session_as(None).await
    }

    /// As [`Self::open_session`], with `data_write_guid`, if there is one, as the GUID that children know the
    /// new content by.
    ///
    /// # Errors
    /// As [`Self::open_session`].
    pub async fn open_session_as(self: &Rc<Self>, data_write_guid: Option<Uuid>) -> Outcome {
        let turn = self.turns.session.enter().await;
        if self.shared.session() == Session::Idle {
            // The header found may be a killed process's, and not be durable yet. Writing the other one now
            // would put both at risk: a power cut could tear the one and lose the other.
            if !planted(Plant::TrustKilled) {
                self.sync().await?;
            }
            self.reserve_metadata().await?;
            let (file_write, data_write) = self.session_guids(data_write_guid);
            let memory = self.shared.map.memory();
            if !planted(Plant::LateAnnouncement) {
                memory.announce(file_write);
            }
            self.update_headers(|header| {
                header.file_write_guid = file_write;
                header.data_write_guid = data_write;
            })
            .await?;
            memory.confirm_guid(file_write);
            self.opening.set(None);
            self.complete_last_unit().await?;
            self.shared.open_session();
            assert_ne!(self.shared.session(), Session::Idle, "a session goes from idle to open or poisoned");
        }
        drop(turn);
        self.check_poison()
    }

    /// The GUIDs of the session. If it could not be opened for want of room, the next attempt uses the same
    /// ones: a header that was refused may be in the file, and a successor recognises the image by its GUID.
    fn session_guids(&self, data_write_guid: Option<Uuid>) -> (Uuid, Uuid) {
        let guids = self.opening.get().unwrap_or_else(|| {
            let file_write = self.new_guid();
            (file_write, data_write_guid.unwrap_or_else(|| self.new_guid()))
        });
        self.opening.set(Some(guids));
        assert!(data_write_guid.is_none_or(|wanted| wanted == guids.1), "a session opens under one GUID");
        guids
    }

    /// Holes where metadata will be written are filled now: running out of space here fails one write and
    /// leaves the image as it was. Later it would fail flushes, which need none.
    async fn reserve_metadata(self: &Rc<Self>) -> Outcome {
        let headers = Extent { offset: HEADERS.start, length: HEADERS.end - HEADERS.start };
        for extent in [headers, self.layout.log, self.layout.bat, self.layout.metadata] {
            self.reserve(extent).await?;
        }
        let map = &self.shared.map;
        let chunks = if map.geometry().is_differencing() { map.geometry().bitmap_block_count() } else { 0 };
        for offset in (0..chunks).filter_map(|chunk| map.bitmap_place(chunk)) {
            self.reserve(Extent { offset, length: BITMAP_BLOCK_SIZE }).await?;
        }
        Ok(())
    }

    /// Has the host fill the holes of `extent`.
    pub(super) async fn reserve(&self, extent: Extent) -> Outcome {
        assert!(extent.length > 0, "a structure has a length");
        let reserved = self.disk.reserve(extent.offset, extent.length).await;
        reserved.map_err(|error| for_guest(errno(&error)))
    }

    /// A file that does not end on a 1 MiB border, or ends inside its last block, is grown to what its
    /// structures need.
    async fn complete_last_unit(self: &Rc<Self>) -> Outcome {
        // A file that is being extended ahead of a growth has no length that could be relied on.
        let _turn = self.turns.growth.enter().await;
        let needed = self.space.borrow().used_end().max(self.durability.file_length().next_multiple_of(MIB));
        if needed > self.durability.file_length() {
            self.grow_to(needed).await?;
        }
        assert!(self.durability.file_length().is_multiple_of(MIB), "space is granted in whole MiB");
        Ok(())
    }

    /// Before the first commit, and when the log starts again: an initial empty entry under a new LogGuid,
    /// durable before the headers name it, and with it everything that an older log held, which is in place.
    /// The file never has a LogGuid without a valid entry.
    pub(super) async fn begin_log(self: &Rc<Self>) -> Outcome {
        assert_ne!(self.shared.session(), Session::Idle, "a log belongs to a session");
        assert!(self.journal.spares_first_sector(), "the first sector is still needed");
        let guid = self.new_guid();
        assert!(!self.journal.is_under(guid), "two logs of one session have GUIDs of their own");
        let entry = NewEntry {
            sequence_number: 1,
            tail: 0,
            log_guid: guid,
            flushed_file_offset: self.flushed_file_offset(),
            last_file_offset: self.last_file_offset(),
            changes: &[],
        };
        let bytes = Buffer::copy_of(&entry.encode());
        if planted(Plant::HeaderBeforeEntry) {
            self.update_headers(|header| header.log_guid = guid).await?;
        }
        self.write_metadata("writing the first log entry", self.layout.log.offset, bytes).await?;
        self.sync().await?;
        assert!(self.journal.is_settled(), "the log starts again while it is needed");
        self.update_headers(|header| header.log_guid = guid).await?;
        self.count(|counters| counters.logs.add(1));
        let log = LogSpace::after_initial_entry(guid, self.layout.log.offset, self.layout.log.length);
        self.journal.begin(log);
        Ok(())
    }

    /// A length that is stable already; replay refuses a file that is shorter.
    pub(super) fn flushed_file_offset(&self) -> u64 {
        if planted(Plant::NoFlushedOffset) {
            return 0;
        }
        let unstable = planted(Plant::UnstableLength);
        let length = if unstable { self.durability.file_length() } else { self.durability.stable_length() };
        length / MIB * MIB
    }

    /// The least length that holds everything, mappings about to be published included; replay restores it.
    pub(super) fn last_file_offset(&self) -> u64 {
        let last = self.space.borrow().used_end().max(self.flushed_file_offset());
        assert!(last.is_multiple_of(MIB), "an entry has lengths in whole MiB");
        last
    }
}
