//! A device as the driver describes it.

use libublk::sys;
use uuid::Uuid;

/// The state of a device in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelState {
    /// Not started, or stopped: there is no block device.
    Dead,
    /// Served.
    Live,
    /// Its server is gone; requests wait for the next one.
    Quiesced,
    /// Its server is gone; requests fail until the next one comes.
    FailIo,
    /// A state that this program does not know.
    Unknown,
}

/// A device as the kernel reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The N of `/dev/ublkbN`.
    pub id: u32,
    /// Its queues.
    pub queues: u16,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Longest request, bytes.
    pub request_bytes: u32,
    /// `UBLK_F_*`, as granted.
    pub flags: u64,
    /// Its state.
    pub state: KernelState,
    /// Set by its server, to recognise it; it has no meaning for the kernel.
    pub mark: u64,
    /// The process that serves it, if it can be seen from here.
    pub server: Option<u32>,
}

/// A device to be made.
#[derive(Clone, Copy, Debug)]
pub struct NewDevice {
    /// Its number, or the kernel's choice.
    pub id: Option<u32>,
    /// Queues wanted; the kernel may grant fewer.
    pub queues: u16,
    /// Requests in flight per queue.
    pub depth: u16,
    /// Longest request, bytes.
    pub request_bytes: u32,
    /// `UBLK_F_*` wanted.
    pub flags: u64,
    /// See [`DeviceInfo::mark`].
    pub mark: u64,
}

/// The upper half of the mark of every device of this program: "vhdx". The lower half is chosen at random.
const MARK_OF_PROGRAM: u64 = 0x7668_6478 << 32;

/// A mark for a new device of this program.
pub(in crate::device) fn new_mark() -> u64 {
    MARK_OF_PROGRAM | Uuid::new_v4().as_u64_pair().0 & u64::from(u32::MAX)
}

/// Whether a device with this mark was made by this program.
pub(in crate::device) fn is_mark_of_program(mark: u64) -> bool {
    mark & !u64::from(u32::MAX) == MARK_OF_PROGRAM
}

impl DeviceInfo {
    pub(super) fn of(info: sys::ublksrv_ctrl_dev_info) -> Self {
        Self {
            id: info.dev_id,
            queues: info.nr_hw_queues,
            depth: info.queue_depth,
            request_bytes: info.max_io_buf_bytes,
            flags: info.flags,
            state: match u32::from(info.state) {
                sys::UBLK_S_DEV_DEAD => KernelState::Dead,
                sys::UBLK_S_DEV_LIVE => KernelState::Live,
                sys::UBLK_S_DEV_QUIESCED => KernelState::Quiesced,
                sys::UBLK_S_DEV_FAIL_IO => KernelState::FailIo,
                _ => KernelState::Unknown,
            },
            mark: info.ublksrv_flags,
            server: u32::try_from(info.ublksrv_pid).ok().filter(|&pid| pid > 0),
        }
    }

    /// Whether the kernel takes commands by their `ioctl` numbers, or by their bare ones (before Linux 6.4).
    pub(in crate::device) fn has_ioctl_numbers(&self) -> bool {
        self.flags & u64::from(sys::UBLK_F_CMD_IOCTL_ENCODE) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_of_this_program_is_known_by_its_mark() {
        let (one, other) = (new_mark(), new_mark());
        assert!(is_mark_of_program(one) && is_mark_of_program(other) && one != other);
        assert!(!is_mark_of_program(0) && !is_mark_of_program(u64::MAX) && !is_mark_of_program(0x7668_6478));
    }
}
