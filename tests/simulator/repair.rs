//! Promise defended here: a repair never loses or changes data, wherever the power is cut in it; an image
//! that opened before opens at every such moment; and repairing again ends what was begun.

use fastrand::Rng;
use uuid::Uuid;
use vhdx_ublk::error::Result;
use vhdx_ublk::format::guid::{REGION_BAT, REGION_METADATA};
use vhdx_ublk::format::log::{Change, NewEntry};
use vhdx_ublk::format::region::{Region, RegionTable};
use vhdx_ublk::image::{Image, LogFound, Repair, Report, check, payload_extent, repair};

use crate::sim::disk::{Profile, SimDisk};
use crate::sim::store::Store;
use crate::sim::tasks::{SimTasks, block_on};
use crate::sim::world::{Config, new_image};

const MIB: u64 = 1 << 20;

/// Where a new image of the small configuration has things.
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
const LOG: u64 = MIB;
const METADATA: u64 = 2 * MIB;
const BAT: u64 = 3 * MIB;

const ZERO: u64 = 2;
const BETA_UNMAPPED: u64 = 5;
const PRESENT: u64 = 6;
const RESERVED: u64 = 1 << 9;

/// Blocks of the small configuration, the last one partial.
const BLOCKS: u64 = 7;

/// Cuts per moment and profile.
const CUTS: usize = 3;

/// Damaged images that are examined and repaired.
const MUTANTS: u64 = 1000;

const LOG_GUID: Uuid = Uuid::from_u128(0xfeed);

/// An image with two blocks, a leak between them and an unused tail.
fn image() -> Store {
    let mut store = new_image(&Config::small(), &mut Rng::with_seed(1));
    assert_eq!(store.length, BAT + MIB, "the layout is the one this test knows");
    store.resize(16 * MIB);
    entry(&mut store, 0, (6 * MIB) | PRESENT);
    entry(&mut store, 1, (4 * MIB) | PRESENT);
    for (place, byte) in [(4, 0x44), (5, 0x55), (6, 0x66), (8, 0x88), (9, 0x99)] {
        store.write(place * MIB, &vec![byte; 1 << 20]);
    }
    store
}

fn entry(store: &mut Store, block: u64, word: u64) {
    store.write(BAT + 8 * block, &word.to_le_bytes());
}

/// Damages one bit.
fn flip(store: &mut Store, at: u64) {
    let mut byte = [0];
    store.read(at, &mut byte);
    store.write(at, &[byte[0] ^ 1]);
}

/// Both headers name a log; their checksums are renewed.
fn name_log(store: &mut Store) {
    for at in HEADERS {
        let mut header = vec![0; 4096];
        store.read(at, &mut header);
        header[48..64].copy_from_slice(&LOG_GUID.to_bytes_le());
        seal(&mut header);
        store.write(at, &header);
    }
}

fn seal(structure: &mut [u8]) {
    structure[4..8].fill(0);
    let checksum = crc32c::crc32c(structure);
    structure[4..8].copy_from_slice(&checksum.to_le_bytes());
}

/// One entry to replay, which makes block 2 present at 8 MiB.
fn dirty_log(store: &mut Store) {
    let mut page = Box::new([0; 4096]);
    store.read(BAT, &mut page[..]);
    page[16..24].copy_from_slice(&((8 * MIB) | PRESENT).to_le_bytes());
    let changes = [Change::Data { file_offset: BAT, page }];
    let entry = NewEntry {
        sequence_number: 9,
        tail: 0,
        log_guid: LOG_GUID,
        flushed_file_offset: 4 * MIB,
        last_file_offset: 9 * MIB,
        changes: &changes,
    };
    store.write(LOG, &entry.encode());
    name_log(store);
}

/// Opens an image, replaying its log, and reads some sectors of each block.
fn data(store: &Store) -> Vec<Vec<u8>> {
    read(store).unwrap_or_else(|error| panic!("it does not open: {error}"))
}

