//! The second process of a command: a daemon that reports to its parent, and only then detaches.

use std::cell::Cell;
use std::os::fd::RawFd;

use vhdx_ublk::device::launch::{self, Lives};
use vhdx_ublk::device::spec::Ready;
use vhdx_ublk::error::Result;

use super::{FAILURE, WAITING, logging, output};

/// Runs `serve`, passing it a function to call when the device can be used; the descriptor `kept` of the
/// caller stays open, and the daemon `lives` as that says. If it fails before, the parent reports the
/// failure, and this process ends.
pub fn run(
    kept: Option<RawFd>,
    lives: Lives,
    serve: impl FnOnce(&dyn Fn(&Ready) -> Result<()>) -> Result<()>,
) -> Result<()> {
    let announced = Cell::new(false);
    let ready = |ready: &Ready| {
        launch::announce(ready, lives)?;
        logging::detached();
        announced.set(true);
        Ok(())
    };
    let outcome = launch::enter(kept).and_then(|()| serve(&ready)).map_err(output::advised);
    match outcome {
        Err(error) if !announced.get() && launch::announce_failure(&error).is_ok() => {
            std::process::exit(FAILURE.into())
        }
        Ok(()) if launch::has_handed_over() => std::process::exit(WAITING.into()),
        outcome => outcome,
    }
}
