//! A device's life: made, started, served, taken down.
//!
//! Order of the way up: device → entry → engine → queues → parameters → start → node. Order of the way down:
//! queues settled → stop (while they serve: file systems are written back) → queues drained → engine closed
//! (the image is clean now) → queues over → device deleted → entry removed.
//!
//! A third way is a handover: requests wait in the kernel, those that are served are completed, and the
//! process ends as if it had been killed. See [`upgrade`](crate::device::upgrade).
//!
//! Invariants:
//!
//! * a failure on the way up takes the same way down, wherever it happened;
//! * the image is closed only when no request can be under way. If the kernel does not stop the device, or a
//!   queue has failed, the process ends without closing: the image is left as after a crash, and the next
//!   opening repairs it;
//! * signals that request something are blocked in every thread and taken by one, so that no call is
//!   interrupted.

mod calls;
mod leaving;
mod reclaimer;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::device::confine::{self, Role};
use crate::device::control::{self, Control, DeviceInfo, NewDevice};
use crate::device::ending::{Ending, Happening, INSISTENCE, Step};
use crate::device::features;
use crate::device::handover;
use crate::device::job::Jobs;
use crate::device::launch;
use crate::device::leaf_handover::LeafHandover;
use crate::device::leftovers;
use crate::device::links::{self, Names};
use crate::device::log_file;
use crate::device::mailbox::{EngineEnds, FrontEnds, mailboxes};
use crate::device::node::{Node, await_node};
use crate::device::number;
use crate::device::options::{OnFull, Options, Recovery, ZeroCopy};
use crate::device::private_mounts;
use crate::device::queue::{BufferIndex, QueueSetup, RingSetup, Transfer};
use crate::device::reclaim::Reclaim;
use crate::device::registry::{self, ENTRY_FORMAT, Entry, MergeUnderWay, ProcessId, Registry, Reserved};
use crate::device::service_manager::ServiceManager;
use crate::device::socket::{self, Report, Status};
use crate::device::spec::{DeviceSpec, EngineHandle, Ready};
use crate::device::stats::Sources;
use crate::device::supervisor::{Demand, Supervisor};
use crate::device::sys;
use crate::device::usage;
use crate::device::warnings;
use crate::disk::Access;
use crate::engine::front::Front;
use crate::engine::shared::{Session, Shared};
use crate::error::{Error, Kind, Result};
use crate::machine;
use crate::printable::shell;
use crate::simulation::{Plant, planted};
use reclaimer::Reclaimer;

/// How long a service manager that stops the daemon is asked to wait for the next check of its users.
const CHECK_PATIENCE: Duration = Duration::from_secs(5);

/// The same for closing the image: what is dirty is written and synced, on whatever storage.
const CLOSING_PATIENCE: Duration = Duration::from_secs(60);

/// Serves an image as a block device until a termination signal comes or another process stops the device.
///
/// Call it before any thread has been started. `start_engine` gets the engine's ends of the mailboxes;
/// `ready` is called once, when the device can be used.
///
/// # Errors
///
/// Whatever prevented the device from coming up, or the image from being closed cleanly. The process must end
/// then: there may be threads that nothing else ends.
pub fn serve<E: EngineHandle>(
    spec: &DeviceSpec,
    options: &Options,
    start_engine: impl FnOnce(EngineEnds) -> Result<E>,
    ready: impl FnOnce(&Ready) -> Result<()>,
) -> Result<()> {
    options.validate()?;
    prepare_process();
    if options.private_mounts {
        keep_mounts_of(spec);
    }
    let supervisor = Supervisor::new()?;
    let registry = Registry::open()?;
    let mut device = Device::add(registry, supervisor, spec, options)?;
    let outcome = device.bring_up(spec, start_engine, Beginning::Made).and_then(|()| ready(&device.ready()));
    let outcome = outcome.and_then(|()| device.run());
    device.finish(outcome)
}

