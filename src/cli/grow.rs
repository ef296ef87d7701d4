//! The step of `resize` that has the last file system of a disk grow with it.

use std::path::Path;

use vhdx_ublk::device::claims::Claims;
use vhdx_ublk::disk::{Access, Sparse};
use vhdx_ublk::error::{Error, Kind, Result};
use vhdx_ublk::operations::named_file::{self, NamedFile};
use vhdx_ublk::system::grow::{Grown, Plan};
use vhdx_ublk::system::private_device::PrivateDevice;
use vhdx_ublk::system::trim::Survey;

use super::add;
use super::parent_options::ParentOptions;

/// Refuses, before anything is changed, a file system that cannot be mounted as it is.
///
/// # Errors
///
/// [`Kind::Permission`] for users other than root; [`Kind::Unsupported`], with the reason; whatever keeps the
/// image from being served.
pub fn check(plan: &Plan, image: &Path, parents: &ParentOptions) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        let message = "only root can have the kernel mount the file system, as --grow-fs does";
        return Err(Error::new(Kind::Permission, message).remedy("run the command as root"));
    }
    let device = serve(&named_file::open(image, &Claims)?, Access::ReadOnly, parents)?;
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
pub fn grow(plan: &Plan, image: &Path, parents: &ParentOptions) -> Result<Grown> {
    let device = serve(&named_file::open(image, &Claims)?, Access::ReadWrite, parents)?;
    let grown = plan.grow(device.path())?;
    device.remove()?;
    Ok(grown)
}

fn serve(named: &NamedFile, access: Access, parents: &ParentOptions) -> Result<PrivateDevice> {
    PrivateDevice::add(add::private(&named.file, access, Sparse::Auto, parents), &named.file)
}
