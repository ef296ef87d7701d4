//! What uses a device: its requests, and what it may read then.

use std::collections::BTreeMap;

use libublk::sys;

/// How many places of the disk are used, and the bytes between two of them: each is a block of its own. The
/// last one is there when the disk has grown.
pub const PLACES: usize = 6;
const DISTANCE: u64 = 1 << 20;

/// How many such distances there are on the disk at first.
const FIRST_OF_GROWN: u64 = 16;

/// How many kinds of requests there are.
pub const KINDS: usize = 6 * PLACES;

/// Bytes of a request.
const LENGTH: u32 = 4096;

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    pub op: Op,
    /// The device that it was sent to.
    pub device: u32,
    /// Where it is.
    pub stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Write(usize, u64),
    Read(usize),
    Zero(usize),
    /// Of all that there is until the next place. What is read then may be as it was.
    Discard(usize),
    Flush,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It waits in the kernel.
    Queued,
    /// A server has it.
    Served,
    Done,
    Failed,
}

/// The users of the disk that is in one image.
#[derive(Debug, Default)]
pub struct Guest {
    pub requests: Vec<Request>,
    /// What was acknowledged of each place.
    acknowledged: BTreeMap<usize, u64>,
    /// What may be there as well: writes that have failed, or were never answered.
    possible: BTreeMap<usize, Vec<u64>>,
    last: u64,
    /// How many writes were acknowledged, and how many requests were repeated to another server.
    pub acknowledgements: usize,
    pub repetitions: usize,
    /// How many requests a server that was killed had.
    pub failures: usize,
}

/// Where a place is.
fn sector(place: usize) -> u64 {
    let block = if place == PLACES - 1 { FIRST_OF_GROWN } else { place as u64 };
    block * DISTANCE / 512
}

fn is_there(place: usize, sectors: u64) -> bool {
    sector(place) + DISTANCE / 512 <= sectors
}

impl Op {
    /// The operation, its sector and its length in sectors.
    pub fn describe(self) -> (u32, u64, u32) {
        match self {
            Self::Write(place, _) => (sys::UBLK_IO_OP_WRITE, sector(place), LENGTH / 512),
            Self::Read(place) => (sys::UBLK_IO_OP_READ, sector(place), LENGTH / 512),
            Self::Zero(place) => (sys::UBLK_IO_OP_WRITE_ZEROES, sector(place), LENGTH / 512),
            Self::Discard(place) => {
                let sectors = u32::try_from(DISTANCE / 512).expect("small");
                (sys::UBLK_IO_OP_DISCARD, sector(place), sectors)
            }
            Self::Flush => (sys::UBLK_IO_OP_FLUSH, 0, 0),
        }
    }

    /// What it carries to its server.
    pub fn data(self) -> Vec<u8> {
        match self {
            Self::Write(_, value) => value.to_ne_bytes().repeat(LENGTH as usize / 8),
            Self::Read(_) | Self::Zero(_) | Self::Discard(_) | Self::Flush => Vec::new(),
        }
    }

    fn length(self) -> i32 {
        match self {
            Self::Write(..) | Self::Read(_) => LENGTH.cast_signed(),
            Self::Zero(_) | Self::Discard(_) | Self::Flush => 0,
        }
    }

    fn place(self) -> Option<usize> {
        match self {
            Self::Write(place, _) | Self::Read(place) | Self::Zero(place) | Self::Discard(place) => {
                Some(place)
            }
            Self::Flush => None,
        }
    }

    /// What it may leave at its place.
    fn change(self) -> Option<(usize, u64)> {
        match self {
            Self::Write(place, value) => Some((place, value)),
            Self::Zero(place) | Self::Discard(place) => Some((place, 0)),
            Self::Read(_) | Self::Flush => None,
        }
    }
}

impl Guest {
    /// Sends a request of the `kind`-th kind to `device`, which has so many `sectors`, unless one for the
    /// same place is under way.
    pub fn send(&mut self, (device, sectors): (u32, u64), kind: usize) {
        let place = kind % PLACES;
        if !is_there(place, sectors) {
            return;
        }
        let op = match kind / PLACES {
            0 | 1 => {
                self.last += 1;
                Op::Write(place, self.last)
            }
            2 => Op::Read(place),
            3 => Op::Discard(place),
            4 => Op::Zero(place),
            _ => Op::Flush,
        };
        let is_under_way = |request: &Request| {
            matches!(request.stage, Stage::Queued | Stage::Served) && request.op.place() == Some(place)
        };
        if op == Op::Flush || !self.requests.iter().any(is_under_way) {
            self.requests.push(Request { op, device, stage: Stage::Queued });
        }
    }

    /// Reads every place through `device`, which has so many `sectors`.
    pub fn read_all(&mut self, (device, sectors): (u32, u64)) -> Result<(), String> {
        for place in 0..PLACES {
            if is_there(place, sectors) {
                self.requests.push(Request { op: Op::Read(place), device, stage: Stage::Queued });
            } else if self.acknowledged.contains_key(&place) {
                return Err(format!("place {place} was written, and the disk has {sectors} sectors"));
            }
        }
        Ok(())
    }

    /// The server has completed a request.
    pub fn complete(&mut self, number: usize, result: i32, data: &[u8]) -> Result<(), String> {
        let request = &mut self.requests[number];
        if request.stage != Stage::Served {
            return Err(format!("request {number} is completed twice: {request:?}"));
        }
        if result != request.op.length() {
            return Err(format!("request {number} has failed, nothing was wrong: {result}, {request:?}"));
        }
        request.stage = Stage::Done;
        let op = request.op;
        if let Op::Discard(place) = op {
            self.possible.entry(place).or_default().push(0);
        } else if let Some((place, value)) = op.change() {
            self.acknowledgements += 1;
            self.acknowledged.insert(place, value);
            self.possible.remove(&place);
        }
        if let Op::Read(place) = op { self.compare(place, data) } else { Ok(()) }
    }

    /// A request ends without its server: nothing is known of what it has done.
    pub fn fail(&mut self, device: u32) {
        self.fail_at(device, &[Stage::Queued, Stage::Served]);
    }

    /// The same of those that a server has.
    pub fn fail_served(&mut self, device: u32) {
        self.fail_at(device, &[Stage::Served]);
    }

    fn fail_at(&mut self, device: u32, stages: &[Stage]) {
        for request in &mut self.requests {
            if request.device == device && stages.contains(&request.stage) {
                request.stage = Stage::Failed;
                self.failures += 1;
                if let Some((place, value)) = request.op.change() {
                    self.possible.entry(place).or_default().push(value);
                }
            }
        }
    }

    /// The server has gone: what it has not completed is another one's.
    pub fn repeat(&mut self, device: u32) {
        for request in &mut self.requests {
            if request.device == device && request.stage == Stage::Served {
                request.stage = Stage::Queued;
                self.repetitions += 1;
            }
        }
    }

    fn compare(&self, place: usize, data: &[u8]) -> Result<(), String> {
        let values: Vec<u64> =
            data.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("eight"))).collect();
        let known = self.acknowledged.get(&place).copied().unwrap_or_default();
        let possible = self.possible.get(&place).map_or(&[][..], Vec::as_slice);
        let fits = |value: &u64| *value == known || possible.contains(value);
        if values.len() * 8 == LENGTH as usize && values.iter().all(fits) {
            return Ok(());
        }
        let found = values.iter().find(|value| !fits(value));
        Err(format!("place {place} has {found:?}, acknowledged was {known}, possible is {possible:?}"))
    }
}
