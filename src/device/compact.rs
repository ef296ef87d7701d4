//! Making the file of an image shorter while it is served.
//!
//! Blocks move to lower places, a batch at a time ([`crate::engine::relocate`]); then the file is cut where
//! what is used ends ([`Engine::cut`]). The guest continues meanwhile, and may take away what a move was
//! planned for: such a move is left out. What it has changed is planned for anew, until nothing is left to be
//! moved.
//!
//! The guest comes first. If it has requested anything while a batch was moved, the next one waits for
//! several times as long as that took. A device that compacts by itself while it is idle stops at the first
//! request, at the end of its batch. What holds the queues (a snapshot, a disk that grows, a handover, the
//! end of the device) stops the job at the end of its batch.
//!
//! Sector bitmaps and regions stay where they are: their bits may change at any moment.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::job::{Job, Running, Stop};
use super::mailbox::wake_up;
use super::order::{CompactOrder, Shortened};
use super::served_image::{ServedImage, unclean};
use crate::disk::{ImageFile, Reactor, Ring, UringDisk};
use crate::engine::Engine;
use crate::engine::port_counts::Requests;
use crate::engine::relocate::Move;
use crate::engine::shared::Session;
use crate::engine::waiting::Promise;
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::operations::compact::plan::{MOST_COPIED, Plan, Step, batch};
use crate::operations::compact::{Figures, movable};
use crate::operations::room;

/// Bytes that a batch of moves copies, at most, unless a single block is longer: writes there wait for it.
const BATCH: u64 = 8 << 20;

/// Bytes that are copied in a second, if the caller names no other limit.
const RATE: u64 = 64 << 20;

/// For how many times as long as a batch took, the guest has the disk to itself then.
const YIELD: u32 = 5;

/// The longest pause in which no notice is taken of a request to stop.
const PAUSE: Duration = Duration::from_millis(100);

/// A device compacts by itself when one part of so many of the file is free.
const LEAST_FREE_PART: u64 = 4;

/// How often a job plans anew, at most: a guest that allocates all the time could keep it for ever.
const MOST_PLANS: usize = 16;

/// Compacts on the engine's thread, one job at a time.
pub(super) struct Compactor<'a> {
    reactor: &'a Reactor,
    current: RefCell<Option<(Arc<Job>, Promise<()>)>>,
}

impl<'a> Compactor<'a> {
    pub(super) fn new(reactor: &'a Reactor) -> Self {
        Self { reactor, current: RefCell::default() }
    }

    /// Begins what is ordered; the caller gets the outcome when it has ended.
    pub(super) fn start(&self, order: CompactOrder, served: &ServedImage) {
        let CompactOrder { max_rate, requests, while_idle, running, ended: report, .. } = order;
        let (job, ended) = (running.job.clone(), Promise::default());
        let work = Work {
            engine: served.engine.clone(),
            file: served.file.clone(),
            ring: self.reactor.ring().clone(),
            job: job.clone(),
            idle_since: while_idle.then(&*requests),
            requests,
            // Whoever writes the line to the socket may write zero.
            max_rate: max_rate.unwrap_or(RATE).max(1),
        };
        self.current.replace(Some((job, ended.clone())));
        self.reactor.spawn(end(work, running, report, ended)).detach();
    }

    /// Has the job end, if there is one, and waits until it has.
    pub(super) fn stop(&self, why: Stop) {
        if let Some((job, ended)) = self.current.take() {
            job.stop(why);
            self.reactor.block_on(ended.wait());
        }
    }
}

async fn end(
    work: Work,
    running: Running,
    report: Box<dyn FnOnce(Result<Shortened>) + Send>,
    ended: Promise<()>,
) {
    let outcome = work.run().await.file(work.file.path());
    match &outcome {
        Ok(done) if (done.moves, done.cut_bytes) == (0, 0) => {}
        Ok(done) => {
            tracing::info!("compacted: {} bytes moved, {} cut off", done.moved_bytes, done.cut_bytes);
            if done.stopped == Some(Stop::Requests) {
                tracing::info!("requests have come: compacting continues when the device is idle again");
            }
        }
        Err(error) => tracing::warn!("compacting has failed: {error:#}"),
    }
    // Who gets the answer may begin the next job.
    drop(running);
    report(outcome);
    ended.keep(());
}

struct Work {
    engine: Rc<Engine<UringDisk>>,
    file: Arc<ImageFile>,
    ring: Rc<Ring>,
    job: Arc<Job>,
    /// The requests that the guest has made so far.
    requests: Box<dyn Fn() -> Requests + Send>,
    /// What they were when a device began to compact by itself, which any other ends.
    idle_since: Option<Requests>,
    /// The most bytes that are copied in a second.
    max_rate: u64,
}

impl Work {
    async fn run(&self) -> Result<Shortened> {
        // Its space would lie where blocks move to, or behind them.
        let _pool_is_empty = self.engine.without_pool();
        let before = self.figures()?;
        let mut done = Shortened { before, after: before, ..Shortened::default() };
        if self.idle_since.is_some() && !self.is_worth_it().await? {
            return Ok(done);
        }
        for _ in 0..MOST_PLANS {
            let moved = done.moves;
            let steps = self.plan().await?;
            self.make(&steps, &mut done).await?;
            if done.stopped.is_none_or(|why| why == Stop::Caller) && self.engine.unused_end() > 0 {
                self.open_session().await?;
                done.cut_bytes += self.check("cutting the file", self.engine.cut().await)?;
            }
            if done.stopped.is_some() || done.moves == moved {
                break;
            }
        }
        done.after = self.figures()?;
        Ok(done)
    }

