"""The file system that holds the images: one for all systems, made anew for the run."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from commands import CommandError, run

MIB = 1 << 20
GIB = 1 << 30
CONFIGURED = Path("/sys/kernel/config/nullb/vhdx-bench")
FAST_DISK_BYTES = 6 * GIB
# The kernel, the daemons' buffers and fio need this beside a disk in memory.
SPARE_MEMORY_BYTES = 2 * GIB
BALLAST_PART = 24


def available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise CommandError("/proc/meminfo does not tell the available memory")


@contextmanager
def memory_disk() -> Iterator[Path]:
    """A disk in the kernel's memory, so that the backing disk is not what is measured."""
    if not CONFIGURED.parent.is_dir():
        try:
            run(["modprobe", "null_blk", "nr_devices=0"])
        except CommandError as error:
            raise CommandError(f"this kernel has no null_blk for --fast-disk ({error})") from error
    size = min(FAST_DISK_BYTES, available_memory() - SPARE_MEMORY_BYTES)
    if size < GIB:
        raise CommandError("too little memory for --fast-disk (VHDX_LAB_MEM)")
    CONFIGURED.mkdir()
    try:
        settings = {"size": size // MIB, "memory_backed": 1, "blocksize": 512, "discard": 1, "queue_mode": 2}
        for name, value in settings.items():
            (CONFIGURED / name).write_text(str(value))
        (CONFIGURED / "power").write_text("1")
        disk = Path("/dev") / CONFIGURED.name
        if not disk.exists():  # before Linux 5.20 it had a number, not its folder's name
            disk = Path("/dev") / f"nullb{(CONFIGURED / 'index').read_text().strip()}"
        set_no_scheduler(disk)
        yield disk
    finally:
        (CONFIGURED / "power").write_text("0")
        CONFIGURED.rmdir()


@contextmanager
def laboratory_disk() -> Iterator[Path]:
    disks = os.environ.get("VHDX_LAB_DISKS", "").split()
    if not disks:
        raise CommandError("no disk: give the laboratory one with --disk")
    yield Path(disks[0])


@contextmanager
def mounted(disk: Path, file_system: str) -> Iterator[Path]:
    """A new file system on `disk`, mounted on a folder that goes away with it."""
    make = {
        "ext4": ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"],
        "xfs": ["mkfs.xfs", "-q", "-f"],
    }
    run([*make[file_system], disk], 300)
    folder = Path(tempfile.mkdtemp(prefix="vhdx-ublk-bench."))
    try:
        run(["mount", "-t", file_system, disk, folder])
        try:
            # What is written first on an empty file system lies in smaller pieces than what comes after it.
            run(["fallocate", "--length", str(free_bytes(folder) // BALLAST_PART), folder / "ballast"])
            yield folder
        finally:
            run(["umount", folder], 300)
    finally:
        folder.rmdir()


def set_no_scheduler(device: Path) -> None:
    """A scheduler would reorder and merge what the systems are given."""
    Path(f"/sys/block/{device.name}/queue/scheduler").write_text("none")


def free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
