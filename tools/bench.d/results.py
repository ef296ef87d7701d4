"""All that was measured, and the figures drawn from it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from measure import Sample

# Of two peers the better one counts: what to take of each round's samples.
BETTER: dict[str, Callable[[Sequence[float]], float]] = {
    "value": max,
    "p50_us": min,
    "p99_us": min,
    "p999_us": min,
    "cpu_s_per_m": min,
    "wakes": min,
}


@dataclass(frozen=True)
class Spread:
    """A figure of several rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread | None":
        return cls(median(values), min(values), max(values)) if values else None


@dataclass
class Results:
    """`rounds[n]` maps a workload's name to a system's name to what round n gave."""

    facts: dict[str, str]
    rounds: list[dict[str, dict[str, Sample]]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    settings: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, workload: str, system: str, sample: Sample) -> None:
        self.rounds[-1].setdefault(workload, {})[system] = sample

    def fail(self, workload: str, system: str, reason: str) -> None:
        self.failures.append(f"round {len(self.rounds)}, {workload}, {system}: {reason}")

    def has(self, workload: str, system: str) -> bool:
        return any(system in measured.get(workload, {}) for measured in self.rounds)

    def spread(self, workload: str, system: str, metric: str) -> Spread | None:
        """A figure of one system over the rounds."""
        samples = [measured[workload][system] for measured in self.rounds if system in measured.get(workload, {})]
        return Spread.of([value for one in samples if (value := getattr(one, metric)) is not None])

    def ratio(self, workload: str, system: str, peers: Sequence[str], metric: str = "value") -> Spread | None:
        """`system` / the best of `peers`, computed in each round: what disturbs a round disturbs both."""
        ratios = []
        for measured in self.rounds:
            samples = measured.get(workload, {})
            own = getattr(samples[system], metric) if system in samples else None
            others = [getattr(samples[peer], metric) for peer in peers if peer in samples]
            if own is not None and others and None not in others:
                best = BETTER[metric](others)
                if best > 0:
                    ratios.append(own / best)
        return Spread.of(ratios)

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> "Results":
        read: dict[str, Any] = json.loads(file.read_text())
        read["rounds"] = [
            {workload: {system: Sample(**one) for system, one in row.items()} for workload, row in measured.items()}
            for measured in read["rounds"]
        ]
        return cls(**read)
