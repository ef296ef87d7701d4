//! The engine of a writable device, on its own thread, with its own ring.
//!
//! Its life: *opened* (the image is ready, nothing has been modified), *started* (the mailboxes are joined),
//! *closed*. Dropped before it was started, it ends without a trace, and a session that it took over stays;
//! dropped later, it runs until the process ends, and the image is left as after a crash.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use nix::sys::signal::SigSet;

use super::caller::Caller;
use super::compact::Compactor;
use super::confine::{self, Role};
use super::control::Control;
use super::errands::{Errand, Errands};
use super::exchange::Exchange;
use super::fronts::{FrontInbox, Mailboxes};
use super::grow::Grower;
use super::job::Stop;
use super::layers::{self, Parents};
use super::leaf_handover::LeafHandover;
use super::mailbox::{EngineEnds, wake_up};
use super::merge::{Merger, Workers};
use super::open_image::{OpenImage, parameters};
use super::order::{CompactOrder, GrowOrder, MergeOrder, Order, SnapshotOrder};
use super::served_image::{ServedImage, open_served, unclean};
use super::session::{Plan, SessionFile, Sessions};
use super::snapshot::{Makers, Snapshotter};
use super::spec::EngineHandle;
use super::sys;
use super::writable::{WritableChain, WritableOpener};
use crate::disk::{ImageFile, Mail, Reactor};
use crate::engine::Outcome;
use crate::engine::shared::Session;
use crate::error::{Doing, Error, Kind, Result};
use crate::machine;
use crate::simulation::{Plant, planted};

/// The engine's thread, as the device sees it.
pub struct EngineThread {
    thread: JoinHandle<Result<()>>,
    /// Until it is started.
    opened: Option<OpenImage>,
    ends: mpsc::Sender<EngineEnds>,
    orders: mpsc::Sender<Order>,
    closing: Arc<AtomicBool>,
    called: Arc<AtomicBool>,
    handover: LeafHandover,
    /// Set once it is started.
    wake: Option<Arc<EventFd>>,
}

impl EngineThread {
    /// Starts the thread and has it open the image in `file` for writing, which replays a dirty log and takes
    /// over a session as `plan` says.
    ///
    /// # Errors
    ///
    /// Whatever is wrong with the image or its parents; `Kind::Unsupported` if it has no log; those of
    /// [`Control::open`], before anything was written; `Kind::NotFound` or `Kind::Poisoned` if there is no
    /// session to resume.
    pub fn open(file: Arc<ImageFile>, plan: Plan, parents: Parents) -> Result<Self> {
        let may_write = || Control::open().map(drop);
        let (sessions, errands) = (Sessions::of_machine(), Errands::default());
        Self::open_with(file, WritableOpener { may_write, plan, sessions, parents, errands })
    }

    pub(super) fn open_with(file: Arc<ImageFile>, opener: WritableOpener) -> Result<Self> {
        let (ends, start) = mpsc::channel();
        let (report, reported) = mpsc::channel();
        let (orders, ordered) = mpsc::channel();
        let (closing, called) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let handover = LeafHandover::default();
        let reports = report.clone();
        let errands = Errands::by(move |errand| {
            // It is received until the image is open.
            let _ = reports.send(Report::Errand(errand));
        });
        let engine = EngineLoop {
            file,
            opener: WritableOpener { errands, ..opener },
            report,
            start,
            ordered,
            orders: orders.clone(),
            closing: closing.clone(),
            called: called.clone(),
            handover: handover.clone(),
        };
        let thread = thread::Builder::new().name("vhdx-engine".into()).spawn(|| engine.run());
        let thread = thread.doing("starting the engine's thread")?;
        while let Ok(report) = reported.recv() {
            match report {
                Report::Errand(errand) => errand(),
                Report::Opened(image) => {
                    return Ok(Self {
                        thread,
                        opened: Some(image),
                        ends,
                        orders,
                        closing,
                        called,
                        handover,
                        wake: None,
                    });
                }
            }
        }
        let outcome = thread.join().expect("a panic ends the process");
        Err(outcome.expect_err("it has not opened the image"))
    }

