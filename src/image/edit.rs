//! A change of metadata at rest, through the log: there as a whole or not at all.
//!
//! Order, each step durable before the next: one log entry under a new LogGuid → the headers name it, and
//! carry the new DataWriteGuid, if readers of the disk are to see the change → it is replayed as after a
//! crash, which empties the log again. So the children of an image lose it together with what they knew, and
//! not by a change that has failed for want of room.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use uuid::Uuid;

use super::headers::Headers;
use super::replay;
use super::view::{file_length, sync};
use crate::disk::{Buffer, Disk, PAGE_BYTES, ReadDisk};
use crate::error::{Doing, Error, Locate, Result};
use crate::format::MIB;
use crate::format::log::{Change, LOWEST_TARGET, MAX_DESCRIPTORS_WRITTEN, NewEntry};
use crate::simulation::{Plant, planted};

/// Pages with their new content, by their place in the file.
#[derive(Default)]
pub(super) struct Edit {
    pages: BTreeMap<u64, Box<[u8; PAGE_BYTES]>>,
}

impl Edit {
    /// Pages that it changes; an entry holds [`crate::format::log::MAX_DESCRIPTORS_WRITTEN`] of them.
    pub(super) fn page_count(&self) -> usize {
        self.pages.len()
    }

    /// Lays `bytes` at `offset` over the pages they touch.
    pub(super) async fn lay<D: ReadDisk>(&mut self, disk: &D, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut at = offset;
        let mut left = bytes;
        while !left.is_empty() {
            let within = usize::try_from(at % PAGE_BYTES as u64).expect("below a page");
            let page = at - within as u64;
            assert!(page >= LOWEST_TARGET, "the log does not change the headers, at {page}");
            let (here, rest) = left.split_at(left.len().min(PAGE_BYTES - within));
            let target = match self.pages.entry(page) {
                Entry::Occupied(laid) => laid.into_mut(),
                Entry::Vacant(vacant) => {
                    let read = disk.read(page, PAGE_BYTES).await;
                    let read =
                        read.map_err(|error| Error::io("reading what is to change", error).at(page))?;
                    vacant.insert(Box::new(read[..].try_into().expect("a page was read")))
                }
            };
            target[within..within + here.len()].copy_from_slice(here);
            (at, left) = (at + here.len() as u64, rest);
        }
        Ok(())
    }

    /// Has the host make room for the pages in their place. Without it a replay could not end: the log that
    /// names them keeps the image from opening.
    pub(super) async fn reserve<D: Disk>(&self, disk: &D) -> Result<()> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for &page in self.pages.keys() {
            match runs.last_mut() {
                Some(run) if run.end == page => run.end += PAGE_BYTES as u64,
                _ => runs.push(page..page + PAGE_BYTES as u64),
            }
        }
        for Range { start, end } in runs {
            assert!(start < end, "a run has pages");
            let reserved = disk.reserve(start, end - start).await;
            reserved.map_err(|error| Error::io("making room for the change", error).at(start))?;
        }
        Ok(())
    }

    /// Makes the change, under this new DataWriteGuid if there is one. The log is empty before and after. The
    /// headers have the FileWriteGuid of this opening already, and keep it.
    pub(super) async fn write<D: Disk>(
        self,
        disk: &D,
        headers: &mut Headers,
        data_write: Option<Uuid>,
        log_guid: Uuid,
    ) -> Result<()> {
        assert!(!headers.current().needs_replay(), "the log is empty");
        assert!(!self.pages.is_empty(), "there is something to change");
        assert!(
            self.pages.len() <= MAX_DESCRIPTORS_WRITTEN,
            "one entry holds all {} pages",
            self.pages.len()
        );
        self.reserve(disk).await?;
        if planted(Plant::EarlySize) {
            for (at, page) in &self.pages {
                disk.write(*at, Buffer::copy_of(&**page)).await.doing("writing early").at(*at)?;
            }
            return Ok(());
        }
        let length = file_length(disk).await?;
        sync(disk).await?; // the entry promises this length
        let changes: Vec<Change> =
            self.pages.into_iter().map(|(file_offset, page)| Change::Data { file_offset, page }).collect();
        let entry = NewEntry {
            sequence_number: 1,
            tail: 0,
            log_guid,
            flushed_file_offset: length / MIB * MIB,
            last_file_offset: length.next_multiple_of(MIB),
            changes: &changes,
        };
        assert!(entry.length() <= headers.current().log_length, "the shortest log holds the longest entry");
        let at = headers.current().log_offset;
        let written = disk.write(at, Buffer::copy_of(&entry.encode())).await;
        written.map_err(|error| Error::io("writing a log entry", error).at(at))?;
        sync(disk).await?;
        let data_write = data_write.unwrap_or(headers.current().data_write_guid);
        headers.change(|header| (header.log_guid, header.data_write_guid) = (log_guid, data_write));
        let file_write = headers.current().file_write_guid;
        replay::in_place(disk, headers, &[0], file_write).await?;
        assert!(!headers.current().needs_replay(), "the log is empty again");
        Ok(())
    }
}
