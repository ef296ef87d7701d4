//! Makes the image of a snapshot on a thread of its own: whatever place the user names, and however that place hangs,
//! the device goes on.
//!
//! Everything that may wait for a foreign file system is done here: looking where the file would lie, making it,
//! writing it, removing it if it is not wanted in the end. The engine waits with a deadline. A thread that misses it
//! cannot be ended, as nothing can that waits for a dead disk; when it comes back, it removes what it has made. There
//! are at most [`MAX_MAKERS`] of them.

use std::fs;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use smol::future;
use uuid::Uuid;

use super::control::POLL_INTERVAL;
use super::layers::choose_payload_io;
use super::mailbox::wake_up;
use super::order::Snapped;
use super::place;
use super::registry::FileId;
use super::session;
use crate::chain;
use crate::disk::{ImageFile, Place, Reactor, Unfinished};
use crate::error::{Error, Kind, Result};
use crate::image::{Image, Mode, NewImage};

/// How long a place may take to hold a new image: some writes of a MiB and two syncs. Well below the time that
/// `vhdx-ublk del` gives a daemon.
const DEADLINE: Duration = Duration::from_secs(20);

/// Who may read and write the parent may the same with its child.
const PERMISSIONS: u32 = 0o777;

/// How many makers may hang.
const MAX_MAKERS: usize = 4;

/// The image that is to be made.
pub(super) struct Wish {
    /// Where.
    pub(super) path: PathBuf,
    /// The device that will be served from it.
    pub(super) device: u32,
    /// Its parent, which is served until then.
    pub(super) parent: Arc<ImageFile>,
    /// What the parent will be recognised by.
    pub(super) data_write_guid: Uuid,
    pub(super) disk_id: Uuid,
    /// The image, without its descent.
    pub(super) image: NewImage,
}

/// The image that was made.
pub(super) struct Made {
    pub(super) file: Arc<ImageFile>,
    pub(super) id: FileId,
    pub(super) image: Image,
    /// How data in memory has to be aligned for it, bytes.
    pub(super) memory_alignment: u32,
    /// Where it is, for its session.
    pub(super) place: crate::image::Place,
    pub(super) verdict: Verdict,
}

/// What became of the snapshot; the image is removed if it failed, and if this is dropped.
pub(super) struct Verdict(mpsc::Sender<(Result<Snapped>, mpsc::Sender<Result<Snapped>>)>);

impl Verdict {
    /// Has the maker remove the image if the snapshot failed, and then answer.
    pub(super) fn give(self, outcome: Result<Snapped>, answer: mpsc::Sender<Result<Snapped>>) {
        // A maker waits for this, and does nothing before.
        let _ = self.0.send((outcome, answer));
    }
}

/// The makers at work.
#[derive(Default)]
pub(super) struct Makers(Arc<()>);

impl Makers {
    /// Has `wish` made, while the tasks of `reactor` go on. Gives up when the deadline has passed, or when `hurry` is
    /// ready.
    pub(super) fn make(
        &self,
        reactor: &Reactor,
        wish: Wish,
        hurry: impl Future<Output = ()>,
    ) -> Result<Made> {
        if Arc::strong_count(&self.0) > MAX_MAKERS {
            let message = format!("{MAX_MAKERS} earlier snapshots still wait for their file systems");
            return Err(
                Error::new(Kind::InUse, message).remedy("look which file system hangs (dmesg, mount)")
            );
        }
        let failed = |doing: &'static str| move |error| Error::io(doing, error);
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC);
        let bell = Arc::new(bell.map_err(|errno| failed("making an eventfd")(errno.into()))?);
        let (report, made) = mpsc::channel();
        let (at_work, rung) = (self.0.clone(), bell.clone());
        let supervise = move || {
            // The engine may have hurried on: then the image goes away with this.
            let _ = report.send(supervise(wish, at_work));
            wake_up(&rung);
        };
        let thread = thread::Builder::new().name("vhdx-snapshot".into()).spawn(supervise);
        thread.map_err(failed("starting a thread for the snapshot"))?;
        let rings = async {
            reactor.ring().read_eventfd(bell).await.map(drop).map_err(failed("waiting for the image"))
        };
        reactor.block_on(future::or(rings, async {
            hurry.await;
            Err(Error::new(Kind::Io, "the device is being taken away"))
        }))?;
        made.recv().expect("it is sent before the bell rings")
    }
}

