//! Locking an image for an operation that reads all of it, or changes it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::{Devices, replaced};
use crate::chain::Member;
use crate::disk::{Access, ImageFile, Reactor};
use crate::error::Result;

/// How long another command may take to leave the image: one that only inspects it, or that is refused
/// itself, does soon, and of two that want it at once one gets it.
const LOCK_WAIT: Duration = Duration::from_secs(1);

/// Locks the image at `path` for `access`, and waits a second for a holder that may leave soon.
///
/// # Errors
///
/// [`Kind::InUse`](crate::error::Kind::InUse) if another process has it, or a device waits for a new daemon
/// to serve it.
pub(super) fn lock(path: &Path, access: Access, devices: &dyn Devices) -> Result<ImageFile> {
    let wait = if devices.serve(path) { Duration::ZERO } else { LOCK_WAIT };
    let file = ImageFile::open(path, access, wait).map_err(|error| devices.with_holder(error, path))?;
    devices.refuse_abandoned(&file, access)?;
    Ok(file)
}

/// Locks the image at `path` for `access`, and reads it, its log in memory.
///
/// # Errors
///
/// Whatever is wrong with the image; [`Kind::InUse`](crate::error::Kind::InUse) if another process or a
/// device has it, or a killed daemon left a session of it.
pub(super) fn open(reactor: &Reactor, path: &Path, access: Access, devices: &dyn Devices) -> Result<Member> {
    let member = Member::read(reactor, Arc::new(lock(path, access, devices)?))?;
    devices.refuse_orphan(&member.file, Some(&member.image))?;
    Ok(member)
}

/// As [`open`], for an image that is to change and that the user has named: a link of another user may lead
/// the name to any file of root's.
///
/// # Errors
///
/// Those of [`open`]; [`Kind::Permission`](crate::error::Kind::Permission) if such a link leads to it.
pub(super) fn open_named(reactor: &Reactor, path: &Path, devices: &dyn Devices) -> Result<Member> {
    let file = lock(path, Access::ReadWrite, devices)?;
    replaced::refuse_foreign_links(path, &file)?;
    let member = Member::read(reactor, Arc::new(file))?;
    devices.refuse_orphan(&member.file, Some(&member.image))?;
    Ok(member)
}
