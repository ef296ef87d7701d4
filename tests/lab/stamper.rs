//! Writes stamps to a block device until the stop file exists, remembers what was acknowledged, and reads it
//! back.
//!
//! `stamper DEVICE STOP-FILE [--errors] [--flushed] [--ledger FILE]`: several threads write, zero, flush and
//! verify, each its own areas, which lie side by side in the same blocks of the image. Every sector carries
//! its number and the write's, so a lost, torn or misplaced one is recognised. With `--errors` a request may
//! fail; what it was to write may be there then, or not. With `--flushed` only an acknowledged flush protects
//! a write: for hosts whose disk fails. Ends when the stop file exists: everything is read back, and a line
//! says what was done.
//!
//! `stamper DEVICE --verify FILE` reads back what a ledger says: of every unit, what the last acknowledged
//! flush covered, or something that was written since.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, fallocate};
use vhdx_ublk::disk::Buffer;

const THREADS: u64 = 4;
const UNIT: u64 = 4096;
/// Neighbouring areas belong to different threads.
const AREA: u64 = 16 * UNIT;
/// Bytes of the device that are used: some hundred blocks, so that many are written for the first time.
const SPAN: u64 = 512 << 20;
const SECTOR: usize = 512;
/// Nothing runs longer, whoever forgets to stop it.
const LIMIT: Duration = Duration::from_secs(1800);

#[derive(Clone, Default)]
struct Unit {
    /// The write that was acknowledged last; 0 for zeros.
    value: u64,
    /// Writes that failed since: each may be there or not.
    uncertain: Vec<u64>,
    /// What the last acknowledged flush covered, or was written durably since.
    flushed: u64,
    /// All that was written since.
    since: Vec<u64>,
}

impl Unit {
    /// Whether a sector of it may hold this value.
    fn allows(&self, value: u64, flushed_only: bool) -> bool {
        if flushed_only {
            self.flushed == value || self.since.contains(&value)
        } else {
            self.value == value || self.uncertain.contains(&value)
        }
    }

    /// It is durable as it is: a flush was acknowledged that was submitted after every write so far had
    /// ended, or the last write was durable itself.
    fn flush(&mut self) {
        self.flushed = self.value;
        self.since.clone_from(&self.uncertain);
    }
}

#[derive(Clone, Copy, Default)]
struct Rules {
    errors_allowed: bool,
    flushed_only: bool,
}

#[derive(Default)]
struct Count {
    writes: u64,
    reads: u64,
    zeroes: u64,
    /// Those that were acknowledged.
    flushes: u64,
    /// Writes that were durable when they were acknowledged.
    durable: u64,
    errors: u64,
    bad: u64,
}

struct Writer {
    number: u64,
    file: File,
    /// The same device: what is written through it is durable when it is acknowledged.
    durable: File,
    rng: fastrand::Rng,
    units: Vec<Unit>,
    /// Units that were written since the last acknowledged flush.
    unflushed: Vec<usize>,
    next: u64,
    rules: Rules,
    count: Count,
}

impl Writer {
    fn new(number: u64, device: &Path, writable: bool, rules: Rules) -> Self {
        let open = |flags| {
            let file = OpenOptions::new()
                .read(true)
                .write(writable)
                .custom_flags(libc::O_DIRECT | flags)
                .open(device);
            file.expect("the device opens")
        };
        let units = usize::try_from(SPAN / THREADS / UNIT).expect("small");
        Self {
            number,
            file: open(0),
            durable: open(libc::O_DSYNC),
            rng: fastrand::Rng::with_seed(number),
            units: vec![Unit::default(); units],
            unflushed: Vec::new(),
            next: 1,
            rules,
            count: Count::default(),
        }
    }

    /// Where a unit of this thread lies on the device.
    fn offset(&self, unit: usize) -> u64 {
        let per_area = AREA / UNIT;
        let unit = unit as u64;
        (unit / per_area * THREADS + self.number) * AREA + unit % per_area * UNIT
    }

    fn run(mut self, stop: &Path) -> Self {
        let until = Instant::now() + LIMIT;
        while !stop.exists() && Instant::now() < until {
            let (unit, count) = self.choose();
            match self.rng.u32(..100) {
                0..50 => self.write(unit, count, false),
                50..55 => self.write(unit, count, true),
                55..65 => self.zero(unit, count),
                65..70 => self.flush(),
                _ => self.verify(unit, count),
            }
        }
        self.verify_all();
        self
    }

