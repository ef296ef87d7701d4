//! Promise defended here: an overwrite costs what the raw file costs. The path that serves it takes no
//! memory.

use fastrand::Rng;
use vhdx_ublk::engine::front::{Op, Request};

use crate::loopback::{Loopback, MIB, full_map};
use crate::memory;

const HITS: u64 = 1_000_000;
const BLOCKS: u64 = 1024;
const TAGS: u16 = 64;
const OPS: [Op; 3] = [Op::Read, Op::Write { durable: false }, Op::Write { durable: true }];

/// A request of 4 KiB inside a block or, one time in eight, across the border to the next block; and the
/// pieces it takes: blocks of the disk's first half lie apart, those of the second one behind the other.
fn hit(rng: &mut Rng) -> (Request, u64) {
    let across = rng.u64(..8) == 0;
    let block = rng.u64(..BLOCKS - 1);
    let place = if across { MIB - 512 * rng.u64(1..8) } else { 4096 * rng.u64(..256) };
    let request = Request { op: OPS[rng.usize(..3)], offset: block * MIB + place, length: 4096 };
    (request, if across && block < BLOCKS / 2 { 2 } else { 1 })
}

#[test]
fn a_million_hits_take_no_memory() {
    let apart = |block| if block < BLOCKS / 2 { BLOCKS - block } else { BLOCKS + block };
    let mut disk = Loopback::new(full_map(BLOCKS * MIB, |block| apart(block) * MIB));
    let mut rng = Rng::with_seed(1);
    let mut asked = [0; 3];
    let (pieces, requests) = memory::requests_of(|| {
        (0..HITS).fold(0, |pieces, _| {
            let (request, expected) = hit(&mut rng);
            asked[OPS.iter().position(|op| *op == request.op).expect("one of them")] += 1;
            assert_eq!(disk.request(rng.u16(..TAGS), request), 4096);
            pieces + expected
        })
    });
    assert_eq!(disk.started(), pieces, "borders between blocks that lie apart split, others do not");
    assert!(pieces > HITS + HITS / 32, "too few requests were split: {pieces} pieces");
    let traffic = disk.traffic();
    let counted = traffic.requests;
    assert_eq!([counted.read, counted.write, counted.durable_write], asked, "every request is counted");
    assert_eq!(
        (traffic.read_in_all(), traffic.written_bytes),
        (4096 * asked[0], 4096 * (asked[1] + asked[2]))
    );
    assert_eq!((counted.failed, traffic.retries), (0, 0));
    assert_eq!(requests, 0, "the hit path asked for memory {requests} times in {HITS} hits");
}

/// The counter sees what it is there to see.
#[test]
fn memory_that_is_asked_for_is_counted() {
    let (grown, requests) = memory::requests_of(|| {
        let mut bytes = Vec::with_capacity(1);
        bytes.extend_from_slice(&[0_u8; 100]);
        (bytes, Box::new(1))
    });
    drop(grown);
    assert_eq!(requests, 3, "a first block, a larger one, and another");
}
