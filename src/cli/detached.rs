//! A command's second process: a daemon that tells its parent how it went, and only then detaches.

use std::cell::Cell;
use std::os::fd::RawFd;

use vhdx_ublk::device::launch;
use vhdx_ublk::device::spec::Ready;
use vhdx_ublk::error::Result;

use super::{FAILURE, logging, output};

/// Runs `serve`, which gets what to call when the device can be used, and the caller's descriptor `kept`.
/// Ends the process where the parent has been told of a failure: it tells the user.
pub fn run(
    kept: Option<RawFd>,
    serve: impl FnOnce(&dyn Fn(&Ready) -> Result<()>) -> Result<()>,
) -> Result<()> {
    let announced = Cell::new(false);
    let ready = |ready: &Ready| {
        launch::announce(ready)?;
        logging::detached();
        announced.set(true);
        Ok(())
    };
    let outcome = launch::enter(kept).and_then(|()| serve(&ready)).map_err(output::advised);
    match outcome {
        Err(error) if !announced.get() && launch::announce_failure(&error).is_ok() => {
            std::process::exit(FAILURE.into())
        }
        outcome => outcome,
    }
}
