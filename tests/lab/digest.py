"""The SHA-256 of parts of a virtual disk as independent readers see them, one line for each reader.

digest.py 'START:COUNT ...' LEAF PARENT...

Parts in MiB; parents in order, the leaf's first. libvhdi is asked sector by sector: it answers longer reads through
absent blocks with zeros.
"""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pyvhdi
from dissect.hypervisor.disk.vhdx import VHDX

MIB = 1 << 20


def places(windows: str, step: int) -> Iterator[int]:
    for window in windows.split():
        start, count = map(int, window.split(":"))
        yield from range(start * MIB, (start + count) * MIB, step)


def by_libvhdi(windows: str, paths: list[str]) -> str:
    layers = []
    for path in paths:
        layer = pyvhdi.file()
        layer.open(path)
        layers.append(layer)
    for child, parent in zip(layers, layers[1:]):
        child.set_parent(parent)
    digest = hashlib.sha256()
    for offset in places(windows, 512):
        digest.update(layers[0].read_buffer_at_offset(512, offset))
    return digest.hexdigest()


def by_dissect(windows: str, paths: list[str]) -> str:
    # It finds the parents itself, by their relative paths.
    disk, digest = VHDX(Path(paths[0])), hashlib.sha256()
    for offset in places(windows, MIB):
        disk.seek(offset)
        digest.update(disk.read(MIB))
    return digest.hexdigest()


def main() -> None:
    for name, reader in (("libvhdi", by_libvhdi), ("dissect", by_dissect)):
        try:
            print(name, reader(sys.argv[1], sys.argv[2:]))
        except Exception as error:  # a reader's own bug is its own finding
            print(name, f"failed: {error!r}")


if __name__ == "__main__":
    main()
