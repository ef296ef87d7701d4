//! The kernel's module with the ublk driver: loaded before a device is made, where it is not there yet.

use std::path::Path;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use super::program;
use crate::machine;

/// What the driver shows when it is there.
const CONTROL: &str = "/dev/ublk-control";

/// Where the kernel shows it, whatever `/dev` has.
const IN_KERNEL: &str = "/sys/class/misc/ublk-control";

const NAME: &str = "ublk_drv";

/// How long its node may take to appear.
const NODE_PATIENCE: Duration = Duration::from_secs(2);

const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Has the kernel load its ublk driver, if that is missing and this process may load modules; says so.
/// Whatever prevents it is no failure here: the image may be wrong, too, and what opens the driver says what
/// is missing.
pub fn load_driver() {
    if !is_missing(&machine::node(Path::new(CONTROL)), Path::new(IN_KERNEL))
        || !nix::unistd::geteuid().is_root()
    {
        return;
    }
    let mut modprobe = program::command("modprobe");
    modprobe.arg(NAME).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    match modprobe.status() {
        Ok(status) if status.success() => {
            await_node();
            tracing::info!("the kernel has loaded {NAME}");
        }
        Ok(status) => tracing::debug!("modprobe {NAME}: {status}"),
        Err(error) => tracing::debug!("modprobe {NAME}: {error}"),
    }
}

/// Whether the kernel does not have the driver: one that this process cannot reach is not loaded again.
fn is_missing(control: &Path, in_kernel: &Path) -> bool {
    !control.exists() && !in_kernel.exists()
}

fn await_node() {
    let until = Instant::now() + NODE_PATIENCE;
    while !Path::new(CONTROL).exists() && Instant::now() < until {
        thread::sleep(POLL_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_is_there_is_not_loaded_again() {
        let (there, nowhere) = (Path::new("/proc"), Path::new("/no/such/node"));
        assert!(is_missing(nowhere, nowhere));
        assert!(!is_missing(there, nowhere) && !is_missing(nowhere, there));
    }
}