    /// The image as it was opened.
    ///
    /// # Panics
    ///
    /// Once it is started: what is served may be another image, or have another size.
    pub fn opened(&self) -> &OpenImage {
        self.opened.as_ref().expect("it was not started")
    }

    /// Joins the mailboxes: the fronts may send from now on.
    #[must_use]
    pub fn start(mut self, ends: EngineEnds) -> Self {
        assert!(self.wake.is_none(), "an engine is started once");
        self.wake = Some(ends.wake.clone());
        self.opened = None;
        assert!(self.ends.send(ends).is_ok(), "the thread waits for it");
        self
    }

    fn order(&self, order: Order) {
        // A thread that has ended drops the order, which its caller notices.
        let _ = self.orders.send(order);
        self.call();
    }

    fn call(&self) {
        self.called.store(true, Ordering::Release);
        if let Some(wake) = &self.wake {
            wake_up(wake);
        }
    }
}

impl EngineHandle for EngineThread {
    fn handover(&self) -> LeafHandover {
        self.handover.clone()
    }

    fn snapshot(&self, order: SnapshotOrder) {
        self.order(Order::Snapshot(order));
    }

    fn grow(&self, order: GrowOrder) {
        self.order(Order::Grow(order));
    }

    fn merge(&self, order: MergeOrder) {
        self.order(Order::Merge(order));
    }

    fn compact(&self, order: CompactOrder) {
        self.order(Order::Compact(order));
    }

    fn settle(&self, hold: bool, patience: Duration) -> Result<()> {
        let (settled, awaited) = mpsc::sync_channel(0);
        self.order(Order::Settle { hold, settled });
        awaited.recv_timeout(patience).unwrap_or_else(|_| {
            let message = format!(
                "the I/O under way on the image has not ended within {} s (a snapshot, or a slow disk)",
                patience.as_secs()
            );
            Err(Error::new(Kind::InUse, message)
                .remedy("run the command again; if that fails too, see dmesg"))
        })
    }

    fn close(self) -> Result<()> {
        self.closing.store(true, Ordering::Release);
        self.call();
        drop(self.ends);
        self.thread.join().expect("a panic ends the process")
    }
}

/// What the engine's thread reports until the image is open.
enum Report {
    Opened(OpenImage),
    /// The other thread is to run this.
    Errand(Errand),
}

/// The thread's own end.
struct EngineLoop {
    file: Arc<ImageFile>,
    opener: WritableOpener,
    report: mpsc::Sender<Report>,
    start: mpsc::Receiver<EngineEnds>,
    ordered: mpsc::Receiver<Order>,
    /// For the threads that merge.
    orders: mpsc::Sender<Order>,
    /// Set by another thread, as is `called` after it.
    closing: Arc<AtomicBool>,
    /// There is something in `ordered`, or `closing` is set.
    called: Arc<AtomicBool>,
    handover: LeafHandover,
}

impl EngineLoop {
    fn run(self) -> Result<()> {
        block_signals();
        become_urgent();
        machine::attend(format_args!("engine"));
        confine::become_(Role::Engine); // before the first byte of a foreign image is read
        let reactor = Reactor::new()?;
        let fronts = Rc::new(Mailboxes::default());
        let mut served = self.open_engine(&reactor, &fronts)?;
        // The other side waits for this. If it has gone, it does not start the engine either.
        let _ = self.report.send(Report::Opened(served.opened.clone()));
        let mut workers = Workers::default();
        let outcome = match self.start.recv() {
            Ok(ends) => self.serve(&reactor, &mut served, (&fronts, &mut workers), ends),
            Err(mpsc::RecvError) if self.closing.load(Ordering::Acquire) => {
                machine::turn("commits what its session holds");
                reactor.block_on(served.engine.close())
            }
            Err(mpsc::RecvError) => return served.give_up(&reactor),
        };
        // What a merge still asks for is dropped, and it ends.
        drop(self.ordered);
        workers.await_end();
        let (engine, path) = (served.engine, served.file.path());
        if engine.shared().session() != Session::Idle {
            tracing::info!("{}: closed", path.display());
            tracing::debug!("{}: {:?}", path.display(), engine.counters());
        }
        let poisoned = engine.shared().session() == Session::Poisoned;
        outcome.map_err(|errno| unclean("closing the image", errno, poisoned, path))?;
        served.session.map_or(Ok(()), SessionFile::remove)
    }

