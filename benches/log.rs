//! What it costs to make the bytes of a log entry, and to check and take apart what was read.

mod support;

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput};
use support::{LOG_GUID, entry, pages};
use vhdx_ublk::format::MIB;
use vhdx_ublk::format::log::{Entry, MAX_DESCRIPTORS_WRITTEN};

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("log");
    for count in [1, MAX_DESCRIPTORS_WRITTEN] {
        let changes = pages((0..count as u64).map(|page| 3 * MIB + page * 4096));
        let new = entry(1, 0, &changes);
        let bytes = new.encode();
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_function(BenchmarkId::new("encode", count), |bencher| {
            bencher.iter(|| black_box(&new).encode());
        });
        group.bench_function(BenchmarkId::new("parse", count), |bencher| {
            bencher.iter(|| Entry::parse(black_box(&bytes), LOG_GUID, MIB..2 * MIB).expect("valid"));
        });
    }
    group.finish();
    criterion.final_summary();
}
