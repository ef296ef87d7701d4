//! Which of the machine's devices have an image, or a claim to one.

use std::fs;
use std::path::{Path, PathBuf};

use super::registry::{Entry, Listed, RUN_DIRECTORY, Registry, State};
use super::stop::{self, Target};
use super::{session, usage};
use crate::disk::{Access, HostFile, ImageFile};
use crate::error::{Error, Kind, Locate, Result};
use crate::image::Image;
use crate::machine;
use crate::operations::Devices;
use crate::printable::shell;

/// The registry, if there is one. Nothing is changed.
///
/// # Errors
///
/// When the caller may not read it.
pub fn registry() -> Result<Option<Registry>> {
    registry_or("only root can list the devices")
}

/// The registry; for a user who may not read it, this message.
fn registry_or(refusal: &str) -> Result<Option<Registry>> {
    if !machine::run_folder(RUN_DIRECTORY).exists() {
        return Ok(None);
    }
    if !nix::unistd::geteuid().is_root() && machine::folder().is_none() {
        return Err(Error::new(Kind::Permission, refusal).remedy("run the command as root"));
    }
    Registry::open().map(Some)
}

/// The devices that have an entry, in the order of their numbers. Nothing is changed.
///
/// # Errors
///
/// When the caller may not read the registry, or it cannot be read.
pub fn devices() -> Result<Vec<Listed>> {
    registry()?.map_or(Ok(Vec::new()), |registry| Ok(registry.survey()?.devices))
}

/// Why a command that makes devices is refused.
pub const DEVICES_NEED_ROOT: &str = "devices need root";

/// Fails with `refusal` unless this process has the rights that devices need.
///
/// # Errors
///
/// [`Kind::Permission`].
pub fn require_root(refusal: &str) -> Result<()> {
    if nix::unistd::geteuid().is_root() || machine::folder().is_some() {
        return Ok(());
    }
    Err(Error::new(Kind::Permission, refusal).remedy("run the command as root"))
}

/// The device that `target` names.
///
/// # Errors
///
/// As [`stop::find`], and when the caller may not read the registry.
pub fn find(target: &Target) -> Result<Listed> {
    let registry = registry()?.ok_or_else(|| no_devices(target))?;
    stop::find(&registry, target)
}

/// The error of a command that names `target` on a machine without devices.
pub fn no_devices(target: &Target) -> Error {
    Error::new(Kind::NotFound, format!("{target}: this program has no devices")).remedy("vhdx-ublk list")
}

/// The device that serves the file at `path` and is not being removed.
pub fn device_of(path: &Path) -> Option<PathBuf> {
    served(path).map(|entry| entry.device)
}

/// The entry of the device that serves the file at `path` and is not being removed.
pub fn served(path: &Path) -> Option<Entry> {
    let stays = |state| !matches!(state, State::Stopping | State::Dead | State::Failed);
    entry_with(path, |listed, file| listed.entry.image_file == file && stays(listed.state))
}

/// The first device that has to do with the file at `path`.
fn entry_with(path: &Path, is_it: impl Fn(&Listed, HostFile) -> bool) -> Option<Entry> {
    let file = HostFile::at(path).ok()?;
    devices().ok()?.into_iter().find(|listed| is_it(listed, file)).map(|listed| listed.entry)
}

/// Which processes have the file at `path` open: `open in fio (pid 123)`. Only root sees all of them.
pub fn processes(path: &Path) -> Vec<String> {
    fs::metadata(path).map(|found| usage::of_file(HostFile::of(&found))).unwrap_or_default()
}

/// The devices that the registry knows of.
pub struct Claims;

impl Devices for Claims {
    fn serve(&self, path: &Path) -> bool {
        entry_with(path, |Listed { entry, state }, file| {
            entry.reads(file) && *state == State::Live && entry.daemon.is_alive()
        })
        .is_some()
    }

    fn children(&self, path: &Path) -> Vec<PathBuf> {
        let child_in = |Entry { image, parents, .. }: Entry| {
            let parent = parents.iter().position(|parent| parent == path)?;
            Some(if parent == 0 { image } else { parents[parent - 1].clone() })
        };
        devices().unwrap_or_default().into_iter().filter_map(|listed| child_in(listed.entry)).collect()
    }

    fn refuse_abandoned(&self, image: &ImageFile, access: Access) -> Result<()> {
        // The path may name another file by now.
        let file = image.identity();
        let writes = |entry: &Entry| !entry.read_only && entry.image_file == file;
        let both_read = |listed: &Listed| !writes(&listed.entry) && access == Access::ReadOnly;
        let concerns =
            |listed: &Listed| listed.may_be_abandoned() && !both_read(listed) && listed.entry.reads(file);
        let refusal = "only root can see whether a killed daemon has left data for this image that is not in \
                       the file";
        let Some(registry) = registry_or(refusal).file(image.path())? else { return Ok(()) };
        let Some(listed) = registry.survey()?.devices.into_iter().find(concerns) else { return Ok(()) };
        let device = listed.entry.device.display();
        let remedy =
            format!("`vhdx-ublk recover {device}` serves it again, `vhdx-ublk del {device}` removes it");
        let message = if listed.is_abandoned() {
            format!("the image belongs to {device}, whose daemon was killed")
        } else {
            format!("the image belongs to {device}, whose daemon is not visible here")
        };
        Err(Error::new(Kind::InUse, message).file(image.path()).remedy(remedy))
    }

    fn refuse_orphan(&self, file: &ImageFile, image: Option<&Image>) -> Result<()> {
        session::refuse_orphan(file, image)
    }

    fn with_holder(&self, error: Error, path: &Path) -> Error {
        if error.kind() != Kind::InUse || error.remedy_text().is_some() {
            return error;
        }
        // A device that waits for its daemon holds nothing.
        if self.serve(path) {
            if let Some(device) = device_of(path) {
                let device = device.display();
                return error
                    .remedy(format!("{device} serves it; `vhdx-ublk del {device}` removes the device"));
            }
            if let Some(entry) = entry_with(path, |listed, file| listed.entry.reads(file)) {
                let device = entry.device.display();
                return error.remedy(format!(
                    "{device} reads it as a parent of its image; `vhdx-ublk del {device}` removes the device"
                ));
            }
        }
        let processes = processes(path);
        if processes.is_empty() {
            return error
                .remedy(format!("find the process that has it open: lslocks, or fuser -v {}", shell(path)));
        }
        error.remedy(format!("first end its use: it is {}", processes.join(", ")))
    }
}
