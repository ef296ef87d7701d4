//! Whether this machine can serve images, and whether one image can be served well.
//!
//! Nothing is changed. What the machine says of itself is read below a root, `/` or one that a test has made.
//! What a host does with files is tried on a nameless file beside the image, and only where the folder
//! belongs to the caller alone; otherwise what is known of its file system has to do.

mod devices;
mod finding;
mod host;
mod image;
mod kernel;
mod machine;
mod trial;

use std::path::Path;

pub use finding::Finding;
use machine::Machine;

/// Examines the machine.
pub fn machine() -> Vec<Finding> {
    let mut checks = Machine::at(Path::new("/")).checks();
    checks.extend(devices::checks());
    checks
}

/// Examines the image at `path`, its chain and its host.
pub fn image(path: &Path) -> Vec<Finding> {
    image::checks(path)
}
