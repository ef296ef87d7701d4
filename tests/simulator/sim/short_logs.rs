//! Logs shorter than the format allows, as long as a test runs.

use vhdx_ublk::simulation::{set_descriptors_per_entry, set_log_unit};

/// The unit of a short log's length, bytes.
pub const LOG_UNIT: u64 = 4096;

/// While this lives, the logs of its thread are short. Tests that run in one thread, one after the other, do
/// not see what an earlier one has set.
#[must_use]
pub struct ShortLogs(());

impl ShortLogs {
    /// `descriptors` are the most of one entry, as many as usual without.
    pub fn new(descriptors: Option<usize>) -> Self {
        set_log_unit(Some(LOG_UNIT));
        set_descriptors_per_entry(descriptors);
        Self(())
    }
}

impl Drop for ShortLogs {
    fn drop(&mut self) {
        set_log_unit(None);
        set_descriptors_per_entry(None);
    }
}
