//! A VHD file that is read.

use crate::disk::{ImageFile, SharedFile};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::index;
use crate::format::vhd::{DynamicHeader, FOOTER_SIZE, Footer, HEADER_SIZE, Kept, SECTOR, Table};

/// The disk in a VHD file.
pub(super) struct Vhd {
    /// Bytes of the disk.
    pub(super) size: u64,
    /// Nothing for a fixed one, whose disk begins at byte 0.
    blocks: Option<Blocks>,
}

struct Blocks {
    header: DynamicHeader,
    table: Table,
}

/// Bits of the sectors of one block.
#[derive(Default)]
pub(super) struct Bitmap {
    block: Option<u64>,
    bits: Vec<u8>,
}

impl Vhd {
    /// Reads the structures of the VHD in `file`, which is `locked`.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with them.
    pub(super) fn read(locked: &ImageFile, file: &SharedFile) -> Result<Self> {
        let length = locked.length().doing("reading the size of the file").file(file.path())?;
        let (footer, end) = read_footer(file, length)?;
        let blocks = match footer.kept {
            Kept::Fixed if footer.size > end => return Err(cut_short(end, footer.size).file(file.path())),
            Kept::Fixed => None,
            Kept::Dynamic { header } => Some(Blocks::read(file, &footer, header, end)?),
        };
        Ok(Self { size: footer.size, blocks })
    }

    /// Where the bytes of the disk from `from` on are in `file`, if they are anywhere, and up to which byte
    /// of the disk that holds.
    pub(super) fn place(
        &self,
        file: &SharedFile,
        bitmap: &mut Bitmap,
        from: u64,
    ) -> Result<(Option<u64>, u64)> {
        debug_assert!(from < self.size, "byte {from} is on the disk");
        let Some(Blocks { header, table }) = &self.blocks else { return Ok((Some(from), self.size)) };
        let block_size = u64::from(header.block_size);
        let (block, within) = (from / block_size, from % block_size);
        let Some(place) = table.block(block) else {
            return Ok((None, (table.next_block(block) * block_size).min(self.size)));
        };
        if bitmap.block != Some(block) {
            bitmap.bits.resize(index(block_size / SECTOR / 8), 0);
            file.read(place, &mut bitmap.bits)?;
            bitmap.block = Some(block);
        }
        let (written, past) = bitmap.run(within / SECTOR, block_size / SECTOR);
        let past = (block * block_size + past * SECTOR).min(self.size);
        Ok((written.then_some(place + header.bitmap_bytes() + within), past))
    }
}

impl Bitmap {
    /// Whether `sector` was written, and the first one behind it of which the opposite holds, before `end`.
    fn run(&self, sector: u64, end: u64) -> (bool, u64) {
        let bit = |sector: u64| self.bits[index(sector / 8)] & (0x80 >> (sector % 8)) != 0;
        let (written, whole) = (bit(sector), if bit(sector) { 0xff } else { 0 });
        let mut past = sector + 1;
        while past < end {
            if past.is_multiple_of(8) && self.bits[index(past / 8)] == whole {
                past += 8;
            } else if bit(past) == written {
                past += 1;
            } else {
                break;
            }
        }
        (written, past.min(end))
    }
}

impl Blocks {
    fn read(file: &SharedFile, footer: &Footer, at: u64, end: u64) -> Result<Self> {
        if at.checked_add(HEADER_SIZE as u64).is_none_or(|past| past > end) {
            return Err(cut_short(end, at.saturating_add(HEADER_SIZE as u64)).file(file.path()));
        }
        let mut bytes = [0; HEADER_SIZE];
        file.read(at, &mut bytes)?;
        let header = DynamicHeader::parse(&bytes, footer.size).at(at).file(file.path())?;
        let length = Table::length(&header, footer.size);
        if header.table_offset + length > end {
            return Err(cut_short(end, header.table_offset + length).file(file.path()));
        }
        let mut bytes = vec![0; index(length)];
        file.read(header.table_offset, &mut bytes)?;
        let table = Table::parse(&bytes, footer, &header, end).at(header.table_offset).file(file.path())?;
        Ok(Self { header, table })
    }
}