fn read(store: &Store) -> Result<Vec<Vec<u8>>> {
    let disk = SimDisk::new(store.clone(), true, true, 512);
    let mut rng = Rng::with_seed(2);
    let image = block_on(Image::open_for_writing(&disk, || Uuid::from_u128(rng.u128(1..))));
    let image = image?;
    let content = disk.content();
    let block = |block: u64| {
        let mut bytes = vec![0; 3 * 512];
        if let Some(extent) = payload_extent(image.map.load(block).entry, image.map.geometry()) {
            for (sector, at) in bytes.chunks_mut(512).zip([0, 77 * 4096, MIB - 512]) {
                content.read(extent.offset + at, sector);
            }
        }
        bytes
    };
    Ok((0..image.map.geometry().block_count().min(BLOCKS)).map(block).collect())
}

fn checked(store: &Store) -> Report {
    block_on(check(&SimDisk::new(store.clone(), true, true, 512))).expect("an image")
}

fn repaired(store: &Store, seed: u64) -> (Repair, Store) {
    let disk = SimDisk::new(store.clone(), true, true, 512);
    let mut rng = Rng::with_seed(seed);
    let outcome = block_on(repair(&disk, || Uuid::from_u128(rng.u128(1..)))).expect("a repair");
    (outcome, disk.content())
}

/// Repairs `damaged` step by step and cuts the power at each one; `judge` sees every file that may be left.
fn cut_everywhere(damaged: &Store, mut judge: impl FnMut(&Store, &mut Rng)) -> Store {
    let disk = SimDisk::new(damaged.clone(), false, true, 512);
    let tasks = SimTasks::default();
    let (mut rng, mut guids) = (Rng::with_seed(3), Rng::with_seed(4));
    let on = disk.clone();
    let result = tasks.start(async move { repair(&on, || Uuid::from_u128(guids.u128(1..))).await });
    let mut steps = 0;
    while tasks.ready() > 0 {
        tasks.run(0);
        for profile in Profile::ALL {
            for _ in 0..CUTS {
                judge(&disk.cut(profile, &mut rng), &mut rng);
            }
        }
        if let Some(place) = disk.places(false, true).first() {
            disk.complete(*place);
        }
        steps += 1;
        assert!(steps < 10_000, "the repair does not end");
    }
    let outcome = result.take().expect("it has ended").expect("a repair");
    assert!(outcome.before.repairable > 0 && steps > 20, "nothing was repaired: {outcome:?}");
    assert_eq!((outcome.after.corruptions, outcome.after.leaks), (0, 0), "{:?}", outcome.after.findings);
    disk.content()
}

/// What every reader accepts stays open to it at every moment, with the same data.
#[test]
fn an_image_that_opens_goes_on_opening() {
    let mut damaged = image();
    entry(&mut damaged, 3, (12 * MIB) | ZERO);
    dirty_log(&mut damaged);
    flip(&mut damaged, HEADERS[0] + 999);
    flip(&mut damaged, REGION_TABLES[0] + 999);
    let report = checked(&damaged);
    assert_eq!((report.log, report.log_entries, report.allocated_blocks), (LogFound::Dirty, 1, 3));
    let expected = data(&damaged);
    assert_eq!((expected[0][0], expected[1][0], expected[2][0]), (0x66, 0x44, 0x88));
    let mut cuts = 0;
    let after = cut_everywhere(&damaged, |cut, _| {
        assert!(data(cut) == expected, "other data after a cut");
        cuts += 1;
    });
    assert!(data(&after) == expected && after.length == 9 * MIB);
    println!("{cuts} cuts");
}

