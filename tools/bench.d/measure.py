"""One measurement: fio on a device, and what it cost the process that serves it."""

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import CommandError, beside, run
from systems import REQUESTING_CPU, Device, Filled, Shape
from workloads import DISCARDS, Workload

SECTOR = 512
TICKS = os.sysconf("SC_CLK_TCK")
ALIGNMENT = 4096
FILL_TIMEOUT_S = 300


@dataclass(frozen=True)
class Region:
    """The part of the disk that is used, bytes."""

    offset: int
    length: int


@dataclass(frozen=True)
class Duration:
    """Seconds of measuring and of warming up before it."""

    seconds: float
    ramp: float = 1

    @property
    def limit(self) -> float:
        """The bound of a workload that ends by itself: some systems are very slow there."""
        return max(8, 2 * self.seconds)


@dataclass(frozen=True)
class Sample:
    """What one run gave. `value` is in the workload's unit: requests or 10^6 bytes per second.

    p50_us, p99_us, p999_us
                    completion latency of the requests; of the syncs where every write is synced
    cpu_s           seconds the serving process computed, None where the kernel serves
    cpu_s_per_m     the same per million of fio's requests, those of the warm-up included
    wakes           between the server's threads, per request of fio's; None of servers that do not count them
    """

    value: float
    iops: float
    bytes_per_s: float
    p50_us: float
    p99_us: float
    p999_us: float
    cpu_s: float | None
    cpu_s_per_m: float | None
    wakes: float | None

    @classmethod
    def once(cls, seconds: float) -> "Sample":
        """Something that was done once, and took so long."""
        return cls(1 / seconds, 1 / seconds, 0, seconds * 1e6, seconds * 1e6, seconds * 1e6, None, None, None)


@dataclass(frozen=True)
class Usage:
    """Counters of a device and its server, before or after a run."""

    sectors: int
    ticks: int | None
    wakes: int | None

    @classmethod
    def of(cls, device: Device) -> "Usage":
        counted = [int(word) for word in (device.sysfs / "stat").read_text().split()]
        read, written, discarded = counted[2], counted[6], counted[13]
        return cls(read + written + discarded, process_ticks(device.pid) if device.pid else None, wakes(device))

    def cpu_s_since(self, before: "Usage") -> float | None:
        if self.ticks is None or before.ticks is None:
            return None
        return (self.ticks - before.ticks) / TICKS

    def wakes_since(self, before: "Usage") -> int | None:
        if self.wakes is None or before.wakes is None:
            return None
        return self.wakes - before.wakes


def wakes(device: Device) -> int | None:
    """How often the server's threads have woken each other."""
    if not device.program:
        return None
    counted: dict[str, Any] = json.loads(run([device.program, "stats", device.path, "--json"]))[0]
    return counted.get("wakes")


def process_ticks(pid: int) -> int:
    """User and system time of all threads of a process, living and ended."""
    # The name in parentheses may hold spaces; what follows it is field 3 and on.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[14 - 3]) + int(fields[15 - 3])


def touch(device: Device, shape: Shape) -> None:
    """Writes 4 KiB of every block, so that all of them have space, and the host has little of it."""
    gap = shape.block_size - ALIGNMENT
    blocks = shape.size // shape.block_size
    how = [f"--rw=write:{gap}", f"--bs={ALIGNMENT}", "--iodepth=32", f"--io_size={blocks * ALIGNMENT}"]
    write_once(device, Region(0, shape.size), how)


def fill(device: Device, region: Region, filled: Filled = Filled.WHOLLY) -> None:
    """Writes over the region with data that is the same for every system."""
    how = ["--rw=write", "--bs=1m", "--iodepth=4"]
    if filled is Filled.EVERY_OTHER_4K:
        how = ["--rw=write:4k", "--bs=4k", "--iodepth=32", f"--io_size={region.length // 2}"]
    write_once(device, region, how)


def write_once(device: Device, region: Region, how: list[str]) -> None:
    run(
        [
            "fio",
            "--name=fill",
            f"--filename={device.path}",
            "--ioengine=io_uring",
            "--direct=1",
            *how,
            f"--offset={region.offset}",
            f"--size={region.length}",
            "--randseed=1",
            "--refill_buffers",
            "--end_fsync=1",
            "--output=/dev/null",
        ],
        FILL_TIMEOUT_S,
    )


def measure(workload: Workload, device: Device, region: Region, duration: Duration, folder: Path) -> Sample:
    """Runs `workload` once. `folder` is for fio's own files and must not be on the disk under test."""
    answer = folder / "fio.json"
    arguments, limit = fio_arguments(workload, device, region, duration, folder)
    # What is left to do for a file deleted before would otherwise be done in this run's time.
    os.sync()
    before = Usage.of(device)
    with beside(storm(workload, device)):
        run(["fio", *arguments, "--output-format=json", f"--output={answer}"], limit)
    after = Usage.of(device)
    text = answer.read_text()
    jobs = json.loads(text[text.index("{") :])["jobs"]
    if len(jobs) != 1 or jobs[0]["error"] != 0:
        raise CommandError(f"fio: error {[job['error'] for job in jobs]}")
    return sample(workload, jobs[0], before, after)


