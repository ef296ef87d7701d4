//! Reading a damaged image: of every structure the best reading that is left.
//!
//! * Nothing is written, and nothing that is damaged is a reason to stop, as long as anything leads to the
//!   blocks. Only when neither a table nor a search finds the BAT is there no image.
//! * What is lost is known as lost: a block is either where its entry says, or nowhere. Bytes that cannot be
//!   read are missing, one page by one.
//! * What is assumed rather than read is noted as a guess, so that the caller can ask the user.
//! * Any bytes are an image here. Memory is bounded as it is for an image that opens, and by some bits for
//!   each block and for each MiB of the file; time by the file's stored bytes and by its BAT.

mod blocks;
mod front;
mod guess;
mod items;
mod notes;
mod regions;
mod search;
mod source;

pub use notes::Note;

use std::ops::Range;

use fixedbitset::FixedBitSet;
use uuid::Uuid;

use self::blocks::Blocks;
use self::front::Front;
use self::items::Items;
use self::notes::Notes;
use self::regions::Regions;
use self::search::Traces;
use self::source::Source;
use super::bat_reader::payload_extent;
use super::block_map::BlockMap;
use super::locate::{Location, locate};
use super::open::{PAYLOAD_IN_LOG, read_file_id};
use super::overlay::Overlay;
use super::space::Extent;
use super::view::View;
use crate::disk::{PAGE_BYTES, ReadDisk};
use crate::error::{Error, Kind, Result};
use crate::format::bat::{ENTRY_SIZE, Geometry, Role};
use crate::format::file_id::UNKNOWN;
use crate::format::header::Header;
use crate::format::metadata::Metadata;
use crate::format::{HEADER_SECTION, MIB, index};

/// Where bytes of a salvaged image are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trace {
    /// In its file, at this offset.
    File(u64),
    /// Nowhere: they are zeros.
    Zero,
    /// In the parent.
    Below,
    /// Not known any longer.
    Lost,
    /// No entry that is left leads to them, and the log is lost that may have had one.
    Unknown,
}

/// What is left of an image.
pub struct Salvaged {
    metadata: Metadata,
    header: Option<Header>,
    map: BlockMap,
    /// The slots of its BAT that the file has.
    stored: Vec<Range<u64>>,
    lost: FixedBitSet,
    overlay: Option<Overlay>,
    /// How long the file is, bytes.
    file_bytes: u64,
    /// How long the file and its log are: what should lie behind is missing.
    length: u64,
    has_whole_log: bool,
    resident_bytes: u64,
    notes: Vec<Note>,
}

impl Salvaged {
    /// Reads what is left of the image on `disk`.
    ///
    /// # Errors
    /// Corrupt if nothing leads to the blocks; errors of the host that say nothing of its medium.
    pub async fn read<D: ReadDisk>(disk: &D) -> Result<Self> {
        let mut notes = Notes::default();
        let Front { header, log, overlay, file_bytes, length, has_whole_log } =
            Front::read(disk, &mut notes).await?;
        let source = Source { disk, overlay: overlay.as_ref(), length };
        let regions = Regions::read(&source, &mut notes).await?;
        let (items, traces) = find_items(&source, &regions, &mut notes).await?;
        let bat = match find_bat(&regions, &items, traces.as_ref(), &mut notes) {
            Err(error) => return Err(other_format(disk, length).await.unwrap_or(error)),
            found => found?,
        };
        let metadata = guess::complete(&source, items, bat, &mut notes).await?;
        let geometry = Geometry::new(
            metadata.virtual_size,
            metadata.block_size,
            metadata.logical_sector_size,
            metadata.has_parent,
        );
        let whole = |extent: &Extent| Extent { length: extent.length.next_multiple_of(MIB), ..*extent };
        let fixtures = log.iter().chain(&regions.metadata).chain([&bat]).chain(&regions.others);
        let fixtures: Vec<Extent> = fixtures.map(whole).collect();
        let blocks = Blocks::read(&source, geometry, bat, &fixtures, &mut notes).await?;
        let (resident_bytes, notes) = (blocks.resident_bytes(), notes.0);
        let Blocks { map, lost, stored, .. } = blocks;
        Ok(Self {
            metadata,
            header,
            map,
            stored,
            lost,
            overlay,
            file_bytes,
            length,
            has_whole_log,
            resident_bytes,
            notes,
        })
    }

