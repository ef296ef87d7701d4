//! Taking a snapshot of a device that is served: its image becomes the parent of a new one, which is served from
//! then on. The frozen image is what the device held at one moment, everything acknowledged before included.
//!
//! Order, each step durable before the next:
//!
//! 1. the child has a name, the session of the image is open, so that its DataWriteGuid changes no more, and what is
//!    dirty is committed: the pause is short then;
//! 2. the child is made, with that DataWriteGuid, and its session;
//! 3. the fronts are held: requests that come wait;
//! 4. the image is committed, its log emptied, its session at rest: whole for everybody;
//! 5. the device's entry names the child: a successor of this process serves that, and before it the image;
//! 6. the fronts go on with the child; the image's tail is cut off and its session removed.
//!
//! A failure before 5 removes the child, and the device goes on as before. A child that a kill or a power cut leaves
//! behind has nothing of its own: it reads as the image does, until a session of that begins: then it is refused, as its
//! parent has changed. It may be removed, as nothing serves it; until then `add` takes the image for its parent.

use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::engine_thread::{Ear, Mailboxes, Serving, open_served, unclean};
use super::leaf::{Leaf, NextLeaf};
use super::opened::WritableOpen;
use super::path;
use super::registry::FileId;
use crate::chain::{self, MAX_DEPTH};
use crate::disk::{ImageFile, Place as FilePlace, Reactor, Unfinished};
use crate::engine::Outcome;
use crate::engine::Parent;
use crate::engine::shared::Session;
use crate::error::{Error, Kind, Result};
use crate::image::{DEFAULT_BLOCK_SIZE, DEFAULT_LOG_LENGTH, Image, InitialState, Mode, NewImage};

/// What was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapped {
    /// The image that is served now.
    #[serde(with = "path::one")]
    pub image: PathBuf,
    /// Its parent, which was served before and does not change any more.
    #[serde(with = "path::one")]
    pub parent: PathBuf,
    /// How long requests had to wait, microseconds.
    pub pause_us: u64,
}

/// What is served from now on, for the device's entry.
pub struct NewLeaf {
    /// Its path, absolute, without symbolic links.
    pub image: PathBuf,
    /// The same, whatever it is called.
    pub image_file: FileId,
    /// Its parents' paths; its own first.
    pub parents: Vec<PathBuf>,
    /// Its FileWriteGuid.
    pub file_write_guid: Uuid,
}

/// Makes the device's entry name the new leaf.
pub type Switch = Box<dyn FnOnce(NewLeaf) -> Result<()> + Send>;

/// A snapshot that shall be taken.
pub struct Order {
    /// Where the child shall be.
    pub(super) image: PathBuf,
    pub(super) switch: Switch,
    pub(super) answer: mpsc::Sender<Result<Snapped>>,
    /// Set once: by who asked, when it has given up, or by the switch.
    pub(super) decided: Arc<AtomicBool>,
}

/// What a snapshot needs of the engine's thread.
pub(super) struct Place<'a> {
    pub(super) reactor: &'a Reactor,
    pub(super) how: &'a WritableOpen,
    pub(super) ear: &'a Rc<Ear>,
    pub(super) fronts: &'a Rc<Mailboxes>,
    pub(super) next: &'a NextLeaf,
}

