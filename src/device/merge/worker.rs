//! The thread that carries out a merge.

use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use nix::errno::Errno;
use uuid::Uuid;

use crate::chain::{Layer as _, Member};
use crate::device::caller::Caller;
use crate::device::job::Stop;
use crate::device::order::{Dropped, MergeOrder, Merged, Order, RelinkOrder, Switch};
use crate::device::registry::MergeUnderWay;
use crate::disk::{Access, HostFile, ImageFile, Place, Reactor, UringDisk};
use crate::engine::Outcome;
use crate::error::{Error, Kind, Locate, Result};
use crate::format::locator::ParentLocator;
use crate::image::Image;
use crate::operations::merge::{self, Files, Link, LiveMerge, Served};
use crate::printable::shell;
use crate::simulation::{Plant, planted};

/// The layer to be merged.
pub(super) enum Layer {
    /// The device reads it.
    InChain(Arc<ImageFile>),
    /// The chain has lost it in a merge that was cut then: this was its file.
    Dropped(PathBuf, HostFile),
}

impl Layer {
    pub(super) fn path(&self) -> &Path {
        match self {
            Self::InChain(file) => file.path(),
            Self::Dropped(path, _) => path,
        }
    }

    pub(super) fn file(&self) -> HostFile {
        match self {
            Self::InChain(file) => file.identity(),
            Self::Dropped(_, file) => *file,
        }
    }
}

/// The child of the layer, or of the target, if the chain has lost the layer.
pub(super) enum Child {
    Leaf(PathBuf, ParentLocator),
    Layer(Arc<ImageFile>),
}

/// A merge, as the engine's thread has planned it.
pub(super) struct Work {
    pub(super) layer: Layer,
    pub(super) target: Arc<ImageFile>,
    pub(super) below: Vec<Arc<ImageFile>>,
    pub(super) child: Child,
    /// The paths of the whole chain.
    pub(super) chain: Vec<PathBuf>,
    pub(super) caller: Caller,
    pub(super) closing: Arc<AtomicBool>,
}

impl Work {
    /// Merges, and gives the outcome to the order's end.
    pub(super) fn run(self, mut order: MergeOrder) {
        let (switch, must_end) = (Cell::new(order.switch.take()), Cell::new(order.unfinished.is_some()));
        let outcome = self.merge(&order, (&switch, &must_end));
        let layer = self.layer.path();
        let outcome = outcome.map_err(|error| with_remedy(error, layer, &order));
        if (outcome.is_ok() || !must_end.get())
            && let Err(error) = (order.note)(None)
        {
            tracing::warn!("the device's entry still says that a merge is under way: {error:#}");
        }
        match &outcome {
            Ok(merged) => {
                tracing::info!("{} was merged into {}", merged.layer.display(), merged.target.display());
            }
            Err(error) => tracing::warn!("{} is not merged: {error:#}", layer.display()),
        }
        order.end(outcome);
    }

    fn merge(
        &self,
        order: &MergeOrder,
        (switch, must_end): (&Cell<Option<Switch>>, &Cell<bool>),
    ) -> Result<Merged> {
        let reactor = Reactor::new()?;
        let written = self.writers()?;
        let disk_bytes = self.check(&reactor, &written)?;
        if !planted(Plant::ForgetMerge) {
            (order.note)(Some(MergeUnderWay::of(&self.layer, &self.target)))?;
        }
        tracing::info!("merging {} into {}", self.layer.path().display(), self.target.path().display());
        let layer = written.file(self.layer.path());
        let place = layer.as_ref().map(|layer| Place::of_file(layer)).transpose()?;
        let files = WorkFiles { work: self, order, reactor: &reactor, written: &written, place, disk_bytes };
        let device = Device { work: self, reactor: &reactor, written: &written, switch, must_end };
        let merge = self.live_merge();
        let merged = match self.layer {
            Layer::InChain(_) => {
                let merging = merge.run(&files, &device, reactor.executor().clone(), Uuid::new_v4);
                reactor.block_on(merging)
            }
            Layer::Dropped(..) => {
                let is_left = layer.is_some() && reactor.block_on(merge.is_left(&files))?;
                if is_left {
                    self.refuse_relatives(&reactor, &written)?;
                } else if self.layer.path().exists() {
                    tracing::warn!("{} is another image, and stays", self.layer.path().display());
                }
                reactor.block_on(merge.finish(&files, &device, is_left, Uuid::new_v4))
            }
        };
        merged.map(|()| Merged {
            layer: self.layer.path().into(),
            target: self.target.path().into(),
            layers: self.chain.len() - usize::from(matches!(self.layer, Layer::InChain(_))),
        })
    }

