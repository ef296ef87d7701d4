//! What it costs to open an image, through the ring and the host's page cache, and to replay its log.
//!
//! The images lie in the directory for temporary files (`TMPDIR`). Replay in place syncs, so its time is that
//! of the storage below.

mod support;

use std::path::PathBuf;
use std::sync::Arc;

use criterion::{BatchSize, Criterion};
use support::{LOG_GUID, entry, pages};
use tempfile::TempDir;
use uuid::Uuid;
use vhdx_ublk::disk::{Buffer, Disk, PAGE_BYTES, Place, Reactor, UringDisk};
use vhdx_ublk::format::MIB;
use vhdx_ublk::format::bat::BatEntry;
use vhdx_ublk::format::log::MAX_DESCRIPTORS_WRITTEN;
use vhdx_ublk::image::{
    Content, Extent, FoundLog, Headers, Image, InitialState, NewImage, ReadImage, Space, WritableImage,
};

const TIB: u64 = 1 << 40;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    open(&mut criterion);
    replay(&mut criterion);
    fragmented(&mut criterion);
    criterion.final_summary();
}

/// Space for a block of 2 MiB in a file that has a million free runs of 1 MiB before the first one that is
/// long enough; it is given back and taken again.
fn fragmented(criterion: &mut Criterion) {
    const RUNS: u64 = 1_000_000;
    let mut space = Space::new(MIB).expect("small");
    for run in 0..RUNS {
        space.claim(Extent { offset: (2 + 2 * run) * MIB, length: MIB });
    }
    space.extend((2 * RUNS + 64) * MIB);
    criterion.bench_function("take 2 MiB behind a million runs of 1 MiB", |bencher| {
        bencher.iter(|| {
            let grant = space.take(2 * MIB).expect("there is room at the end");
            space.free(grant.extent, Content::Recycled);
            grant
        });
    });
}

/// An image in a file of its own.
struct Bench {
    reactor: Reactor,
    disk: UringDisk,
    _directory: TempDir,
}

impl Bench {
    fn new(image: &NewImage) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path: PathBuf = directory.path().join("image.vhdx");
        let file = Place::of(&path).and_then(|place| place.create()).expect("a new file");
        let reactor = Reactor::new().expect("io_uring is there");
        let disk = reactor.disk(Arc::new(file));
        reactor.block_on(image.write(&disk, Uuid::new_v4)).expect("room for its metadata");
        Self { reactor, disk, _directory: directory }
    }

    fn read(&self) -> ReadImage {
        self.reactor.block_on(Image::read(&self.disk)).expect("it is sound")
    }

    fn open(&self) -> WritableImage {
        self.reactor.block_on(Image::open_for_writing(&self.disk, Uuid::new_v4)).expect("it is sound")
    }

    fn write(&self, offset: u64, bytes: Buffer) {
        self.reactor.block_on(self.disk.write(offset, bytes)).expect("inside the file");
    }

    /// Gives every block its place, without space on the host. `false` where files cannot be that long.
    fn fill(&self) -> bool {
        let image = self.read();
        let geometry = *image.map.geometry();
        let length = image.layout.file_length + geometry.block_count() * geometry.block_size();
        if self.reactor.block_on(self.disk.grow(length)).is_err() {
            return false;
        }
        for first in (0..geometry.slot_count()).step_by(PAGE_BYTES / 8 * 256) {
            let mut bytes = Buffer::zeroed(1 << 20);
            for (slot, word) in (first..geometry.slot_count()).zip(bytes.as_chunks_mut().0) {
                let place = |block| image.layout.file_length + block * geometry.block_size();
                let entry = geometry.block_of_slot(slot).map(|block| BatEntry::present(place(block)));
                *word = entry.map_or([0; 8], BatEntry::write);
            }
            self.write(image.layout.bat.offset + first * 8, bytes);
        }
        true
    }

    /// Fills the log with entries that change pages of the BAT. Returns the header pages that name it.
    fn dirty(&self) -> Vec<(u64, Buffer)> {
        let image = self.read();
        let (log, bat) = (image.layout.log, image.layout.bat);
        let bat_pages = image.map.page_count();
        let (mut at, mut sequence, mut page) = (0, 1, 0);
        while at + 2 * 4096 <= log.length {
            let left = usize::try_from((log.length - at) / 4096 - 1).expect("at most 1 GiB");
            let count = left.min(MAX_DESCRIPTORS_WRITTEN) as u64;
            let changes = pages((page..page + count).map(|page| bat.offset + page % bat_pages * 4096));
            let bytes = entry(sequence, 0, &changes).encode();
            self.write(log.offset + at, Buffer::copy_of(&bytes));
            (at, sequence, page) = (at + bytes.len() as u64, sequence + 1, page + count);
        }
        let mut headers = Headers::new(&image.header).expect("it has a log");
        headers.change(|header| header.log_guid = LOG_GUID);
        (0..Headers::SLOTS).map(|_| headers.next_slot()).collect()
    }

    fn write_headers(&self, headers: &[(u64, Buffer)]) {
        for (offset, page) in headers {
            self.write(*offset, page.clone());
        }
        self.reactor.block_on(self.disk.sync()).expect("it syncs");
    }
}

