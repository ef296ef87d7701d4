"""What the systems are given to do, as data."""

from dataclasses import dataclass, field

import systems
from scratch import GIB, MIB
from systems import Shape, System

KIB = 1 << 10
STANDING = Shape(8 * GIB, 2 * MIB)
GROWTH_SHAPES = {
    systems.OURS_1G.name: Shape(GIB, 2 * MIB),
    systems.OURS_100G.name: Shape(100 * GIB, 2 * MIB),
    systems.OURS_10T.name: Shape(10 << 40, 2 * MIB),
}


@dataclass(frozen=True)
class Fresh:
    """The workload gets a new image every time.

    filled   it is written over first
    touched  4 KiB of every block are written first
    """

    shape: Shape
    filled: bool = False
    touched: bool = False


@dataclass(frozen=True)
class FirstWrites:
    """Every job writes once into each of so many blocks that nothing was ever written to.

    The list of offsets is made here and replayed by fio: its own random generators cannot be told to
    hit each block exactly once.
    """

    writes_per_job: int
    synced: bool = False


@dataclass(frozen=True)
class Workload:
    """One row of the report, run on each of `measured`.

    pattern  fio's name for the order and direction of the requests
    depth    requests in flight per job
    region   where on the disk: its `start` or its `end`
    small    a quarter of the region is enough
    amount   what bounds it: None is time, `region` is one pass over the region
    synced   every write is followed by fdatasync; the latency is then the sync's
    spread_out  its jobs run on all CPUs, not on the one that a server with one queue leaves to them
    storm    what loads the disk's second half meanwhile: arguments of fio, or DISCARDS
    """

    name: str
    title: str
    pattern: str
    request: int
    depth: int
    measured: tuple[System, ...]
    jobs: int = 1
    unit: str = "IOPS"
    region: str = "start"
    small: bool = False
    amount: str | None = None
    synced: bool = False
    fresh: Fresh | None = None
    first_writes: FirstWrites | None = None
    storm: tuple[str, ...] = ()
    spread_out: bool = False
    arguments: tuple[str, ...] = field(default=())

    @property
    def section(self) -> str:
        """The part of fio's answer that has the numbers."""
        if self.pattern == "randrw":
            return "mixed"
        return self.pattern.removeprefix("rand")


MAIN = (systems.OURS, systems.OLD, systems.OURS_ZC, systems.RUBLK, systems.RUBLK_ZC, systems.LOOP, *systems.QEMU)
QUEUES = (systems.OURS, systems.OURS_2Q, systems.RUBLK, systems.RUBLK_2Q)
TRIMMING = (systems.OURS, systems.OLD, systems.RUBLK, systems.LOOP)  # QEMU's VHDX driver has no discard


def hits() -> list[Workload]:
    """Requests to blocks that are there: what an overwrite or a read costs."""
    found = []
    for operation, verb in (("read", "read"), ("write", "overwrite")):
        for depth in (1, 32, 128):
            found.append(
                Workload(
                    f"4k-rand{operation}-qd{depth}",
                    f"4 KiB random {verb}, QD {depth}",
                    f"rand{operation}",
                    4 * KIB,
                    depth,
                    MAIN,
                )
            )
    found.append(
        Workload(
            "64k-randrw-qd16",
            "64 KiB random read and overwrite 50:50, QD 16",
            "randrw",
            64 * KIB,
            16,
            MAIN,
            arguments=("--rwmixread=50", "--unified_rw_reporting=mixed"),
        )
    )
    for size, text, depth in ((128 * KIB, "128k", 8), (MIB, "1m", 4)):
        for operation, verb in (("read", "read"), ("write", "overwrite")):
            found.append(
                Workload(
                    f"{text}-seq{operation}-qd{depth}",
                    f"{label(size)} sequential {verb}, QD {depth}",
                    operation,
                    size,
                    depth,
                    MAIN,
                    unit="MB/s",
                )
            )
    return found


