//! The engine of a writable device, on a thread of its own, with its own ring.
//!
//! Its life: *opened* (the image is ready, nothing has been modified), *started* (the mailboxes are joined),
//! *closed*. Dropped before it was started, it ends without a trace, and a session that it took over stays;
//! dropped afterwards, it goes on until the process ends, and the image is left as after a crash.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use super::confine::{self, Role};
use super::control::Control;
use super::fronts::{FrontInbox, Mailboxes};
use super::layers::{self, Parents};
use super::leaf::NextLeaf;
use super::mailbox::{EngineEnds, wake_up};
use super::maker::Makers;
use super::opened::{self, Opened, WritableImage, WritableOpen};
use super::order::Order;
use super::served::EngineHandle;
use super::serving::{Serving, open_served, unclean};
use super::session::{Plan, SessionFile, Sessions};
use super::snapshot::Place;
use super::sys;
use crate::disk::{ImageFile, Reactor};
use crate::engine::Outcome;
use crate::engine::shared::Session;
use crate::error::{Error, Result};
use nix::sys::eventfd::EventFd;
use nix::sys::signal::SigSet;

/// The engine's thread, as the device sees it.
pub struct EngineThread {
    thread: JoinHandle<Result<()>>,
    opened: Opened,
    ends: mpsc::Sender<EngineEnds>,
    orders: mpsc::Sender<Order>,
    closing: Arc<AtomicBool>,
    called: Arc<AtomicBool>,
    next: NextLeaf,
    /// There once it is started.
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
        Self::open_as(file, WritableOpen { may_write, plan, sessions: Sessions::of_machine(), parents })
    }

    fn open_as(file: Arc<ImageFile>, how: WritableOpen) -> Result<Self> {
        let (ends, start) = mpsc::channel();
        let (report, opened) = mpsc::channel();
        let (orders, ordered) = mpsc::channel();
        let (closing, called) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let next = NextLeaf::default();
        let life = Life {
            file,
            how,
            report,
            start,
            ordered,
            closing: closing.clone(),
            called: called.clone(),
            next: next.clone(),
        };
        let thread = thread::Builder::new().name("vhdx-engine".into()).spawn(|| life.live());
        let thread = thread.map_err(|error| Error::io("starting the engine's thread", error))?;
        if let Ok(opened) = opened.recv() {
            return Ok(Self { thread, opened, ends, orders, closing, called, next, wake: None });
        }
        let outcome = thread.join().expect("a panic ends the process");
        Err(outcome.expect_err("it has not opened the image"))
    }

    /// What the image looks like.
    pub fn opened(&self) -> &Opened {
        &self.opened
    }

    /// Joins the mailboxes: the fronts may ask from now on.
    #[must_use]
    pub fn start(mut self, ends: EngineEnds) -> Self {
        assert!(self.wake.is_none(), "an engine is started once");
        self.wake = Some(ends.wake.clone());
        assert!(self.ends.send(ends).is_ok(), "the thread waits for it");
        self
    }
}

impl EngineThread {
    fn call(&self) {
        self.called.store(true, Ordering::Release);
        if let Some(wake) = &self.wake {
            wake_up(wake);
        }
    }
}

impl EngineHandle for EngineThread {
    fn next_leaf(&self) -> NextLeaf {
        self.next.clone()
    }

    fn snapshot(&self, order: Order) {
        // A thread that has ended answers nobody, and who asked finds the channel closed.
        let _ = self.orders.send(order);
        self.call();
    }

    fn close(self) -> Result<()> {
        self.closing.store(true, Ordering::Release);
        self.call();
        drop(self.ends);
        self.thread.join().expect("a panic ends the process")
    }
}

/// What the thread is given.
struct Life {
    file: Arc<ImageFile>,
    how: WritableOpen,
    report: mpsc::Sender<Opened>,
    start: mpsc::Receiver<EngineEnds>,
    ordered: mpsc::Receiver<Order>,
    /// Set by another thread, as is `called` after it.
    closing: Arc<AtomicBool>,
    /// There is something in `ordered`, or `closing` is set.
    called: Arc<AtomicBool>,
    next: NextLeaf,
}

