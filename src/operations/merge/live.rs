//! Merging a layer of a chain that is served into its parent, the *target*, while requests are served.
//!
//! The fronts read the chain all the time, with the map of the target that they have had since the device
//! came up. It stays right while the target is written: what is copied into the target lies in the layer,
//! too, and no reader looks below the layer for it; what the layer does not have stays where it is. Space
//! that the target gives up belongs to blocks that the layer has as a whole. So nothing changes for the
//! fronts before all of it is durable, and then everything changes for them at one moment, while they are
//! held.
//!
//! Each step is durable before the next. A kill, or a power cut, leaves this behind:
//!
//! 1. *the target takes the content over*, steps 1 to 4 of [`Merge`]. The chain reads as before, by the paths
//!    of its images and by those that the device's entry has; the merge is done again from the start;
//! 2. *the child of the layer knows the target by path and by its second linkage*, and the layer still by the
//!    first. By the paths of its images the chain no longer has the layer; by the entry it has, and the
//!    linkages fit both. The same merge continues with step 3, and no other may begin before. If the child is
//!    the leaf, the fronts are held from here to the end of step 4: the leaf's metadata changes while its
//!    session rests;
//! 3. *the entry names the chain without the layer*;
//! 4. *the fronts have dropped the layer*. What was between these two steps is as after step 3: the file of a
//!    layer that no chain needs. A merge of it, when the device is removed, ends what is left;
//! 5. *the layer's file is removed*;
//! 6. *the child forgets the layer*. Before, it has a first linkage that leads nowhere, and a second one by
//!    which the chain is recognised.

use std::path::PathBuf;
use std::rc::Rc;

use uuid::Uuid;

use super::layers::{Files, Guids, Link, Merge, read, relocate};
use crate::engine::waiting::Spawn;
use crate::error::Result;
use crate::format::locator::ParentLocator;
use crate::simulation::{Plant, planted};

/// The device that serves the chain.
#[expect(async_fn_in_trait, reason = "one thread drives all of it: futures need not be Send")]
pub trait Served {
    /// Step 1 is done. From now on images say two things of their parents, so no other merge may begin in
    /// this chain before this one is finished.
    fn has_taken_over(&self);

    /// Steps 3 and 4: the device's entry and its fronts have the chain without the layer. If the child is the
    /// leaf, `link` is what it says of its parent from step 2 on.
    ///
    /// # Errors
    /// Any: the fronts read the chain with the layer, or without it, and the layer must stay.
    async fn drop_layer(&self, link: Option<Link>) -> Result<()>;

    /// Step 6 of the leaf.
    ///
    /// # Errors
    /// Any: the leaf is as it was.
    async fn relink(&self, link: Link) -> Result<()>;
}

/// The child of the layer that is merged.
pub enum Child {
    /// The leaf, at this path, which says this of its parent. Its engine writes it, and no other.
    Leaf(PathBuf, ParentLocator),
    /// Another layer, at this path.
    Layer(PathBuf),
}

/// A merge of a layer of a served chain. The paths are absolute.
pub struct LiveMerge {
    /// What is merged.
    pub layer: PathBuf,
    /// Its parent, which takes it over.
    pub target: PathBuf,
    /// The target's parents, its own first.
    pub below: Vec<PathBuf>,
    /// The only child of the layer.
    pub child: Child,
}

impl LiveMerge {
    /// Merges; see the module's head. The target's tasks run on `tasks`.
    ///
    /// # Errors
    /// Those of [`Merge::run`] and of `served`: the chain reads as before, and the merge can be done again
    /// while the chain has the layer.
    pub async fn run<F: Files>(
        &self,
        files: &F,
        served: &impl Served,
        tasks: Rc<dyn Spawn>,
        new_guid: impl FnMut() -> Uuid + Clone + 'static,
    ) -> Result<()> {
        let Self { layer, target, below, child } = self;
        let (path, known) = match child {
            Child::Leaf(path, locator) => (path, locator.clone()),
            Child::Layer(path) => {
                let image = read(files, path).await?;
                (path, image.metadata.parent_locator.clone().expect("a child has a parent"))
            }
        };
        // Once the target has the content, no other merge may begin before this one has ended.
        Link::check(&known, path, target)?;
        let (layers, children) = (vec![layer.clone()], Vec::new());
        let merge = Merge { layers, target: target.clone(), below: below.clone(), children };
        let guids = merge.take_over(files, tasks, &[known], new_guid.clone()).await?;
        served.has_taken_over();
        let adopt = |child: &PathBuf| Link::Adopt { child: child.clone(), target: target.clone(), guids };
        let before_link = planted(Plant::LayerBeforeLink);
        let before_drop = planted(Plant::LayerBeforeFronts);
        if before_link {
            files.remove(layer).await?;
        }
        let for_leaf = match child {
            Child::Leaf(path, _) => Some(adopt(path)),
            Child::Layer(path) => {
                relocate(files, path, &adopt(path), new_guid.clone()).await?;
                None
            }
        };
        if before_drop {
            files.remove(layer).await?;
        }
        served.drop_layer(for_leaf).await?;
        if !before_link && !before_drop {
            files.remove(layer).await?;
        }
        self.settle(files, served, guids, new_guid).await
    }

