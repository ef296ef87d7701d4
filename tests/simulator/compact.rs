//! Promise defended here: a compaction changes nothing of what a disk reads as, wherever the power is cut in
//! it, and one that was cut or has failed is done again and ends; then the file is as short as was promised.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use fastrand::Rng;
use uuid::Uuid;
use vhdx_ublk::chain::{self, ReadLayer};
use vhdx_ublk::error::{Kind, Result};
use vhdx_ublk::format::bat::{BITMAP_BLOCK_SIZE, BatEntry, ENTRY_SIZE, Geometry, PayloadState};
use vhdx_ublk::format::guid;
use vhdx_ublk::image::{Extent, Image, InitialState, NewImage, ReadImage, check};
use vhdx_ublk::operations::Watch;
use vhdx_ublk::operations::compact::{Compaction, Done, Steps, outline};

use crate::sim::disk::{Effect, Fault, Injection, Owner, Profile, SimDisk};
use crate::sim::layers::{self, Chain};
use crate::sim::store::Store;
use crate::sim::tasks::{SimTasks, block_on};
use crate::sim::violation::violated;
use crate::sim::watched::run_watched;

const MIB: u64 = 1 << 20;

/// Crash states that a run of the tests judges, at least.
const STATES: usize = 30_000;

/// Sectors that are looked at in every MiB.
const WATCHED: [u64; 10] = [0, 1, 7, 8, 127, 128, 1024, 1029, 2046, 2047];

/// What is written where nothing may be read.
const STALE: u64 = u64::MAX;

const ALL: Steps = Steps { zeros: true, length: true, defragment: false };
const SORT: Steps = Steps { defragment: true, ..ALL };

/// What the images of a seed are put through.
fn steps_of(seed: u64) -> Steps {
    if seed % 3 == 2 { SORT } else { ALL }
}

/// The shape of an image.
#[derive(Clone, Copy)]
struct Shape {
    block_mib: u32,
    child: bool,
    fixed: bool,
    /// Blocks that may have content, half of them in the disk's last chunk.
    blocks: u64,
}

impl Shape {
    fn block_size(self) -> u64 {
        u64::from(self.block_mib) * MIB
    }

    /// A child's disk has two chunks.
    fn virtual_size(self) -> u64 {
        let first = if self.child { 4096 * MIB } else { self.blocks / 2 * self.block_size() };
        first + (self.blocks - self.blocks / 2) * self.block_size() - 512 * 3
    }

    fn new_image(self) -> NewImage {
        let parent = || {
            let (path, linkage) = (Path::new("/parent.vhdx"), Uuid::from_u128(7));
            chain::parent_ref_of(path, linkage, Uuid::from_u128(99), Path::new("/")).expect("a path in UTF-8")
        };
        NewImage {
            virtual_size: self.virtual_size(),
            fixed: self.fixed,
            block_size: self.block_mib << 20,
            log_length: 1 << 20,
            logical_sector_size: 512,
            physical_sector_size: 4096,
            initial_state: InitialState::NotPresent,
            parent: self.child.then(parent),
        }
    }
}

/// What the watched sectors of a disk read as; nothing where the parents are to be asked.
type Content = BTreeMap<u64, Option<u64>>;

/// An image with free space between its blocks, and what its disk reads as.
struct Sample {
    store: Store,
    content: Content,
}

/// Something that gets a place.
#[derive(Clone, Copy)]
enum Part {
    Bitmap(u64),
    Block(u64, BatEntry),
}