/// Continues to serve the device of `entry`, whose daemon was killed, until it ends as by [`serve`]. Its new
/// entry is written in `room`, as far as there is some.
///
/// Call it before any thread has been started, with the image opened as the device's session says.
///
/// # Errors
///
/// Whatever prevented it; the device waits for the next attempt as soon as the process has ended. Once it is
/// served again: what kept the image from being closed cleanly.
pub fn recover<E: EngineHandle>(
    spec: &DeviceSpec,
    (entry, room): (&Entry, Reserved),
    start_engine: impl FnOnce(EngineEnds) -> Result<E>,
    ready: impl FnOnce(&Ready) -> Result<()>,
) -> Result<()> {
    prepare_process();
    let supervisor = Supervisor::new()?;
    let registry = Registry::open()?;
    supervisor.note_requests(registry.request(entry.id, entry.mark));
    let mut device = Device::take_over(registry, supervisor, spec, (entry, room))?;
    device.bring_up(spec, start_engine, Beginning::TakenOver)?;
    // Not before requests flow: it may be the last unmount of a file system on the device itself, which is
    // written then.
    if entry.private_mounts {
        keep_mounts_of(spec);
    }
    device.announce_to_manager(std::process::id());
    ready(&device.ready())?;
    device.say_what_is_continued();
    if device.registry.request(entry.id, entry.mark).is_noted() {
        device.supervisor.continue_to_end();
    }
    let outcome = device.run();
    device.finish(outcome)
}

/// A failure here costs safety when memory runs out, and the device is served.
fn prepare_process() {
    if let Err(error) = sys::keep_in_memory() {
        tracing::warn!("the daemon may be swapped out: {error}");
    }
}

/// In a mount namespace of its own, keeps what leads to the images.
fn keep_mounts_of(spec: &DeviceSpec) {
    let parents = spec.parents.iter().map(PathBuf::as_path);
    private_mounts::keep_only(&std::iter::once(spec.path.as_path()).chain(parents).collect::<Vec<_>>());
}

/// How this process got the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beginning {
    Made,
    TakenOver,
}

/// Why a daemon no longer serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The device is to be taken down, or was stopped.
    Down,
    /// Another process serves it from now on: everything is left as if this one had been killed.
    HandedOver,
}

struct Device<E> {
    control: Control,
    info: DeviceInfo,
    transfer: Transfer,
    registry: Registry,
    /// A snapshot changes it, on the engine's thread.
    entry: Arc<Mutex<Entry>>,
    cdev: Option<Arc<File>>,
    engine: Option<E>,
    supervisor: Supervisor,
    /// What it has done.
    sources: Sources,
    manager: Option<ServiceManager>,
    /// Room for its entry, until it serves.
    room: Reserved,
    /// The kernel may look for partitions when it starts.
    may_scan: bool,
    /// The device is being handed over.
    leaving: Arc<AtomicBool>,
    /// How many requests to make the disk larger have no outcome yet.
    growing: usize,
    /// What is done on the image beside serving it.
    jobs: Jobs,
    reclaimer: Reclaimer,
    /// What the queues served first.
    first: Weak<Shared>,
}

