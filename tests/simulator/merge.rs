//! Promise defended here: merging layers into an image below them changes nothing for readers of the chain,
//! wherever the power is cut in it, and a merge that was cut is done again and ends; what is left is the disk
//! that the uppermost layer was.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use fastrand::Rng;
use smol::future::yield_now;
use vhdx_ublk::engine::Outcome;
use vhdx_ublk::error::{Kind, Result};
use vhdx_ublk::operations::merge::{Files, Merge};

use crate::sim::disk::{Effect, Fault, Injection, Owner, Profile, SimDisk};
use crate::sim::layers::{Chain, MIB, Shape, examined, guids, open_chain, opened, says, shape};
use crate::sim::store::Store;
use crate::sim::tasks::SimTasks;

/// Crash states that a run of the tests judges, at least.
const STATES: usize = 10_000;

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

/// Merges the first `count` layers.
fn merge_of(chain: &Chain, count: usize) -> Merge {
    Merge {
        layers: chain.names[..count].to_vec(),
        target: chain.names[count].clone(),
        below: chain.names[count + 1..].to_vec(),
        children: Vec::new(),
    }
}

/// What is left of the chain reads as `disk`, which was the first of `names`, or the target's if that is
/// gone.
fn judge(stores: &BTreeMap<PathBuf, Store>, merge: &Merge, disk: &BTreeMap<u64, u64>, size: u64) {
    let leaf = merge.layers.iter().take(1).find(|leaf| stores.contains_key(*leaf));
    judge_leaf(stores, leaf.unwrap_or(&merge.target), disk, size);
}

/// The chain that begins at `leaf` reads as `disk`.
fn judge_leaf(stores: &BTreeMap<PathBuf, Store>, leaf: &Path, disk: &BTreeMap<u64, u64>, size: u64) {
    let (_, chain) = open_chain(stores, leaf);
    assert_eq!(chain[0].image.metadata.virtual_size, size);
    for (&sector, &expected) in disk {
        assert_eq!(says(&chain, sector), expected, "sector {sector}, {} layers", chain.len());
    }
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
            children: merge.children.clone(),
        };
        run_watched(&folder, again, seed, look).expect("a merge");
    }
    folder.content()
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
    for seed in 0..150 {
        let mut rng = Rng::with_seed(seed);
        let depth = rng.usize(2..6);
        let shapes = random_shapes(&mut rng, depth);
        let chain = Chain::new(&mut rng, &shapes);
        let count = rng.usize(1..depth);
        let merge = merge_of(&chain, count);
        judge(&chain.stores, &merge, &chain.disk(), shapes[0].virtual_size);
        let folder = Folder::of(&chain.stores, true);
        let merged = run_watched(&folder, merge_of(&chain, count), seed, |_| {});
        merged.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
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
}

