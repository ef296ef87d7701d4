//! Promises defended here: wherever a merge of a layer of a chain that is served is cut, the chain reads as
//! before, by the device's entry and by the paths of its images; no other merge begins that would break it;
//! and the same merge ends it.
//!
//! A chain of four images. What an image holds is a set: what it was written with, and what it has taken
//! over. Each step is durable before the next, so a power cut takes nothing but `/run` and the daemon.

use std::collections::BTreeSet;
use std::time::Instant;

use stateright::{Checker, HasDiscoveries, Model, Property};

const IMAGES: usize = 4;

/// The first image of the chain.
const BASE: usize = 0;

/// The image that is written.
const LEAF: usize = IMAGES - 1;

/// What a whole chain holds.
const EVERYTHING: u8 = (1 << IMAGES) - 1;

/// The steps of a merge. The doc of each names the file of `src` and the function that it stands for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum Step {
    /// `device/merge/worker.rs` `merge`: the device's entry has the mark of this merge.
    Marks,
    /// `operations/merge/layers.rs` `announce`: the layer knows its parent by the GUID to come, too.
    Announces,
    /// `operations/merge/layers.rs` `copy`: the target is opened, under that GUID.
    OpensTarget,
    /// `operations/merge/layers.rs` `copy`: the target has what the layer has.
    Copies,
    /// `operations/merge/layers.rs` `relocate`: the layer's child knows the target, by its second linkage.
    Adopts,
    /// `device/merge/relink.rs` `try_to_relink`: the device's entry names the chain without the layer.
    SwitchesEntry,
    /// `device/merge/relink.rs` `without`: the fronts read the chain without the layer.
    DropsLayer,
    /// `device/merge/worker.rs` `remove`: the layer's file is removed.
    Removes,
    /// `operations/merge/live.rs` `settle`: the child forgets the layer.
    Settles,
    /// `device/merge/worker.rs` `run`: the mark goes.
    Unmarks,
}

/// Wrong orders that the properties must catch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plant {
    None,
    /// The target has a GUID that the layer does not know yet.
    LateAnnouncement,
    /// The child leads past the layer before the target has what that holds.
    AdoptBeforeCopy,
    /// The layer's file goes before its child leads past it.
    RemoveBeforeAdoption,
    /// The layer's file goes before the entry names the chain without it.
    RemoveBeforeSwitch,
    /// The entry names the chain without the layer before the child knows the target.
    SwitchBeforeAdoption,
    /// The fronts read the target with the map that they had before it took the layer over.
    OldMap,
    /// No mark is left.
    NoMark,
    /// Another merge begins although there is a mark.
    IgnoreMark,
}

const PLANTS: [(Plant, &str); 8] = [
    (Plant::LateAnnouncement, "the chain opens by its paths"),
    (Plant::AdoptBeforeCopy, "the chain opens by its paths"),
    (Plant::RemoveBeforeAdoption, "the chain opens by its paths"),
    (Plant::RemoveBeforeSwitch, "the chain opens by the device's entry"),
    (Plant::SwitchBeforeAdoption, "the chain opens by the device's entry"),
    (Plant::OldMap, "the fronts read the whole disk"),
    (Plant::NoMark, "a layer that no chain needs is named"),
    (Plant::IgnoreMark, "the chain opens by its paths"),
];

impl Plant {
    /// The steps in the order that it has.
    fn order(self) -> Vec<Step> {
        use Step::{
            Adopts, Announces, Copies, DropsLayer, Marks, OpensTarget, Removes, Settles, SwitchesEntry,
            Unmarks,
        };
        let mut steps = vec![
            Marks,
            Announces,
            OpensTarget,
            Copies,
            Adopts,
            SwitchesEntry,
            DropsLayer,
            Removes,
            Settles,
            Unmarks,
        ];
        let mut put = |step: Step, before: Step| {
            steps.retain(|it| *it != step);
            let at = steps.iter().position(|it| *it == before).expect("it is a step");
            steps.insert(at, step);
        };
        match self {
            Self::LateAnnouncement => put(OpensTarget, Announces),
            Self::AdoptBeforeCopy => put(Adopts, OpensTarget),
            Self::RemoveBeforeAdoption => put(Removes, Adopts),
            Self::RemoveBeforeSwitch => put(Removes, SwitchesEntry),
            Self::SwitchBeforeAdoption => put(SwitchesEntry, Adopts),
            Self::NoMark => steps.retain(|step| *step != Marks),
            Self::None | Self::OldMap | Self::IgnoreMark => {}
        }
        steps
    }
}

