//! The driver of a machine that a test has made: its devices, and what its commands do to them.

use std::collections::BTreeMap;
use std::fs::File;
use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use libublk::sys;

/// Bytes of the descriptors of one queue, as many tags as it may have.
const QUEUE_BYTES: u64 = 98304;

/// Bytes of a request's descriptor.
const DESCRIPTOR_BYTES: u64 = 24;

/// The first number of a device: those of the machine below are other ones.
const FIRST_ID: u32 = 1000;

const STATE: usize = offset_of!(sys::ublksrv_ctrl_dev_info, state);
const QUEUES: usize = offset_of!(sys::ublksrv_ctrl_dev_info, nr_hw_queues);
const DEPTH: usize = offset_of!(sys::ublksrv_ctrl_dev_info, queue_depth);
const SERVER: usize = offset_of!(sys::ublksrv_ctrl_dev_info, ublksrv_pid);
const ID: usize = offset_of!(sys::ublksrv_ctrl_dev_info, dev_id);
const FLAGS: usize = offset_of!(sys::ublksrv_ctrl_dev_info, flags);
const STOP: u32 = sys::UBLK_U_CMD_STOP_DEV;
const TRY_STOP: u32 = sys::UBLK_U_CMD_TRY_STOP_DEV;
const DELETE: u32 = sys::UBLK_U_CMD_DEL_DEV_ASYNC;
const DELETE_AND_WAIT: u32 = sys::UBLK_U_CMD_DEL_DEV;

/// Where the parameters of a disk have its size.
const SECTORS: usize = offset_of!(sys::ublk_params, basic) + offset_of!(sys::ublk_param_basic, dev_sectors);

const INFO_BYTES: usize = size_of::<sys::ublksrv_ctrl_dev_info>();

/// What a driver always grants.
const ALWAYS: u64 = (sys::UBLK_F_URING_CMD_COMP_IN_TASK | sys::UBLK_F_CMD_IOCTL_ENCODE) as u64;

/// A command, as it is laid out for the driver.
#[derive(Clone, Debug)]
pub struct Command {
    pub op: u32,
    pub device: u32,
    pub data: u64,
    pub payload: Vec<u8>,
}

impl Command {
    pub fn parse(text: &[u8]) -> Self {
        let op = u32::from_ne_bytes(text[..4].try_into().expect("four bytes"));
        let (command, payload) = text[4..].split_at(32);
        let device = u32::from_ne_bytes(command[..4].try_into().expect("four bytes"));
        let data = offset_of!(sys::ublksrv_ctrl_cmd, data);
        let data = u64::from_ne_bytes(command[data..data + 8].try_into().expect("eight bytes"));
        Self { op, device, data, payload: payload.into() }
    }

    /// Whether the device gets no more requests while the driver has it.
    pub fn stops(&self) -> bool {
        [STOP, TRY_STOP, DELETE, DELETE_AND_WAIT].contains(&self.op)
    }

    /// Whether the device's requests wait afterwards, even if the driver does not say so.
    pub fn pauses(&self) -> bool {
        self.op == sys::UBLK_U_CMD_QUIESCE_DEV
    }

    pub fn name(&self) -> &'static str {
        match self.op {
            sys::UBLK_U_CMD_GET_FEATURES => "GET_FEATURES",
            sys::UBLK_U_CMD_ADD_DEV => "ADD_DEV",
            sys::UBLK_U_CMD_GET_DEV_INFO => "GET_DEV_INFO",
            sys::UBLK_U_CMD_GET_QUEUE_AFFINITY => "GET_QUEUE_AFFINITY",
            sys::UBLK_U_CMD_SET_PARAMS => "SET_PARAMS",
            sys::UBLK_U_CMD_START_DEV => "START_DEV",
            sys::UBLK_U_CMD_START_USER_RECOVERY => "START_USER_RECOVERY",
            sys::UBLK_U_CMD_END_USER_RECOVERY => "END_USER_RECOVERY",
            sys::UBLK_U_CMD_UPDATE_SIZE => "UPDATE_SIZE",
            sys::UBLK_U_CMD_QUIESCE_DEV => "QUIESCE_DEV",
            sys::UBLK_U_CMD_STOP_DEV => "STOP_DEV",
            sys::UBLK_U_CMD_TRY_STOP_DEV => "TRY_STOP_DEV",
            sys::UBLK_U_CMD_DEL_DEV_ASYNC => "DEL_DEV_ASYNC",
            sys::UBLK_U_CMD_DEL_DEV => "DEL_DEV",
            _ => "?",
        }
    }
}