impl Sample {
    fn new(rng: &mut Rng, shape: Shape) -> Self {
        let disk = SimDisk::new(Store::default(), true, true, 512);
        block_on(shape.new_image().write(&disk, || Uuid::from_u128(rng.u128(1..)))).expect("a legal image");
        let mut store = disk.content();
        let image = opened(&store).expect("a new image");
        let geometry = *image.map.geometry();
        let mut sample = Self { store: store.clone(), content: Content::new() };
        if shape.fixed {
            sample.fill_fixed(rng, &image);
            return sample;
        }
        let mut parts = random_parts(rng, &geometry, shape);
        let bat = image.layout.bat.offset;
        let mut bitmaps = [0; 2];
        let mut slots = Vec::new();
        for part in &mut parts {
            let free = if rng.bool() { rng.u64(1..5) * MIB } else { 0 };
            let at = store.length + free;
            let (slot, entry, length) = match part {
                Part::Bitmap(chunk) => {
                    bitmaps[usize::try_from(*chunk).expect("two")] = at;
                    (geometry.bitmap_slot(*chunk), BatEntry::present(at), BITMAP_BLOCK_SIZE)
                }
                Part::Block(block, entry) => {
                    let named = entry.offset() != 0;
                    let length = if named { geometry.block_size() } else { 0 };
                    *entry = BatEntry(entry.0 % 8 + if named { at } else { 0 });
                    (geometry.payload_slot(*block), *entry, length)
                }
            };
            if length > 0 {
                store.resize(at + length);
                stain(rng, &mut store, at - free, free);
            }
            slots.push((slot, entry));
        }
        if rng.bool() {
            let end = store.length;
            store.resize(end + rng.u64(1..6) * MIB);
            stain(rng, &mut store, end, MIB);
        }
        for (slot, entry) in slots {
            store.write(bat + slot * ENTRY_SIZE as u64, &entry.write());
        }
        sample.store = store;
        for part in parts {
            if let Part::Block(block, entry) = part {
                let bitmap = bitmaps[usize::try_from(geometry.chunk_of_block(block)).expect("two")];
                sample.fill(rng, &geometry, block, entry, bitmap);
            }
        }
        sample.move_regions(rng);
        sample
    }

    /// Gives content to the blocks of a fixed image; some of them have none, and keep their space.
    fn fill_fixed(&mut self, rng: &mut Rng, image: &Image) {
        let geometry = *image.map.geometry();
        for block in 0..geometry.block_count() {
            let mut entry = image.map.load(block).entry;
            if rng.u32(0..4) == 0 {
                entry = BatEntry(entry.offset() | [1, 3][rng.usize(0..2)]);
                let slot = image.layout.bat.offset + geometry.payload_slot(block) * ENTRY_SIZE as u64;
                self.store.write(slot, &entry.write());
            }
            self.fill(rng, &geometry, block, entry, 0);
        }
        self.move_regions(rng);
    }

    /// Puts the BAT or the metadata, or both, behind everything.
    fn move_regions(&mut self, rng: &mut Rng) {
        for which in [guid::REGION_BAT, guid::REGION_METADATA] {
            if rng.u32(0..3) > 0 {
                continue;
            }
            let disk = SimDisk::new(self.store.clone(), true, true, 512);
            let to = self.store.length + rng.u64(0..3) * MIB;
            let moved = async {
                let image = Image::open_for_writing(&disk, guids(1)).await?;
                let to = Extent { offset: to, length: MIB };
                image.move_region(&disk, which, to, guids(2)).await.map(drop)
            };
            block_on(moved).expect("room");
            self.store = disk.content();
        }
    }

    /// Gives content to a block.
    fn fill(&mut self, rng: &mut Rng, geometry: &Geometry, block: u64, entry: BatEntry, bitmap: u64) {
        let state = entry.payload_state();
        let zero = state == Some(PayloadState::FullyPresent) && rng.u32(0..3) == 0;
        let start = block * geometry.block_size() / 512;
        for within in watched(geometry.block_size()) {
            let (sector, value) = (start + within, if zero { 0 } else { 1 << 56 | (start + within + 1) });
            let here = match state {
                Some(PayloadState::FullyPresent) => true,
                Some(PayloadState::PartiallyPresent) => rng.bool(),
                _ => false,
            };
            if entry.offset() != 0 {
                let stored = if here { value } else { STALE };
                // Zeros that the host stores.
                self.store.write(entry.offset() + within * 512, &STALE.to_le_bytes());
                self.store.write(entry.offset() + within * 512, &stored.to_le_bytes());
            }
            if here && state == Some(PayloadState::PartiallyPresent) {
                let place = bitmap + geometry.bitmap_slice(block).start + within / 8;
                let mut byte = [0];
                self.store.read(place, &mut byte);
                self.store.write(place, &[byte[0] | 1 << (within % 8)]);
            }
            let below = geometry.is_differencing()
                && matches!(state, Some(PayloadState::NotPresent | PayloadState::PartiallyPresent));
            let reads = if here { Some(value) } else { (!below).then_some(0) };
            if sector * 512 < geometry.virtual_size() {
                self.content.insert(sector, reads);
            } else if entry.offset() != 0 {
                self.store.write(entry.offset() + within * 512, &STALE.to_le_bytes());
            }
        }
    }
}

