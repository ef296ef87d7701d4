//! A device that this process alone uses.
//!
//! Its daemon ends with this process: however that ends, the device is removed, and its image is closed. No
//! file system of it is left mounted: a mount of [`super::trim`] ends with the process, too.

use std::ffi::OsString;
use std::fs::File;
use std::path::Path;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::device::launch;
use crate::device::registry::{Entry, Registry};
use crate::device::stop::{self, DEFAULT_TIMEOUT, How, Target};
use crate::error::{Doing, Error, Kind, Result};
use crate::system::module;

/// A device that is removed when this is dropped.
pub struct PrivateDevice {
    registry: Registry,
    entry: Entry,
    is_removed: bool,
}

impl PrivateDevice {
    /// The device that this program serves when it runs with `arguments`, which say that it ends with its
    /// parent, and that its image is the `file` of this number.
    ///
    /// # Errors
    ///
    /// Whatever keeps the image from being served.
    pub fn add(arguments: impl IntoIterator<Item = OsString>, file: &File) -> Result<Self> {
        const PASSING: &str = "passing the image to its daemon";
        module::load_driver();
        fcntl(file, FcntlArg::F_SETFD(FdFlag::empty())).doing(PASSING)?;
        let launched = launch::launch(arguments);
        fcntl(file, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).doing(PASSING)?;
        let ready = launched?;
        let registry = Registry::open()?;
        let entry = stop::find(&registry, &Target::Id(ready.id))?.entry;
        Ok(Self { registry, entry, is_removed: false })
    }

    /// `/dev/ublkbN`.
    pub fn path(&self) -> &Path {
        &self.entry.device
    }

    /// Removes the device; its image is closed then.
    ///
    /// # Errors
    ///
    /// [`Kind::InUse`] if another process uses it; what keeps the image from being
    /// closed. A device that is left ends as soon as nothing uses it and this process has ended.
    pub fn remove(mut self) -> Result<()> {
        self.is_removed = true;
        self.take_away()
    }

    fn take_away(&self) -> Result<()> {
        let how = How { force: false, timeout: DEFAULT_TIMEOUT };
        stop::stop(&self.registry, &self.entry, &how).map_err(left)
    }
}

fn left(error: Error) -> Error {
    if error.kind() != Kind::InUse {
        return error;
    }
    error.remedy("end its use: the device is then removed by itself")
}

impl Drop for PrivateDevice {
    fn drop(&mut self) {
        if self.is_removed {
            return;
        }
        if let Err(error) = self.take_away() {
            tracing::warn!("{}: it could not be removed: {error:#}", self.entry.device.display());
        }
    }
}
