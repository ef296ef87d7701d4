//! Taking a snapshot of a device that is served: its image becomes the parent of a new one, which is served
//! from then on. The frozen image is the device at one moment, with everything acknowledged before.
//!
//! Order, each step durable before the next:
//!
//! 1. the session of the image is open, so that its DataWriteGuid no longer changes, and dirty metadata is
//!    committed: the pause is short then;
//! 2. the child is made, with that DataWriteGuid, and its session; by another thread, as its file system may
//!    hang;
//! 3. the fronts are held: new requests wait;
//! 4. the image is committed, its log emptied, its session at rest: it is complete for every reader;
//! 5. the device's entry names the child: a successor of this process serves the child from now on, and the
//!    image before;
//! 6. the fronts continue with the child; the image's unused tail is cut off and its session removed;
//!    what is read of the frozen image's map is in private memory then, and takes no room in `/run`.
//!
//! A failure before 5 removes the child, and the device continues as before. A child that a kill or a power
//! cut leaves behind is empty: it reads as the image does, until a session of the image begins; then it is
//! refused, as its parent has changed. It may be removed, as nothing serves it; until then `add` takes the
//! image for its parent.

mod location;
mod maker;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;

pub(super) use maker::Makers;

use super::exchange::Exchange;
use super::order::{NewLeaf, Snapped, SnapshotOrder, Switch};
use super::reply::Reply;
use super::served_image::{ServedImage, open_served};
use super::writable::WritableOpener;
use crate::chain::MAX_DEPTH;
use crate::chain::ReadLayer;
use crate::error::{Error, Kind, Locate, Result};
use crate::image::{DEFAULT_BLOCK_SIZE, DEFAULT_LOG_LENGTH, InitialState, NewImage};
use maker::{Child, ChildRequest};

/// Takes snapshots on the engine's thread.
pub(super) struct Snapshotter<'a> {
    pub(super) exchange: &'a Exchange<'a>,
    pub(super) opener: &'a WritableOpener,
    pub(super) makers: &'a Makers,
    /// Set when the device is taken down.
    pub(super) closing: &'a AtomicBool,
}

