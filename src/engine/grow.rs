//! The disk of a served image becomes larger, or the image gets another parent, while the fronts are held.
//!
//! The image is frozen and its session at rest: the file has everything, as one at rest has, and changes as
//! one ([`PreparedResize`]). What is returned gets an engine and a session of its own, whose map has the new
//! slots; then the fronts continue with these.
//!
//! Where the host has to fill what comes, as of a fixed image, or of any that may have no holes, that is done
//! before the fronts are held ([`Engine::extend_ahead`]): it takes as long as it takes, and nothing waits.
//!
//! A kill in between leaves the file as it was or as it is to be, and the session at rest. It knows the
//! FileWriteGuid of either, so that a successor takes the file for its own, and serves the size that it
//! finds.

use std::io;
use std::rc::Rc;

use nix::errno::Errno;

use super::allocate::MIN_GROW_STEP_BYTES;
use super::shared::Session;
use super::{Engine, Outcome, errno, for_guest, too_long_is_full};
use crate::disk::Disk;
use crate::error::Result;
use crate::format::MIB;
use crate::format::bat::Geometry;
use crate::format::locator::ParentLocator;
use crate::format::metadata::Metadata;
use crate::image::{Image, PreparedResize, Resize, WritableImage};
use crate::simulation::{Plant, planted};

impl<D: Disk + 'static> Engine<D> {
    /// How many bytes the host has to make room for at once if the disk grows to that of `geometry`: most,
    /// as free space of the file is used first.
    pub fn bytes_ahead(&self, geometry: &Geometry) -> u64 {
        let dense = !self.disk.may_have_holes();
        let blocks = geometry.block_count() - self.shared.geometry().block_count();
        let blocks = if self.shared.fixed { blocks * geometry.block_size() } else { 0 };
        let table = geometry.bat_length().next_multiple_of(MIB);
        let moves = dense && table > self.layout.bat.length;
        blocks + if moves { table } else { 0 }
    }

    /// Extends the file by `bytes`, for which the host makes room, while the fronts are served. `goes_on` is
    /// asked before each step. Until they are used, the bytes are zero and belong to nothing; if the disk
    /// does not grow, [`Self::cut_end`] takes them back.
    ///
    /// # Errors
    /// The host's; [`Errno::ECANCELED`] if it was not to go on.
    pub async fn extend_ahead(self: &Rc<Self>, bytes: u64, goes_on: impl Fn() -> bool) -> Outcome {
        let longest = if self.disk.may_have_holes() { bytes } else { MIN_GROW_STEP_BYTES };
        let (mut left, dense) = (bytes, !self.disk.may_have_holes());
        while left > 0 {
            let turn = self.turns.growth.enter().await;
            if !goes_on() {
                return Err(Errno::ECANCELED);
            }
            let step = left.min(longest);
            let from = self.durability.file_length().next_multiple_of(MIB);
            self.grow_to(from + step).await.map_err(too_long_is_full)?;
            if !dense {
                let reserved = self.disk.reserve(from, step).await;
                reserved.map_err(|error| for_guest(errno(&error)))?;
            }
            drop(turn);
            left -= step;
        }
        Ok(())
    }

    /// Freezes the image, as [`Self::freeze`] does, and notes in the session that the file has everything.
    /// The fronts are held.
    ///
    /// # Errors
    /// Those of [`Self::freeze`].
    pub async fn rest(self: &Rc<Self>) -> Outcome {
        self.freeze().await?;
        self.shared.map.memory().rest();
        Ok(())
    }

    /// Makes the disk of the image, which rests, `virtual_size` bytes long; `decide` is asked before the
    /// first byte is written, with the image as it is and what is prepared. The image is opened again; from
    /// then on this engine must not write it, and [leaves](Self::leave).
    ///
    /// # Errors
    /// Those of [`WritableImage::prepare_resize`] and of `decide`: the image is as it was, and this engine
    /// continues with it. Those of [`PreparedResize::carry_out`]: the session is poisoned then.
    pub async fn grow(
        self: &Rc<Self>,
        virtual_size: u64,
        decide: impl FnOnce(&WritableImage, &PreparedResize<'_>) -> Result<()>,
    ) -> Result<WritableImage> {
        assert_eq!(self.shared.session(), Session::Idle, "a disk grows while its session rests");
        let image = Image::open_for_writing(&self.disk, || self.new_guid()).await?;
        let metadata = Metadata { virtual_size, ..image.metadata.clone() };
        let parent = self.shared.layers().nth(1);
        let parent_bytes = parent.map_or(0, |parent| parent.geometry().virtual_size());
        let zero_from = Some(self.space.borrow().zero_from());
        let change = Resize { metadata, parent_bytes, data_write: Some(self.new_guid()), zero_from };
        let prepared = image.prepare_resize(&self.disk, &change).await?;
        if let Err(error) = decide(&image, &prepared) {
            prepared.give_up(&self.disk).await;
            return Err(error);
        }
        let grown = self.carry_out(&image, prepared, "making the disk larger").await?;
        assert_eq!(grown.metadata.virtual_size, virtual_size, "the disk is as long as was asked");
        Ok(grown.in_session())
    }

    /// Opens the image, which rests, again; `change`, which sees it before, is made of what it says of its
    /// parent. As after [`Self::grow`], this engine must not write it from then on.
    ///
    /// # Errors
    /// Those of `change` and of [`WritableImage::prepare_resize`]: the image is as it was. Those of
    /// [`PreparedResize::carry_out`]: the session is poisoned then.
    pub async fn relink(
        self: &Rc<Self>,
        change: impl FnOnce(&WritableImage, Option<&mut ParentLocator>) -> Result<()>,
    ) -> Result<WritableImage> {
        assert_eq!(self.shared.session(), Session::Idle, "a locator changes while its session rests");
        let image = Image::open_for_writing(&self.disk, || self.new_guid()).await?;
        let mut metadata = image.metadata.clone();
        change(&image, metadata.parent_locator.as_mut())?;
        if metadata == image.metadata {
            return Ok(image.in_session());
        }
        let change = Resize { metadata, parent_bytes: 0, data_write: None, zero_from: None };
        let prepared = image.prepare_resize(&self.disk, &change).await?;
        Ok(self.carry_out(&image, prepared, "changing the parent locator").await?.in_session())
    }

    /// Carries out what is `prepared` for `image`, which rests, under a FileWriteGuid that its session knows.
    async fn carry_out(
        self: &Rc<Self>,
        image: &WritableImage,
        prepared: PreparedResize<'_>,
        doing: &str,
    ) -> Result<WritableImage> {
        let memory = self.shared.map.memory();
        // A header that was refused may be in the file all the same. The session must know its GUID when the
        // announcement takes the place of the one that it is known by.
        memory.confirm_guid(image.header.header.file_write_guid);
        let file_write = self.new_guid();
        if !planted(Plant::UnannouncedGrowth) {
            memory.announce(file_write);
        }
        let carried_out = prepared.carry_out(&self.disk, file_write, || self.new_guid()).await;
        let changed = carried_out.inspect_err(|error| {
            let errno = error.os_error().unwrap_or(Errno::EIO as i32);
            self.poison(doing, &io::Error::from_raw_os_error(errno));
        })?;
        memory.confirm_guid(file_write);
        Ok(changed)
    }
}
