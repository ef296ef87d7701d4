//! Opening an image: every structure read, checked and put into types that cannot be wrong.
//!
//! Order: file identifier, headers, log (replayed in place or in memory), region tables, metadata, BAT.
//! Nothing behind the log is believed before the log has been replayed.

use std::ops::{Deref, DerefMut, Range};

use uuid::Uuid;

use super::bat_reader::read_bat;
use super::bitmap_reader::{partial_blocks, read_bitmaps};
use super::block_map::BlockMap;
use super::headers::Headers;
use super::log_scan::{Log, LogState};
use super::overlay::Overlay;
use super::pending::Pending;
use super::replay;
use super::space::{Extent, Space};
use super::view::{CUT_SHORT, View, file_length, present};
use crate::disk::{Disk, PAGE_BYTES, ReadDisk};
use crate::error::{Error, Kind, Result};
use crate::format::MIB;
use crate::format::bat::{BITMAP_BLOCK_SIZE, BitmapState, ENTRY_SIZE, Geometry};
use crate::format::file_id::{self, FileId};
use crate::format::header::{self, Current};
use crate::format::metadata::{self, Metadata};
use crate::format::region::{self, CurrentTable, Region};

/// Where the metadata lies, bytes.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// The log; of length 0 if the image has none.
    pub log: Extent,
    /// The BAT region.
    pub bat: Extent,
    /// The metadata region.
    pub metadata: Extent,
    /// The file's length, after replay.
    pub file_length: u64,
}

/// How the log was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoundLog {
    /// Empty.
    Clean,
    /// So many entries had to be replayed.
    Dirty(usize),
    /// Named by the header, never written.
    Virgin,
}

impl FoundLog {
    fn of(log: &LogState) -> Self {
        match log {
            LogState::Clean => Self::Clean,
            LogState::Virgin => Self::Virgin,
            LogState::Dirty(positions) => Self::Dirty(positions.len()),
        }
    }
}

/// An image: every structure read and checked. How it was opened decides what may be done with it; see
/// [`ReadImage`] and [`WritableImage`].
pub struct Image {
    /// The program that made the file, as the file names it.
    pub creator: String,
    /// The current header, after replay.
    pub header: Current,
    /// How the log was found.
    pub found_log: FoundLog,
    /// Both region tables.
    pub regions: CurrentTable,
    /// The virtual disk.
    pub metadata: Metadata,
    /// Where the metadata lies.
    pub layout: Layout,
    /// Where each block lies.
    pub map: BlockMap,
    /// The slots that the file stores, ascending; all others lie in holes of the BAT and are zero.
    pub stored_slots: Vec<Range<u64>>,
    /// What occupies the file.
    pub space: Space,
}

/// An image that is only read: a dirty log is replayed in memory.
pub struct ReadImage {
    image: Image,
    overlay: Option<Overlay>,
}

/// An image that may be written: a dirty log was replayed in place, and the log is empty.
pub struct WritableImage {
    image: Image,
    pub(super) pending: Pending,
}

/// What every open finds first.
pub(super) struct Found {
    pub(super) creator: String,
    pub(super) header: Current,
    pub(super) log: LogState,
    /// The file's length, bytes.
    pub(super) length: u64,
}

impl Found {
    /// Follows `disk` up to its log. A log longer than `longest_log` bytes is taken for empty.
    pub(super) async fn on<D: ReadDisk>(disk: &D, longest_log: u64) -> Result<Self> {
        let file = View { disk, overlay: None };
        let length = file.length().await?;
        let creator = read_file_id(&file, length).await?.creator;
        let header = read_headers(&file, length).await?;
        check_log_place(&header, length)?;
        let log = if u64::from(header.header.log_length) <= longest_log {
            Log::new(disk, &header.header).scan(length).await?
        } else {
            LogState::Clean
        };
        Ok(Self { creator, header, log, length })
    }
}

impl Image {
    /// Reads the image on `disk`.
    ///
    /// # Errors
    /// Whatever contradicts the format, by structure and offset; unsupported if its log changes payload,
    /// which is not replayed in memory; I/O errors.
    pub async fn read<D: ReadDisk>(disk: &D) -> Result<ReadImage> {
        let Found { creator, header, log, length } = Found::on(disk, u64::MAX).await?;
        let found_log = FoundLog::of(&log);
        let overlay = match log.positions() {
            Some(positions) => Some(replay::in_memory(disk, &header.header, &positions, length).await?),
            None => None,
        };
        let file = View { disk, overlay: overlay.as_ref() };
        let image = Self::behind_log(&file, creator, header, found_log).await?;
        if let Some(overlay) = &overlay {
            check_overlay(overlay, &image)?;
        }
        Ok(ReadImage { image, overlay })
    }