/// The blocks that may have content: the first and the last ones.
fn candidates(geometry: &Geometry, shape: Shape) -> impl Iterator<Item = u64> + use<> {
    let count = geometry.block_count();
    let last = shape.blocks - shape.blocks / 2;
    (0..shape.blocks / 2).chain(count - last..count)
}

/// What gets a place, in random order.
fn random_parts(rng: &mut Rng, geometry: &Geometry, shape: Shape) -> Vec<Part> {
    let mut parts: Vec<Part> =
        candidates(geometry, shape).map(|block| random_part(rng, shape, block)).collect();
    if shape.child {
        parts.extend([Part::Bitmap(0), Part::Bitmap(1)]);
    }
    rng.shuffle(&mut parts);
    parts
}

/// A block in a random state; a place that is named comes later.
fn random_part(rng: &mut Rng, shape: Shape, block: u64) -> Part {
    let entry = match rng.u32(0..if shape.child { 14 } else { 10 }) {
        0 => BatEntry::zero(),
        1 => BatEntry::not_present(),
        2 => BatEntry(MIB | 1),
        3 => BatEntry(MIB | 3),
        4..10 => BatEntry::present(MIB),
        _ => BatEntry::partially_present(MIB),
    };
    Part::Block(block, entry)
}

fn watched(length: u64) -> impl Iterator<Item = u64> {
    (0..length / MIB).flat_map(|mib| WATCHED.map(|sector| mib * 2048 + sector))
}

/// Leaves bytes in free space.
fn stain(rng: &mut Rng, store: &mut Store, from: u64, length: u64) {
    for sector in watched(length).filter(|_| rng.u32(0..3) == 0).collect::<Vec<_>>() {
        store.write(from + sector * 512, &STALE.to_le_bytes());
    }
}

fn opened(store: &Store) -> Result<ReadImage> {
    let disk = SimDisk::new(store.clone(), true, true, 512);
    block_on(async {
        let image = Image::read(&disk).await?;
        image.read_bitmaps(&disk).await?;
        Ok(image)
    })
}

/// What a sector reads as.
fn reads(image: &ReadImage, store: &Store, sector: u64) -> Option<u64> {
    let geometry = image.map.geometry();
    let block = geometry.block_of_offset(sector * 512);
    let within = geometry.offset_in_block(sector * 512);
    let entry = image.map.load(block).entry;
    let has = || image.map.bitmaps().has(geometry, block, within / 512..within / 512 + 1);
    let here = match entry.payload_state() {
        Some(PayloadState::FullyPresent) => true,
        Some(PayloadState::PartiallyPresent) if has() => true,
        Some(PayloadState::PartiallyPresent) => return None,
        Some(PayloadState::NotPresent) if geometry.is_differencing() => return None,
        _ => false,
    };
    let mut bytes = [0; 8];
    if here {
        store.read(entry.offset() + within, &mut bytes);
    }
    Some(u64::from_le_bytes(bytes))
}

/// The image opens, is sound, and reads as `content` does.
fn judge(store: &Store, content: &Content, linkage: Uuid) -> ReadImage {
    let image = opened(store).unwrap_or_else(|error| violated(format!("it does not open: {error}")));
    for (&sector, &expected) in content {
        let found = reads(&image, store, sector);
        if found != expected {
            violated(format!("sector {sector} reads {found:x?}, not {expected:x?}"));
        }
    }
    assert_eq!(image.header.header.data_write_guid, linkage, "children know it by that");
    image
}

