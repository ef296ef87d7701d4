//! The images that are made of one another: the chain of an image, and what branches off from it.
//!
//! A parent does not know its children. They are found where [`children`](super::children::children) finds
//! them: beside it, and among the images of devices.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::Devices;
use super::inspect::{identify, identify_neighbour};
use crate::chain::{self, Known, Search};
use crate::disk::{HostFile, host_bytes};
use crate::error::{Doing, Error, Kind, Locate, Result};

/// An image of the tree.
#[derive(Clone, Debug)]
pub struct TreeLayer {
    /// Its file, as an absolute path without symbolic links.
    pub path: PathBuf,
    /// The same file, independent of its path.
    pub file: HostFile,
    /// The place of its parent among the layers, which comes before it; none of the lowest.
    pub parent: Option<usize>,
    /// It is the image that was asked for, or below it.
    pub in_chain: bool,
    /// The size of its disk, bytes.
    pub virtual_size: u64,
    /// The space that it takes on its host, bytes.
    pub host_bytes: u64,
    /// When its file was last written.
    pub modified: SystemTime,
}

/// See the module's head.
#[derive(Debug)]
pub struct Tree {
    /// The lowest first, and each above its parent.
    pub layers: Vec<TreeLayer>,
    /// Why there is nothing below the lowest one, if it has a parent.
    pub broken: Option<Error>,
}

/// The chain of the image at `path`, the image first, and why it ends early, if it does.
///
/// # Errors
///
/// Those of [`identify`].
pub fn chain_of(path: &Path, search: &Search) -> Result<(Vec<Known>, Option<Error>)> {
    let (leaf, mut parents) = (identify(path)?, Vec::new());
    let broken = chain::follow_parents(&leaf, search, &mut parents, identify).err();
    parents.insert(0, leaf);
    Ok((parents, broken))
}

/// The tree of the image at `path`.
///
/// # Errors
///
/// Those of [`chain_of`]; when a file cannot be looked at.
pub fn tree(path: &Path, search: &Search, devices: &dyn Devices) -> Result<Tree> {
    let (mut chain, broken) = chain_of(path, search)?;
    chain.reverse();
    let known = RefCell::new(BTreeMap::new());
    let grower = Grower { chain: &chain, search, devices, known };
    let mut layers = Vec::new();
    grower.add(&chain[0], None, &mut layers)?;
    Ok(Tree { layers, broken })
}

struct Grower<'a> {
    /// The lowest first.
    chain: &'a [Known],
    search: &'a Search,
    devices: &'a dyn Devices,
    /// What each file that may be a child is, if it is an image: each is read once.
    known: RefCell<BTreeMap<PathBuf, Option<Known>>>,
}

impl Grower<'_> {
    /// Adds `image` and what is above it, the chain last.
    fn add(&self, image: &Known, parent: Option<usize>, layers: &mut Vec<TreeLayer>) -> Result<()> {
        let found = fs::metadata(&image.path).doing("looking at the image").file(&image.path)?;
        let in_chain = self.chain.iter().position(|one| one.path == image.path);
        let place = layers.len();
        layers.push(TreeLayer {
            file: HostFile::of(&found),
            parent,
            in_chain: in_chain.is_some(),
            virtual_size: image.identity.metadata.virtual_size,
            host_bytes: host_bytes(&found),
            modified: found.modified().doing("looking at the image").file(&image.path)?,
            path: image.path.clone(),
        });
        let next = in_chain.and_then(|place| self.chain.get(place + 1));
        let has_place = |path: &Path| layers.iter().any(|layer| chain::same_file(&layer.path, path));
        let is_next = |path: &Path| next.is_some_and(|next| chain::same_file(&next.path, path));
        let branches = self.children(image).into_iter();
        let branches: Vec<Known> =
            branches.filter(|child| !has_place(&child.path) && !is_next(&child.path)).collect();
        for child in &branches {
            self.add(child, Some(place), layers)?;
        }
        next.map_or(Ok(()), |next| self.add(next, Some(place), layers))
    }

    fn children(&self, image: &Known) -> Vec<Known> {
        let mut found = chain::children_beside(image, self.search, |path| self.identify(path));
        let on_devices = self.devices.children(&image.path).into_iter();
        let is_new = |path: &PathBuf| !found.contains(path) && self.is_made_of(path, image);
        let on_devices: Vec<PathBuf> = on_devices.filter(is_new).collect();
        found.extend(on_devices);
        found.iter().filter_map(|path| self.identify(path).ok()).collect()
    }

    fn is_made_of(&self, path: &Path, image: &Known) -> bool {
        self.identify(path).is_ok_and(|child| chain::is_made_of(&child, image))
    }

    fn identify(&self, path: &Path) -> Result<Known> {
        let mut known = self.known.borrow_mut();
        let found = known.entry(path.to_owned()).or_insert_with(|| identify_neighbour(path).ok());
        found.clone().ok_or_else(|| Error::new(Kind::NotVhdx, "it is no image that can be read").file(path))
    }
}
