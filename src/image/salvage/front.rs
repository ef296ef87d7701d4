//! What lies in front of the regions: file identifier, headers, and the log that they name.
//!
//! None of them is needed. A header gives the log, and the GUID by which children know the image. Without a
//! log that should be there, the newest changes of the metadata are missing: what no block says of the disk
//! is then in doubt.

use super::notes::Notes;
use super::source::Forgiving;
use crate::disk::{PAGE_BYTES, ReadDisk};
use crate::error::{Error, Kind, Result};
use crate::format::file_id::FileId;
use crate::format::header::{self, Header, Other};
use crate::image::log_scan::{Log, LogState};
use crate::image::open::read_header_slots;
use crate::image::overlay::Overlay;
use crate::image::replay;
use crate::image::space::Extent;
use crate::image::view::{View, file_length};

/// What is left of the front.
pub(super) struct Front {
    /// The newest header, if one is left.
    pub(super) header: Option<Header>,
    /// Where the log lies, if a header says it.
    pub(super) log: Option<Extent>,
    /// The replayed log, if there is anything in it.
    pub(super) overlay: Option<Overlay>,
    /// How long the file is, bytes.
    pub(super) file_bytes: u64,
    /// How long it should be.
    pub(super) length: u64,
    /// Everything that the log may hold is known.
    pub(super) has_whole_log: bool,
}

impl Front {
    pub(super) async fn read<D: ReadDisk>(disk: &D, notes: &mut Notes) -> Result<Self> {
        let forgiving = Forgiving::new(disk);
        let length = file_length(disk).await?;
        note_file_id(&forgiving, notes).await?;
        let mut front =
            Self { header: None, log: None, overlay: None, file_bytes: length, length, has_whole_log: false };
        if let Some(header) = read_header(&forgiving, length, notes).await? {
            let log = Extent { offset: header.log_offset, length: header.log_length.into() };
            front.log = Some(log);
            front.replay(disk, &header, notes).await?;
            front.header = Some(header);
        }
        Ok(front)
    }

    /// Replays the log that `header` names, in memory.
    async fn replay<D: ReadDisk>(&mut self, disk: &D, header: &Header, notes: &mut Notes) -> Result<()> {
        if !header.needs_replay() {
            self.has_whole_log = true;
            return Ok(());
        }
        let ignored = "it is ignored: what was written last may be old, or missing";
        if header.log_offset + u64::from(header.log_length) > self.length {
            notes.add("log", format!("it lies beyond the end of the file; {ignored}"));
            return Ok(());
        }
        let forgiving = Forgiving::new(disk);
        let replayed = replayed(&forgiving, header, self.length).await;
        match replayed {
            _ if forgiving.has_forgiven() => {
                notes.add("log", format!("a part of it cannot be read; {ignored}"));
            }
            // A log that was just begun looks the same: a header names it before its first entry. But an
            // image that is salvaged has been damaged.
            Ok(None) => notes.add("log", format!("it has no entry, or has lost all; {ignored}")),
            Err(error) if error.kind() == Kind::Io => return Err(error),
            Err(error) => notes.add("log", format!("it cannot be replayed ({}); {ignored}", error.message())),
            Ok(Some((overlay, is_cut))) => {
                if is_cut {
                    notes.add("log", "the file is shorter than the newest entry says; it is replayed");
                } else {
                    self.length = self.length.max(overlay.file_length());
                }
                (self.overlay, self.has_whole_log) = (Some(overlay), true);
            }
        }
        Ok(())
    }
}

/// The replayed log of a file of `length` bytes, and whether the file has lost its end since the log was
/// written. Nothing if there are no entries.
async fn replayed<D: ReadDisk>(disk: &D, header: &Header, length: u64) -> Result<Option<(Overlay, bool)>> {
    let log = Log::new(disk, header);
    let (state, is_cut) = match log.scan(length).await {
        Err(error) if error.kind() == Kind::Truncated => (log.scan(u64::MAX).await?, true),
        state => (state?, false),
    };
    let LogState::Dirty(positions) = state else { return Ok(None) };
    Ok(Some((replay::in_memory(disk, header, &positions, length).await?, is_cut)))
}

async fn note_file_id<D: ReadDisk>(file: &Forgiving<'_, D>, notes: &mut Notes) -> Result<()> {
    let first = file.read(0, PAGE_BYTES).await.map_err(|error| Error::io("reading the file", error))?;
    if FileId::parse(&first).is_err() {
        notes.add("file identifier", "the signature of a VHDX is missing; the rest decides");
    }
    Ok(())
}

/// The newest header that is left.
async fn read_header<D: ReadDisk>(
    file: &Forgiving<'_, D>,
    length: u64,
    notes: &mut Notes,
) -> Result<Option<Header>> {
    let slots = read_header_slots(&View { disk: file, overlay: None }, length).await?;
    let [first, second] = slots.each_ref().map(|slot| &slot[..]);
    let refused = match header::current([first, second]) {
        Ok(current) => {
            if current.other == Other::Invalid {
                notes
                    .add("headers", format!("header {} is damaged; the other one is used", 2 - current.slot));
            }
            return Ok(Some(current.header));
        }
        Err(error) => error.message(),
    };
    let (first, second) = (Header::parse(first).ok(), Header::parse(second).ok());
    // A clean close empties the log in both: of two that contradict each other, the one with a log holds
    // more.
    let both = first.is_some() && second.is_some();
    let chosen = first.filter(|first| !both || first.needs_replay()).map(|header| (1, header));
    let chosen = chosen.or(second.map(|header| (2, header)));
    let then = match &chosen {
        Some((number, _)) => format!("header {number} is used"),
        None => "nothing is known of the log: what was written last may be old, or missing".into(),
    };
    notes.add("headers", format!("{refused}; {then}"));
    Ok(chosen.map(|(_, header)| header))
}