    /// Opens the image on `disk` for writing. A dirty log is replayed in place; nothing else is written
    /// before the first modification.
    ///
    /// # Errors
    /// Whatever contradicts the format, by structure and offset; I/O errors.
    pub async fn open_for_writing<D: Disk>(
        disk: &D,
        new_guid: impl FnOnce() -> Uuid,
    ) -> Result<WritableImage> {
        let Found { creator, mut header, log, .. } = Found::on(disk, u64::MAX).await?;
        let found_log = FoundLog::of(&log);
        let file = View { disk, overlay: None };
        if let Some(positions) = log.positions() {
            replay::in_place(disk, &mut Headers::new(&header)?, &positions, new_guid()).await?;
            header = read_headers(&file, file.length().await?).await?;
        }
        let image = Self::behind_log(&file, creator, header, found_log).await?;
        Ok(WritableImage { image, pending: Pending::default() })
    }

    /// Reads what lies behind the log, which `file` shows as replayed.
    async fn behind_log<D: ReadDisk>(
        file: &View<'_, D>,
        creator: String,
        header: Current,
        found_log: FoundLog,
    ) -> Result<Self> {
        let length = file.length().await?;
        let regions = read_regions(file, length).await?;
        let metadata = read_metadata(file, regions.table.metadata()).await?;
        let layout = Layout {
            log: Extent { offset: header.header.log_offset, length: header.header.log_length.into() },
            bat: extent_of(regions.table.bat()),
            metadata: extent_of(regions.table.metadata()),
            file_length: length,
        };
        assert!(layout.metadata.length >= MIB, "a checked region table has a metadata region");
        let mut space = Space::new(length)?;
        if layout.log.length > 0 {
            // Whole MiB by the format; a simulation's short log takes the rest of its MiB.
            let length = layout.log.length.next_multiple_of(MIB);
            space.occupy(Extent { length, ..layout.log }, "log")?;
        }
        for region in regions.table.entries() {
            space.occupy(extent_of(*region), "region")?;
        }
        let geometry = Geometry::new(
            metadata.virtual_size,
            metadata.block_size,
            metadata.logical_sector_size,
            metadata.has_parent,
        );
        let (map, stored_slots) = read_bat(file, geometry, layout.bat, length, &mut space).await?;
        // Of the file itself: a log that was replayed in memory may say more.
        map.set_file_bytes(file_length(file.disk).await?);
        Ok(Self { creator, header, found_log, regions, metadata, layout, map, stored_slots, space })
    }

    /// The memory that the image takes while it is open, bytes: its BAT as far as the file has one, and the
    /// bits of its partially present blocks.
    pub fn resident_bytes(&self) -> u64 {
        let geometry = self.map.geometry();
        let bits = |slots: &Range<u64>| {
            let partial = partial_blocks(&self.map, slots.clone());
            partial
                .map(|block| geometry.bitmap_slice(block))
                .map(|slice| slice.end - slice.start)
                .sum::<u64>()
        };
        let slots = |slots: &Range<u64>| (slots.end - slots.start) * ENTRY_SIZE as u64;
        self.stored_slots.iter().map(|stored| slots(stored) + bits(stored)).sum()
    }

    /// Refuses what a writer cannot work with.
    ///
    /// # Errors
    /// Unsupported if the image has no log, or a log too short to be written.
    pub fn check_writable(&self) -> Result<()> {
        if self.layout.log.length == 0 {
            return Err(Error::new(
                Kind::Unsupported,
                "the image has no log, which every change must go through",
            )
            .in_structure("header")
            .remedy("open it read-only, or convert it"));
        }
        Headers::new(&self.header).map(|_| ())
    }
}

impl ReadImage {
    /// The replayed log, if there was one.
    pub fn overlay(&self) -> Option<&Overlay> {
        self.overlay.as_ref()
    }

    /// Reads the sector bitmaps from `disk`, on which this image is, into its map.
    ///
    /// # Errors
    /// Corrupt if one is missing; unsupported if they take more than [`super::MAX_BITMAP_BYTES`]; I/O errors.
    pub async fn read_bitmaps<D: ReadDisk>(&self, disk: &D) -> Result<()> {
        let file = View { disk, overlay: self.overlay() };
        read_bitmaps(&file, &self.map, &self.stored_slots).await
    }

    /// As [`Self::read_bitmaps`], of these blocks only.
    ///
    /// # Errors
    /// Those of [`Self::read_bitmaps`].
    pub async fn read_bitmaps_of<D: ReadDisk>(&self, disk: &D, blocks: Range<u64>) -> Result<()> {
        assert!(blocks.start < blocks.end, "{blocks:?} are blocks");
        let file = View { disk, overlay: self.overlay() };
        let geometry = self.map.geometry();
        let slots = geometry.payload_slot(blocks.start)..geometry.payload_slot(blocks.end - 1) + 1;
        read_bitmaps(&file, &self.map, std::slice::from_ref(&slots)).await
    }

