//! Changes images where it matters, and renews the checksums, so that what is behind them is reached.

use fastrand::Rng;
use uuid::Uuid;
use vhdx_ublk::format::guid;

use crate::craft::{
    Change, Craft, HEADER_BYTES, HEADERS, LogEntry, MIB, REGION_TABLE_BYTES, REGION_TABLES, seal,
};

const PAGE: u64 = 4096;

/// A header's fields: (offset, bytes).
const HEADER_FIELDS: [(usize, usize); 9] =
    [(8, 8), (16, 16), (32, 16), (48, 16), (64, 2), (66, 2), (68, 4), (72, 8), (80, 8)];
/// A log entry's, and those of its first descriptors and its first data sector.
const ENTRY_FIELDS: [(usize, usize); 15] = [
    (8, 4),
    (12, 4),
    (16, 8),
    (24, 4),
    (28, 4),
    (32, 16),
    (48, 8),
    (56, 8),
    (64, 4),
    (68, 4),
    (72, 8),
    (80, 8),
    (88, 8),
    (112, 8),
    (4096, 8),
];
/// A region entry's, a metadata entry's.
const TABLE_FIELDS: [(usize, usize); 5] = [(0, 16), (16, 4), (20, 4), (24, 4), (28, 4)];

/// Where an image says that its structures lie, believed only as far as that is harmless.
struct Places {
    log: (u64, u64),
    bat: u64,
    metadata: u64,
}

