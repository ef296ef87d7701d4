//! The features of the kernel's ublk driver, and those that this program uses.

use libublk::sys;
use schemars::JsonSchema;
use serde::Serialize;

use super::control::{Control, QUIESCE_FEATURE, SAFE_STOP, UPDATE_SIZE_FEATURE};
use super::options::{Options, Recovery, ZeroCopy};
use crate::error::{Error, Kind, Result};
use crate::simulation::{Plant, planted};

/// One feature of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Feature {
    /// Its bit in `UBLK_F_*`.
    pub bit: u32,
    /// Its name in the kernel's header, without `UBLK_F_`.
    pub name: &'static str,
    /// What it means.
    pub meaning: &'static str,
    /// The first kernel that has it.
    pub since: &'static str,
    /// Whether this kernel has it.
    pub supported: bool,
    /// Whether this program uses it.
    pub used: bool,
}

/// (bit, name, meaning, first kernel).
const KNOWN: [(u32, &str, &str, &str); 21] = [
    (0, "SUPPORT_ZERO_COPY", "the server registers request pages in its ring", "6.15"),
    (1, "URING_CMD_COMP_IN_TASK", "commands complete through task work", "6.0"),
    (2, "NEED_GET_DATA", "write data is fetched in a second step", "6.0"),
    (3, "USER_RECOVERY", "the device survives its server", "6.1"),
    (4, "USER_RECOVERY_REISSUE", "requests in flight are repeated to the next server", "6.1"),
    (5, "UNPRIVILEGED_DEV", "devices of ordinary users", "6.3"),
    (6, "CMD_IOCTL_ENCODE", "commands have ioctl numbers", "6.4"),
    (7, "USER_COPY", "data is copied by read and write on the character device", "6.5"),
    (8, "ZONED", "zoned devices", "6.6"),
    (9, "USER_RECOVERY_FAIL_IO", "without a server, requests fail at once", "6.13"),
    (10, "UPDATE_SIZE", "a live device changes its size", "6.16"),
    (11, "AUTO_BUF_REG", "request pages are registered with the command", "6.16"),
    (12, "QUIESCE", "a live device is handed from one server to the next", "6.16"),
    (13, "PER_IO_DAEMON", "each tag may have a thread of its own", "6.16"),
    (14, "BUF_REG_OFF_DAEMON", "any thread registers request pages", "6.17"),
    (15, "BATCH_IO", "commands travel in batches", "7.0"),
    (16, "INTEGRITY", "requests carry protection information", "7.0"),
    (17, "SAFE_STOP_DEV", "stopping can be refused while the device is open", "7.0"),
    (18, "NO_AUTO_PART_SCAN", "no partition scan at start", "7.0"),
    (19, "SHMEM_ZC", "requests in shared memory are not copied", "7.1"),
    (20, "IO_DESC_SIZE", "I/O descriptors of a chosen size", "7.3"),
];

const QUEUE: u64 = sys::UBLK_F_USER_RECOVERY as u64;
const FAIL: u64 = QUEUE | sys::UBLK_F_USER_RECOVERY_FAIL_IO as u64;
const REISSUE: u64 = QUEUE | sys::UBLK_F_USER_RECOVERY_REISSUE as u64;

/// The features of a device that is to survive its server as `recovery` says.
pub(super) fn wanted(recovery: Recovery) -> u64 {
    match recovery {
        Recovery::None => 0,
        Recovery::Fail => FAIL,
        Recovery::Queue => QUEUE,
        Recovery::Reissue if planted(Plant::FailInFlight) => QUEUE,
        Recovery::Reissue => REISSUE,
    }
}

/// The feature by which a device with that `recovery` can be handed to another program in order, if the
/// `driver` has it.
pub(super) fn handover(driver: Option<u64>, recovery: Recovery) -> u64 {
    if recovery == Recovery::None { 0 } else { QUIESCE_FEATURE & driver.unwrap_or(0) }
}

/// The feature by which a device changes its size while it is served, if the `driver` has it.
pub(super) fn resizing(driver: Option<u64>) -> u64 {
    UPDATE_SIZE_FEATURE & driver.unwrap_or(0)
}

