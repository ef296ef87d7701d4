//! The good images that hostile ones are made from: small, and one of each kind.

use fastrand::Rng;
use uuid::Uuid;
use vhdx_ublk::format::guid;
use vhdx_ublk::format::locator::{self, ParentLocator};
use vhdx_ublk::format::metadata::{Metadata, Table};

use crate::craft::{
    BAT, Change, Craft, END, LOG_GUID, LogEntry, METADATA, MIB, REGION_TABLE_BYTES, REGION_TABLES,
};
use crate::sim::lineage::descent;
use crate::sim::store::Store;
use crate::sim::world::{Beginning, Config, World, new_image};

/// One image of each kind.
pub fn images() -> Vec<Store> {
    let mut large_sectors = Config::small();
    large_sectors.image.logical_sector_size = 4096;
    let mut fixed = Config::small();
    fixed.image.fixed = true;
    let mut large = Config::small();
    large.image.virtual_size = 1 << 42;
    large.image.block_size = 256 << 20;
    let mut images: Vec<Store> =
        [Config::small(), large_sectors.clone(), fixed, large].iter().map(|config| used(config, 1)).collect();
    for seed in 1..4 {
        images.push(dirty(&Config::small(), seed));
        images.push(dirty(&large_sectors, seed));
    }
    images.push(child());
    images.push(crafted_log());
    images
}

/// Differencing images: laid out by hand, closed, and with a log to replay.
pub fn children() -> Vec<Store> {
    let mut config = Config::small();
    config.image.parent = Some(descent());
    let partial = Config { beginning: Beginning::Partial, ..config.clone() };
    let left_over = Config { beginning: Beginning::LeftOver, ..config.clone() };
    let mut images = vec![child()];
    for (seed, config) in (1..).zip([config, partial, left_over]) {
        images.push(used(&config, seed));
        images.push(dirty(&config, seed));
    }
    images
}

fn world(config: &Config, seed: u64) -> World {
    let config = Config { requests: 40, ..config.clone() };
    let mut rng = Rng::with_seed(seed);
    let content = new_image(&config, &mut rng);
    let oracle = config.oracle();
    World::open(config, content, oracle, rng)
}

/// An image that was written to and closed.
fn used(config: &Config, seed: u64) -> Store {
    let mut world = world(config, seed);
    world.drain();
    world.close()
}

/// An image that a power cut has left with a log to replay.
pub fn dirty(config: &Config, seed: u64) -> Store {
    let mut world = world(config, seed);
    world.drain();
    world.cut_file()
}

/// Children whose locators have no room for another key: one has as many pairs as are supported, one is an
/// item of the most bytes.
pub fn full_children() -> Vec<Store> {
    let mut pairs = linkage();
    (1..locator::MAX_PAIRS).for_each(|key| pairs.set(&format!("key{key}"), "x"));
    let mut bytes = linkage();
    let left = |locator: &ParentLocator| (1 << 20) - locator.encode().len();
    for key in 0.. {
        match left(&bytes) {
            many @ ..60_000 => {
                bytes.set("rest", "x".repeat((many - 12 - 8) / 2));
                break;
            }
            _ => bytes.set(&format!("key{key}"), "x".repeat(16_000)),
        }
    }
    assert_eq!((pairs.entries.len(), left(&bytes)), (locator::MAX_PAIRS, 0), "no room is left");
    [pairs, bytes].map(|locator| with_locator(&locator)).into()
}

/// The child with another locator, in a metadata region of 2 MiB behind the blocks.
fn with_locator(locator: &ParentLocator) -> Store {
    let mut image = Craft { file: child() };
    let mut region = image.read(METADATA, 1 << 20);
    let mut entries = Table::parse(&region, 1 << 20).expect("its own").entries().to_vec();
    let item = locator.encode();
    let entry = entries.iter_mut().find(|entry| entry.item_id == guid::PARENT_LOCATOR).expect("a child");
    entry.length = u32::try_from(item.len()).expect("an item");
    let at = usize::try_from(entry.offset).expect("small");
    region.resize(2 << 20, 0);
    region[at..at + item.len()].copy_from_slice(&item);
    let table = Table::new(entries, 2 << 20).expect("the locator comes last").encode();
    region[..table.len()].copy_from_slice(&table);
    let end = image.file.length;
    image.file.resize(end + 2 * MIB);
    image.write(end, &region);
    for table in REGION_TABLES {
        image.change_sealed(table, REGION_TABLE_BYTES, |table| {
            let is_metadata = |entry: &&mut [u8]| entry[16..24] == METADATA.to_le_bytes();
            let entry = table[16..].chunks_exact_mut(32).find(is_metadata).expect("a region");
            entry[16..24].copy_from_slice(&end.to_le_bytes());
            entry[24..28].copy_from_slice(&(2_u32 << 20).to_le_bytes());
        });
    }
    let found = image.open_read_only().expect("a good image").0.metadata.parent_locator.clone();
    assert_eq!(found.as_ref(), Some(locator));
    image.file
}

fn linkage() -> ParentLocator {
    let mut parent = ParentLocator::default();
    parent.set(locator::PARENT_LINKAGE, guid::print(Uuid::from_u128(6)));
    parent
}

/// A differencing image with a block and a sector bitmap of its own.
fn child() -> Store {
    let config = Config::small();
    let mut parent = linkage();
    parent.set(locator::RELATIVE_PATH, ".\\parent.vhdx");
    let metadata = Metadata {
        block_size: config.image.block_size,
        leave_blocks_allocated: false,
        has_parent: true,
        virtual_size: config.image.virtual_size,
        disk_id: Uuid::from_u128(5),
        logical_sector_size: 512,
        physical_sector_size: 4096,
        parent_locator: Some(parent),
    };
    let mut image = Craft::new(&config);
    image.write(METADATA, &vec![0; 1 << 20]);
    image.write(METADATA, &metadata.encode_region());
    image.file.resize(END + 2 * MIB);
    image.set_slot(0, END | 7);
    image.set_slot(4096, (END + MIB) | 6);
    image.file
}

/// A log of many kinds of entry.
fn crafted_log() -> Store {
    let mut image = Craft::new(&Config::small());
    let page = |number: u64, fill| Change::Page { at: BAT + 4096 * number, fill };
    let zeros = Change::Zeros { at: BAT + 4096, length: 16 * 4096 };
    let many: Vec<Change> = (1..=130).map(|number| page(number, 9)).collect();
    let entries = [
        (250, LogEntry::new(7, 250, &[page(1, 1), zeros])),
        (252, LogEntry::new(8, 250, &[page(2, 2), page(3, 3), page(4, 4), page(5, 5)])),
        (1, LogEntry::new(9, 252, &many)),
    ];
    image.name_log(LOG_GUID);
    for (sector, entry) in &entries {
        image.write_log(*sector, &entry.encode());
    }
    image.file
}
