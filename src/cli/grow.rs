//! The step of `resize` that has the last file system of a disk grow with it.

use std::path::Path;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::disk::{Access, HostFile, Sparse};
use vhdx_ublk::error::{Doing, Error, Kind, Locate, Result};
use vhdx_ublk::operations::named_file::{self, NamedFile};
use vhdx_ublk::system::grow::{Grown, Plan};
use vhdx_ublk::system::private_device::PrivateDevice;
use vhdx_ublk::system::trim::Survey;

use super::add;
use super::parent_options::ParentOptions;

/// An image, and the file that was looked at by this name.
#[derive(Clone, Copy)]
pub struct Looked<'a> {
    /// Its name.
    pub path: &'a Path,
    /// Its file.
    pub file: HostFile,
}

impl Looked<'_> {
    /// Fails if `file`, which was opened by the name, is another.
    ///
    /// # Errors
    ///
    /// [`Kind::InUse`].
    pub fn require(self, file: HostFile) -> Result<()> {
        if file == self.file {
            return Ok(());
        }
        let error = Error::new(Kind::InUse, "it was replaced while it was being resized").file(self.path);
        Err(error.remedy("find out what changes the folder, and run the command again"))
    }

    fn open(self) -> Result<NamedFile> {
        let named = named_file::open(self.path, &Claims)?;
        let found = named.file.metadata().doing("examining the image").file(self.path)?;
        self.require(HostFile::of(&found))?;
        Ok(named)
    }
}

/// Refuses, before anything is changed, a file system that cannot be mounted as it is.
///
/// # Errors
///
/// [`Kind::Permission`] for users other than root; [`Kind::Unsupported`], with the reason; whatever keeps the
/// image from being served.
pub fn check(plan: &Plan, image: Looked<'_>, parents: &ParentOptions) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        let message = "only root can have the kernel mount the file system, as --grow-fs does";
        return Err(Error::new(Kind::Permission, message).remedy("run the command as root"));
    }
    let device = serve(&image.open()?, Access::ReadOnly, parents)?;
    let survey = Survey::of(device.path())?;
    device.remove()?;
    let Some(reason) = survey.obstacle(plan.partition()) else { return Ok(()) };
    let message = format!("{} cannot grow: {reason}", plan.name());
    Err(Error::new(Kind::Unsupported, message).remedy("resize the disk without --grow-fs"))
}

/// Has the last file system of the image grow to the end of the disk.
///
/// # Errors
///
/// What keeps it from that. The disk has its new size; the same command again finishes it.
pub fn grow(plan: &Plan, image: Looked<'_>, parents: &ParentOptions) -> Result<Grown> {
    let device = serve(&image.open()?, Access::ReadWrite, parents)?;
    let grown = plan.grow(device.path())?;
    device.remove()?;
    Ok(grown)
}

fn serve(named: &NamedFile, access: Access, parents: &ParentOptions) -> Result<PrivateDevice> {
    PrivateDevice::add(add::private(&named.file, access, Sparse::Auto, parents), &named.file)
}
