//! Where the regions are: by one of the region tables.

use super::notes::Notes;
use super::source::Source;
use crate::disk::ReadDisk;
use crate::error::Result;
use crate::format::region::{self, Copies, RegionTable};
use crate::image::open::extent_of;
use crate::image::space::Extent;

/// Where the regions are, as far as it is known.
#[derive(Default)]
pub(super) struct Regions {
    pub(super) bat: Option<Extent>,
    pub(super) metadata: Option<Extent>,
    /// Those of other programs.
    pub(super) others: Vec<Extent>,
}

impl Regions {
    /// The regions by their tables; none of them if neither table is left.
    pub(super) async fn read<D: ReadDisk>(source: &Source<'_, D>, notes: &mut Notes) -> Result<Self> {
        let first = source.read(region::OFFSETS[0], region::SIZE).await?.bytes;
        let second = source.read(region::OFFSETS[1], region::SIZE).await?.bytes;
        let table = match region::current([&first, &second]) {
            Ok(current) => {
                match current.copies {
                    Copies::Equal => {}
                    Copies::Different => notes.add(TABLES, "they differ; the first is used"),
                    Copies::FirstInvalid => notes.add(TABLES, "the first is damaged; the second is used"),
                    Copies::SecondInvalid => notes.add(TABLES, "the second is damaged; the first is used"),
                }
                Some(current.table)
            }
            Err(error) => {
                // One whose seal is whole may be impossible all the same.
                let mut tables = [&first, &second].into_iter().enumerate();
                let found = tables.find_map(|(copy, bytes)| RegionTable::parse(bytes, copy).ok());
                let then =
                    if found.is_some() { "the other one is used" } else { "the regions are searched for" };
                notes.add(TABLES, format!("{}; {then}", error.message()));
                found
            }
        };
        Ok(table.as_ref().map(Self::of).unwrap_or_default())
    }

    fn of(table: &RegionTable) -> Self {
        let (bat, metadata) = (table.bat(), table.metadata());
        let others = table.entries().iter().filter(|region| **region != bat && **region != metadata);
        let others = others.copied().map(extent_of).collect();
        Self { bat: Some(extent_of(bat)), metadata: Some(extent_of(metadata)), others }
    }
}

const TABLES: &str = "region tables";
