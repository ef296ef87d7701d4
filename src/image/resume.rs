//! Keeping the block map where it outlives the process, and taking it over from a process that was killed.
//!
//! A killed process leaves the file as the host's cache has it, and its memory. The memory knows every
//! mapping that was published, and so everything that was acknowledged; the file knows those that were
//! logged. What differs is committed by the successor. Until then both name their space: what only the file
//! names, the successor has to keep until its unmapping is durable.

use std::io;
use std::ops::Range;

use uuid::Uuid;

use super::bat_reader::{checked_payload, is_cut_off, payload_extent};
use super::bitmap_reader::{BitmapReader, missing, partial_blocks};
use super::bitmaps::SectorBitmaps;
use super::block_map::{BlockMap, SLOTS_PER_PAGE};
use super::memory::{Owner, Place, Session, SessionMemory};
use super::open::{Image, WritableImage};
use super::page::Page;
use super::pending::Pending;
use super::space::{Content, Extent};
use super::view::View;
use crate::disk::{Disk, ReadDisk};
use crate::error::{Error, Kind, Result};
use crate::format::MIB;
use crate::format::bat::{BITMAP_BLOCK_SIZE, BatEntry, BitmapState, Geometry, PayloadState, Role};
use crate::simulation::{Plant, planted};

impl Image {
    /// Whose memory the session of this image is, whose file is at `place`.
    pub fn owner(&self, place: Place) -> Owner {
        Owner {
            place,
            disk_id: self.metadata.disk_id,
            virtual_size: self.metadata.virtual_size,
            block_size: self.metadata.block_size.into(),
            sector_size: self.metadata.logical_sector_size.into(),
        }
    }
}

impl WritableImage {
    /// Moves the block map, and the sector bitmaps that were read, into fresh `memory`.
    ///
    /// # Errors
    /// When there is no room for the bitmaps; the map stays where it was.
    ///
    /// # Panics
    /// If the memory was made for another disk, or is not fresh.
    pub fn start_session(&mut self, memory: SessionMemory, owner: &Owner) -> io::Result<()> {
        let geometry = *self.map.geometry();
        let nothing = Pending { grown: self.pending.grown, ..Pending::default() };
        assert_eq!(self.pending, nothing, "a fresh session takes nothing over");
        assert_eq!(owner.disk_id, self.metadata.disk_id, "the memory is this image's");
        let map = BlockMap::over(memory, geometry);
        map.set_file_bytes(self.map.file_bytes());
        for slots in &self.stored_slots {
            map.take_over(&self.map, slots.clone());
        }
        for block in self.partial_blocks() {
            map.bitmaps().take_over(self.map.bitmaps(), &geometry, block)?;
        }
        map.memory().complete(owner, self.header.header.file_write_guid);
        assert_eq!(map.memory().session(), Session::Idle, "nothing was modified yet");
        self.map = map;
        Ok(())
    }

    /// Has the fresh `memory` of a session for the disk as it will be, of `geometry`, room for the sector
    /// bitmaps that the image has, and for that of the block `border`.
    ///
    /// # Errors
    /// When there is no room.
    pub fn reserve_bitmaps(
        &self,
        memory: &SessionMemory,
        geometry: &Geometry,
        border: Option<u64>,
    ) -> io::Result<()> {
        let bitmaps = memory.bitmaps(geometry);
        self.partial_blocks().chain(border).try_for_each(|block| bitmaps.make_room(geometry, block))
    }

    fn partial_blocks(&self) -> impl Iterator<Item = u64> {
        self.stored_slots.iter().flat_map(|slots: &Range<u64>| partial_blocks(&self.map, slots.clone()))
    }

