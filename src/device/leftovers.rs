//! What killed processes have left, and what no device and no image needs.

use super::control::Control;
use super::registry::Registry;
use super::session;
use crate::error::Result;

/// As [`sweep`], beside what a command is for: that it fails, perhaps over another device's session, is a
/// warning.
pub fn tidy(registry: &Registry, control: &Control) {
    if let Err(error) = sweep(registry, control) {
        tracing::warn!("what killed processes have left is still there: {error:#}");
    }
}

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
