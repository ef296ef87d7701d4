//! Writes stamps to a block device until it is told to stop, remembers what was acknowledged, and reads it back.
//!
//! `stamper DEVICE STOP-FILE [--errors]`: several threads write, zero, flush and verify, each its own areas,
//! which lie side by side in the same blocks of the image. Every sector carries its number and the write's, so
//! a lost, torn or misplaced one is told apart. With `--errors` a request may fail; what it was to write may be
//! there then, or not. Ends when the stop file exists: everything is read back, and a line tells what was done.

use std::fs::{File, OpenOptions};
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
}

#[derive(Default)]
struct Count {
    writes: u64,
    reads: u64,
    zeroes: u64,
    flushes: u64,
    errors: u64,
    bad: u64,
}

struct Writer {
    number: u64,
    file: File,
    rng: fastrand::Rng,
    units: Vec<Unit>,
    next: u64,
    errors_allowed: bool,
    count: Count,
}

impl Writer {
    fn new(number: u64, device: &Path, errors_allowed: bool) -> Self {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(device);
        let units = usize::try_from(SPAN / THREADS / UNIT).expect("small");
        Self {
            number,
            file: file.expect("the device opens"),
            rng: fastrand::Rng::with_seed(number),
            units: vec![Unit::default(); units],
            next: 1,
            errors_allowed,
            count: Count::default(),
        }
    }

    /// Where a unit of this thread lies on the device.
    fn offset(&self, unit: usize) -> u64 {
        let per_area = AREA / UNIT;
        let unit = unit as u64;
        (unit / per_area * THREADS + self.number) * AREA + unit % per_area * UNIT
    }

    fn run(mut self, stop: &Path) -> Count {
        let until = Instant::now() + LIMIT;
        while !stop.exists() && Instant::now() < until {
            let (unit, count) = self.choose();
            match self.rng.u32(..100) {
                0..55 => self.write(unit, count),
                55..65 => self.zero(unit, count),
                65..70 => self.flush(),
                _ => self.verify(unit, count),
            }
        }
        let per_area = usize::try_from(AREA / UNIT).expect("small");
        for first in (0..self.units.len()).step_by(per_area) {
            self.verify(first, per_area);
        }
        self.count
    }

    /// Some units of one area.
    fn choose(&mut self) -> (usize, usize) {
        let per_area = usize::try_from(AREA / UNIT).expect("small");
        let unit = self.rng.usize(..self.units.len());
        (unit, self.rng.usize(1..=per_area - unit % per_area))
    }

    fn write(&mut self, first: usize, count: usize) {
        let (value, offset) = (self.next, self.offset(first));
        self.next += 1;
        let mut bytes = Buffer::zeroed(count * usize::try_from(UNIT).expect("small"));
        for (index, sector) in bytes.chunks_exact_mut(SECTOR).enumerate() {
            stamp(offset / SECTOR as u64 + index as u64, value, sector);
        }
        let result = self.file.write_all_at(&bytes, offset);
        self.count.writes += 1;
        self.record(first, count, value, result);
    }

    fn zero(&mut self, first: usize, count: usize) {
        let (offset, length) = (self.offset(first), count as u64 * UNIT);
        let signed = |number: u64| i64::try_from(number).expect("small");
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let result = fallocate(&self.file, flags, signed(offset), signed(length)).map_err(Into::into);
        self.count.zeroes += 1;
        self.record(first, count, 0, result);
    }

    fn record(&mut self, first: usize, count: usize, value: u64, result: std::io::Result<()>) {
        let done = self.tolerate(result);
        for unit in &mut self.units[first..first + count] {
            if done {
                *unit = Unit { value, uncertain: Vec::new() };
            } else {
                unit.uncertain.push(value);
            }
        }
    }

    fn flush(&mut self) {
        self.count.flushes += 1;
        let result = self.file.sync_data();
        self.tolerate(result);
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
            // A unit that was written in part, by a request that failed, stays uncertain.
            let values: Vec<_> = found.chunks_exact(SECTOR).map(value_of).collect();
            if values.windows(2).all(|pair| pair[0] == pair[1]) {
                self.units[first + index] = Unit { value: values[0], uncertain: Vec::new() };
            }
        }
    }

    fn judge(&mut self, unit: &Unit, number: u64, sector: &[u8]) {
        let value = value_of(sector);
        let mut expected = [0; SECTOR];
        stamp(number, value, &mut expected);
        let legal = unit.value == value || unit.uncertain.contains(&value);
        if sector != expected || !legal {
            self.count.bad += 1;
            let torn = if sector == expected { "lost" } else { "torn" };
            println!(
                "sector {number} is {torn}: it holds write {value}, acknowledged was {}, uncertain {:?}",
                unit.value, unit.uncertain
            );
        }
    }

    fn tolerate(&mut self, result: std::io::Result<()>) -> bool {
        let Err(error) = result else { return true };
        self.count.errors += 1;
        if !self.errors_allowed {
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

fn main() -> ExitCode {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [device, stop, options @ ..] = &arguments[..] else {
        eprintln!("usage: stamper DEVICE STOP-FILE [--errors]");
        return ExitCode::from(2);
    };
    let errors_allowed = options.iter().any(|option| option.as_os_str() == "--errors");
    let writers = (0..THREADS).map(|number| Writer::new(number, device, errors_allowed));
    let threads: Vec<_> = writers
        .map(|writer| {
            let stop = stop.clone();
            thread::spawn(move || writer.run(&stop))
        })
        .collect();
    let mut total = Count::default();
    for thread in threads {
        let count = thread.join().expect("a writer ends");
        total.writes += count.writes;
        total.reads += count.reads;
        total.zeroes += count.zeroes;
        total.flushes += count.flushes;
        total.errors += count.errors;
        total.bad += count.bad;
    }
    println!(
        "{} writes, {} zeroed ranges, {} flushes, {} reads, {} requests failed; {} sectors lost or torn",
        total.writes, total.zeroes, total.flushes, total.reads, total.errors, total.bad
    );
    if total.bad == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