    fn open_engine(&self, reactor: &Reactor, fronts: &Rc<Mailboxes>) -> Result<ServedImage> {
        let WritableChain { image, session, parents } = self.opener.open(reactor, &self.file)?;
        let files = std::iter::once(&self.file).chain(parents.iter().map(|parent| &parent.file));
        let parameters = parameters(files.map(Arc::as_ref), &image.metadata, false)?;
        let parents = layers::for_engine(reactor, parents)?;
        open_served(reactor, fronts, self.file.clone(), image, session, parents, parameters)
    }

    /// Serves the fronts until the device is closed, then closes the image. The inbox runs until that is
    /// done: closing empties the quarantine, which waits for the fronts' barriers.
    fn serve(
        &self,
        reactor: &Reactor,
        served: &mut ServedImage,
        (fronts, workers): (&Rc<Mailboxes>, &mut Workers),
        ends: EngineEnds,
    ) -> Outcome {
        let (senders, receivers) = ends.fronts.into_iter().map(|end| (end.sender, end.receiver)).unzip();
        fronts.join(senders);
        reactor.spawn(fronts.clone().deliver()).detach();
        let caller = Caller::new(self.orders.clone(), self.called.clone(), ends.wake.clone());
        let inbox = FrontInbox::new(ends.wake, receivers, served.engine.clone(), self.called.clone());
        let inbox = Rc::new(inbox);
        let mail: Rc<dyn Mail> = inbox.clone();
        reactor.serve(Rc::downgrade(&mail));
        let receiving = reactor.spawn(inbox.clone().run(reactor.ring().clone()));
        let makers = Makers::default();
        let opener = &self.opener;
        let exchange = Exchange { reactor, opener, inbox: &inbox, fronts, handover: &self.handover };
        let (exchange, closing) = (&exchange, &*self.closing);
        let snapshotter = Snapshotter { exchange, opener, makers: &makers, closing };
        let grower = Grower { exchange, closing };
        let merger = Merger { exchange, caller, closing: self.closing.clone() };
        let compactor = Compactor::new(reactor);
        while !self.closing.load(Ordering::Acquire) {
            while let Ok(order) = self.ordered.try_recv() {
                match order {
                    Order::Snapshot(order) => {
                        compactor.stop(Stop::Snapshot);
                        snapshotter.handle(order, served);
                    }
                    Order::Grow(order) => {
                        compactor.stop(Stop::Resize);
                        grower.handle(order, served);
                    }
                    Order::Compact(order) => compactor.start(order, served),
                    Order::Merge(order) => merger.begin(order, served, workers),
                    Order::Relink(order) => merger.relink(order, served),
                    Order::Settle { hold, settled } => {
                        compactor.stop(Stop::Upgrade);
                        snapshotter.settle(hold, &settled, served);
                    }
                }
            }
            reactor.block_on(inbox.called());
        }
        compactor.stop(Stop::End);
        if planted(Plant::SessionFirst) {
            served.session.take().map(SessionFile::remove);
        }
        machine::turn("commits what is dirty");
        let outcome = reactor.block_on(served.engine.close());
        inbox.close();
        reactor.block_on(receiving);
        makers.await_end();
        outcome
    }
}

/// The thread that waits for signals gets them all.
fn block_signals() {
    if let Err(errno) = SigSet::all().thread_block() {
        tracing::warn!("the engine's thread cannot block signals: {errno}");
    }
}

