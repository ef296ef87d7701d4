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

use std::fs::{self, File, OpenOptions};
use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use libublk::sys;
use uuid::Uuid;

use super::options::KernelParameters;
use crate::disk::ring_refused;
use crate::error::{Error, Kind, Result};

/// Where commands go.
const CONTROL_PATH: &str = "/dev/ublk-control";

/// How long a command may take that only changes the kernel's own state.
const DEADLINE: Duration = Duration::from_secs(30);

/// How long stopping may take: it ends when all I/O has, and file systems are written back first.
const STOP_DEADLINE: Duration = Duration::from_secs(300);

/// How long a server that was killed may take to be gone before that is said: most are gone at once.
const RELEASE_PATIENCE: Duration = Duration::from_secs(1);

/// Where the kernel lists the devices: `ublkcN`, whether they are started or not.
const CHARACTER_CLASS: &str = "/sys/class/ublk-char";

/// How many devices the kernel allows at once; of all users before Linux 6.15.
const DEVICES_LIMIT: &str = "/sys/module/ublk_drv/parameters/ublks_max";

/// The upper half of the mark of every device of this program: "vhdx". The lower half is chosen at random.
const MARK_OF_PROGRAM: u64 = 0x7668_6478 << 32;

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
    /// The process that serves it, if it can be seen from here.
    pub server: Option<u32>,
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

/// A mark for a new device of this program.
pub(super) fn new_mark() -> u64 {
    MARK_OF_PROGRAM | Uuid::new_v4().as_u64_pair().0 & u64::from(u32::MAX)
}

/// Whether a device with this mark was made by this program.
pub(super) fn is_mark_of_program(mark: u64) -> bool {
    mark & !u64::from(u32::MAX) == MARK_OF_PROGRAM
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
const TRY_STOP: Verb = Verb { op: sys::UBLK_U_CMD_TRY_STOP_DEV, ..STOP };
const DELETE: Verb = verb(sys::UBLK_U_CMD_DEL_DEV_ASYNC, "deleting");
/// The same before Linux 6.9: waits until nobody has the device open any more.
const DELETE_AND_WAIT: Verb = verb(sys::UBLK_U_CMD_DEL_DEV, "deleting");

/// Stopping can be refused by the kernel while the device is open (Linux 7.0).
pub(super) const SAFE_STOP: u64 = sys::UBLK_F_SAFE_STOP_DEV as u64;

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
        let deadline = Instant::now() + GET_FEATURES.deadline;
        control.features = match control.attempt(GET_FEATURES, ANY_ID, 0, 0_u64, deadline)? {
            (0.., features) => Some(features),
            (_refused, _) => None,
        };
        Ok(control)
    }

    /// What the kernel knows about every device there is, in the order of their numbers.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn devices(&self) -> Result<Vec<DeviceInfo>> {
        let mut ids = ids_in(Path::new(CHARACTER_CLASS));
        ids.sort_unstable();
        ids.into_iter().filter_map(|id| self.info(id).transpose()).collect()
    }

    /// Whether its node can be opened, whatever else may be forbidden.
    pub(super) fn may_be_opened() -> bool {
        OpenOptions::new().read(true).write(true).open(CONTROL_PATH).is_ok()
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
    /// one in its own time, which is waited for; if that takes long, `waiting` is called once.
    ///
    /// # Errors
    ///
    /// `EBUSY` when something still has the character device; what the kernel says otherwise.
    pub fn start_recovery(&self, id: u32, waiting: impl FnOnce()) -> Result<()> {
        let started = Instant::now();
        let mut waiting = Some(waiting);
        loop {
            match self.exchange(START_RECOVERY, id, 0, ()) {
                Err(error) if error.os_error() == Some(libc::EBUSY) && started.elapsed() < DEADLINE => {
                    if started.elapsed() > RELEASE_PATIENCE
                        && let Some(waiting) = waiting.take()
                    {
                        waiting();
                    }
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

    /// As [`Self::stop`], unless anything has the block device open, the kernel itself included: `false` then.
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
    pub(super) fn has_safe_stop(&self) -> bool {
        self.features.is_some_and(|features| features & SAFE_STOP != 0)
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
            server: u32::try_from(info.ublksrv_pid).ok().filter(|&pid| pid > 0),
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
            forbidden(Error::io(format!("opening {CONTROL_PATH}"), error), nix::unistd::geteuid().is_root())
        }
        _ => Error::io(format!("opening {CONTROL_PATH}"), error),
    }
}

/// The remedy for a command that is not permitted.
fn forbidden(error: Error, is_root: bool) -> Error {
    error.remedy(if is_root {
        "root is not enough here: a container or a security module forbids it; run it outside of that"
    } else {
        "run it as root"
    })
}

/// The numbers of the devices in a class directory of the kernel; none where there is no such directory.
fn ids_in(class: &Path) -> Vec<u32> {
    let items = fs::read_dir(class).into_iter().flatten().flatten();
    items.filter_map(|item| item.file_name().to_str()?.strip_prefix("ublkc")?.parse().ok()).collect()
}

/// Why the kernel does not make another device, if that is because there are `count` of at most `limit`.
fn too_many(count: usize, limit: Option<usize>) -> Option<Error> {
    let limit = limit.filter(|&limit| count >= limit)?;
    let message = format!("the kernel allows {limit} ublk devices at once, and there are {count}");
    let remedy = format!(
        "`vhdx-ublk del` one that is not needed, or allow more: echo {} >{DEVICES_LIMIT}",
        limit.max(1) * 2
    );
    Some(Error::new(Kind::NoSpace, message).remedy(remedy))
}

/// Why an `ADD_DEV` was refused with `EACCES`: kernels before 6.15 say so when there are too many.
fn not_permitted(error: Error) -> Error {
    let limit = fs::read_to_string(DEVICES_LIMIT).ok().and_then(|text| text.trim().parse().ok());
    let is_root = nix::unistd::geteuid().is_root();
    too_many(ids_in(Path::new(CHARACTER_CLASS)).len(), limit).unwrap_or_else(|| forbidden(error, is_root))
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
    fn root_is_not_sent_to_become_root() {
        let error = || Error::new(Kind::Permission, "no");
        assert_eq!(forbidden(error(), false).remedy_text(), Some("run it as root"));
        assert!(forbidden(error(), true).remedy_text().is_some_and(|text| text.contains("container")));
    }

    #[test]
    fn a_device_too_many_is_told_from_a_missing_right() {
        assert!(too_many(63, Some(64)).is_none() && too_many(64, None).is_none());
        let error = too_many(64, Some(64)).expect("the limit");
        assert!(error.to_string().contains("allows 64 ublk devices at once, and there are 64"), "{error}");
        assert!(error.remedy_text().is_some_and(|text| text.contains("echo 128 >/sys/module/ublk_drv")));
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
    fn a_device_of_this_program_is_known_by_its_mark() {
        let (one, other) = (new_mark(), new_mark());
        assert!(is_mark_of_program(one) && is_mark_of_program(other) && one != other);
        assert!(!is_mark_of_program(0) && !is_mark_of_program(u64::MAX) && !is_mark_of_program(0x7668_6478));
    }

    #[test]
    fn a_device_that_is_gone_is_stopped_and_deleted() {
        assert!(unless_gone(Err(refused(STOP, 1, libc::ENODEV))).is_ok());
        assert!(unless_gone(Err(refused(STOP, 1, libc::EBUSY))).is_err());
    }
}
