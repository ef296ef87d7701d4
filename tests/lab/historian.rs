//! Reads, writes, zeroes and flushes a few sectors of a block device from several threads at once, until the
//! stop file exists, and then looks for an order of all requests that explains every read.
//!
//! `historian DEVICE STOP-FILE DEATHS-FILE`. Each sector is a register. Every write has a value of its own,
//! so whether there is an order is decided per sector, by intervals (Gibbons and Korach, 1997): a value is
//! the newest one from the first end to the last start of its requests; no two values may be so at once, and
//! no other value may come and go meanwhile. Zeros have no value of their own: a read of zeros is judged by
//! itself.
//!
//! The deaths file has a line for each death of the device's daemon: when it was about to be killed and when
//! it had been recovered, nanoseconds since 1970. What was under way then is repeated: such a write may have
//! come about before, been replaced, and come about again, until it has ended.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use vhdx_ublk::disk::{Buffer, PAGE_BYTES};

const THREADS: usize = 6;
const SECTOR: usize = 512;
/// Sectors that are used, in runs at the borders of blocks of 1 MiB: few, so that requests meet.
const RUNS: u64 = 8;
const RUN_SECTORS: u64 = 16;
const MIB_SECTORS: u64 = (1 << 20) / SECTOR as u64;
/// Nothing runs longer, whoever forgets to stop it.
const LIMIT: Duration = Duration::from_secs(1800);

/// What a request did to one sector: when it began and had ended, nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Event {
    start: u64,
    end: u64,
    did: Did,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Did {
    Write(u64),
    Zero,
    Read(u64),
}

/// From before a kill until after the recovery, nanoseconds, as the events have them.
type Death = (u64, u64);

/// The requests of one value.
#[derive(Clone, Copy, Debug)]
struct Value {
    written: Option<Event>,
    /// Its write may have been done twice.
    repeated: bool,
    first_end: u64,
    last_start: u64,
}

impl Value {
    /// Only the last time that a write is done counts for what follows it, and that is before its end.
    fn settle(&mut self, written: Event) {
        if self.repeated {
            self.first_end = written.end;
            self.last_start = if self.last_start > written.end { self.last_start } else { written.start };
        }
    }
}

/// Why no order of the events explains what was read of a sector.
fn judge(events: &[Event], deaths: &[Death]) -> Result<(), String> {
    let mut values: HashMap<u64, Value> = HashMap::new();
    let fresh = Value { written: None, repeated: false, first_end: u64::MAX, last_start: 0 };
    let (mut zeroes, mut zero_reads) = (vec![Event { start: 0, end: 0, did: Did::Zero }], Vec::new());
    for event in events {
        let value = match event.did {
            Did::Zero => {
                zeroes.push(*event);
                continue;
            }
            Did::Read(0) => {
                zero_reads.push(*event);
                continue;
            }
            Did::Write(value) | Did::Read(value) => values.entry(value).or_insert(fresh),
        };
        if let Did::Write(_) = event.did {
            value.written = Some(*event);
            value.repeated = deaths.iter().any(|(from, to)| event.start <= *to && event.end >= *from);
        }
        value.first_end = value.first_end.min(event.end);
        value.last_start = value.last_start.max(event.start);
    }
    for (name, value) in &mut values {
        let written = value.written.ok_or_else(|| format!("{name} was read and never written"))?;
        if value.first_end < written.start {
            return Err(format!("{name} was read before it was written"));
        }
        value.settle(written);
    }
    judge_order(&values, &zeroes)?;
    judge_zeros(&values, &zeroes, &zero_reads)
}