    /// The virtual disk, as far as it is known or assumed.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// What children know the image by, if that is left.
    pub fn data_write_guid(&self) -> Option<Uuid> {
        self.header.as_ref().map(|header| header.data_write_guid)
    }

    /// What a program changes when it begins to write to the image, if that is left.
    pub fn file_write_guid(&self) -> Option<Uuid> {
        self.header.as_ref().map(|header| header.file_write_guid)
    }

    /// The memory that it takes, bytes: its BAT as far as the file has one or has lost it, and its bits.
    pub fn resident_bytes(&self) -> u64 {
        self.resident_bytes + self.lost.count_ones(..) as u64 * ENTRY_SIZE as u64
    }

    /// What is damaged, and which readings were taken.
    pub fn notes(&self) -> &[Note] {
        &self.notes
    }

    /// Whether blocks that are nowhere are known to be nowhere. Otherwise the log, which is lost, may have
    /// named them last.
    pub fn knows_absent_blocks(&self) -> bool {
        self.has_whole_log
    }

    /// Where the bytes from virtual offset `from` on are, and the offset, `end` at most, at which that ends.
    pub fn locate(&self, from: u64, end: u64) -> (Trace, u64) {
        let geometry = self.map.geometry();
        assert!(from < end && end <= geometry.virtual_size(), "bytes {from} to {end} of the disk");
        let block = geometry.block_of_offset(from);
        if self.lost.contains(index(block)) {
            let kept = first_of(&self.lost, false, block..geometry.block_count());
            return (Trace::Lost, (kept * geometry.block_size()).min(end));
        }
        let (location, length) = locate(0, &self.map, from, end);
        let trace = match location {
            // A block may have lost its end only.
            Location::File { offset, .. } if offset >= self.length => return (Trace::Lost, from + length),
            Location::File { offset, .. } => {
                let stored = length.min(self.length - offset);
                return (Trace::File(offset), from + stored);
            }
            Location::Below => Trace::Below,
            Location::Lost => Trace::Lost,
            // The log may have said something newer.
            Location::Zero | Location::Undefined if !self.has_whole_log => Trace::Unknown,
            Location::Zero | Location::Undefined => Trace::Zero,
        };
        let past = from + length;
        let is_absent = location == Location::Undefined && self.map.load(block).entry.0 == 0;
        (trace, if is_absent { self.end_of_absence(block).clamp(past, end) } else { past })
    }

    /// Where each block lies, for a reader that knows the file and not its log: what is lost is lost in it.
    ///
    /// # Errors
    /// Unsupported if the log, which was replayed in memory, changes payload.
    pub fn into_map(mut self) -> Result<BlockMap> {
        if let Some(overlay) = &self.overlay
            && let Some(offset) = self.first_payload_in(overlay)
        {
            return Err(Error::new(Kind::Unsupported, PAYLOAD_IN_LOG)
                .in_structure("log")
                .at(offset)
                .remedy("`vhdx-ublk salvage FILE COPY` makes a copy that has it"));
        }
        self.map.set_file_bytes(self.file_bytes);
        self.map.lose(self.lost.ones().map(|block| block as u64), self.length);
        Ok(self.map)
    }

    /// Where in the file the first byte of a block lies that the log has changed, if there is one.
    fn first_payload_in(&self, overlay: &Overlay) -> Option<u64> {
        let geometry = self.map.geometry();
        for (_, role) in self.stored.iter().cloned().flat_map(|slots| geometry.walk(slots)) {
            let Role::Block(block) = role else { continue };
            let extent = payload_extent(self.map.load(block).entry, geometry);
            let changed = extent.and_then(|extent| overlay.first_in(extent.offset..extent.end()));
            if changed.is_some() && !self.lost.contains(index(block)) {
                return changed;
            }
        }
        None
    }

    /// The end of the absent blocks from `block` on, as far as one look shows: of a large disk there are
    /// millions.
    fn end_of_absence(&self, block: u64) -> u64 {
        let geometry = self.map.geometry();
        let set = self.map.first_set(block..geometry.block_count());
        first_of(&self.lost, true, block..set) * geometry.block_size()
    }