fn check_sound(store: &Store) -> vhdx_ublk::image::Report {
    let report = block_on(check(&SimDisk::new(store.clone(), true, true, 512))).expect("an image");
    if report.corruptions > 0 {
        violated(format!("it is corrupt: {:?}", report.findings));
    }
    report
}

/// Stops after so many reports, or never.
struct Patience(Cell<u32>);

impl Watch for Patience {
    fn progress(&self, done: u64, total: u64) {
        assert!(done <= total, "{done} of {total}");
        self.0.set(self.0.get().saturating_sub(1));
    }

    fn stop_requested(&self) -> bool {
        self.0.get() == 0
    }
}

fn guids(seed: u64) -> impl FnMut() -> Uuid + Clone + 'static {
    let rng = Rc::new(RefCell::new(Rng::with_seed(seed)));
    move || Uuid::from_u128(rng.borrow_mut().u128(1..))
}

/// Compacts what is on `disk`; `look` sees every moment at which something has changed.
fn compacted(
    disk: &SimDisk,
    steps: Steps,
    patience: u32,
    seed: u64,
    look: impl FnMut(&SimDisk),
) -> Result<Done> {
    compacted_over(disk, Vec::new(), (steps, patience), seed, look)
}

/// As [`compacted`], over these parents.
fn compacted_over(
    disk: &SimDisk,
    parents: Vec<ReadLayer<SimDisk>>,
    (steps, patience): (Steps, u32),
    seed: u64,
    look: impl FnMut(&SimDisk),
) -> Result<Done> {
    let tasks = Rc::new(SimTasks::default());
    let (on, spawn) = (disk.clone(), tasks.clone());
    let compacting = async move {
        let image = Image::open_for_writing(&on, guids(seed ^ 1)).await?;
        let compaction = Compaction {
            image,
            disk: move || on.clone(),
            parents,
            max_rate: None,
            tasks: spawn,
            new_guid: guids(seed),
        };
        compaction.run(steps, &Patience(patience.into())).await
    };
    run_watched(&tasks, disk, compacting, look)
}

/// What is said that would be done.
fn said(store: &Store, image: ReadImage, steps: Steps) -> Done {
    let disk = SimDisk::new(store.clone(), true, true, 512);
    let patience = Patience(u32::MAX.into());
    smol::future::block_on(outline(image, disk, Vec::new(), steps, &patience)).expect("it can be read")
}

/// Nothing that reads as zero has space, nothing is leaked or unused at the end, and the file is as long as
/// was said.
fn check_won(store: &Store, done: &Done, shape: Shape, steps: Steps) {
    assert_eq!(store.length, done.end, "{done:?}");
    let report = check_sound(store);
    assert_eq!((report.leaks, report.unused_tail_bytes), (0, 0), "{:?}", report.findings);
    let image = opened(store).expect("it was judged");
    let last_block = image.map.geometry().block_size();
    assert!(shape.fixed || done.free_bytes < last_block * 3, "{done:?} with blocks of {last_block}");
    if shape.block_mib == 1 && !shape.fixed {
        assert_eq!(done.free_bytes, 0, "{done:?}: everything is 1 MiB long");
    }
    if steps.defragment {
        let blocks = 0..image.map.geometry().block_count();
        let places = blocks.map(|block| image.map.load(block).entry.offset()).filter(|place| *place > 0);
        assert!(shape.fixed || places.is_sorted() && done.free_bytes == 0, "{done:?}");
    }
    let again = said(store, image, steps);
    let nothing =
        Done { end: done.end, free_bytes: done.free_bytes, held_by: done.held_by, ..Done::default() };
    assert_eq!(again, nothing, "nothing is left to be done");
}

const fn shape(block_mib: u32, child: bool, blocks: u64) -> Shape {
    Shape { block_mib, child, fixed: false, blocks }
}

fn random_shape(rng: &mut Rng) -> Shape {
    let shape = shape(1 << rng.u32(0..4), rng.bool(), rng.u64(1..9));
    Shape { fixed: !shape.child && rng.u32(0..4) == 0, ..shape }
}

