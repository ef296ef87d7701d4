//! Chains of random images, and what a reader of them has to see. Encoder and reader are the tests' own.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use fastrand::Rng;
use uuid::Uuid;
use vhdx_ublk::chain;
use vhdx_ublk::error::Result;
use vhdx_ublk::format::bat::{BITMAP_BLOCK_SIZE, BatEntry, ENTRY_SIZE, Geometry, PayloadState};
use vhdx_ublk::format::locator::RELATIVE_PATH;
use vhdx_ublk::image::{Image, InitialState, NewImage, ReadImage, Report, check};

use super::disk::SimDisk;
use super::store::Store;
use super::tasks::block_on;
use super::violation::violated;

pub const MIB: u64 = 1 << 20;

/// Sectors that are looked at in a MiB: at its ends, and some between that share pages.
const WATCHED: [u64; 24] = [
    0, 1, 2, 7, 8, 9, 15, 16, 17, 18, 19, 20, 1023, 1024, 1025, 1026, 1027, 1028, 1029, 1030, 2040, 2041,
    2046, 2047,
];

/// Larger disks have content at their start and around some ends only.
const SMALL: u64 = 24 * MIB;

/// What a layer says of the sectors in which it has something; nothing where it leaves one to its parent.
pub struct Layer {
    said: BTreeMap<u64, Option<u64>>,
    differencing: bool,
}

impl Layer {
    fn get(&self, sector: u64) -> Option<u64> {
        let unsaid = if self.differencing { None } else { Some(0) };
        self.said.get(&sector).copied().unwrap_or(unsaid)
    }
}

/// The shape of one image of a chain.
#[derive(Clone, Copy)]
pub struct Shape {
    pub virtual_size: u64,
    pub block_size: u32,
    pub fixed: bool,
}

pub const fn shape(mib: u64, block_mib: u32) -> Shape {
    Shape { virtual_size: mib * MIB, block_size: block_mib << 20, fixed: false }
}

/// A chain of random images, `0` the leaf, and what its layers have.
pub struct Chain {
    pub stores: BTreeMap<PathBuf, Store>,
    pub names: Vec<PathBuf>,
    pub shapes: Vec<Shape>,
    layers: Vec<Layer>,
    /// The MiB of the disk that are looked at.
    mibs: BTreeSet<u64>,
}

impl Chain {
    pub fn new(rng: &mut Rng, shapes: &[Shape]) -> Self {
        Self::watching(rng, shapes, &[])
    }

    /// As [`Chain::new`]; there is something around these `ends`, too, and they are looked at.
    pub fn watching(rng: &mut Rng, shapes: &[Shape], ends: &[u64]) -> Self {
        let names: Vec<PathBuf> = (0..shapes.len()).map(|number| format!("/{number}.vhdx").into()).collect();
        let ends = shapes.iter().map(|shape| shape.virtual_size).chain(ends.iter().copied());
        let (stores, shapes, layers) = (BTreeMap::new(), shapes.to_vec(), Vec::new());
        let mut chain = Self { stores, names, shapes, layers, mibs: ends.flat_map(mibs_around).collect() };
        let mut parent = None;
        for (number, shape) in chain.shapes.iter().enumerate().rev() {
            let differencing = parent.is_some();
            let store = empty(rng, *shape, parent);
            let (store, layer) = fill(store, rng, number, (*shape, differencing), &chain.mibs);
            parent = Some((chain.names[number].clone(), data_write_guid(&store)));
            chain.stores.insert(chain.names[number].clone(), store);
            chain.layers.insert(0, layer);
        }
        chain
    }

    /// The sectors that are looked at, in a disk of `virtual_size` bytes.
    pub fn watched(&self, virtual_size: u64) -> impl Iterator<Item = u64> {
        let all = self.mibs.iter().flat_map(|mib| WATCHED.map(|sector| mib * 2048 + sector));
        all.filter(move |sector| sector * 512 < virtual_size)
    }

    /// What the disk is, by the format's own words.
    pub fn disk(&self) -> BTreeMap<u64, u64> {
        let says = |sector: u64| {
            let layers = self.layers.iter().zip(&self.shapes);
            for (layer, shape) in layers {
                if sector * 512 >= shape.virtual_size {
                    return 0;
                }
                if let Some(value) = layer.get(sector) {
                    return value;
                }
            }
            0
        };
        self.watched(self.shapes[0].virtual_size).map(|sector| (sector, says(sector))).collect()
    }
}

/// All of a small disk, or the first MiB of a large one and some around its end.
fn mibs_around(end: u64) -> Vec<u64> {
    let count = end.div_ceil(MIB);
    if end <= SMALL {
        return (0..count).collect();
    }
    (0..3).chain(count.saturating_sub(3)..count + 3).collect()
}

pub fn data_write_guid(store: &Store) -> Uuid {
    opened(store).expect("an image").header.header.data_write_guid
}

pub fn opened(store: &Store) -> Result<ReadImage> {
    block_on(Image::read(&SimDisk::new(store.clone(), true, true, 512)))
}

