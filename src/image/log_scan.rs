//! Finding the active sequence in a log on disk.
//!
//! One pass over the log, one validation per entry that could be one. No sector inside a valid entry starts
//! as an entry does (data sectors and further descriptor sectors have their own signatures), so an entry that
//! reaches over the start of another is none; this keeps the whole scan linear in the log's length, however
//! hostile its content.
//!
//! [Rules 62 to 65](crate::design::vhdx_rules#rule-62).

use std::collections::BTreeMap;

use crate::disk::{Buffer, ReadDisk};
use crate::error::{Error, Kind, Result, SALVAGE};
use crate::format::MIB;
use crate::format::header::{Header, MAX_LOG_LENGTH};
use crate::format::log::{self, Entry, EntryHeader, SECTOR};
use crate::simulation::{Plant, planted};

/// The way out for a file that has lost its end.
const CUT: &str =
    "if its source is whole, copy the file again; `vhdx-ublk salvage FILE COPY` copies what is left";

/// How much of the log is read at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// What the log of an image holds.
#[derive(Debug)]
pub enum LogState {
    /// The header names no log content.
    Clean,
    /// Entries to replay, by position in the log, oldest first; never empty.
    Dirty(Vec<u32>),
    /// The header names a log, and no sector carries its GUID: nothing was ever logged, so nothing can have
    /// been applied. QEMU leaves this when it dies between the header and its first entry.
    Virgin,
}

impl LogState {
    /// The entries to replay, by position in the log, oldest first; none at all if the header names no log
    /// content.
    pub fn positions(self) -> Option<Vec<u32>> {
        match self {
            Self::Clean => None,
            Self::Virgin => Some(Vec::new()),
            Self::Dirty(positions) => Some(positions),
        }
    }
}

/// A log on disk.
pub struct Log<'a, D> {
    disk: &'a D,
    header: &'a Header,
}

impl<'a, D: ReadDisk> Log<'a, D> {
    /// The log that `header` describes.
    pub fn new(disk: &'a D, header: &'a Header) -> Self {
        assert!(header.log_offset.is_multiple_of(MIB), "a parsed header names a log that can be");
        assert!(header.log_length <= MAX_LOG_LENGTH, "a parsed header names a log that can be");
        Self { disk, header }
    }

    /// Finds what is to be replayed.
    ///
    /// # Errors
    /// Corrupt if the log holds entries of the header's LogGuid but no valid sequence of them; Truncated if
    /// the file is shorter than the newest entry says it was.
    pub async fn scan(&self, file_length: u64) -> Result<LogState> {
        if self.header.log_guid.is_nil() {
            return Ok(LogState::Clean);
        }
        let starts = self.find_starts().await?;
        let mut entries = BTreeMap::new();
        for (index, start) in starts.entries.iter().enumerate() {
            let reach = starts.reach(index, self.header.log_length);
            if let Some(found) = self.validate(start, reach).await? {
                entries.insert(start.position, found);
            }
        }
        let Some(active) = log::find_active(&entries, self.header.log_length) else {
            return if starts.any_with_guid { Err(self.no_sequence()) } else { Ok(LogState::Virgin) };
        };
        let newest = &entries[active.last().expect("a sequence has entries")];
        let number = |position: &u32| entries[position].sequence_number;
        let follows = |pair: &[u32]| number(&pair[0]).checked_add(1) == Some(number(&pair[1]));
        let planted = planted(Plant::KeepLaterEntries) || planted(Plant::ReplayBeforeTail);
        assert!(planted || active.windows(2).all(follows), "a sequence counts by one");
        assert!(planted || newest.tail == active[0], "a sequence begins at its tail");
        if file_length < newest.flushed_file_offset {
            let message = format!(
                "the file has {file_length} bytes, its newest log entry was written when it had {}",
                newest.flushed_file_offset
            );
            return Err(Error::new(Kind::Truncated, message).in_structure("log").remedy(CUT));
        }
        Ok(LogState::Dirty(active))
    }

