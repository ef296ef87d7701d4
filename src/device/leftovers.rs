//! What killed processes have left, and what no device and no image needs.

use super::control::Control;
use super::registry::Registry;
use super::session;
use crate::error::Result;

/// Removes it. For commands that change devices.
///
/// # Errors
///
/// If the registry cannot be read or changed, or the kernel does not answer.
pub fn sweep(registry: &Registry, control: &Control) -> Result<()> {
    registry.sweep(control)?;
    session::sweep(registry)
}