/// The recovery that a device gets: the `chosen` one, or the best of the `driver`.
///
/// # Errors
///
/// [`Kind::Unsupported`] if the driver does not have the chosen one.
pub(super) fn recovery(driver: Option<u64>, chosen: Option<Recovery>) -> Result<Recovery> {
    let has = |recovery| wanted(recovery) & !driver.unwrap_or(0) == 0;
    match chosen {
        Some(chosen) if has(chosen) => Ok(chosen),
        Some(_) => {
            Err(Error::new(Kind::Unsupported, "this kernel's ublk driver does not have that recovery")
                .remedy("omit --recovery for the best that there is; `vhdx-ublk features` shows it"))
        }
        None => {
            let known = [Recovery::Reissue, Recovery::Queue].into_iter().find(|&recovery| has(recovery));
            Ok(known.unwrap_or_default())
        }
    }
}

/// The kernel looks for partitions only by request (Linux 7.0).
pub(super) const NO_PARTITION_SCAN: u64 = sys::UBLK_F_NO_AUTO_PART_SCAN as u64;

const IN_PLACE: u64 = sys::UBLK_F_SUPPORT_ZERO_COPY as u64 | sys::UBLK_F_AUTO_BUF_REG as u64;

/// The features of a device whose requests are not copied; none where copying is faster.
///
/// # Errors
///
/// [`Kind::Unsupported`] if the driver does not have the chosen one.
pub(super) fn transfer(driver: Option<u64>, chosen: ZeroCopy) -> Result<u64> {
    match chosen {
        ZeroCopy::Auto | ZeroCopy::Off => Ok(0),
        ZeroCopy::On | ZeroCopy::Fallback if IN_PLACE & !driver.unwrap_or(0) == 0 => Ok(IN_PLACE),
        ZeroCopy::On | ZeroCopy::Fallback => {
            Err(Error::new(Kind::Unsupported, "this kernel's ublk driver cannot do without copying")
                .remedy("Linux 6.16 or newer can; omit --zero-copy, or choose off"))
        }
    }
}

/// The feature of a device whose partitions the kernel leaves alone. A driver without it leaves them alone,
/// too, if no process with `CAP_SYS_ADMIN` offers the tags (Linux 6.3).
///
/// # Errors
///
/// [`Kind::Unsupported`] if the driver is too old to say what it has.
pub(super) fn no_partitions(driver: Option<u64>, no_partitions: bool) -> Result<u64> {
    match driver {
        _ if !no_partitions => Ok(0),
        Some(driver) => Ok(NO_PARTITION_SCAN & driver),
        None => Err(Error::new(Kind::Unsupported, "this kernel's ublk driver always looks for partitions")
            .remedy("Linux 6.5 or newer can be kept from it")),
    }
}

/// Whether the driver has what `options` choose: checked before an image is touched. A missing driver is
/// reported later, after whatever is wrong with the image.
///
/// # Errors
///
/// [`Kind::Unsupported`] if it does not.
pub fn check(options: &Options) -> Result<()> {
    let Ok(control) = Control::open() else { return Ok(()) };
    recovery(control.features(), options.recovery)?;
    no_partitions(control.features(), options.no_partitions)?;
    transfer(control.features(), options.zero_copy).map(drop)
}

/// Whether a device with these features leaves the data of requests in place.
pub(super) fn is_in_place(flags: u64) -> bool {
    IN_PLACE & !flags == 0
}

/// The features that are used if the driver has them.
const USED: u64 = REISSUE
    | FAIL
    | IN_PLACE
    | sys::UBLK_F_CMD_IOCTL_ENCODE as u64
    | SAFE_STOP
    | QUIESCE_FEATURE
    | UPDATE_SIZE_FEATURE
    | NO_PARTITION_SCAN;

/// All features that the driver has, and all that this program knows.
///
/// # Errors
///
/// As [`Control::open`]; [`Kind::Unsupported`] if the driver is too old to report them.
pub fn list() -> Result<Vec<Feature>> {
    let driver = Control::open()?.features().ok_or_else(|| {
        Error::new(Kind::Unsupported, "this kernel's ublk driver does not report its features")
            .remedy("Linux 6.5 or newer reports them")
    })?;
    Ok(table(driver))
}

