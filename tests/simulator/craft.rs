//! Images and logs laid out by hand, legal or not. The encoder is the tests' own: it shares with the library
//! nothing but the specification.

use uuid::Uuid;
use vhdx_ublk::disk::ReadDisk;
use vhdx_ublk::error::Result;
use vhdx_ublk::image::{Image, ReadImage, WritableImage};

use crate::sim::disk::SimDisk;
use crate::sim::store::Store;
use crate::sim::tasks::block_on;
use crate::sim::world::{Config, new_image};

pub const MIB: u64 = 1 << 20;
pub const SECTOR: usize = 4096;

/// Where a new image with a log of 1 MiB has its structures, bytes.
pub const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
pub const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
pub const LOG: u64 = MIB;
pub const METADATA: u64 = 2 * MIB;
pub const BAT: u64 = 3 * MIB;
/// Its length while no block has space.
pub const END: u64 = 4 * MIB;

pub const HEADER_BYTES: usize = 4096;
pub const REGION_TABLE_BYTES: usize = 65536;

/// Sectors of its log.
pub const LOG_SECTORS: u32 = 256;

/// The LogGuid that entries carry unless a test says otherwise.
pub const LOG_GUID: Uuid = Uuid::from_u128(0x10c);

/// Within a header, bytes.
const LOG_GUID_FIELD: usize = 48;

/// Stores the CRC-32C of a header, a region table or a log entry.
pub fn seal(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let crc = crc32c::crc32c(bytes);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// A page whose every byte follows from `fill`, none of them from its neighbours alone.
pub fn page(fill: u8) -> Vec<u8> {
    (0..SECTOR).map(|index| fill.wrapping_add((index % 251).to_le_bytes()[0])).collect()
}

/// One descriptor of an entry.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    Page { at: u64, fill: u8 },
    Zeros { at: u64, length: u64 },
}

/// A log entry with any number of descriptors.
#[derive(Clone, Debug)]
pub struct LogEntry {
    pub sequence: u64,
    /// Where its tail lies, sectors from the start of the log.
    pub tail: u32,
    pub guid: Uuid,
    pub flushed_file_offset: u64,
    pub last_file_offset: u64,
    pub changes: Vec<Change>,
}

impl LogEntry {
    pub fn new(sequence: u64, tail: u32, changes: &[Change]) -> Self {
        Self {
            sequence,
            tail,
            guid: LOG_GUID,
            flushed_file_offset: END,
            last_file_offset: END,
            changes: changes.to_vec(),
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; (64 + 32 * self.changes.len()).next_multiple_of(SECTOR)];
        for (index, change) in self.changes.iter().enumerate() {
            let descriptor = self.descriptor(change);
            bytes[64 + 32 * index..][..32].copy_from_slice(&descriptor);
        }
        for change in &self.changes {
            if let Change::Page { fill, .. } = *change {
                bytes.extend_from_slice(&self.data_sector(&page(fill)));
            }
        }
        let length = u32::try_from(bytes.len()).expect("small").to_le_bytes();
        let count = u32::try_from(self.changes.len()).expect("small").to_le_bytes();
        bytes[..4].copy_from_slice(b"loge");
        bytes[8..12].copy_from_slice(&length);
        bytes[12..16].copy_from_slice(&(self.tail * 4096).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..28].copy_from_slice(&count);
        bytes[32..48].copy_from_slice(&self.guid.to_bytes_le());
        bytes[48..56].copy_from_slice(&self.flushed_file_offset.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.last_file_offset.to_le_bytes());
        seal(&mut bytes);
        bytes
    }

    fn descriptor(&self, change: &Change) -> [u8; 32] {
        let mut bytes = [0; 32];
        let at = match *change {
            Change::Page { at, fill } => {
                let page = page(fill);
                bytes[..4].copy_from_slice(b"desc");
                bytes[4..8].copy_from_slice(&page[4092..]);
                bytes[8..16].copy_from_slice(&page[..8]);
                at
            }
            Change::Zeros { at, length } => {
                bytes[..4].copy_from_slice(b"zero");
                bytes[8..16].copy_from_slice(&length.to_le_bytes());
                at
            }
        };
        bytes[16..24].copy_from_slice(&at.to_le_bytes());
        bytes[24..].copy_from_slice(&self.sequence.to_le_bytes());
        bytes
    }

    fn data_sector(&self, page: &[u8]) -> Vec<u8> {
        let mut bytes = page.to_vec();
        let sequence = self.sequence.to_le_bytes();
        bytes[..4].copy_from_slice(b"data");
        bytes[4..8].copy_from_slice(&sequence[4..]);
        bytes[4092..].copy_from_slice(&sequence[..4]);
        bytes
    }
}

/// An image file to be changed by hand.
#[derive(Clone)]
pub struct Craft {
    pub file: Store,
}

impl Craft {
    /// A new image as `config` has it.
    pub fn new(config: &Config) -> Self {
        Self { file: new_image(config, &mut fastrand::Rng::with_seed(7)) }
    }

    pub fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.file.read(offset, &mut bytes);
        bytes
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        self.file.write(offset, bytes);
    }

    /// Changes a structure that carries a checksum, and renews that.
    pub fn change_sealed(&mut self, offset: u64, length: usize, change: impl FnOnce(&mut [u8])) {
        let mut bytes = self.read(offset, length);
        change(&mut bytes);
        seal(&mut bytes);
        self.write(offset, &bytes);
    }

    /// Changes both headers alike.
    pub fn change_headers(&mut self, change: impl Fn(&mut [u8])) {
        for offset in HEADERS {
            self.change_sealed(offset, HEADER_BYTES, &change);
        }
    }

    /// Has both headers name a log.
    pub fn name_log(&mut self, guid: Uuid) {
        self.change_headers(|header| {
            header[LOG_GUID_FIELD..][..16].copy_from_slice(&guid.to_bytes_le());
        });
    }

    /// Puts bytes into the log from a sector on, round the ring's end if need be.
    pub fn write_log(&mut self, sector: u32, bytes: &[u8]) {
        for (place, part) in (u64::from(sector)..).zip(bytes.chunks(SECTOR)) {
            self.write(LOG + place % u64::from(LOG_SECTORS) * 4096, part);
        }
    }

    /// Sets a BAT slot.
    pub fn set_slot(&mut self, slot: u64, word: u64) {
        self.write(BAT + slot * 8, &word.to_le_bytes());
    }

    fn disk(&self) -> SimDisk {
        SimDisk::new(self.file.clone(), true, true, 512)
    }

    /// Opens the image for reading.
    pub fn open_read_only(&self) -> Result<(ReadImage, SimDisk)> {
        let disk = self.disk();
        Ok((block_on(Image::read(&disk))?, disk))
    }

    /// Opens the image for writing; the disk shows what that has changed.
    pub fn open_writable(&self) -> Result<(WritableImage, SimDisk)> {
        let disk = self.disk();
        Ok((block_on(Image::open_for_writing(&disk, || Uuid::from_u128(0xf11e)))?, disk))
    }

    /// What a reader of `image`, opened from this file, sees at `offset`.
    pub fn seen(&self, image: &ReadImage, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = block_on(self.disk().read(offset, length)).expect("a simulated disk reads").to_vec();
        if let Some(overlay) = image.overlay() {
            overlay.patch(offset, &mut bytes);
        }
        bytes
    }
}