impl Life {
    fn live(self) -> Result<()> {
        leave_signals_to_others();
        become_urgent();
        confine::become_(Role::Engine); // before the first byte of an image that others made is read
        let reactor = Reactor::new()?;
        let fronts = Rc::new(Mailboxes::default());
        let mut serving = self.open_engine(&reactor, &fronts)?;
        // Nobody can be gone who waits for this; if so, nobody starts the engine either.
        let _ = self.report.send(serving.opened.clone());
        let outcome = match self.start.recv() {
            Ok(ends) => self.serve(&reactor, &mut serving, &fronts, ends),
            Err(mpsc::RecvError) if self.closing.load(Ordering::Acquire) => {
                reactor.block_on(serving.engine.close())
            }
            Err(mpsc::RecvError) => return serving.give_up(&reactor),
        };
        let (engine, path) = (serving.engine, serving.file.path());
        if engine.shared().session() != Session::Idle {
            tracing::info!("{}: closed", path.display());
            tracing::debug!("{}: {:?}", path.display(), engine.counters());
        }
        let poisoned = engine.shared().session() == Session::Poisoned;
        outcome.map_err(|errno| unclean("closing the image", errno, poisoned, path))?;
        serving.session.map_or(Ok(()), SessionFile::remove)
    }

    fn open_engine(&self, reactor: &Reactor, fronts: &Rc<Mailboxes>) -> Result<Serving> {
        let WritableImage { image, session, parents } = self.how.open(reactor, &self.file)?;
        let parameters = opened::parameters(&self.file, &image.metadata, false, &parents)?;
        let parents = layers::for_engine(reactor, parents)?;
        open_served(reactor, fronts, self.file.clone(), image, session, parents, parameters)
    }

    /// Serves the fronts until the device is closed, then closes the image. The fronts are listened to until that
    /// is done: closing empties the quarantine, which waits for their barriers.
    fn serve(
        &self,
        reactor: &Reactor,
        serving: &mut Serving,
        fronts: &Rc<Mailboxes>,
        ends: EngineEnds,
    ) -> Outcome {
        let (senders, receivers) = ends.fronts.into_iter().map(|end| (end.sender, end.receiver)).unzip();
        fronts.join(senders);
        become_io_flusher();
        reactor.spawn(fronts.clone().deliver()).detach();
        let inbox = FrontInbox::new(ends.wake, receivers, serving.engine.clone(), self.called.clone());
        let inbox = Rc::new(inbox);
        let receiving = reactor.spawn(inbox.clone().run(reactor.ring().clone()));
        let makers = Makers::default();
        while !self.closing.load(Ordering::Acquire) {
            let (how, next, closing) = (&self.how, &self.next, &*self.closing);
            let place = Place { reactor, how, inbox: &inbox, fronts, next, makers: &makers, closing };
            while let Ok(order) = self.ordered.try_recv() {
                place.obey(order, serving);
            }
            reactor.block_on(inbox.called());
        }
        let outcome = reactor.block_on(serving.engine.close());
        inbox.close();
        reactor.block_on(receiving);
        makers.await_end();
        outcome
    }
}

/// Signals are for the thread that waits for them.
fn leave_signals_to_others() {
    if let Err(errno) = SigSet::all().thread_block() {
        tracing::warn!("the engine does not leave signals to others: {errno}");
    }
}

/// What fails here costs speed, but serves.
fn become_urgent() {
    if let Err(error) = sys::become_urgent() {
        tracing::warn!("the engine may have to wait for a CPU: {error}");
    }
}