/// What a tag is to the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tag {
    /// Its server has not offered it.
    Unfetched,
    /// It waits for a request.
    Offered,
    /// Its server has this request.
    Serves(usize),
    /// It was given back for good.
    Ended,
}

/// What a device does when its server has gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Dead,
    Live,
    Quiesced,
    FailIo,
}

#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Device {
    pub id: u32,
    info: [u8; INFO_BYTES],
    pub state: State,
    /// The process that has the character device open.
    pub holder: Option<u32>,
    /// The process that serves it.
    pub server: Option<u32>,
    /// Each of them is offered, or not, by its queue and number.
    pub tags: BTreeMap<(u16, u16), Tag>,
    /// It was served once.
    pub was_served: bool,
    /// It gets no more requests.
    pub stopping: bool,
    /// Its requests wait until a server resumes it.
    pub pausing: bool,
    /// The size of its disk.
    pub sectors: u64,
    /// How many others have its nodes open.
    pub character_openers: usize,
    pub block_openers: usize,
    deleted: bool,
    node: File,
}

/// What a command has led to, beside its answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect {
    /// These tags come back: of a device, a queue, and a number.
    Abort(u32, (u16, u16)),
    /// All requests of this device that its server has not completed have failed.
    Fail(u32),
    /// Those that its server has have failed; others wait.
    FailServed(u32),
    /// The device is served.
    Serves(u32),
}

/// The driver.
#[derive(Debug)]
pub struct Driver {
    folder: PathBuf,
    features: u64,
    pub devices: BTreeMap<u32, Device>,
    /// How often a disk has become larger.
    pub growths: usize,
}

impl Device {
    pub fn flags(&self) -> u64 {
        u64::from_ne_bytes(self.info[FLAGS..FLAGS + 8].try_into().expect("eight bytes"))
    }

    fn has(&self, flag: u32) -> bool {
        self.flags() & u64::from(flag) != 0
    }

    /// What its requests do when its server has gone, as `add --recovery` calls it.
    pub fn recovery(&self) -> &'static str {
        match self.state {
            State::Quiesced if self.repeats() => "reissue",
            State::Quiesced => "queue",
            State::FailIo => "fail",
            State::Dead | State::Live => "none",
        }
    }

    /// Whether requests that its server has not completed are repeated to the next one.
    pub fn repeats(&self) -> bool {
        self.has(sys::UBLK_F_USER_RECOVERY_REISSUE)
    }

    fn shape(&self) -> (u16, u16) {
        let at = |place: usize| u16::from_ne_bytes([self.info[place], self.info[place + 1]]);
        (at(QUEUES), at(DEPTH))
    }

    fn is_offered(&self) -> bool {
        let (queues, depth) = self.shape();
        let begun = self.tags.values().filter(|tag| **tag != Tag::Unfetched).count();
        begun == usize::from(queues) * usize::from(depth)
    }

    /// Whether a process has its character device open.
    fn is_open(&self) -> bool {
        self.holder.is_some() || self.character_openers > 0
    }

    fn is_busy(&self) -> bool {
        self.server.is_some() && self.tags.values().any(|tag| matches!(tag, Tag::Serves(_)))
    }

    fn give_back(&mut self, effects: &mut Vec<Effect>) {
        for (place, tag) in &mut self.tags {
            if *tag == Tag::Offered {
                *tag = Tag::Ended;
                effects.push(Effect::Abort(self.id, *place));
            }
        }
    }

    fn info(&self) -> Vec<u8> {
        let mut info = self.info;
        let state = match self.state {
            State::Dead => sys::UBLK_S_DEV_DEAD,
            State::Live => sys::UBLK_S_DEV_LIVE,
            State::Quiesced => sys::UBLK_S_DEV_QUIESCED,
            State::FailIo => sys::UBLK_S_DEV_FAIL_IO,
        };
        info[STATE..STATE + 2].copy_from_slice(&u16::try_from(state).expect("small").to_ne_bytes());
        let server = self.server.map_or(-1, u32::cast_signed);
        info[SERVER..SERVER + 4].copy_from_slice(&server.to_ne_bytes());
        info.into()
    }

    /// Puts a request where its server reads it.
    pub fn describe(&self, (queue, tag): (u16, u16), op: u32, sector: u64, sectors: u32) {
        let mut descriptor = op.to_ne_bytes().to_vec();
        descriptor.extend(sectors.to_ne_bytes());
        descriptor.extend(sector.to_ne_bytes());
        descriptor.extend(0_u64.to_ne_bytes());
        let at = u64::from(queue) * QUEUE_BYTES + u64::from(tag) * DESCRIPTOR_BYTES;
        self.node.write_all_at(&descriptor, at).expect("room");
    }
}

