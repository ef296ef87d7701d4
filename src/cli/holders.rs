//! Who has an image, in words for people. Best effort: who may not look is told less.

use std::fs;
use std::path::{Path, PathBuf};

use vhdx_ublk::chain::{self, Relative, Search};
use vhdx_ublk::device::registry::{Entry, FileId, Listed, RUN_DIRECTORY, Registry, State, Survey};
use vhdx_ublk::device::stop::{self, Target};
use vhdx_ublk::device::usage;
use vhdx_ublk::disk::{Access, ImageFile};
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::printable::shell;

use super::look;

/// Our devices that have an entry, in the order of their numbers. Nothing is changed.
///
/// # Errors
///
/// When the caller may not look, or the registry cannot be read.
pub fn devices() -> Result<Vec<Listed>> {
    survey().map(|survey| survey.devices)
}

/// All that is known of our devices. Nothing is changed.
///
/// # Errors
///
/// As [`devices`].
pub fn survey() -> Result<Survey> {
    match registry()? {
        Some(registry) => registry.survey(),
        None => Ok(Survey::default()),
    }
}

/// The registry, if there is one.
///
/// # Errors
///
/// When the caller may not look.
pub fn registry() -> Result<Option<Registry>> {
    if !Path::new(RUN_DIRECTORY).exists() {
        return Ok(None);
    }
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::new(Kind::Permission, "only root sees the devices").remedy("run it as root"));
    }
    Registry::open().map(Some)
}

/// The device of ours that `target` names.
///
/// # Errors
///
/// As [`stop::find`], and when the caller may not look.
pub fn find(target: &Target) -> Result<Listed> {
    let registry = registry()?.ok_or_else(|| nothing_serves(target))?;
    stop::find(&registry, target)
}

/// There is no device of ours at all, so `target` names none.
pub fn nothing_serves(target: &Target) -> Error {
    Error::new(Kind::NotFound, format!("{target}: there are no devices of this program"))
        .remedy("vhdx-ublk list")
}

/// The device that serves the file at `path`, and will go on to.
pub fn device_of(path: &Path) -> Option<PathBuf> {
    let file = FileId::of(&fs::metadata(path).ok()?);
    let stays = |state| !matches!(state, State::Stopping | State::Dead | State::Failed);
    let mut devices = devices().ok()?.into_iter();
    let listed = devices.find(|listed| listed.entry.image_file == file && stays(listed.state))?;
    Some(listed.entry.device)
}

/// The device that serves a child of the file at `path`.
fn child_of(path: &Path) -> Option<PathBuf> {
    let file = FileId::of(&fs::metadata(path).ok()?);
    let listed = devices().ok()?.into_iter().find(|listed| listed.entry.reads(file))?;
    Some(listed.entry.device)
}

/// Whether a living daemon of ours serves the file at `path`, or a child of it, and will go on to.
pub fn is_served(path: &Path) -> bool {
    let Ok(file) = fs::metadata(path).map(|found| FileId::of(&found)) else { return false };
    let serves = |listed: &Listed| {
        listed.entry.reads(file) && listed.state == State::Live && listed.entry.daemon.is_alive()
    };
    devices().is_ok_and(|devices| devices.iter().any(serves))
}

/// Refuses the opened `image` if a device of ours waits for its daemon to be replaced: what was acknowledged is
/// not in the file alone, and its disk must not change meanwhile. The lock is free then.
///
/// # Errors
///
/// [`Kind::InUse`], with the ways out; when it cannot be told.
pub fn refuse_abandoned(image: &ImageFile, access: Access) -> Result<()> {
    // The path may name another file by now.
    let file = FileId::of_image(image);
    let both_read = |listed: &Listed| listed.entry.read_only && access == Access::ReadOnly;
    let concerns =
        |listed: &Listed| listed.may_be_abandoned() && !both_read(listed) && listed.entry.reads(file);
    let Some(listed) = devices()?.into_iter().find(concerns) else { return Ok(()) };
    let device = listed.entry.device.display();
    let remedy =
        format!("`vhdx-ublk recover {device}` goes on with it, `vhdx-ublk del {device}` takes it away");
    let message = if listed.is_abandoned() {
        format!("the image belongs to {device}, whose daemon was killed")
    } else {
        format!("the image belongs to {device}, and whether that is served cannot be seen from here")
    };
    Err(Error::new(Kind::InUse, message).file(image.path()).remedy(remedy))
}

/// The images that were made of `image`, as it is now: those beside it, and those that devices of ours have as its
/// children, wherever they are.
pub fn children(image: &dyn Relative, search: &Search) -> Vec<PathBuf> {
    let mut found = chain::children_beside(image, search, look::identify_neighbour);
    let is_child =
        |path: &PathBuf| look::identify_unlocked(path).is_ok_and(|child| chain::is_made_of(&child, image));
    for path in served_children(image.path()).into_iter().filter(is_child) {
        if !found.contains(&path) {
            found.push(path);
        }
    }
    found
}

/// The images that devices of ours read through the file at `path`.
fn served_children(path: &Path) -> Vec<PathBuf> {
    let entries = devices().unwrap_or_default().into_iter().map(|listed| listed.entry);
    let child_in = |entry: Entry| {
        let parent = entry.parents.iter().position(|parent| parent == path)?;
        Some(if parent == 0 { entry.image } else { entry.parents[parent - 1].clone() })
    };
    entries.filter_map(child_in).collect()
}

/// Refuses to write to the image at `path`, unless the user insists, if there are images that were made of it.
///
/// # Errors
///
/// [`Kind::InUse`] if there are, and not `force`; what is wrong with the image.
pub fn refuse_parent(path: &Path, search: &Search, force: bool) -> Result<()> {
    let image = look::identify_unlocked(path)?;
    let children: Vec<String> =
        children(&image, search).iter().map(|child| child.display().to_string()).collect();
    if children.is_empty() {
        return Ok(());
    }
    let children = children.join(", ");
    if force {
        tracing::warn!(
            "{}: it is the parent of {children}: the first write makes that unreadable",
            path.display()
        );
        return Ok(());
    }
    let message = format!("it is the parent of {children}: writing to it would make that unreadable");
    let remedy = format!(
        "add a child instead (`vhdx-ublk create --parent {0} CHILD.vhdx`), add it with --read-only, or with --force",
        shell(path)
    );
    Err(Error::new(Kind::InUse, message).file(path).remedy(remedy))
}

/// Which processes have the file at `path` open: `open in fio (pid 123)`.
pub fn processes(path: &Path) -> Vec<String> {
    fs::metadata(path).map(|found| usage::of_file(FileId::of(&found))).unwrap_or_default()
}

/// Says who has the image at `path`, if that is what is wrong.
pub fn explain(error: Error, path: &Path) -> Error {
    if error.kind() != Kind::InUse || error.remedy_text().is_some() {
        return error;
    }
    // A device that waits for its daemon holds nothing.
    let served = is_served(path);
    if let Some(device) = device_of(path).filter(|_| served) {
        let device = device.display();
        return error.remedy(format!("it is {device} already; `vhdx-ublk del {device}` takes that away"));
    }
    if let Some(device) = child_of(path).filter(|_| served) {
        let device = device.display();
        return error.remedy(format!(
            "{device} reads it, as a parent of its image; `vhdx-ublk del {device}` takes that away"
        ));
    }
    let processes = processes(path);
    if processes.is_empty() {
        return error.remedy(format!("find out who has it: lslocks, or fuser -v {}", shell(path)));
    }
    error.remedy(format!("end its use first: it is {}", processes.join(", ")))
}
