"""The systems under test: each makes a block device of a file, and takes it away again."""

import json
import os
import re
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path

from commands import CommandError, run, wait_until
from scratch import set_no_scheduler

DEPTH = 64
BUFFER_BYTES = 512 << 10
SECTOR_BYTES = 512
PHYSICAL_SECTOR_BYTES = 4096
CHILD_BLOCK_BYTES = 2 << 20
ATTEMPTS = 5
REQUESTING_CPU = 0
ENTRIES = Path("/run/vhdx-ublk")
QUEUE_SETTINGS = (
    "scheduler",
    "nr_requests",
    "max_sectors_kb",
    "logical_block_size",
    "physical_block_size",
    "write_cache",
    "discard_granularity",
)


@dataclass(frozen=True)
class Tools:
    """The programs that are not found by name."""

    vhdx_ublk: Path
    rublk: Path
    old: Path | None = None  # the program that ours is compared with

    @cache  # noqa: B019 - of the few programs that are measured
    def has_zero_copy(self) -> bool:
        return "--zero-copy" in run([self.vhdx_ublk, "add", "--help"])


@dataclass(frozen=True)
class Shape:
    """What a device's image is like when it is new."""

    size: int
    block_size: int


class Filled(Enum):
    """What of a disk is written over."""

    WHOLLY = "wholly"
    EVERY_OTHER_4K = "every other 4 KiB"


@dataclass(frozen=True)
class Device:
    """A device that is up.

    pid      the process that serves it, None if the kernel does
    program  the vhdx-ublk that knows its counters, None if another program serves it
    """

    path: Path
    file: Path
    pid: int | None
    program: Path | None = None

    @property
    def sysfs(self) -> Path:
        return Path("/sys/block") / self.path.name

    def settings(self) -> dict[str, str]:
        """The block layer's settings of the device, which must not differ where it matters."""
        found = {name: (self.sysfs / "queue" / name).read_text().strip() for name in QUEUE_SETTINGS}
        # The one in use is in brackets among those there are.
        found["scheduler"] = re.sub(r".*\[(.*)\].*", r"\1", found["scheduler"])
        return found

    def is_alive(self) -> bool:
        return self.sysfs.exists() and (self.pid is None or Path(f"/proc/{self.pid}").exists())


@dataclass(frozen=True)
class System(ABC):
    """One way to serve a file as a block device."""

    name: str

    @property
    def filled(self) -> Filled:
        """How its image is written over before it is measured."""
        return Filled.WHOLLY

    @property
    def has_one_queue(self) -> bool:
        """Its server need not have more than one CPU to itself."""
        return True

    @abstractmethod
    def create(self, tools: Tools, file: Path, shape: Shape) -> None:
        """Makes the empty file."""

    def remove(self, file: Path) -> None:
        """Removes what `create` and `settle` made."""
        file.unlink(missing_ok=True)

    def settle(self, tools: Tools, device: Device) -> Device:
        """The device to be measured, now that its image is filled."""
        return device

    @abstractmethod
    def start(self, tools: Tools, file: Path) -> Device:
        """Serves the file."""

    @abstractmethod
    def stop(self, tools: Tools, device: Device) -> None:
        """Takes the device away; when this returns, nothing has the file open."""

    def missing(self, tools: Tools) -> str | None:
        """Why this system cannot be measured here, if so."""
        return None

    def attach(self, tools: Tools, file: Path) -> Device:
        """Serves the file with the settings that all systems are measured with."""
        device = self.start(tools, file)
        try:
            set_no_scheduler(device.path)
            if self.has_one_queue:
                pin(device)
            block = int((device.sysfs / "queue/logical_block_size").read_text())
            if block != SECTOR_BYTES:
                raise CommandError(f"{self.name}: logical blocks of {block} bytes, not {SECTOR_BYTES}")
        except BaseException:
            self.stop(tools, device)
            raise
        return device