impl Driver {
    pub fn new(folder: PathBuf, features: u64) -> Self {
        File::create(folder.join("ublk-control")).expect("room");
        Self { folder, features: features | ALWAYS, devices: BTreeMap::new(), growths: 0 }
    }

    /// Whether the driver can answer `command` now.
    pub fn is_ready(&self, command: &Command) -> bool {
        let Some(device) = self.devices.get(&command.device) else { return true };
        match command.op {
            sys::UBLK_U_CMD_START_DEV | sys::UBLK_U_CMD_END_USER_RECOVERY => device.is_offered(),
            TRY_STOP if device.block_openers > 0 => true,
            STOP | TRY_STOP | DELETE | DELETE_AND_WAIT => !device.is_busy(),
            _ => true,
        }
    }

    /// A command has come: a device that is to be stopped gets no more requests.
    pub fn begin(&mut self, command: &Command) {
        if command.stops()
            && let Some(device) = self.devices.get_mut(&command.device)
            && !(command.op == TRY_STOP && device.block_openers > 0)
        {
            device.stopping = true;
        }
    }

    /// The command by which the device was to be stopped never came.
    pub fn continues(&mut self, device: u32) {
        if let Some(device) = self.devices.get_mut(&device) {
            device.stopping = device.state == State::Dead && device.was_served;
        }
    }

    /// Executes `command`: its result, and its payload then.
    pub fn execute(&mut self, command: &Command, effects: &mut Vec<Effect>) -> Result<Vec<u8>, i32> {
        match command.op {
            sys::UBLK_U_CMD_GET_FEATURES => return Ok(self.features.to_ne_bytes().into()),
            sys::UBLK_U_CMD_ADD_DEV => return self.add(command),
            _ => {}
        }
        let device = self.devices.get_mut(&command.device).ok_or(libc::ENODEV)?;
        let server = u32::try_from(command.data).unwrap_or_default();
        match command.op {
            sys::UBLK_U_CMD_GET_DEV_INFO => return Ok(device.info()),
            sys::UBLK_U_CMD_GET_QUEUE_AFFINITY => return Ok(vec![0xff; command.payload.len()]),
            sys::UBLK_U_CMD_SET_PARAMS if device.state == State::Dead => {
                let sectors = command.payload[SECTORS..][..8].try_into().expect("eight bytes");
                device.sectors = u64::from_ne_bytes(sectors);
            }
            sys::UBLK_U_CMD_START_DEV if device.state == State::Dead && !device.stopping => {
                self.serve(command.device, server, effects);
            }
            sys::UBLK_U_CMD_START_USER_RECOVERY => {
                let waits = matches!(device.state, State::Quiesced | State::FailIo);
                if !device.has(sys::UBLK_F_USER_RECOVERY) {
                    return Err(libc::EINVAL);
                }
                if !waits || device.is_open() {
                    return Err(libc::EBUSY);
                }
            }
            sys::UBLK_U_CMD_END_USER_RECOVERY if device.state != State::Live && !device.stopping => {
                if device.state == State::Dead {
                    return Err(libc::EBUSY);
                }
                self.serve(command.device, server, effects);
            }
            sys::UBLK_U_CMD_UPDATE_SIZE if device.state == State::Live => {
                self.growths += usize::from(command.data > device.sectors);
                device.sectors = command.data;
                self.size_node(command.device);
            }
            sys::UBLK_U_CMD_QUIESCE_DEV if device.state == State::Live => {
                device.state = State::Quiesced;
                device.pausing = true;
                device.give_back(effects);
            }
            TRY_STOP if device.block_openers > 0 => return Err(libc::EBUSY),
            STOP | TRY_STOP => self.stop(command.device, effects),
            DELETE | DELETE_AND_WAIT => {
                self.stop(command.device, effects);
                self.devices.get_mut(&command.device).expect("it is there").deleted = true;
                self.free(command.device);
            }
            _ => return Err(libc::EBUSY),
        }
        Ok(command.payload.clone())
    }