def storm(workload: Workload, device: Device) -> list[str] | None:
    """The command that loads the second half of the disk meanwhile, until it is ended."""
    if not workload.storm:
        return None
    size = int((device.sysfs / "size").read_text()) * SECTOR
    start = size // 2
    if workload.storm == DISCARDS:
        repeated = f"while blkdiscard --force --offset {start} {device.path}; do sleep 0.2; done"
        return ["sh", "-c", repeated]
    area = [f"--filename={device.path}", f"--offset={start}", f"--size={size - start}"]
    common = ["--name=storm", "--ioengine=io_uring", "--direct=1", "--thread", "--time_based", "--runtime=600s"]
    return ["fio", *common, *area, *workload.storm, "--output=/dev/null"]


def fio_arguments(
    workload: Workload, device: Device, region: Region, duration: Duration, folder: Path
) -> tuple[list[str], float]:
    """fio's command line, and the seconds after which something is wrong."""
    arguments = [
        f"--name={workload.name}",
        "--ioengine=io_uring",
        "--direct=1",
        f"--rw={workload.pattern}",
        f"--bs={workload.request}",
        f"--iodepth={workload.depth}",
        f"--numjobs={workload.jobs}",
        "--thread",
        "--group_reporting",
        "--percentile_list=50:99:99.9",
        *([] if workload.spread_out else [f"--cpus_allowed={REQUESTING_CPU}"]),
        *workload.arguments,
    ]
    if workload.first_writes:
        arguments += [f"--read_iolog={write_logs(workload, device, folder)}", "--replay_no_stall=1"]
        arguments += ["--end_fsync=1", f"--runtime={duration.limit:g}s"]
        return arguments, duration.limit + 60
    arguments += [f"--filename={device.path}", f"--offset={region.offset}", f"--size={region.length}"]
    if workload.amount:
        end = [] if workload.section == "trim" else ["--end_fsync=1"]
        return [*arguments, *end, f"--runtime={duration.limit:g}s"], duration.limit + 60
    if workload.synced:
        arguments.append("--fdatasync=1")
    arguments += ["--time_based", f"--runtime={duration.seconds:g}s", f"--ramp_time={duration.ramp:g}s"]
    return arguments, duration.seconds + duration.ramp + 60


def write_logs(workload: Workload, device: Device, folder: Path) -> str:
    """The offsets of first writes, one file per job, as fio wants their names."""
    first, fresh = workload.first_writes, workload.fresh
    assert first and fresh, "first writes need a new image"
    block = fresh.shape.block_size
    count = first.writes_per_job * workload.jobs
    assert count * block <= fresh.shape.size, "each write has a block of its own"
    source = random.Random(workload.name)  # the same offsets for every system and round
    offsets = [number * block + source.randrange(0, block, ALIGNMENT) for number in range(count)]
    source.shuffle(offsets)
    names = []
    for job in range(workload.jobs):
        lines = ["fio version 2 iolog", f"{device.path} add", f"{device.path} open"]
        for offset in offsets[job :: workload.jobs]:
            lines.append(f"{device.path} write {offset} {workload.request}")
            if first.synced:
                lines.append(f"{device.path} datasync 0 0")
        names.append(folder / f"offsets.{job}")
        names[-1].write_text("\n".join([*lines, f"{device.path} close", ""]))
    return ":".join(map(str, names))


def sample(workload: Workload, job: dict[str, Any], before: Usage, after: Usage) -> Sample:
    done = job[workload.section]
    if not done["total_ios"]:
        raise CommandError("fio: not one request was completed")
    latency = job["sync"]["lat_ns"] if workload.synced else done["clat_ns"]
    requests = (after.sectors - before.sectors) * SECTOR / workload.request
    cpu, woken = after.cpu_s_since(before), after.wakes_since(before)
    return Sample(
        value=done["iops"] if workload.unit == "IOPS" else done["bw_bytes"] / 1e6,
        iops=done["iops"],
        bytes_per_s=done["bw_bytes"],
        p50_us=latency["percentile"]["50.000000"] / 1e3,
        p99_us=latency["percentile"]["99.000000"] / 1e3,
        p999_us=latency["percentile"]["99.900000"] / 1e3,
        cpu_s=cpu,
        cpu_s_per_m=None if cpu is None else cpu / requests * 1e6,
        wakes=None if woken is None else woken / requests,
    )