/// Faults of every kind at once, some of which no reader accepts: repairing again always ends well.
#[test]
fn a_repair_that_was_cut_short_is_ended_by_the_next() {
    let mut damaged = image();
    flip(&mut damaged, HEADERS[1] + 999);
    flip(&mut damaged, REGION_TABLES[1] + 999);
    flip(&mut damaged, METADATA + 8);
    entry(&mut damaged, 0, (6 * MIB) | RESERVED | PRESENT);
    entry(&mut damaged, 4, (9 * MIB) | BETA_UNMAPPED);
    entry(&mut damaged, 5, RESERVED | ZERO);
    let (outcome, whole) = repaired(&damaged, 5);
    assert_eq!((outcome.before.corruptions, outcome.before.beyond_repair), (6, 0), "{outcome:?}");
    let expected = data(&whole);
    assert_eq!((expected[0][0], expected[1][0], expected[4][0]), (0x66, 0x44, 0x99));
    cut_everywhere(&damaged, |cut, rng| {
        let (outcome, again) = repaired(cut, rng.u64(..));
        assert_eq!(outcome.before.beyond_repair, 0, "{:?}", outcome.before.findings);
        assert_eq!((outcome.after.corruptions, outcome.after.leaks), (0, 0), "{:?}", outcome.after.findings);
        assert!(data(&again) == expected, "other data after a cut and a second repair");
    });
}

/// Both region tables change in sectors far from each other, so a change in place could leave none intact.
#[test]
fn both_region_tables_change_as_one() {
    let mut damaged = image();
    let region = |guid, offset, length| Region { guid, offset, length, required: false };
    let mut regions = vec![region(REGION_BAT, BAT, 1 << 20), region(REGION_METADATA, METADATA, 1 << 20)];
    regions.extend((1..20).map(|number| region(Uuid::from_u128(number), MIB, 0)));
    let mut table = RegionTable::new(regions).expect("a good table").encode();
    let last_entry = 16 + 20 * 32;
    table[last_entry + 31] = 0x80;
    seal(&mut table);
    for at in REGION_TABLES {
        damaged.write(at, &table);
    }
    let expected = data(&damaged);
    let after = cut_everywhere(&damaged, |cut, _| {
        assert!(data(cut) == expected, "other data after a cut");
    });
    assert_eq!(checked(&after).findings, []);
}

/// A log that was never written is declared empty at one stroke.
#[test]
fn a_virgin_log_is_cleared() {
    let mut damaged = image();
    name_log(&mut damaged);
    assert_eq!(checked(&damaged).log, LogFound::Virgin);
    let expected = data(&damaged);
    let after = cut_everywhere(&damaged, |cut, _| {
        let report = checked(cut);
        assert!(matches!(report.log, LogFound::Virgin | LogFound::Clean), "{report:?}");
        assert!(data(cut) == expected, "other data after a cut");
    });
    assert_eq!(checked(&after).findings, []);
}

/// The signature is written last: until then the file is no image to anybody, and repairing it again ends it.
#[test]
fn a_lost_signature_comes_back_behind_everything_else() {
    let mut damaged = image();
    flip(&mut damaged, 0);
    flip(&mut damaged, HEADERS[0] + 999);
    entry(&mut damaged, 0, (6 * MIB) | RESERVED | PRESENT);
    let (outcome, whole) = repaired(&damaged, 6);
    assert_eq!((outcome.before.corruptions, outcome.after.corruptions), (3, 0), "{outcome:?}");
    let expected = data(&whole);
    assert_eq!(expected[0][0], 0x66);
    let after = cut_everywhere(&damaged, |cut, rng| {
        assert!(
            data(&repaired(cut, rng.u64(..)).1) == expected,
            "other data after a cut and a second repair"
        );
    });
    assert!(data(&after) == expected);
}

/// An image with a fault beyond repair keeps its free space: the fault may hide a block in it.
#[test]
fn space_is_kept_while_a_fault_is_left() {
    let mut damaged = image();
    entry(&mut damaged, 3, (5 * MIB) | 4);
    flip(&mut damaged, REGION_TABLES[1] + 999);
    let (outcome, after) = repaired(&damaged, 6);
    assert_eq!((outcome.before.corruptions, outcome.before.beyond_repair), (2, 1), "{outcome:?}");
    assert_eq!((outcome.after.corruptions, outcome.after.leaks), (1, 1), "{outcome:?}");
    assert_eq!(outcome.after.repairable, 0, "nothing is offered that would not be done: {outcome:?}");
    assert_eq!((after.length, damaged.length), (16 * MIB, 16 * MIB));
    let mut bytes = [0; 4];
    after.read(5 * MIB, &mut bytes);
    assert_eq!(bytes, [0x55; 4]);
}

