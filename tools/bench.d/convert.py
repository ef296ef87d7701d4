"""Measures `convert` beside qemu-img and cp; tools/bench --convert starts it. Exits with 1 if anything failed."""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from commands import CommandError, run

MIB = 1 << 20
# Data lies in runs of this length, and a run of the disk is data with this probability.
RUN_BYTES = 32 * MIB
SPARSENESS = 4
TIMEOUT_S = 600
OURS = "ours"

HEAD = """\
# Conversions

* The programs take turns, one conversion each, on the same files. Figures are medians over the rounds; a ratio is
  computed in each round, and the median is taken of the ratios: above 1, ours is faster.
* *returned* is the time until the program ends. qemu-img and cp leave what they have written in the host's cache; ours
  ends only when the target is durable. *durable* adds an fsync of the target to each, and so compares the same thing.
* CPU is what the program computed, user and system, until it returned.
* in the cache: all of the source is in the host's page cache; cold: none of it is.
* qemu-img: `convert -W -m 16`; cp: of the same source, `--sparse=always` for a raw disk, so that it writes as much.
"""


@dataclass(frozen=True)
class Sample:
    """One conversion, seconds."""

    returned: float
    durable: float
    cpu: float


@dataclass(frozen=True)
class Case:
    """A conversion from `source` to `target`, the source being in the page cache or not."""

    source: str
    target: str
    cached: bool

    @property
    def title(self) -> str:
        return f"{self.source} to {self.target}, source {'in the cache' if self.cached else 'cold'}"


def commands(tool: Path, case: Case, source: Path, target: Path) -> dict[str, list[str | Path]]:
    sparse = ["--sparse=always"] if case.source == "raw" else []
    return {
        OURS: [tool, "convert", "--progress", "none", "--to", case.target, source, target],
        "qemu-img": ["qemu-img", "convert", "-W", "-m", "16", "-f", case.source, "-O", case.target, source, target],
        "cp": ["cp", *sparse, source, target],
    }


def make_raw(path: Path, data_bytes: int) -> None:
    """A raw disk of random bytes and holes: the first run is data, the last a hole."""
    rng = random.Random(7)
    runs = data_bytes // RUN_BYTES
    chosen = {0, *rng.sample(range(1, SPARSENESS * runs - 1), runs - 1)}
    with path.open("wb") as file:
        file.truncate(SPARSENESS * data_bytes)
        for number in sorted(chosen):
            file.seek(number * RUN_BYTES)
            for _ in range(RUN_BYTES // MIB):
                file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())


def set_cached(path: Path, cached: bool) -> None:
    with path.open("rb") as file:
        if not cached:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return
        while file.read(MIB):
            pass


def measure(command: list[str | Path], target: Path) -> Sample:
    """Runs one conversion, and makes what it wrote durable."""
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as err:
        started = time.monotonic()
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        returned = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            err.seek(0)
            raise CommandError(f"{words[0]}: status {process.returncode}: {err.read().decode(errors='replace')}")
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return Sample(returned, time.monotonic() - started, usage.ru_utime + usage.ru_stime)


class Bench:
    """The conversions on one file system."""

    def __init__(self, tool: Path, folder: Path, data_bytes: int) -> None:
        self.tool = tool
        self.folder = folder
        raw, image = folder / "source.raw", folder / "source.vhdx"
        make_raw(raw, data_bytes)
        run([tool, "convert", "--progress", "none", raw, image], TIMEOUT_S)
        self.sources = {"raw": raw, "vhdx": image}
        caches = [True] if file_system(folder) == "tmpfs" else [True, False]
        pairs = (("raw", "vhdx"), ("vhdx", "raw"))
        self.cases = [Case(source, target, cached) for source, target in pairs for cached in caches]
        self.samples: dict[str, dict[str, list[Sample]]] = {}

    def run_round(self, number: int) -> None:
        for case in self.cases:
            source, target = self.sources[case.source], self.folder / "target"
            programs = list(commands(self.tool, case, source, target).items())
            turn = number % len(programs)
            for name, command in programs[turn:] + programs[:turn]:
                target.unlink(missing_ok=True)
                set_cached(source, case.cached)
                sample = measure(command, target)
                self.samples.setdefault(case.title, {}).setdefault(name, []).append(sample)
                print(f"round {number + 1}  {case.title:34} {name:9} {sample.returned:6.2f} s", flush=True)

    def table(self) -> str:
        head = ["conversion", "program", "returned s", "durable s", "CPU s", "faster, returned", "faster, durable"]
        rows = [head, ["---"] * len(head)]
        for title, programs in self.samples.items():
            for name, samples in programs.items():
                rows.append([f"**{title}**" if name == OURS else "", name, *figures(samples)])
                rows[-1] += ["", ""] if name == OURS else ratios(programs[OURS], samples)
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def figures(samples: list[Sample]) -> list[str]:
    return [f"{median(getattr(one, what) for one in samples):.2f}" for what in ("returned", "durable", "cpu")]


def ratios(ours: list[Sample], others: list[Sample]) -> list[str]:
    shown = []
    for what in ("returned", "durable"):
        found = [getattr(other, what) / getattr(own, what) for own, other in zip(ours, others, strict=True)]
        shown.append(f"{median(found):.2f} ({min(found):.2f}–{max(found):.2f})")
    return shown


def file_system(folder: Path) -> str:
    return run(["stat", "--file-system", "--format", "%T", folder]).strip()


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="vhdx-ublk-bench.", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/bench --convert", allow_abbrev=False)
    parser.add_argument("--vhdx-ublk", type=Path, required=True)
    parser.add_argument("--revision", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=int, default=1024, help="MiB of data")
    parser.add_argument("--folder", type=Path, action="append", required=True)
    return parser.parse_args()


def facts(options: argparse.Namespace) -> str:
    known = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "kernel": f"{platform.release()}, {platform.machine()}",
        "CPUs": str(os.cpu_count()),
        "ours": f"{run([options.vhdx_ublk, '--version']).strip()}, {options.revision}",
        "qemu-img": run(["qemu-img", "--version"]).splitlines()[0],
        "data": f"{options.data} MiB in a disk of {SPARSENESS * options.data} MiB",
        "rounds": str(options.rounds),
    }
    return "\n".join(f"* {name}: {value}" for name, value in known.items())


def main() -> int:
    options = parse()
    parts, samples = [HEAD, facts(options)], {}
    try:
        for parent in options.folder:
            with scratch(parent) as folder:
                kind = file_system(folder)
                bench = Bench(options.vhdx_ublk, folder, options.data * MIB)
                for number in range(options.rounds):
                    bench.run_round(number)
                parts += [f"## On {kind}", bench.table()]
                samples[kind] = {
                    title: {name: [asdict(one) for one in found] for name, found in programs.items()}
                    for title, programs in bench.samples.items()
                }
    except (CommandError, OSError) as error:
        print(f"tools/bench: {error}", file=sys.stderr)
        return 1
    (options.out / "convert.md").write_text("\n\n".join(parts) + "\n")
    (options.out / "convert.json").write_text(json.dumps(samples, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