/// Of whatever shape, whatever is where. What is said beforehand is done.
#[test]
fn a_compacted_disk_reads_as_before_and_ends_where_it_was_said() {
    let (mut shorter, mut zeros, mut moves) = (0, 0, 0);
    for seed in 0..250 {
        let mut rng = Rng::with_seed(seed);
        let shape = random_shape(&mut rng);
        let Sample { store, content } = Sample::new(&mut rng, shape);
        let image = opened(&store).expect("a sample");
        let linkage = image.header.header.data_write_guid;
        let steps = steps_of(seed);
        judge(&store, &content, linkage);
        let disk = SimDisk::new(store.clone(), true, true, 512);
        let said = said(&store, image, steps);
        let before = disk.versions();
        let done = compacted(&disk, steps, u32::MAX, seed, |_| {}).expect("room");
        assert_eq!(done, said, "seed {seed}");
        let left = disk.content();
        judge(&left, &content, linkage);
        check_won(&left, &done, shape, steps);
        let anything = done.moves + done.given_up_bytes > 0;
        assert!(left.length <= store.length && (!anything || disk.versions() != before));
        // Any change begins with a new FileWriteGuid.
        let guid = |store: &Store| opened(store).expect("an image").header.header.file_write_guid;
        compacted(&disk, steps, u32::MAX, seed ^ 8, |_| {}).expect("nothing to do");
        assert_eq!(guid(&disk.content()), guid(&left), "seed {seed}: a compacted image is not changed");
        shorter += usize::from(left.length < store.length);
        zeros += done.zero_blocks;
        moves += done.moves;
    }
    println!("{shorter} became shorter, {zeros} zero blocks, {moves} moves");
    assert!(shorter > 200 && zeros > 100 && moves > 400, "{shorter} shorter, {zeros} zeros, {moves} moves");
}

/// Cuts everywhere in a compaction; returns how many states were judged, and after how many of them it was
/// done again.
fn cut_everywhere(seed: u64, shape: Shape) -> (usize, usize) {
    let mut rng = Rng::with_seed(seed);
    let Sample { store, content } = Sample::new(&mut rng, shape);
    let linkage = opened(&store).expect("a sample").header.header.data_write_guid;
    let (disk, steps) = (SimDisk::new(store, false, true, 512), steps_of(seed));
    let (mut states, mut again) = (0, 0);
    let done = compacted(&disk, steps, u32::MAX, seed, |disk| {
        for profile in Profile::ALL {
            let left = disk.cut(profile, &mut rng);
            judge(&left, &content, linkage);
            states += 1;
            if rng.u32(0..50) > 0 {
                continue;
            }
            check_sound(&left);
            again += 1;
            let second = SimDisk::new(left, false, true, 512);
            let mut cuts = Rng::with_seed(rng.u64(..));
            let done = compacted(&second, steps, u32::MAX, rng.u64(..), |disk| {
                if cuts.u32(0..8) == 0 {
                    judge(&disk.cut(Profile::ALL[cuts.usize(..5)], &mut cuts), &content, linkage);
                    states += 1;
                }
            });
            let ended = second.content();
            judge(&ended, &content, linkage);
            check_won(&ended, &done.expect("room"), shape, steps);
        }
    });
    let left = disk.content();
    judge(&left, &content, linkage);
    check_won(&left, &done.expect("room"), shape, steps);
    (states, again)
}

/// The shapes of the images that are cut.
const CUT: [Shape; 5] =
    [shape(1, false, 8), shape(2, false, 6), shape(1, true, 8), shape(2, true, 6), shape(4, true, 4)];

#[test]
fn a_cut_leaves_the_disk_as_it_was_and_the_compaction_is_done_again() {
    let (mut states, mut again) = (0, 0);
    for (seed, shape) in (0..4).flat_map(|seed| CUT.map(|shape| (seed, shape))) {
        let (judged, repeated) = cut_everywhere(seed, shape);
        (states, again) = (states + judged, again + repeated);
    }
    println!("{states} states judged, compacted again after {again} of them");
    assert!(states >= STATES && again > 300, "{states} states, {again} compactions done again");
}

