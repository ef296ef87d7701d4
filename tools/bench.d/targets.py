"""What must be reached, as data."""

from dataclasses import dataclass
from enum import Enum

import systems
import tasks
import workloads
from results import Results, Spread

QEMU = tuple(system.name for system in systems.QEMU)
RUBLK = (systems.RUBLK.name,)
RUBLK_ZC = (systems.RUBLK_ZC.name,)
OURS = systems.OURS.name
OURS_ZC = systems.OURS_ZC.name
OURS_2Q = systems.OURS_2Q.name


class Verdict(Enum):
    PASSED = "passed"
    MISSED = "**missed**"
    UNKNOWN = "not measured"


@dataclass(frozen=True)
class Target:
    """The ratio `system` / best of `peers` of `metric` must be at least, or at most, so much."""

    workload: str
    system: str
    peers: tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None
    metric: str = "value"

    def __post_init__(self) -> None:
        assert (self.at_least is None) != (self.at_most is None), "one bound"

    def bound(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"

    def judge(self, results: Results) -> tuple[Spread | None, Verdict]:
        ratio = results.ratio(self.workload, self.system, self.peers, self.metric)
        if ratio is None:
            return None, Verdict.UNKNOWN
        if self.at_least is not None:
            reached = ratio.median >= self.at_least
        else:
            assert self.at_most is not None
            reached = ratio.median <= self.at_most
        return ratio, Verdict.PASSED if reached else Verdict.MISSED


# A hit costs what the raw file costs.
SMALL = [f"4k-rand{operation}-qd{depth}" for operation in ("read", "write") for depth in (1, 32, 128)]
LARGE = [f"{request}-seq{operation}" for request in ("128k", "1m") for operation in ("read", "write")]
LARGE = ["64k-randrw-qd16", *(f"{name}-{'qd8' if name.startswith('128k') else 'qd4'}" for name in LARGE)]
HITS = [
    *(Target(name, OURS, RUBLK, at_least=1) for name in [*SMALL, *LARGE]),
    *(Target(name, OURS_ZC, RUBLK_ZC, at_least=1) for name in [*SMALL, *LARGE]),
    *(Target(name, OURS, RUBLK, at_most=1.2, metric="p99_us") for name in SMALL),
    *(Target(name, OURS, RUBLK, at_most=1, metric="cpu_s_per_m") for name in SMALL),
    Target("4k-randread-qd32", OURS, QEMU, at_least=5),
    Target("4k-randwrite-qd32", OURS, QEMU, at_least=8),
]

# So does, nearly, a block's first write, though it takes metadata.
MISSES = [
    Target("fill", OURS, RUBLK, at_least=0.97),
    *(Target(f"first-{size}", OURS, RUBLK, at_least=0.95) for size in ("1m", "32m")),
    *(Target(f"first-{size}", OURS, QEMU, at_least=20) for size in ("1m", "32m")),
]

SYNCS = [
    *(Target(f"sync-hit-{jobs}j", OURS, RUBLK, at_least=0.97) for jobs in (1, 16)),
    *(Target(f"sync-first-{jobs}j", OURS, RUBLK, at_least=bound) for jobs, bound in ((1, 0.85), (16, 0.95))),
    *(
        Target(f"sync-{what}-{jobs}j", OURS, RUBLK, at_most=1.2, metric="p99_us")
        for what in ("hit", "first")
        for jobs in (1, 16)
    ),
]

# A read does not wait for what others ask of the disk.
STORMS = [Target(one.name, OURS, RUBLK, at_most=1.2, metric="p99_us") for one in workloads.STORMY]

# What an administrator does takes no longer than on the raw file.
TASKS = [
    *(
        Target(one.name, OURS, (systems.LOOP.name,), at_least=0.67)
        for one in tasks.tasks()
        if systems.LOOP in one.measured
    ),
    *(Target(one.name, OURS, RUBLK, at_least=0.77) for one in tasks.servings()),
]

# A second queue never costs anything.
QUEUES = [Target(f"4jobs-4k-rand{operation}-qd16", OURS_2Q, (OURS,), at_least=1.0) for operation in ("read", "write")]

# An image that has nothing of a block, or not all of it, is nearly as good as none.
CHAINS = [
    *(
        Target("chain-4k-randread-qd32", system.name, (OURS,), at_least=bound)
        for system, bound in ((systems.CHAIN_2, 0.97), (systems.CHAIN_5, 0.95), (systems.CHAIN_16, 0.9))
    ),
    Target("chain-4k-randwrite-qd32", systems.CHILD_HALF.name, (systems.OURS_HALF.name,), at_least=0.8),
]

ALL = [*HITS, *MISSES, *SYNCS, *STORMS, *TASKS, *QUEUES, *CHAINS]