fn new_image(virtual_size: u64, block_size: u32, log_length: u32, initial_state: InitialState) -> NewImage {
    NewImage {
        virtual_size,
        fixed: false,
        block_size,
        log_length,
        logical_sector_size: 512,
        physical_sector_size: 4096,
        initial_state,
        parent: None,
    }
}

/// Opening clean images of several shapes, for writing: nothing is written.
fn open(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("image/open");
    group.sample_size(10);
    for (name, size, block_size, state, full) in [
        ("1TiB-in-2MiB/full", TIB, 2 << 20, InitialState::NotPresent, true),
        ("64TiB-in-1MiB/new", 64 * TIB, 1 << 20, InitialState::NotPresent, false),
        ("64TiB-in-1MiB/zero", 64 * TIB, 1 << 20, InitialState::Zero, false),
        ("64TiB-in-1MiB/full", 64 * TIB, 1 << 20, InitialState::NotPresent, true),
    ] {
        let bench = Bench::new(&new_image(size, block_size, 1 << 20, state));
        if full && !bench.fill() {
            println!("image/open/{name}: left out, the host's files cannot be that long");
            continue;
        }
        print_memory(name, &bench);
        group.bench_function(name, |bencher| bencher.iter(|| bench.open()));
    }
    group.finish();
}

/// Says what an open image keeps resident, and what opening it takes at most.
fn print_memory(name: &str, bench: &Bench) {
    std::fs::write("/proc/self/clear_refs", "5").expect("one's own peak can be reset");
    let before = resident("VmRSS");
    let image = bench.open();
    let (held, peak) = (resident("VmRSS") - before, resident("VmHWM") - before);
    println!("image/open/{name}: BAT {} KiB, resident {held} KiB, at most {peak} KiB", bat_kib(&image));
}

fn bat_kib(image: &Image) -> u64 {
    image.map.geometry().bat_length() >> 10
}

/// A figure of this process, KiB.
fn resident(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("one's own status is readable");
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("the kernel counts pages");
    line.split_whitespace().nth(1).and_then(|figure| figure.parse().ok()).expect("a number of KiB")
}

/// Opening images whose log is full.
fn replay(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("image/replay");
    group.sample_size(10);
    for (name, log_length) in [("1MiB", 1 << 20), ("64MiB", 64 << 20)] {
        let bench = Bench::new(&new_image(TIB, 1 << 20, log_length, InitialState::NotPresent));
        let dirty = bench.dirty();
        bench.write_headers(&dirty);
        assert!(matches!(bench.read().found_log, FoundLog::Dirty(_)));
        group.bench_function(format!("{name}/in-memory"), |bencher| {
            bencher.iter(|| bench.read());
        });
        group.bench_function(format!("{name}/in-place"), |bencher| {
            bencher.iter_batched(|| bench.write_headers(&dirty), |()| bench.open(), BatchSize::PerIteration);
        });
    }
    group.finish();
}
