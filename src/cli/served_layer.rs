//! A layer of a chain that a device serves, as `merge` finds it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use vhdx_ublk::device::claims;
use vhdx_ublk::device::order::Merged;
use vhdx_ublk::device::registry::{Entry, Registry, State};
use vhdx_ublk::device::socket;
use vhdx_ublk::device::stop::Target;
use vhdx_ublk::disk::HostFile;
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::operations::Watch;
use vhdx_ublk::printable::shell;

/// See the module's head.
pub struct ServedLayer {
    entry: Entry,
    file: HostFile,
}

impl ServedLayer {
    /// The layer that `text` names, if a device reads it as a parent of its image, or was about to remove it
    /// when its daemon was killed.
    ///
    /// # Errors
    ///
    /// [`Kind::InUse`] if it is the image that a device serves; those of finding it.
    pub fn find(text: &OsStr) -> Result<Option<Self>> {
        // Who is not root may merge images that are no device's.
        if !nix::unistd::geteuid().is_root() {
            return Ok(None);
        }
        let target = Target::parse(text)?;
        let path = target.image().map(Path::to_owned);
        let Some(path) = path.filter(|path| path.exists() || is_recorded(path)) else {
            return match claims::find(&target) {
                Ok(listed) => Err(is_leaf(&listed.entry)),
                Err(_) => Ok(None),
            };
        };
        let found = HostFile::at(&path).ok();
        for listed in claims::devices()? {
            let entry = listed.entry;
            if matches!(listed.state, State::Stopping | State::Dead | State::Failed)
                || !entry.daemon.is_alive()
            {
                continue;
            }
            if found == Some(entry.image_file) {
                return Err(is_leaf(&entry));
            }
            let recorded = entry.merging.as_ref().filter(|merging| merging.layer == path);
            let recorded = recorded.map(|merging| merging.layer_file);
            let layer = found.filter(|file| entry.parent_files.contains(file)).or(recorded);
            if let Some(file) = layer {
                return Ok(Some(Self { entry, file }));
            }
        }
        Ok(None)
    }

    /// The oldest layer above the first image of the chain that `target` serves, if the chain has more than
    /// `keep` layers above that.
    ///
    /// # Errors
    ///
    /// [`Kind::Usage`] if that would be the image which is served.
    pub fn oldest(entry: Entry, keep: usize) -> Result<Option<Self>> {
        let Entry { parent_files, .. } = &entry;
        if keep == 0 {
            let message = "the image that is served stays: at least one layer is kept above the first image";
            return Err(Error::new(Kind::Usage, message).file(&entry.image));
        }
        if parent_files.len() <= keep {
            return Ok(None);
        }
        let file = parent_files[parent_files.len() - 2];
        Ok(Some(Self { entry, file }))
    }

    /// Has the device's daemon merge it into its parent. It stops when `watch` wants it to, or this process
    /// ends.
    ///
    /// # Errors
    ///
    /// The daemon's.
    pub fn merge(&self, watch: &impl Watch) -> Result<Merged> {
        let path = Registry::open()?.socket_path(self.entry.id);
        socket::merge(&path, self.file, watch)
    }
}

/// Whether the file at `path`, which may be gone, is that of a merge which was cut.
fn is_recorded(path: &Path) -> bool {
    let has = |merging: PathBuf| merging == path;
    let devices = claims::devices().unwrap_or_default();
    devices.into_iter().filter_map(|listed| listed.entry.merging).any(|merging| has(merging.layer))
}

/// Why the image of a device is not merged.
fn is_leaf(entry: &Entry) -> Error {
    let (device, image) = (entry.device.display(), shell(&entry.image));
    let message = format!("{device} serves this image, and writes it");
    let error = Error::new(Kind::InUse, message).file(&entry.image);
    if entry.parents.is_empty() {
        return error.remedy("it has no parent to merge into: it is the first image of its chain");
    }
    error.remedy(format!(
        "take a snapshot first, then merge the frozen layer: `vhdx-ublk snapshot {device} NEW.vhdx`, then \
         `vhdx-ublk merge {image}`"
    ))
}
