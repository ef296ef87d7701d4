//! What callers request of a device that is served.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::reclaimer::Sight;
use super::{Device, change_entry, served_now};
use crate::device::image_name;
use crate::device::job::{Job, JobKind, Running};
use crate::device::order::{
    Call, CompactOrder, GrowOrder, Grown, MergeOrder, Merged, NewLeaf, Shortened, Sizes, Snapped,
    SnapshotOrder, Switch,
};
use crate::device::registry::{Registry, Reserved};
use crate::device::reply::Reply;
use crate::device::spec::EngineHandle;
use crate::device::sysfs::disk_size;
use crate::disk::HostFile;
use crate::engine::shared::Session;
use crate::error::{Error, Kind, Result};
use crate::printable::shell;
use crate::simulation::{Plant, planted};

impl<E: EngineHandle> Device<E> {
    /// Does what a caller requests, or has it done. Whether the device is handed over then.
    pub(super) fn answer(&mut self, call: Call) -> bool {
        let call = match call {
            Call::Compact { .. } | Call::Merge { .. } => match self.reclaimer.defer(call) {
                Some(call) => call,
                None => return false,
            },
            call => call,
        };
        match call {
            Call::Compact { max_rate, job, reply } => self.compact(max_rate, job, reply),
            Call::Reclaimed(outcome) => self.has_reclaimed(&outcome),
            Call::Snapshot { reply, .. } if self.jobs.is_merging() => reply.send(Err(self.is_merging())),
            Call::Snapshot { image, reply } => self.snapshot(image, reply),
            Call::Grow { sizes, reply } => self.grow(sizes, reply),
            Call::HasGrown { outcome, reply } => {
                self.growing -= 1;
                reply.send(outcome.and_then(|grown| self.tell_size(grown)));
            }
            Call::Merge { layer, job, reply } => self.merge(layer, job, reply),
            Call::EndWaits { reply } => reply.send(Ok(self.end_waits())),
            Call::HandOver { reply, .. } if self.growing > 0 => reply.send(Err(self.is_growing())),
            Call::HandOver { reply, .. } if self.jobs.is_merging() => reply.send(Err(self.is_merging())),
            Call::HandOver { image_file, successor, reply } => {
                return self.hand_over(image_file, successor, reply);
            }
        }
        false
    }

    /// Before the device is stopped: requests that wait for room fail, now and from now on. How many there
    /// are.
    pub(super) fn end_waits(&self) -> u64 {
        let requests = self.sources.shortage().map_or(0, |shortage| shortage.requests);
        if requests > 0 {
            tracing::warn!("the device ends, and requests that wait for room on the host fail: {requests}");
        }
        self.supervisor.end_waits();
        requests
    }

    fn snapshot(&self, image: PathBuf, reply: Reply<Snapped>) {
        let switch = self.switch();
        self.engine().snapshot(SnapshotOrder { image, device: self.info.id, switch, reply });
    }

    /// Makes the entry name another chain.
    fn switch(&self) -> Switch {
        let entry = self.entry.clone();
        Box::new(move |leaf: NewLeaf| {
            let image = leaf.image.clone();
            if planted(Plant::ForgetSwitch) {
                return Ok(());
            }
            change_entry(&Registry::open()?, &entry, &mut Reserved::default(), |entry| {
                entry.image = leaf.image;
                entry.image_file = leaf.image_file;
                entry.parent_files = leaf.parent_files;
                entry.parents = leaf.parents;
                entry.file_write_guid = leaf.file_write_guid;
            })?;
            image_name::set(&image);
            Ok(())
        })
    }

    /// Has the engine's thread merge a layer; the outcome is a call.
    fn merge(&self, layer: HostFile, job: Arc<Job>, reply: Reply<Merged>) {
        let running = match self.jobs.begin(job) {
            Ok(running) => running,
            Err(error) => return reply.send(Err(error)),
        };
        let entry = self.entry.clone();
        let unfinished = entry.lock().unwrap_or_else(PoisonError::into_inner).merging.clone();
        let note = Box::new(move |merging| {
            let mut room = Reserved::default();
            change_entry(&Registry::open()?, &entry, &mut room, |entry| entry.merging = merging)
        });
        let switch = Some(self.switch());
        let device = self.info.id;
        self.engine().merge(MergeOrder { device, layer, unfinished, switch, note, running, reply });
    }

    /// Why a device does something else only when the merge has ended.
    pub(super) fn is_merging(&self) -> Error {
        let message = format!("a layer of the chain of {} is being merged", self.path().display());
        Error::new(Kind::InUse, message)
            .remedy("run the command again when that has ended; Ctrl-C ends `vhdx-ublk merge` early")
    }