impl<E: EngineHandle> Device<E> {
    /// Makes the device and its entry, after everything else that may fail.
    fn add(registry: Registry, supervisor: Supervisor, spec: &DeviceSpec, options: &Options) -> Result<Self> {
        let control = Control::open()?;
        let recovery = match features::recovery(control.features(), options.recovery)? {
            recovery if spec.recoverable => recovery,
            _ => Recovery::None,
        };
        let new = NewDevice {
            id: options.id,
            queues: options.queues,
            depth: options.depth,
            request_bytes: options.request_bytes,
            flags: features::wanted(recovery)
                | features::handover(control.features(), recovery)
                | features::resizing(control.features())
                | features::no_partitions(control.features(), options.no_partitions)?
                | features::transfer(control.features(), options.zero_copy)?,
            mark: control::new_mark(),
        };
        let daemon = ProcessId::this()?;
        leftovers::tidy(&registry, &control);
        // Until its entry is written, the device looks like one without a daemon.
        let locked = registry.lock()?;
        if let Some(name) = &options.name {
            locked.refuse_name_in_use(name)?;
        }
        let info = number::add(&control, &registry, &new, spec.image_file)?;
        let (name, for_mount, private) = (options.name.clone(), options.for_mount, options.private);
        let Options { private_mounts, no_partitions, reclaim, on_full, .. } = *options;
        let described = Entry { recovery, reclaim, on_full, ..describe(&info, spec, daemon) };
        let entry = Entry { name, for_mount, private, private_mounts, no_partitions, ..described };
        let written = registry.forget_request(entry.id);
        let written = written.and_then(|()| locked.mark_untrusted(entry.id, options.untrusted));
        let written = written.and_then(|()| locked.write(&entry));
        drop(locked);
        let granted = check_granted(&new, &info);
        let mut device = Self::of((control, info), (registry, supervisor), spec, entry);
        if options.zero_copy == ZeroCopy::Fallback {
            device.transfer = transfer(&device.info, BufferIndex::Impossible);
        }
        device.may_scan = !options.no_partitions;
        match granted.and(written) {
            Ok(()) => Ok(device),
            Err(error) => Err(device.take_down(Err(error)).expect_err("it failed")),
        }
    }

    /// Makes this process the next server of a device whose daemon was killed.
    fn take_over(
        registry: Registry,
        supervisor: Supervisor,
        spec: &DeviceSpec,
        (entry, mut room): (&Entry, Reserved),
    ) -> Result<Self> {
        handover::note("the image is open");
        let control = Control::open()?;
        let found = control.info(entry.id)?.filter(|info| info.mark == entry.mark);
        let info =
            found.ok_or_else(|| Error::new(Kind::NotFound, format!("{} is gone", entry.device.display())))?;
        let waiting = || tracing::warn!("{}", still_held(entry).message());
        control.start_recovery(entry.id, waiting).map_err(|error| match error.os_error() {
            Some(libc::EBUSY) => still_held(entry),
            _ => error,
        })?;
        let (daemon, version) = (ProcessId::this()?, env!("CARGO_PKG_VERSION").into());
        handover::note("the kernel has released the device");
        registry.name_daemon(entry, daemon, &mut room)?;
        let notify_socket = ServiceManager::socket().or_else(|| entry.notify_socket.clone());
        let mount_namespace = registry::mount_namespace();
        let renewed =
            Entry { format: ENTRY_FORMAT, daemon, version, notify_socket, mount_namespace, ..entry.clone() };
        // The disk may have grown when its daemon was killed.
        let entry = Entry { started: false, size_bytes: spec.parameters.size_bytes, ..renewed };
        Ok(Self { room, ..Self::of((control, info), (registry, supervisor), spec, entry) })
    }

    /// The device of `entry`, which the kernel has, and which is not served yet.
    fn of(
        (control, info): (Control, DeviceInfo),
        (registry, supervisor): (Registry, Supervisor),
        spec: &DeviceSpec,
        entry: Entry,
    ) -> Self {
        supervisor.note_requests(registry.request(info.id, info.mark));
        let reclaimer = Reclaimer::new(entry.reclaim, Instant::now());
        Self {
            transfer: transfer(&info, BufferIndex::Tag),
            sources: Sources::new(info.queues, spec.sync_times.clone()),
            manager: manager_of(&entry),
            entry: Arc::new(Mutex::new(entry)),
            control,
            info,
            registry,
            cdev: None,
            engine: None,
            supervisor,
            room: Reserved::default(),
            may_scan: true,
            leaving: Arc::default(),
            growing: 0,
            jobs: Jobs::default(),
            reclaimer,
            first: spec.shared.clone(),
        }
    }