/// An image that is there.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct Image {
    /// DataWriteGuid.
    guid: u8,
    /// The path of its parent, and the linkages: one, or two that its parent may have.
    parent: usize,
    linkages: [u8; 2],
    holds: u8,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct Entry {
    /// The leaf's parents, its own first.
    parents: Vec<usize>,
    /// The layer whose merge is under way, or was interrupted.
    merging: Option<usize>,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct Daemon {
    /// What the fronts read, the leaf first, and what the maps have that they read it with.
    reads: Vec<(usize, u8)>,
    merge: Option<Merge>,
}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct Merge {
    layer: usize,
    target: usize,
    child: usize,
    /// The GUID that the target is to have.
    coming: u8,
    step: Step,
    /// There was a mark of it.
    again: bool,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq)]
struct Chain {
    images: [Option<Image>; IMAGES],
    entry: Option<Entry>,
    daemon: Option<Daemon>,
    guids: u8,
    merges: u8,
    kills: u8,
    cuts: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// The user has a layer merged into its parent.
    Begins(usize),
    Steps(Step),
    /// The one who waits for the merge leaves, while it copies.
    IsLeft,
    Kill,
    CutPower,
    Recovers,
    Adds,
}

impl Chain {
    fn new((merges, kills, cuts): (u8, u8, u8)) -> Self {
        let image = |at: usize| {
            let guid = u8::try_from(at).expect("few");
            let below = guid.saturating_sub(1);
            Some(Image { guid, parent: at.saturating_sub(1), linkages: [below; 2], holds: 1 << at })
        };
        let (images, guids) = (std::array::from_fn(image), u8::try_from(IMAGES).expect("few"));
        let mut chain = Self { images, entry: None, daemon: None, guids, merges, kills, cuts };
        chain.add();
        chain
    }

    fn image(&mut self, at: usize) -> &mut Image {
        self.images[at].as_mut().expect("the image is there")
    }

    /// Whether the images are a chain that holds everything.
    fn is_whole(&self, parents: &[usize]) -> bool {
        let (mut child, mut holds) = (LEAF, self.images[LEAF].expect("the leaf stays").holds);
        for parent in parents {
            let (Some(above), Some(image)) = (self.images[child], self.images[*parent]) else { return false };
            if !above.linkages.contains(&image.guid) {
                return false;
            }
            (child, holds) = (*parent, holds | image.holds);
        }
        child == BASE && holds == EVERYTHING
    }

    /// The leaf's parents, by the paths in the images.
    fn by_paths(&self) -> Vec<usize> {
        let (mut at, mut parents) = (LEAF, Vec::new());
        while let Some(image) = self.images[at].filter(|_| at != BASE) {
            at = image.parent;
            parents.push(at);
        }
        parents
    }

    fn serve(&mut self) {
        let parents = &self.entry.as_ref().expect("a device has an entry").parents;
        let read = |at: usize| (at, self.images[at].map_or(0, |image| image.holds));
        let reads = std::iter::once(LEAF).chain(parents.iter().copied()).map(read).collect();
        self.daemon = Some(Daemon { reads, merge: None });
    }

    fn add(&mut self) {
        self.entry = Some(Entry { parents: self.by_paths(), merging: None });
        self.serve();
    }