    /// Has the engine make the disk larger; the outcome is a call.
    fn grow(&mut self, sizes: Sizes, reply: Reply<Grown>) {
        if !self.control.can_update_size() {
            return reply.send(Err(self.keeps_its_size(sizes)));
        }
        self.growing += 1;
        let call = self.supervisor.caller();
        let ended = Box::new(move |outcome, reply| call(Call::HasGrown { outcome, reply }));
        self.engine().grow(GrowOrder { device: self.info.id, sizes, reply, ended });
    }

    /// Why a device is not handed over whose disk is growing.
    pub(super) fn is_growing(&self) -> Error {
        let message = format!("the disk of {} is being made larger", self.path().display());
        Error::new(Kind::InUse, message).remedy("run the command again when that has ended")
    }

    fn keeps_its_size(&self, sizes: Sizes) -> Error {
        let (device, image) = (self.path(), self.ready().image);
        let (device, image, size) = (device.display(), shell(&image), sizes.to_bytes);
        let message = format!("this kernel cannot change the size of {device} (Linux 6.16 or newer can)");
        Error::new(Kind::Unsupported, message).remedy(format!(
            "remove the device first: `vhdx-ublk del {device}`, then `vhdx-ublk resize {image} --size {size}`"
        ))
    }

    /// The disk is larger, durably, and the queues serve all of it: now its users may know. The entry is
    /// first: if the kernel refuses, the same size again comes here again. This daemon stops the device only
    /// when it handles no more calls.
    fn tell_size(&self, grown: Grown) -> Result<Grown> {
        let size_bytes = grown.size_bytes;
        let told = self
            .record(|entry| entry.size_bytes = size_bytes)
            .and_then(|()| self.control.update_size(self.info.id, size_bytes));
        told.map(|()| grown).map_err(|error| {
            let message = format!("the image is larger, and {} is not: {error}", self.path().display());
            Error::new(error.kind(), message).remedy(self.told_again_by(size_bytes))
        })
    }

    /// The command that gives the kernel the size again. A relative size would make the disk larger again.
    fn told_again_by(&self, size_bytes: u64) -> String {
        format!("run `vhdx-ublk resize {} --size {size_bytes}`", self.path().display())
    }

    /// Gives the kernel the size of a disk that has grown when its daemon was killed. A failure is a warning.
    pub(super) fn catch_up_with(&self, size_bytes: u64) {
        if disk_size(self.info.id).is_none_or(|known| known < size_bytes) && self.control.can_update_size() {
            match self.control.update_size(self.info.id, size_bytes) {
                Ok(()) => tracing::info!("{} has {size_bytes} bytes now", self.path().display()),
                Err(error) => {
                    let remedy = self.told_again_by(size_bytes);
                    tracing::warn!("the kernel does not know the disk's new size: {error:#}; {remedy}");
                }
            }
        }
    }

    fn compact(&self, max_rate: Option<u64>, job: Arc<Job>, reply: Reply<Shortened>) {
        match self.jobs.begin(job) {
            Ok(running) => {
                let ended = Box::new(move |outcome| reply.send(outcome));
                self.engine().compact(self.compact_order(max_rate, false, running, ended));
            }
            Err(error) => reply.send(Err(error)),
        }
    }

    fn compact_order(
        &self,
        max_rate: Option<u64>,
        while_idle: bool,
        running: Running,
        ended: Box<dyn FnOnce(Result<Shortened>) + Send>,
    ) -> CompactOrder {
        let sources = self.sources.clone();
        let requests = Box::new(move || sources.requests());
        CompactOrder { device: self.info.id, max_rate, requests, while_idle, running, ended }
    }

    /// Compacts the image if the device is idle, and is to do that.
    pub(super) fn reclaim(&mut self) {
        let shared = served_now(&self.engine().handover(), &self.first);
        let sight = Sight {
            requests: self.sources.requests(),
            unmapped: shared.activity().counters().unmapped,
            is_written: shared.session() == Session::Open,
        };
        let job = Job::new(JobKind::Compact);
        if !self.reclaimer.looks(Instant::now(), &sight) {
            return;
        }
        // A job of a caller comes first, and this one with the next look.
        if let Ok(running) = self.jobs.begin(job.clone()) {
            self.reclaimer.began(job, &sight);
            let call = self.supervisor.caller();
            let ended = Box::new(move |outcome| call(Call::Reclaimed(outcome)));
            self.engine().compact(self.compact_order(None, true, running, ended));
        }
    }

    fn has_reclaimed(&mut self, outcome: &Result<Shortened>) {
        let call = self.supervisor.caller();
        self.reclaimer.ended(outcome, Instant::now()).into_iter().for_each(call);
    }
}