    fn bring_up(
        &mut self,
        spec: &DeviceSpec,
        start_engine: impl FnOnce(EngineEnds) -> Result<E>,
        beginning: Beginning,
    ) -> Result<()> {
        assert!(self.engine.is_none() && self.cdev.is_none(), "a device comes up once");
        let path = format!("/dev/ublkc{}", self.info.id);
        let cdev = Arc::new(await_node(Path::new(&path), Node::Character)?);
        self.cdev = Some(cdev.clone());
        handover::note("the entry is written");
        if spec.leaf.access() == Access::ReadWrite {
            spec.leaf.open_for_queues(self.info.queues.into())?;
        }
        let (engine, fronts) = mailboxes(self.info.queues, self.info.depth)?;
        self.engine = Some(start_engine(engine)?);
        for (queue, ends) in (0..).zip(fronts) {
            self.start_queue(queue, ends, spec, &cdev)?;
        }
        self.supervisor.await_ready(launch::takes_over())?;
        handover::note("the queues are ready");
        match beginning {
            Beginning::Made => {
                let in_place = self.transfer != Transfer::Copied;
                let parameters = spec.parameters.to_kernel(self.info.request_bytes, in_place);
                self.control.set_params(self.info.id, parameters)?;
                self.control.start(self.info.id)?;
            }
            Beginning::TakenOver => self.control.end_recovery(self.info.id)?,
        }
        handover::note("requests flow");
        await_node(&self.path(), Node::Block)?;
        if beginning == Beginning::TakenOver && !planted(Plant::SkipCatchUp) {
            self.catch_up_with(spec.parameters.size_bytes);
        }
        let handover = self.engine.as_ref().expect("started above").handover();
        let (first, sources) = (spec.shared.clone(), self.sources.clone());
        let (leaving, jobs) = (self.leaving.clone(), self.jobs.clone());
        let report = move || {
            let shared = served_now(&handover, &first);
            let (leaving, job) = (leaving.load(Ordering::Acquire), jobs.progress());
            let short_of_room = sources.shortage();
            let status = Status { job, leaving, short_of_room, ..status_of(&shared) };
            Report { status, stats: sources.stats(&shared) }
        };
        socket::listen(&self.registry.socket_path(self.info.id), report, self.supervisor.caller())?;
        let disk_sequence = self.publish_names(spec, beginning);
        let mut room = std::mem::take(&mut self.room);
        change_entry(&self.registry, &self.entry, &mut room, |entry| {
            entry.disk_sequence = disk_sequence.or(entry.disk_sequence);
            entry.started = true;
        })
    }

    fn publish_names(&self, spec: &DeviceSpec, beginning: Beginning) -> Option<u64> {
        let Entry { name, private, .. } = self.entry.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if machine::folder().is_some() {
            return None;
        }
        links::remove_stale(self.info.id, name.as_ref());
        if private {
            return None;
        }
        let is_scanned = beginning == Beginning::Made && self.may_scan;
        let names = Names { id: self.info.id, disk_id: spec.disk_id, name: name.as_ref(), is_scanned };
        links::publish(self.registry.directory(), &names)
    }

    fn path(&self) -> PathBuf {
        device_path(self.info.id)
    }

