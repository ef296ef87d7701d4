//! Promise defended here: merging layers into an image below them changes nothing for readers of the chain,
//! wherever the power is cut in it, and a merge that was cut is done again and ends; what is left is the disk
//! that the uppermost layer was.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use fastrand::Rng;
use smol::future::yield_now;
use uuid::Uuid;
use vhdx_ublk::chain;
use vhdx_ublk::engine::Outcome;
use vhdx_ublk::error::{Kind, Result};
use vhdx_ublk::format::bat::{BITMAP_BLOCK_SIZE, BatEntry, ENTRY_SIZE, Geometry, PayloadState};
use vhdx_ublk::format::locator::RELATIVE_PATH;
use vhdx_ublk::image::{Image, InitialState, NewImage, ReadImage, Report, check};
use vhdx_ublk::operations::merge::{self, Files, Merge};

use crate::sim::disk::{Effect, Fault, Injection, Owner, Profile, SimDisk};
use crate::sim::store::Store;
use crate::sim::tasks::{SimTasks, block_on};

const MIB: u64 = 1 << 20;

/// Crash states that a run of the tests judges, at least.
const STATES: usize = 10_000;

/// Sectors that are looked at in every MiB: at its ends, and some between that share pages.
const WATCHED: [u64; 24] = [
    0, 1, 2, 7, 8, 9, 15, 16, 17, 18, 19, 20, 1023, 1024, 1025, 1026, 1027, 1028, 1029, 1030, 2040, 2041,
    2046, 2047,
];

/// What a watched sector says; nothing where the layer leaves it to its parent.
type Layer = BTreeMap<u64, Option<u64>>;

/// A folder of files; who has the handle sees what has happened to them.
#[derive(Clone, Default)]
struct Folder(Rc<RefCell<BTreeMap<PathBuf, File>>>);

#[derive(Clone)]
struct File {
    disk: SimDisk,
    /// It is gone unless the power is cut.
    removed: bool,
}

impl Files for Folder {
    type Disk = SimDisk;

    fn disk(&self, path: &Path) -> SimDisk {
        self.0.borrow()[path].disk.clone()
    }

    async fn remove(&self, path: &Path) -> Result<()> {
        self.0.borrow_mut().get_mut(path).expect("it was there").removed = true;
        yield_now().await;
        self.0.borrow_mut().remove(path);
        Ok(())
    }

    fn copied(&self, _: u64) -> Outcome {
        Ok(())
    }
}

impl Folder {
    fn of(stores: &BTreeMap<PathBuf, Store>, immediate: bool) -> Self {
        let folder = Self::default();
        for (path, store) in stores {
            let disk = SimDisk::new(store.clone(), immediate, true, 512);
            folder.0.borrow_mut().insert(path.clone(), File { disk, removed: false });
        }
        folder
    }

    fn content(&self) -> BTreeMap<PathBuf, Store> {
        self.0.borrow().iter().map(|(path, file)| (path.clone(), file.disk.content())).collect()
    }

    /// Counts what changed the files that a cut may leave.
    fn version(&self) -> (u64, usize, usize) {
        let files = self.0.borrow();
        let changes = files.values().map(|file| file.disk.versions().0).sum();
        (changes, files.len(), files.values().filter(|file| file.removed).count())
    }

    /// What a power cut may leave.
    fn cut(&self, profile: Profile, rng: &mut Rng) -> BTreeMap<PathBuf, Store> {
        let files = self.0.borrow();
        let left = files.iter().filter(|(_, file)| !(file.removed && rng.bool()));
        let left: Vec<_> = left.collect();
        left.into_iter().map(|(path, file)| (path.clone(), file.disk.cut(profile, rng))).collect()
    }
}

/// The shape of one image of a chain.
#[derive(Clone, Copy)]
struct Shape {
    virtual_size: u64,
    block_size: u32,
    fixed: bool,
}

/// A chain of random images, `0` the leaf, and what its layers have.
struct Chain {
    stores: BTreeMap<PathBuf, Store>,
    names: Vec<PathBuf>,
    shapes: Vec<Shape>,
    layers: Vec<Layer>,
}