/// A failure here costs speed, and the device is served.
fn become_urgent() {
    if let Err(error) = sys::become_urgent() {
        tracing::warn!("the engine may have to wait for a CPU: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use uuid::Uuid;

    use super::super::mailbox::mailboxes;
    use super::super::session::place_of;
    use super::super::testing::{Bench, answered, receive};
    use super::*;
    use crate::chain::Search;
    use crate::disk::{Access, HostFile};
    use crate::engine::message::{Ask, ToEngine};
    use crate::format::locator::{
        ABSOLUTE_WIN32_PATH, PARENT_LINKAGE, ParentLocator, RELATIVE_PATH, VOLUME_PATH,
    };
    use crate::image::{Image, ParentRef, ReadImage};

    /// Opening for writing without writing leaves the file as it was, and its lock free.
    #[test]
    fn an_image_that_is_not_written_stays_as_it_was() {
        let bench = Bench::new();
        let before = bench.bytes();
        let (ends, _fronts) = mailboxes(2, 4).expect("file descriptors");
        let engine = bench.open().expect("a good image").start(ends);
        engine.close().expect("nothing to do");
        assert!(bench.bytes() == before);
        bench.open().expect("the lock is free").close().expect("never started");
        assert!(bench.bytes() == before);
        drop(bench.file());
    }

    /// Every request of every front is answered, and the result is in the image after closing.
    #[test]
    fn requests_are_answered_and_closing_keeps_the_result() {
        let bench = Bench::new();
        let (ends, mut fronts) = mailboxes(2, 4).expect("file descriptors");
        let engine = bench.open().expect("a good image");
        let shared = engine.opened().shared.clone();
        let engine = engine.start(ends);
        for (first, front) in (0..).zip(&mut fronts) {
            front.sender.send(ToEngine::Ask { tag: 0, ask: Ask::OpenSession });
            front.sender.flush();
            assert_eq!(answered(receive(front)), 0);
            for tag in 0..4 {
                let block = first * 4 + u64::from(tag);
                front.sender.send(ToEngine::Ask { tag, ask: Ask::Allocate { first: block, count: 1 } });
            }
            front.sender.flush();
        }
        for front in &fronts {
            let mut tags: Vec<u16> = (0..4).map(|_| answered(receive(front))).collect();
            tags.sort_unstable();
            assert_eq!(tags, [0, 1, 2, 3]);
        }
        assert_eq!((0..16).filter(|&block| shared.map.load(block).entry.offset() > 0).count(), 8);
        engine.close().expect("committed");
        let again = bench.open().expect("clean");
        assert_eq!(
            (0..16).filter(|&block| again.opened().shared.map.load(block).entry.offset() > 0).count(),
            8
        );
        again.close().expect("nothing to do");
    }

    /// A wake across CPUs may cost more than what it is for: requests that come together share them.
    #[test]
    fn first_writes_that_come_together_share_their_wakes() {
        const BLOCKS: u16 = 16;
        let bench = Bench::new();
        let (ends, mut fronts) = mailboxes(1, BLOCKS).expect("file descriptors");
        let engine = bench.open().expect("a good image").start(ends);
        let front = &mut fronts[0];
        front.sender.send(ToEngine::Ask { tag: 0, ask: Ask::OpenSession });
        front.sender.flush();
        assert_eq!(answered(receive(front)), 0);
        for tag in 0..BLOCKS {
            front.sender.send(ToEngine::Ask { tag, ask: Ask::Allocate { first: tag.into(), count: 1 } });
        }
        let mut wakes = u64::from(front.sender.flush());
        let mut answers = 0;
        while answers < BLOCKS {
            if front.receiver.pop().map(answered).is_some() {
                answers += 1;
                continue;
            }
            if front.receiver.may_sleep() {
                wakes += front.wake.read().expect("it is open");
            }
            front.receiver.awake();
        }
        assert!(wakes * 5 <= u64::from(BLOCKS), "{wakes} wakes for {BLOCKS} first writes");
        engine.close().expect("committed");
    }

    /// Whether the image may be written is checked before the first byte is written, and the error names no
    /// image.
    #[test]
    fn a_refusal_changes_nothing() {
        let bench = Bench::new();
        let before = bench.bytes();
        let may_write = || Err(Error::new(Kind::NoDriver, "no driver"));
        let opener = WritableOpener { may_write, ..bench.opener(Plan::Fresh { keep: true }) };
        let refused = EngineThread::open_with(bench.file(), opener);
        let error = refused.err().expect("refused");
        assert_eq!((error.kind(), error.file_path()), (Kind::NoDriver, None));
        assert!(bench.bytes() == before);
        drop(bench.file());
    }

    /// A session exists while the image is served, and a clean close removes it.
    #[test]
    fn a_session_lasts_as_long_as_the_image_is_served() {
        let bench = Bench::new();
        let engine = bench.open_as(Plan::Fresh { keep: true }).expect("a good image");
        assert!(engine.opened().recoverable && bench.session().is_some());
        engine.close().expect("nothing to do");
        assert_eq!(bench.session(), None);
        let engine = bench.open_as(Plan::Fresh { keep: false }).expect("a good image");
        assert!(!engine.opened().recoverable && bench.session().is_none());
        engine.close().expect("nothing to do");
    }

    /// The session of a killed daemon is taken over if it fits the image, and otherwise refused or given up.
    #[test]
    fn a_session_that_does_not_fit_is_not_taken_over() {
        let bench = Bench::new();
        let resume = |accept_loss| bench.open_as(Plan::Resume { accept_loss });
        let missing = resume(false).err().expect("there is no session");
        assert_eq!(missing.kind(), Kind::NotFound);
        let engine = resume(true).expect("loss is accepted");
        let left = bench.session().expect("a new one was made");
        let bytes = fs::read(&left).expect("readable");
        engine.close().expect("nothing to do");

        fs::write(&left, &bytes).expect("as a killed daemon leaves it");
        resume(false).expect("it fits").close().expect("nothing to do");
        assert_eq!(bench.session(), None);

        bench.modify();
        fs::write(&left, &bytes).expect("as a killed daemon left it before");
        let changed = resume(false).err().expect("the image was written since");
        assert!(changed.to_string().contains("another program has written"), "{changed}");
        assert!(bench.session().is_some(), "a refusal changes nothing");
        bench.open_as(Plan::Fresh { keep: false }).expect("given up").close().expect("nothing to do");
        assert_eq!(bench.session(), None);

        let engine = resume(true).expect("loss is accepted");
        engine.opened().shared.poison();
        let poisoned = fs::read(bench.session().expect("made")).expect("readable");
        assert!(engine.close().is_err(), "a poisoned image is not closed");
        fs::write(&left, &poisoned).expect("as a killed daemon leaves it");
        assert_eq!(resume(false).err().expect("it was poisoned").kind(), Kind::Poisoned);
    }

    /// An image on another file system may have the same inode and disk id, by chance or by design: a session
    /// that does not fit may belong to that one.
    #[test]
    fn a_session_of_another_device_number_is_taken_over_or_left_alone() {
        let bench = Bench::new();
        let engine = bench.open_as(Plan::Fresh { keep: true }).expect("a good image");
        let made = bench.session().expect("made");
        let bytes = fs::read(&made).expect("readable");
        engine.close().expect("nothing to do");
        let (start, _) = made.to_str().expect("hexadecimal").rsplit_once('-').expect("a device number");
        let left = PathBuf::from(format!("{start}-fffffff.session"));

        fs::write(&left, &bytes).expect("as a killed daemon leaves it under another mount");
        let place = place_of(&bench.file()).expect("a file");
        let found = Sessions::at(bench.memory.path()).find(&place, None).expect("readable");
        assert!(found.is_some(), "found also where the image is not read");
        drop(found);
        let resumed = bench.open_as(Plan::Resume { accept_loss: false }).expect("it fits");
        resumed.close().expect("nothing to do");
        assert_eq!(bench.session(), None);

        bench.modify();
        fs::write(&left, &bytes).expect("room");
        for plan in [Plan::Resume { accept_loss: false }, Plan::Close] {
            assert!(bench.open_as(plan).is_err(), "{plan:?} reports what it cannot save");
            assert!(left.exists(), "{plan:?}");
        }
        let others =
            [Plan::Fresh { keep: true }, Plan::Fresh { keep: false }, Plan::Resume { accept_loss: true }];
        for plan in others {
            bench.open_as(plan).expect("it counts as missing").close().expect("nothing to do");
            assert!(left.exists(), "{plan:?}");
        }
    }

    /// A child that names a wrong path for its parent, and the path where the parent is.
    fn moved_child(bench: &Bench) -> (Bench, PathBuf) {
        let parent = bench.directory.path().canonicalize().expect("there").join("moved.vhdx");
        fs::copy(&bench.path, &parent).expect("room");
        let locator = ParentLocator {
            entries: vec![
                (PARENT_LINKAGE.into(), data_write_guid(&parent).braced().to_string()),
                (RELATIVE_PATH.into(), r".\nowhere\disk.vhdx".into()),
                (VOLUME_PATH.into(), r"\\?\Volume{1}\disk.vhdx".into()),
                (ABSOLUTE_WIN32_PATH.into(), r"C:\disk.vhdx".into()),
            ],
        };
        let descent = ParentRef { locator, disk_id: Uuid::from_u128(1) };
        (Bench::with_parent(Some(descent)), parent)
    }

    fn data_write_guid(path: &Path) -> Uuid {
        opened(path).header.header.data_write_guid
    }

    fn opened(path: &Path) -> ReadImage {
        let file = ImageFile::open(path, Access::ReadOnly, Duration::ZERO).expect("free");
        let reactor = Reactor::new().expect("io_uring is there");
        let disk = reactor.disk(Arc::new(file));
        reactor.block_on(Image::read(&disk)).expect("an image")
    }

    /// What the program does here asks the driver too, for which the engine's thread has no privilege.
    fn reading(path: &Path) -> Result<ImageFile> {
        assert_ne!(thread::current().name(), Some("vhdx-engine"), "another thread opens parents");
        ImageFile::open(path, Access::ReadOnly, Duration::ZERO)
    }

    /// A child that is opened for writing names the path where its parent was found, and is written once for
    /// it; paths that mean nothing on this host stay.
    #[test]
    fn a_wrong_path_is_replaced() {
        let bench = Bench::new();
        let (child, parent) = moved_child(&bench);
        let elsewhere = bench.directory.path().join("elsewhere");
        let map = format!(r"C:\={}", elsewhere.display());
        fs::create_dir(&elsewhere).expect("room");
        let maps = vec![map.parse().expect("a good map")];
        let search = Search { parents: vec![parent.clone()], maps, ..Search::default() };
        let open = |search: Search, may_write: fn() -> Result<()>| {
            let parents = Parents { search, open: reading };
            let opener = WritableOpener { may_write, parents, ..child.opener(Plan::Fresh { keep: true }) };
            EngineThread::open_with(child.file(), opener)
        };
        let before = child.bytes();
        let refused = open(search.clone(), || Err(Error::new(Kind::NoDriver, "no driver")));
        assert!(refused.is_err() && child.bytes() == before, "a refusal changes nothing");
        open(search, || Ok(())).expect("a chain").close().expect("nothing to do");
        let after = child.bytes();
        assert!(after != before);
        let locator = opened(&child.path).metadata.parent_locator.clone().expect("a child");
        assert!(locator.get(RELATIVE_PATH).is_some_and(|path| path.ends_with(r"\moved.vhdx")), "{locator:?}");
        assert_eq!(locator.get(VOLUME_PATH), Some(r"\\?\Volume{1}\disk.vhdx"));
        assert_eq!(locator.get(ABSOLUTE_WIN32_PATH), None, "it is mapped, and leads elsewhere");
        let again = open(Search::default(), || Ok(())).expect("it finds its parent");
        let parent_id = HostFile::at(&parent).expect("there");
        fs::rename(&parent, parent.with_extension("served")).expect("free");
        fs::write(&parent, "another file").expect("room");
        assert_eq!(again.opened().parent_files(), [parent_id], "what was opened");
        again.close().expect("nothing to do");
        assert!(child.bytes() == after, "a right path is not written again");
    }

    /// An engine that is dropped before it was started unlocks the image.
    #[test]
    fn a_dropped_engine_ends() {
        let bench = Bench::new();
        drop(bench.open().expect("a good image"));
        ImageFile::open(&bench.path, Access::ReadWrite, Duration::from_secs(10)).expect("free soon");
    }
}