    /// Handles demands until the device is to end.
    fn run(&mut self) -> Result<End> {
        confine::become_(Role::Device);
        confine::seal();
        let mut ending = Ending::default();
        loop {
            let due = ending.due().into_iter().chain(self.reclaimer.due()).min();
            let happening = match self.supervisor.next_demand(due)? {
                Demand::Call(call) => {
                    if self.answer(call) {
                        return Ok(End::HandedOver);
                    }
                    continue;
                }
                Demand::Stopped => {
                    tracing::info!("ending: another process has stopped the device");
                    return Ok(End::Down);
                }
                Demand::Happening(Happening::Time) if ending.due().is_none_or(|due| due > Instant::now()) => {
                    self.reclaim();
                    continue;
                }
                Demand::Happening(happening) => happening,
            };
            match ending.on(happening, Instant::now()) {
                Step::Nothing => {}
                Step::FindUsers => {
                    if ending.wants_time(self.sources.requests(), Instant::now()) {
                        self.ask_for_time(CHECK_PATIENCE);
                    }
                    self.supervisor.find_users(self.info.id);
                }
                Step::Stay(users) => self.warn_of_users(&users),
                Step::Reopen => log_file::reopen(),
                Step::EndIfUnused => match self.stop_if_unused() {
                    None => break,
                    Some(user) => self.supervisor.have_found(vec![user]),
                },
                Step::End => break,
            }
        }
        tracing::info!("ending on request");
        Ok(End::Down)
    }

    /// Has the kernel stop the device, if it can refuse that while the device is open: a user that has opened
    /// it after the check would get I/O errors. Returns what has kept it from that.
    fn stop_if_unused(&self) -> Option<String> {
        if planted(Plant::EndUsed) || !self.control.has_safe_stop() {
            return None;
        }
        match self.control.stop_if_unused(self.info.id) {
            Ok(true) => None,
            Ok(false) => Some(usage::UNNAMED.into()),
            // It may be open.
            Err(error) => Some(format!("the kernel has not stopped it: {error}")),
        }
    }

    /// Has the service manager wait, if one stops this daemon.
    fn ask_for_time(&self, time: Duration) {
        if let Some(manager) = &self.manager
            && let Err(error) = manager.ask_for_time(time)
        {
            tracing::warn!("the service manager may not wait: {error}");
        }
    }

    fn warn_of_users(&self, users: &[String]) {
        let (device, users, seconds) = (self.path(), users.join(", "), INSISTENCE.as_secs());
        let device = device.display();
        tracing::warn!(
            "asked to end while {device} is in use: {users}; the device stays until it is no longer in use \
             (to end it now, with I/O errors for its users: `vhdx-ublk del --force {device}`, or two \
             signals within {seconds} s)"
        );
    }

    fn engine(&self) -> &E {
        self.engine.as_ref().expect("a device that is up has an engine")
    }

    fn say_what_is_continued(&self) {
        let path = self.path();
        let path = path.display();
        if launch::takes_over() {
            tracing::info!("this one continues to serve {path} for the daemon before it");
        } else {
            tracing::warn!("the daemon before this one was killed; this one continues to serve {path}");
        }
        let merging = self.entry.lock().unwrap_or_else(PoisonError::into_inner).merging.clone();
        if let Some(MergeUnderWay { layer, target, .. }) = merging {
            tracing::warn!(
                "the merge of {} into {} was interrupted, and {path} reads as before: `vhdx-ublk merge {}` \
                 continues it",
                layer.display(),
                target.display(),
                shell(&layer)
            );
        }
    }

    /// Changes the device's entry.
    fn record(&self, change: impl FnOnce(&mut Entry)) -> Result<()> {
        change_entry(&self.registry, &self.entry, &mut Reserved::default(), change)
    }

    fn start_queue(
        &mut self,
        queue: u16,
        ends: FrontEnds,
        spec: &DeviceSpec,
        cdev: &Arc<File>,
    ) -> Result<()> {
        let setup = QueueSetup {
            device: self.info.id,
            ring: RingSetup {
                device: self.info.id,
                queue,
                depth: self.info.depth,
                request_bytes: self.info.request_bytes,
                spare: spec.spare.take(),
                ioctl_numbers: self.info.has_ioctl_numbers(),
                transfer: self.transfer,
                character_device: cdev.clone(),
                images: spec.images.clone(),
                leaf: spec.leaf.clone(),
                handover: self.engine.as_ref().expect("started before the queues").handover(),
                sender: ends.sender,
                wake: ends.wake,
                counts: self.sources.queues[usize::from(queue)].clone(),
            },
            front: self.front(spec.shared.upgrade().expect("its engine has it")),
            receiver: ends.receiver,
            cpus: self.control.queue_cpus(self.info.id, queue)?,
            may_scan: self.may_scan,
        };
        self.supervisor.start(setup)
    }

