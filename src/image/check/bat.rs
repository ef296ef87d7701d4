//! The BAT, entry by entry.

use std::fmt;

use super::super::bat_reader::{BAT_CHUNK_BYTES, payload_extent};
use super::super::space::{Extent, Space};
use super::super::view::CUT_SHORT;
use super::super::view::View;
use super::{Examination, Finding};
use crate::disk::{PAGE_BYTES, ReadDisk};
use crate::error::Result;
use crate::format::bat::{BITMAP_BLOCK_SIZE, BatEntry, BitmapState, ENTRY_SIZE, Geometry, PayloadState};
use crate::format::metadata::{DiskType, Metadata};
use crate::format::region::Region;

const BAT: &str = "BAT";

/// What cannot be repaired, because it may be data.
const UNKNOWN_ENTRY: &str =
    "the correct entry is unknown; `vhdx-ublk salvage FILE COPY` copies all blocks but those that are lost";

/// Who names space.
#[derive(Clone, Copy)]
enum Owner {
    Block(u64),
    Bitmap(u64),
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block(block) => write!(f, "block {block}"),
            Self::Bitmap(chunk) => write!(f, "the sector bitmap of chunk {chunk}"),
        }
    }
}

/// The walk along the BAT.
struct Walk<'a> {
    found: &'a mut Examination,
    space: &'a mut Space,
    geometry: Geometry,
    /// Where the BAT starts, bytes.
    start: u64,
    file_length: u64,
    /// The chunk whose partial blocks have not met their bitmap yet.
    owed_bitmap: Option<u64>,
}

impl Examination {
    /// Examines every entry that the region holds; `false` if those are not all.
    pub(super) async fn bat<D: ReadDisk>(
        &mut self,
        file: &View<'_, D>,
        metadata: &Metadata,
        region: Region,
        file_length: u64,
        space: &mut Space,
    ) -> Result<bool> {
        let Metadata { virtual_size, block_size, logical_sector_size, has_parent, .. } = *metadata;
        let geometry = Geometry::new(virtual_size, block_size, logical_sector_size, has_parent);
        self.report.blocks = geometry.block_count();
        let room = u64::from(region.length).min(file_length.saturating_sub(region.offset));
        if geometry.bat_length() > room {
            let what = format!("has {room} bytes, the disk needs {}", geometry.bat_length());
            self.report.add(Finding::corruption(BAT, region.offset, what));
        }
        let slots = geometry.slot_count().min(room / ENTRY_SIZE as u64);
        let mut walk =
            Walk { found: self, space, geometry, start: region.offset, file_length, owed_bitmap: None };
        walk.along(file, slots).await?;
        walk.settle_bitmap(u64::MAX);
        let missing = self.report.blocks - self.report.allocated_blocks;
        if metadata.kind() == DiskType::Fixed && missing > 0 {
            let what = format!("the image is fixed, and {missing} of its blocks have no space yet");
            self.report.add(Finding::note(BAT, region.offset, what));
        }
        Ok(slots == geometry.slot_count())
    }
}

