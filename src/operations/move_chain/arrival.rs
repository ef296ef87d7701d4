//! How an image gets to its new place.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::likeness::is_alike;
use super::{Moving, Traveller, naming};
use crate::disk::{
    Access, Disk, HostFile, ImageFile, Links, PAGE_BYTES, PlainDisk, Reactor, ReadDisk, Unfinished,
};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::format::{MIB, index};
use crate::operations::{Devices, locked};
use crate::printable::human_size;

/// All permissions that a file has.
const EVERYTHING: u32 = 0o777;

/// How much is copied at once, bytes.
const WINDOW_BYTES: u64 = 4 * MIB;

/// What is at the new place of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrival {
    /// Nothing yet.
    Missing,
    /// The file itself, under another name or the only one.
    Same,
    /// A copy.
    Copied,
}

impl Arrival {
    /// What is there now. Anything but the image itself, or a copy that a move has left, is refused.
    pub(super) fn of(traveller: &Traveller, reactor: &Reactor, devices: &dyn Devices) -> Result<Self> {
        let path = traveller.to.path();
        if traveller.stays {
            return Ok(Self::Same);
        }
        let found = match fs::symlink_metadata(path) {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::Missing),
            Err(error) => return Err(Error::io("looking for the file", error).file(path)),
        };
        if HostFile::of(&found) == traveller.member.file.identity() && found.nlink() >= 2 {
            return Ok(Self::Same);
        }
        let there = found.is_file().then(|| locked::open(reactor, path, Access::ReadOnly, devices));
        match there.transpose() {
            Ok(Some(there)) if is_alike(&traveller.member, &there, reactor)? => Ok(Self::Copied),
            Err(error) if error.kind() == Kind::InUse => Err(error),
            _ => {
                let message = "another file has the name in the folder";
                let error = Error::new(Kind::Exists, message).file(path);
                Err(error.remedy("move that file away, or choose another folder"))
            }
        }
    }
}

impl Arrival {
    /// Makes sure that what is at the new place stays there.
    pub(super) fn make_durable(self, traveller: &Traveller) -> Result<()> {
        let path = traveller.to.path();
        assert!(self != Self::Missing, "{} has arrived", path.display());
        if self == Self::Copied {
            let copy = PlainDisk::open(path, Links::Refuse)?.0;
            copy.file().sync_all().doing("syncing the copy").file(path)?;
        }
        traveller.to.sync()
    }
}

/// The room that copies need which are still to be made.
pub(super) struct Room {
    bytes: u64,
}

impl Room {
    pub(super) fn needed(travellers: &[Traveller], arrivals: &[Arrival], folder: &Path) -> Result<Self> {
        let host = HostFile::at(folder).doing("finding the folder").file(folder)?.device;
        let mut bytes = 0;
        for (traveller, arrival) in travellers.iter().zip(arrivals) {
            let file = &traveller.member.file;
            if *arrival == Arrival::Missing && file.identity().device != host {
                bytes += host_bytes(file)?;
            }
        }
        Ok(Self { bytes })
    }

    /// Refuses what cannot succeed, before the first copy.
    fn require(&self, target: &ImageFile) -> Result<()> {
        let room = target.host_room().doing("reading the free space of the file system")?;
        let reserved = if nix::unistd::geteuid().is_root() { room.reserved_bytes } else { 0 };
        let available = room.available_bytes.saturating_add(reserved);
        // Some file systems do not say; the copy will.
        if available == 0 || available >= self.bytes {
            return Ok(());
        }
        let message = format!(
            "the folder's file system has {} free, and {} more are needed",
            human_size(available),
            human_size(self.bytes - available)
        );
        Err(Error::new(Kind::NoSpace, message).file(target.path()).remedy("free space there"))
    }
}

/// Brings the image to its new place, at which its parent will be in the file `parent`.
pub(super) fn arrive(
    traveller: &Traveller,
    parent: Option<&Path>,
    reactor: &Reactor,
    room: &mut Room,
    moving: &impl Moving,
) -> Result<Arrival> {
    let Traveller { member, from, to, .. } = traveller;
    if from.link(&member.file, to)? {
        return Ok(Arrival::Same);
    }
    let unfinished = Unfinished::default();
    let beside = to.beside(format!(".vhdx-ublk-{}.tmp", Uuid::new_v4().simple()).as_ref())?;
    let file = unfinished.create(beside)?;
    moving.unfinished(unfinished.remover());
    if rustix::fs::ioctl_ficlone(&*file, &*member.file).is_err() {
        room.require(&file)?;
        let copied = reactor.block_on(copy(&member.file, &file, reactor, moving)).file(to.path());
        copied.map_err(|error| match error.kind() {
            Kind::NoSpace => {
                error.remedy("the chain is complete at its old place: free space, and move again")
            }
            _ => error,
        })?;
    }
    if let Some(parent) = parent {
        naming::amend(&file, naming::locator(member, to.path(), parent, None)?, reactor)?;
    }
    let synced = reactor.block_on(reactor.disk(Arc::clone(&file)).sync());
    synced.doing("syncing the copy").file(to.path())?;
    file.resemble(&member.file, EVERYTHING)?;
    unfinished.name(to)?;
    room.bytes = room.bytes.saturating_sub(host_bytes(&member.file)?);
    Ok(Arrival::Copied)
}

fn host_bytes(file: &ImageFile) -> Result<u64> {
    file.host_bytes().doing("reading the attributes of the image").file(file.path())
}

/// Copies a file. What the host does not store of it is not written.
async fn copy(
    from: &Arc<ImageFile>,
    to: &Arc<ImageFile>,
    reactor: &Reactor,
    moving: &impl Moving,
) -> Result<()> {
    const READING: &str = "reading the image";
    let page = PAGE_BYTES as u64;
    let (source, target) = (reactor.disk(from.clone()), reactor.disk(to.clone()));
    let length = source.length().await.doing(READING)?.next_multiple_of(page);
    target.grow(length).await.doing("extending the copy")?;
    // Some hosts do not know of data that they have not written yet.
    source.sync().await.doing("syncing the image")?;
    let mut at = 0;
    while let Some(data) = from.next_data(at).doing(READING)?.filter(|&data| data < length) {
        if moving.stop_requested() {
            let error = Error::new(Kind::Stopped, "the move was stopped");
            return Err(error.remedy("the chain is complete at its old place; the same command moves it"));
        }
        at = data - data % page;
        let stored = from.next_hole(data).doing(READING)?;
        let end = stored.max(data + 1).min(at + WINDOW_BYTES).next_multiple_of(page).min(length);
        assert!(at < end && end <= length, "bytes {at} to {end} of {length}");
        let bytes = source.read(at, index(end - at)).await.doing(READING)?;
        target.write(at, bytes).await.doing("writing the copy")?;
        at = end;
        moving.progress(at, length);
    }
    Ok(())
}