    /// The entry at `position`, which a scan has found valid.
    ///
    /// # Errors
    /// Corrupt if it is no longer valid: another program writes to the file.
    pub async fn entry(&self, position: u32) -> Result<Entry> {
        assert!((position as usize).is_multiple_of(SECTOR), "an entry starts on a sector, not at {position}");
        assert!(position < self.header.log_length, "an entry starts in the log, not at {position}");
        let first = self.read(u64::from(position), SECTOR).await?;
        let header = EntryHeader::peek(&first, self.header.log_guid, self.header.log_length);
        let length = header.map_or(SECTOR, |header| header.entry_length as usize);
        let bytes = self.read_wrapped(position, length).await?;
        let range = self.header.log_offset..self.header.log_offset + u64::from(self.header.log_length);
        Entry::parse(&bytes, self.header.log_guid, range).map_err(|rejected| {
            Error::corrupt("log entry", format!("changed while it was replayed: {rejected}"))
                .at(self.header.log_offset + u64::from(position))
        })
    }

    async fn find_starts(&self) -> Result<Starts> {
        let mut starts = Starts::default();
        let length = u64::from(self.header.log_length);
        let mut position = 0;
        while position < length {
            let left = usize::try_from(length - position).expect("a log has at most 1 GiB");
            let chunk = self.read(position, left.min(CHUNK_BYTES)).await?;
            for (index, sector) in chunk.chunks_exact(SECTOR).enumerate() {
                starts.any_with_guid |= EntryHeader::carries(sector, self.header.log_guid);
                let position = position + (index * SECTOR) as u64;
                if sector.starts_with(b"loge") {
                    let header = EntryHeader::peek(sector, self.header.log_guid, self.header.log_length);
                    let position = u32::try_from(position).expect("a log has at most 1 GiB");
                    starts.entries.push(Start { position, header });
                }
            }
            position += CHUNK_BYTES as u64;
        }
        assert!(starts.entries.is_sorted_by_key(|start| start.position), "starts are in ring order");
        Ok(starts)
    }

    async fn validate(&self, start: &Start, reach: u32) -> Result<Option<EntryHeader>> {
        let Some(header) = start.header.as_ref().filter(|header| header.entry_length <= reach) else {
            return Ok(None);
        };
        let bytes = self.read_wrapped(start.position, header.entry_length as usize).await?;
        let range = self.header.log_offset..self.header.log_offset + u64::from(self.header.log_length);
        Ok(Entry::parse(&bytes, self.header.log_guid, range).ok().map(|entry| entry.header))
    }

    async fn read_wrapped(&self, position: u32, length: usize) -> Result<Vec<u8>> {
        assert!(length <= self.header.log_length as usize, "an entry of {length} bytes fits the log");
        let to_end = (self.header.log_length - position) as usize;
        let mut bytes = self.read(u64::from(position), length.min(to_end)).await?.to_vec();
        if length > to_end {
            bytes.extend_from_slice(&self.read(0, length - to_end).await?);
        }
        Ok(bytes)
    }

    async fn read(&self, position: u64, length: usize) -> Result<Buffer> {
        assert!(position + length as u64 <= self.header.log_length.into(), "reads stay in the log");
        let offset = self.header.log_offset + position;
        let result = self.disk.read(offset, length).await;
        result.map_err(|error| Error::io("reading the log", error).at(offset))
    }

    fn no_sequence(&self) -> Error {
        Error::corrupt("log", "the header says it holds changes, and no valid sequence of them is in it")
            .at(self.header.log_offset)
            .remedy(SALVAGE)
    }
}

#[derive(Default)]
struct Starts {
    /// Sectors that start as an entry does, in ring order.
    entries: Vec<Start>,
    any_with_guid: bool,
}

struct Start {
    position: u32,
    header: Option<EntryHeader>,
}

impl Starts {
    /// Bytes from start number `index` to the next one round the ring.
    fn reach(&self, index: usize, log_length: u32) -> u32 {
        let here = self.entries[index].position;
        match self.entries.get(index + 1) {
            Some(next) => {
                assert!(next.position > here, "starts are in ring order");
                next.position - here
            }
            None => log_length - here + self.entries[0].position,
        }
    }
}