    fn verify_all(&mut self) {
        let per_area = usize::try_from(AREA / UNIT).expect("small");
        for first in (0..self.units.len()).step_by(per_area) {
            self.verify(first, per_area);
        }
    }

    /// Some units of one area.
    fn choose(&mut self) -> (usize, usize) {
        let per_area = usize::try_from(AREA / UNIT).expect("small");
        let unit = self.rng.usize(..self.units.len());
        (unit, self.rng.usize(1..=per_area - unit % per_area))
    }

    fn write(&mut self, first: usize, count: usize, durable: bool) {
        let (value, offset) = (self.next, self.offset(first));
        self.next += 1;
        let mut bytes = Buffer::zeroed(count * usize::try_from(UNIT).expect("small"));
        for (index, sector) in bytes.chunks_exact_mut(SECTOR).enumerate() {
            stamp(offset / SECTOR as u64 + index as u64, value, sector);
        }
        let file = if durable { &self.durable } else { &self.file };
        let result = file.write_all_at(&bytes, offset);
        self.count.writes += 1;
        if self.record(first, count, value, result) && durable {
            self.count.durable += 1;
            self.units[first..first + count].iter_mut().for_each(Unit::flush);
        }
    }

    fn zero(&mut self, first: usize, count: usize) {
        let (offset, length) = (self.offset(first), count as u64 * UNIT);
        let signed = |number: u64| i64::try_from(number).expect("small");
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let result = fallocate(&self.file, flags, signed(offset), signed(length)).map_err(Into::into);
        self.count.zeroes += 1;
        self.record(first, count, 0, result);
    }

    fn record(&mut self, first: usize, count: usize, value: u64, result: std::io::Result<()>) -> bool {
        let done = self.tolerate(result);
        for unit in &mut self.units[first..first + count] {
            if done {
                unit.value = value;
                unit.uncertain.clear();
            } else {
                unit.uncertain.push(value);
            }
            unit.since.push(value);
        }
        self.unflushed.extend(first..first + count);
        done
    }

    fn flush(&mut self) {
        let result = self.file.sync_data();
        if self.tolerate(result) {
            self.count.flushes += 1;
            for unit in self.unflushed.drain(..) {
                self.units[unit].flush();
            }
        }
    }

    fn verify(&mut self, first: usize, count: usize) {
        let offset = self.offset(first);
        let unit_bytes = usize::try_from(UNIT).expect("small");
        let mut bytes = Buffer::zeroed(count * unit_bytes);
        let result = self.file.read_exact_at(&mut bytes, offset);
        self.count.reads += 1;
        if !self.tolerate(result) {
            return;
        }
        for (index, found) in bytes.chunks_exact(unit_bytes).enumerate() {
            for (number, sector) in
                (offset / SECTOR as u64 + index as u64 * 8..).zip(found.chunks_exact(SECTOR))
            {
                self.judge(&self.units[first + index].clone(), number, sector);
            }
            // A unit that was written in part, by a request that failed, stays uncertain; so does everything
            // on a disk that may lose what was not flushed.
            let values: Vec<_> = found.chunks_exact(SECTOR).map(value_of).collect();
            if !self.rules.flushed_only && values.windows(2).all(|pair| pair[0] == pair[1]) {
                let unit = &mut self.units[first + index];
                unit.value = values[0];
                unit.uncertain.clear();
            }
        }
    }

    fn judge(&mut self, unit: &Unit, number: u64, sector: &[u8]) {
        let value = value_of(sector);
        let mut expected = [0; SECTOR];
        stamp(number, value, &mut expected);
        if sector != expected || !unit.allows(value, self.rules.flushed_only) {
            self.count.bad += 1;
            let torn = if sector == expected { "lost" } else { "torn" };
            println!(
                "sector {number} is {torn}: it holds write {value}, acknowledged was {}, uncertain {:?}, \
                 flushed {}, written since {:?}",
                unit.value, unit.uncertain, unit.flushed, unit.since
            );
        }
    }

    fn tolerate(&mut self, result: std::io::Result<()>) -> bool {
        let Err(error) = result else { return true };
        self.count.errors += 1;
        if !self.rules.errors_allowed {
            self.count.bad += 1;
            println!("a request failed: {error}");
        }
        false
    }
}