    /// What a merge of `layer` would do, if one may begin.
    fn plan(&self, layer: usize, plant: Plant) -> Option<Merge> {
        let entry = self.entry.as_ref().filter(|entry| {
            entry.merging.is_none_or(|merging| merging == layer) || plant == Plant::IgnoreMark
        })?;
        let parents = &entry.parents;
        let chain: Vec<usize> = std::iter::once(LEAF).chain(parents.iter().copied()).collect();
        let place = chain.iter().position(|at| *at == layer);
        let (coming, again) = (self.guids, entry.merging.is_some());
        if let Some(place) = place {
            let target = *chain.get(place + 1)?;
            let (child, guid) = (*chain.get(place.checked_sub(1)?)?, self.images[layer]?.guid);
            let linkages = self.images[child]?.linkages;
            // The child knows that everything is copied.
            let is_copied = linkages == [guid, self.images[target]?.guid] && linkages[0] != linkages[1];
            let step = if is_copied { Step::Adopts } else { plant.order()[0] };
            return Some(Merge { layer, target, child, coming, step, again });
        }
        // The chain has lost the layer in a merge that was cut then.
        entry.merging?;
        let target = *parents.iter().find(|parent| **parent < layer)?;
        let child = *chain.iter().rev().find(|at| **at > layer)?;
        Some(Merge { layer, target, child, coming, step: Step::Removes, again })
    }

    /// The merge does its next step.
    fn step(&mut self, plant: Plant) {
        let merge = self.daemon.as_ref().and_then(|daemon| daemon.merge).expect("it merges");
        let Merge { layer, target, child, coming, step, .. } = merge;
        match step {
            Step::Marks => self.mark(Some(layer)),
            Step::Announces => {
                let now = self.image(target).guid;
                self.image(layer).linkages = [now, coming];
            }
            Step::OpensTarget => self.image(target).guid = coming,
            Step::Copies => {
                let holds = self.images[layer].map_or(0, |image| image.holds);
                self.image(target).holds |= holds;
            }
            Step::Adopts => {
                let guid = self.image(target).guid;
                let known = self.images[layer].map_or(self.image(child).linkages[0], |layer| layer.guid);
                let child = self.image(child);
                (child.parent, child.linkages) = (target, [known, guid]);
            }
            Step::SwitchesEntry => {
                self.entry.as_mut().expect("it serves").parents.retain(|parent| *parent != layer);
            }
            Step::DropsLayer => {
                let holds = self.image(target).holds;
                let reads = &mut self.daemon.as_mut().expect("it serves").reads;
                reads.retain(|(at, _)| *at != layer);
                for (_, seen) in reads.iter_mut().filter(|(at, _)| *at == target) {
                    *seen = if plant == Plant::OldMap { *seen } else { holds };
                }
            }
            Step::Removes => self.images[layer] = None,
            Step::Settles => {
                let guid = self.image(target).guid;
                self.image(child).linkages = [guid; 2];
            }
            Step::Unmarks => self.mark(None),
        }
        let order = plant.order();
        let next = order.iter().skip_while(|it| **it != step).nth(1);
        self.daemon.as_mut().expect("it serves").merge = next.map(|step| Merge { step: *step, ..merge });
    }

    fn mark(&mut self, merging: Option<usize>) {
        self.entry.as_mut().expect("it serves").merging = merging;
    }

    fn happen(&mut self, action: Action, plant: Plant) -> bool {
        match action {
            Action::Begins(layer) => {
                let Some(merge) = self.plan(layer, plant) else { return false };
                self.merges -= 1;
                self.guids += 1;
                self.daemon.as_mut().expect("it serves").merge = Some(merge);
            }
            Action::Steps(_) => self.step(plant),
            Action::IsLeft => {
                let merge = self.daemon.as_mut().expect("it serves").merge.take();
                if !merge.expect("it merges").again {
                    self.mark(None);
                }
            }
            Action::Kill => {
                self.kills -= 1;
                self.daemon = None;
            }
            Action::CutPower => {
                self.cuts -= 1;
                (self.daemon, self.entry) = (None, None);
            }
            Action::Recovers => self.serve(),
            Action::Adds => self.add(),
        }
        true
    }
}

/// What users do with a chain that is served.
struct Merging {
    bounds: (u8, u8, u8),
    plant: Plant,
}

impl Model for Merging {
    type State = Chain;
    type Action = Action;

    fn init_states(&self) -> Vec<Chain> {
        vec![Chain::new(self.bounds)]
    }

