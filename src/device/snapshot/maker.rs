//! Makes the image of a snapshot on its own thread, so that the device continues whatever path the user gives
//! and however that file system hangs.
//!
//! Everything that may wait for a foreign file system is done here: checking the folder, making the file,
//! writing it, removing it if the snapshot fails. The engine waits with a deadline. A thread that misses it
//! cannot be ended, like everything that waits for a dead disk; when it returns, it removes what it has made.
//! There are at most [`MAX_MAKERS`] of them.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use smol::future;
use uuid::Uuid;

use super::location;
use crate::chain;
use crate::device::control::POLL_INTERVAL;
use crate::device::layers::choose_payload_io;
use crate::device::mailbox::wake_up;
use crate::device::order::Snapped;
use crate::device::reply::Reply;
use crate::device::session;
use crate::disk::{HostFile, ImageFile, Place, Reactor, Unfinished, folder_of};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::image::{self, Image, NewImage, WritableImage};

/// How long a file system may take to hold a new image: some writes of a MiB and two syncs. Well below the
/// time that `vhdx-ublk del` gives a daemon.
const DEADLINE: Duration = Duration::from_secs(20);

/// A child can be read and written by the same users as its parent.
const PERMISSIONS: u32 = 0o777;

/// How many makers may hang.
const MAX_MAKERS: usize = 4;

/// The image to be made.
pub(super) struct ChildRequest {
    /// Its path.
    pub(super) path: PathBuf,
    /// The device that will be served from it.
    pub(super) device: u32,
    /// Its parent, which is served until then.
    pub(super) parent: Arc<ImageFile>,
    /// What the parent will be recognised by.
    pub(super) data_write_guid: Uuid,
    pub(super) disk_id: Uuid,
    /// The image, without its parent locator.
    pub(super) image: NewImage,
}

/// The image that was made.
pub(super) struct Child {
    pub(super) file: Arc<ImageFile>,
    pub(super) image: WritableImage,
    /// The memory alignment that its file needs, bytes.
    pub(super) memory_alignment: u32,
    /// Where it is, for its session.
    pub(super) place: image::Place,
}

/// The outcome of the snapshot, for the maker. It removes the image if the snapshot failed, or if this is
/// dropped.
pub(super) struct Verdict(mpsc::Sender<(Result<Snapped>, Reply<Snapped>)>);

impl Verdict {
    /// Has the maker remove the image if the snapshot failed, and then answer.
    pub(super) fn give(self, outcome: Result<Snapped>, reply: Reply<Snapped>) {
        // The maker waits for this, and for nothing else.
        let _ = self.0.send((outcome, reply));
    }
}

/// The makers at work.
#[derive(Default)]
pub(in crate::device) struct Makers(Arc<()>);

impl Makers {
    /// Has the image made while the tasks of `reactor` continue. Gives up when the deadline has passed, or
    /// when `hurry` is ready.
    pub(super) fn make(
        &self,
        reactor: &Reactor,
        request: ChildRequest,
        hurry: impl Future<Output = ()>,
    ) -> Result<(Child, Verdict)> {
        if Arc::strong_count(&self.0) > MAX_MAKERS {
            let message = format!("{MAX_MAKERS} earlier snapshots still wait for their file systems");
            return Err(
                Error::new(Kind::InUse, message).remedy("find the file system that hangs (dmesg, mount)")
            );
        }
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).doing("making an eventfd")?;
        let bell = Arc::new(bell);
        let (report, made) = mpsc::channel();
        let (at_work, rung) = (self.0.clone(), bell.clone());
        let supervise = move || {
            // If the engine has given up, the image is removed with the report.
            let _ = report.send(supervise(request, at_work));
            wake_up(&rung);
        };
        let thread = thread::Builder::new().name("vhdx-snapshot".into()).spawn(supervise);
        thread.doing("starting a thread for the snapshot")?;
        let rings =
            async { reactor.ring().read_eventfd(bell).await.map(drop).doing("waiting for the image") };
        reactor.block_on(future::or(rings, async {
            hurry.await;
            Err(Error::new(Kind::Io, "the device is being removed"))
        }))?;
        made.recv().expect("it is sent before the bell rings")
    }

    /// Gives makers that the engine no longer waits for a chance to remove what they have made: the process
    /// is about to end, and they with it. One that hangs in the kernel keeps the process from ending anyway.
    pub(in crate::device) fn await_end(&self) {
        let until = Instant::now() + DEADLINE;
        while Arc::strong_count(&self.0) > 1 && Instant::now() < until {
            thread::sleep(POLL_INTERVAL);
        }
    }
}