/// See the file's head. A value that is never certain to be the newest one has an interval the other way
/// round: it must not lie within that of another.
fn judge_order(values: &HashMap<u64, Value>, zeroes: &[Event]) -> Result<(), String> {
    let certain = |value: &&Value| value.first_end < value.last_start;
    let mut newest: Vec<(u64, u64, u64)> = values
        .iter()
        .filter(|(_, value)| certain(value))
        .map(|(name, value)| (value.first_end, value.last_start, *name))
        .collect();
    newest.sort_unstable();
    for pair in newest.windows(2) {
        if pair[1].0 < pair[0].1 {
            return Err(format!("{} and {} are the newest at once", pair[0].2, pair[1].2));
        }
    }
    let passing = values.iter().filter(|(_, value)| !certain(value));
    let passing = passing.map(|(name, value)| (value.last_start, value.first_end, *name));
    for (start, end, name) in passing.chain(zeroes.iter().map(|zero| (zero.start, zero.end, 0))) {
        let before = newest.partition_point(|zone| zone.0 < start);
        if let Some(zone) = newest[..before].last()
            && end < zone.1
        {
            return Err(format!("{} is read after {name} has replaced it", zone.2));
        }
    }
    Ok(())
}

/// Zeros are right if something has zeroed the sector that no write has surely replaced before the read.
fn judge_zeros(values: &HashMap<u64, Value>, zeroes: &[Event], reads: &[Event]) -> Result<(), String> {
    let mut writes: Vec<(u64, u64)> =
        values.values().filter_map(|value| value.written).map(|write| (write.end, write.start)).collect();
    writes.sort_unstable();
    // Of the writes that have ended by then, the latest start.
    let mut latest = 0;
    let starts: Vec<u64> = writes
        .iter()
        .map(|(_, start)| {
            latest = latest.max(*start);
            latest
        })
        .collect();
    for read in reads {
        let ended = writes.partition_point(|(end, _)| *end < read.start);
        let replaced = ended.checked_sub(1).map_or(0, |last| starts[last]);
        let is_right = zeroes.iter().any(|zero| zero.start <= read.end && zero.end >= replaced);
        if !is_right {
            return Err(format!("zeros are read at {} after a write has replaced them", read.start));
        }
    }
    Ok(())
}

struct Guest<'a> {
    file: File,
    rng: fastrand::Rng,
    began: Instant,
    next: &'a AtomicU64,
    events: HashMap<u64, Vec<Event>>,
    requests: u64,
    bad: u64,
}

impl Guest<'_> {
    fn run(&mut self, stop: &Path) {
        while !stop.exists() && self.began.elapsed() < LIMIT {
            let run = self.rng.u64(..RUNS);
            let within = self.rng.u64(..RUN_SECTORS);
            let count = self.rng.u64(1..=RUN_SECTORS - within);
            // Half of each run on either side of a block's border.
            let first = (run + 1) * MIB_SECTORS - RUN_SECTORS / 2 + within;
            match self.rng.u32(..100) {
                0..40 => self.write(first, count),
                40..45 => self.zero(first, count),
                45..48 => self.file.sync_data().unwrap_or_else(|error| self.fail(&error)),
                _ => self.read(first, count),
            }
            self.requests += 1;
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).expect("years") + 1
    }

    fn note(&mut self, sector: u64, start: u64, end: u64, did: Did) {
        self.events.entry(sector).or_default().push(Event { start, end, did });
    }

    fn fail(&mut self, error: &dyn std::fmt::Display) {
        self.bad += 1;
        println!("a request failed: {error}");
    }

    fn write(&mut self, first: u64, count: u64) {
        let value = self.next.fetch_add(1, Ordering::Relaxed);
        let (mut bytes, length) = buffer(count);
        for (sector, bytes) in (first..first + count).zip(bytes.chunks_exact_mut(SECTOR)) {
            stamp(sector, value, bytes);
        }
        let start = self.now();
        let outcome = self.file.write_all_at(&bytes[..length], first * SECTOR as u64);
        self.changed(first, count, start, outcome, Did::Write(value));
    }

    fn zero(&mut self, first: u64, count: u64) {
        let flags = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let signed = |sectors: u64| i64::try_from(sectors * SECTOR as u64).expect("small");
        let start = self.now();
        let outcome = fallocate(&self.file, flags, signed(first), signed(count));
        self.changed(first, count, start, outcome.map_err(Into::into), Did::Zero);
    }

    /// One that has failed may be there at any time from then on, or never.
    fn changed(&mut self, first: u64, count: u64, start: u64, outcome: std::io::Result<()>, did: Did) {
        let end = if outcome.is_ok() { self.now() } else { u64::MAX };
        if let Err(error) = outcome {
            self.fail(&error);
        }
        (first..first + count).for_each(|sector| self.note(sector, start, end, did));
    }

    fn read(&mut self, first: u64, count: u64) {
        let (mut bytes, length) = buffer(count);
        let start = self.now();
        if let Err(error) = self.file.read_exact_at(&mut bytes[..length], first * SECTOR as u64) {
            return self.fail(&error);
        }
        let end = self.now();
        for (sector, bytes) in (first..first + count).zip(bytes.chunks_exact(SECTOR)) {
            let value = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
            let mut expected = [0; SECTOR];
            stamp(sector, value, &mut expected);
            if bytes != expected {
                self.fail(&format!("sector {sector} is torn or of another place, it holds {value}"));
            }
            self.note(sector, start, end, Did::Read(value));
        }
    }
}