/// The footer, and where the bytes end that blocks may take. A dynamic image begins with a copy, which counts
/// if the last bytes are no footer.
fn read_footer(file: &SharedFile, length: u64) -> Result<(Footer, u64)> {
    let mut bytes = [0; FOOTER_SIZE];
    let Some(last) = length.checked_sub(FOOTER_SIZE as u64) else {
        return Err(cut_short(length, FOOTER_SIZE as u64).file(file.path()));
    };
    file.read(last, &mut bytes)?;
    let failure = match Footer::parse(&bytes) {
        Ok(footer) => return Ok((footer, last)),
        Err(error) if error.kind() == Kind::Corrupt => error.at(last),
        Err(error) => return Err(error.at(last).file(file.path())),
    };
    file.read(0, &mut bytes)?;
    match Footer::parse(&bytes) {
        Ok(footer @ Footer { kept: Kept::Dynamic { .. }, .. }) => {
            tracing::warn!(
                "{}: {failure:#}; its copy at the front is good and is used",
                file.path().display()
            );
            Ok((footer, length))
        }
        Err(error) if error.kind() == Kind::Unsupported => Err(error.at(0).file(file.path())),
        _ => {
            let remedy = "if it was cut short, copy it again from its source; the disk of a fixed VHD can be \
                          read as it is: --from raw";
            Err(failure.file(file.path()).remedy(remedy))
        }
    }
}

fn cut_short(found: u64, needed: u64) -> Error {
    let message = format!("the image has {found} bytes without its footer, and needs {needed}");
    Error::new(Kind::Truncated, message).in_structure("VHD").remedy("copy it again from its source")
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::super::{DiskFormat, Source, Walk};
    use super::*;
    use crate::disk::{Access, Reactor};
    use crate::format::vhd::encode_table;

    const BLOCK: u64 = 512 << 10;
    const SIZE: u64 = 3 * BLOCK + 512;

    /// The structures of an image of four blocks, the second and the last of which are there.
    fn image() -> Vec<u8> {
        let kept = Kept::Dynamic { header: 512 };
        let footer = Footer { size: SIZE, kept, unique_id: uuid::Uuid::from_u128(1), timestamp: 0 }.encode();
        let header = DynamicHeader { table_offset: 1536, entries: 4, block_size: 512 << 10 };
        let table = encode_table(4, [(1, 2048), (3, 2048 + 512 + BLOCK)].into_iter());
        let mut bytes = [&footer[..], &header.encode(), &table].concat();
        for fill in [1, 3] {
            // The first eight sectors and every second one of the next were written.
            bytes.extend([&[0xff, 0xaa][..], &[0; 510], &vec![fill; index(BLOCK)]].concat());
        }
        bytes.extend(footer);
        bytes
    }

    fn seal(bytes: &mut [u8], field: usize) {
        bytes[field..field + 4].fill(0);
        let sum = !bytes.iter().fold(0_u32, |sum, &byte| sum.wrapping_add(byte.into()));
        bytes[field..field + 4].copy_from_slice(&sum.to_be_bytes());
    }

    /// The whole disk of the image in `bytes`.
    fn read(bytes: &[u8]) -> Result<Vec<u8>> {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        std::fs::write(file.path(), bytes).expect("room");
        let file = ImageFile::open(file.path(), Access::ReadOnly, Duration::ZERO)?;
        let source = Source::of_made(Arc::new(file), DiskFormat::Vhd, &Reactor::new()?)?;
        let mut disk = vec![9; index(source.size().min(1 << 22))];
        let parts = Walk::new(&source).parts(0..disk.len() as u64)?;
        source.read(&parts, 0, &mut disk)?;
        Ok(disk)
    }

    #[test]
    fn sectors_that_were_never_written_are_zero() {
        let disk = read(&image()).expect("a good image");
        let filled = |at: usize| disk[512 * at..][..512].iter().all(|&byte| byte == 1);
        let block = index(BLOCK / 512);
        assert!((0..8).all(|sector| filled(block + sector)));
        assert_eq!([8, 9, 10, 16].map(|sector| filled(block + sector)), [true, false, true, false]);
        assert_eq!(disk.iter().filter(|&&byte| byte != 0).count(), 12 * 512 + 512);
    }

    proptest! {
        /// Whatever a sealed structure says, the image is read or refused.
        #[test]
        fn a_hostile_image_is_read_or_refused(
            changes in prop::collection::vec((0_usize..4, 0_usize..250, any::<u64>(), 1_usize..8), 1..4),
            cut in prop::option::of(0_usize..2_000_000)
        ) {
            let mut bytes = image();
            let end = bytes.len() - FOOTER_SIZE;
            let footers = [0, end].map(|start| (start, 512, Some(64)));
            let structures = [footers[0], (512, 1024, Some(36)), (1536, 16, None), footers[1]];
            for (structure, at, value, length) in changes {
                let (start, size, sum) = structures[structure];
                let at = start + (8 + at) % (size - 8);
                bytes[at..at + length].copy_from_slice(&value.to_be_bytes()[..length]);
                if let Some(field) = sum {
                    seal(&mut bytes[start..start + size], field);
                }
            }
            bytes.truncate(cut.unwrap_or(usize::MAX));
            if let Err(error) = read(&bytes) {
                prop_assert!(!error.message().is_empty() && error.kind() != Kind::Io, "{error:#}");
            }
        }
    }
}
