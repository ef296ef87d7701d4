//! What killed processes have left, and what no device and no image needs.

use super::control::Control;
use super::registry::Registry;
use super::session;
use crate::error::Result;

/// Removes it. For commands that change devices. An entry stays by which `del` can close the image of a
/// device that is gone.
///
/// # Errors
///
/// If the registry cannot be read or changed, or the kernel does not answer.
pub fn sweep(registry: &Registry, control: &Control) -> Result<()> {
    registry.sweep(control, |entry| Ok(!entry.read_only && session::is_needed(registry, entry)?))?;
    session::sweep(registry)
}
