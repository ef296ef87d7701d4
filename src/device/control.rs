//! The driver's control commands, through a ring of our own.
//!
//! `libublk` gives the types and numbers. Its control object is not used: it waits without a deadline, keeps
//! its ring in a thread-local, writes state of its own to `/run` and messages to standard error.
//!
//! Invariants:
//!
//! * every command has a deadline: drivers exist that crash inside a command and never answer it;
//! * memory that the kernel was given for a command lives until the kernel has answered: after a missed
//!   deadline it is leaked, together with the ring, on purpose.
#![allow(unsafe_code, reason = "pushing a submission gives the kernel a pointer")]

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use libublk::sys;

use super::options::KernelParameters;
use crate::error::{Error, Kind, Result};

/// Where commands go.
const CONTROL_PATH: &str = "/dev/ublk-control";

/// How long a command may take that only changes the kernel's own state.
const DEADLINE: Duration = Duration::from_secs(30);

/// How long stopping may take: it ends when all I/O has, and file systems are written back first.
const STOP_DEADLINE: Duration = Duration::from_secs(300);

/// How long to wait for a deleted device's number to be free.
const NUMBER_DEADLINE: Duration = Duration::from_secs(2);

/// How often something without a notification of its own is looked at.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// For commands that concern no queue.
const NO_QUEUE: u16 = u16::MAX;

/// Lets the kernel choose the number of a new device.
const ANY_ID: u32 = u32::MAX;

/// Words of a CPU mask: 8192 CPUs, the most that Linux can be built for.
const CPU_MASK_WORDS: usize = 128;

/// The state of a device, as the kernel keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelState {
    /// Not started, or stopped: no block device.
    Dead,
    /// Served.
    Live,
    /// Its server is gone; requests wait for the next one.
    Quiesced,
    /// Its server is gone; requests fail until the next one comes.
    FailIo,
    /// A state this program does not know.
    Unknown,
}

/// What the kernel knows about a device.
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
    /// What its server gave it to be recognised by; the kernel keeps it and means nothing by it.
    pub mark: u64,
}

/// A device to be made.
#[derive(Clone, Copy, Debug)]
pub struct NewDevice {
    /// Its number, or the kernel's choice.
    pub id: Option<u32>,
    /// Queues wanted; the kernel may give fewer.
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

/// A command's number, and what it does in words.
#[derive(Clone, Copy)]
struct Verb {
    op: u32,
    doing: &'static str,
    deadline: Duration,
}

const fn verb(op: u32, doing: &'static str) -> Verb {
    Verb { op, doing, deadline: DEADLINE }
}

const GET_FEATURES: Verb = verb(sys::UBLK_U_CMD_GET_FEATURES, "asking for the driver's features");
const ADD: Verb = verb(sys::UBLK_U_CMD_ADD_DEV, "adding");
const INFO: Verb = verb(sys::UBLK_U_CMD_GET_DEV_INFO, "asking about");
const AFFINITY: Verb = verb(sys::UBLK_U_CMD_GET_QUEUE_AFFINITY, "asking for the queue's CPUs of");
const SET_PARAMS: Verb = verb(sys::UBLK_U_CMD_SET_PARAMS, "setting the parameters of");
const START: Verb = verb(sys::UBLK_U_CMD_START_DEV, "starting");
const START_RECOVERY: Verb = verb(sys::UBLK_U_CMD_START_USER_RECOVERY, "taking over");
const END_RECOVERY: Verb = verb(sys::UBLK_U_CMD_END_USER_RECOVERY, "going on with");
const STOP: Verb = Verb { deadline: STOP_DEADLINE, ..verb(sys::UBLK_U_CMD_STOP_DEV, "stopping") };
const DELETE: Verb = verb(sys::UBLK_U_CMD_DEL_DEV_ASYNC, "deleting");
/// The same before Linux 6.9: waits until nobody has the device open any more.
const DELETE_AND_WAIT: Verb = verb(sys::UBLK_U_CMD_DEL_DEV, "deleting");

/// What drivers before Linux 6.4 say to a command they do not know: a number of the kernel's own.
const ENOTSUPP: i32 = 524;

/// Bits of a command's number that hold it alone, as kernels before 6.4 want it.
const LEGACY_MASK: u32 = 0xff;

/// The driver's control device.
pub struct Control {
    file: File,
    /// `None`: a kernel older than the question (6.5), which takes commands by their bare number.
    features: Option<u64>,
}

impl Control {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// [`Kind::NoDriver`] when the kernel offers no ublk, [`Kind::Permission`] when the caller is not root.
    pub fn open() -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(CONTROL_PATH);
        let mut control = Self { file: file.map_err(unavailable)?, features: None };
        control.features = match control.exchange(GET_FEATURES, ANY_ID, 0, 0_u64) {
            Ok(features) => Some(features),
            Err(error) if error.os_error().is_some() => None,
            Err(error) => return Err(error),
        };
        Ok(control)
    }