    fn front(&self, shared: Arc<Shared>) -> Front {
        let front = Front::new(shared, self.info.depth);
        match self.entry.lock().unwrap_or_else(PoisonError::into_inner).on_full {
            OnFull::Fail => front,
            OnFull::Wait => front.waiting_for_room(),
        }
    }

    /// The way down, unless there is none: the device stays for the next process.
    fn finish(self, outcome: Result<End>) -> Result<()> {
        match outcome {
            Ok(End::HandedOver) => {
                self.supervisor.note_last_requests();
                launch::hand_over();
                Ok(())
            }
            outcome => self.take_down(outcome.map(drop)),
        }
    }

    /// The whole way down. Returns the first failure, including that of `outcome`.
    fn take_down(mut self, outcome: Result<()>) -> Result<()> {
        self.ask_for_time(CLOSING_PATIENCE);
        if let Err(error) = self.stop() {
            return Err(outcome.err().unwrap_or(error));
        }
        machine::turn("closes the image");
        let closed = match self.engine.take() {
            Some(engine) => engine.close(),
            None => Ok(()),
        };
        self.supervisor.finish();
        drop(self.cdev.take());
        if planted(Plant::EntryFirst) {
            let _ = self.registry.remove(self.info.id, self.info.mark);
        }
        if !planted(Plant::NoteToTheEnd) {
            self.supervisor.note_no_requests();
        }
        let deleted = self.delete();
        let recorded = self.leave(&closed, &deleted);
        outcome.and(closed).and(deleted).and(recorded)
    }

    /// Stops the device and waits until no request is left.
    fn stop(&mut self) -> Result<()> {
        self.supervisor.settle()?;
        self.end_waits();
        self.control.stop(self.info.id)?;
        self.supervisor.drain()
    }

    fn delete(&self) -> Result<()> {
        if !self.control.delete(self.info.id, self.info.mark)? {
            tracing::info!("{} is still open; its number is not free yet", self.path().display());
        }
        Ok(())
    }

    /// Removes the entry, unless a failure is still to be reported or the device to be deleted.
    fn leave(&self, closed: &Result<()>, deleted: &Result<()>) -> Result<()> {
        if let Err(error) = closed {
            tracing::error!("the image could not be closed cleanly: {error:#}");
            return self.record(|entry| entry.failure = Some(format!("{error:#}")));
        }
        if deleted.is_err() {
            return Ok(());
        }
        self.registry.remove(self.info.id, self.info.mark)
    }

    fn ready(&self) -> Ready {
        let log = self.registry.log_path(self.info.id);
        let image = self.entry.lock().unwrap_or_else(PoisonError::into_inner).image.clone();
        Ready { id: self.info.id, device: self.path(), image, log, pause_us: None }
    }
}

/// The service manager that watches the daemon of a device, if one does.
fn manager_of(entry: &Entry) -> Option<ServiceManager> {
    let socket = entry.notify_socket.as_deref()?;
    let connected = ServiceManager::connect(socket);
    connected.inspect_err(|error| tracing::warn!("the service manager at {socket}: {error}")).ok()
}

/// The status of a device that serves `shared`.
fn status_of(shared: &Shared) -> Status {
    let troubles = shared.troubles();
    Status {
        poisoned: shared.session() == Session::Poisoned,
        host_full: troubles.is_host_full(),
        last_error: troubles.last(),
        last_warning: warnings::last(),
        job: None,
        leaving: false,
        short_of_room: None,
    }
}

