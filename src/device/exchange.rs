//! The image that a device serves, its engine and its session give way to others while requests wait.

use std::rc::Rc;
use std::time::Instant;

use super::fronts::{FrontInbox, Mailboxes};
use super::layers::EngineParents;
use super::leaf_handover::{Leaf, LeafHandover};
use super::served_image::{ServedImage, open_served};
use super::session::{FoundSession, place_of};
use super::writable::WritableOpener;
use crate::disk::Reactor;
use crate::error::{Doing, Error, Result};
use crate::format::bat::Geometry;
use crate::image::{Place, WritableImage};

/// What the engine's thread needs for it.
pub(super) struct Exchange<'a> {
    pub(super) reactor: &'a Reactor,
    pub(super) opener: &'a WritableOpener,
    pub(super) inbox: &'a Rc<FrontInbox>,
    pub(super) fronts: &'a Rc<Mailboxes>,
    pub(super) handover: &'a LeafHandover,
}

/// A session that is to take the place of another, and where its image is.
pub(super) type NewSession = (FoundSession, Place);

impl Exchange<'_> {
    /// Commits dirty metadata, so that the pause is short, and makes a session for a map of `geometry`, which
    /// has no name yet.
    pub(super) fn prepare(&self, geometry: &Geometry, served: &ServedImage) -> Result<Option<NewSession>> {
        let flushed = self.reactor.block_on(served.engine.flush());
        served.check("committing dirty metadata", flushed)?;
        if served.session.is_none() {
            return Ok(None);
        }
        let place = place_of(&served.file)?;
        let made = self.opener.sessions.create(&place, served.opened.disk_id, geometry);
        Ok(Some((made.map_err(without_session)?, place)))
    }

    /// Claims the room of a new session of `image`: from now on nothing of it fails for want of any.
    /// `border` is the block whose sector bitmap changes with the map.
    pub(super) fn claim_room(
        session: &mut Option<NewSession>,
        image: &WritableImage,
        geometry: &Geometry,
        border: Option<u64>,
    ) -> Result<()> {
        let Some(((file, memory), _)) = session else { return Ok(()) };
        let reserved = image.reserve_bitmaps(memory, geometry, border);
        reserved.doing("reserving room for the sector bitmaps").map_err(without_session)?;
        file.stand_by()
    }

    /// Removes a session that takes no place.
    pub(super) fn abandon(session: Option<NewSession>) {
        let abandoned = session.map_or(Ok(()), |((file, _), _)| file.abandon());
        abandoned.unwrap_or_else(|error| tracing::warn!("{error:#}"));
    }

    /// Holds the fronts, has `next` decide what is served from now on, and lets them continue with that, or
    /// with what they had if it fails. What was served before, and how long requests had to wait, in
    /// microseconds.
    pub(super) fn run<E>(
        &self,
        served: &mut ServedImage,
        next: impl FnOnce(&ServedImage) -> std::result::Result<ServedImage, E>,
    ) -> std::result::Result<(ServedImage, u64), E> {
        let started = Instant::now();
        self.inbox.hold(self.reactor, self.fronts);
        let next = next(served);
        if let Ok(next) = &next {
            let shared = next.engine.shared().clone();
            shared.activity().continue_from(served.engine.shared().activity());
            self.handover.set(Leaf { shared, files: next.files() });
            self.inbox.change_engine(next.engine.clone());
        }
        self.fronts.release();
        let pause_us = u64::try_from(started.elapsed().as_micros()).expect("years are below 2^64");
        Ok((std::mem::replace(served, next?), pause_us))
    }

    /// The image of what is `served`, which has changed while it rested, with its new session and an engine
    /// of its own. The old engine does not fit the file any longer: a failure poisons.
    pub(super) fn serve(
        &self,
        (image, session): (WritableImage, Option<NewSession>),
        parents: EngineParents,
        served: &ServedImage,
    ) -> Result<ServedImage> {
        self.try_to_serve((image, session), parents, served).inspect_err(|_| {
            served.engine.shared().poison();
        })
    }

    fn try_to_serve(
        &self,
        (mut image, session): (WritableImage, Option<NewSession>),
        parents: EngineParents,
        served: &ServedImage,
    ) -> Result<ServedImage> {
        let file = served.file.clone();
        self.reactor.block_on(image.read_bitmaps(&self.reactor.disk(file.clone())))?;
        let mut parameters = served.opened.parameters;
        parameters.size_bytes = image.metadata.virtual_size;
        let session = match session {
            Some(((mut session, memory), place)) => {
                let owner = image.owner(place);
                image.start_session(memory, &owner).doing("reserving room for the sector bitmaps")?;
                if served.engine.shared().map.memory().used_page_cache() {
                    image.map.memory().note_page_cache();
                }
                session.publish()?;
                Some(session)
            }
            None => None,
        };
        open_served(self.reactor, self.fronts, file, image, session, parents, parameters)
    }
}

fn without_session(error: Error) -> Error {
    error.remedy("make room under /run: the device would no longer be recoverable without a session")
}