    /// Where each block lies.
    pub fn into_map(self) -> BlockMap {
        self.image.map
    }

    /// The same image for writing, if its log was found clean: there is nothing to be replayed.
    pub fn into_writable(self) -> Option<WritableImage> {
        let Self { image, overlay } = self;
        assert!(overlay.is_none() || image.found_log != FoundLog::Clean, "a clean log changes nothing");
        (image.found_log == FoundLog::Clean).then(|| WritableImage { image, pending: Pending::default() })
    }
}

impl WritableImage {
    /// The image, and what a killed process left to be committed.
    pub fn into_parts(self) -> (Image, Pending) {
        (self.image, self.pending)
    }

    /// The same image, whose disk has grown in a session that left unused space in the file.
    #[must_use]
    pub(crate) fn in_session(mut self) -> Self {
        self.pending.grown = true;
        self
    }

    /// What a killed process left to be committed.
    pub fn pending(&self) -> &Pending {
        &self.pending
    }

    /// As [`ReadImage::read_bitmaps`].
    ///
    /// # Errors
    /// Those of [`ReadImage::read_bitmaps`].
    pub async fn read_bitmaps<D: ReadDisk>(&self, disk: &D) -> Result<()> {
        read_bitmaps(&View { disk, overlay: None }, &self.map, &self.stored_slots).await
    }
}

impl From<WritableImage> for ReadImage {
    fn from(WritableImage { image, .. }: WritableImage) -> Self {
        Self { image, overlay: None }
    }
}

impl Deref for ReadImage {
    type Target = Image;

    fn deref(&self) -> &Image {
        &self.image
    }
}

impl Deref for WritableImage {
    type Target = Image;

    fn deref(&self) -> &Image {
        &self.image
    }
}

impl DerefMut for WritableImage {
    fn deref_mut(&mut self) -> &mut Image {
        &mut self.image
    }
}

/// The structure's name, as errors have it.
pub(super) const FILE_ID: &str = "file identifier";

/// The file identifier. A file without it is refused, by the name of what it looks like; [`Kind::Corrupt`] if
/// a valid header or region table is in its place, so that it is a VHDX all the same.
pub(super) async fn read_file_id<D: ReadDisk>(file: &View<'_, D>, length: u64) -> Result<FileId> {
    let first = file.read(FILE_ID, 0, FileId::SIZE).await?;
    match FileId::parse(&first[..present(0, FileId::SIZE, length)]) {
        Err(error) if error.kind() == Kind::NotVhdx => Err(without_signature(file, length).await?),
        parsed => parsed,
    }
}

/// What a file is that does not begin as a VHDX does.
async fn without_signature<D: ReadDisk>(file: &View<'_, D>, length: u64) -> Result<Error> {
    let headers = read_headers(file, length).await.is_ok();
    let regions = read_regions(file, length).await.is_ok();
    if headers || regions {
        let left = match (headers, regions) {
            (true, true) => "the headers and region tables behind it are intact",
            (true, false) => "the headers behind it are intact, and no region table is",
            (false, _) => "both headers are damaged, and the region tables behind them are intact",
        };
        let message =
            format!("the signature is missing, but {left}: a VHDX whose first bytes were overwritten");
        let remedy =
            "`vhdx-ublk check FILE` shows what is left, and whether --repair can restore the signature";
        return Ok(Error::corrupt(FILE_ID, message).at(0).remedy(remedy));
    }
    let front = file.read(FILE_ID, 0, file_id::PROBED_FRONT).await?;
    let page = length.saturating_sub(1) / PAGE_BYTES as u64 * PAGE_BYTES as u64;
    let last = file.read(FILE_ID, page, PAGE_BYTES).await?;
    let last = &last[..present(page, PAGE_BYTES, length)];
    let end = &last[last.len().saturating_sub(file_id::PROBED_END)..];
    Ok(file_id::not_vhdx(&front[..present(0, file_id::PROBED_FRONT, length)], end))
}

/// The bytes of both headers, fewer where the file ends.
pub(super) async fn read_header_slots<D: ReadDisk>(
    file: &View<'_, D>,
    file_length: u64,
) -> Result<[Vec<u8>; 2]> {
    let first = file.read("header 1", header::OFFSETS[0], header::SIZE).await?;
    let second = file.read("header 2", header::OFFSETS[1], header::SIZE).await?;
    let [first_bytes, second_bytes] =
        header::OFFSETS.map(|offset| present(offset, header::SIZE, file_length));
    Ok([first[..first_bytes].to_vec(), second[..second_bytes].to_vec()])
}