    /// `UBLK_F_*` that the driver has, if it is new enough to say so.
    pub fn features(&self) -> Option<u64> {
        self.features
    }

    /// Makes a device: `/dev/ublkcN` appears. Returns what was granted, which may be less than was wanted.
    ///
    /// # Errors
    ///
    /// [`Kind::Exists`] when the number is taken; what the kernel says otherwise.
    pub fn add(&self, new: &NewDevice) -> Result<DeviceInfo> {
        let id = new.id.unwrap_or(ANY_ID);
        let wanted = sys::ublksrv_ctrl_dev_info {
            dev_id: id,
            nr_hw_queues: new.queues,
            queue_depth: new.depth,
            max_io_buf_bytes: new.request_bytes,
            flags: new.flags,
            ublksrv_flags: new.mark,
            ..Default::default()
        };
        self.exchange(ADD, id, 0, wanted).map(DeviceInfo::of)
    }

    /// What the kernel knows about device `id`; `None` when there is no such device.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn info(&self, id: u32) -> Result<Option<DeviceInfo>> {
        match self.exchange(INFO, id, 0, sys::ublksrv_ctrl_dev_info::default()) {
            Ok(info) => Ok(Some(DeviceInfo::of(info))),
            Err(error) if error.os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The CPUs whose requests queue `queue` gets.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn queue_cpus(&self, id: u32, queue: u16) -> Result<Vec<usize>> {
        let mask = self.exchange(AFFINITY, id, u64::from(queue), [0_u64; CPU_MASK_WORDS])?;
        Ok((0..CPU_MASK_WORDS * 64).filter(|cpu| mask[cpu / 64] >> (cpu % 64) & 1 == 1).collect())
    }

    /// Says what the disk is like; before it is started.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn set_params(&self, id: u32, params: KernelParameters) -> Result<()> {
        self.exchange(SET_PARAMS, id, 0, params).map(drop)
    }