fn table(driver: u64) -> Vec<Feature> {
    let row = |bit: u32, name, meaning, since| {
        let supported = driver >> bit & 1 == 1;
        Feature { bit, name, meaning, since, supported, used: supported && USED >> bit & 1 == 1 }
    };
    let known = KNOWN.iter().map(|&(bit, name, meaning, since)| row(bit, name, meaning, since));
    let is_new = |bit: &u32| driver >> bit & 1 == 1 && KNOWN.iter().all(|(known, ..)| known != bit);
    known
        .chain((0..u64::BITS).filter(is_new).map(|bit| row(bit, "?", "not known to this program", "?")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_agrees_with_the_kernels_header() {
        for (bit, name) in [
            (sys::UBLK_F_SUPPORT_ZERO_COPY, "SUPPORT_ZERO_COPY"),
            (sys::UBLK_F_USER_RECOVERY_REISSUE, "USER_RECOVERY_REISSUE"),
            (sys::UBLK_F_CMD_IOCTL_ENCODE, "CMD_IOCTL_ENCODE"),
            (sys::UBLK_F_UPDATE_SIZE, "UPDATE_SIZE"),
            (sys::UBLK_F_AUTO_BUF_REG, "AUTO_BUF_REG"),
            (sys::UBLK_F_SAFE_STOP_DEV, "SAFE_STOP_DEV"),
            (sys::UBLK_F_SHMEM_ZC, "SHMEM_ZC"),
        ] {
            assert!(KNOWN.iter().any(|row| row.1 == name && 1 << row.0 == bit), "{name}");
        }
        assert!(KNOWN.iter().zip(0..).all(|(row, bit)| row.0 == bit));
    }

    #[test]
    fn a_device_gets_the_best_recovery_there_is_or_the_one_that_was_chosen() {
        for (driver, best) in [
            (None, Recovery::None),
            (Some(0), Recovery::None),
            (Some(QUEUE), Recovery::Queue),
            (Some(!0), Recovery::Reissue),
        ] {
            assert_eq!(recovery(driver, None).expect("there is always one"), best);
            assert_eq!(recovery(driver, Some(Recovery::None)).expect("none is always there"), Recovery::None);
        }
        assert_eq!(recovery(Some(!0), Some(Recovery::Fail)).expect("there"), Recovery::Fail);
        assert_eq!(wanted(Recovery::Fail) & REISSUE, QUEUE, "the kernel refuses both at once");
        let error = recovery(Some(REISSUE), Some(Recovery::Fail)).expect_err("not there");
        assert_eq!(error.kind(), Kind::Unsupported);
        assert_eq!(recovery(Some(!0), Some(Recovery::Queue)).expect("there"), Recovery::Queue);
        let error = recovery(Some(QUEUE), Some(Recovery::Reissue)).expect_err("not there");
        assert_eq!(error.kind(), Kind::Unsupported);
    }

    #[test]
    fn data_stays_in_place_only_where_that_was_chosen_and_the_driver_can() {
        for chosen in [ZeroCopy::Auto, ZeroCopy::Off] {
            assert!(!is_in_place(transfer(None, chosen).expect("copying is always there")));
            assert!(!is_in_place(transfer(Some(!0), chosen).expect("copying is always there")));
        }
        for chosen in [ZeroCopy::On, ZeroCopy::Fallback] {
            assert!(is_in_place(transfer(Some(!0), chosen).expect("there")));
            for driver in [None, Some(0), Some(1), Some(1 << 11)] {
                assert_eq!(transfer(driver, chosen).expect_err("not there").kind(), Kind::Unsupported);
            }
        }
    }

    #[test]
    fn a_feature_of_a_newer_kernel_is_shown_too() {
        let table = table(1 << 6 | 1 << 40);
        assert_eq!(table.len(), KNOWN.len() + 1);
        let names: Vec<_> = table.iter().filter(|row| row.supported).map(|row| row.name).collect();
        assert_eq!(names, ["CMD_IOCTL_ENCODE", "?"]);
        assert_eq!(table.iter().filter(|row| row.used).count(), 1);
    }
}