    /// Opens the image on `disk` for writing and takes over the session in `memory`, which was checked to be
    /// this image's, of a process whose last write to the file has ended. `carried` is the FileWriteGuid that
    /// the file carries. Of a disk that has become larger under the session nothing is taken over: the image
    /// has everything, and needs a session of its own.
    ///
    /// # Errors
    /// Those of [`Image::open_for_writing`]; [`Kind::Poisoned`] if the session is; corrupt if it cannot be
    /// this image's future. It stays as it is, for another attempt.
    pub async fn resume<D: Disk>(
        disk: &D,
        memory: SessionMemory,
        carried: Uuid,
        new_guid: impl FnOnce() -> Uuid,
    ) -> Result<Self> {
        sync_killed(disk, &memory).await?;
        // The file may carry what a successor announced that was killed itself; the next one takes its place.
        if !planted(Plant::LateSettlement) {
            memory.confirm_guid(carried);
        }
        let mut replaying = false;
        let announced = || {
            let guid = new_guid();
            memory.announce(guid);
            replaying = true;
            guid
        };
        let opened = Image::open_for_writing(disk, announced).await;
        let mut image = opened.inspect_err(|error| {
            // A write or sync that failed is never tried again: the host may have dropped what it held.
            if replaying && error.kind() == Kind::Io {
                memory.poison();
            }
        })?;
        memory.confirm_guid(image.header.header.file_write_guid);
        let geometry = *image.map.geometry();
        if geometry.virtual_size() > memory.virtual_size() {
            image.pending.grown = true;
            return Ok(image);
        }
        let map = BlockMap::left_in(memory, geometry);
        map.set_file_bytes(image.map.file_bytes());
        let set: Vec<_> = map.slots_set_with(&image.map).collect();
        for slot in set.into_iter().flat_map(|slots| geometry.walk(slots)) {
            image.reconcile(slot, &map)?;
        }
        image.reconcile_bitmaps(disk, &map).await?;
        if planted(Plant::ForgetPending) {
            image.pending.pages.clear();
        }
        let pages = map.page_count();
        let known = |page: &Page| !matches!(page, Page::Bat(page) if *page >= pages);
        assert!(image.pending.pages.iter().all(known), "pending pages are in the BAT");
        assert!(image.pending.unmapped.iter().all(|lost| lost.offset >= MIB), "no header is given back");
        image.pending.resumed = map.memory().session() == Session::Open;
        image.map = map;
        Ok(image)
    }

    /// Brings one slot of the session's `map` and of the file together.
    fn reconcile(&mut self, (slot, role): (u64, Role), map: &BlockMap) -> Result<()> {
        let (in_file, live) = (self.map.load_slot(slot).entry, map.load_slot(slot));
        if live.entry == in_file {
            if in_file.0 != 0 {
                map.restore(slot, &[in_file.write()]);
            }
            return Ok(());
        }
        let wrong = |what: &str| Err(wrong(role, what));
        if live.durable {
            return wrong("was durable and is not in the file");
        }
        if map.memory().session() == Session::Idle {
            return wrong("was changed before the session was opened");
        }
        self.pending.pages.insert(Page::Bat(slot / SLOTS_PER_PAGE));
        let block = match role {
            Role::Block(block) => block,
            Role::Bitmap(chunk) => return self.reconcile_bitmap_slot(slot, chunk, live.entry, map),
            Role::Nothing => return wrong("is not empty"),
        };
        let new = checked_payload(live.entry, block, map.geometry())?;
        let old = payload_extent(in_file, map.geometry());
        if new != old {
            if let Some(extent) = new {
                assert!(extent.offset >= MIB, "a checked entry names no header");
                if is_cut_off(live.entry, role, map.geometry(), self.layout.file_length) {
                    return wrong("names space beyond the end of the file");
                }
                self.space.occupy(extent, "payload block of the session")?;
            }
            match old {
                Some(extent) if planted(Plant::ForgetUnmapped) => self.space.free(extent, Content::Recycled),
                old => self.pending.unmapped.extend(old),
            }
        }
        Ok(())
    }