    fn live_merge(&self) -> LiveMerge {
        LiveMerge {
            layer: self.layer.path().into(),
            target: self.target.path().into(),
            below: self.below.iter().map(|file| file.path().into()).collect(),
            child: match &self.child {
                Child::Leaf(path, locator) => merge::Child::Leaf(path.clone(), locator.clone()),
                Child::Layer(file) => merge::Child::Layer(file.path().into()),
            },
        }
    }

    /// Another description, for writing, of what is written.
    fn writers(&self) -> Result<Written> {
        let mut written = Written::default();
        let child = match &self.child {
            Child::Layer(child) => Some(child),
            Child::Leaf(..) => None,
        };
        match &self.layer {
            Layer::InChain(layer) => {
                written.open(layer)?;
                written.open(&self.target)?;
            }
            Layer::Dropped(path, file) if HostFile::at(path).is_ok_and(|found| found == *file) => {
                let layer = ImageFile::open(path, Access::ReadWrite, Duration::ZERO)?;
                written.writers.push(Arc::new(layer));
            }
            Layer::Dropped(..) => {}
        }
        child.map_or(Ok(()), |child| written.open(child))?;
        Ok(written)
    }

    /// Refuses what the images forbid, and what would cost another image its parent. Returns the size of the
    /// layer's disk.
    fn check(&self, reactor: &Reactor, written: &Written) -> Result<u64> {
        let Layer::InChain(_) = self.layer else { return Ok(0) };
        self.refuse_relatives(reactor, written)
    }

    fn refuse_relatives(&self, reactor: &Reactor, written: &Written) -> Result<u64> {
        let member = |path: &Path| {
            // A merge that only ends does not write its target.
            let file = written.file(path).unwrap_or_else(|| self.target.clone());
            Member::read(reactor, file)
        };
        let (layer, target) = (member(self.layer.path())?, member(self.target.path())?);
        for image in [&layer, &target] {
            image.image.check_writable().file(image.path())?;
        }
        let mut chain = self.chain.clone();
        chain.push(layer.path().into());
        merge::refuse_relatives_of_served(&layer, &target, &chain)?;
        Ok(layer.image.metadata.virtual_size)
    }
}

/// What a merge writes. Readers that are still in the chain get their locks back before the writers leave.
#[derive(Default)]
struct Written {
    readers: RefCell<Vec<Arc<ImageFile>>>,
    writers: Vec<Arc<ImageFile>>,
}

impl Written {
    fn open(&mut self, reader: &Arc<ImageFile>) -> Result<()> {
        self.writers.push(Arc::new(ImageFile::writer_for(reader)?));
        self.readers.borrow_mut().push(reader.clone());
        Ok(())
    }

    /// `layer` has left the chain. If its file cannot be removed, the same merge again must get its lock.
    fn leaves(&self, layer: HostFile) {
        self.readers.borrow_mut().retain(|reader| reader.identity() != layer);
    }

    fn file(&self, path: &Path) -> Option<Arc<ImageFile>> {
        self.writers.iter().find(|file| file.path() == path).cloned()
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        for reader in self.readers.get_mut() {
            if let Err(error) = reader.lock_again() {
                tracing::warn!("the file is no longer locked: {error:#}");
            }
        }
    }
}