def label(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def empty() -> list[Workload]:
    """Requests to blocks that are not there yet: the raw file is as sparse. Ends with a sync, in the time."""
    small, large = Shape(8 * GIB, MIB), Shape(64 * GIB, 32 * MIB)
    common = {"pattern": "randwrite", "request": 4 * KIB, "depth": 32, "measured": MAIN}
    return [
        Workload(
            "fill",
            "1 MiB sequential fill of an empty disk, QD 4",
            "write",
            MIB,
            4,
            MAIN,
            unit="MB/s",
            amount="region",
            fresh=Fresh(STANDING),
        ),
        Workload(
            "first-1m",
            "4 KiB random first write, blocks of 1 MiB, QD 32",
            fresh=Fresh(small),
            first_writes=FirstWrites(4096),
            **common,
        ),
        Workload(
            "first-32m",
            "4 KiB random first write, blocks of 32 MiB, QD 32",
            fresh=Fresh(large),
            first_writes=FirstWrites(2048),
            **common,
        ),
    ]


def synced() -> list[Workload]:
    """Every write is made durable before the next one of its job."""
    fresh = Fresh(Shape(8 * GIB, MIB))
    found = []
    for jobs in (1, 16):
        common = {
            "pattern": "randwrite",
            "request": 4 * KIB,
            "depth": 1,
            "jobs": jobs,
            "synced": True,
            "measured": systems.COPYING,
        }
        text = f"{jobs} job{'s' if jobs > 1 else ''}"
        found += [
            Workload(f"sync-hit-{jobs}j", f"4 KiB random overwrite + fdatasync, {text}", **common),
            Workload(
                f"sync-first-{jobs}j",
                f"4 KiB random first write + fdatasync, blocks of 1 MiB, {text}",
                fresh=fresh,
                first_writes=FirstWrites(2048 // jobs, synced=True),
                **common,
            ),
        ]
    return found


def trims() -> list[Workload]:
    return [
        Workload(
            "trim-1m",
            "1 MiB random trim of written blocks, QD 1",
            "randtrim",
            MIB,
            1,
            TRIMMING,
            amount="region",
            fresh=Fresh(STANDING, filled=True),
        )
    ]


def queues() -> list[Workload]:
    """Four jobs, because one submitter reaches one queue."""
    return [
        Workload(
            f"4jobs-4k-rand{operation}-qd16",
            f"4 KiB random {verb}, 4 jobs of QD 16",
            f"rand{operation}",
            4 * KIB,
            16,
            QUEUES,
            jobs=4,
            spread_out=True,
        )
        for operation, verb in (("read", "read"), ("write", "overwrite"))
    ]


# The whole second half is discarded, again and again.
DISCARDS = ("blkdiscard",)
STORMS = {
    "calm": ("the disk is idle otherwise", ()),
    "flushes": ("four jobs flush after every write", ("--rw=randwrite", "--bs=4k", "--numjobs=4", "--fdatasync=1")),
    "first-writes": ("blocks are written first", ("--rw=randwrite", "--bs=4k", "--iodepth=32")),
    "trims": ("blocks are trimmed", ("--rw=randtrim", "--bs=1m", "--iodepth=4")),
    "discards": ("half of the disk is discarded", DISCARDS),
}


def storms() -> list[Workload]:
    """Small reads, while the same disk gets what has to wait for more."""
    return [
        Workload(
            f"storm-{name}",
            f"4 KiB random read, QD 1, while {text}",
            "randread",
            4 * KIB,
            1,
            (systems.OURS, systems.OLD, systems.RUBLK),
            small=True,
            fresh=Fresh(Shape(64 * GIB, MIB), filled=True, touched=name in ("trims", "discards")),
            storm=storm,
        )
        for name, (text, storm) in STORMS.items()
    ]


def growth() -> list[Workload]:
    """The same requests on images of very different sizes."""
    return [
        Workload(
            f"growth-4k-rand{operation}-qd{depth}-{region}",
            f"4 KiB random {verb}, QD {depth}, at the disk's {region}",
            f"rand{operation}",
            4 * KIB,
            depth,
            systems.GROWTH,
            region=region,
        )
        for region in ("start", "end")
        for operation, verb in (("read", "read"), ("write", "overwrite"))
        for depth in (1, 32)
    ]


def chains() -> list[Workload]:
    """Requests that pass through images which have nothing of them, and writes to blocks that are here in part.

    Half of those writes go to sectors never written before. Each goes to its own: of blocks that are written
    over for long nothing would be left in part. What is compared is as little written, also on the host: a dynamic
    image, whose blocks are there as a whole from their first write on.
    """
    common = {"request": 4 * KIB, "depth": 32}
    return [
        Workload(
            "chain-4k-randread-qd32",
            "4 KiB random read through a chain, QD 32",
            "randread",
            measured=(systems.OURS, systems.CHAIN_1, systems.CHAIN_2, systems.CHAIN_5, systems.CHAIN_16),
            **common,
        ),
        Workload(
            "chain-4k-randwrite-qd32",
            "4 KiB random write to half written blocks, QD 32",
            "randwrite",
            measured=(systems.OURS_HALF, systems.CHILD_HALF),
            amount="region",
            small=True,
            fresh=Fresh(STANDING, filled=True),
            **common,
        ),
    ]


STORMY = storms()
COMPARED = [*hits(), *empty(), *synced(), *trims(), *queues(), *STORMY]
GROWING = growth()
CHAINED = chains()
ALL = [*COMPARED, *GROWING, *CHAINED]
