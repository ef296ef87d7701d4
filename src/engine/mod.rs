//! The live writer, and the front that serves one queue.
//!
//! [`Engine`] is the cold path and the only writer of metadata: async functions on one thread, each of which
//! reads as one straight sequence. [`front::Front`] is the hot path. It changes the block map in one way: it
//! gives a block space that the engine has set aside (`pool`).
//!
//! What must be durable before what:
//!
//! 0. whatever a killed process wrote, before a header is (`open_session`);
//! 1. new FileWriteGuid and DataWriteGuid in both headers, before any other modification (`open_session`);
//! 2. an initial empty log entry, before a header names its LogGuid (`begin_log`);
//! 3. recycled space zeroed and synced, space filled from the parents synced, the data of partially present
//!    blocks synced whose bits an entry has, and the length of a file that has grown, before that entry is
//!    written (`commit`); a chunk's sector bitmap named by a durable entry before a block relies on it
//!    (`partial`);
//! 4. a page's log entry synced, before the page is written in place (`commit`);
//! 5. an unmapping durable and every front past it, before the space is granted again (`quarantine`);
//! 6. everything logged synced in place, before the log starts again (`begin_log`);
//! 7. everything in place synced, before the headers drop the LogGuid, and that durable before the file is
//!    shortened (`close`);
//! 8. a disk that grows is larger in the file, before a front has the longer map (`grow`);
//! 9. every front past the mark of a block that moves, before the block is copied (`relocate`);
//! 10. no log that knows a longer file, before the file is shortened (`cut`).
//!
//! Allocation itself syncs nothing: visible means committable, always. A mapping is published once its space
//! reads as zero, and its page is marked dirty in the same step; where a front publishes it, before any write
//! to it is acknowledged.
//!
//! The crash behind each line is described in [`ordering`](crate::design::ordering).

mod activity;
mod allocate;
mod apply;
mod close;
mod commit;
mod copy;
mod cut;
mod dirty;
mod drain;
mod durability;
mod fences;
mod fill;
pub mod front;
mod grow;
mod headers;
mod journal;
mod log;
mod marks;
pub mod message;
mod partial;
mod pool;
pub mod port;
pub mod port_counts;
mod probes;
mod quarantine;
mod queue;
mod reclaim;
mod refill;
pub mod relocate;
mod round;
mod session;
pub mod shared;
mod span;
mod sync;
mod troubles;
mod unlogged;
mod unmap;
pub mod waiting;

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use nix::errno::Errno;
use uuid::Uuid;

use crate::chain::ReadLayer;
use crate::disk::{Buffer, Disk, PAGE_BYTES};
use crate::error::Result;
use crate::format::header::OFFSETS;
use crate::format::metadata::DiskType;
use crate::image::{FoundLog, Headers, Layout, Space, WritableImage};
use crate::simulation::{Plant, planted};
pub use activity::{Activity, Counters, Levels};
use dirty::DirtySet;
use durability::Durability;
use fences::Fences;
use journal::Journal;
use message::{Ask, ToEngine, ToFront};
use queue::CommitQueue;
use reclaim::Reclaim;
pub use refill::WithoutPool;
use shared::{Session, Shared};
use waiting::{BlockLocks, Spawn, Turnstile};

/// What the requester of an operation gets.
pub type Outcome<T = ()> = std::result::Result<T, Errno>;

/// Where the engine's messages to the fronts go.
pub trait Fronts {
    /// Puts `message` into the queue of `front`; there is always room.
    fn send(&self, front: usize, message: ToFront);

    /// How many fronts there are.
    fn count(&self) -> usize;
}

/// Where GUIDs come from: randomness is an argument, so that a run can be repeated.
pub type GuidSource = Box<dyn FnMut() -> Uuid>;