impl Places {
    fn of(image: &Craft) -> Self {
        let header = image.read(HEADERS[0], 80);
        let log_length = u64::from(word(&header, 68) & 0x00f0_0000).max(MIB);
        let log_offset = long(&header, 72) & 0x0fff_ffff_f000;
        let table = image.read(REGION_TABLES[0], 16 + 8 * 32);
        let region = |wanted: Uuid| {
            let mut entries = table[16..].chunks(32);
            let found = entries.rfind(|entry| entry.starts_with(&wanted.to_bytes_le()));
            found.map_or(3 * MIB, |entry| long(entry, 16) & 0x0fff_ffff_f000)
        };
        Self {
            log: (log_offset, log_length),
            bat: region(guid::REGION_BAT),
            metadata: region(guid::REGION_METADATA),
        }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Changes `image` in one to five ways; `other` lends it parts.
pub fn mutate(image: &mut Craft, other: &Craft, rng: &mut Rng) {
    for _ in 0..rng.usize(1..6) {
        let places = Places::of(image);
        match rng.u32(..16) {
            0 | 1 => change_header(image, rng),
            2 => change_region_table(image, rng),
            3 => change_metadata_table(image, places.metadata, rng),
            4 => change_item(image, places.metadata, rng),
            5..8 => change_bat(image, places.bat, rng),
            8..11 => change_entry(image, &places, rng),
            11 | 12 => add_entry(image, &places, rng),
            13 => change_length(image, rng),
            14 => change_bytes(image, rng),
            _ => splice(image, other, rng),
        }
    }
}

/// A number that limits are made of, near the one that is there, or any.
fn number(old: u64, image: &Craft, rng: &mut Rng) -> u64 {
    let near = rng.u64(..3).wrapping_sub(1);
    let base = match rng.u32(..10) {
        0 => 0,
        1 => u64::MAX,
        2 | 3 => old,
        4 => 1 << rng.u32(..64),
        5 => rng.u64(..64) * MIB,
        6 => rng.u64(..1024) * PAGE,
        7 => image.file.length,
        8 => rng.u64(..16),
        _ => rng.u64(..),
    };
    base.wrapping_add(near)
}

fn change_field(bytes: &mut [u8], (at, length): (usize, usize), image: &Craft, rng: &mut Rng) {
    let width = length.min(8);
    let mut old = [0; 8];
    old[..width].copy_from_slice(&bytes[at..at + width]);
    let new = number(u64::from_le_bytes(old), image, rng).to_le_bytes();
    bytes[at..at + width].copy_from_slice(&new[..width]);
    if length > 8 && rng.bool() {
        bytes[at..at + length].fill(0);
    }
}

fn pick<T: Copy>(of: &[T], rng: &mut Rng) -> T {
    of[rng.usize(..of.len())]
}

/// Mostly renews the checksum.
fn put(image: &mut Craft, offset: u64, bytes: &mut [u8], rng: &mut Rng) {
    if rng.u32(..16) != 0 {
        seal(bytes);
    }
    image.write(offset, bytes);
}

/// Changes both copies of a structure, or one.
fn put_copies(image: &mut Craft, copies: [u64; 2], bytes: &mut [u8], rng: &mut Rng) {
    let both = rng.u32(..4) != 0;
    for offset in copies {
        if both || rng.bool() {
            put(image, offset, bytes, rng);
        }
    }
}

fn change_header(image: &mut Craft, rng: &mut Rng) {
    let field = pick(&HEADER_FIELDS, rng);
    let mut bytes = image.read(pick(&HEADERS, rng), HEADER_BYTES);
    change_field(&mut bytes, field, image, rng);
    put_copies(image, HEADERS, &mut bytes, rng);
}

fn change_region_table(image: &mut Craft, rng: &mut Rng) {
    let mut bytes = image.read(REGION_TABLES[0], REGION_TABLE_BYTES);
    let entry = 16 + 32 * rng.usize(..4);
    let (at, length) = pick(&TABLE_FIELDS, rng);
    match rng.u32(..8) {
        0 => change_field(&mut bytes, (8, 4), image, rng),
        1 => bytes.copy_within(16..48, entry),
        2 => change_field(&mut bytes, (entry + 16, 8), image, rng),
        _ => change_field(&mut bytes, (entry + at, length), image, rng),
    }
    put_copies(image, REGION_TABLES, &mut bytes, rng);
}

fn change_metadata_table(image: &mut Craft, metadata: u64, rng: &mut Rng) {
    let mut bytes = image.read(metadata, 4096);
    let entry = 32 + 32 * rng.usize(..8);
    let (at, length) = pick(&TABLE_FIELDS, rng);
    match rng.u32(..8) {
        0 => change_field(&mut bytes, (10, 2), image, rng),
        1 => bytes.copy_within(32..64, entry),
        _ => change_field(&mut bytes, (entry + at, length), image, rng),
    }
    image.write(metadata, &bytes);
}

/// The items lie one after the other behind the table.
fn change_item(image: &mut Craft, metadata: u64, rng: &mut Rng) {
    let items = metadata + (64 << 10);
    let mut bytes = image.read(items, 512);
    let words = pick(&[16, 120], rng);
    let at = 4 * rng.usize(..words);
    let length = pick(&[1, 2, 4, 8], rng);
    change_field(&mut bytes, (at, length), image, rng);
    image.write(items, &bytes);
}

fn change_bat(image: &mut Craft, bat: u64, rng: &mut Rng) {
    let slot = match rng.u32(..4) {
        0 => rng.u64(..8192),
        1 => 4096 * rng.u64(1..3),
        _ => rng.u64(..8),
    };
    let place = bat.saturating_add(slot * 8);
    let old = long(&image.read(place, 8), 0);
    let word = match rng.u32(..6) {
        0 => number(old, image, rng),
        1 => old ^ (1 << rng.u32(..64)),
        // The space of another slot.
        2 => long(&image.read(bat.saturating_add(rng.u64(..8) * 8), 8), 0),
        3 => image.file.length.saturating_sub(rng.u64(..3) * MIB) & !(MIB - 1) | rng.u64(..8),
        _ => (rng.u64(..40) * MIB) | rng.u64(..8),
    };
    image.write(place, &word.to_le_bytes());
}

/// Where entries start in the log, sectors.
fn starts(image: &Craft, (offset, length): (u64, u64)) -> Vec<u64> {
    (0..length.min(4 * MIB) / PAGE)
        .filter(|sector| image.read(offset.saturating_add(sector * PAGE), 4) == *b"loge")
        .collect()
}

fn read_ring(image: &Craft, (offset, length): (u64, u64), sector: u64, bytes: usize) -> Vec<u8> {
    let sectors = (sector..sector + (bytes as u64).div_ceil(PAGE)).map(|sector| sector % (length / PAGE));
    sectors.flat_map(|sector| image.read(offset.saturating_add(sector * PAGE), 4096)).collect()
}

fn write_ring(image: &mut Craft, (offset, length): (u64, u64), sector: u64, bytes: &[u8]) {
    for (sector, part) in (sector..).zip(bytes.chunks(4096)) {
        image.write(offset.saturating_add(sector % (length / PAGE) * PAGE), part);
    }
}

/// Changes an entry, or puts a changed copy of it elsewhere.
fn change_entry(image: &mut Craft, places: &Places, rng: &mut Rng) {
    let starts = starts(image, places.log);
    if starts.is_empty() {
        return;
    }
    let start = pick(&starts, rng);
    let claimed = u64::from(word(&image.read(places.log.0 + start * PAGE, 16), 8));
    let length = usize::try_from(claimed.clamp(PAGE, MIB).next_multiple_of(PAGE)).expect("small");
    let mut bytes = read_ring(image, places.log, start, length);
    let (at, width) = pick(&ENTRY_FIELDS, rng);
    if at + width <= bytes.len() {
        change_field(&mut bytes, (at, width), image, rng);
    }
    let target = if rng.u32(..4) == 0 { rng.u64(..places.log.1 / PAGE) } else { start };
    if rng.u32(..16) != 0 {
        seal(&mut bytes);
    }
    write_ring(image, places.log, target, &bytes);
}

/// Adds an entry of the log that the headers name, or has them name one.
fn add_entry(image: &mut Craft, places: &Places, rng: &mut Rng) {
    let starts = starts(image, places.log);
    let mut guid: [u8; 16] = image.read(HEADERS[0] + 48, 16).try_into().expect("sixteen bytes");
    if guid == [0; 16] {
        guid = Uuid::from_u128(rng.u128(1..)).to_bytes_le();
        image.name_log(Uuid::from_bytes_le(guid));
    }
    let newest = starts.iter().map(|start| long(&image.read(places.log.0 + start * PAGE, 32), 16)).max();
    let sector = rng.u64(..places.log.1 / PAGE);
    let own = u32::try_from(sector).expect("small");
    let count = if rng.bool() { rng.usize(..4) } else { rng.usize(..140) };
    let targets = [places.bat, places.metadata, REGION_TABLES[0], 4 * MIB, image.file.length, 0];
    let changes: Vec<Change> = (0..count)
        .map(|_| {
            let at = pick(&targets, rng).saturating_add(rng.u64(..64) * PAGE);
            match rng.u32(..3) {
                0 => Change::Zeros { at, length: rng.u64(..300) * PAGE },
                _ => Change::Page { at, fill: if rng.bool() { 0 } else { rng.u8(..) } },
            }
        })
        .collect();
    let entry = LogEntry {
        guid: Uuid::from_bytes_le(guid),
        flushed_file_offset: image.file.length & !(MIB - 1),
        last_file_offset: image.file.length.saturating_add(rng.u64(..4) * MIB),
        ..LogEntry::new(newest.unwrap_or(0).saturating_add(rng.u64(1..3)), own % 1024, &changes)
    };
    write_ring(image, places.log, sector, &entry.encode());
}

fn change_length(image: &mut Craft, rng: &mut Rng) {
    let length = image.file.length;
    let new = match rng.u32(..4) {
        0 => rng.u64(..=length),
        1 => length.saturating_add(rng.u64(..64) * MIB),
        2 => length.saturating_sub(rng.u64(..3) * 4096 + rng.u64(..512)),
        _ => 1 << rng.u32(12..47),
    };
    image.file.resize(new);
}

fn change_bytes(image: &mut Craft, rng: &mut Rng) {
    let Some(page) = image.file.next_page(rng.u64(..=image.file.length)) else { return };
    let at = page + rng.u64(..4088);
    let mut bytes = image.read(at, rng.usize(1..9));
    for byte in &mut bytes {
        *byte ^= rng.u8(..);
    }
    image.write(at, &bytes);
}

/// Takes over a structure of another image.
fn splice(image: &mut Craft, other: &Craft, rng: &mut Rng) {
    let (from, length) = pick(
        &[
            (HEADERS[0], 4096),
            (REGION_TABLES[0], 131_072),
            (MIB, 65536),
            (2 * MIB, 131_072),
            (3 * MIB, 65536),
        ],
        rng,
    );
    let bytes = other.read(from, length);
    image.write(from, &bytes);
}
