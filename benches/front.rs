//! What a whole request costs in the front, from its start to its completion, without the I/O: the front's
//! file I/O ends at once.

#[path = "../tests/simulator/loopback.rs"]
mod loopback;

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion};
use fastrand::Rng;
use loopback::{Loopback, MIB, full_map};
use vhdx_ublk::engine::front::{Op, Request};

/// Virtual sizes, bytes.
const SIZES: [(&str, u64); 3] = [("1GiB", 1 << 30), ("100GiB", 100 << 30), ("10TiB", 10 << 40)];

const OPS: [(&str, Op); 3] = [
    ("read", Op::Read),
    ("write", Op::Write { durable: false }),
    ("durable-write", Op::Write { durable: true }),
];

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    hit(&mut criterion);
    random_hit(&mut criterion);
    split(&mut criterion);
    criterion.final_summary();
}

/// Requests of 4 KiB to one block.
fn hit(criterion: &mut Criterion) {
    let mut disk = Loopback::new(full_map(1 << 30, |block| (block + 1) * MIB));
    let mut group = criterion.benchmark_group("front/hit");
    for (name, op) in OPS {
        let request = Request { op, offset: 5 * MIB, length: 4096 };
        group.bench_function(name, |bencher| bencher.iter(|| disk.request(5, black_box(request))));
    }
    group.finish();
}

/// Requests of 4 KiB to blocks anywhere on the disk; finding one at random is measured with it.
fn random_hit(criterion: &mut Criterion) {
    for (size_name, size) in SIZES {
        let mut disk = Loopback::new(full_map(size, |block| (block + 1) * MIB));
        let mut rng = Rng::with_seed(1);
        let mut group = criterion.benchmark_group("front/random-hit");
        for (name, op) in &OPS[..2] {
            group.bench_function(BenchmarkId::new(*name, size_name), |bencher| {
                bencher.iter(|| {
                    let request = Request { op: *op, offset: rng.u64(..size / 4096) * 4096, length: 4096 };
                    disk.request(5, black_box(request))
                });
            });
        }
        group.finish();
    }
}

/// Requests of 1 MiB over two blocks, which lie apart or one behind the other.
fn split(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("front/1MiB-over-two-blocks");
    for (name, stride, pieces) in [("apart", 2, 2), ("neighbours", 1, 1)] {
        let mut disk = Loopback::new(full_map(1 << 30, |block| (1 + block * stride) * MIB));
        let request = Request { op: Op::Read, offset: 5 * MIB + MIB / 2, length: MIB };
        disk.request(5, request);
        assert_eq!(disk.started(), pieces, "{name}");
        group.bench_function(name, |bencher| bencher.iter(|| disk.request(5, black_box(request))));
    }
    group.finish();
}