    /// Brings `/dev/ublkbN` up, served by this process. Every tag of every queue has been fetched.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn start(&self, id: u32) -> Result<()> {
        self.exchange(START, id, u64::from(std::process::id()), ()).map(drop)
    }

    /// Makes this process the server-to-be of a device whose server was killed. The kernel lets go of the dead
    /// one in its own time, which is waited for.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn start_recovery(&self, id: u32) -> Result<()> {
        let until = Instant::now() + DEADLINE;
        loop {
            match self.exchange(START_RECOVERY, id, 0, ()) {
                Err(error) if error.os_error() == Some(libc::EBUSY) && Instant::now() < until => {
                    thread::sleep(POLL_INTERVAL);
                }
                outcome => return outcome,
            }
        }
    }

    /// Lets requests flow again, to this process. Every tag of every queue has been fetched.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn end_recovery(&self, id: u32) -> Result<()> {
        self.exchange(END_RECOVERY, id, u64::from(std::process::id()), ()).map(drop)
    }

    /// Takes `/dev/ublkbN` down: waits for the requests under way, then hands every tag back as aborted.
    /// Harmless on a device that is not started. Call it while the queues are served.
    ///
    /// # Errors
    ///
    /// What the kernel says; a device that is gone is no error.
    pub fn stop(&self, id: u32) -> Result<()> {
        unless_gone(self.exchange(STOP, id, 0, ()))
    }

    /// Removes the device with this number and mark. `true`: the number is free again. It may take longer,
    /// for as long as anybody has the block device open, as a file system mounted on it does.
    ///
    /// # Errors
    ///
    /// What the kernel says; a device that is gone is no error.
    pub fn delete(&self, id: u32, mark: u64) -> Result<bool> {
        let refused =
            |error: &Error| matches!(error.os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL | ENOTSUPP));
        let result = match self.exchange(DELETE, id, 0, ()) {
            Err(error) if refused(&error) => self.exchange(DELETE_AND_WAIT, id, 0, ()),
            other => other,
        };
        unless_gone(result)?;
        let until = Instant::now() + NUMBER_DEADLINE;
        while self.info(id)?.is_some_and(|info| info.mark == mark) {
            if Instant::now() >= until {
                return Ok(false);
            }
            thread::sleep(POLL_INTERVAL);
        }
        Ok(true)
    }

    /// Sends a command with `payload` as its buffer, and returns the buffer as the kernel left it.
    fn exchange<T: Copy>(&self, verb: Verb, id: u32, data: u64, payload: T) -> Result<T> {
        let deadline = Instant::now() + verb.deadline;
        loop {
            match self.attempt(verb, id, data, payload, deadline)? {
                (0.., payload) => return Ok(payload),
                (errno, _) if errno == -libc::EINTR && Instant::now() < deadline => {}
                (errno, _) => return Err(refused(verb, id, -errno)),
            }
        }
    }

    fn attempt<T: Copy>(&self, verb: Verb, id: u32, data: u64, payload: T, by: Instant) -> Result<(i32, T)> {
        let mut payload = Box::new(payload);
        let place = (&raw mut *payload).expose_provenance();
        let length = size_of::<T>();
        let command = encode(id, if length == 0 { 0 } else { place }, length, data);
        let known = self.features.is_some() || verb.op == GET_FEATURES.op;
        let op = if known { verb.op } else { verb.op & LEGACY_MASK };
        let entry = opcode::UringCmd80::new(Fd(self.file.as_raw_fd()), op).cmd(command).build();
        let ring = IoUring::<squeue::Entry128>::builder().build(1);
        let mut ring = ring.map_err(|error| Error::io("making a ring for ublk's control commands", error))?;
        // SAFETY: the payload lives until the command has been answered, see the module's head.
        unsafe { ring.submission().push(&entry) }.expect("a fresh ring has a free place");
        match await_answer(&mut ring, by) {
            Ok(answer) => Ok((answer.result(), *payload)),
            Err(error) => {
                std::mem::forget((ring, payload));
                Err(unanswered(verb, id, error))
            }
        }
    }
}

impl DeviceInfo {
    fn of(info: sys::ublksrv_ctrl_dev_info) -> Self {
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
        }
    }

    /// Whether commands are known by their `ioctl` numbers, or by their bare ones (before Linux 6.4).
    pub(super) fn has_ioctl_numbers(&self) -> bool {
        self.flags & u64::from(sys::UBLK_F_CMD_IOCTL_ENCODE) != 0
    }
}

/// The bytes of a `ublksrv_ctrl_cmd`, in the space that a submission has for them.
fn encode(id: u32, address: usize, length: usize, data: u64) -> [u8; 80] {
    let length = u16::try_from(length).expect("payloads are small structures");
    let mut bytes = [0; 80];
    bytes[offset_of!(sys::ublksrv_ctrl_cmd, dev_id)..][..4].copy_from_slice(&id.to_ne_bytes());
    bytes[offset_of!(sys::ublksrv_ctrl_cmd, queue_id)..][..2].copy_from_slice(&NO_QUEUE.to_ne_bytes());
    bytes[offset_of!(sys::ublksrv_ctrl_cmd, len)..][..2].copy_from_slice(&length.to_ne_bytes());
    bytes[offset_of!(sys::ublksrv_ctrl_cmd, addr)..][..8].copy_from_slice(&(address as u64).to_ne_bytes());
    bytes[offset_of!(sys::ublksrv_ctrl_cmd, data)..][..8].copy_from_slice(&data.to_ne_bytes());
    bytes
}