/// Changes an entry, first in the registry.
fn change_entry(
    registry: &Registry,
    entry: &Mutex<Entry>,
    room: &mut Reserved,
    change: impl FnOnce(&mut Entry),
) -> Result<()> {
    let mut entry = entry.lock().unwrap_or_else(PoisonError::into_inner);
    let mut changed = entry.clone();
    change(&mut changed);
    registry.write_in(&changed, room)?;
    *entry = changed;
    Ok(())
}

fn device_path(id: u32) -> PathBuf {
    format!("/dev/ublkb{id}").into()
}

/// How data travels on a device with the features that it was granted.
fn transfer(info: &DeviceInfo, index: BufferIndex) -> Transfer {
    if features::is_in_place(info.flags) { Transfer::InPlace(index) } else { Transfer::Copied }
}

/// What is shared with the fronts by now; `first` before any exchange.
fn served_now(handover: &LeafHandover, first: &Weak<Shared>) -> Arc<Shared> {
    loop {
        // An exchange is known here before anything gives the first one up.
        let latest = handover.latest().map(|leaf| leaf.shared);
        if let Some(shared) = latest.or_else(|| first.upgrade()) {
            return shared;
        }
    }
}

fn describe(info: &DeviceInfo, spec: &DeviceSpec, daemon: ProcessId) -> Entry {
    Entry {
        format: ENTRY_FORMAT,
        id: info.id,
        device: device_path(info.id),
        name: None,
        for_mount: false,
        private: false,
        image: spec.path.clone(),
        image_file: spec.image_file,
        parents: spec.parents.clone(),
        parent_files: spec.parent_files.clone(),
        mount_namespace: registry::mount_namespace(),
        private_mounts: false,
        daemon,
        queues: info.queues,
        depth: info.depth,
        size_bytes: spec.parameters.size_bytes,
        read_only: spec.parameters.read_only,
        salvage: spec.salvage,
        no_partitions: false,
        recovery: Recovery::None,
        reclaim: Reclaim::OFF,
        on_full: OnFull::Fail,
        zero_copy: features::is_in_place(info.flags),
        sparse: spec.sparse,
        file_write_guid: spec.file_write_guid,
        disk_id: spec.disk_id,
        disk_sequence: None,
        mark: info.mark,
        notify_socket: ServiceManager::socket(),
        version: env!("CARGO_PKG_VERSION").into(),
        started: false,
        failure: None,
        merging: None,
    }
}

/// The kernel refuses to hand a device over while anything has its character device open.
fn still_held(entry: &Entry) -> Error {
    let users = usage::of_character_device(entry.id);
    let node = format!("/dev/ublkc{}", entry.id);
    let holder = match &users[..] {
        [] => "something that this process cannot see (a dying process, another namespace)".to_owned(),
        users => format!("it is {}", users.join(", ")),
    };
    let message = format!("{} cannot be taken over while {node} is held: {holder}", entry.device.display());
    Error::new(Kind::InUse, message).remedy(format!("end its use (fuser -v {node}), then recover again"))
}

/// What was granted must be what was requested, except for fewer queues: the driver silently drops what it
/// does not know.
fn check_granted(new: &NewDevice, info: &DeviceInfo) -> Result<()> {
    let missing = new.flags & !info.flags;
    if missing != 0 {
        let message = format!("the driver does not grant the features {missing:#x}");
        return Err(Error::new(Kind::Unsupported, message));
    }
    if info.queues > new.queues || info.depth != new.depth || info.request_bytes != new.request_bytes {
        let shape = |queues: u16, depth: u16, bytes: u32| {
            format!("{queues} queues of depth {depth} with requests of {bytes} bytes")
        };
        let message = format!(
            "the driver grants {}, instead of {}",
            shape(info.queues, info.depth, info.request_bytes),
            shape(new.queues, new.depth, new.request_bytes)
        );
        return Err(Error::new(Kind::Unsupported, message));
    }
    Ok(())
}