def pin(device: Device) -> None:
    """Leaves the first CPU to the requests: where they and their server run would be chance otherwise."""
    others = os.sched_getaffinity(0) - {REQUESTING_CPU}
    if device.pid and others:
        for thread in Path(f"/proc/{device.pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), others)


def create_vhdx(tools: Tools, file: Path, shape: Shape) -> None:
    run([tools.vhdx_ublk, "create", file, "--size", str(shape.size), "--block-size", str(shape.block_size)])


def create_child(tools: Tools, file: Path, parent: Path) -> None:
    run([tools.vhdx_ublk, "create", file, "--parent", parent, "--block-size", str(CHILD_BLOCK_BYTES)])


def create_raw(file: Path, shape: Shape) -> None:
    with file.open("xb") as raw:
        raw.truncate(shape.size)


@dataclass(frozen=True)
class Ours(System):
    """vhdx-ublk on a dynamic image."""

    queues: int = 1
    zero_copy: bool = False
    half: bool = False

    @property
    def has_one_queue(self) -> bool:
        return self.queues == 1

    @property
    def filled(self) -> Filled:
        return Filled.EVERY_OTHER_4K if self.half else Filled.WHOLLY

    def missing(self, tools: Tools) -> str | None:
        # Asked of every program, before anything is timed.
        if not tools.has_zero_copy() and self.zero_copy:
            return "this vhdx-ublk has no --zero-copy"
        return None

    def create(self, tools: Tools, file: Path, shape: Shape) -> None:
        create_vhdx(tools, file, shape)

    def start(self, tools: Tools, file: Path) -> Device:
        copies = ["--zero-copy", "on" if self.zero_copy else "off"] if tools.has_zero_copy() else []
        options = ["--queues", str(self.queues), "--depth", str(DEPTH), *copies]
        path = Path(run([tools.vhdx_ublk, "add", *options, file]).strip())
        # To ask the program itself would be another run of it, in the time of `add`.
        entry = json.loads((ENTRIES / path.name.removeprefix("ublkb")).with_suffix(".json").read_text())
        return Device(path, file, entry["daemon"]["pid"], tools.vhdx_ublk)

    def stop(self, tools: Tools, device: Device) -> None:
        run([tools.vhdx_ublk, "del", device.path], 120)


@dataclass(frozen=True)
class Old(Ours):
    """Another vhdx-ublk, which ours is compared with."""

    def missing(self, tools: Tools) -> str | None:
        return super().missing(old(tools))

    def create(self, tools: Tools, file: Path, shape: Shape) -> None:
        super().create(old(tools), file, shape)

    def start(self, tools: Tools, file: Path) -> Device:
        return super().start(old(tools), file)

    def stop(self, tools: Tools, device: Device) -> None:
        super().stop(old(tools), device)


def old(tools: Tools) -> Tools:
    assert tools.old, "the old program is measured where one was given"
    return replace(tools, vhdx_ublk=tools.old)


@dataclass(frozen=True)
class Chain(Ours):
    """vhdx-ublk on a child: a request passes through `depth` images, the last of which has all content.

    Where that is the child itself, it has an empty parent all the same.
    """

    depth: int = 1

    def parent(self, file: Path, number: int) -> Path:
        return file.with_name(f"{file.name}.parent-{number}")

    def create(self, tools: Tools, file: Path, shape: Shape) -> None:
        create_vhdx(tools, self.parent(file, 0), shape)
        if self.depth == 1:
            create_child(tools, file, self.parent(file, 0))

    def start(self, tools: Tools, file: Path) -> Device:
        """Until the content is there, the image that it belongs in is served."""
        served = super().start(tools, file if file.exists() else self.parent(file, 0))
        return replace(served, file=file)

    def settle(self, tools: Tools, device: Device) -> Device:
        if self.depth == 1:
            return device
        self.stop(tools, device)
        for number in range(1, self.depth - 1):
            create_child(tools, self.parent(device.file, number), self.parent(device.file, number - 1))
        create_child(tools, device.file, self.parent(device.file, self.depth - 2))
        return self.attach(tools, device.file)

    def remove(self, file: Path) -> None:
        super().remove(file)
        for number in range(self.depth):
            self.parent(file, number).unlink(missing_ok=True)


@dataclass(frozen=True)
class Rublk(System):
    """rublk's loop target on a raw file: a ublk server in Rust that has nothing to look up."""

    queues: int = 1
    zero_copy: bool = False

    @property
    def has_one_queue(self) -> bool:
        return self.queues == 1

    def create(self, tools: Tools, file: Path, shape: Shape) -> None:
        create_raw(file, shape)

    def start(self, tools: Tools, file: Path) -> Device:
        # Direct I/O is its default; without a sector size it would take the file system's block.
        options = ["--queue", str(self.queues), "--depth", str(DEPTH), "--io-buf-size", str(BUFFER_BYTES)]
        options += ["--logical-block-size", str(SECTOR_BYTES)]
        options += ["--physical-block-size", str(PHYSICAL_SECTOR_BYTES)]
        options += ["--zero-copy"] if self.zero_copy else []
        said = self.add(tools, file, options)
        number = re.search(r"dev id (\d+)", said)
        pid = re.search(r"daemon pid (\d+)", said)
        if not number or not pid:
            raise CommandError(f"rublk add: no device in its answer: {said.strip()}")
        return Device(Path(f"/dev/ublkb{number[1]}"), file, int(pid[1]))

    def add(self, tools: Tools, file: Path, options: list[str]) -> str:
        """On a kernel with one CPU it panics at times, and works when the command is repeated."""
        for left in reversed(range(ATTEMPTS)):
            try:
                return run([tools.rublk, "add", "loop", "--file", file, *options])
            except CommandError:
                if not left:
                    raise
                time.sleep(1)
        raise AssertionError("the last attempt returns or raises")

    def stop(self, tools: Tools, device: Device) -> None:
        try:
            run([tools.rublk, "del", "--number", device.path.name.removeprefix("ublkb")], 120)
        except CommandError:
            # It panics at times when it has done its work.
            wait_until(lambda: not device.sysfs.exists(), "rublk's device has gone")
        wait_until(lambda: not Path(f"/proc/{device.pid}").exists(), "rublk's daemon has ended")


@dataclass(frozen=True)
class KernelLoop(System):
    """The kernel's loop device on a raw file."""

    def create(self, tools: Tools, file: Path, shape: Shape) -> None:
        create_raw(file, shape)

    def start(self, tools: Tools, file: Path) -> Device:
        options = ["--direct-io=on", "--sector-size", str(SECTOR_BYTES)]
        device = Device(Path(run(["losetup", "--find", "--show", *options, file]).strip()), file, None)
        if (device.sysfs / "loop/dio").read_text().strip() != "1":
            self.stop(tools, device)
            raise CommandError("the kernel's loop device refuses direct I/O here")
        return device

    def stop(self, tools: Tools, device: Device) -> None:
        run(["losetup", "--detach", device.path])
        backing = device.sysfs / "loop/backing_file"
        wait_until(lambda: not backing.exists(), "the loop device has let go of its file")


@dataclass(frozen=True)
class QemuNbd(System):
    """qemu-nbd on a dynamic image, through the kernel's NBD client."""

    aio: str = "native"

    def create(self, tools: Tools, file: Path, shape: Shape) -> None:
        create_vhdx(tools, file, shape)

    def start(self, tools: Tools, file: Path) -> Device:
        path = free_nbd()
        pid_file = file.with_suffix(".pid")
        options = ["--format=vhdx", "--cache=none", f"--aio={self.aio}", f"--pid-file={pid_file}"]
        run(["qemu-nbd", f"--connect={path}", *options, file])
        size = Path("/sys/block") / path.name / "size"
        wait_until(lambda: pid_file.exists() and size.read_text().strip() != "0", "qemu-nbd serves the file")
        pid = int(pid_file.read_text())
        pid_file.unlink()
        return Device(path, file, pid)

    def stop(self, tools: Tools, device: Device) -> None:
        run(["qemu-nbd", "--disconnect", device.path], 120)
        wait_until(lambda: not Path(f"/proc/{device.pid}").exists(), "qemu-nbd has ended", 120)


def free_nbd() -> Path:
    """The first NBD device that is not served."""
    if not Path("/sys/block/nbd0").exists():
        run(["modprobe", "nbd"])
    for number in range(16):
        block = Path(f"/sys/block/nbd{number}")
        if block.exists() and not (block / "pid").exists():
            return Path("/dev") / block.name
    raise CommandError("every NBD device is in use")


OURS = Ours("ours")
OURS_ZC = Ours("ours zc", zero_copy=True)
OLD = Old("old")
RUBLK = Rublk("rublk")
RUBLK_ZC = Rublk("rublk zc", zero_copy=True)
LOOP = KernelLoop("kernel loop")
QEMU_NATIVE = QemuNbd("qemu-nbd native", aio="native")
QEMU_URING = QemuNbd("qemu-nbd io_uring", aio="io_uring")
OURS_2Q = Ours("ours 2q", queues=2)
RUBLK_2Q = Rublk("rublk 2q", queues=2)
OURS_1G = Ours("ours 1 GiB")
OURS_100G = Ours("ours 100 GiB")
OURS_10T = Ours("ours 10 TiB")
CHAIN_1 = Chain("ours chain 1")
CHAIN_2 = Chain("ours chain 2", depth=2)
CHAIN_5 = Chain("ours chain 5", depth=5)
CHAIN_16 = Chain("ours chain 16", depth=16)
OURS_HALF = Ours("ours half", half=True)
CHILD_HALF = Chain("ours child half", half=True)
GROWTH = (OURS_1G, OURS_100G, OURS_10T)
CHAINS = (CHAIN_1, CHAIN_2, CHAIN_5, CHAIN_16, OURS_HALF, CHILD_HALF)
QEMU = (QEMU_NATIVE, QEMU_URING)
COPYING = (OURS, OLD, RUBLK, LOOP, *QEMU)
COMPARED = (OURS, OLD)
ALL = (OURS, OURS_ZC, RUBLK, RUBLK_ZC, LOOP, *QEMU, OURS_2Q, RUBLK_2Q, *GROWTH, *CHAINS)
