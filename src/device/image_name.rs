//! The path of the image that this process serves, for its messages. A snapshot changes it.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

static SERVED: Mutex<Option<PathBuf>> = Mutex::new(None);

/// From now on messages are about the image at `path`.
pub fn set(path: &Path) {
    *SERVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(path.to_owned());
}

/// The path; empty before a device is served.
pub fn get() -> PathBuf {
    SERVED.lock().unwrap_or_else(PoisonError::into_inner).clone().unwrap_or_default()
}
