//! A file that salvaging makes: it gets its name when it is whole.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::disk::{Access, ImageFile, Place, Remover, Unfinished};
use crate::error::{Error, Kind, Result};
use crate::operations::{Devices, replaced};

/// Permissions: what was salvaged is the owner's affair.
const PRIVATE: u32 = 0o600;

/// A file under another name, until it is finished.
pub(super) struct Output {
    unfinished: Unfinished,
    file: Arc<ImageFile>,
    place: Place,
    old: Option<ImageFile>,
}

impl Output {
    /// Makes the file that will be at `path`. If `replace`, an image or an empty file there is replaced.
    ///
    /// # Errors
    ///
    /// [`Kind::Exists`] if there is a file that is not to be replaced; [`Kind::InUse`] if it is in use; what
    /// the operating system says.
    pub(super) fn begin(path: &Path, replace: bool, devices: &dyn Devices) -> Result<Self> {
        let old = match ImageFile::open(path, Access::ReadWrite, Duration::ZERO) {
            Err(error) if error.kind() == Kind::NotFound => None,
            Err(error) => return Err(devices.with_holder(error, path)),
            Ok(_) if !replace => {
                let error = Error::new(Kind::Exists, "there is a file already").file(path);
                return Err(error.remedy("choose another name, or replace the file with --force"));
            }
            Ok(old) => {
                replaced::require(path, &old)?;
                Some(old)
            }
        };
        let place = match &old {
            Some(old) => Place::of_file(old)?,
            None => Place::of(path)?,
        };
        let unfinished = Unfinished::default();
        let beside = place.beside(format!(".vhdx-ublk-{}.tmp", Uuid::new_v4().simple()).as_ref())?;
        let file = unfinished.create(beside)?;
        Ok(Self { unfinished, file, place, old })
    }

    /// The file.
    pub(super) fn file(&self) -> &Arc<ImageFile> {
        &self.file
    }

    /// What removes the file if the program must end.
    pub(super) fn remover(&self) -> Remover {
        self.unfinished.remover()
    }

    /// The file, which is whole and synced, gets its name.
    ///
    /// # Errors
    ///
    /// What the operating system says. The file is removed then.
    pub(super) fn finish(self) -> Result<()> {
        let Self { unfinished, file, place, old } = self;
        let Some(old) = old else {
            file.permit(PRIVATE)?;
            return unfinished.name(&place);
        };
        file.resemble(&old, PRIVATE)?;
        unfinished.replace(&place, &old)
    }
}
