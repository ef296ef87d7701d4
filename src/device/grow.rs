//! Making the disk of a device larger while it is served.
//!
//! Order, each step durable before the next:
//!
//! 1. dirty metadata is committed, a session file is made for the longer map, and the host makes room where
//!    it has to fill it: the pause is short then, and nothing has changed if there is no room;
//! 2. the fronts are held: new requests wait;
//! 3. the image is committed, its log emptied, its session at rest: the file has everything;
//! 4. all other room is claimed, of the host and for the new session, which waits beside the old one. Until
//!    here a failure changes nothing, and a caller that has left ends it;
//! 5. the image grows as one at rest does ([`PreparedResize`]): its disk is
//!    larger after a power cut, or as it was;
//! 6. the new session takes the old one's name: a successor of this process serves either size before, and
//!    the new one from now on;
//! 7. the fronts continue with the longer map; then the kernel gets the size, from the device's thread.
//!
//! A failure after 4 poisons: whether the image has its old or its new size is not known then.

use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

use super::exchange::{Exchange, NewSession};
use super::order::{GrowOrder, Grown, Sizes};
use super::reply::Reply;
use super::served_image::ServedImage;
use crate::engine::shared::Session;
use crate::error::{Error, Kind, Locate, Result};
use crate::format::MAX_VIRTUAL_SIZE;
use crate::format::bat::Geometry;
use crate::image::{PreparedResize, WritableImage};
use crate::operations::room;

/// Makes the disk larger, on the engine's thread.
pub(super) struct Grower<'a> {
    pub(super) exchange: &'a Exchange<'a>,
    /// Set when the device is taken down.
    pub(super) closing: &'a AtomicBool,
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
        let reactor = self.exchange.reactor;
        let geometry = longer(served.engine.shared().geometry(), size_bytes);
        let session = self.exchange.prepare(&geometry, served)?;
        let extended = self.extend(&geometry, reply, served);
        let (before, pause_us) = self.exchange.run(served, |served| {
            let rested = reactor.block_on(served.engine.rest());
            served.check("freezing the image", rested)?;
            let grown = extended.and_then(|()| self.grow_held(&geometry, (session, reply), served));
            if grown.is_err() && served.engine.shared().session() == Session::Idle {
                self.take_room_back(served);
            }
            grown
        })?;
        reactor.block_on(before.engine.leave());
        tracing::info!("the disk has {size_bytes} bytes now");
        Ok(Grown { size_bytes, pause_us })
    }

    /// Has the host make room where it has to fill it.
    fn extend(&self, geometry: &Geometry, reply: &Reply<Grown>, served: &ServedImage) -> Result<()> {
        let bytes = served.engine.bytes_ahead(geometry);
        room::require(served.file.host_room(), bytes, "the larger disk needs").map_err(with_remedy)?;
        let goes_on = || reply.is_awaited() && !self.closing.load(Ordering::Acquire);
        let extended = self.exchange.reactor.block_on(served.engine.extend_ahead(bytes, goes_on));
        match extended {
            Err(Errno::ECANCELED) => Err(left()),
            extended => served.check("making room in the image", extended).map_err(with_remedy),
        }
    }

    /// Gives the host back what the disk did not grow by.
    fn take_room_back(&self, served: &ServedImage) {
        if let Err(errno) = self.exchange.reactor.block_on(served.engine.cut_end()) {
            tracing::warn!("{} keeps its unused tail: errno {errno}", served.file.path().display());
        }
    }

    /// Steps 4 to 6, and the engine for what is served from then on.
    fn grow_held(
        &self,
        geometry: &Geometry,
        (mut session, reply): (Option<NewSession>, &Reply<Grown>),
        served: &ServedImage,
    ) -> Result<ServedImage> {
        let decide = |image: &WritableImage, prepared: &PreparedResize<'_>| {
            let border = prepared.border().map(|(block, _)| block);
            Exchange::claim_room(&mut session, image, geometry, border)?;
            if reply.claim() { Ok(()) } else { Err(left()) }
        };
        let grown = self.exchange.reactor.block_on(served.engine.grow(geometry.virtual_size(), decide));
        let image = match grown {
            Ok(image) => image,
            Err(error) => {
                Exchange::abandon(session);
                return Err(with_remedy(error));
            }
        };
        self.exchange.serve((image, session), served.parents(self.exchange.reactor), served)
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

fn left() -> Error {
    tracing::warn!("the disk keeps its size: the caller has stopped waiting");
    Error::new(Kind::Io, "the caller has stopped waiting")
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
