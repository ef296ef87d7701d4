//! Merging a layer of the chain that a device serves into its parent. The order of the steps, and what a kill
//! leaves after each, are in [`LiveMerge`](crate::operations::merge::LiveMerge).
//!
//! A thread of its own copies, with a ring of its own, so that the engine serves requests as before. It asks
//! the engine's thread for what concerns the leaf and the fronts.
//!
//! Locks: the chain's layers are locked for reading as long as the device is served. What the merge writes
//! gets another description, and on that a writer's lock before the reader's is given back: at every moment
//! others are kept out. A merge that has ended, or failed, leaves readers' locks.
//!
//! It ends early when the caller has left, or the device is taken down: what was copied stays in the target,
//! where the layer hides it.

mod relink;
mod worker;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::{self, JoinHandle};

use super::caller::Caller;
use super::exchange::Exchange;
use super::order::MergeOrder;
use super::registry::MergeUnderWay;
use super::served_image::ServedImage;
use crate::disk::ImageFile;
use crate::error::{Doing, Error, Kind, Result};
use crate::printable::shell;
use worker::{Child, Layer, Work};

/// Merges layers of what the engine's thread serves.
pub(super) struct Merger<'a> {
    pub(super) exchange: &'a Exchange<'a>,
    pub(super) caller: Caller,
    pub(super) closing: Arc<AtomicBool>,
}

/// The threads that merge.
#[derive(Default)]
pub(super) struct Workers(Vec<JoinHandle<()>>);

impl Workers {
    /// Waits until none is left. The engine's thread takes no orders by then.
    pub(super) fn await_end(self) {
        self.0.into_iter().for_each(|thread| thread.join().expect("a panic ends the process"));
    }
}

impl Merger<'_> {
    /// Begins the merge, on a thread of its own, which answers.
    pub(super) fn begin(&self, order: MergeOrder, served: &ServedImage, workers: &mut Workers) {
        workers.0.retain(|thread| !thread.is_finished());
        let work = match self.plan(&order, served) {
            Ok(work) => work,
            Err(error) => return order.end(Err(error)),
        };
        let thread = thread::Builder::new().name("vhdx-merge".into());
        match thread.spawn(move || work.run(order)).doing("starting a thread for the merge") {
            Ok(thread) => workers.0.push(thread),
            // The order was dropped with the thread, and its caller sees the connection end.
            Err(error) => tracing::warn!("{error:#}"),
        }
    }

    fn plan(&self, order: &MergeOrder, served: &ServedImage) -> Result<Work> {
        let parents = &served.opened.parents;
        if let Some(other) = order.unfinished.as_ref().filter(|other| other.layer_file != order.layer) {
            let message = format!("the merge of {} was interrupted", other.layer.display());
            let remedy = format!("finish it first: `vhdx-ublk merge {}`", shell(&other.layer));
            return Err(Error::new(Kind::InUse, message).remedy(remedy));
        }
        // The file of a layer that is gone may have left its number to another layer's.
        let is_layer = |parent: &ImageFile| {
            let is_its_name = |left: &MergeUnderWay| left.layer == parent.path();
            parent.identity() == order.layer && order.unfinished.as_ref().is_none_or(is_its_name)
        };
        let place = parents.iter().position(|parent| is_layer(parent));
        let (layer, target) = match (place, &order.unfinished) {
            (Some(place), _) => (Layer::InChain(parents[place].clone()), place + 1),
            (None, Some(left)) if left.layer_file == order.layer => {
                let target = parents.iter().position(|parent| parent.identity() == left.target_file);
                let dropped = Layer::Dropped(left.layer.clone(), left.layer_file);
                (dropped, target.ok_or_else(|| not_in_chain(&left.layer, served))?)
            }
            (None, _) => {
                let message = "the device does not read this image as a parent of its image";
                return Err(Error::new(Kind::Usage, message).remedy("`vhdx-ublk list` shows what it serves"));
            }
        };
        let Some(into) = parents.get(target) else {
            let base = layer.path();
            let message = "it is the first image of the chain, and has no parent to merge into";
            return Err(Error::new(Kind::Unsupported, message).file(base));
        };
        let above = if place.is_some() { target - 1 } else { target };
        let child = match (above, &served.locator) {
            (0, Some(locator)) => Child::Leaf(served.file.path().into(), locator.clone()),
            (above, _) => Child::Layer(parents[above - 1].clone()),
        };
        let paths = served.files().iter().map(|file| file.path().to_owned()).collect();
        Ok(Work {
            layer,
            target: into.clone(),
            below: parents[target + 1..].to_vec(),
            child,
            chain: paths,
            caller: self.caller.clone(),
            closing: self.closing.clone(),
        })
    }
}

fn not_in_chain(layer: &Path, served: &ServedImage) -> Error {
    let message = "what it was merged into is no longer in the chain of the device";
    Error::new(Kind::Unsupported, message)
        .file(layer)
        .remedy(format!("`vhdx-ublk info --chain {}` shows the chain", shell(served.file.path())))
}

impl MergeUnderWay {
    fn of(layer: &Layer, target: &ImageFile) -> Self {
        let (layer, layer_file): (PathBuf, _) = (layer.path().into(), layer.file());
        Self { layer, layer_file, target: target.path().into(), target_file: target.identity() }
    }
}
