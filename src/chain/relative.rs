//! What a chain knows of an image in it.

use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::format::metadata::Metadata;
use crate::image::{Identity, Image};

/// An opened image of a chain.
pub trait Layer {
    /// The image.
    fn image(&self) -> &Image;

    /// Its file, as an absolute path without symbolic links.
    fn path(&self) -> &Path;
}

/// An image and its file's path, while its parents are searched for.
impl Layer for (&Image, &Path) {
    fn image(&self) -> &Image {
        self.0
    }

    fn path(&self) -> &Path {
        self.1
    }
}

/// What a chain has to know of an image to recognise it.
pub trait Relative {
    /// The virtual disk, and the way to the parent.
    fn metadata(&self) -> &Metadata;

    /// What its children know it by.
    fn data_write_guid(&self) -> Uuid;

    /// The memory that it takes while it is open, bytes; little, and counted as nothing, if only its identity
    /// is known.
    fn resident_bytes(&self) -> u64 {
        0
    }

    /// Its file, as an absolute path without symbolic links.
    fn path(&self) -> &Path;
}

impl<L: Layer> Relative for L {
    fn metadata(&self) -> &Metadata {
        &self.image().metadata
    }

    fn data_write_guid(&self) -> Uuid {
        self.image().header.header.data_write_guid
    }

    fn resident_bytes(&self) -> u64 {
        self.image().resident_bytes()
    }

    fn path(&self) -> &Path {
        Layer::path(self)
    }
}

/// An image of which only the identity is known; `lock` keeps others from writing it, if it is locked at all.
#[derive(Clone, Debug)]
pub struct Known<L = ()> {
    /// What it is.
    pub identity: Identity,
    /// Its file, as an absolute path without symbolic links.
    pub path: PathBuf,
    /// What keeps it as it is.
    pub lock: L,
}

impl<L> Relative for Known<L> {
    fn metadata(&self) -> &Metadata {
        &self.identity.metadata
    }

    fn data_write_guid(&self) -> Uuid {
        self.identity.data_write_guid
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

/// Whether `child` knows its parent by the DataWriteGuid that `parent` has.
pub fn is_made_of(child: &dyn Relative, parent: &dyn Relative) -> bool {
    let Some(locator) = &child.metadata().parent_locator else { return false };
    let wanted = parent.data_write_guid();
    locator.linkage().is_ok_and(|linkage| linkage == wanted) || locator.linkage2() == Some(wanted)
}