    fn add(&mut self, command: &Command) -> Result<Vec<u8>, i32> {
        let id = match command.device {
            u32::MAX => (FIRST_ID..).find(|id| !self.devices.contains_key(id)).expect("there are many"),
            id if self.devices.contains_key(&id) => return Err(libc::EEXIST),
            id => id,
        };
        let mut info: [u8; INFO_BYTES] = command.payload[..].try_into().map_err(|_| libc::EINVAL)?;
        info[ID..ID + 4].copy_from_slice(&id.to_ne_bytes());
        let wanted = u64::from_ne_bytes(info[FLAGS..FLAGS + 8].try_into().expect("eight bytes"));
        let granted = wanted & self.features | ALWAYS;
        info[FLAGS..FLAGS + 8].copy_from_slice(&granted.to_ne_bytes());
        let path = self.folder.join(format!("ublkc{id}"));
        let node = File::options().read(true).write(true).create_new(true).open(path).expect("room");
        let device = Device {
            id,
            info,
            state: State::Dead,
            holder: None,
            server: None,
            tags: BTreeMap::new(),
            was_served: false,
            stopping: false,
            pausing: false,
            sectors: 0,
            character_openers: 0,
            block_openers: 0,
            deleted: false,
            node,
        };
        device.node.set_len(u64::from(device.shape().0) * QUEUE_BYTES).expect("room");
        let answer = device.info();
        self.devices.insert(id, device);
        Ok(answer)
    }

    fn serve(&mut self, id: u32, server: u32, effects: &mut Vec<Effect>) {
        let device = self.devices.get_mut(&id).expect("it is there");
        device.state = State::Live;
        device.was_served = true;
        device.server = Some(server);
        device.pausing = false;
        self.size_node(id);
        effects.push(Effect::Serves(id));
    }

    fn size_node(&self, id: u32) {
        let node = File::create(self.folder.join(format!("ublkb{id}"))).expect("room");
        node.set_len(self.devices[&id].sectors * 512).expect("it is sparse");
    }

    /// The requests of a device wait, and nothing else is done about them.
    pub fn pause(&mut self, id: u32) {
        if let Some(device) = self.devices.get_mut(&id) {
            device.pausing = true;
        }
    }

    /// Another process opens the nodes of every device, as a user of the disk or its server does.
    pub fn open(&mut self, character: bool) {
        for device in self.devices.values_mut() {
            if character {
                device.character_openers += 1;
            } else if device.state == State::Live {
                device.block_openers += 1;
            }
        }
    }

    /// All of them are closed.
    pub fn close(&mut self) {
        let ids: Vec<u32> = self.devices.keys().copied().collect();
        for id in ids {
            let device = self.devices.get_mut(&id).expect("it is there");
            (device.character_openers, device.block_openers) = (0, 0);
            self.free(id);
        }
    }

    fn stop(&mut self, id: u32, effects: &mut Vec<Effect>) {
        let device = self.devices.get_mut(&id).expect("it is there");
        device.state = State::Dead;
        device.server = None;
        device.give_back(effects);
        effects.push(Effect::Fail(id));
        let _ = std::fs::remove_file(self.folder.join(format!("ublkb{id}"))); // it may not have been started
    }

    /// Frees the number of a device that was deleted, once nothing has it open.
    fn free(&mut self, id: u32) {
        if self
            .devices
            .get(&id)
            .is_some_and(|device| device.deleted && !device.is_open() && device.block_openers == 0)
        {
            self.devices.remove(&id);
            std::fs::remove_file(self.folder.join(format!("ublkc{id}"))).expect("it is there");
        }
    }

    /// The process has closed the device: it gives the tags up, or has ended.
    pub fn release(&mut self, id: u32, effects: &mut Vec<Effect>) {
        let Some(device) = self.devices.get_mut(&id) else { return };
        device.holder = None;
        device.tags.clear();
        if device.state == State::Live {
            device.state = match () {
                () if device.has(sys::UBLK_F_USER_RECOVERY_FAIL_IO) => State::FailIo,
                () if device.has(sys::UBLK_F_USER_RECOVERY) => State::Quiesced,
                () => State::Dead,
            };
        }
        match device.state {
            State::Quiesced if device.repeats() => {}
            State::Quiesced => effects.push(Effect::FailServed(id)),
            _ => effects.push(Effect::Fail(id)),
        }
        device.server = None;
        self.free(id);
    }
}
