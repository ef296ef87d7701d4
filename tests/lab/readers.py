"""Where the independent readers read otherwise than the format says: why digest.py asks them as it does.

readers.py VHDX_UBLK FOLDER

Makes the smallest images that show it in FOLDER, with the content that the format's words give each of them beside it:
NAME.vhdx, which reads as NAME.raw. A line for each limit of a reader; one that is gone is said to be, and no failure.
"""

import struct
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pyvhdi
from dissect.hypervisor.disk.vhdx import VHDX

from digest import in_whole_bytes

MIB = 1 << 20
SECTOR = 512
BLOCK_SECTORS = MIB // SECTOR
# Where `create` puts the BAT of a small image with blocks of 1 MiB, where its file ends, and the slot of the first
# chunk's sector bitmap.
BAT, END, BITMAP_SLOT = 3 * MIB, 4 * MIB, 4096
ZERO, PRESENT, PARTIAL = 2, 6, 7


def create(tool: str, path: Path, *options: str) -> Path:
    subprocess.run([tool, "create", path, *options], check=True, timeout=60)
    assert path.stat().st_size == END, "the layout is the one these images are made for"
    return path


def lay_out(path: Path, slots: dict[int, int], pieces: list[bytes]) -> None:
    """Sets BAT entries, and appends pieces of a MiB each."""
    with path.open("r+b") as file:
        for slot, entry in slots.items():
            file.seek(BAT + 8 * slot)
            file.write(struct.pack("<Q", entry))
        file.seek(END)
        for piece in pieces:
            assert len(piece) == MIB
            file.write(piece)


def sectors(content: Iterable[bytes]) -> bytes:
    return b"".join(letter * SECTOR for letter in content)