/// A child some of whose partially present blocks have nothing but zeros, over parents that have more there,
/// or do not.
struct Descendant {
    leaf: Store,
    parents: Vec<Store>,
    disk: BTreeMap<u64, u64>,
    /// Blocks of such zeros.
    hollow: u64,
}

impl Descendant {
    fn new(rng: &mut Rng, shapes: &[layers::Shape]) -> Self {
        let chain = Chain::new(rng, shapes);
        let mut stores = chain.names.iter().map(|name| chain.stores[name].clone());
        let mut leaf = stores.next().expect("a leaf");
        let image = opened(&leaf).expect("an image");
        let (geometry, mut hollow) = (*image.map.geometry(), 0);
        for block in 0..geometry.block_count() {
            let entry = image.map.load(block).entry;
            if entry.payload_state() != Some(PayloadState::PartiallyPresent) || rng.u32(0..4) == 0 {
                continue;
            }
            hollow += 1;
            let sectors = 0..geometry.block_size() / 512;
            for sector in sectors.filter(|&at| image.map.bitmaps().has(&geometry, block, at..at + 1)) {
                leaf.write(entry.offset() + sector * 512, &[0; 8]);
            }
        }
        let mut descendant = Self { leaf, parents: stores.collect(), disk: BTreeMap::new(), hollow };
        let all = descendant.open(&descendant.leaf);
        let watched = chain.watched(shapes[0].virtual_size);
        descendant.disk = watched.map(|sector| (sector, layers::says(&all, sector))).collect();
        descendant
    }

    /// The chain with what `leaf` has become.
    fn open(&self, leaf: &Store) -> Vec<layers::Opened> {
        let open = |store| {
            layers::read(store).unwrap_or_else(|error| violated(format!("it does not open: {error}")))
        };
        std::iter::once(leaf).chain(&self.parents).map(open).collect()
    }

    /// The parents as a compaction reads them.
    fn below(&self) -> Vec<ReadLayer<SimDisk>> {
        let layer = |store: &Store| ReadLayer {
            disk: SimDisk::new(store.clone(), true, true, 512),
            map: opened(store).expect("a parent").into_map().into(),
        };
        self.parents.iter().map(layer).collect()
    }

    fn judge(&self, leaf: &Store) {
        let chain = self.open(leaf);
        for (&sector, &expected) in &self.disk {
            let found = layers::says(&chain, sector);
            if found != expected {
                violated(format!("sector {sector} says {found:x}, not {expected:x}"));
            }
        }
        assert_eq!(
            layers::data_write_guid(leaf),
            layers::data_write_guid(&self.leaf),
            "children know it by that"
        );
    }
}

/// Zeros that a child has over its parents' content stay; those over nothing give up their space.
#[test]
fn a_child_is_compacted_over_its_parents() {
    let shapes: [&[layers::Shape]; 3] = [
        &[layers::shape(8, 1), layers::shape(8, 2)],
        &[layers::shape(12, 2), layers::shape(9, 1), layers::shape(12, 1)],
        &[layers::shape(10, 1), layers::shape(4, 2)],
    ];
    let (mut states, mut given_up, mut kept) = (0, 0, 0);
    for (seed, shapes) in (0..6).flat_map(|seed| shapes.map(|shapes| (seed, shapes))) {
        let mut rng = Rng::with_seed(seed);
        let descendant = Descendant::new(&mut rng, shapes);
        let disk = SimDisk::new(descendant.leaf.clone(), false, true, 512);
        let steps = steps_of(seed);
        let done = compacted_over(&disk, descendant.below(), (steps, u32::MAX), seed, |disk| {
            for profile in Profile::ALL.into_iter().filter(|_| rng.bool()).collect::<Vec<_>>() {
                descendant.judge(&disk.cut(profile, &mut rng));
                states += 1;
            }
        });
        let (done, left) = (done.expect("room"), disk.content());
        descendant.judge(&left);
        assert_eq!(check_sound(&left).leaks, 0, "seed {seed}");
        let again = compacted_over(&disk, descendant.below(), (steps, u32::MAX), seed ^ 8, |_| {});
        assert_eq!(again.expect("nothing to do").zero_blocks, 0, "seed {seed}");
        descendant.judge(&disk.content());
        given_up += done.zero_blocks.min(descendant.hollow);
        kept += descendant.hollow.saturating_sub(done.zero_blocks);
    }
    println!("{states} states judged, {given_up} blocks given up, {kept} kept");
    assert!(states > 2000 && given_up > 10 && kept > 10, "{states} states, {given_up} given up, {kept} kept");
}