/// Whole pages, and how many bytes of them the sectors take.
fn buffer(sectors: u64) -> (Buffer, usize) {
    let length = usize::try_from(sectors).expect("few") * SECTOR;
    (Buffer::zeroed(length.next_multiple_of(PAGE_BYTES)), length)
}

fn stamp(sector: u64, value: u64, bytes: &mut [u8]) {
    if value == 0 {
        return bytes.fill(0);
    }
    for words in bytes.chunks_exact_mut(16) {
        words[..8].copy_from_slice(&value.to_le_bytes());
        words[8..].copy_from_slice(&sector.to_le_bytes());
    }
}

/// Requests of a thread come to the queue of its CPU.
fn stay_on_cpu(number: usize) {
    let mut set = CpuSet::new();
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let set = set.set(number % cpus).map(|()| set);
    if let Err(errno) = set.and_then(|set| sched_setaffinity(Pid::from_raw(0), &set)) {
        println!("a thread may use any CPU: {errno}");
    }
}

/// What the file at `path` has, of a history that began at `epoch`, nanoseconds since 1970.
fn deaths(path: &Path, epoch: u128) -> Vec<Death> {
    let text = std::fs::read_to_string(path).expect("the deaths file is there");
    let time = |word: &str| word.parse::<u128>().expect("nanoseconds").saturating_sub(epoch);
    let time = |word| u64::try_from(time(word)).expect("centuries");
    let times = text.lines().map(|line| line.split_once(' ').expect("two times"));
    times.map(|(from, to)| (time(from), time(to))).collect()
}

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [device, stop, died] = &arguments[..] else {
        println!("usage: historian DEVICE STOP-FILE DEATHS-FILE");
        return ExitCode::from(2);
    };
    let epoch = SystemTime::UNIX_EPOCH.elapsed().expect("after 1970").as_nanos();
    let (began, next) = (Instant::now(), AtomicU64::new(1));
    let guest = |number: usize| {
        stay_on_cpu(number);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).custom_flags(libc::O_DIRECT).open(device);
        let (file, rng) = (file.expect("the device opens"), fastrand::Rng::with_seed(number as u64));
        let mut guest = Guest { file, rng, began, next: &next, events: HashMap::new(), requests: 0, bad: 0 };
        guest.run(Path::new(stop));
        (guest.events, guest.requests, guest.bad)
    };
    let (mut events, mut requests, mut bad) = (HashMap::<u64, Vec<Event>>::new(), 0, 0);
    thread::scope(|scope| {
        let guests: Vec<_> = (0..THREADS).map(|number| scope.spawn(move || guest(number))).collect();
        for done in guests {
            let (more, requested, failed) = done.join().expect("a panic ends the process");
            for (sector, more) in more {
                events.entry(sector).or_default().extend(more);
            }
            (requests, bad) = (requests + requested, bad + failed);
        }
    });
    let deaths = deaths(Path::new(died), epoch);
    for (sector, events) in &events {
        if let Err(why) = judge(events, &deaths) {
            bad += 1;
            println!("sector {sector}: no order of the requests explains what was read: {why}");
        }
    }
    let judged: usize = events.values().map(Vec::len).sum();
    println!("{requests} requests, {judged} events of {} sectors, {bad} bad", events.len());
    if bad == 0 && requests > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(start: u64, end: u64, did: Did) -> Event {
        Event { start, end, did }
    }

    #[test]
    fn requests_that_overlap_may_come_in_any_order() {
        let events = [
            event(10, 50, Did::Write(1)),
            event(20, 60, Did::Write(2)),
            event(15, 30, Did::Read(0)),
            event(31, 40, Did::Read(2)),
            event(55, 70, Did::Read(1)),
            event(71, 80, Did::Zero),
            event(81, 90, Did::Read(0)),
        ];
        assert_eq!(judge(&events, &[]), Ok(()));
    }

    #[test]
    fn a_stale_read_is_seen() {
        let writes = [event(1, 2, Did::Write(1)), event(3, 4, Did::Write(2))];
        let read = |did| judge(&[&writes[..], &[event(5, 6, did)]].concat(), &[]);
        assert_eq!(read(Did::Read(2)), Ok(()));
        assert!(read(Did::Read(1)).is_err(), "it was replaced");
        assert!(read(Did::Read(0)).is_err(), "so were the zeros");
        assert!(read(Did::Read(3)).is_err(), "it was never written");
    }

    #[test]
    fn a_value_that_comes_back_is_seen() {
        let events = [
            event(1, 100, Did::Write(1)),
            event(2, 99, Did::Write(2)),
            event(10, 11, Did::Read(1)),
            event(12, 13, Did::Read(2)),
        ];
        assert_eq!(judge(&events, &[]), Ok(()));
        let back = [&events[..], &[event(14, 15, Did::Read(1))]].concat();
        assert!(judge(&back, &[]).is_err(), "1, 2 and then 1 again");
    }

    #[test]
    fn a_write_that_was_acknowledged_is_not_lost_among_zeros() {
        let events = [event(1, 2, Did::Zero), event(3, 4, Did::Write(1)), event(5, 6, Did::Zero)];
        let read = |did| judge(&[&events[..], &[event(7, 8, did)]].concat(), &[]);
        assert_eq!(read(Did::Read(0)), Ok(()));
        assert!(read(Did::Read(1)).is_err(), "it was zeroed");
    }

    /// One that failed may come later, but not before it was issued.
    #[test]
    fn a_write_that_failed_may_be_there() {
        let events = [event(1, u64::MAX, Did::Write(1)), event(3, 4, Did::Write(2))];
        let read = |did| judge(&[&events[..], &[event(7, 8, did)]].concat(), &[]);
        assert_eq!((read(Did::Read(1)), read(Did::Read(2))), (Ok(()), Ok(())));
        assert!(judge(&[event(3, 4, Did::Write(1)), event(1, 2, Did::Read(1))], &[]).is_err());
    }

    /// A write that was under way at a death may come back until it has ended, and not later.
    #[test]
    fn a_write_that_was_repeated_may_come_back() {
        let events = [
            event(1, 50, Did::Write(1)),
            event(2, 3, Did::Read(1)),
            event(4, 5, Did::Write(2)),
            event(51, 52, Did::Read(1)),
        ];
        assert!(judge(&events, &[]).is_err(), "1, 2 and then 1 again");
        assert!(judge(&events, &[(60, 70)]).is_err(), "no death met it");
        assert_eq!(judge(&events, &[(10, 20)]), Ok(()));
        let back = [&events[..], &[event(53, 54, Did::Write(3)), event(55, 56, Did::Read(1))]].concat();
        assert!(judge(&back, &[(10, 20)]).is_err(), "3 has replaced it for good");
        let late = [&events[..3], &[event(51, 52, Did::Read(2)), event(53, 54, Did::Read(1))]].concat();
        assert!(judge(&late, &[(10, 20)]).is_err(), "2 was left, and 1 is there later");
    }
}
