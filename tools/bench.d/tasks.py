"""Commands that are timed: what an administrator does to a disk, and to an image."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import systems
from commands import run
from measure import Sample, Usage
from scratch import GIB, MIB
from systems import Device, Shape, System, Tools
from workloads import Fresh

TIMEOUT_S = 300
SHAPES = {"64G": Shape(64 * GIB, 2 * MIB), "1T": Shape(1 << 40, 32 * MIB)}
# So many blocks that looking at each of them would show.
SERVED_SHAPE = Shape(1 << 40, 4 * MIB)
COMMANDS = {
    "blkdiscard": ("blkdiscard of all of", ("blkdiscard", "--force")),
    "blkdiscard-z": ("blkdiscard -z of all of", ("blkdiscard", "--force", "--zeroout")),
    "mkfs.ext4": ("mkfs.ext4 on", ("mkfs.ext4", "-q", "-F")),
    "mkfs.xfs": ("mkfs.xfs on", ("mkfs.xfs", "-q", "-f")),
    "fstrim": ("fstrim of a new ext4 on", ()),
}


@dataclass(frozen=True)
class Task:
    """One command on a device; no `command` is fstrim of the file system that is made before.

    Its throughput is how often a second has time for it, its latency how long it takes, its wakes are all of its.
    """

    name: str
    title: str
    fresh: Fresh
    command: tuple[str, ...]
    measured: tuple[System, ...] = (systems.OURS, systems.OLD, systems.LOOP)
    unit: str = "/s"
    small: bool = False


@dataclass(frozen=True)
class Serving:
    """How long it takes from the command that serves a file to the end of the first read.

    If it `removes`, how long it takes from the command that removes that device until nothing has the file open.
    """

    name: str
    title: str
    fresh: Fresh
    removes: bool = False
    measured: tuple[System, ...] = (systems.OURS, systems.OLD, systems.RUBLK)
    unit: str = "/s"
    small: bool = False


def tasks() -> list[Task]:
    return [
        Task(
            f"{name}-{state}-{size}",
            f"{title} a {state} disk of {size}",
            Fresh(shape, touched=state == "full"),
            command,
            # Zeros that keep their space take all of it from the host of a loop device.
            (systems.OURS, systems.OLD) if name == "blkdiscard-z" else Task.measured,
        )
        for size, shape in SHAPES.items()
        for state in ("new", "full")
        for name, (title, command) in COMMANDS.items()
        # Zeros that keep their space would need all of it on the host.
        if (name, state) != ("blkdiscard-z", "full")
    ]


def servings() -> list[Serving]:
    return [
        Serving(
            f"{command}-{state}-1T",
            f"{command} of a {state} disk of 1T",
            Fresh(SERVED_SHAPE, touched=state == "full"),
            removes=command == "del",
        )
        for command in ("add", "del")
        for state in ("new", "full")
    ]


ALL = [*tasks(), *servings()]


def perform(task: Task, device: Device, folder: Path) -> Sample:
    """Does it once. `folder` is for a mount."""
    if task.command:
        return timed(device, [*task.command, device.path])
    run(["mkfs.ext4", "-q", "-F", "-E", "nodiscard", device.path], TIMEOUT_S)
    with mounted(device, folder):
        return timed(device, ["fstrim", folder])


@contextmanager
def mounted(device: Device, folder: Path) -> Iterator[None]:
    run(["mount", device.path, folder])
    try:
        yield
    finally:
        run(["umount", folder], TIMEOUT_S)


def timed(device: Device, command: list[str | Path]) -> Sample:
    os.sync()
    before = Usage.of(device)
    started = time.monotonic()
    run(command, TIMEOUT_S)
    once = Sample.once(time.monotonic() - started)
    after = Usage.of(device)
    return replace(once, cpu_s=after.cpu_s_since(before), wakes=after.wakes_since(before))


def serve(tools: Tools, system: System, file: Path, serving: Serving) -> Sample:
    """Serves the file once, until the first sector has been read, and removes the device."""
    os.sync()
    started = time.monotonic()
    device = system.start(tools, file)
    try:
        run(["dd", f"if={device.path}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct", "status=none"])
        served = time.monotonic()
    finally:
        removing = time.monotonic()
        system.stop(tools, device)
    return Sample.once(time.monotonic() - removing if serving.removes else served - started)