/// The files of the chain, as the merge uses them.
struct WorkFiles<'a> {
    work: &'a Work,
    order: &'a MergeOrder,
    reactor: &'a Reactor,
    written: &'a Written,
    /// Of the layer, if it is there.
    place: Option<Place>,
    /// The size of the layer's disk.
    disk_bytes: u64,
}

impl Files for WorkFiles<'_> {
    type Disk = UringDisk;

    fn disk(&self, path: &Path) -> UringDisk {
        let read = self.work.below.iter().chain([&self.work.target]).find(|file| file.path() == path);
        let file = self.written.file(path).or_else(|| read.cloned()).expect("a file of the chain");
        self.reactor.disk(file)
    }

    async fn remove(&self, path: &Path) -> Result<()> {
        let file = self.written.file(path).expect("a layer is removed");
        self.place.as_ref().expect("it is there").remove(&file)?;
        if let Err(error) = file.give_back_if_nameless() {
            tracing::warn!("{}: the host gets its space when the daemon ends: {error}", path.display());
        }
        Ok(())
    }

    fn copied(&self, bytes: u64) -> Outcome {
        let job = &self.order.running.job;
        job.advance(bytes, self.disk_bytes, self.work.target.length().unwrap_or(0));
        if self.work.closing.load(Ordering::Acquire) {
            job.stop(Stop::End);
        }
        if job.stopped().is_none() { Ok(()) } else { Err(Errno::ECANCELED) }
    }
}

/// The device, as the merge sees it.
struct Device<'a> {
    work: &'a Work,
    reactor: &'a Reactor,
    written: &'a Written,
    /// Taken when the layer is dropped.
    switch: &'a Cell<Option<Switch>>,
    /// Set when no other merge may begin before this one is finished.
    must_end: &'a Cell<bool>,
}

impl Device<'_> {
    fn order(&self, link: Option<Link>, dropped: Option<Dropped>) -> Result<()> {
        let (done, awaited) = mpsc::sync_channel(1);
        self.work.caller.order(Order::Relink(RelinkOrder { link, dropped, done }));
        let stopped = |_| Error::new(Kind::Stopped, "the device is taken down");
        awaited.recv().map_err(stopped)?
    }
}

impl Served for Device<'_> {
    fn has_taken_over(&self) {
        self.must_end.set(true);
    }

    async fn drop_layer(&self, link: Option<Link>) -> Result<()> {
        let target = self.work.target.clone();
        // What it was written through is the host's page cache, where the fronts do not read.
        target.read_anew();
        let disk = self.reactor.disk(target.clone());
        let image = Image::read(&disk).await.file(target.path())?;
        image.read_bitmaps(&disk).await.file(target.path())?;
        let switch = self.switch.take().expect("a layer is dropped once");
        let (layer, target) = (self.work.layer.file(), image.into_map());
        self.order(link, Some(Dropped { layer, target, switch }))?;
        self.written.leaves(layer);
        Ok(())
    }

    async fn relink(&self, link: Link) -> Result<()> {
        self.order(Some(link), None)
    }
}

/// A merge that failed is done again.
fn with_remedy(error: Error, layer: &Path, order: &MergeOrder) -> Error {
    let again = format!("`vhdx-ublk merge {}` continues it", shell(layer));
    let is_stopped = error.os_error() == Some(Errno::ECANCELED as i32) || error.kind() == Kind::Stopped;
    if is_stopped {
        let is_left = order.running.job.stopped() == Some(Stop::Caller);
        let why = if is_left { "its caller has left" } else { "the device is taken down" };
        let message = format!("the merge was stopped: {why}; the chain reads as before");
        return Error::new(Kind::Stopped, message).file(layer).remedy(again);
    }
    if error.remedy_text().is_some() {
        return error;
    }
    match error.kind() {
        Kind::NoSpace => error.remedy(format!("free space on the file system of the target; {again}")),
        Kind::Io => {
            error.remedy(format!("look for the cause (dmesg); the device is served as before; {again}"))
        }
        _ => error,
    }
}