impl Chain {
    fn new(rng: &mut Rng, shapes: &[Shape]) -> Self {
        let names: Vec<PathBuf> = (0..shapes.len()).map(|number| format!("/{number}.vhdx").into()).collect();
        let mut chain = Self { stores: BTreeMap::new(), names, shapes: shapes.to_vec(), layers: Vec::new() };
        let mut parent = None;
        for (number, shape) in shapes.iter().enumerate().rev() {
            let differencing = parent.is_some();
            let store = empty(rng, *shape, parent);
            let (store, layer) = fill(store, rng, number, *shape, differencing);
            parent = Some((chain.names[number].clone(), data_write_guid(&store)));
            chain.stores.insert(chain.names[number].clone(), store);
            chain.layers.insert(0, layer);
        }
        chain
    }

    fn merge(&self, count: usize) -> Merge {
        Merge {
            layers: self.names[..count].to_vec(),
            target: self.names[count].clone(),
            below: self.names[count + 1..].to_vec(),
        }
    }

    /// What the disk is, by the format's own words.
    fn disk(&self) -> BTreeMap<u64, u64> {
        let sectors = watched(self.shapes[0].virtual_size);
        let says = |sector: u64| {
            let layers = self.layers.iter().zip(&self.shapes);
            for (layer, shape) in layers {
                if sector * 512 >= shape.virtual_size {
                    return 0;
                }
                if let Some(value) = layer[&sector] {
                    return value;
                }
            }
            0
        };
        sectors.map(|sector| (sector, says(sector))).collect()
    }
}

fn watched(virtual_size: u64) -> impl Iterator<Item = u64> {
    let all = (0..virtual_size.div_ceil(MIB)).flat_map(|mib| WATCHED.map(|sector| mib * 2048 + sector));
    all.filter(move |sector| sector * 512 < virtual_size)
}

fn data_write_guid(store: &Store) -> Uuid {
    opened(store).expect("an image").header.header.data_write_guid
}

fn opened(store: &Store) -> Result<ReadImage> {
    block_on(Image::read(&SimDisk::new(store.clone(), true, true, 512)))
}