impl Snapshotter<'_> {
    /// Takes the snapshot and answers; `served` is what is served afterwards.
    pub(super) fn handle(&self, order: SnapshotOrder, served: &mut ServedImage) {
        let SnapshotOrder { image, device, switch, reply } = order;
        match self.make_child(image, device, served) {
            Ok((child, verdict)) => {
                let outcome = self.serve_child(child, served);
                let outcome = outcome.and_then(|child| self.descend(child, (switch, &reply), served));
                verdict.give(outcome, reply);
            }
            Err(error) => reply.send(Err(error)),
        }
    }

    /// See [`Order::Settle`](super::order::Order::Settle).
    pub(super) fn settle(&self, hold: bool, settled: &SyncSender<Result<()>>, served: &ServedImage) {
        let Exchange { reactor, inbox, fronts, .. } = self.exchange;
        let flush = || {
            let flushed = reactor.block_on(served.engine.flush());
            served.check("committing dirty metadata", flushed)
        };
        let mut outcome = flush();
        let holds = hold && outcome.is_ok();
        if holds {
            inbox.hold(reactor, fronts);
            // What was acknowledged meanwhile.
            outcome = flush();
        }
        let is_settled = outcome.is_ok();
        if (settled.send(outcome).is_err() || !is_settled) && holds {
            fronts.release();
        }
    }

    fn make_child(
        &self,
        path: PathBuf,
        device: u32,
        served: &ServedImage,
    ) -> Result<(Child, maker::Verdict)> {
        let image = new_child(served)?;
        self.prepare(served)?;
        let request = ChildRequest {
            path,
            device,
            parent: served.file.clone(),
            data_write_guid: served.engine.data_write_guid(),
            disk_id: served.opened.disk_id,
            image,
        };
        let hurry = async {
            while !self.closing.load(Ordering::Acquire) {
                self.exchange.inbox.called().await;
            }
        };
        self.makers.make(self.exchange.reactor, request, hurry)
    }

    /// Fixes the image's DataWriteGuid, and leaves little to be committed.
    fn prepare(&self, served: &ServedImage) -> Result<()> {
        let outcome = self.exchange.reactor.block_on(async {
            served.engine.open_session().await?;
            served.engine.flush().await
        });
        served.check("committing dirty metadata", outcome)
    }

    /// The child with an engine of its own, on top of what is served.
    fn serve_child(&self, child: Child, served: &ServedImage) -> Result<ServedImage> {
        let Child { file, mut image, memory_alignment, place } = child;
        let Exchange { reactor, fronts, .. } = self.exchange;
        let disk = reactor.disk(file.clone());
        let session = reactor.block_on(self.opener.begin(&disk, &place, &mut image));
        let session = session.file(file.path())?;
        let parents: Vec<Arc<_>> =
            std::iter::once(&served.file).chain(served.opened.parents.iter()).cloned().collect();
        let layers = parents.iter().zip(served.engine.shared().layers());
        let layers =
            layers.map(|(file, map)| ReadLayer { disk: reactor.disk(file.clone()), map: map.clone() });
        let parents = (layers.collect(), parents.into());
        let parameters = served.opened.parameters;
        let child = open_served(reactor, fronts, file, image, session, parents, parameters)?;
        match check_fit(&child, memory_alignment, served) {
            Ok(()) => Ok(child),
            Err(error) => {
                self.give_up(child);
                Err(error)
            }
        }
    }

    /// Has the fronts continue with the child, or with what they had if that fails.
    fn descend(
        &self,
        child: ServedImage,
        switch: (Switch, &Reply<Snapped>),
        served: &mut ServedImage,
    ) -> Result<Snapped> {
        let exchanged = self.exchange.run(served, |served| match self.switch(switch, served, &child) {
            Ok(()) => Ok(child),
            Err(error) => Err(Box::new((error, child))),
        });
        let (parent, pause_us) = exchanged.map_err(|failed| {
            let (error, child) = *failed;
            self.give_up(child);
            error
        })?;
        let layers = |image: &ServedImage| image.engine.shared().layers().count();
        assert_eq!(layers(served), layers(&parent) + 1, "the child lies on what was served");
        let snapped =
            Snapped { image: served.file.path().into(), parent: parent.file.path().into(), pause_us };
        self.retire(parent);
        tracing::info!(
            "{} is served now, {} is its parent",
            snapped.image.display(),
            snapped.parent.display()
        );
        Ok(snapped)
    }

    /// The decisive moment: the image is complete, and the device's entry names the child.
    fn switch(
        &self,
        (switch, reply): (Switch, &Reply<Snapped>),
        served: &ServedImage,
        child: &ServedImage,
    ) -> Result<()> {
        let frozen = self.exchange.reactor.block_on(served.engine.rest());
        served.check("freezing the image", frozen)?;
        if !reply.claim() {
            let image = child.file.path().display();
            tracing::warn!("the snapshot {image} is not taken: its caller has stopped waiting");
            return Err(Error::new(Kind::Io, "the caller has stopped waiting"));
        }
        switch(NewLeaf {
            image: child.file.path().into(),
            image_file: child.image_file(),
            parents: child.opened.parents.iter().map(|parent| parent.path().into()).collect(),
            parent_files: child.opened.parent_files(),
            file_write_guid: child.opened.file_write_guid,
        })
    }

    fn give_up(&self, child: ServedImage) {
        if let Err(error) = child.give_up(self.exchange.reactor) {
            tracing::warn!("{error:#}");
        }
    }

    /// Lets others read the frozen image, which no process writes from now on.
    fn retire(&self, parent: ServedImage) {
        if let Err(errno) = self.exchange.reactor.block_on(parent.engine.retire()) {
            tracing::warn!("{} keeps its unused tail: errno {errno}", parent.file.path().display());
        }
        parent.file.share();
        let Some(session) = parent.session else { return };
        if let Err(error) = session.retire(parent.engine.shared().map.memory()) {
            tracing::warn!("{error:#}");
        }
    }
}

/// Whether the device can continue with `child` as promised.
fn check_fit(child: &ServedImage, memory_alignment: u32, served: &ServedImage) -> Result<()> {
    let unfit = |message: &str| Err(Error::new(Kind::Unsupported, message).file(child.file.path()));
    let parameters = &served.opened.parameters;
    if memory_alignment > parameters.memory_alignment_bytes {
        return unfit("its file system needs a larger memory alignment than the device was started with");
    }
    if served.session.is_some() && child.session.is_none() {
        return unfit("no room for the new session file in /run: the device would no longer be recoverable");
    }
    Ok(())
}

/// A child of what is served, which does not name its parent yet.
fn new_child(served: &ServedImage) -> Result<NewImage> {
    let parent = served.file.path();
    if served.opened.parents.len() + 2 > MAX_DEPTH {
        let message = format!("the chain would have more than {MAX_DEPTH} layers");
        return Err(Error::new(Kind::Unsupported, message).file(parent).remedy("merge some of them"));
    }
    let parameters = &served.opened.parameters;
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
