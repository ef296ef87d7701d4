//! Taking a snapshot of a device that is served: its image becomes the parent of a new one, which is served from
//! then on. The frozen image is what the device held at one moment, everything acknowledged before included.
//!
//! Order, each step durable before the next:
//!
//! 1. the session of the image is open, so that its DataWriteGuid changes no more, and what is dirty is committed: the
//!    pause is short then;
//! 2. the child is made, with that DataWriteGuid, and its session; by another thread, as its place may hang;
//! 3. the fronts are held: requests that come wait;
//! 4. the image is committed, its log emptied, its session at rest: whole for everybody;
//! 5. the device's entry names the child: a successor of this process serves that, and before it the image;
//! 6. the fronts go on with the child; the image's tail is cut off and its session removed.
//!
//! A failure before 5 removes the child, and the device goes on as before. A child that a kill or a power cut leaves
//! behind has nothing of its own: it reads as the image does, until a session of that begins: then it is refused, as its
//! parent has changed. It may be removed, as nothing serves it; until then `add` takes the image for its parent.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use super::fronts::{FrontInbox, Mailboxes};
use super::leaf::{Leaf, NextLeaf};
use super::maker::{Made, Makers, Wish};
use super::opened::WritableOpen;
use super::order::{Caller, NewLeaf, Order, Snapped, Switch};
use super::registry::FileId;
use super::serving::{Serving, open_served, unclean};
use crate::chain::MAX_DEPTH;
use crate::disk::{ImageFile, Reactor};
use crate::engine::Outcome;
use crate::engine::Parent;
use crate::engine::shared::Session;
use crate::error::{Error, Kind, Result};
use crate::image::{DEFAULT_BLOCK_SIZE, DEFAULT_LOG_LENGTH, Image, InitialState, NewImage};

/// What a snapshot needs of the engine's thread.
pub(super) struct Place<'a> {
    pub(super) reactor: &'a Reactor,
    pub(super) how: &'a WritableOpen,
    pub(super) inbox: &'a Rc<FrontInbox>,
    pub(super) fronts: &'a Rc<Mailboxes>,
    pub(super) next: &'a NextLeaf,
    pub(super) makers: &'a Makers,
    /// Set when the device is taken down.
    pub(super) closing: &'a AtomicBool,
}

