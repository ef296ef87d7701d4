//! Promise defended here: a disk at rest that grows or shrinks reads as before or as it is to be, wherever
//! the power is cut in it and in its recovery; what comes into it is zero, whatever lay there in the file or
//! in its parents; its children lose it when it has its new size, and no moment earlier; resizing it again
//! ends; and nothing is left behind.

use std::collections::{BTreeMap, BTreeSet};

use fastrand::Rng;
use uuid::Uuid;
use vhdx_ublk::error::{Kind, Result};
use vhdx_ublk::format::guid;
use vhdx_ublk::format::metadata::Metadata;
use vhdx_ublk::image::{Extent, Image, Resize};

use crate::sim::disk::{EIO, ENOSPC, Effect, Fault, Injection, Profile, SimDisk};
use crate::sim::layers::{Chain, MIB, Opened, Shape, examined, guids, read, says, shape};
use crate::sim::store::Store;
use crate::sim::tasks::SimTasks;
use crate::sim::violation::violated;
use crate::sim::watched::run_watched;

/// Crash states that a run of the tests judges, at least.
const STATES: usize = 20_000;

/// How often each case is cut, with other content each time.
const SEEDS: u64 = 4;

/// An image, its parents, and what its disk has before and after.
struct Case {
    before: Store,
    parents: Vec<Opened>,
    /// By the size of the disk, what its sectors say.
    sizes: BTreeMap<u64, BTreeMap<u64, u64>>,
    to: u64,
    /// The size before, and what children know the disk by then.
    known: (u64, Uuid),
    /// A region that moves instead, and where to.
    moved: Option<(Uuid, Extent)>,
}

impl Case {
    /// The first of `shapes`, over the others, becomes `to` bytes long.
    fn new(rng: &mut Rng, shapes: &[Shape], to: u64) -> Self {
        let chain = Chain::watching(rng, shapes, &[to]);
        let (disk, size) = (chain.disk(), shapes[0].virtual_size);
        let kept = |sector: u64| disk.get(&sector).copied().unwrap_or(0);
        let after = chain.watched(to).map(|sector| (sector, kept(sector))).collect();
        let parents = chain.names[1..].iter().map(|name| read(&chain.stores[name]).expect("a parent"));
        let sizes = BTreeMap::from([(size, disk.clone()), (to, after)]);
        let before = chain.stores[&chain.names[0]].clone();
        let known = (size, linkage(&before));
        Self { before, parents: parents.collect(), sizes, to, known, moved: None }
    }

    /// The same image as it was left, which becomes `to` bytes long.
    fn next(&self, before: Store, to: u64) -> Self {
        let disk = self.sizes[&self.to].clone();
        let watched: BTreeSet<u64> = self.sizes.values().flat_map(BTreeMap::keys).copied().collect();
        let inside = watched.into_iter().filter(|sector| sector * 512 < to);
        let after = inside.map(|sector| (sector, disk.get(&sector).copied().unwrap_or(0))).collect();
        let parents = self.parents.iter().map(|parent| read(&parent.store).expect("a parent")).collect();
        let known = (self.to, linkage(&before));
        Self {
            before,
            parents,
            sizes: BTreeMap::from([(self.to, disk), (to, after)]),
            to,
            known,
            moved: None,
        }
    }

    fn is_large(&self) -> bool {
        self.sizes.keys().any(|size| *size > 1 << 30)
    }

    async fn resize(
        disk: SimDisk,
        (to, parent_bytes): (u64, u64),
        moved: Option<(Uuid, Extent)>,
        seed: u64,
    ) -> Result<()> {
        let mut new_guid = guids(seed);
        let image = Image::open_for_writing(&disk, &mut new_guid).await?;
        if let Some((region, place)) = moved {
            let regions = image.regions.table.entries();
            if regions.iter().any(|found| found.guid == region && found.offset == place.offset) {
                return Ok(());
            }
            return image.move_region(&disk, region, place, new_guid).await.map(drop);
        }
        let metadata = Metadata { virtual_size: to, ..image.metadata.clone() };
        let change = Resize { metadata, parent_bytes, data_write: Some(new_guid()), zero_from: None };
        image.resize(&disk, &change, new_guid).await.map(drop)
    }

    /// Resizes the image on `disk`; `look` sees every moment at which something has changed.
    fn run(&self, disk: &SimDisk, seed: u64, look: impl FnMut(&SimDisk)) -> Result<()> {
        let parent_bytes = self.parents.first().map_or(0, |parent| parent.image.metadata.virtual_size);
        let task = Self::resize(disk.clone(), (self.to, parent_bytes), self.moved, seed);
        run_watched(&SimTasks::default(), disk, task, look)
    }

