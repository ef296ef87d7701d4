//! Making the disk of a device larger while it is served.
//!
//! Order, each step durable before the next:
//!
//! 1. dirty metadata is committed, and a session file is made for the longer map: the pause is short then,
//!    and nothing has changed if there is no room;
//! 2. the fronts are held: new requests wait;
//! 3. the image is committed, its log emptied, its session at rest: the file has everything;
//! 4. the host makes room for what is new. Until here a failure changes nothing, and a caller that has left
//!    ends it;
//! 5. the image grows as one at rest does ([`PreparedResize`]): its disk is
//!    larger after a power cut, or as it was;
//! 6. the new session takes the old one's name: a successor of this process serves either size before, and
//!    the new one from now on;
//! 7. the fronts continue with the longer map; then the kernel gets the size, from the device's thread.
//!
//! A failure after 4 poisons: whether the image has its old or its new size is not known then.

use std::rc::Rc;
use std::time::Instant;

use super::fronts::{FrontInbox, Mailboxes};
use super::leaf_handover::{Leaf, LeafHandover};
use super::order::{GrowOrder, Grown, Sizes};
use super::reply::Reply;
use super::served_image::{ServedImage, open_served};
use super::session::{FoundSession, place_of};
use super::writable::WritableOpener;
use crate::disk::Reactor;
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::MAX_VIRTUAL_SIZE;
use crate::format::bat::Geometry;
use crate::image::{PreparedResize, WritableImage};

/// Makes the disk larger, on the engine's thread.
pub(super) struct Grower<'a> {
    pub(super) reactor: &'a Reactor,
    pub(super) opener: &'a WritableOpener,
    pub(super) inbox: &'a Rc<FrontInbox>,
    pub(super) fronts: &'a Rc<Mailboxes>,
    pub(super) handover: &'a LeafHandover,
}