impl Place<'_> {
    /// Takes the snapshot; `serving` is what is served afterwards.
    pub(super) fn obey(&self, order: Order, serving: &mut Serving) {
        let outcome = self.take(&order.image, (order.switch, &order.decided), serving);
        // Who asked may have lost patience.
        let _ = order.answer.send(outcome);
    }

    fn take(&self, path: &Path, switch: (Switch, &AtomicBool), serving: &mut Serving) -> Result<Snapped> {
        refuse_moved(&serving.file)?;
        let unfinished = Unfinished::default();
        let file = unfinished.create(FilePlace::of(path)?)?;
        self.prepare(serving)?;
        let child = self.make_child(file, serving)?;
        unfinished.settle()?;
        let started = Instant::now();
        self.ear.hold(self.reactor, self.fronts);
        let switched = self.switch(switch, serving, &child);
        if switched.is_ok() {
            let shared = child.engine.shared().clone();
            self.next.set(Leaf { shared, file: child.file.clone() });
            *self.ear.engine.borrow_mut() = child.engine.clone();
        }
        self.fronts.release();
        let pause_us = u64::try_from(started.elapsed().as_micros()).expect("years are below 2^64");
        if let Err(error) = switched {
            self.give_up(child);
            return Err(error);
        }
        unfinished.keep();
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

    fn make_child(&self, file: Arc<ImageFile>, serving: &Serving) -> Result<Serving> {
        let (reactor, disk, named) =
            (self.reactor, self.reactor.disk(file.clone()), |error: Error| error.file(file.path()));
        reactor.block_on(new_child(serving, file.path())?.write(&disk, Uuid::new_v4)).map_err(named)?;
        file.resemble(&serving.file, 0o777)?;
        let image = reactor.block_on(Image::open(&disk, Mode::Writable, Uuid::new_v4)).map_err(named)?;
        let id = FileId::of_image(&file)?;
        let (image, session) = reactor.block_on(self.how.start(&disk, id, image)).map_err(named)?;
        let parents: Vec<Arc<ImageFile>> =
            std::iter::once(&serving.file).chain(serving.opened.parents.iter()).cloned().collect();
        let layers = parents.iter().zip(serving.engine.shared().layers());
        let layers = layers.map(|(file, map)| Parent { disk: reactor.disk(file.clone()), map: map.clone() });
        let parents = (layers.collect(), parents.into());
        let parameters = serving.opened.parameters;
        let child = open_served(reactor, self.fronts, file, image, session, parents, parameters)?;
        match fits(&child, serving) {
            Ok(()) => Ok(child),
            Err(error) => {
                self.give_up(child);
                Err(error)
            }
        }
    }

    fn give_up(&self, child: Serving) {
        if let Err(error) = child.give_up(self.reactor) {
            tracing::warn!("{error}");
        }
    }

    /// The moment: the image is whole, and the device's entry names the child.
    fn switch(
        &self,
        (switch, decided): (Switch, &AtomicBool),
        serving: &Serving,
        child: &Serving,
    ) -> Result<()> {
        let frozen = self.reactor.block_on(serving.engine.freeze());
        explain("freezing the image", frozen, serving)?;
        serving.engine.shared().map.memory().rest();
        if decided.swap(true, Ordering::AcqRel) {
            return Err(Error::new(Kind::Io, "it took so long that nobody waited for it any more"));
        }
        switch(NewLeaf {
            image: child.file.path().into(),
            image_file: FileId::of_image(&child.file)?,
            parents: child.opened.parents.iter().map(|parent| parent.path().into()).collect(),
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
            tracing::warn!("{error}");
        }
    }
}

fn explain(doing: &str, outcome: Outcome, serving: &Serving) -> Result<()> {
    let poisoned = serving.engine.shared().session() == Session::Poisoned;
    outcome.map_err(|errno| unclean(doing, errno, poisoned, serving.file.path()))
}

/// The child will look for its parent under the name that it has now.
fn refuse_moved(file: &ImageFile) -> Result<()> {
    let named = fs::metadata(file.path()).ok().map(|found| FileId::of(&found));
    if named == Some(FileId::of_image(file)?) {
        return Ok(());
    }
    let message = "the image that is served is not at its place any more, and a child would not find it";
    Err(Error::new(Kind::NotFound, message).file(file.path()).remedy("move it back to its place"))
}

/// Whether the device can go on with `child` as it was promised.
fn fits(child: &Serving, serving: &Serving) -> Result<()> {
    let unfit = |message: &str| Err(Error::new(Kind::Unsupported, message).file(child.file.path()));
    let parameters = &serving.opened.parameters;
    if child.file.memory_alignment(parameters.logical_sector_bytes)? > parameters.memory_alignment_bytes {
        return unfit("its file system wants data better aligned than the device was told to");
    }
    if serving.session.is_some() && child.session.is_none() {
        return unfit("there is no room for its session, and the device could not be recovered any more");
    }
    Ok(())
}

/// A child of what is served, to be at `path`.
fn new_child(serving: &Serving, path: &Path) -> Result<NewImage> {
    let parent = serving.file.path();
    if serving.opened.parents.len() + 2 > MAX_DEPTH {
        let message = format!("the chain would have more than {MAX_DEPTH} layers");
        return Err(Error::new(Kind::Unsupported, message).file(parent).remedy("merge some of them"));
    }
    let parameters = &serving.opened.parameters;
    let folder = path.parent().expect("a file has a folder");
    let guid = serving.engine.data_write_guid();
    Ok(NewImage {
        virtual_size: parameters.size_bytes,
        fixed: false,
        block_size: DEFAULT_BLOCK_SIZE,
        log_length: DEFAULT_LOG_LENGTH,
        logical_sector_size: parameters.logical_sector_bytes,
        physical_sector_size: parameters.physical_sector_bytes,
        initial_state: InitialState::NotPresent,
        parent: Some(chain::descent_of(parent, guid, serving.disk_id, folder)?),
    })
}
