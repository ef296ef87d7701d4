//! The driver's control commands, through a ring of their own.
//!
//! `libublk` gives the types and numbers. Its control object is not used: it waits without a deadline, keeps
//! its ring in a thread-local, writes state of its own to `/run` and messages to standard error.
//!
//! Invariants:
//!
//! * every command has a deadline: there are drivers that crash inside a command and never answer it;
//! * memory that the kernel was given for a command lives until the kernel has answered: after a missed
//!   deadline it is leaked, together with the ring, on purpose.
#![allow(unsafe_code, reason = "pushing a submission gives the kernel a pointer")]

mod info;
mod refusal;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::slice;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use libublk::sys;

pub use info::{DeviceInfo, KernelState, NewDevice};
pub(super) use info::{is_mark_of_program, new_mark};
pub use refusal::Surroundings;

use super::options::KernelParameters;
use crate::disk::ring_refused;
use crate::error::{Error, Kind, Result};
use crate::machine;
use crate::simulation::{Plant, planted};
use refusal::{forbidden, not_permitted, unavailable};

/// The device that takes commands.
const CONTROL_PATH: &str = "/dev/ublk-control";

/// How long a command may take that only changes the kernel's own state.
const DEADLINE: Duration = Duration::from_secs(30);

/// How long stopping may take: it waits for all I/O, and file systems are written back first.
const STOP_DEADLINE: Duration = Duration::from_secs(300);

/// How long to wait without a word for the end of a server that was killed: most are gone at once.
const RELEASE_PATIENCE: Duration = Duration::from_secs(1);

/// How often to check for that end meanwhile: I/O waits for it.
const RELEASE_INTERVAL: Duration = Duration::from_millis(1);

/// Where the kernel lists the devices: `ublkcN`, whether they are started or not.
const CHARACTER_CLASS: &str = "/sys/class/ublk-char";

/// How long to wait for a deleted device's number to be free.
const NUMBER_DEADLINE: Duration = Duration::from_secs(2);

/// How often to check something that has no notification.
pub(in crate::device) const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// For commands that concern no queue.
const NO_QUEUE: u16 = u16::MAX;

/// Lets the kernel choose the number of a new device.
const ANY_ID: u32 = u32::MAX;

/// Words of a CPU mask: 8192 CPUs, the most that Linux can be built for.
const CPU_MASK_WORDS: usize = 128;

/// A command's number, and what it does as text.
#[derive(Clone, Copy)]
struct Verb {
    op: u32,
    doing: &'static str,
    deadline: Duration,
}

const fn verb(op: u32, doing: &'static str) -> Verb {
    Verb { op, doing, deadline: DEADLINE }
}

const GET_FEATURES: Verb = verb(sys::UBLK_U_CMD_GET_FEATURES, "reading the driver's features");
const ADD: Verb = verb(sys::UBLK_U_CMD_ADD_DEV, "adding");
const INFO: Verb = verb(sys::UBLK_U_CMD_GET_DEV_INFO, "reading the state of");
const AFFINITY: Verb = verb(sys::UBLK_U_CMD_GET_QUEUE_AFFINITY, "reading a queue's CPUs of");
const SET_PARAMS: Verb = verb(sys::UBLK_U_CMD_SET_PARAMS, "setting the parameters of");
const START: Verb = verb(sys::UBLK_U_CMD_START_DEV, "starting");
const START_RECOVERY: Verb = verb(sys::UBLK_U_CMD_START_USER_RECOVERY, "taking over");
const END_RECOVERY: Verb = verb(sys::UBLK_U_CMD_END_USER_RECOVERY, "resuming");
const UPDATE_SIZE: Verb = verb(sys::UBLK_U_CMD_UPDATE_SIZE, "changing the size of");
const QUIESCE: Verb = verb(sys::UBLK_U_CMD_QUIESCE_DEV, "quiescing");
const STOP: Verb = Verb { deadline: STOP_DEADLINE, ..verb(sys::UBLK_U_CMD_STOP_DEV, "stopping") };
const TRY_STOP: Verb = Verb { op: sys::UBLK_U_CMD_TRY_STOP_DEV, ..STOP };
const DELETE: Verb = verb(sys::UBLK_U_CMD_DEL_DEV_ASYNC, "deleting");
/// The same before Linux 6.9: waits until the device is no longer open.
const DELETE_AND_WAIT: Verb = verb(sys::UBLK_U_CMD_DEL_DEV, "deleting");