impl Walk<'_> {
    async fn along<D: ReadDisk>(&mut self, file: &View<'_, D>, slots: u64) -> Result<()> {
        let end = slots * ENTRY_SIZE as u64;
        let mut done = 0;
        while let Some(next) = file.next_stored(self.start + done).await? {
            // What lies between is a hole: entries that are all zero, and those are always right.
            done = next - self.start;
            if done >= end {
                break;
            }
            let length = (end - done).min(BAT_CHUNK_BYTES).next_multiple_of(PAGE_BYTES as u64);
            let length = usize::try_from(length).expect("at most 1 MiB");
            assert!(done.is_multiple_of(PAGE_BYTES as u64), "the BAT is read by pages, at {done}");
            let bytes = file.read(BAT, self.start + done, length).await?;
            let first = done / ENTRY_SIZE as u64;
            for (slot, word) in (first..slots).zip(bytes.as_chunks::<ENTRY_SIZE>().0) {
                let entry = BatEntry::read(*word);
                if entry.0 != 0 {
                    self.entry(slot, entry);
                }
            }
            done += length as u64;
        }
        Ok(())
    }

    fn entry(&mut self, slot: u64, entry: BatEntry) {
        match self.geometry.block_of_slot(slot) {
            Some(block) => self.payload(slot, block, entry),
            None if !self.geometry.is_bitmap_slot(slot) => {}
            None if self.geometry.is_differencing() => self.bitmap(slot, entry),
            None => {
                let what =
                    format!("BAT entry {slot} is a sector bitmap's, which an image without parent has not");
                self.mend(slot, Finding::note(BAT, self.place(slot), what), BatEntry::not_present());
            }
        }
    }

    fn payload(&mut self, slot: u64, block: u64, entry: BatEntry) {
        let Some(state) = entry.payload_state() else {
            return self.beyond_repair(slot, format!("block {block} has the reserved state 4"));
        };
        if matches!(state, PayloadState::FullyPresent | PayloadState::PartiallyPresent) {
            self.found.report.allocated_blocks += 1;
        }
        if state == PayloadState::PartiallyPresent {
            if !self.geometry.is_differencing() {
                let what = format!("block {block} is partially present, in an image without parent");
                return self.beyond_repair(slot, what);
            }
            self.owe_bitmap(self.geometry.chunk_of_block(block));
        }
        if let Some(extent) = payload_extent(entry, &self.geometry) {
            let present = matches!(state, PayloadState::FullyPresent | PayloadState::PartiallyPresent);
            let needed = if present { self.geometry.disk_bytes_of(block) } else { 0 };
            if !self.place_block(slot, Owner::Block(block), extent, needed) {
                return;
            }
        }
        let places = !matches!(state, PayloadState::NotPresent | PayloadState::Zero);
        let mended = BatEntry(if places { entry.offset() } else { 0 } | state as u64);
        if mended != entry {
            self.mend(slot, self.payload_fault(slot, block, entry), mended);
        }
    }

    /// What is wrong with an entry whose meaning is clear.
    fn payload_fault(&self, slot: u64, block: u64, entry: BatEntry) -> Finding {
        let at = self.place(slot);
        if entry.reserved_bits() != 0 {
            let what = format!("block {block} has reserved bits {:#x} set", entry.reserved_bits());
            return Finding::corruption(BAT, at, what);
        }
        if entry.is_beta_unmapped() {
            let what = format!("block {block} has state 5, which only the format's beta had: unmapped");
            return Finding::corruption(BAT, at, what);
        }
        let what = format!("block {block} has no data, and names byte {}: Windows refuses", entry.offset());
        Finding::note(BAT, at, what)
    }

    fn bitmap(&mut self, slot: u64, entry: BatEntry) {
        let chunk = slot / (self.geometry.chunk_ratio() + 1);
        assert_eq!(self.geometry.bitmap_slot(chunk), slot, "slot {slot} is a bitmap's");
        let Some(state) = entry.bitmap_state() else {
            let what = format!("the sector bitmap of chunk {chunk} has a reserved state");
            return self.beyond_repair(slot, what);
        };
        let mut mended = BatEntry::not_present();
        if state == BitmapState::Present {
            self.settle_bitmap(chunk);
            self.owed_bitmap = None;
            let extent = Extent { offset: entry.offset(), length: BITMAP_BLOCK_SIZE };
            if !self.place_block(slot, Owner::Bitmap(chunk), extent, BITMAP_BLOCK_SIZE) {
                return;
            }
            mended = BatEntry(entry.offset() | BitmapState::Present as u64);
        }
        if entry.reserved_bits() != 0 {
            let what = format!("the sector bitmap of chunk {chunk} has reserved bits set");
            self.mend(slot, Finding::corruption(BAT, self.place(slot), what), mended);
        } else if mended != entry {
            let what = format!("the sector bitmap of chunk {chunk} is absent, and has a place");
            self.mend(slot, Finding::note(BAT, self.place(slot), what), mended);
        }
    }

    /// Whether the extent that `who` names is in the file and its own. `needed` are its bytes that hold
    /// something.
    fn place_block(&mut self, slot: u64, who: Owner, extent: Extent, needed: u64) -> bool {
        let Extent { offset, length } = extent;
        assert!(needed <= length, "a block holds what is needed of it");
        let file_length = self.file_length;
        if offset >= file_length {
            let what = format!("{who} lies at byte {offset}, the file has {file_length} bytes");
            self.cut_off(slot, what);
            return false;
        }
        if let Some(shared) = self.space.claim(extent) {
            let owner = self.found.rival(extent, shared);
            self.beyond_repair(slot, format!("{who}, at byte {offset}, shares byte {shared} with {owner}"));
            return false;
        }
        if offset + needed > file_length {
            let what =
                format!("{who} needs the file up to byte {}, it ends at {file_length}", offset + needed);
            self.cut_off(slot, what);
            return false;
        }
        if offset + length > file_length {
            let what =
                format!("the file ends inside {who}, behind the disk's end; the next writer completes it");
            self.found.report.add(Finding::note(BAT, self.place(slot), what));
        }
        true
    }

    /// Blocks of `chunk` are partial: its bitmap must come.
    fn owe_bitmap(&mut self, chunk: u64) {
        self.settle_bitmap(chunk);
        self.owed_bitmap = Some(chunk);
    }

    /// The walk has reached `chunk`: no bitmap of an earlier one can follow.
    fn settle_bitmap(&mut self, chunk: u64) {
        if let Some(owed) = self.owed_bitmap.take_if(|owed| *owed < chunk) {
            let what = format!("chunk {owed} has partially present blocks, and no sector bitmap");
            self.beyond_repair(self.geometry.bitmap_slot(owed), what);
        }
    }

    fn beyond_repair(&mut self, slot: u64, what: String) {
        self.found.report.add(Finding::corruption(BAT, self.place(slot), what).remedy(UNKNOWN_ENTRY));
    }

    fn cut_off(&mut self, slot: u64, what: String) {
        self.found.report.add(Finding::corruption(BAT, self.place(slot), what).remedy(CUT_SHORT));
    }

    fn mend(&mut self, slot: u64, finding: Finding, mended: BatEntry) {
        let finding = finding.mended_by("is written without it: every reader reads on as before");
        self.found.report.add(finding);
        self.found.patch(self.place(slot), &mended.write());
    }

    /// Where the slot lies in the file, bytes.
    fn place(&self, slot: u64) -> u64 {
        assert!(slot < self.geometry.slot_count(), "slot {slot} is in the BAT");
        self.start + slot * ENTRY_SIZE as u64
    }
}