/// The engine of one writable image. All of it lives on one thread.
pub struct Engine<D: Disk> {
    disk: D,
    /// Its parents' files, its own first.
    parents: Vec<D>,
    shared: Arc<Shared>,
    layout: Layout,
    /// The file may have unused space although nothing was modified since it was opened: a log was replayed,
    /// or the disk has grown.
    recovered: bool,
    tasks: Rc<dyn Spawn>,
    fronts: Rc<dyn Fronts>,
    guids: RefCell<GuidSource>,
    headers: RefCell<Headers>,
    /// The GUIDs of a session that is being opened: of both headers, and of the content.
    opening: Cell<Option<(Uuid, Uuid)>>,
    space: RefCell<Space>,
    durability: Durability,
    dirty: DirtySet,
    reclaim: Reclaim,
    commits: CommitQueue,
    journal: Journal,
    fences: Fences,
    turns: Turns,
    open_tasks: Cell<usize>,
    /// How many want the pool to stay empty.
    pool_holds: Rc<Cell<usize>>,
}

/// Work of which one at a time is done, in the order of arrival.
#[derive(Default)]
struct Turns {
    headers: Turnstile,
    session: Turnstile,
    growth: Turnstile,
    bitmaps: Turnstile,
    blocks: BlockLocks,
}

/// What an engine is made of.
pub struct Setup<D> {
    /// The image, opened for writing, its sector bitmaps read.
    pub image: WritableImage,
    /// Its file.
    pub disk: D,
    /// Its parents, its own first.
    pub parents: Vec<ReadLayer<D>>,
    /// What runs the engine's tasks.
    pub tasks: Rc<dyn Spawn>,
    /// The way to the fronts.
    pub fronts: Rc<dyn Fronts>,
    /// The source of every new GUID.
    pub guids: GuidSource,
}

