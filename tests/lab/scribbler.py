#!/usr/bin/python3
"""Changes a block device at random and a file with the same content in the same way.

scribbler.py DEVICE MODEL SEED COUNT

Writes of 512 bytes to 1 MiB, zeros and discards, near each other and far apart. A discarded sector may keep its
content or read as zeros, and nothing else: what it reads as is what the model holds from then on.
"""

import array
import fcntl
import os
import random
import struct
import sys

BLKDISCARD, BLKZEROOUT, BLKFLSBUF, BLKSSZGET = 0x1277, 0x127F, 0x1261, 0x1268
LONGEST = 1 << 20
CHUNK_SECTORS = 8 << 20


def sector_of(device: int) -> int:
    found = array.array("i", [0])
    fcntl.ioctl(device, BLKSSZGET, found)
    return found[0]


def places(size: int, sector: int) -> list[int]:
    """Where something may go wrong: both ends, the middle, and either side of a chunk's end."""
    border = CHUNK_SECTORS * sector
    return [place for place in (0, size // 2, border, size) if place <= size]


def span(source: random.Random, size: int, sector: int) -> tuple[int, int]:
    near = source.choice(places(size, sector)) + source.randint(-4 * LONGEST, 4 * LONGEST)
    offset = min(max(near, 0), size - sector) // sector * sector
    length = source.choice((sector, 4096, 65536, source.randint(1, LONGEST)))
    length = max(length // sector * sector, sector)
    return offset, min(length, size - offset)


def forget(device: int) -> None:
    """What is read next comes from the device."""
    os.fsync(device)
    fcntl.ioctl(device, BLKFLSBUF, 0)


def discard(device: int, model: int, offset: int, length: int, sector: int) -> None:
    before = os.pread(model, length, offset)
    forget(device)
    fcntl.ioctl(device, BLKDISCARD, struct.pack("QQ", offset, length))
    forget(device)
    after = os.pread(device, length, offset)
    for start in range(0, length, sector):
        found = after[start : start + sector]
        if found != before[start : start + sector] and any(found):
            sys.exit(f"after a discard the sector at {offset + start} holds what was never there")
    os.pwrite(model, after, offset)


def main() -> None:
    device, model = os.open(sys.argv[1], os.O_RDWR), os.open(sys.argv[2], os.O_RDWR)
    source = random.Random(int(sys.argv[3]))
    size, sector = os.lseek(device, 0, os.SEEK_END), sector_of(device)
    for _ in range(int(sys.argv[4])):
        offset, length = span(source, size, sector)
        kind = source.random()
        if kind < 0.1:
            discard(device, model, offset, length, sector)
            continue
        content = bytes(length) if kind < 0.3 else source.randbytes(length)
        if kind < 0.3:
            forget(device)
            fcntl.ioctl(device, BLKZEROOUT, struct.pack("QQ", offset, length))
        else:
            os.pwrite(device, content, offset)
        os.pwrite(model, content, offset)
    forget(device)


if __name__ == "__main__":
    main()
