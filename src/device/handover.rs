//! How a daemon leaves its device to another process without an I/O error.
//!
//! | device | kernel | how |
//! |---|---|---|
//! | recovered with `reissue` or `queue` | has `QUIESCE` (6.16) | the kernel keeps new requests, and the daemon completes those that it serves |
//! | recovered with `reissue` | has not | the fronts hold new requests and complete the others; the kernel repeats those that are held |
//! | recovered with `queue` | has not | refused: the kernel would fail the requests that are held |
//! | recovered with `fail`, or not at all | | refused: requests fail while there is no daemon |
//!
//! The order is chosen so that everything that may fail comes before requests wait: dirty metadata is
//! committed, which shows that the host's storage answers. Once requests wait and none is under way, what was
//! acknowledged meanwhile is committed and synced: no failure of the host is left to this process alone.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use super::options::Recovery;
use crate::error::{Doing, Error, Kind, Result};

/// How long committing, or the end of the requests that are served, may take.
pub(super) const SETTLE_PATIENCE: Duration = Duration::from_secs(10);

/// How long the kernel may wait before it takes idle tags back; it does not have to wait at all.
pub(super) const QUIESCE_PATIENCE: Duration = Duration::from_secs(1);

/// See the module's head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Quiesce,
    Hold,
}

/// How a device with this `recovery` can be left.
pub(super) fn way(recovery: Recovery, is_quiescable: bool) -> Result<Way> {
    let refused = |why: &str| {
        let message = format!("I/O would fail while the daemon is replaced: {why}");
        Err(Error::new(Kind::Unsupported, message)
            .remedy("end the use of the device, then remove and add it (`vhdx-ublk del`, `vhdx-ublk add`)"))
    };
    match (recovery, is_quiescable) {
        (Recovery::Reissue | Recovery::Queue, true) => Ok(Way::Quiesce),
        (Recovery::Reissue, false) => Ok(Way::Hold),
        (Recovery::Queue, false) => {
            refused("the device was added with --recovery queue, and this kernel cannot quiesce it")
        }
        (Recovery::Fail, _) => refused("the device was added with --recovery fail"),
        (Recovery::None, _) => refused("the device cannot be recovered"),
    }
}

/// Microseconds of the clock that all processes share.
pub(super) fn now_us() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).doing("reading the clock")?;
    let (seconds, nanoseconds) = (now.tv_sec().unsigned_abs(), now.tv_nsec().unsigned_abs());
    Ok(seconds * 1_000_000 + nanoseconds / 1000)
}

/// Notes in the log when a stage of a handover, or of a recovery, was reached, for those who look at where
/// its time goes: the clock is the one that all processes share.
pub(super) fn note(stage: &str) {
    tracing::debug!("handover: {stage} at {} us", now_us().unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_left_only_where_no_request_fails() {
        assert_eq!(way(Recovery::Reissue, true).expect("possible"), Way::Quiesce);
        assert_eq!(way(Recovery::Queue, true).expect("possible"), Way::Quiesce);
        assert_eq!(way(Recovery::Reissue, false).expect("possible"), Way::Hold);
        for (recovery, is_quiescable) in [
            (Recovery::Queue, false),
            (Recovery::Fail, true),
            (Recovery::Fail, false),
            (Recovery::None, true),
            (Recovery::None, false),
        ] {
            let error = way(recovery, is_quiescable).expect_err("refused");
            assert_eq!(error.kind(), Kind::Unsupported, "{recovery:?} {is_quiescable}");
        }
    }
}