impl<D: Disk + 'static> Engine<D> {
    /// An engine over an opened image. It writes nothing before the first modification.
    ///
    /// # Errors
    /// If the image is one that no writer can work with.
    pub fn new(setup: Setup<D>) -> Result<Rc<Self>> {
        let Setup { image, disk, parents, tasks, fronts, guids } = setup;
        image.check_writable()?;
        let (image, pending) = image.into_parts();
        let fixed = image.metadata.kind() == DiskType::Fixed;
        let (parents, maps): (Vec<_>, Vec<_>) =
            parents.into_iter().map(|parent| (parent.disk, parent.map)).unzip();
        let shared = Arc::new(Shared::of_chain(image.map.into(), maps.into(), false, fixed));
        if !disk.may_have_holes() && !planted(Plant::IgnoreDensity) {
            // What the fronts ask of the host must make none either; a server may make one to zero a range.
            shared.forget_punch();
            shared.forget_zero_range();
        }
        let dirty = DirtySet::new(pending.pages, pending.bitmaps, shared.marks.clone());
        let reclaim = Reclaim::default();
        pending.unmapped.into_iter().for_each(|extent| reclaim.lost(extent));
        let engine = Rc::new(Self {
            disk,
            parents,
            shared,
            durability: Durability::found(image.layout.file_length, pending.resumed),
            layout: image.layout,
            recovered: image.found_log != FoundLog::Clean || pending.grown,
            tasks,
            fronts,
            guids: RefCell::new(guids),
            headers: RefCell::new(Headers::new(&image.header)?),
            opening: Cell::default(),
            space: RefCell::new(image.space),
            dirty,
            reclaim,
            commits: CommitQueue::default(),
            journal: Journal::default(),
            fences: Fences::default(),
            turns: Turns::default(),
            open_tasks: Cell::default(),
            pool_holds: Rc::default(),
        });
        engine.note_levels();
        engine.start(|engine| async move { engine.commit_loop().await });
        Ok(engine)
    }

    /// Takes a message from `front`.
    pub fn receive(self: &Rc<Self>, front: usize, message: ToEngine) {
        assert!(front < self.fronts.count(), "a message of front {front}, which there is not");
        match message {
            ToEngine::Ask { tag, ask } => {
                self.open_tasks.update(|count| count + 1);
                self.start(move |engine| async move {
                    let result = engine.serve(ask).await;
                    engine.fronts.send(front, ToFront::Reply { tag, result });
                    let open = engine.open_tasks.get().checked_sub(1).expect("an ask ends once");
                    engine.open_tasks.set(open);
                });
            }
            ToEngine::BarrierDone => {
                self.reclaim.barrier_answered();
                self.start(|engine| async move { engine.release_quarantine().await });
            }
            ToEngine::Fenced => self.fences.answered(),
            ToEngine::Held => panic!("the task that holds the fronts takes their answers"),
        }
    }

    /// What has been done so far.
    pub fn counters(&self) -> Counters {
        self.shared.activity().counters()
    }

    /// The DataWriteGuid that the file carries.
    pub fn data_write_guid(&self) -> Uuid {
        self.headers.borrow().current().data_write_guid
    }

    /// The state shared with the fronts.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Serves a request, and notes what the outcome says about the host.
    async fn serve(self: &Rc<Self>, ask: Ask) -> Outcome {
        let needs_room = matches!(ask, Ask::Allocate { .. });
        let outcome = self.perform(ask).await;
        match outcome {
            Ok(()) if needs_room => self.shared.troubles().found_room(),
            Err(errno @ (Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG)) => {
                self.shared.troubles().note("making room in the image", errno);
            }
            _ => {}
        }
        self.note_levels();
        outcome
    }

    async fn perform(self: &Rc<Self>, ask: Ask) -> Outcome {
        self.check_poison()?;
        let changes = !matches!(ask, Ask::OpenSession | Ask::Flush | Ask::Fence);
        assert!(!changes || self.shared.session() == Session::Open, "fronts open the session first");
        match ask {
            Ask::OpenSession => self.open_session().await,
            Ask::Allocate { first, count } => self.allocate(first, count).await,
            Ask::Unmap { first, count, define_absent } => self.unmap(first, count, define_absent).await,
            Ask::ZeroAbsent { first, count, whole } => self.zero_absent(first, count, whole).await,
            Ask::Flush => self.flush().await,
            Ask::Fence => {
                self.await_unseen().await;
                self.check_poison()
            }
        }
    }

    fn start<F: Future<Output = ()> + 'static>(self: &Rc<Self>, task: impl FnOnce(Rc<Self>) -> F) {
        self.tasks.spawn(Box::pin(task(self.clone())));
    }

    fn check_poison(&self) -> Outcome {
        if self.shared.session() == Session::Poisoned { Err(Errno::EIO) } else { Ok(()) }
    }

    /// What must not fail has failed. Says so once; from now on every write and flush fails.
    fn poison(&self, doing: &str, error: &io::Error) -> Errno {
        if self.shared.poison() {
            self.shared.troubles().note(doing, errno(error));
            tracing::error!("{doing} failed: {error}; no write or flush will succeed, reads still work");
        }
        assert_eq!(self.shared.session(), Session::Poisoned, "a poisoned session stays poisoned");
        Errno::EIO
    }

    /// Writes metadata. A host that refuses it fails the requests that wait for it, and nothing else; any
    /// other failure poisons.
    async fn write_metadata(&self, doing: &str, offset: u64, bytes: Buffer) -> Outcome {
        let page = PAGE_BYTES as u64;
        assert!(offset >= OFFSETS[0] && offset.is_multiple_of(page), "metadata at byte {offset}");
        match self.disk.write(offset, bytes).await {
            Ok(()) => Ok(()),
            Err(error) if is_refusal(errno(&error)) => {
                self.shared.troubles().note(doing, errno(&error));
                Err(for_guest(errno(&error)))
            }
            Err(error) => Err(self.poison(doing, &error)),
        }
    }

    fn new_guid(&self) -> Uuid {
        let guid = (self.guids.borrow_mut())();
        assert!(!guid.is_nil(), "a GUID source gives no zeros");
        guid
    }
}

/// Whether a host that answers an operation with this `errno` has no room or memory for it, or has not begun
/// it. Nothing that was written before is lost then. It says nothing of a sync, which is never tried again.
fn is_refusal(errno: Errno) -> bool {
    use Errno::{EAGAIN, ECANCELED, EDQUOT, EINTR, ENOMEM, ENOSPC};
    [ENOSPC, EDQUOT, ENOMEM, ECANCELED, EAGAIN, EINTR].contains(&errno)
}

/// What a guest gets for it, whose kernel knows no quotas.
fn for_guest(errno: Errno) -> Errno {
    if errno == Errno::EDQUOT { Errno::ENOSPC } else { errno }
}

/// A host that takes no longer file has no room for more. Until the end of a request the two are kept apart:
/// room may come, and a longer file never will.
fn too_long_is_full(errno: Errno) -> Errno {
    if errno == Errno::EFBIG { Errno::ENOSPC } else { errno }
}

/// The `errno` of a host error; EIO where it has none.
fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, port::errno)
}