/// A new image, over the parent that this path and linkage name.
fn empty(rng: &mut Rng, shape: Shape, parent: Option<(PathBuf, Uuid)>) -> Store {
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

/// Gives random states to the blocks of an empty image, and content to those that have some.
fn fill(mut store: Store, rng: &mut Rng, number: usize, shape: Shape, differencing: bool) -> (Store, Layer) {
    let empty = opened(&store).expect("a new image");
    let geometry = Geometry::new(shape.virtual_size, shape.block_size, 512, differencing);
    let (bat, mut layer) = (empty.layout.bat.offset, Layer::new());
    let slot = |store: &mut Store, slot: u64, entry: BatEntry| {
        store.write(bat + slot * ENTRY_SIZE as u64, &entry.write());
    };
    let bitmap = take(&mut store, if differencing { BITMAP_BLOCK_SIZE } else { 0 });
    if differencing {
        slot(&mut store, geometry.bitmap_slot(0), BatEntry::present(bitmap));
    }
    let mut bits = vec![0xa5_u8; usize::try_from(BITMAP_BLOCK_SIZE).expect("1 MiB")];
    for block in 0..geometry.block_count() {
        let entry = if shape.fixed {
            empty.map.load(block).entry
        } else {
            random_entry(rng, differencing, || take(&mut store, geometry.block_size()))
        };
        slot(&mut store, geometry.payload_slot(block), entry);
        let slice = geometry.bitmap_slice(block);
        if entry.payload_state() == Some(PayloadState::PartiallyPresent) {
            bits[usize::try_from(slice.start).expect("small")..usize::try_from(slice.end).expect("small")]
                .fill(0);
        }
        let start = block * geometry.block_size() / 512;
        let sectors = watched(geometry.block_size()).map(|within| (within, start + within));
        for (within, sector) in sectors {
            let bits = &mut bits[usize::try_from(slice.start + within / 8).expect("small")];
            if sector * 512 >= shape.virtual_size {
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
            layer.insert(sector, says);
        }
    }
    if differencing {
        store.write(bitmap, &bits);
    }
    for block in geometry.block_count()..geometry.block_count() + 4 {
        slot(&mut store, geometry.payload_slot(block), BatEntry::present(77 * MIB));
    }
    (store, layer)
}

/// One layer as a reader has it.
struct Opened {
    image: ReadImage,
    store: Store,
}

/// The chain that begins at `leaf`, every link of which is recognised.
fn open_chain(stores: &BTreeMap<PathBuf, Store>, leaf: &Path) -> (Vec<PathBuf>, Vec<Opened>) {
    let (mut names, mut chain): (Vec<PathBuf>, Vec<Opened>) = (Vec::new(), Vec::new());
    let mut next = Some(leaf.to_owned());
    while let Some(name) = next.take() {
        let store = stores.get(&name).unwrap_or_else(|| panic!("{} is gone", name.display())).clone();
        let disk = SimDisk::new(store.clone(), true, true, 512);
        let open = async {
            let image = Image::read(&disk).await?;
            image.read_bitmaps(&disk).await?;
            Result::Ok(image)
        };
        let image = block_on(open).unwrap_or_else(|error| panic!("{}: {error}", name.display()));
        if let Some(child) = chain.last() {
            let locator = child.image.metadata.parent_locator.as_ref().expect("it has a parent");
            let guid = image.header.header.data_write_guid;
            let known = [locator.linkage().ok(), locator.linkage2()];
            assert!(known.contains(&Some(guid)), "{} is not recognised: {locator:?} {guid}", name.display());
        }
        let locator = image.metadata.parent_locator.as_ref();
        let relative = locator.map(|locator| locator.get(RELATIVE_PATH).expect("a path"));
        next = relative.map(|path| Path::new("/").join(path.strip_prefix(r".\").expect("the same folder")));
        names.push(name);
        chain.push(Opened { image, store });
    }
    (names, chain)
}

fn says(chain: &[Opened], sector: u64) -> u64 {
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

/// What is left of the chain reads as `disk`, which was the first of `names`, or the target's if that is
/// gone.
fn judge(stores: &BTreeMap<PathBuf, Store>, merge: &Merge, disk: &BTreeMap<u64, u64>, size: u64) {
    let leaf = merge.layers.iter().take(1).find(|leaf| stores.contains_key(*leaf));
    let (_, chain) = open_chain(stores, leaf.unwrap_or(&merge.target));
    assert_eq!(chain[0].image.metadata.virtual_size, size);
    for (&sector, &expected) in disk {
        assert_eq!(says(&chain, sector), expected, "sector {sector}, {} layers", chain.len());
    }
}

fn guids(seed: u64) -> impl FnMut() -> Uuid + Clone + 'static {
    let rng = Rc::new(RefCell::new(Rng::with_seed(seed)));
    move || Uuid::from_u128(rng.borrow_mut().u128(1..))
}

/// Runs a task to its end, in order; `look` sees every moment at which something has changed.
fn run_watched(folder: &Folder, merge: Merge, seed: u64, mut look: impl FnMut(&Folder)) -> Result<()> {
    let tasks = Rc::new(SimTasks::default());
    let (on, spawn) = (folder.clone(), tasks.clone());
    let result = tasks.start(async move { merge.run(&on, spawn, guids(seed)).await });
    let (mut known, mut steps) = (None, 0);
    while result.borrow().is_none() {
        while tasks.ready() > 0 {
            tasks.run(0);
            if known != Some(folder.version()) {
                known = Some(folder.version());
                look(folder);
            }
        }
        let disks: Vec<SimDisk> = folder.0.borrow().values().map(|file| file.disk.clone()).collect();
        let busy = disks.iter().find_map(|disk| Some((disk, *disk.places(false, true).first()?)));
        if let Some((disk, place)) = busy {
            disk.complete(place);
            look(folder);
        }
        steps += 1;
        assert!(steps < 100_000, "the merge does not end");
    }
    result.take().expect("it has ended")
}

/// Merges as a second attempt would, and returns what is left; `look` sees every moment of it.
fn merged_again(
    stores: &BTreeMap<PathBuf, Store>,
    merge: &Merge,
    seed: u64,
    look: impl FnMut(&Folder),
) -> BTreeMap<PathBuf, Store> {
    let folder = Folder::of(stores, false);
    let leaf = &merge.layers[0];
    if stores.contains_key(leaf) {
        let (names, _) = open_chain(stores, leaf);
        let target = names.iter().position(|name| *name == merge.target).expect("in the chain");
        let again = Merge {
            layers: names[..target].to_vec(),
            target: merge.target.clone(),
            below: names[target + 1..].to_vec(),
        };
        run_watched(&folder, again, seed, look).expect("a merge");
    }
    folder.content()
}

fn examined(store: &Store) -> Report {
    let report = block_on(check(&SimDisk::new(store.clone(), true, true, 512))).expect("an image");
    assert_eq!(report.corruptions, 0, "{:?}", report.findings);
    report
}

fn random_shapes(rng: &mut Rng, depth: usize) -> Vec<Shape> {
    let shape = |rng: &mut Rng, base: bool| Shape {
        virtual_size: 4 * MIB + rng.u64(0..4) * 1_050_624,
        block_size: (1 << 20) << rng.u32(0..3),
        fixed: base && rng.u32(0..4) == 0,
    };
    let mut shapes: Vec<Shape> = (0..depth).map(|number| shape(rng, number + 1 == depth)).collect();
    if rng.bool() {
        let size = shapes[0].virtual_size;
        for shape in &mut shapes {
            shape.virtual_size = size;
        }
    }
    shapes
}

/// At every depth, into every ancestor, whatever the sizes of disks and blocks.
#[test]
fn a_merged_chain_is_the_disk_that_it_was() {
    let (mut merged, mut refused) = (0, 0);
    for seed in 0..150 {
        let mut rng = Rng::with_seed(seed);
        let depth = rng.usize(2..6);
        let shapes = random_shapes(&mut rng, depth);
        let chain = Chain::new(&mut rng, &shapes);
        let count = rng.usize(1..depth);
        let merge = chain.merge(count);
        judge(&chain.stores, &merge, &chain.disk(), shapes[0].virtual_size);
        let folder = Folder::of(&chain.stores, true);
        let before = folder.version();
        match run_watched(&folder, chain.merge(count), seed, |_| {}) {
            Ok(()) => merged += 1,
            Err(error) => {
                assert_eq!(error.kind(), Kind::Unsupported, "seed {seed}: {error}");
                assert_eq!(folder.version(), before, "seed {seed}: a refusal changes nothing");
                refused += 1;
                continue;
            }
        }
        let left = folder.content();
        assert_eq!(left.keys().collect::<Vec<_>>(), chain.names[count..].iter().collect::<Vec<_>>());
        judge(&left, &merge, &chain.disk(), shapes[0].virtual_size);
        assert_eq!(examined(&left[&merge.target]).leaks, 0, "seed {seed}");
        for below in &merge.below {
            let mut bytes = [vec![0; 1 << 20], vec![0; 1 << 20]];
            left[below].read(0, &mut bytes[0]);
            chain.stores[below].read(0, &mut bytes[1]);
            assert_eq!(bytes[0], bytes[1], "seed {seed}: an image below the target was changed");
        }
    }
    println!("{merged} merged, {refused} refused");
    assert!(merged > 100 && refused > 0, "{merged} merged, {refused} refused");
}

/// Cuts everywhere in a merge of `count` layers; returns how many states were judged, and after how many of
/// them the merge was done again.
fn cut_everywhere(seed: u64, shapes: &[Shape], count: usize) -> (usize, usize) {
    let mut rng = Rng::with_seed(seed);
    let chain = Chain::new(&mut rng, shapes);
    let (disk, size) = (chain.disk(), shapes[0].virtual_size);
    let folder = Folder::of(&chain.stores, false);
    folder.0.borrow().values().for_each(|file| file.disk.set_immediate(false));
    let merge = chain.merge(count);
    let (mut states, mut again) = (0, 0);
    let result = run_watched(&folder, chain.merge(count), seed, |folder| {
        for profile in Profile::ALL {
            let left = folder.cut(profile, &mut rng);
            judge(&left, &merge, &disk, size);
            states += 1;
            if rng.u32(0..40) == 0 {
                again += 1;
                let mut cuts = Rng::with_seed(rng.u64(..));
                let ended = merged_again(&left, &merge, rng.u64(..), |folder| {
                    if cuts.u32(0..20) == 0 {
                        judge(&folder.cut(Profile::Sectors512, &mut cuts), &merge, &disk, size);
                        states += 1;
                    }
                });
                assert!(!ended.contains_key(&merge.layers[0]));
                judge(&ended, &merge, &disk, size);
                examined(&ended[&merge.target]);
            }
        }
    });
    result.expect("a merge");
    judge(&folder.content(), &merge, &disk, size);
    (states, again)
}

const fn shape(mib: u64, block_mib: u32) -> Shape {
    Shape { virtual_size: mib * MIB, block_size: block_mib << 20, fixed: false }
}

/// In one step, over two layers and three, into a base and into a child, larger and smaller ones.
#[test]
fn a_cut_leaves_the_chain_as_it_was_and_the_merge_is_done_again() {
    let odd = |mib, block| Shape { virtual_size: mib * MIB + 512, ..shape(mib, block) };
    let cases: [(&[Shape], usize); 8] = [
        (&[shape(4, 1), shape(4, 2)], 1),
        (&[shape(4, 2), shape(4, 1), shape(4, 4)], 1),
        (&[shape(4, 1), shape(4, 2), shape(4, 1)], 2),
        (&[shape(4, 1), shape(4, 1), shape(4, 1), shape(4, 1)], 3),
        (&[odd(6, 1), odd(3, 2)], 1),
        (&[odd(5, 1), shape(4, 1), odd(3, 2), odd(2, 1)], 2),
        (&[odd(3, 2), odd(5, 1)], 1),
        (&[shape(4, 2), Shape { fixed: true, ..odd(3, 1) }], 1),
    ];
    let (mut states, mut again) = (0, 0);
    for (number, (shapes, count)) in cases.into_iter().enumerate() {
        for seed in 0..2 {
            let (judged, repeated) = cut_everywhere(number as u64 * 100 + seed, shapes, count);
            (states, again) = (states + judged, again + repeated);
        }
    }
    println!("{states} states judged, the merge done again after {again} of them");
    assert!(states >= STATES && again > 200, "{states} states, {again} merges done again");
}

/// A merge that runs out of room, or whose disk fails, ends with an error and is done again.
#[test]
fn a_merge_that_fails_leaves_the_chain_as_it_was() {
    type Hits = fn(Owner, &Effect) -> bool;
    let hits: [(i32, Hits); 3] = [
        (28, |_, effect| matches!(effect, Effect::Resize(_))),
        (5, |_, effect| matches!(effect, Effect::Write { .. })),
        (5, |_, effect| matches!(effect, Effect::Sync)),
    ];
    let mut failed = 0;
    for (seed, after) in (0..20).flat_map(|seed| (0..12).map(move |after| (seed, after * 3))) {
        let mut rng = Rng::with_seed(seed);
        let shapes = [shape(4, 1), shape(4, 2), shape(4, 1)];
        let chain = Chain::new(&mut rng, &shapes);
        let merge = chain.merge(2);
        let folder = Folder::of(&chain.stores, true);
        let (errno, hits) = hits[rng.usize(0..hits.len())];
        let fault = Fault::Error { errno, times: 1_000_000 };
        let injection = Injection { fault, hits, after, seed };
        folder.disk(&chain.names[rng.usize(0..3)]).inject(injection);
        let outcome = run_watched(&folder, chain.merge(2), seed, |_| {});
        judge(&folder.content(), &merge, &chain.disk(), shapes[0].virtual_size);
        let Err(error) = outcome else { continue };
        failed += 1;
        assert!(error.file_path().is_some(), "{error}");
        assert!(errno != 28 || error.kind() == Kind::NoSpace, "{error}");
        let ended = merged_again(&folder.content(), &merge, seed, |_| {});
        judge(&ended, &merge, &chain.disk(), shapes[0].virtual_size);
        assert!(!ended.contains_key(&merge.layers[0]));
    }
    println!("{failed} merges failed");
    assert!(failed > 50, "{failed} merges failed");
}

/// What a target cannot become is said before anything is changed.
#[test]
fn sizes_that_a_target_cannot_take_are_refused() {
    let fixed = Shape { fixed: true, ..shape(5, 1) };
    let more_than_its_bat = Shape { virtual_size: 1 << 38, ..shape(0, 1) };
    for (shapes, what) in [
        (&[shape(4, 1), fixed][..], "a fixed image"),
        (&[more_than_its_bat, shape(4, 1)], "BAT"),
        (&[shape(6, 1), shape(4, 1), shape(5, 1)], "over one of"),
    ] {
        let mut rng = Rng::with_seed(1);
        let parent = |number| (number + 1 < shapes.len()).then(|| ("/base".into(), Uuid::from_u128(1)));
        let stores = (0..shapes.len()).map(|number| empty(&mut rng, shapes[number], parent(number)));
        let images: Vec<ReadImage> = stores.map(|store| opened(&store).expect("a new image")).collect();
        let error =
            merge::check(&images[0], &images[1], images.get(2).map(|image| &**image)).expect_err("refused");
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.to_string().contains(what) && error.remedy_text().is_some(), "{error}");
    }
}
