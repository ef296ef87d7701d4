//! A file that salvaging makes: it gets its name when it is whole.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::mapfile::MAPFILE;
use crate::disk::{
    Access, CHOOSE, ImageFile, PAGE_BYTES, Place, PlainDisk, REPLACE, ReadDisk, Remover, Unfinished,
    dangling, taken,
};
use crate::error::{Doing, Error, Kind, Locate, Result};
use crate::operations::children::refuse_replacing_parent;
use crate::operations::inspect::identify_locked;
use crate::operations::{Devices, locked, replaced};

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
    /// Makes the file that will be at `path`. If `replace`, a file there is replaced that `may_be_replaced`,
    /// or that is empty, and that is not the parent of other images.
    ///
    /// # Errors
    ///
    /// [`Kind::Exists`] if there is a file that is not to be replaced; [`Kind::InUse`] if it is in use or has
    /// children; what the operating system says.
    pub(super) fn begin(
        path: &Path,
        replace: bool,
        may_be_replaced: fn(&ImageFile) -> bool,
        devices: &dyn Devices,
    ) -> Result<Self> {
        let old = if std::fs::symlink_metadata(path).is_err() {
            None
        } else if let Some(error) = dangling(path) {
            return Err(error);
        } else if replace {
            refuse_replacing_parent(path, devices)?;
            let old = locked::lock(path, Access::ReadWrite, devices)?;
            replaced::refuse_foreign_links(path, &old)?;
            let is_empty = old.length().doing("reading the size of the file").file(path)? == 0;
            if !is_empty && !may_be_replaced(&old) {
                let message = "--force replaces empty files, images by copies, and mapfiles by mapfiles";
                let error = Error::new(Kind::Exists, message).file(path);
                return Err(error.remedy(CHOOSE));
            }
            Some(old)
        } else {
            return Err(taken(path).remedy(REPLACE));
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

    /// Where it will be.
    pub(super) fn path(&self) -> &Path {
        self.place.path()
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
        // The owner of the file that was there gets nothing of what this user may read.
        file.permit(PRIVATE)?;
        match old {
            Some(old) => unfinished.replace(&place, &old),
            None => unfinished.name(&place),
        }
    }
}

/// Whether `file` is an image, damaged or not.
pub(super) fn is_image(file: &ImageFile) -> bool {
    !identify_locked(file).is_err_and(|error| matches!(error.kind(), Kind::NotVhdx | Kind::Io))
}

/// Whether `file` is a mapfile.
pub(super) fn is_mapfile(file: &ImageFile) -> bool {
    let found = PlainDisk::of(file).map(|disk| smol::future::block_on(disk.read(0, PAGE_BYTES)));
    found.is_ok_and(|read| read.is_ok_and(|bytes| bytes.starts_with(MAPFILE)))
}
