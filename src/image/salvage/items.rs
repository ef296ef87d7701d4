//! The items of the metadata, one by one: each that is left counts, whatever became of the others.

use std::collections::BTreeMap;

use uuid::Uuid;

use super::notes::Notes;
use super::source::Source;
use crate::disk::{PAGE_BYTES, ReadDisk};
use crate::error::Result;
use crate::format::guid;
use crate::format::index;
use crate::format::item::Item;
use crate::format::locator::ParentLocator;
use crate::format::metadata::{Entry, TABLE_SIZE, Table};
use crate::image::space::Extent;

/// What is left of the items.
#[derive(Default)]
pub(super) struct Items {
    /// Bytes of a block, whether blocks keep their space, and whether there is a parent.
    pub(super) file: Option<(u32, bool, bool)>,
    pub(super) size: Option<u64>,
    pub(super) disk_id: Option<Uuid>,
    pub(super) logical: Option<u32>,
    pub(super) physical: Option<u32>,
    pub(super) locator: Option<ParentLocator>,
}

const METADATA: &str = "metadata";

/// How many entries of one item are looked at: each can be a MiB to read.
const MOST_TRIES: usize = 4;

impl Items {
    /// The items of the metadata region at `region`.
    pub(super) async fn read<D: ReadDisk>(
        source: &Source<'_, D>,
        region: Extent,
        notes: &mut Notes,
    ) -> Result<Self> {
        let length = u32::try_from(region.length).unwrap_or(u32::MAX);
        let table = source.read(region.offset, TABLE_SIZE).await?;
        let sound = table.missing.is_empty() && Table::parse(&table.bytes, length).is_ok();
        let mut items = Self::default();
        let mut looks: BTreeMap<Uuid, usize> = BTreeMap::new();
        for entry in Table::remains(&table.bytes, length) {
            let tries = looks.entry(entry.item_id).or_default();
            *tries += 1;
            if *tries <= MOST_TRIES && !items.has(entry.item_id) {
                items.take(source, region, &entry).await?;
            }
        }
        if sound {
            return Ok(items);
        }
        notes.add("metadata table", "it is damaged; the items are read one by one");
        let mut usual = Self::default();
        for entry in Item::usual_places(length) {
            usual.take(source, region, &entry).await?;
        }
        // Together they hardly say by chance what they must.
        if items.lacks_any() && usual.file.is_some() && usual.size.is_some() && usual.logical.is_some() {
            notes.guess("metadata table", "items that it does not list are where programs usually put them");
            items.complete(usual);
        }
        Ok(items)
    }

    /// How many of the items are left without which there is no disk.
    pub(super) fn count(&self) -> usize {
        let found =
            [self.file.is_some(), self.size.is_some(), self.logical.is_some(), self.disk_id.is_some()];
        found.into_iter().filter(|found| *found).count() + usize::from(self.physical.is_some())
    }

    fn has(&self, item_id: Uuid) -> bool {
        match item_id {
            guid::FILE_PARAMETERS => self.file.is_some(),
            guid::VIRTUAL_DISK_SIZE => self.size.is_some(),
            guid::VIRTUAL_DISK_ID => self.disk_id.is_some(),
            guid::LOGICAL_SECTOR_SIZE => self.logical.is_some(),
            guid::PHYSICAL_SECTOR_SIZE => self.physical.is_some(),
            _ => self.locator.is_some(),
        }
    }

    fn lacks_any(&self) -> bool {
        self.count() < 5 || self.file.is_some_and(|(.., child)| child) && self.locator.is_none()
    }

    fn complete(&mut self, other: Self) {
        self.file = self.file.or(other.file);
        self.size = self.size.or(other.size);
        self.disk_id = self.disk_id.or(other.disk_id);
        self.logical = self.logical.or(other.logical);
        self.physical = self.physical.or(other.physical);
        let is_child = self.file.is_some_and(|(.., child)| child);
        self.locator = self.locator.take().or(other.locator.filter(|_| is_child));
    }

    /// Reads the item that `entry` names, unless there is one of its kind already.
    async fn take<D: ReadDisk>(
        &mut self,
        source: &Source<'_, D>,
        region: Extent,
        entry: &Entry,
    ) -> Result<()> {
        let start = region.offset + u64::from(entry.offset);
        let range = start..start + u64::from(entry.length);
        let from = start - start % PAGE_BYTES as u64;
        let found = source.read(from, index(range.end - from).next_multiple_of(PAGE_BYTES)).await?;
        // A locator lies in front of what was read for it, if its length is not known.
        let needed = if entry.item_id == guid::PARENT_LOCATOR { start..start + 1 } else { range.clone() };
        if !found.has(&needed) {
            return Ok(());
        }
        match Item::parse(entry.item_id, &found.bytes[index(start - from)..index(range.end - from)]) {
            Some(Item::File { block_size, leave_blocks_allocated, has_parent }) => {
                self.file.get_or_insert((block_size, leave_blocks_allocated, has_parent));
            }
            Some(Item::Size(size)) => drop(self.size.get_or_insert(size)),
            Some(Item::DiskId(id)) => drop(self.disk_id.get_or_insert(id)),
            Some(Item::LogicalSector(size)) => drop(self.logical.get_or_insert(size)),
            Some(Item::PhysicalSector(size)) => drop(self.physical.get_or_insert(size)),
            Some(Item::Parent(locator)) => drop(self.locator.get_or_insert(locator)),
            None => {}
        }
        Ok(())
    }

    /// Notes what is lost and does without: neither says anything of the content.
    pub(super) fn note_harmless(&self, notes: &mut Notes) {
        if self.disk_id.is_none() {
            notes.add(METADATA, "the Virtual Disk ID is lost; the content does not depend on it");
        }
        if self.physical.is_none() {
            notes.add(METADATA, "the Physical Sector Size is lost; 4096 bytes do for every reader");
        }
    }
}