    /// Whether the file at the layer's path is what a merge has left that was cut before step 5: the child
    /// still knows it by the first linkage, and the target by the second. Another image may have got the name
    /// since, and even the number of its file; or this one was written, and is a disk of its own.
    ///
    /// # Errors
    /// Those of reading the child and the target.
    pub async fn is_left<F: Files>(&self, files: &F) -> Result<bool> {
        let Ok(layer) = read(files, &self.layer).await else { return Ok(false) };
        let target = read(files, &self.target).await?.header.header.data_write_guid;
        let locator = match &self.child {
            Child::Leaf(_, locator) => Some(locator.clone()),
            Child::Layer(path) => read(files, path).await?.metadata.parent_locator.clone(),
        };
        let knows = |locator: ParentLocator| {
            locator.linkage().is_ok_and(|linkage| linkage == layer.header.header.data_write_guid)
                && locator.linkage2() == Some(target)
        };
        Ok(locator.is_some_and(knows))
    }

    /// Steps 5 and 6 of a merge that was cut between them and step 4: the chain no longer has the layer. If
    /// its file [is left](Self::is_left), it is removed.
    ///
    /// # Errors
    /// Those of [`Self::run`].
    pub async fn finish<F: Files>(
        &self,
        files: &F,
        served: &impl Served,
        is_left: bool,
        new_guid: impl FnMut() -> Uuid + Clone,
    ) -> Result<()> {
        let target = read(files, &self.target).await?.header.header.data_write_guid;
        if is_left {
            files.remove(&self.layer).await?;
        }
        self.settle(files, served, Guids { layer: target, target }, new_guid).await
    }

    /// Step 6.
    async fn settle<F: Files>(
        &self,
        files: &F,
        served: &impl Served,
        guids: Guids,
        new_guid: impl FnMut() -> Uuid + Clone,
    ) -> Result<()> {
        let link = Link::Settle(guids);
        match &self.child {
            Child::Leaf(..) => served.relink(link).await,
            Child::Layer(path) => relocate(files, path, &link, new_guid).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::disk::{Reactor, UringDisk};
    use crate::engine::Outcome;
    use crate::error::Kind;
    use crate::format::guid;
    use crate::format::locator::{MAX_PAIRS, PARENT_LINKAGE};

    /// Whatever is asked of it is too much.
    struct Untouched;

    impl Files for Untouched {
        type Disk = UringDisk;

        fn disk(&self, path: &Path) -> UringDisk {
            panic!("{} is read", path.display());
        }

        async fn remove(&self, path: &Path) -> Result<()> {
            panic!("{} is removed", path.display());
        }

        fn copied(&self, bytes: u64) -> Outcome {
            panic!("{bytes} bytes are copied");
        }
    }

    impl Served for Untouched {
        fn has_taken_over(&self) {
            panic!("no other merge may begin");
        }

        async fn drop_layer(&self, _: Option<Link>) -> Result<()> {
            panic!("the fronts are held");
        }

        async fn relink(&self, _: Link) -> Result<()> {
            panic!("the fronts are held");
        }
    }

    /// What the leaf is to say of its parent must fit before the target gets anything.
    #[test]
    fn a_leaf_whose_locator_is_full_stops_a_merge_before_it_begins() {
        let reactor = Reactor::new().expect("io_uring is there");
        let linkage = || {
            let mut locator = ParentLocator::default();
            locator.set(PARENT_LINKAGE, guid::print(Uuid::max()));
            locator
        };
        let (mut pairs, mut bytes) = (linkage(), linkage());
        (1..MAX_PAIRS).for_each(|key| pairs.set(&format!("key{key}"), "x"));
        (0..16).for_each(|key| bytes.set(&format!("key{key}"), "x".repeat(16 << 10)));
        for locator in [pairs, bytes] {
            let merge = LiveMerge {
                layer: "/disks/layer.vhdx".into(),
                target: "/disks/base.vhdx".into(),
                below: Vec::new(),
                child: Child::Leaf("/disks/leaf.vhdx".into(), locator),
            };
            let merging = merge.run(&Untouched, &Untouched, reactor.executor().clone(), Uuid::new_v4);
            let error = reactor.block_on(merging).expect_err("no room for a second linkage");
            assert_eq!(
                (error.kind(), error.structure()),
                (Kind::Unsupported, Some("parent locator")),
                "{error}"
            );
            assert_eq!(error.file_path(), Some(Path::new("/disks/leaf.vhdx")));
            assert!(error.remedy_text().is_some(), "{error}");
        }
    }
}