/// What is sound is not touched: no write, no sync, no new GUID.
#[test]
fn nothing_is_written_to_a_sound_image() {
    let store = new_image(&Config::small(), &mut Rng::with_seed(1));
    let disk = SimDisk::new(store, true, true, 512);
    let before = disk.activity();
    block_on(repair(&disk, || panic!("no GUID is needed"))).expect("an image");
    let after = disk.activity();
    assert_eq!((after.writes, after.syncs, after.resizes, after.zeroes), (before.writes, before.syncs, 0, 0));
}

/// Changes a byte or a word of some structure, and often renews the checksum over it.
fn mutate(store: &mut Store, rng: &mut Rng) {
    let copy = rng.usize(..2);
    let (start, length, sealed) = match rng.u32(..7) {
        0 => (HEADERS[copy], 80, 4096),
        1 => (REGION_TABLES[copy], 16 + 3 * 32, 64 << 10),
        2 => (METADATA, 32 + 6 * 32, 0),
        3 => (METADATA + (64 << 10), 40, 0),
        4 => (LOG, 2 * 4096, 0),
        5 => return entry(store, rng.u64(..BLOCKS), any_entry(rng)),
        _ => return store.resize(rng.u64(..20) * MIB + rng.u64(..2) * 4097),
    };
    let at = start + rng.u64(..length);
    let byte = rng.choice([0, 1, 3, 0x80, 0xff]).expect("not empty");
    store.write(at, &[byte]);
    if sealed > 0 && rng.bool() {
        let mut structure = vec![0; sealed];
        store.read(start, &mut structure);
        seal(&mut structure);
        store.write(start, &structure);
    }
}

fn any_entry(rng: &mut Rng) -> u64 {
    (rng.u64(..20) * MIB) | (rng.u64(..4) / 3 * RESERVED) | rng.u64(..8)
}

/// Whatever a file holds: neither an examination nor a repair panics; what is called sound opens; and a
/// repair leaves an image that opened with the data it had.
#[test]
fn what_is_called_sound_opens_and_a_repair_keeps_what_opened() {
    let (mut sound, mut opened, mut mended) = (0, 0, 0);
    for seed in 0..MUTANTS {
        let mut rng = Rng::with_seed(seed);
        let mut store = image();
        if rng.bool() {
            dirty_log(&mut store);
        }
        (0..rng.u32(1..5)).for_each(|_| mutate(&mut store, &mut rng));
        let before = read(&store);
        let disk = SimDisk::new(store.clone(), true, true, 512);
        let Ok(report) = block_on(check(&disk)) else {
            assert!(before.is_err(), "seed {seed}: it opens, and nothing could be told");
            continue;
        };
        let is_sound = report.complete && report.corruptions == 0;
        assert!(!is_sound || before.is_ok(), "seed {seed}: called sound: {:?}", before.err());
        let Ok(outcome) = block_on(repair(&disk, || Uuid::from_u128(rng.u128(1..)))) else { continue };
        let after = read(&disk.content());
        let mends = outcome.after.complete && outcome.after.corruptions == 0;
        assert!(!mends || after.is_ok(), "seed {seed}: called mended: {:?}", after.err());
        if let Ok(before) = before {
            opened += 1;
            assert!(after.is_ok_and(|after| after == before), "seed {seed}: other data after a repair");
        }
        sound += u32::from(is_sound);
        mended += u32::from(!is_sound && mends);
    }
    println!("{MUTANTS} mutants: {opened} opened, {sound} were sound, {mended} were mended");
    assert!(sound > 50 && opened > sound && mended > 50, "{opened} opened, {sound} sound, {mended} mended");
}