    /// The image in `store` has one of the sizes, and all its sectors say what they must; which size.
    fn judge(&self, store: &Store) -> u64 {
        let leaf = read(store).unwrap_or_else(|error| violated(format!("it does not open: {error}")));
        let size = leaf.image.metadata.virtual_size;
        let Some(disk) = self.sizes.get(&size) else {
            violated(format!("the disk has {size} bytes"));
        };
        for (&sector, &expected) in disk {
            let found = says(std::iter::once(&leaf).chain(&self.parents), sector);
            if found != expected {
                violated(format!("sector {sector} of {size} bytes says {found:x}, not {expected:x}"));
            }
        }
        let (was, guid) = self.known;
        if (size == was) != (leaf.image.header.header.data_write_guid == guid) {
            violated(format!("{size} bytes, {was} before, and the children expect another identifier"));
        }
        size
    }

    /// Cuts everywhere in the resize and in what a second attempt does; returns what is left at its end, and
    /// how many states were judged and how many attempts there were.
    fn cut_everywhere(&self, seed: u64, can_punch: bool) -> (Store, usize, usize) {
        let mut rng = Rng::with_seed(seed);
        let disk = SimDisk::new(self.before.clone(), false, can_punch, 512);
        let (mut states, mut again) = (0, 0);
        // Reading a long BAT takes its time.
        let judged = if self.is_large() { 10 } else { 1 };
        let result = self.run(&disk, seed, |disk| {
            for profile in Profile::ALL.into_iter().filter(|_| rng.u32(0..judged) == 0).collect::<Vec<_>>() {
                let left = disk.cut(profile, &mut rng);
                self.judge(&left);
                states += 1;
                if rng.u32(0..30) == 0 {
                    examined(&left);
                    again += 1;
                    states += self.finish(&left, &mut rng);
                }
            }
        });
        result.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let left = disk.content();
        assert_eq!(self.judge(&left), self.to);
        (left, states, again)
    }

    /// What a cut left is resized again, and cut again; returns how many states were judged.
    fn finish(&self, left: &Store, rng: &mut Rng) -> usize {
        let disk = SimDisk::new(left.clone(), false, true, 512);
        let mut states = 0;
        let mut cuts = rng.fork();
        let ended = self.run(&disk, rng.u64(..), |disk| {
            if cuts.u32(0..10) == 0 {
                self.judge(&disk.cut(Profile::Sectors512, &mut cuts));
                states += 1;
            }
        });
        ended.unwrap_or_else(|error| panic!("the second attempt: {error}"));
        assert_eq!(self.judge(&disk.content()), self.to);
        examined(&disk.content());
        states
    }
}

/// What the children of an image know it by.
fn linkage(store: &Store) -> Uuid {
    read(store).expect("an image").image.header.header.data_write_guid
}

const fn odd(mib: u64, block: u32) -> Shape {
    Shape { virtual_size: mib * MIB + 512, ..shape(mib, block) }
}

const fn fixed(mib: u64) -> Shape {
    Shape { fixed: true, ..odd(mib, 2) }
}

/// More blocks of 1 MiB than a BAT of 1 MiB has slots for.
const LARGE: u64 = 140 << 30;

/// Images of all kinds, and the sizes that they get one after the other.
fn cases() -> Vec<(Vec<Shape>, Vec<u64>)> {
    let sizes = |sizes: &[u64]| sizes.iter().map(|kib| kib << 10).collect::<Vec<u64>>();
    vec![
        (vec![odd(4, 1)], sizes(&[9000, 3000, 700 << 10])),
        (vec![odd(5, 2)], vec![LARGE + 512, 3 * MIB, 8 * MIB]),
        (vec![fixed(3)], sizes(&[9001, 2048, 7 << 10])),
        (vec![odd(3, 1), shape(4, 2)], sizes(&[9000, 3300, 5000])),
        (vec![odd(3, 4), shape(8, 1)], sizes(&[3600, 7 << 10, 2500, 9 << 10])),
        (vec![odd(3, 2), odd(9, 4), shape(5, 1)], sizes(&[8191, 1500, 12 << 10])),
        (vec![odd(5, 1), shape(150 << 10, 2)], vec![LARGE + 512, 5 * MIB + 4096]),
        (vec![Shape { virtual_size: LARGE - MIB - 512, ..shape(0, 1) }], vec![LARGE, 7 * MIB]),
    ]
}

#[test]
fn a_cut_leaves_the_disk_as_it_was_or_as_it_is_to_be() {
    let (mut states, mut again) = (0, 0);
    let seeds = (0..SEEDS).flat_map(|seed| (0..).zip(cases()).map(move |case| (seed, case)));
    for (seed, (number, (shapes, sizes))) in seeds {
        let mut rng = Rng::with_seed(100 * seed + number);
        let mut case = Case::new(&mut rng, &shapes, sizes[0]);
        for (step, to) in (0..).zip(&sizes) {
            if step > 0 {
                case = case.next(case.before.clone(), *to);
            }
            let (left, judged, repeated) = case.cut_everywhere(rng.u64(..), true);
            (states, again) = (states + judged, again + repeated);
            let report = examined(&left);
            assert_eq!(report.leaks, 0, "case {number}, {to} bytes: {:?}", report.findings);
            assert_eq!(report.unused_tail_bytes, 0, "case {number}, {to} bytes");
            case.before = left;
        }
    }
    println!("{states} states judged, resized again after {again} of them");
    assert!(states >= STATES && again > 100, "{states} states, {again} attempts");
}

