//! What it costs to look a block up, in maps whose every page is resident.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion};
use fastrand::Rng;
use vhdx_ublk::format::MIB;
use vhdx_ublk::format::bat::{BatEntry, Geometry};
use vhdx_ublk::image::BlockMap;

/// Virtual sizes, bytes.
const SIZES: [(&str, u64); 4] =
    [("1GiB", 1 << 30), ("100GiB", 100 << 30), ("10TiB", 10 << 40), ("64TiB", 64 << 40)];

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for (name, size) in SIZES {
        lookup(&mut criterion, name, size);
    }
    criterion.final_summary();
}

/// Blocks of 1 MiB, one after the other and in any order; finding one at random is measured with it.
fn lookup(criterion: &mut Criterion, name: &str, size: u64) {
    let geometry = Geometry::new(size, 1 << 20, 512, false);
    let map = BlockMap::empty(geometry);
    let count = geometry.block_count();
    for block in 0..count {
        map.restore(geometry.payload_slot(block), &[BatEntry::present((block + 1) * MIB).write()]);
    }
    let mut group = criterion.benchmark_group("block_map/load");
    group.bench_function(BenchmarkId::new("sequential", name), |bencher| {
        let mut block = 0;
        bencher.iter(|| {
            block = if block + 1 == count { 0 } else { block + 1 };
            map.load(black_box(block))
        });
    });
    let mut rng = Rng::with_seed(1);
    group.bench_function(BenchmarkId::new("random", name), |bencher| {
        bencher.iter(|| map.load(black_box(rng.u64(..count))));
    });
    group.finish();
}
