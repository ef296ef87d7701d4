//! What a daemon in the foreground reports to the service manager that started it.
//!
//! There is no watchdog: a daemon that waits for a slow disk is well, and killing it would help nothing.

use sd_notify::NotifyState;
use vhdx_ublk::device::spec::Ready;

/// The device can be used. Nothing happens if no service manager waits for that.
pub fn ready(ready: &Ready) {
    let text = format!("serving {}", ready.device.display());
    let states = [NotifyState::Ready, NotifyState::Status(&text)];
    if let Err(error) = sd_notify::notify(&states) {
        tracing::warn!("the service manager does not learn that the device can be used: {error}");
    }
}