/// What lay behind the end does not come into the disk: in the last block, in the BAT, or in the parent.
#[test]
pub fn what_comes_into_a_disk_is_zero() {
    let cases: [(&[Shape], u64); 6] = [
        (&[odd(4, 1)], 700 * MIB),
        (&[fixed(3)], 9 * MIB + 512),
        (&[odd(3, 1), shape(8, 2)], 6 * MIB),
        (&[odd(3, 4), shape(8, 2)], 6 * MIB + 512),
        (&[odd(3, 2), shape(8, 2)], 3 * MIB + 1024),
        (&[odd(3, 2), shape(700, 2)], 690 * MIB),
    ];
    for (shapes, to) in cases {
        for seed in 0..20 {
            let case = Case::new(&mut Rng::with_seed(seed), shapes, to);
            let disk = SimDisk::new(case.before.clone(), true, true, 512);
            case.run(&disk, seed, |_| {})
                .unwrap_or_else(|error| violated(format!("it does not grow: {error}")));
            assert_eq!(case.judge(&disk.content()), to);
            examined(&disk.content());
        }
    }
}

/// A BAT at its new place is whole before a region table names it.
#[test]
pub fn a_bat_that_moves_is_durable_before_it_is_named() {
    let case = Case::new(&mut Rng::with_seed(1), &[odd(5, 1)], LARGE);
    let (left, ..) = case.cut_everywhere(1, true);
    let [before, after] = [&case.before, &left].map(|store| read(store).expect("an image").image.layout.bat);
    assert!(after.offset != before.offset && after.length > before.length, "{before:?} {after:?}");
}

/// The BAT and the metadata move; the disk stays.
#[test]
fn a_region_that_moves_is_in_its_old_place_or_in_the_new_one() {
    let mut states = 0;
    for (shapes, region) in [
        (&[odd(5, 1)][..], guid::REGION_BAT),
        (&[odd(5, 1)], guid::REGION_METADATA),
        (&[odd(3, 2), shape(8, 2)], guid::REGION_BAT),
        (&[odd(3, 2), shape(8, 2)], guid::REGION_METADATA),
    ] {
        let mut case = Case::new(&mut Rng::with_seed(3), shapes, shapes[0].virtual_size);
        let place = Extent { offset: case.before.length.next_multiple_of(MIB) + 3 * MIB, length: MIB };
        case.moved = Some((region, place));
        let (left, judged, _) = case.cut_everywhere(1, true);
        states += judged;
        let image = read(&left).expect("an image").image;
        let moved = image.regions.table.entries().iter().find(|entry| entry.guid == region);
        assert_eq!(moved.map(|entry| entry.offset), Some(place.offset));
        let stored = read(&case.before).expect("an image").image;
        assert_eq!(stored.header.header.data_write_guid, image.header.header.data_write_guid);
    }
    assert!(states > 1000, "{states} states");
}

/// Whatever operation fails, the disk reads as before or as it is to be, and the next attempt ends. Without
/// room for its blocks a fixed image is not changed by one byte.
#[test]
fn a_resize_that_fails_leaves_the_disk_as_it_was_or_as_it_is_to_be() {
    let cases: [(&[Shape], u64); 6] = [
        (&[odd(4, 1)], 700 * MIB),
        (&[odd(5, 2)], LARGE + 512),
        (&[fixed(3)], 9 * MIB + 512),
        (&[fixed(5)], 2 * MIB),
        (&[odd(3, 4), shape(8, 2)], 6 * MIB + 512),
        (&[odd(7, 1), shape(8, 2)], 2 * MIB),
    ];
    let mut failed = 0;
    for ((shapes, to), errno) in cases.into_iter().flat_map(|case| [(case, EIO), (case, ENOSPC)]) {
        let case = Case::new(&mut Rng::with_seed(5), shapes, to);
        for after in 0.. {
            let disk = SimDisk::new(case.before.clone(), true, true, 512);
            disk.inject(Injection {
                fault: Fault::Error { errno, times: 1 },
                hits: |_, effect| !matches!(effect, Effect::Read { .. }),
                after,
                seed: 1,
            });
            let outcome = case.run(&disk, 1, |_| {});
            let Some((_, effect)) = disk.struck() else { break };
            if let Err(error) = outcome {
                failed += 1;
                assert!(errno != ENOSPC || error.kind() == Kind::NoSpace, "{error}");
                if matches!(effect, Effect::Reserve { .. } | Effect::Resize(_)) && after < 4 {
                    let [before, left] = [&case.before, &disk.content()].map(|store| {
                        let stored = store.stored().map(|(at, page)| (at, *page));
                        (store.length, stored.collect::<Vec<_>>())
                    });
                    assert!(before == left, "{error}: the file has changed");
                }
            }
            case.judge(&disk.content());
            examined(&disk.content());
            let again = SimDisk::new(disk.content(), true, true, 512);
            case.run(&again, 2, |_| {}).unwrap_or_else(|error| panic!("after {effect:?}: {error}"));
            assert_eq!(case.judge(&again.content()), to);
        }
    }
    assert!(failed > 100, "{failed} attempts failed");
}
