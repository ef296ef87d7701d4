//! Moving a chain to another folder.
//!
//! Each step is durable before the next, and the chain opens at one place or the other at every moment:
//!
//! 1. every image gets its name in the folder, the lowest first: a second name of the same file, or where the
//!    host cannot do that, a copy. A copy names its parent in the folder before it gets its name;
//! 2. a child with two names is made to name its parent at both places, by a relative path the one in the
//!    folder, by an absolute path the old one. Both places are complete now;
//! 3. the old names are removed, the lowest first: what still has its old name leads to all others that do,
//!    so that a second run finds them;
//! 4. the absolute paths to the old place are removed.
//!
//! A second run takes what is in the folder for its own only if it is the same file, or has the same
//! content, byte by byte; that is made durable, and the move finished.

mod arrival;
mod neighbours;

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::inspect::identify;
use super::{Devices, Watch, locked, naming, replaced};
use crate::chain::{self, Layer, Member, Search};
use crate::disk::{Access, HostFile, Place, Reactor, Unfinished, folder_of};

use crate::error::{Error, Kind, Result};
use crate::printable::shell;
use crate::simulation::{Plant, planted};
use arrival::{Arrival, Room};

/// A step of a move that is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// The image has its new name.
    Arrived(&'a Path),
    /// The image has lost its old name.
    Removed(&'a Path),
    /// The image names its parent as it is to.
    Relinked(&'a Path),
}

/// Watches a move.
pub trait Moving: Watch {
    /// A step is done.
    ///
    /// # Errors
    ///
    /// Any, which ends the move.
    fn done(&self, step: Step<'_>) -> Result<()>;
}

/// An image of the chain, locked for writing, and both of its places.
struct Traveller {
    member: Member,
    from: Place,
    to: Place,
    /// It is in the folder already.
    stays: bool,
}

impl Traveller {
    fn new(member: Member, folder: &Path) -> Result<Self> {
        let from = Place::of_file(&member.file)?;
        let name = member.path().file_name().expect("an image has a name");
        let to = Place::of(&folder.join(name))?;
        Ok(Self { member, from, to, stays: false })
    }
}

/// Finds out which of `travellers` are in the folder already. One folder can have several paths, by mounts or
/// over a network: a new name that appears in both is in one folder, and an image there has one name only.
fn find_staying(travellers: &mut [Traveller]) -> Result<()> {
    let name = format!(".vhdx-ublk-{}.tmp", Uuid::new_v4().simple());
    let probe = Unfinished::default();
    probe.create(travellers[0].to.beside(name.as_ref())?)?;
    for traveller in travellers {
        traveller.stays = traveller.from.beside(name.as_ref())?.is_taken()?;
    }
    Ok(())
}

/// What moves, and where.
pub struct Request {
    /// The image whose chain moves.
    pub leaf: PathBuf,
    /// Where it moves to.
    pub folder: PathBuf,
    /// Its parents in other folders than its own, each of which must be named.
    pub parents: Vec<PathBuf>,
}

impl Request {
    /// An image may name a parent anywhere. What is taken from outside of its own folder is what the user has
    /// named, and nothing else.
    fn refuse_unnamed(&self, travellers: &[Traveller]) -> Result<()> {
        let leaf = travellers[0].from.path();
        for Traveller { member, from, .. } in travellers.iter().filter(|traveller| !traveller.stays) {
            let mut named = self.parents.iter().filter_map(|named| HostFile::at(named).ok());
            if folder_of(from.path()) == folder_of(leaf) || named.any(|named| named == member.file.identity())
            {
                continue;
            }
            let message =
                format!("{} would move, is in another folder and was not named", from.path().display());
            let remedy = format!("if that is intended, name it: --parent {}", shell(from.path()));
            return Err(Error::new(Kind::Usage, message).file(leaf).remedy(remedy));
        }
        Ok(())
    }
}

/// Moves what `request` says; the image's new path.
///
/// # Errors
///
/// Before anything has changed: those of finding and locking the chain; [`Kind::InUse`] if another image
/// would lose its parent; [`Kind::Exists`] if a name is taken in the folder; [`Kind::NoSpace`]. Later:
/// errors of the host, [`Kind::Stopped`], those of `moving`. The same move again finishes it.
pub fn move_chain(request: &Request, devices: &dyn Devices, moving: &impl Moving) -> Result<PathBuf> {
    let Request { leaf, folder, .. } = request;
    let folder = replaced::folder(folder)?;
    // The user may have named a link.
    let named = leaf.canonicalize();
    let name = named.as_deref().unwrap_or(leaf).file_name();
    let name =
        name.ok_or_else(|| Error::new(Kind::Usage, "the path ends in no name of a file").file(leaf))?;
    let new_leaf = folder.join(name);
    match named {
        // All old names are gone: what is left is step 4.
        Err(error) if error.kind() == ErrorKind::NotFound && new_leaf.exists() => {
            tracing::warn!("{}: it is not there; {} is", leaf.display(), new_leaf.display());
        }
        _ => move_files(request, &folder, &new_leaf, devices, moving)?,
    }
    let (reactor, paths) = (Reactor::new()?, chain_in(&new_leaf, &folder)?);
    for pair in paths.windows(2) {
        let child = locked::open(&reactor, &pair[0], Access::ReadWrite, devices)?;
        if naming::has_old_path(&child) && naming::name_parent(&child, &pair[0], &pair[1], None, &reactor)? {
            moving.done(Step::Relinked(&pair[0]))?;
        }
    }
    Ok(new_leaf)
}

/// Steps 1 to 3.
fn move_files(
    request: &Request,
    folder: &Path,
    new_leaf: &Path,
    devices: &dyn Devices,
    moving: &impl Moving,
) -> Result<()> {
    let reactor = Reactor::new()?;
    let mut travellers = find(&request.leaf, folder, new_leaf, &reactor, devices)?;
    find_staying(&mut travellers)?;
    request.refuse_unnamed(&travellers)?;
    neighbours::refuse_children(&travellers, devices)?;
    let mut arrivals = Vec::new();
    for traveller in &travellers {
        arrivals.push(Arrival::of(traveller, &reactor, devices)?);
    }
    for pair in travellers.windows(2) {
        let (child, parent) = (&pair[0], &pair[1]);
        naming::locator(&child.member, child.to.path(), parent.to.path(), old_place(child, parent))?;
    }
    let mut room = Room::needed(&travellers, &arrivals, folder)?;
    for (number, traveller) in travellers.iter().enumerate().rev() {
        if arrivals[number] == Arrival::Missing {
            let parent = travellers.get(number + 1).map(|parent| parent.to.path());
            arrivals[number] = arrival::arrive(traveller, parent, &reactor, &mut room, moving)?;
            moving.done(Step::Arrived(traveller.to.path()))?;
        }
    }
    for (pair, arrival) in travellers.windows(2).zip(&arrivals) {
        let (child, parent) = (&pair[0], &pair[1]);
        let old = old_place(child, parent);
        if *arrival == Arrival::Same
            && !planted(Plant::SkipMoveRelink)
            && naming::name_parent(&child.member, child.to.path(), parent.to.path(), old, &reactor)?
        {
            moving.done(Step::Relinked(child.to.path()))?;
        }
    }
    // The new place is looked at as its readers will, before the old one goes.
    let paths = chain_in(new_leaf, folder)?;
    if let Some(missing) =
        travellers.iter().find(|traveller| !paths.iter().any(|path| path == traveller.to.path()))
    {
        let message = "it is not in the chain that was moved";
        return Err(Error::new(Kind::Mismatch, message).file(missing.to.path()));
    }
    // A second run may find what the first has not made durable.
    for (traveller, arrival) in travellers.iter().zip(&arrivals).filter(|(traveller, _)| !traveller.stays) {
        arrival.make_durable(traveller)?;
    }
    if planted(Plant::RemoveLeafFirst) {
        travellers.reverse();
    }
    for traveller in travellers.iter().rev().filter(|traveller| !traveller.stays) {
        traveller.from.remove(&traveller.member.file)?;
        moving.done(Step::Removed(traveller.from.path()))?;
    }
    Ok(())
}

/// The place that `child` is to name beside the new one of its `parent`. Side by side at both places, one
/// path leads to both.
fn old_place<'a>(child: &Traveller, parent: &'a Traveller) -> Option<&'a Path> {
    (folder_of(child.from.path()) != folder_of(parent.from.path())).then_some(parent.from.path())
}

/// The images of the chain that still have their old names, the leaf first, locked. Where the old chain ends
/// early, a move has removed the rest: the folder has all of it then.
fn find(
    leaf: &Path,
    folder: &Path,
    new_leaf: &Path,
    reactor: &Reactor,
    devices: &dyn Devices,
) -> Result<Vec<Traveller>> {
    let open = |path: &Path| locked::open(reactor, path, Access::ReadWrite, devices);
    let named = leaf;
    let leaf = open(named)?;
    replaced::refuse_foreign_links(named, &leaf.file)?;
    let mut members = Vec::new();
    let followed = chain::follow_parents(&leaf, &Search::default(), &mut members, open);
    members.insert(0, leaf);
    let travellers = members.into_iter().map(|member| Traveller::new(member, folder));
    let travellers = travellers.collect::<Result<Vec<_>>>()?;
    for (number, traveller) in travellers.iter().enumerate() {
        if travellers[..number].iter().any(|other| other.to.path() == traveller.to.path()) {
            let message =
                format!("another image of the chain has the name, too: {}", traveller.to.path().display());
            let error = Error::new(Kind::Exists, message).file(traveller.from.path());
            return Err(error.remedy("rename one of them, and relink its child"));
        }
    }
    let have_arrived = || {
        let complete = chain_in(new_leaf, folder).is_ok();
        complete && travellers.iter().all(|traveller| traveller.to.path().exists())
    };
    match followed {
        Err(error) if error.kind() != Kind::NotFound || !have_arrived() => Err(error),
        _ => Ok(travellers),
    }
}

/// The images of the chain of `leaf`, all of which must be in `folder`.
fn chain_in(leaf: &Path, folder: &Path) -> Result<Vec<PathBuf>> {
    let leaf = identify(leaf)?;
    let parents = chain::open_parents(&leaf, &Search::default(), identify)?;
    let paths: Vec<PathBuf> = std::iter::once(leaf).chain(parents).map(|image| image.path).collect();
    match paths.iter().find(|path| folder_of(path) != folder) {
        None => Ok(paths),
        Some(elsewhere) => {
            let message = format!("it is in the chain, and not in {}", folder.display());
            Err(Error::new(Kind::Mismatch, message).file(elsewhere))
        }
    }
}
