//! A damaged image opened for a device: what is left of it is read, and what is lost fails.
//!
//! The reading is that of the command `salvage`. What the kernel reads of the device is therefore what a copy
//! would have, and an error where the copy's mapfile lists a loss. Nothing is written, and no log is replayed
//! but in memory.

use std::path::Path;
use std::sync::Arc;

use super::claims::Claims;
use super::control::Control;
use super::layers::{Parents, choose_payload_io, refuse_empty};
use super::open_image::{OpenImage, parameters};
use super::options::Salvage;
use crate::disk::{HostFile, ImageFile, Reactor};
use crate::engine::shared::Shared;
use crate::error::{Error, Kind, Locate, Result};
use crate::operations::salvage::{Damaged, Totals};
use crate::printable::human_size;

/// Opens what is left of the image in `file`, and of its parents. Of a device that is served again, `known`
/// are the parents that it had.
///
/// # Errors
///
/// Those of [`Damaged::read`] and of [`Damaged::into_maps`]; [`Kind::Corrupt`] if guesses are needed and not
/// allowed; [`Kind::NotFound`] if a parent that the device had is missing; those of [`Control::open`].
pub fn open(
    file: Arc<ImageFile>,
    parents: &Parents,
    salvage: Salvage,
    known: Option<&[HostFile]>,
) -> Result<OpenImage> {
    let reactor = Reactor::new()?;
    file.read_anew();
    let open = |path: &Path| {
        let parent = (parents.open)(path)?;
        // Its file system may have another number by now.
        let was_read = |known: &[HostFile]| known.iter().any(|file| file.inode == parent.identity().inode);
        if known.is_none_or(was_read) { Ok(parent) } else { Err(new_parent(path)) }
    };
    let damaged = Damaged::read(file, &parents.search, &reactor, open, &Claims)?;
    if known.is_some_and(|known| known.len() + 1 != damaged.image_count()) {
        return Err(lost_parent(&damaged));
    }
    if !salvage.assume {
        damaged.refuse_guesses()?;
    }
    warn_of_losses(&damaged);
    Control::open()?;
    let metadata = damaged.leaf().metadata().clone();
    let file_write_guid = damaged.leaf().file_write_guid().unwrap_or_default();
    refuse_empty(&metadata).file(damaged.path())?;
    let (files, maps): (Vec<_>, Vec<_>) = damaged.into_maps()?.into_iter().unzip();
    let parameters = parameters(files.iter().map(Arc::as_ref), &metadata, true)?;
    for file in &files {
        choose_payload_io(file, &metadata)?;
    }
    let mut maps = maps.into_iter().map(Arc::new);
    let leaf = maps.next().expect("a chain has a leaf");
    Ok(OpenImage {
        shared: Arc::new(Shared::of_chain(leaf, maps.collect(), true, false)),
        parameters,
        file_write_guid,
        disk_id: metadata.disk_id,
        recoverable: true,
        salvage: Some(salvage),
        sync_times: Arc::default(),
        parents: files.into_iter().skip(1).collect(),
    })
}

/// What the user must know before they trust the disk.
fn warn_of_losses(damaged: &Damaged) {
    for (path, note) in damaged.notes() {
        let guess = if note.is_guess { " (a guess)" } else { "" };
        tracing::warn!("{}: {}{guess}: {}", path.display(), note.structure, note.what);
    }
    if let Some(error) = damaged.missing_parent() {
        tracing::warn!("a parent is missing, and what only it has reads as zeros: {error}");
    }
    if let Some(error) = damaged.left_session() {
        tracing::warn!("a session is left: {error}");
    }
    let Totals { lost_bytes, unknown_bytes, .. } = damaged.totals();
    if lost_bytes + unknown_bytes > 0 {
        let (lost, unknown) = (human_size(lost_bytes), human_size(unknown_bytes));
        tracing::warn!("of the disk, {lost} are lost, and reads of them fail; {unknown} are not known");
    }
}

/// A parent that has come back would change what a mounted file system reads.
fn new_parent(path: &Path) -> Error {
    let message = "it is a parent of the image, and was missing when the device was added";
    Error::new(Kind::NotFound, message).file(path).remedy("to use it, delete the device and add it again")
}

fn lost_parent(damaged: &Damaged) -> Error {
    let why = damaged.missing_parent().map(|error| format!(": {error}")).unwrap_or_default();
    let message = format!("a parent is missing that the device had{why}");
    Error::new(Kind::NotFound, message)
        .file(damaged.path())
        .remedy("move the parent back; or `vhdx-ublk recover --accept-loss` serves the disk without it")
}
