//! The buffers of a device's queues, made before its requests wait for them: most of the time that a daemon
//! takes to begin is that of bringing them into memory.

use std::sync::{Mutex, PoisonError};

use super::control::DeviceInfo;
use super::features;
use super::region::Region;
use crate::error::{Doing, Result};

/// See the module's head. A queue that finds none makes its own.
#[derive(Default)]
pub struct SpareBuffers(Mutex<Vec<Region>>);

impl SpareBuffers {
    /// Those of all queues of the device, if it has any.
    ///
    /// # Errors
    ///
    /// If there is not enough memory.
    pub(super) fn of(info: &DeviceInfo) -> Result<Self> {
        let queues = if features::is_in_place(info.flags) { 0 } else { info.queues };
        let length = usize::from(info.depth) * info.request_bytes as usize;
        let regions = (0..queues).map(|_| Region::memory(length)).collect::<std::io::Result<_>>();
        Ok(Self(Mutex::new(regions.doing("allocating the buffers of the queues")?)))
    }

    /// The buffers of one queue, if there are any left.
    pub(super) fn take(&self) -> Option<Region> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }
}

#[cfg(test)]
mod tests {
    use super::super::control::KernelState;
    use super::*;

    #[test]
    fn each_queue_finds_buffers_for_all_of_its_requests() {
        let info = DeviceInfo {
            id: 0,
            queues: 2,
            depth: 3,
            request_bytes: 8192,
            flags: 0,
            state: KernelState::Live,
            mark: 0,
            server: None,
        };
        let spare = SpareBuffers::of(&info).expect("memory");
        for _ in 0..2 {
            assert_eq!(spare.take().map(|region| region.length()), Some(3 * 8192));
        }
        assert!(spare.take().is_none());
        let in_place = DeviceInfo { flags: u64::MAX, ..info };
        assert!(SpareBuffers::of(&in_place).expect("nothing to allocate").take().is_none());
    }
}