/// A new image, over the parent that this path and linkage name.
pub fn empty(rng: &mut Rng, shape: Shape, parent: Option<(PathBuf, Uuid)>) -> Store {
    let descent = |(path, linkage): (PathBuf, Uuid)| {
        chain::parent_ref_of(&path, linkage, Uuid::from_u128(99), Path::new("/")).expect("a path in UTF-8")
    };
    let new = NewImage {
        virtual_size: shape.virtual_size,
        fixed: shape.fixed,
        block_size: shape.block_size,
        log_length: 1 << 20,
        logical_sector_size: 512,
        physical_sector_size: 4096,
        initial_state: InitialState::NotPresent,
        parent: parent.map(descent),
    };
    let disk = SimDisk::new(Store::default(), true, true, 512);
    block_on(new.write(&disk, || Uuid::from_u128(rng.u128(1..)))).expect("a legal image");
    disk.content()
}

/// Makes the file longer by `length` bytes; returns where they are.
fn take(store: &mut Store, length: u64) -> u64 {
    let at = store.length;
    store.resize(at + length);
    at
}

/// The entry of a block in a random state; `take` gives it space.
fn random_entry(rng: &mut Rng, differencing: bool, take: impl FnOnce() -> u64) -> BatEntry {
    match rng.u32(0..if differencing { 9 } else { 6 }) {
        0 => BatEntry::zero(),
        1 => BatEntry::unmapped(),
        2 => BatEntry(1),
        3 => BatEntry::not_present(),
        4 | 5 => BatEntry::present(take()),
        _ => BatEntry::partially_present(take()),
    }
}

/// What a sector holds in a block of this state whose bit for it is not set; `None` if the parents have it.
fn value_under(state: Option<PayloadState>, differencing: bool, value: u64) -> Option<u64> {
    match state {
        Some(PayloadState::FullyPresent) => Some(value),
        Some(PayloadState::PartiallyPresent) => None,
        Some(PayloadState::NotPresent) if differencing => None,
        _ => Some(0),
    }
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).expect("small")
}

/// The sector bitmaps of a child, by chunk: where they are, and their bits.
#[derive(Default)]
struct Bitmaps(BTreeMap<u64, (u64, Vec<u8>)>);

impl Bitmaps {
    /// The bits of `block`.
    fn bits(&mut self, store: &mut Store, geometry: &Geometry, block: u64) -> &mut [u8] {
        let chunk = self.0.entry(geometry.chunk_of_block(block));
        let new = || (take(store, BITMAP_BLOCK_SIZE), vec![0xa5; size(BITMAP_BLOCK_SIZE)]);
        let slice = geometry.bitmap_slice(block);
        &mut chunk.or_insert_with(new).1[size(slice.start)..size(slice.end)]
    }
}

/// Gives random states to the blocks of an empty image that have one of `mibs`, and content to those that
/// have some.
fn fill(
    mut store: Store,
    rng: &mut Rng,
    number: usize,
    (shape, differencing): (Shape, bool),
    mibs: &BTreeSet<u64>,
) -> (Store, Layer) {
    let empty = opened(&store).expect("a new image");
    let geometry = Geometry::new(shape.virtual_size, shape.block_size, 512, differencing);
    let bat = empty.layout.bat.offset;
    let mut layer = Layer { said: BTreeMap::new(), differencing };
    let slot = |store: &mut Store, slot: u64, entry: BatEntry| {
        store.write(bat + slot * ENTRY_SIZE as u64, &entry.write());
    };
    let blocks: BTreeSet<u64> = mibs.iter().map(|mib| geometry.block_of_offset(mib * MIB)).collect();
    let mut bitmaps = Bitmaps::default();
    for block in blocks.into_iter().filter(|block| *block < geometry.block_count()) {
        let entry = if shape.fixed {
            empty.map.load(block).entry
        } else {
            random_entry(rng, differencing, || take(&mut store, geometry.block_size()))
        };
        slot(&mut store, geometry.payload_slot(block), entry);
        let partial = entry.payload_state() == Some(PayloadState::PartiallyPresent);
        // Others leave bits of blocks that are not partially present.
        let mut bits = if partial || (differencing && rng.bool()) {
            bitmaps.bits(&mut store, &geometry, block).to_vec()
        } else {
            vec![0; size(geometry.block_size() / 512 / 8)]
        };
        if partial {
            bits.fill(0);
        }
        let said = fill_block(&mut store, rng, number, (block, entry), (&geometry, differencing), &mut bits);
        layer.said.extend(said);
        if bitmaps.0.contains_key(&geometry.chunk_of_block(block)) {
            bitmaps.bits(&mut store, &geometry, block).copy_from_slice(&bits);
        }
    }
    for (chunk, (place, bits)) in bitmaps.0 {
        slot(&mut store, geometry.bitmap_slot(chunk), BatEntry::present(place));
        store.write(place, &bits);
    }
    // Others left something behind the last block.
    let room = empty.layout.bat.length / ENTRY_SIZE as u64;
    let last = geometry.payload_slot(geometry.block_count());
    for behind in (last..last + 4).chain(last + 600..last + 604) {
        if behind < room && !geometry.is_bitmap_slot(behind) {
            slot(&mut store, behind, BatEntry::present(77 * MIB));
        }
    }
    (store, layer)
}