/// The kernel can refuse to stop a device that is open (Linux 7.0).
pub(in crate::device) const SAFE_STOP: u64 = sys::UBLK_F_SAFE_STOP_DEV as u64;

/// The kernel can take a device from one server for the next (Linux 6.16).
pub(in crate::device) const QUIESCE_FEATURE: u64 = sys::UBLK_F_QUIESCE as u64;

/// The kernel can change the size of a device that is served (Linux 6.16).
pub(in crate::device) const UPDATE_SIZE_FEATURE: u64 = sys::UBLK_F_UPDATE_SIZE as u64;

/// Bytes of the sectors that the kernel counts in, whatever those of the disk have.
const KERNEL_SECTOR: u64 = 512;

/// The answer of drivers before Linux 6.4 to a command that they do not know: an internal number of the
/// kernel.
const ENOTSUPP: i32 = 524;

/// The number of a command without its `ioctl` encoding, as kernels before 6.4 take it.
pub(super) fn bare_number(op: u32) -> u32 {
    op & 0xff
}

/// The driver's control device.
pub struct Control {
    file: File,
    /// `None` for kernels before 6.5, which do not report them and take commands by their bare number.
    features: Option<u64>,
}

impl Control {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// [`Kind::NoDriver`] if the kernel has no ublk driver, [`Kind::Permission`] if the caller is not root.
    pub fn open() -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(machine::node(Path::new(CONTROL_PATH)));
        let mut control = Self { file: file.map_err(unavailable)?, features: None };
        control.features = match control.persist(GET_FEATURES, ANY_ID, 0, 0_u64)? {
            (0.., features) => Some(features),
            (_refused, _) => None,
        };
        Ok(control)
    }

    /// All devices, in the order of their numbers.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn devices(&self) -> Result<Vec<DeviceInfo>> {
        let mut ids = device_ids();
        ids.sort_unstable();
        ids.into_iter().filter_map(|id| self.info(id).transpose()).collect()
    }

    /// Whether its node can be opened, even if commands are forbidden.
    pub(in crate::device) fn may_be_opened() -> bool {
        OpenOptions::new().read(true).write(true).open(machine::node(Path::new(CONTROL_PATH))).is_ok()
    }

    /// The driver's `UBLK_F_*`, if it is new enough to report them.
    pub fn features(&self) -> Option<u64> {
        self.features
    }

    /// Makes a device: `/dev/ublkcN` appears. Returns what was granted, which may be less than was wanted.
    ///
    /// # Errors
    ///
    /// [`Kind::Exists`] if the number is taken; the kernel's otherwise.
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

    /// The device `id`; `None` if there is none.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn info(&self, id: u32) -> Result<Option<DeviceInfo>> {
        match self.exchange(INFO, id, 0, sys::ublksrv_ctrl_dev_info::default()) {
            Ok(info) => Ok(Some(DeviceInfo::of(info))),
            Err(error) if error.os_error() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The CPUs whose requests go to queue `queue`.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn queue_cpus(&self, id: u32, queue: u16) -> Result<Vec<usize>> {
        let mask = self.exchange(AFFINITY, id, u64::from(queue), [0_u64; CPU_MASK_WORDS])?;
        Ok((0..CPU_MASK_WORDS * 64).filter(|cpu| mask[cpu / 64] >> (cpu % 64) & 1 == 1).collect())
    }

    /// Describes the disk, before it is started.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn set_params(&self, id: u32, params: KernelParameters) -> Result<()> {
        self.exchange(SET_PARAMS, id, 0, params).map(drop)
    }

    /// Brings `/dev/ublkbN` up, served by this process. Every tag of every queue has been fetched.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn start(&self, id: u32) -> Result<()> {
        self.exchange(START, id, u64::from(std::process::id()), ()).map(drop)
    }

    /// Makes this process the next server of a device whose server was killed. Waits until the kernel has
    /// released the dead one, which it does asynchronously; if that takes long, `waiting` is called once.
    ///
    /// # Errors
    ///
    /// `EBUSY` if something still has the character device open; the kernel's otherwise.
    pub fn start_recovery(&self, id: u32, waiting: impl FnOnce()) -> Result<()> {
        let started = machine::now();
        let elapsed = || machine::now().saturating_duration_since(started);
        let mut waiting = Some(waiting);
        loop {
            match self.exchange(START_RECOVERY, id, 0, ()) {
                Err(error) if error.os_error() == Some(libc::EBUSY) && elapsed() < DEADLINE => {
                    let is_late = elapsed() > RELEASE_PATIENCE;
                    if is_late && let Some(waiting) = waiting.take() {
                        waiting();
                    }
                    machine::pause(if is_late { POLL_INTERVAL } else { RELEASE_INTERVAL });
                }
                outcome => return outcome,
            }
        }
    }

    /// Takes the device from its server, in an orderly way: new requests wait in the kernel, and every tag
    /// that is idle comes back as aborted; those that are served are completed. Where that cannot begin
    /// within `patience`, requests wait all the same. Only the next server's [`Self::end_recovery`] ends
    /// that, so the server must end, also if the kernel does not answer. Only where the device has
    /// `QUIESCE_FEATURE`.
    ///
    /// # Errors
    ///
    /// Nothing has changed then: the device is not served, or is gone; the kernel's.
    pub fn quiesce(&self, id: u32, patience: Duration) -> Result<()> {
        let patience_ms = u64::try_from(patience.as_millis()).expect("a short time");
        assert!(patience_ms > 0, "the kernel takes zero for no limit");
        match self.exchange(QUIESCE, id, patience_ms, ()) {
            Err(error) if error.os_error() == Some(libc::EBUSY) => Ok(()),
            // Only an answer has a number.
            Err(error) if error.os_error().is_none() => {
                tracing::warn!("{error:#}");
                Ok(())
            }
            outcome => outcome.map(drop),
        }
    }

    /// Has requests flow again, to this process. Every tag of every queue has been fetched.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn end_recovery(&self, id: u32) -> Result<()> {
        self.exchange(END_RECOVERY, id, u64::from(std::process::id()), ()).map(drop)
    }

    /// Makes the device, which is served, a disk of `bytes`; there is a uevent. Only where the driver has
    /// `UPDATE_SIZE_FEATURE`.
    ///
    /// # Errors
    ///
    /// [`Kind::NotFound`] if the device is not served any longer; the kernel's.
    pub fn update_size(&self, id: u32, bytes: u64) -> Result<()> {
        assert!(bytes.is_multiple_of(KERNEL_SECTOR), "a disk of {bytes} bytes is whole sectors");
        // Before Linux 7.0 the driver follows a null pointer if the device has no disk. This makes the time
        // short in which another process can stop the device, and does not end it.
        if self.info(id)?.is_none_or(|found| found.state != KernelState::Live) {
            return Err(Error::new(Kind::NotFound, format!("device {id} is being stopped")));
        }
        self.exchange(UPDATE_SIZE, id, bytes / KERNEL_SECTOR, ()).map(drop)
    }

    /// Whether the driver can change the size of a device that is served.
    pub(in crate::device) fn can_update_size(&self) -> bool {
        self.features.is_some_and(|features| features & UPDATE_SIZE_FEATURE != 0)
    }

    /// Takes `/dev/ublkbN` down: waits for the requests in flight, then returns every tag as aborted.
    /// Harmless on a device that is not started. Call it while the queues are served.
    ///
    /// # Errors
    ///
    /// The kernel's; a device that is gone is no error.
    pub fn stop(&self, id: u32) -> Result<()> {
        unless_gone(self.exchange(STOP, id, 0, ()))
    }

    /// As [`Self::stop`], unless anything has the block device open, even the kernel itself: `false` then.
    /// Only where the driver has `SAFE_STOP_DEV`.
    ///
    /// # Errors
    ///
    /// As [`Self::stop`].
    pub fn stop_if_unused(&self, id: u32) -> Result<bool> {
        match self.exchange(TRY_STOP, id, 0, ()) {
            Err(error) if error.os_error() == Some(libc::EBUSY) => Ok(false),
            outcome => unless_gone(outcome).map(|()| true),
        }
    }

    /// Whether the driver can refuse to stop a device that is open.
    pub(in crate::device) fn has_safe_stop(&self) -> bool {
        self.features.is_some_and(|features| features & SAFE_STOP != 0)
    }

    /// Removes the device with this number and mark. `true`: the number is free again. Otherwise the block
    /// device is still open, as by a mounted file system, and its number becomes free later.
    ///
    /// # Errors
    ///
    /// The kernel's; a device that is gone is no error.
    pub fn delete(&self, id: u32, mark: u64) -> Result<bool> {
        let refused =
            |error: &Error| matches!(error.os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL | ENOTSUPP));
        // Another may have removed it, and the kernel given the number to a device of whoever asked for one.
        if self.info(id)?.is_none_or(|info| info.mark != mark) {
            return Ok(true);
        }
        let result = match self.exchange(DELETE, id, 0, ()) {
            Err(error) if refused(&error) => self.exchange(DELETE_AND_WAIT, id, 0, ()),
            other => other,
        };
        unless_gone(result)?;
        let until = machine::now() + NUMBER_DEADLINE;
        while self.info(id)?.is_some_and(|info| info.mark == mark) {
            if machine::now() >= until {
                return Ok(false);
            }
            machine::pause(POLL_INTERVAL);
        }
        Ok(true)
    }

    /// Sends a command with `payload` as its buffer, and returns the buffer as the kernel left it.
    fn exchange<T: Copy>(&self, verb: Verb, id: u32, data: u64, payload: T) -> Result<T> {
        match self.persist(verb, id, data, payload)? {
            (0.., payload) => Ok(payload),
            (errno, _) => Err(refused(verb, id, -errno)),
        }
    }

    /// The same, with the kernel's result. A command that a signal has interrupted is sent again.
    fn persist<T: Copy>(&self, verb: Verb, id: u32, data: u64, payload: T) -> Result<(i32, T)> {
        let deadline = machine::now() + verb.deadline;
        loop {
            let answer = self.attempt(verb, id, data, payload, deadline)?;
            let is_interrupted = answer.0 == -libc::EINTR && !planted(Plant::GiveUpInterrupted);
            if !is_interrupted || machine::now() >= deadline {
                return Ok(answer);
            }
        }
    }

    fn attempt<T: Copy>(&self, verb: Verb, id: u32, data: u64, payload: T, by: Instant) -> Result<(i32, T)> {
        let mut payload = Box::new(payload);
        let place = (&raw mut *payload).expose_provenance();
        let length = size_of::<T>();
        let command = encode(id, if length == 0 { 0 } else { place }, length, data);
        let known = self.features.is_some() || verb.op == GET_FEATURES.op;
        let op = if known { verb.op } else { bare_number(verb.op) };
        // SAFETY: plain data, of which the kernel's headers name every byte.
        let bytes = unsafe { slice::from_raw_parts_mut((&raw mut *payload).cast::<u8>(), length) };
        match machine::command(op, &command, bytes) {
            Some(Some(result)) => return Ok((result, *payload)),
            Some(None) => return Err(unanswered(verb, id, io::ErrorKind::TimedOut.into())),
            None => {}
        }
        let entry = opcode::UringCmd80::new(Fd(self.file.as_raw_fd()), op).cmd(command).build();
        let ring = IoUring::<squeue::Entry128>::builder().build(1);
        let mut ring =
            ring.map_err(|error| ring_refused("making a ring for ublk's control commands", error))?;
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

/// Submits what was pushed and waits for its completion, at most until `by`.
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

/// The numbers of all devices.
fn device_ids() -> Vec<u32> {
    ids_in(machine::folder().unwrap_or(Path::new(CHARACTER_CLASS)))
}

/// The numbers of the devices in a class directory of the kernel; none if there is no such directory.
fn ids_in(class: &Path) -> Vec<u32> {
    let items = fs::read_dir(class).into_iter().flatten().flatten();
    items.filter_map(|item| item.file_name().to_str()?.strip_prefix("ublkc")?.parse().ok()).collect()
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
        Kind::Permission if verb.op == ADD.op => not_permitted(error),
        Kind::Permission => forbidden(error, nix::unistd::geteuid().is_root()),
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
        .remedy(
            "check dmesg for messages of the ublk driver; if it has crashed, only a restart of the \
        machine helps",
        )
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
    fn the_kernels_list_of_devices_is_read() {
        let class = tempfile::tempdir().expect("a directory");
        for name in ["ublkc0", "ublkc12", "ublk-control", "ublkcx"] {
            fs::create_dir(class.path().join(name)).expect("made");
        }
        let mut ids = ids_in(class.path());
        ids.sort_unstable();
        assert_eq!(ids, [0, 12]);
        assert!(ids_in(&class.path().join("none")).is_empty());
    }

    #[test]
    fn a_device_that_is_gone_is_stopped_and_deleted() {
        assert!(unless_gone(Err(refused(STOP, 1, libc::ENODEV))).is_ok());
        assert!(unless_gone(Err(refused(STOP, 1, libc::EBUSY))).is_err());
    }
}