def bitmap(has: Callable[[int], bool]) -> bytes:
    """A sector bitmap whose first block is here as far as `has` says."""
    bits = bytearray(MIB)
    for sector in filter(has, range(BLOCK_SECTORS)):
        bits[sector // 8] |= 1 << sector % 8
    return bytes(bits)


def by_dissect(path: Path, offset: int, length: int) -> bytes:
    disk = VHDX(path)
    disk.seek(offset)
    return disk.read(length)


def by_helped_dissect(path: Path, offset: int, length: int) -> bytes:
    own = VHDX.read_sectors
    VHDX.read_sectors = in_whole_bytes(own)
    try:
        return by_dissect(path, offset, length)
    finally:
        VHDX.read_sectors = own


def by_libvhdi(path: Path, parent: Path, length: int) -> bytes:
    """At once, and sector by sector, which is the same."""
    layers = [pyvhdi.file(), pyvhdi.file()]
    for layer, file in zip(layers, (path, parent), strict=True):
        layer.open(str(file))
    layers[0].set_parent(layers[1])
    found = layers[0].read_buffer_at_offset(length, 0)
    by_sector = (layers[0].read_buffer_at_offset(SECTOR, at) for at in range(0, length, SECTOR))
    assert found == b"".join(by_sector), "the length of a read does not matter"
    return found


def difference(found: bytes, expected: bytes) -> str | None:
    """What is read instead, where it differs first."""
    if found == expected:
        return None
    if len(found) != len(expected):
        return f"{len(found)} bytes instead of {len(expected)}"
    equal = next(at for at, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other)
    return f"{found[equal : equal + 1]!r} instead of {expected[equal : equal + 1]!r} from byte {equal} on"


def report(reader: str, what: str, found: bytes, expected: bytes) -> None:
    limit = difference(found, expected)
    print(f"{reader}: {what}: {f'reads {limit}' if limit else 'reads right now, and needs no help'}")


def crossing(tool: str, folder: Path) -> None:
    """Two blocks that lie in the file in the other order, and a read from within the first into the second. Behind the
    first lies space that no block names."""
    path = create(tool, folder / "crossing.vhdx", "--size", "2M", "--block-size", "1M")
    lay_out(path, {0: (END + MIB) | PRESENT, 1: END | PRESENT}, [b"B" * MIB, b"A" * MIB, b"?" * MIB])
    expected = b"A" * MIB + b"B" * MIB
    path.with_suffix(".raw").write_bytes(expected)
    part = slice(MIB // 2, MIB + MIB // 2)
    assert by_dissect(path, 0, 2 * MIB) == expected, "block by block it reads right"
    found = by_dissect(path, part.start, part.stop - part.start)
    report("dissect", "a read that begins within a block and continues in the next", found, expected[part])
    assert by_helped_dissect(path, part.start, part.stop - part.start) == expected[part], "digest.py helps it"


def full_parent(tool: str, folder: Path) -> Path:
    parent = folder / "full.vhdx"
    if parent.exists():
        return parent
    create(tool, parent, "--size", "1M", "--block-size", "1M")
    lay_out(parent, {0: END | PRESENT}, [b"A" * MIB])
    return parent


def no_bitmap(tool: str, folder: Path) -> None:
    """A child that has nothing, and so no sector bitmap either: the reader takes the file's first MiB for it."""
    parent = full_parent(tool, folder)
    child = create(tool, folder / "no-bitmap.vhdx", "--parent", str(parent), "--block-size", "1M")
    child.with_suffix(".raw").write_bytes(b"A" * MIB)
    found = by_libvhdi(child, parent, MIB)
    report("libvhdi", "a chunk without a sector bitmap", found, b"A" * MIB)
    bits = child.read_bytes()[: BLOCK_SECTORS // 8]
    wrong = bitmap(lambda sector: found[sector * SECTOR : (sector + 1) * SECTOR] != b"A" * SECTOR)
    assert wrong[: len(bits)] in (bits, bytes(len(bits))), "it is wrong where the file's first bits are set"
    with_bitmap = create(tool, folder / "empty-bitmap.vhdx", "--parent", str(parent), "--block-size", "1M")
    lay_out(with_bitmap, {BITMAP_SLOT: END | PRESENT}, [bytes(MIB)])
    assert by_libvhdi(with_bitmap, parent, MIB) == b"A" * MIB, "with an empty one it reads right"


def zero(tool: str, folder: Path) -> None:
    """A block of zeros over a full parent."""
    parent = full_parent(tool, folder)
    child = create(tool, folder / "zero.vhdx", "--parent", str(parent), "--block-size", "1M")
    lay_out(child, {0: ZERO, BITMAP_SLOT: END | PRESENT}, [bytes(MIB)])
    child.with_suffix(".raw").write_bytes(bytes(MIB))
    assert by_dissect(child, 0, MIB) == bytes(MIB), "the other reader reads zeros"
    report("libvhdi", "a block of zeros over a parent's content", by_libvhdi(child, parent, MIB), bytes(MIB))


def partly(tool: str, folder: Path) -> None:
    """Two children one upon the other, each with a part of the same block; runs begin within a byte of the bitmap."""
    layers = [full_parent(tool, folder)]
    owners = {b"B": lambda sector: sector % 2 == 0, b"C": lambda sector: sector % 8 < 3}
    for letter, has in owners.items():
        path = folder / f"partly-{letter.decode()}.vhdx"
        layers.append(create(tool, path, "--parent", str(layers[-1]), "--block-size", "1M"))
        entries = {0: (END + MIB) | PARTIAL, BITMAP_SLOT: END | PRESENT}
        lay_out(path, entries, [bitmap(has), letter * MIB])
    of_middle = [b"B" if owners[b"B"](sector) else b"A" for sector in range(BLOCK_SECTORS)]
    of_leaf = [b"C" if owners[b"C"](sector) else below for sector, below in enumerate(of_middle)]
    middle, leaf = sectors(of_middle), sectors(of_leaf)
    for path, expected in zip(layers[1:], (middle, leaf), strict=True):
        path.with_suffix(".raw").write_bytes(expected)
    assert by_dissect(layers[1], 0, MIB) == middle, "one partial layer alone it reads right"
    found = by_dissect(layers[2], 0, MIB)
    report("dissect", "a block that two layers have in part", found, leaf)
    assert by_helped_dissect(layers[2], 0, MIB) == leaf, "digest.py helps it"


def main() -> None:
    tool, folder = sys.argv[1], Path(sys.argv[2])
    for make in (crossing, partly, no_bitmap, zero):
        make(tool, folder)


if __name__ == "__main__":
    main()