    /// Reads `target` from offset `offset` of the file on `disk`, of which this image was read: which bytes
    /// of the target are missing, ascending; zeros stand for them.
    ///
    /// # Errors
    /// Errors of the host that say nothing of its medium.
    pub async fn read_file<D: ReadDisk>(
        &self,
        disk: &D,
        offset: u64,
        target: &mut [u8],
    ) -> Result<Vec<Range<u64>>> {
        let source = Source { disk, overlay: self.overlay.as_ref(), length: self.length };
        let from = offset - offset % PAGE_BYTES as u64;
        let within = index(offset - from);
        let end = within + target.len();
        let found = source.read(from, end.next_multiple_of(PAGE_BYTES)).await?;
        target.copy_from_slice(&found.bytes[within..end]);
        let wanted = offset..offset + target.len() as u64;
        let missing = found.missing.into_iter().filter_map(|range| {
            let both = range.start.max(wanted.start)..range.end.min(wanted.end);
            (!both.is_empty()).then(|| both.start - offset..both.end - offset)
        });
        Ok(missing.collect())
    }
}

/// What is left to do where no structure leads to the disk.
const NOTHING_LEFT: &str =
    "keep the file: programs that search for files by their content (photorec) can be run over it";

/// The first of `blocks` that is lost, or that is not, their end if none is: a large disk has millions.
fn first_of(lost: &FixedBitSet, is_lost: bool, blocks: Range<u64>) -> u64 {
    const BITS: u64 = usize::BITS as u64;
    let mut block = blocks.start;
    while block < blocks.end {
        let word = lost.as_slice()[index(block / BITS)];
        let word = if is_lost { word } else { !word } >> (block % BITS);
        if word != 0 {
            return blocks.end.min(block + u64::from(word.trailing_zeros()));
        }
        block = (block / BITS + 1) * BITS;
    }
    blocks.end
}

/// The items of the metadata, and what a search has found if one was needed.
async fn find_items<D: ReadDisk>(
    source: &Source<'_, D>,
    regions: &Regions,
    notes: &mut Notes,
) -> Result<(Items, Option<Traces>)> {
    let mut items = match regions.metadata {
        Some(region) => Items::read(source, region, notes).await?,
        None => Items::default(),
    };
    if items.count() > 0 && regions.bat.is_some() {
        return Ok((items, None));
    }
    let traces = Traces::search(source).await?;
    let mut places = 0;
    for offset in traces.metadata.iter().copied().filter(|offset| *offset >= HEADER_SECTION) {
        let mut found_notes = Notes::default();
        let found = Items::read(source, Extent { offset, length: MIB }, &mut found_notes).await?;
        places += usize::from(found.count() > 0);
        if found.count() > items.count() {
            items = found;
            notes.guess("metadata", format!("a metadata region was found at byte {offset} by its signature"));
            notes.0.append(&mut found_notes.0);
        }
    }
    if places > 1 {
        notes
            .add("metadata", format!("{places} places look like a metadata region; the fullest one is used"));
    }
    Ok((items, Some(traces)))
}

/// The refusal of a file that is of another format, if it is of a known one.
async fn other_format<D: ReadDisk>(disk: &D, length: u64) -> Option<Error> {
    let found = read_file_id(&View { disk, overlay: None }, length).await.err()?;
    (found.kind() == Kind::NotVhdx && found.remedy_text() != Some(UNKNOWN)).then_some(found)
}

/// Where the BAT is.
fn find_bat(regions: &Regions, items: &Items, traces: Option<&Traces>, notes: &mut Notes) -> Result<Extent> {
    if let Some(bat) = regions.bat {
        return Ok(bat);
    }
    let geometry = match (items.file, items.size, items.logical) {
        (Some((block_size, _, child)), Some(size), Some(sector)) if size.is_multiple_of(sector.into()) => {
            Some(Geometry::new(size, block_size, sector, child))
        }
        _ => None,
    };
    let length = geometry.map(|geometry| geometry.bat_length());
    let likely = traces.map(|traces| traces.bats(length)).unwrap_or_default();
    let Some(first) = likely.first() else {
        let message = "no region table is left, and nothing in the file looks like a BAT with blocks";
        return Err(Error::new(Kind::Corrupt, message).in_structure("BAT").remedy(NOTHING_LEFT));
    };
    let offset = first.extent.offset;
    notes.guess("BAT", format!("it was found at byte {offset} by its shape: {} blocks", first.blocks));
    if let Some(second) = likely.get(1) {
        let (offset, blocks) = (second.extent.offset, second.blocks);
        notes.add(
            "BAT",
            format!(
                "{} places look like one; the next best is at byte {offset}, of {blocks} blocks",
                likely.len()
            ),
        );
    }
    Ok(first.extent)
}