impl Makers {
    /// Gives makers that nobody waits for any more a chance to remove what they have made: the process is about to
    /// end, and they with it. One that hangs in the kernel keeps the process from ending anyway.
    pub(super) fn await_end(&self) {
        let until = Instant::now() + DEADLINE;
        while Arc::strong_count(&self.0) > 1 && Instant::now() < until {
            thread::sleep(POLL_INTERVAL);
        }
    }
}

/// Waits for another thread that makes the image, up to the deadline.
fn supervise(wish: Wish, at_work: Arc<()>) -> Result<Made> {
    let (report, made) = mpsc::channel();
    let path = wish.path.clone();
    let maker = move || {
        work(&wish, &report);
        drop(at_work);
    };
    let thread = thread::Builder::new().name("vhdx-maker".into()).spawn(maker);
    thread.map_err(|error| Error::io("starting a thread for the snapshot", error))?;
    made.recv_timeout(DEADLINE).unwrap_or_else(|_| {
        let message = format!(
            "its place has not taken a new file within {} s; nothing has changed",
            DEADLINE.as_secs()
        );
        Err(Error::new(Kind::Io, message)
            .file(&path)
            .remedy("look whether that file system hangs (dmesg, mount), or name another place"))
    })
}

/// Makes the image, reports, and does what the verdict says.
fn work(wish: &Wish, report: &mpsc::Sender<Result<Made>>) {
    let unfinished = Unfinished::default();
    let (verdict, given) = mpsc::channel();
    let made = make(wish, &unfinished, Verdict(verdict));
    if let Err(error) = made {
        drop(unfinished);
        return drop(report.send(Err(error)));
    }
    if report.send(made).is_err() {
        tracing::warn!("{}: made too late for the snapshot, and removed", wish.path.display());
    }
    if let Ok((outcome, answer)) = given.recv() {
        match &outcome {
            Ok(_) => unfinished.keep(),
            Err(_) => drop(unfinished),
        }
        // Who asked may have lost patience.
        let _ = answer.send(outcome);
    }
}

fn make(wish: &Wish, unfinished: &Unfinished, verdict: Verdict) -> Result<Made> {
    place::refuse_on_itself(&wish.path, &wish.parent, wish.device)?;
    refuse_moved(&wish.parent)?;
    let file = unfinished.create(Place::of(&wish.path)?)?;
    let named = |error: Error| error.file(file.path());
    let folder = file.path().parent().expect("a file has a folder");
    let descent = chain::descent_of(wish.parent.path(), wish.data_write_guid, wish.disk_id, folder)?;
    let new = NewImage { parent: Some(descent), ..wish.image.clone() };
    let reactor = Reactor::new()?;
    let disk = reactor.disk(file.clone());
    reactor.block_on(new.write(&disk, Uuid::new_v4)).map_err(named)?;
    file.resemble(&wish.parent, PERMISSIONS)?;
    let image = reactor.block_on(Image::open(&disk, Mode::Writable, Uuid::new_v4)).map_err(named)?;
    choose_payload_io(&file, &image.metadata)?;
    let memory_alignment = file.memory_alignment(image.metadata.logical_sector_size)?;
    let id = FileId::of_image(&file)?;
    let place = session::place_of(&file)?;
    drop(disk);
    unfinished.settle()?;
    Ok(Made { file, id, image, memory_alignment, place, verdict })
}

/// The child will look for its parent under the name that it has now.
fn refuse_moved(file: &ImageFile) -> Result<()> {
    let named = fs::metadata(file.path()).ok().map(|found| FileId::of(&found));
    if named == Some(FileId::of_image(file)?) {
        return Ok(());
    }
    let message = "the served image was moved or renamed; a child could not find it";
    Err(Error::new(Kind::NotFound, message).file(file.path()).remedy("move it back to its place"))
}