    /// The moves that make the file shorter, as it is now. They are found by another thread: requests that
    /// need the engine do not wait for it.
    async fn plan(&self) -> Result<Vec<Step>> {
        self.free_what_is_discarded().await?;
        let space = self.engine.space();
        let (items, others) = movable(&self.engine.shared().map, &space);
        let plan = move || {
            let mut plan = Plan::new(space, items, others, MOST_COPIED);
            plan.shorten();
            plan.steps().to_vec()
        };
        elsewhere(&self.ring, plan).await
    }

    /// Whether so much of the file is free that a device compacts it by itself.
    async fn is_worth_it(&self) -> Result<bool> {
        self.free_what_is_discarded().await?;
        let length = self.engine.shared().map.file_bytes();
        let free = length.saturating_sub(self.engine.space().used_bytes());
        let is_worth_it = free > length / LEAST_FREE_PART;
        if is_worth_it {
            tracing::info!(
                "the device is idle, and {free} of {length} bytes of the file are free: compacting"
            );
        }
        Ok(is_worth_it)
    }

    /// What the guest has discarded lately is not free yet.
    async fn free_what_is_discarded(&self) -> Result<()> {
        if self.engine.shared().session() == Session::Idle {
            return Ok(());
        }
        self.check("committing dirty metadata", self.engine.give_up(&[]).await)
    }

    async fn make(&self, mut steps: &[Step], done: &mut Shortened) -> Result<()> {
        let bytes = |steps: &[Step]| steps.iter().map(|step| step.item.place.length).sum::<u64>();
        while !steps.is_empty() {
            let (now, later) = steps.split_at(batch(steps, self.max_rate.min(BATCH)));
            self.advance(done, bytes(steps));
            done.stopped = self.stopped();
            if done.stopped.is_some() {
                return Ok(());
            }
            self.require_room()?;
            self.open_session().await?;
            let (started, requests) = (Instant::now(), (self.requests)());
            let moves: Vec<Move> = now.iter().map(Move::from).collect();
            let made = self.check("moving blocks", self.engine.relocate(&moves).await)?;
            let copied = made.len() as u64 * self.engine.shared().geometry().block_size();
            done.moves += made.len() as u64;
            done.moved_bytes += copied;
            steps = later;
            self.advance(done, bytes(steps));
            self.pause(started, copied, (self.requests)() != requests).await?;
        }
        Ok(())
    }

    /// A batch must not take the last room of the host, which the guest would then miss.
    fn require_room(&self) -> Result<()> {
        let batch = BATCH.max(self.engine.shared().geometry().block_size());
        let needs = "compacting an image while it is served needs";
        room::require(self.file.host_room(), 2 * batch, needs).map_err(|error| match error.kind() {
            Kind::NoSpace => error.remedy("make room there, or compact the image when no device serves it"),
            _ => error,
        })
    }

    /// Why to stop, if it is to.
    fn stopped(&self) -> Option<Stop> {
        if self.idle_since.is_some_and(|before| (self.requests)() != before) {
            self.job.stop(Stop::Requests);
        }
        self.job.stopped()
    }

    fn advance(&self, done: &Shortened, left: u64) {
        let file = self.engine.shared().map.file_bytes();
        self.job.advance(done.moved_bytes, done.moved_bytes + left, file);
    }

    /// Waits until the next batch may begin, after one that has copied so many bytes since `started`, while
    /// the guest was `busy` or not.
    async fn pause(&self, started: Instant, copied: u64, busy: bool) -> Result<()> {
        let rate = Duration::from_millis(copied.saturating_mul(1000) / self.max_rate);
        let guest = if busy { started.elapsed() * (1 + YIELD) } else { Duration::ZERO };
        let due = started + rate.max(guest);
        while let Some(left) = due.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            if self.stopped().is_some() {
                break;
            }
            self.ring.sleep(left.min(PAUSE)).await.doing("waiting")?;
        }
        Ok(())
    }

    async fn open_session(&self) -> Result<()> {
        self.check("opening the image", self.engine.open_session().await)
    }

    fn check<T>(&self, doing: &str, outcome: std::result::Result<T, Errno>) -> Result<T> {
        let poisoned = self.engine.shared().session() == Session::Poisoned;
        outcome.map_err(|errno| {
            let error = unclean(doing, errno, poisoned, self.file.path());
            match error.kind() {
                Kind::NoSpace => error.remedy(
                    "free some space on the file system of the image, and compact again; the device \
                     continues, and what was won is kept",
                ),
                _ => error,
            }
        })
    }

    fn figures(&self) -> Result<Figures> {
        Ok(Figures {
            host: self.file.host_bytes().doing("looking at the image")?,
            length: self.file.length().doing("looking at the image")?,
        })
    }
}

/// What `work` returns, which a thread of its own does.
async fn elsewhere<T: Send + 'static>(
    ring: &Rc<Ring>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    const FAILED: &str = "starting a thread";
    let ended = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map(Arc::new).doing(FAILED)?;
    let (sender, receiver) = mpsc::sync_channel(1);
    let waiting = ring.read_eventfd(ended.clone());
    let run = move || {
        // The other side waits for it.
        let _ = sender.send(work());
        wake_up(&ended);
    };
    thread::Builder::new().name("vhdx-compact".into()).spawn(run).doing(FAILED)?;
    waiting.await.doing(FAILED)?;
    receiver.try_recv().map_err(|_| Error::new(Kind::Io, "a thread has ended without its result"))
}