impl Grower<'_> {
    /// Does what is ordered; `served` has the larger disk afterwards, or stays as it is.
    pub(super) fn handle(&self, order: GrowOrder, served: &mut ServedImage) {
        let GrowOrder { sizes, reply, ended, .. } = order;
        let outcome = self.grow(sizes, &reply, served);
        ended(outcome.file(served.file.path()), reply);
    }

    fn grow(&self, sizes: Sizes, reply: &Reply<Grown>, served: &mut ServedImage) -> Result<Grown> {
        let size_bytes = sizes.to_bytes;
        // Its entry may have the old size, or the kernel, if one of them could not be told: they are again.
        if size_bytes == served.opened.parameters.size_bytes {
            return Ok(Grown { size_bytes, pause_us: 0 });
        }
        check_sizes(sizes, served)?;
        let flushed = self.reactor.block_on(served.engine.flush());
        served.check("committing dirty metadata", flushed)?;
        let geometry = longer(served.engine.shared().geometry(), size_bytes);
        let session = served.session.as_ref().map(|_| self.make_session(&geometry, served)).transpose()?;
        let started = Instant::now();
        self.inbox.hold(self.reactor, self.fronts);
        let grown = self.grow_held(&geometry, (session, reply), served);
        if let Ok(grown) = &grown {
            let shared = grown.engine.shared().clone();
            shared.activity().continue_from(served.engine.shared().activity());
            self.handover.set(Leaf { shared, file: grown.file.clone() });
            self.inbox.change_engine(grown.engine.clone());
        }
        self.fronts.release();
        let pause_us = u64::try_from(started.elapsed().as_micros()).expect("years are below 2^64");
        let before = std::mem::replace(served, grown?);
        self.reactor.block_on(before.engine.leave());
        tracing::info!("the disk has {size_bytes} bytes now");
        Ok(Grown { size_bytes, pause_us })
    }

    /// A session for the longer map, which has no name yet.
    fn make_session(&self, geometry: &Geometry, served: &ServedImage) -> Result<FoundSession> {
        let place = place_of(&served.file)?;
        let made = self.opener.sessions.create(&place, served.opened.disk_id, geometry);
        made.map_err(|error| {
            error.remedy("make room under /run: the device would no longer be recoverable without a session")
        })
    }

    /// Steps 3 to 6, and the engine for what is served from then on.
    fn grow_held(
        &self,
        geometry: &Geometry,
        (session, reply): (Option<FoundSession>, &Reply<Grown>),
        served: &ServedImage,
    ) -> Result<ServedImage> {
        let rested = self.reactor.block_on(served.engine.rest());
        served.check("freezing the image", rested)?;
        let decide = |image: &WritableImage, prepared: &PreparedResize<'_>| {
            if let Some((_, memory)) = &session {
                let border = prepared.border().map(|(block, _)| block);
                let reserved = image.reserve_bitmaps(memory, geometry, border);
                reserved.doing("reserving room for the sector bitmaps")?;
            }
            if reply.claim() {
                return Ok(());
            }
            tracing::warn!("the disk keeps its size: the caller has stopped waiting");
            Err(Error::new(Kind::Io, "the caller has stopped waiting"))
        };
        let grown = self.reactor.block_on(served.engine.grow(geometry.virtual_size(), decide));
        let image = grown.map_err(with_remedy)?;
        // The old map does not fit the file any longer, and nothing else is there to go on with.
        self.serve(image, session, served).inspect_err(|_| {
            served.engine.shared().poison();
        })
    }

    /// The grown image with its session and an engine of its own.
    fn serve(
        &self,
        mut image: WritableImage,
        session: Option<FoundSession>,
        served: &ServedImage,
    ) -> Result<ServedImage> {
        let file = served.file.clone();
        self.reactor.block_on(image.read_bitmaps(&self.reactor.disk(file.clone())))?;
        let mut parameters = served.opened.parameters;
        parameters.size_bytes = image.metadata.virtual_size;
        let session = match session {
            Some((mut session, memory)) => {
                let owner = image.owner(place_of(&file)?);
                image.start_session(memory, &owner).doing("reserving room for the sector bitmaps")?;
                if served.engine.shared().map.memory().used_page_cache() {
                    image.map.memory().note_page_cache();
                }
                session.publish()?;
                Some(session)
            }
            None => None,
        };
        let parents = served.parents(self.reactor);
        open_served(self.reactor, self.fronts, file, image, session, parents, parameters)
    }
}

/// The same disk with `size_bytes`.
fn longer(geometry: &Geometry, size_bytes: u64) -> Geometry {
    let block = u32::try_from(geometry.block_size()).expect("256 MiB at most");
    Geometry::new(size_bytes, block, geometry.logical_sector_size(), geometry.is_differencing())
}

fn check_sizes(Sizes { from_bytes, to_bytes }: Sizes, served: &ServedImage) -> Result<()> {
    let (now, sector) =
        (served.opened.parameters.size_bytes, served.engine.shared().geometry().logical_sector_size());
    if from_bytes != now {
        let message = format!("the disk has {now} bytes by now");
        let remedy = format!("run the command again; if it says the same, run it with `--size {now}` first");
        return Err(Error::new(Kind::InUse, message).remedy(remedy));
    }
    if to_bytes < now {
        return Err(Error::new(Kind::Unsupported, "the disk of a device that is served does not shrink"));
    }
    if to_bytes > MAX_VIRTUAL_SIZE || !to_bytes.is_multiple_of(sector.into()) {
        return Err(Error::new(Kind::Usage, format!("no disk has {to_bytes} bytes")));
    }
    Ok(())
}

fn with_remedy(error: Error) -> Error {
    match error.kind() {
        Kind::NoSpace => error.remedy(
            "free space on the file system of the image, and resize again; the device continues as before",
        ),
        Kind::Io if error.remedy_text().is_none() => error.remedy(
            "look for the cause (dmesg); if `vhdx-ublk list` shows the device as failed, remove it and add \
             the image again, which has its old or its new size",
        ),
        _ => error,
    }
}