/// Gives content to a block; returns what its sectors say.
fn fill_block(
    store: &mut Store,
    rng: &mut Rng,
    number: usize,
    (block, entry): (u64, BatEntry),
    (geometry, differencing): (&Geometry, bool),
    bits: &mut [u8],
) -> BTreeMap<u64, Option<u64>> {
    let mut said = BTreeMap::new();
    let mibs = 0..geometry.block_size() / MIB;
    for within in mibs.flat_map(|mib| WATCHED.map(|sector| mib * 2048 + sector)) {
        let sector = block * geometry.block_size() / 512 + within;
        let bits = &mut bits[size(within / 8)];
        if sector * 512 >= geometry.virtual_size() {
            // Others left something behind the end of the disk.
            *bits |= rng.u8(0..2) << (within % 8);
            if entry.offset() != 0 {
                store.write(entry.offset() + within * 512, &u64::MAX.to_le_bytes());
            }
            continue;
        }
        let value = (number as u64 + 1) << 56 | (sector + 1);
        let says = match entry.payload_state() {
            Some(PayloadState::PartiallyPresent) if rng.bool() => {
                *bits |= 1 << (within % 8);
                Some(value)
            }
            state => value_under(state, differencing, value),
        };
        // A sector that is not there may have content in the file, which must not be read.
        if entry.offset() != 0 {
            let stored = if says.is_some() { value } else { u64::MAX };
            store.write(entry.offset() + within * 512, &stored.to_le_bytes());
        }
        said.insert(sector, says);
    }
    said
}

/// One layer as a reader has it.
pub struct Opened {
    pub image: ReadImage,
    pub store: Store,
}

/// The image in `store`, its bitmaps read.
pub fn read(store: &Store) -> Result<Opened> {
    let disk = SimDisk::new(store.clone(), true, true, 512);
    let open = async {
        let image = Image::read(&disk).await?;
        image.read_bitmaps(&disk).await?;
        Result::Ok(image)
    };
    block_on(open).map(|image| Opened { image, store: store.clone() })
}

/// The chain that begins at `leaf`, every link of which is recognised.
pub fn open_chain(stores: &BTreeMap<PathBuf, Store>, leaf: &Path) -> (Vec<PathBuf>, Vec<Opened>) {
    let (mut names, mut chain): (Vec<PathBuf>, Vec<Opened>) = (Vec::new(), Vec::new());
    let mut next = Some(leaf.to_owned());
    while let Some(name) = next.take() {
        let store = stores.get(&name).unwrap_or_else(|| violated(format!("{} is gone", name.display())));
        let opened = read(store).unwrap_or_else(|error| violated(format!("{}: {error}", name.display())));
        if let Some(child) = chain.last() {
            let locator = child.image.metadata.parent_locator.as_ref().expect("it has a parent");
            let guid = opened.image.header.header.data_write_guid;
            let known = [locator.linkage().ok(), locator.linkage2()];
            if !known.contains(&Some(guid)) {
                violated(format!("{} is not recognised: {locator:?} {guid}", name.display()));
            }
        }
        let locator = opened.image.metadata.parent_locator.as_ref();
        let relative = locator.map(|locator| locator.get(RELATIVE_PATH).expect("a path"));
        next = relative.map(|path| Path::new("/").join(path.strip_prefix(r".\").expect("the same folder")));
        names.push(name);
        chain.push(opened);
    }
    (names, chain)
}

/// The first eight bytes of a sector, as a reader of the chain sees them.
pub fn says<'a>(chain: impl IntoIterator<Item = &'a Opened>, sector: u64) -> u64 {
    for Opened { image, store } in chain {
        let geometry = image.map.geometry();
        if sector * 512 >= geometry.virtual_size() {
            return 0;
        }
        let block = geometry.block_of_offset(sector * 512);
        let within = geometry.offset_in_block(sector * 512);
        let entry = image.map.load(block).entry;
        let here = match entry.payload_state() {
            Some(PayloadState::FullyPresent) => true,
            Some(PayloadState::PartiallyPresent) => {
                image.map.bitmaps().has(geometry, block, within / 512..within / 512 + 1)
            }
            Some(PayloadState::NotPresent) if geometry.is_differencing() => false,
            _ => return 0,
        };
        if here {
            let mut bytes = [0; 8];
            store.read(entry.offset() + within, &mut bytes);
            return u64::from_le_bytes(bytes);
        }
    }
    0
}

pub fn guids(seed: u64) -> impl FnMut() -> Uuid + Clone + 'static {
    let rng = Rc::new(RefCell::new(Rng::with_seed(seed)));
    move || Uuid::from_u128(rng.borrow_mut().u128(1..))
}

/// The image in `store`, in which nothing contradicts the format.
pub fn examined(store: &Store) -> Report {
    let report = block_on(check(&SimDisk::new(store.clone(), true, true, 512))).expect("an image");
    if report.corruptions > 0 {
        violated(format!("it is corrupt: {:?}", report.findings));
    }
    report
}