/// Waits for another thread that makes the image, up to the deadline.
fn supervise(request: ChildRequest, at_work: Arc<()>) -> Result<(Child, Verdict)> {
    let (report, made) = mpsc::channel();
    let path = request.path.clone();
    let maker = move || {
        work(&request, &report);
        drop(at_work);
    };
    let thread = thread::Builder::new().name("vhdx-maker".into()).spawn(maker);
    thread.doing("starting a thread for the snapshot")?;
    made.recv_timeout(DEADLINE).unwrap_or_else(|_| {
        let message = format!(
            "its file system has not taken a new file within {} s; nothing has changed",
            DEADLINE.as_secs()
        );
        Err(Error::new(Kind::Io, message)
            .file(&path)
            .remedy("check whether that file system hangs (dmesg, mount), or choose another folder"))
    })
}

/// Makes the image, reports, and does what the verdict says.
fn work(request: &ChildRequest, report: &mpsc::Sender<Result<(Child, Verdict)>>) {
    let unfinished = Unfinished::default();
    let (verdict, given) = mpsc::channel();
    let made = match make(request, &unfinished) {
        Ok(child) => Ok((child, Verdict(verdict))),
        Err(error) => {
            drop(unfinished);
            return drop(report.send(Err(error)));
        }
    };
    if report.send(made).is_err() {
        tracing::warn!("{}: made too late for the snapshot, and removed", request.path.display());
    }
    if let Ok((outcome, reply)) = given.recv() {
        match &outcome {
            Ok(_) => unfinished.keep(),
            Err(_) => drop(unfinished),
        }
        reply.send(outcome);
    }
}

fn make(request: &ChildRequest, unfinished: &Unfinished) -> Result<Child> {
    location::refuse_on_itself(&request.path, &request.parent, request.device)?;
    refuse_moved(&request.parent)?;
    let file = unfinished.create(Place::of(&request.path)?)?;
    file.set_sparse(request.parent.sparse());
    let folder = folder_of(file.path());
    let (parent, guid) = (request.parent.path(), request.data_write_guid);
    let descent = chain::parent_ref_of(parent, guid, request.disk_id, folder)?;
    let new = NewImage { parent: Some(descent), ..request.image.clone() };
    let reactor = Reactor::new()?;
    let disk = reactor.disk(file.clone());
    reactor.block_on(new.write(&disk, Uuid::new_v4)).file(file.path())?;
    file.resemble(&request.parent, PERMISSIONS)?;
    let image = reactor.block_on(Image::open_for_writing(&disk, Uuid::new_v4)).file(file.path())?;
    file.open_for_queues(request.parent.queue_count())?;
    choose_payload_io(&file, &image.metadata)?;
    let memory_alignment = file.memory_alignment(image.metadata.logical_sector_size)?;
    let place = session::place_of(&file)?;
    drop(disk);
    unfinished.persist()?;
    Ok(Child { file, image, memory_alignment, place })
}

/// The child will look for its parent under the path that it has now.
fn refuse_moved(file: &ImageFile) -> Result<()> {
    let named = HostFile::at(file.path()).ok();
    if named == Some(file.identity()) {
        return Ok(());
    }
    let message = "the served image was moved or renamed; a child could not find it";
    Err(Error::new(Kind::NotFound, message).file(file.path()).remedy("move it back to its former path"))
}