/// Cuts everywhere in a merge of `count` layers; returns how many states were judged, and after how many of
/// them the merge was done again.
fn cut_everywhere(seed: u64, shapes: &[Shape], count: usize) -> (usize, usize) {
    let mut rng = Rng::with_seed(seed);
    let chain = Chain::new(&mut rng, shapes);
    let (disk, size) = (chain.disk(), shapes[0].virtual_size);
    let folder = Folder::of(&chain.stores, false);
    folder.0.borrow().values().for_each(|file| file.disk.set_immediate(false));
    let merge = merge_of(&chain, count);
    let (mut states, mut again) = (0, 0);
    let result = run_watched(&folder, merge_of(&chain, count), seed, |folder| {
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

/// In one step, over two layers and three, into a base and into a child, larger and smaller ones.
#[test]
fn a_cut_leaves_the_chain_as_it_was_and_the_merge_is_done_again() {
    let odd = |mib, block| Shape { virtual_size: mib * MIB + 512, ..shape(mib, block) };
    let fixed = |mib| Shape { fixed: true, ..odd(mib, 1) };
    let cases: [(&[Shape], usize); 10] = [
        (&[shape(4, 1), shape(4, 2)], 1),
        (&[shape(4, 2), shape(4, 1), shape(4, 4)], 1),
        (&[shape(4, 1), shape(4, 2), shape(4, 1)], 2),
        (&[shape(4, 1), shape(4, 1), shape(4, 1), shape(4, 1)], 3),
        (&[odd(6, 1), odd(3, 2)], 1),
        (&[odd(5, 1), shape(4, 1), odd(3, 2), odd(2, 1)], 2),
        (&[odd(3, 2), odd(5, 1)], 1),
        (&[shape(4, 2), fixed(3)], 1),
        (&[odd(3, 2), fixed(5)], 1),
        (&[odd(6, 1), odd(3, 2), odd(5, 1)], 1),
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

/// Two children of a layer that is merged into what is below it read as before, wherever the merge is cut,
/// and the merge that was cut is done again.
#[test]
fn the_children_of_a_merged_layer_read_as_before() {
    let (mut states, mut again) = (0, 0);
    let chains: [&[Shape]; 3] = [
        &[shape(4, 1), shape(4, 2), shape(4, 1)],
        &[shape(6, 2), shape(3, 1), shape(5, 2), shape(6, 1)],
        &[shape(3, 1), shape(5, 2), Shape { fixed: true, ..shape(3, 1) }],
    ];
    for (seed, shapes) in (0..).zip(chains) {
        let mut rng = Rng::with_seed(seed);
        let mut chain = Chain::new(&mut rng, shapes);
        let leaves = [chain.names[0].clone(), PathBuf::from("/twin.vhdx")];
        chain.stores.insert(leaves[1].clone(), chain.stores[&leaves[0]].clone());
        let below = chain.names[3..].to_vec();
        let (layers, target) = (vec![chain.names[1].clone()], chain.names[2].clone());
        let merge = || Merge {
            layers: layers.clone(),
            target: target.clone(),
            below: below.clone(),
            children: leaves.to_vec(),
        };
        let (disk, size) = (chain.disk(), shapes[0].virtual_size);
        let judge_both = |stores: &BTreeMap<PathBuf, Store>| {
            for leaf in &leaves {
                judge_leaf(stores, leaf, &disk, size);
            }
        };
        let folder = Folder::of(&chain.stores, false);
        let merged = run_watched(&folder, merge(), seed, |folder| {
            for profile in Profile::ALL {
                let left = folder.cut(profile, &mut rng);
                judge_both(&left);
                states += 1;
                if rng.u32(0..30) == 0 {
                    again += 1;
                    let mut cuts = rng.fork();
                    let ended = merged_again(&left, &merge(), rng.u64(..), |folder| {
                        if cuts.u32(0..20) == 0 {
                            judge_both(&folder.cut(Profile::Sectors512, &mut cuts));
                            states += 1;
                        }
                    });
                    judge_both(&ended);
                    assert!(!ended.contains_key(&layers[0]));
                }
            }
        });
        merged.expect("a merge");
        judge_both(&folder.content());
        for leaf in &leaves {
            let image = opened(&folder.content()[leaf]).expect("an image");
            let locator = image.metadata.parent_locator.as_ref().expect("a child");
            assert_eq!(locator.linkage2(), None, "the merge has ended");
        }
    }
    println!("{states} states judged, the merge done again after {again} of them");
    assert!(states > 3000 && again > 50, "{states} states, {again} merges done again");
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
        let merge = merge_of(&chain, 2);
        let folder = Folder::of(&chain.stores, true);
        let (errno, hits) = hits[rng.usize(0..hits.len())];
        let fault = Fault::Error { errno, times: 1_000_000 };
        let injection = Injection { fault, hits, after, seed };
        folder.disk(&chain.names[rng.usize(0..3)]).inject(injection);
        let outcome = run_watched(&folder, merge_of(&chain, 2), seed, |_| {});
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

/// A target whose BAT has no room for the disk of the child gets another one.
#[test]
fn a_target_gets_a_bat_for_the_disk_of_the_child() {
    let mut rng = Rng::with_seed(1);
    let shapes = [shape(150 << 10, 2), shape(140 << 10, 4), shape(4, 1), shape(151 << 10, 4)];
    let chain = Chain::new(&mut rng, &shapes);
    let bat = |store: &Store| opened(store).expect("an image").layout.bat;
    for count in 1..=2 {
        let merge = merge_of(&chain, count);
        let folder = Folder::of(&chain.stores, true);
        run_watched(&folder, merge_of(&chain, count), 1, |_| {}).expect("a merge");
        let left = folder.content();
        judge(&left, &merge, &chain.disk(), shapes[0].virtual_size);
        assert_eq!(examined(&left[&merge.target]).leaks, 0);
        let [before, after] = [&chain.stores, &left].map(|stores| bat(&stores[&merge.target]));
        assert_eq!(before != after, count == 2, "only the smaller target needs more: {before:?} {after:?}");
    }
}