/// What a planted bug is caught by.
#[cfg(feature = "simulation")]
pub fn moves_survive_cuts() {
    for (seed, shape) in (0..6).flat_map(|seed| CUT.map(|shape| (seed, shape))) {
        cut_everywhere(seed, shape);
    }
}

/// Asked to stop, it leaves a closed image, and done again it ends.
#[test]
fn a_compaction_stops_and_continues() {
    let mut stopped = 0;
    for seed in 0..60 {
        let mut rng = Rng::with_seed(seed);
        let shape = random_shape(&mut rng);
        let Sample { store, content } = Sample::new(&mut rng, shape);
        let linkage = opened(&store).expect("a sample").header.header.data_write_guid;
        let disk = SimDisk::new(store, true, true, 512);
        for patience in [0, 1, 2, 5, 9, u32::MAX] {
            let done = compacted(&disk, ALL, patience, seed, |_| {}).expect("room");
            let left = disk.content();
            judge(&left, &content, linkage);
            assert_eq!(check_sound(&left).leaks, 0);
            stopped += u32::from(done.stopped);
            if !done.stopped {
                check_won(&left, &done, shape, ALL);
            }
            assert!(patience < u32::MAX || !done.stopped);
        }
    }
    assert!(stopped > 60, "stopped {stopped} times");
}

/// One that runs out of room, or whose disk fails, ends with an error and is done again.
#[test]
fn a_compaction_that_fails_leaves_the_disk_as_it_was() {
    type Hits = fn(Owner, &Effect) -> bool;
    let hits: [(i32, Hits); 4] = [
        (28, |_, effect| matches!(effect, Effect::Resize(_) | Effect::Reserve { .. })),
        (28, |_, effect| matches!(effect, Effect::Write { .. })),
        (5, |_, effect| !matches!(effect, Effect::Sync)),
        (5, |_, effect| matches!(effect, Effect::Sync)),
    ];
    let mut failed = 0;
    for (seed, after) in (0..20).flat_map(|seed| (0..40).map(move |after| (seed, after))) {
        let mut rng = Rng::with_seed(seed);
        let shape = CUT[rng.usize(..CUT.len())];
        let Sample { store, content } = Sample::new(&mut rng, shape);
        let linkage = opened(&store).expect("a sample").header.header.data_write_guid;
        let disk = SimDisk::new(store, true, true, 512);
        let (errno, hits) = hits[usize::try_from(after % 4).expect("small")];
        let times = if rng.bool() { 1 } else { 1_000_000 };
        disk.inject(Injection { fault: Fault::Error { errno, times }, hits, after: after / 4 * 3, seed });
        let outcome = compacted(&disk, ALL, u32::MAX, seed, |_| {});
        let left = disk.cut(Profile::ALL[rng.usize(..5)], &mut rng);
        judge(&left, &content, linkage);
        check_sound(&left);
        let Err(error) = outcome else { continue };
        failed += 1;
        assert!(errno != 28 || error.kind() == Kind::NoSpace, "{error}");
        let again = SimDisk::new(left, true, true, 512);
        let done = compacted(&again, ALL, u32::MAX, seed, |_| {}).expect("room");
        judge(&again.content(), &content, linkage);
        check_won(&again.content(), &done, shape, ALL);
    }
    println!("{failed} compactions failed");
    assert!(failed > 150, "{failed} compactions failed");
}