/// What fails here costs safety when memory runs out, but serves. The image is open.
fn become_io_flusher() {
    if let Err(error) = sys::become_io_flusher() {
        tracing::warn!("the engine is not marked as serving a disk: {error}");
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;
    use std::path::PathBuf;
    use std::time::Duration;

    use std::path::Path;

    use uuid::Uuid;

    use super::super::mailbox::{FrontEnds, mailboxes};
    use super::super::registry::FileId;
    use super::super::session::{folder_in_memory, place_of};
    use super::*;
    use crate::chain::Search;
    use crate::disk::{self, Access};
    use crate::engine::message::{Ask, ToEngine, ToFront};
    use crate::error::Kind;
    use crate::format::MIB;
    use crate::format::locator::{
        ABSOLUTE_WIN32_PATH, PARENT_LINKAGE, ParentLocator, RELATIVE_PATH, VOLUME_PATH,
    };
    use crate::image::{Descent, Image, InitialState, Mode, NewImage};

    pub(in crate::device) struct Bench {
        pub(in crate::device) path: PathBuf,
        directory: tempfile::TempDir,
        /// Where sessions are.
        pub(in crate::device) memory: tempfile::TempDir,
    }

    impl Bench {
        /// A fresh dynamic image of 16 blocks of 1 MiB.
        pub(in crate::device) fn new() -> Self {
            Self::with_parent(None)
        }

        fn with_parent(parent: Option<Descent>) -> Self {
            let directory = tempfile::tempdir().expect("a temporary directory");
            let path = directory.path().join("disk.vhdx");
            Self::make(&path, parent);
            Self { path, directory, memory: folder_in_memory() }
        }

        /// Makes an image, of another disk id every time.
        fn make(path: &Path, parent: Option<Descent>) {
            let reactor = Reactor::new().expect("io_uring is there");
            let disk =
                reactor.disk(Arc::new(disk::Place::of(path).and_then(|place| place.create()).expect("free")));
            let image = NewImage {
                virtual_size: 16 * MIB,
                fixed: false,
                block_size: 1 << 20,
                log_length: 1 << 20,
                logical_sector_size: 512,
                physical_sector_size: 4096,
                initial_state: InitialState::NotPresent,
                parent,
            };
            reactor.block_on(image.write(&disk, Uuid::new_v4)).expect("room");
        }

        /// Puts a new image into the image's file, which stays the same one.
        pub(in crate::device) fn replace_content(&self) {
            let other = self.directory.path().join("other.vhdx");
            Self::make(&other, None);
            fs::write(&self.path, fs::read(&other).expect("readable")).expect("room");
        }

        fn file(&self) -> Arc<ImageFile> {
            Arc::new(ImageFile::open(&self.path, Access::ReadWrite, Duration::ZERO).expect("free"))
        }

        fn open(&self) -> Result<EngineThread> {
            self.open_as(Plan::Fresh { keep: false })
        }

        pub(in crate::device) fn open_as(&self, plan: Plan) -> Result<EngineThread> {
            EngineThread::open_as(self.file(), self.how(plan))
        }

        fn how(&self, plan: Plan) -> WritableOpen {
            let parents = Parents { search: Search::default(), open: |path| panic!("{path:?} is no parent") };
            let sessions = Sessions::at(self.memory.path());
            WritableOpen { may_write: || Ok(()), plan, sessions, parents }
        }

        /// The session file, if there is one.
        pub(in crate::device) fn session(&self) -> Option<PathBuf> {
            let entries = fs::read_dir(self.memory.path()).expect("readable");
            let mut paths = entries.map(|entry| entry.expect("readable").path());
            paths.find(|path| path.extension().is_some_and(|extension| extension == "session"))
        }

        /// Opens the image, allocates a block, and closes it again.
        pub(in crate::device) fn modify(&self) {
            let (ends, mut fronts) = mailboxes(1, 4).expect("file descriptors");
            let engine = self.open().expect("a good image").start(ends);
            for (tag, ask) in [(0, Ask::OpenSession), (1, Ask::Allocate { first: 0, count: 1 })] {
                fronts[0].sender.send(ToEngine::Ask { tag, ask });
                fronts[0].sender.flush();
                assert_eq!(answered(receive(&fronts[0])), tag);
            }
            engine.close().expect("committed");
        }

        fn bytes(&self) -> Vec<u8> {
            fs::read(&self.path).expect("readable")
        }
    }

    /// Waits for the next message, as a queue's thread does.
    fn receive(front: &FrontEnds) -> ToFront {
        loop {
            if let Some(message) = front.receiver.pop() {
                return message;
            }
            front.wake.read().expect("it is open");
        }
    }

    /// Opening for writing and not writing leaves the file as it was; the lock is free afterwards.
    #[test]
    fn an_image_nobody_wrote_to_stays_as_it_was() {
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

    /// Every ask of every front is answered, and what was answered is in the image after closing.
    #[test]
    fn asks_are_answered_and_closing_keeps_the_result() {
        let bench = Bench::new();
        let (ends, mut fronts) = mailboxes(2, 4).expect("file descriptors");
        let engine = bench.open().expect("a good image").start(ends);
        let shared = engine.opened().shared.clone();
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

    fn answered(message: ToFront) -> u16 {
        match message {
            ToFront::Reply { tag, result: Ok(()) } => tag,
            other => panic!("{other:?}"),
        }
    }

    /// What forbids writing is asked before the first byte is written, and is not the image's fault.
    #[test]
    fn a_refusal_changes_nothing() {
        let bench = Bench::new();
        let before = bench.bytes();
        let may_write = || Err(Error::new(Kind::NoDriver, "no driver"));
        let how = WritableOpen { may_write, ..bench.how(Plan::Fresh { keep: true }) };
        let refused = EngineThread::open_as(bench.file(), how);
        let error = refused.err().expect("refused");
        assert_eq!((error.kind(), error.file_path()), (Kind::NoDriver, None));
        assert!(bench.bytes() == before);
        drop(bench.file());
    }

    /// A session is there while the image is served, and goes away with a clean close.
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

    /// What a killed daemon left is taken over if it fits the image, and otherwise refused or given up.
    #[test]
    fn a_session_that_does_not_fit_is_not_gone_on_with() {
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

    /// Anybody can make an image with the inode and the disk id of another one on another file system: what does
    /// not fit it may be the session of that one.
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
            assert!(bench.open_as(plan).is_err(), "{plan:?} is not silent about what it cannot save");
            assert!(left.exists(), "{plan:?}");
        }
        let others =
            [Plan::Fresh { keep: true }, Plan::Fresh { keep: false }, Plan::Resume { accept_loss: true }];
        for plan in others {
            bench.open_as(plan).expect("it counts as missing").close().expect("nothing to do");
            assert!(left.exists(), "{plan:?}");
        }
    }

    /// A child that names its parent where it is not, and the parent where it is.
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
        let descent = Descent { locator, disk_id: Uuid::from_u128(1) };
        (Bench::with_parent(Some(descent)), parent)
    }

    fn data_write_guid(path: &Path) -> Uuid {
        opened(path).header.header.data_write_guid
    }

    fn opened(path: &Path) -> Image {
        let file = ImageFile::open(path, Access::ReadOnly, Duration::ZERO).expect("free");
        let reactor = Reactor::new().expect("io_uring is there");
        let disk = reactor.disk(Arc::new(file));
        reactor.block_on(Image::open(&disk, Mode::ReadOnly, Uuid::new_v4)).expect("an image")
    }

    fn reading(path: &Path) -> Result<ImageFile> {
        ImageFile::open(path, Access::ReadOnly, Duration::ZERO)
    }

    /// Where its parent was found, a child that is opened for writing says from then on, once; what it says of
    /// places that nobody here knows stays.
    #[test]
    fn a_path_that_leads_nowhere_is_renewed() {
        let bench = Bench::new();
        let (child, parent) = moved_child(&bench);
        let elsewhere = bench.directory.path().join("elsewhere");
        let map = format!(r"C:\={}", elsewhere.display());
        fs::create_dir(&elsewhere).expect("room");
        let search = Search { parents: vec![parent.clone()], maps: vec![map.parse().expect("a good map")] };
        let open = |search: Search, may_write: fn() -> Result<()>| {
            let parents = Parents { search, open: reading };
            let how = WritableOpen { may_write, parents, ..child.how(Plan::Fresh { keep: true }) };
            EngineThread::open_as(child.file(), how)
        };
        let before = child.bytes();
        let refused = open(search.clone(), || Err(Error::new(Kind::NoDriver, "no driver")));
        assert!(refused.is_err() && child.bytes() == before, "a refusal changes nothing");
        open(search, || Ok(())).expect("a chain").close().expect("nothing to do");
        let after = child.bytes();
        assert!(after != before);
        let locator = opened(&child.path).metadata.parent_locator.expect("a child");
        assert!(locator.get(RELATIVE_PATH).is_some_and(|path| path.ends_with(r"\moved.vhdx")), "{locator:?}");
        assert_eq!(locator.get(VOLUME_PATH), Some(r"\\?\Volume{1}\disk.vhdx"));
        assert_eq!(locator.get(ABSOLUTE_WIN32_PATH), None, "it is mapped, and leads elsewhere");
        let again = open(Search::default(), || Ok(())).expect("it finds its parent");
        let parent_id = FileId::of(&fs::metadata(&parent).expect("there"));
        fs::rename(&parent, parent.with_extension("served")).expect("free");
        fs::write(&parent, "another file").expect("room");
        assert_eq!(again.opened().parent_files().expect("open"), [parent_id], "what was opened");
        again.close().expect("nothing to do");
        assert!(child.bytes() == after, "a path that is right is not written again");
    }

    /// An engine that is dropped before it was started lets go of the image.
    #[test]
    fn a_dropped_engine_ends() {
        let bench = Bench::new();
        drop(bench.open().expect("a good image"));
        ImageFile::open(&bench.path, Access::ReadWrite, Duration::from_secs(10)).expect("free soon");
    }
}