    /// A sector bitmap that was begun: no block may rely on it before an entry that names it is durable.
    fn reconcile_bitmap_slot(&mut self, slot: u64, chunk: u64, live: BatEntry, map: &BlockMap) -> Result<()> {
        let begun = live.bitmap_state() == Some(BitmapState::Present)
            && self.map.load_slot(slot).entry == BatEntry::not_present()
            && map.geometry().is_differencing();
        let role = Role::Bitmap(chunk);
        if !begun || is_cut_off(live, role, map.geometry(), self.layout.file_length) {
            return Err(wrong(role, "differs from the file's"));
        }
        let extent = Extent { offset: live.offset(), length: BITMAP_BLOCK_SIZE };
        self.space.occupy(extent, "sector bitmap of the session")?;
        self.pending.bitmaps.insert(chunk);
        Ok(())
    }

    /// Finds the sectors that the session knows to be in the file and the file's bitmaps do not.
    async fn reconcile_bitmaps<D: ReadDisk>(&mut self, disk: &D, map: &BlockMap) -> Result<()> {
        let geometry = *map.geometry();
        let file = View { disk, overlay: None };
        let mut bitmap = BitmapReader::default();
        for block in map.slots_set_with(map).flat_map(|slots| partial_blocks(map, slots)) {
            let slot = geometry.payload_slot(block);
            let chunk = geometry.chunk_of_block(block);
            map.bitmap_place(chunk).ok_or_else(|| missing(chunk))?;
            map.bitmaps()
                .make_room(&geometry, block)
                .map_err(|error| Error::io("reading the session", error))?;
            // One that was begun has nothing in the file that counts.
            let (same, all) = if self.pending.bitmaps.contains(&chunk) {
                (false, true)
            } else {
                map.bitmaps().compare(&geometry, block, bitmap.read(&file, map, block).await?)
            };
            let in_file = self.map.load_slot(slot).entry.payload_state();
            if !all && in_file == Some(PayloadState::PartiallyPresent) {
                return Err(wrong(Role::Block(block), "lacks sectors that the file has"));
            }
            if !same && !planted(Plant::ForgetResumedBits) {
                let pages = SectorBitmaps::pages(&geometry, block);
                self.pending.pages.extend(pages.map(|page| Page::Bitmap { chunk, page }));
            }
        }
        Ok(())
    }
}

/// Makes durable what the killed process wrote, unless the host, or that process, has lost something.
async fn sync_killed<D: Disk>(disk: &D, memory: &SessionMemory) -> Result<()> {
    if memory.session() == Session::Poisoned {
        return Err(Error::new(Kind::Poisoned, "writing failed before the process was killed")
            .in_structure("session")
            .remedy("what was flushed is safe in the image; remove the device with `vhdx-ublk del`"));
    }
    if !planted(Plant::TrustKilled)
        && let Err(error) = disk.sync().await
    {
        memory.poison();
        return Err(Error::io("syncing what the killed process wrote", error));
    }
    if memory.used_page_cache() && !planted(Plant::TrustHost) {
        ask_host(disk, memory).await?;
    }
    Ok(())
}

/// Asks the host whether it has lost data. The host may have reported it to the killed process, in a
/// sync or a durable write that the kill cut short: the next sync of this file succeeds then, and a flush
/// must not.
async fn ask_host<D: Disk>(disk: &D, memory: &SessionMemory) -> Result<()> {
    if memory.is_in_doubt() {
        memory.poison();
        let message = "the host has told another process whether it lost data of this file system, and does \
             not repeat it";
        return Err(Error::new(Kind::Poisoned, message).in_structure("session").remedy(LOST));
    }
    memory.leave_in_doubt();
    if let Err(error) = disk.sync_host().await {
        memory.poison();
        let doing = "asking the host whether it has lost data of this file system since the device was added";
        return Err(Error::io(doing, error).remedy(LOST));
    }
    memory.note_page_cache();
    Ok(())
}

/// What can be done when it is not known what the host has lost.
const LOST: &str = "it may be of this image: look for the cause (dmesg); `vhdx-ublk recover --accept-loss` \
     gives up what was not flushed, `vhdx-ublk del` removes the device";

fn wrong(role: Role, what: &str) -> Error {
    Error::corrupt("session", format!("{role} {what}"))
}