fn stamp(number: u64, value: u64, sector: &mut [u8]) {
    if value == 0 {
        return sector.fill(0);
    }
    for (index, words) in sector.chunks_exact_mut(16).enumerate() {
        words[..8].copy_from_slice(&value.to_le_bytes());
        words[8..].copy_from_slice(&(number << 8 | index as u64).to_le_bytes());
    }
}

fn value_of(sector: &[u8]) -> u64 {
    u64::from_le_bytes(sector[..8].try_into().expect("eight bytes"))
}

/// A line for every unit that was written: thread, unit, what was flushed, what was written since.
fn write_ledger(path: &Path, writers: &[Writer]) {
    let mut lines = String::new();
    for writer in writers {
        let written = |(_, unit): &(usize, &Unit)| unit.flushed != 0 || !unit.since.is_empty();
        for (index, unit) in writer.units.iter().enumerate().filter(written) {
            let numbers = [writer.number, index as u64, unit.flushed];
            let numbers = numbers.iter().chain(&unit.since).map(u64::to_string);
            lines.push_str(&numbers.collect::<Vec<_>>().join(" "));
            lines.push('\n');
        }
    }
    fs::write(path, lines).expect("there is room for the ledger");
}

fn read_ledger(path: &Path, writers: &mut [Writer]) {
    for line in fs::read_to_string(path).expect("the ledger is there").lines() {
        let numbers: Vec<u64> = line.split(' ').map(|word| word.parse().expect("a number")).collect();
        let [thread, unit, flushed, since @ ..] = &numbers[..] else { panic!("a ledger's line: {line}") };
        let index = |number: &u64| usize::try_from(*number).expect("small");
        let unit = &mut writers[index(thread)].units[index(unit)];
        (unit.flushed, unit.since) = (*flushed, since.to_vec());
    }
}

/// Writes and verifies until the stop file is there.
fn work(device: &Path, stop: &Path, rules: Rules) -> Vec<Writer> {
    let writers = (0..THREADS).map(|number| Writer::new(number, device, true, rules));
    let threads: Vec<_> = writers
        .map(|writer| {
            let stop = stop.to_owned();
            thread::spawn(move || writer.run(&stop))
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().expect("a writer ends")).collect()
}

/// Reads back what a ledger says.
fn verify(device: &Path, ledger: &Path) -> Vec<Writer> {
    let rules = Rules { errors_allowed: false, flushed_only: true };
    let mut writers: Vec<_> = (0..THREADS).map(|number| Writer::new(number, device, false, rules)).collect();
    read_ledger(ledger, &mut writers);
    writers.iter_mut().for_each(Writer::verify_all);
    writers
}

fn main() -> ExitCode {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let words: Vec<_> = arguments.iter().map(|argument| argument.to_str().unwrap_or_default()).collect();
    let writers = match (&arguments[..], &words[..]) {
        ([device, _, ledger], [_, "--verify", _]) => verify(device, ledger),
        ([device, stop, ..], [_, _, options @ ..]) => {
            let has = |option| options.contains(&option);
            let rules = Rules { errors_allowed: has("--errors"), flushed_only: has("--flushed") };
            let writers = work(device, stop, rules);
            if let Some(option) = options.iter().position(|option| *option == "--ledger") {
                write_ledger(&arguments[2 + option + 1], &writers);
            }
            writers
        }
        _ => {
            eprintln!("usage: stamper DEVICE STOP-FILE [--errors] [--flushed] [--ledger FILE]");
            eprintln!("       stamper DEVICE --verify FILE");
            return ExitCode::from(2);
        }
    };
    let mut total = Count::default();
    for Writer { count, .. } in &writers {
        total.writes += count.writes;
        total.reads += count.reads;
        total.zeroes += count.zeroes;
        total.flushes += count.flushes;
        total.durable += count.durable;
        total.errors += count.errors;
        total.bad += count.bad;
    }
    println!(
        "{} writes, {} of them durable, {} zeroed ranges, {} flushes acknowledged, {} reads, \
         {} requests failed; {} sectors lost or torn",
        total.writes, total.durable, total.zeroes, total.flushes, total.reads, total.errors, total.bad
    );
    if total.bad == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