pub(super) async fn read_headers<D: ReadDisk>(file: &View<'_, D>, file_length: u64) -> Result<Current> {
    let [first, second] = read_header_slots(file, file_length).await?;
    header::current([&first, &second])
}

pub(super) fn check_log_place(header: &Current, file_length: u64) -> Result<()> {
    let end = header.header.log_offset + u64::from(header.header.log_length);
    if end > file_length {
        return Err(truncated("log", header.header.log_offset, end, file_length));
    }
    Ok(())
}

pub(super) fn truncated(structure: &'static str, offset: u64, end: u64, file_length: u64) -> Error {
    let message = format!("ends at byte {end}, the file has only {file_length} bytes");
    Error::new(Kind::Truncated, message).in_structure(structure).at(offset).remedy(CUT_SHORT)
}

pub(super) async fn read_regions<D: ReadDisk>(file: &View<'_, D>, file_length: u64) -> Result<CurrentTable> {
    let first = file.read("region table 1", region::OFFSETS[0], region::SIZE).await?;
    let second = file.read("region table 2", region::OFFSETS[1], region::SIZE).await?;
    let regions = region::current([&first, &second])?;
    for entry in regions.table.entries() {
        if entry.end() > file_length {
            return Err(truncated("region", entry.offset, entry.end(), file_length));
        }
    }
    Ok(regions)
}

pub(super) async fn read_table<D: ReadDisk>(file: &View<'_, D>, region: Region) -> Result<metadata::Table> {
    let bytes = file.read("metadata table", region.offset, metadata::TABLE_SIZE).await?;
    metadata::Table::parse(&bytes, region.length).map_err(|error| error.at(region.offset))
}

pub(super) async fn read_metadata<D: ReadDisk>(file: &View<'_, D>, region: Region) -> Result<Metadata> {
    let table = read_table(file, region).await?;
    let mut items = Vec::new();
    for entry in table.system_items() {
        items.push((*entry, read_item(file, region, entry).await?));
    }
    Metadata::from_table(&table, |wanted| {
        items.iter().find(|(entry, _)| entry == wanted).map(|(_, bytes)| bytes.clone())
    })
    .map_err(|error| error.at(region.offset))
}

/// The bytes of the item that `entry` of the metadata in `region` names.
pub(super) async fn read_item<D: ReadDisk>(
    file: &View<'_, D>,
    region: Region,
    entry: &metadata::Entry,
) -> Result<Vec<u8>> {
    let start = region.offset + u64::from(entry.offset);
    let page_start = start - start % PAGE_BYTES as u64;
    let within = usize::try_from(start - page_start).expect("below a page");
    let length = within + entry.length as usize;
    let bytes = file.read("metadata item", page_start, length.next_multiple_of(PAGE_BYTES)).await?;
    Ok(bytes[within..length].to_vec())
}

/// Why an image whose log was replayed in memory is not read.
pub(super) const PAYLOAD_IN_LOG: &str = "the log changes payload, which is not replayed in memory";

/// A log that was replayed in memory must not change payload: that is read from the file directly.
fn check_overlay(overlay: &Overlay, image: &Image) -> Result<()> {
    let regions = image.regions.table.entries().iter().copied().map(extent_of);
    let mut metadata: Vec<Extent> =
        regions.chain([image.layout.log]).chain(bitmap_blocks(&image.map)).collect();
    metadata.sort();
    for range in overlay.ranges().filter(|range| range.end > crate::format::HEADER_SECTION) {
        let behind = metadata.partition_point(|extent| extent.offset <= range.start);
        let inside = behind > 0 && range.end <= metadata[behind - 1].end();
        if !inside && image.space.is_used(range.start.max(crate::format::HEADER_SECTION)..range.end) {
            return Err(Error::new(Kind::Unsupported, PAYLOAD_IN_LOG)
                .in_structure("log")
                .at(range.start)
                .remedy("open the image for writing once, which replays the log in place"));
        }
    }
    Ok(())
}

/// Where the sector bitmaps are that the file has.
fn bitmap_blocks(map: &BlockMap) -> impl Iterator<Item = Extent> {
    let geometry = *map.geometry();
    let chunks = if geometry.is_differencing() { geometry.bitmap_block_count() } else { 0 };
    let entries = (0..chunks).map(move |chunk| map.load_slot(geometry.bitmap_slot(chunk)).entry);
    let present = entries.filter(|entry| entry.bitmap_state() == Some(BitmapState::Present));
    present.map(|entry| Extent { offset: entry.offset(), length: BITMAP_BLOCK_SIZE })
}

pub(super) fn extent_of(region: Region) -> Extent {
    Extent { offset: region.offset, length: region.length.into() }
}
