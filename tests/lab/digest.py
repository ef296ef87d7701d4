"""The SHA-256 of parts of a virtual disk as independent readers see them, one line for each reader.

digest.py 'START:COUNT ...' LEAF PARENT...

Parts in MiB; parents in order, the leaf's first. readers.py shows where these readers read otherwise than the format
says. dissect is helped; libvhdi is not: it is wrong where a chunk has no sector bitmap, and about zeros over a parent.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pyvhdi
from dissect.hypervisor.disk.vhdx import VHDX

MIB = 1 << 20
Reader = Callable[[VHDX, int, int], bytes]


def places(windows: str, step: int) -> Iterator[int]:
    for window in windows.split():
        start, count = map(int, window.split(":"))
        yield from range(start * MIB, (start + count) * MIB, step)


def in_whole_bytes(read_sectors: Reader) -> Reader:
    """dissect's reading, of one block at a time and of whole bytes of its sector bitmap: from the middle of either it
    errs, and there a layer's runs begin and end for the layer below."""

    def read(disk: VHDX, sector: int, count: int) -> bytes:
        found = bytearray()
        at, end = sector - sector % 8, sector + count
        while at < end:
            block_end = at - at % disk._sectors_per_block + disk._sectors_per_block
            until = min(-(-end // 8) * 8, block_end)
            found += read_sectors(disk, at, until - at)
            at = until
        start = sector % 8 * disk.sector_size
        return bytes(found[start : start + count * disk.sector_size])

    return read


def by_libvhdi(windows: str, paths: list[str]) -> str:
    layers = []
    for path in paths:
        layer = pyvhdi.file()
        layer.open(path)
        layers.append(layer)
    for child, parent in pairwise(layers):
        child.set_parent(parent)
    digest = hashlib.sha256()
    for offset in places(windows, MIB):
        digest.update(layers[0].read_buffer_at_offset(MIB, offset))
    return digest.hexdigest()


def by_dissect(windows: str, paths: list[str]) -> str:
    # It finds the parents itself, by their relative paths.
    disk, digest = VHDX(Path(paths[0])), hashlib.sha256()
    for offset in places(windows, MIB):
        disk.seek(offset)
        digest.update(disk.read(MIB))
    return digest.hexdigest()


def main() -> None:
    VHDX.read_sectors = in_whole_bytes(VHDX.read_sectors)
    for name, reader in (("libvhdi", by_libvhdi), ("dissect", by_dissect)):
        try:
            print(name, reader(sys.argv[1], sys.argv[2:]))
        except Exception as error:  # a reader's own bug is its own finding
            print(name, f"failed: {error!r}")


if __name__ == "__main__":
    main()