    fn actions(&self, chain: &Chain, actions: &mut Vec<Action>) {
        match (&chain.daemon, &chain.entry) {
            (None, Some(_)) => actions.push(Action::Recovers),
            (None, None) => actions.push(Action::Adds),
            (Some(Daemon { merge: None, .. }), _) if chain.merges > 0 => {
                actions.extend((BASE + 1..LEAF).map(Action::Begins));
            }
            (Some(Daemon { merge: Some(merge), .. }), _) => {
                actions.push(Action::Steps(merge.step));
                if merge.step == Step::Copies {
                    actions.push(Action::IsLeft);
                }
            }
            _ => {}
        }
        if chain.daemon.is_some() && chain.kills > 0 {
            actions.push(Action::Kill);
        }
        if chain.cuts > 0 {
            actions.push(Action::CutPower);
        }
    }

    fn next_state(&self, chain: &Chain, action: Action) -> Option<Chain> {
        let mut next = chain.clone();
        next.happen(action, self.plant).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("the chain opens by its paths", |_, chain: &Chain| {
                chain.is_whole(&chain.by_paths())
            }),
            Property::always("the chain opens by the device's entry", |_, chain: &Chain| {
                chain.entry.as_ref().is_none_or(|entry| chain.is_whole(&entry.parents))
            }),
            Property::always("the fronts read the whole disk", |_, chain: &Chain| {
                let seen = |daemon: &Daemon| daemon.reads.iter().fold(0, |all, (_, holds)| all | holds);
                chain.daemon.as_ref().is_none_or(|daemon| seen(daemon) == EVERYTHING)
            }),
            Property::always("a layer that no chain needs is named", |merging, chain: &Chain| {
                // A power cut takes the mark.
                let Some(entry) = chain.entry.as_ref().filter(|_| chain.cuts == merging.bounds.2) else {
                    return true;
                };
                let is_needed = |at: &usize| entry.parents.contains(at) || entry.merging == Some(*at);
                (BASE..LEAF).filter(|at| chain.images[*at].is_some()).all(|at| is_needed(&at))
            }),
            Property::sometimes("merged in one go", |merging, chain: &Chain| {
                is_merged(chain) && chain.kills == merging.bounds.1
            }),
            Property::sometimes("merged after a kill", |merging, chain: &Chain| {
                is_merged(chain) && chain.kills < merging.bounds.1
            }),
            Property::sometimes("one image is left below", |_, chain: &Chain| {
                is_merged(chain) && chain.by_paths() == [BASE]
            }),
        ]
    }
}

fn is_merged(chain: &Chain) -> bool {
    let is_done = |entry: &Entry| entry.merging.is_none() && entry.parents.len() < IMAGES - 1;
    chain.entry.as_ref().is_some_and(is_done)
}

const BOUNDS: (u8, u8, u8) = (4, 2, 1);

fn check(plant: Plant, end: HasDiscoveries) -> impl Checker<Merging> {
    Merging { bounds: BOUNDS, plant }.checker().finish_when(end).spawn_bfs().join()
}

#[test]
fn a_merge_that_is_cut_leaves_a_chain() {
    let started = Instant::now();
    let checker = check(Plant::None, HasDiscoveries::AnyFailures);
    let (states, steps, depth) = (checker.unique_state_count(), checker.state_count(), checker.max_depth());
    let ((merges, kills, cuts), seconds) = (BOUNDS, started.elapsed().as_secs_f32());
    println!(
        "merged live: {states} states, {steps} transitions, depth {depth}, {seconds:.1} s, {merges} merges, \
         {kills} kills, {cuts} power cut"
    );
    let mut reached = BTreeSet::new();
    for (property, path) in checker.discoveries() {
        let actions = path.into_actions();
        assert!(property.contains("merged") || property.contains("left"), "\"{property}\": {actions:?}");
        reached.insert(property);
    }
    assert_eq!(reached.len(), 3, "only {reached:?} was reached");
}

#[test]
fn each_wrong_order_of_a_merge_is_seen() {
    for (plant, property) in PLANTS {
        let end = HasDiscoveries::AnyOf(BTreeSet::from([property]));
        let found = check(plant, end).discovery(property);
        let path = found.unwrap_or_else(|| panic!("{plant:?} does not break \"{property}\""));
        println!("{plant:?}: \"{property}\" is broken by {} actions", path.into_actions().len());
    }
}