impl Place<'_> {
    /// Takes the snapshot; `serving` is what is served afterwards.
    pub(super) fn obey(&self, order: Order, serving: &mut Serving) {
        let Order { image, device, switch, answer, caller } = order;
        match self.have_made(image, device, serving) {
            Ok(made) => {
                let Made { file, id, image, memory_alignment, place, verdict } = made;
                let child = self.serve_child((file, &place), image, memory_alignment, serving);
                let outcome = child.and_then(|child| self.take((child, id), (switch, &caller), serving));
                verdict.give(outcome, answer);
            }
            Err(error) => {
                // Who asked may have lost patience.
                let _ = answer.send(Err(error));
            }
        }
    }

    /// Has the child made.
    fn have_made(&self, path: PathBuf, device: u32, serving: &Serving) -> Result<Made> {
        let image = new_child(serving)?;
        self.prepare(serving)?;
        let wish = Wish {
            path,
            device,
            parent: serving.file.clone(),
            data_write_guid: serving.engine.data_write_guid(),
            disk_id: serving.disk_id,
            image,
        };
        let hurry = async {
            while !self.closing.load(Ordering::Acquire) {
                self.inbox.called().await;
            }
        };
        self.makers.make(self.reactor, wish, hurry)
    }

    fn take(
        &self,
        (child, id): (Serving, FileId),
        switch: (Switch, &Caller),
        serving: &mut Serving,
    ) -> Result<Snapped> {
        let started = Instant::now();
        self.inbox.hold(self.reactor, self.fronts);
        let switched = self.switch(switch, serving, (&child, id));
        if switched.is_ok() {
            let shared = child.engine.shared().clone();
            self.next.set(Leaf { shared, file: child.file.clone() });
            self.inbox.change_engine(child.engine.clone());
        }
        self.fronts.release();
        let pause_us = u64::try_from(started.elapsed().as_micros()).expect("years are below 2^64");
        if let Err(error) = switched {
            self.give_up(child);
            return Err(error);
        }
        let parent = std::mem::replace(serving, child);
        let snapped =
            Snapped { image: serving.file.path().into(), parent: parent.file.path().into(), pause_us };
        self.retire(parent);
        tracing::info!(
            "{} is served now, {} is its parent",
            snapped.image.display(),
            snapped.parent.display()
        );
        Ok(snapped)
    }

    /// The image's DataWriteGuid changes no more, and little is left to be committed.
    fn prepare(&self, serving: &Serving) -> Result<()> {
        let outcome = self.reactor.block_on(async {
            serving.engine.open_session().await?;
            serving.engine.flush().await
        });
        explain("committing what is dirty", outcome, serving)
    }

    /// The child with an engine of its own, on top of what is served.
    fn serve_child(
        &self,
        (file, place): (Arc<ImageFile>, &crate::image::Place),
        mut image: Image,
        memory_alignment: u32,
        serving: &Serving,
    ) -> Result<Serving> {
        let (reactor, disk) = (self.reactor, self.reactor.disk(file.clone()));
        let session = reactor.block_on(self.how.begin(&disk, place, &mut image));
        let session = session.map_err(|error| error.file(file.path()))?;
        let parents: Vec<Arc<ImageFile>> =
            std::iter::once(&serving.file).chain(serving.opened.parents.iter()).cloned().collect();
        let layers = parents.iter().zip(serving.engine.shared().layers());
        let layers = layers.map(|(file, map)| Parent { disk: reactor.disk(file.clone()), map: map.clone() });
        let parents = (layers.collect(), parents.into());
        let parameters = serving.opened.parameters;
        let child = open_served(reactor, self.fronts, file, image, session, parents, parameters)?;
        match fits(&child, memory_alignment, serving) {
            Ok(()) => Ok(child),
            Err(error) => {
                self.give_up(child);
                Err(error)
            }
        }
    }

    fn give_up(&self, child: Serving) {
        if let Err(error) = child.give_up(self.reactor) {
            tracing::warn!("{error:#}");
        }
    }

    /// The moment: the image is whole, and the device's entry names the child.
    fn switch(
        &self,
        (switch, caller): (Switch, &Caller),
        serving: &Serving,
        (child, image_file): (&Serving, FileId),
    ) -> Result<()> {
        let parent_files = child.opened.parent_files()?;
        let frozen = self.reactor.block_on(serving.engine.freeze());
        explain("freezing the image", frozen, serving)?;
        serving.engine.shared().map.memory().rest();
        if !caller.claim() {
            let image = child.file.path().display();
            tracing::warn!("the snapshot {image} is not taken: its caller has stopped waiting");
            return Err(Error::new(Kind::Io, "the caller has stopped waiting"));
        }
        switch(NewLeaf {
            image: child.file.path().into(),
            image_file,
            parents: child.opened.parents.iter().map(|parent| parent.path().into()).collect(),
            parent_files,
            file_write_guid: child.opened.file_write_guid,
        })
    }

    /// Nobody writes the frozen image any more; others may read it.
    fn retire(&self, parent: Serving) {
        if let Err(errno) = self.reactor.block_on(parent.engine.retire()) {
            tracing::warn!("{} keeps its unused tail: errno {errno}", parent.file.path().display());
        }
        parent.file.share();
        if let Some(Err(error)) = parent.session.map(super::session::SessionFile::remove) {
            tracing::warn!("{error:#}");
        }
    }
}

fn explain(doing: &str, outcome: Outcome, serving: &Serving) -> Result<()> {
    let poisoned = serving.engine.shared().session() == Session::Poisoned;
    outcome.map_err(|errno| unclean(doing, errno, poisoned, serving.file.path()))
}

/// Whether the device can go on with `child` as it was promised.
fn fits(child: &Serving, memory_alignment: u32, serving: &Serving) -> Result<()> {
    let unfit = |message: &str| Err(Error::new(Kind::Unsupported, message).file(child.file.path()));
    let parameters = &serving.opened.parameters;
    if memory_alignment > parameters.memory_alignment_bytes {
        return unfit("its file system wants data better aligned than the device was told to");
    }
    if serving.session.is_some() && child.session.is_none() {
        return unfit("there is no room for its session, and the device could not be recovered any more");
    }
    Ok(())
}

/// A child of what is served, which it does not name yet.
fn new_child(serving: &Serving) -> Result<NewImage> {
    let parent = serving.file.path();
    if serving.opened.parents.len() + 2 > MAX_DEPTH {
        let message = format!("the chain would have more than {MAX_DEPTH} layers");
        return Err(Error::new(Kind::Unsupported, message).file(parent).remedy("merge some of them"));
    }
    let parameters = &serving.opened.parameters;
    Ok(NewImage {
        virtual_size: parameters.size_bytes,
        fixed: false,
        block_size: DEFAULT_BLOCK_SIZE,
        log_length: DEFAULT_LOG_LENGTH,
        logical_sector_size: parameters.logical_sector_bytes,
        physical_sector_size: parameters.physical_sector_bytes,
        initial_state: InitialState::NotPresent,
        parent: None,
    })
}