/// Submits what was pushed and waits for its end, at most until `by`.
fn await_answer(ring: &mut IoUring<squeue::Entry128>, by: Instant) -> io::Result<cqueue::Entry> {
    loop {
        if let Some(answer) = ring.completion().next() {
            return Ok(answer);
        }
        let left = by.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let left = Timespec::from(left);
        match ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&left)) {
            Ok(_) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => {}
            Err(error) => return Err(error),
        }
    }
}

fn unless_gone(result: Result<()>) -> Result<()> {
    result.or_else(|error| if error.os_error() == Some(libc::ENODEV) { Ok(()) } else { Err(error) })
}

fn unavailable(error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            Error::new(Kind::NoDriver, format!("{CONTROL_PATH} does not exist: this kernel offers no ublk"))
                .remedy("modprobe ublk_drv (CONFIG_BLK_DEV_UBLK, Linux 6.0 or newer)")
        }
        Some(libc::EACCES | libc::EPERM) => {
            Error::io(format!("opening {CONTROL_PATH}"), error).remedy("run it as root")
        }
        _ => Error::io(format!("opening {CONTROL_PATH}"), error),
    }
}

fn named(verb: Verb, id: u32) -> String {
    if id == ANY_ID {
        format!("{} (any ublk device)", verb.doing)
    } else {
        format!("{} ublk device {id}", verb.doing)
    }
}

fn refused(verb: Verb, id: u32, errno: i32) -> Error {
    let error = Error::io(named(verb, id), io::Error::from_raw_os_error(errno));
    match error.kind() {
        Kind::Permission => error.remedy("run it as root"),
        Kind::Exists if verb.op == ADD.op => {
            error.remedy("choose another number, or leave the choice to the kernel")
        }
        _ => error,
    }
}

fn unanswered(verb: Verb, id: u32, error: io::Error) -> Error {
    if error.kind() != io::ErrorKind::TimedOut {
        return Error::io(named(verb, id), error);
    }
    let seconds = verb.deadline.as_secs();
    Error::new(Kind::Io, format!("{}: the kernel has not answered within {seconds} s", named(verb, id)))
        .remedy("look for the ublk driver's messages in dmesg; if it has crashed, only a restart of the machine helps")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_laid_out_as_the_kernel_reads_it() {
        let bytes = encode(3, 0x1122_3344_5566_7788, 24, 9);
        let mut expected = [0; 80];
        expected[..4].copy_from_slice(&3_u32.to_ne_bytes());
        expected[4..6].copy_from_slice(&[0xff, 0xff]);
        expected[6..8].copy_from_slice(&24_u16.to_ne_bytes());
        expected[8..16].copy_from_slice(&0x1122_3344_5566_7788_u64.to_ne_bytes());
        expected[16..24].copy_from_slice(&9_u64.to_ne_bytes());
        assert_eq!(bytes, expected);
    }

    #[test]
    fn a_missing_driver_and_a_missing_right_are_told_apart() {
        let error = unavailable(io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(error.kind(), Kind::NoDriver);
        assert!(error.remedy_text().is_some_and(|text| text.contains("modprobe ublk_drv")));
        let error = unavailable(io::Error::from_raw_os_error(libc::EACCES));
        assert_eq!(error.kind(), Kind::Permission);
    }

    #[test]
    fn a_device_that_is_gone_is_stopped_and_deleted() {
        assert!(unless_gone(Err(refused(STOP, 1, libc::ENODEV))).is_ok());
        assert!(unless_gone(Err(refused(STOP, 1, libc::EBUSY))).is_err());
    }
}
