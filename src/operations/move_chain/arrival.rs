//! How an image gets to its new place.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::{Moving, Traveller};
use crate::disk::{Access, HostFile, ImageFile, Links, PlainDisk, Reactor, taken};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::operations::duplicate::Duplicate;
use crate::operations::likeness::is_alike;
use crate::operations::{Devices, locked};
use crate::simulation::{Plant, planted};

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
            Ok(Some(there))
                if planted(Plant::TrustStranger) || is_alike(&traveller.member, &there, reactor)? =>
            {
                Ok(Self::Copied)
            }
            Err(error) if error.kind() == Kind::InUse => Err(error),
            _ => Err(taken(path).remedy("move that file away, or choose another folder")),
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
    let made = Duplicate { of: member, at: to, like: member, parent, needed: room.bytes };
    let made = made.make(reactor, moving);
    made.map_err(|error| match error.kind() {
        Kind::NoSpace => error.remedy("the chain is complete at its old place: free space, and move again"),
        Kind::Stopped => error.remedy("the chain is complete at its old place; the same command moves it"),
        _ => error,
    })?;
    room.bytes = room.bytes.saturating_sub(host_bytes(&member.file)?);
    Ok(Arrival::Copied)
}

fn host_bytes(file: &ImageFile) -> Result<u64> {
    file.host_bytes().doing("reading the attributes of the image").file(file.path())
}
