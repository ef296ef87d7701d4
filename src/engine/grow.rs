//! The disk of a served image becomes larger, while the fronts are held.
//!
//! The image is frozen and its session at rest: the file has everything, as one at rest has, and grows as one
//! ([`PreparedResize`]). What is returned gets an engine and a session of its own, whose map has the new
//! slots; then the fronts continue with these.
//!
//! A kill in between leaves the file at either size and the session at rest. It knows the FileWriteGuid of
//! either, so that a successor takes the file for its own, and serves the size that it finds.

use std::io;
use std::rc::Rc;

use nix::errno::Errno;

use super::shared::Session;
use super::{Engine, Outcome};
use crate::disk::Disk;
use crate::error::Result;
use crate::format::metadata::Metadata;
use crate::image::{Image, PreparedResize, Resize, WritableImage};
use crate::simulation::{Plant, planted};

impl<D: Disk + 'static> Engine<D> {
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
        let memory = self.shared.map.memory();
        let image = Image::open_for_writing(&self.disk, || self.new_guid()).await?;
        let metadata = Metadata { virtual_size, ..image.metadata.clone() };
        let parent = self.shared.layers().nth(1);
        let parent_bytes = parent.map_or(0, |parent| parent.geometry().virtual_size());
        let change = Resize { metadata, parent_bytes, data_write: Some(self.new_guid()) };
        let prepared = image.prepare_resize(&self.disk, &change).await?;
        if let Err(error) = decide(&image, &prepared) {
            prepared.give_up(&self.disk).await;
            return Err(error);
        }
        // A header that was refused may be in the file all the same. The session must know its GUID when the
        // announcement takes the place of the one that it is known by.
        memory.confirm_guid(image.header.header.file_write_guid);
        let file_write = self.new_guid();
        if !planted(Plant::UnannouncedGrowth) {
            memory.announce(file_write);
        }
        let carried_out = prepared.carry_out(&self.disk, file_write, || self.new_guid()).await;
        let grown = carried_out.inspect_err(|error| {
            let errno = error.os_error().unwrap_or(Errno::EIO as i32);
            self.poison("making the disk larger", &io::Error::from_raw_os_error(errno));
        })?;
        memory.confirm_guid(file_write);
        assert_eq!(grown.metadata.virtual_size, virtual_size, "the disk is as long as was asked");
        Ok(grown.in_session())
    }
}
