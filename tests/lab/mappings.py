"""Whether a mapping that is moved over another one leaves nothing of that in the process.

A page of the moved one that was never touched has to read as zeros, and what is written to it must not reach the page
that was there before.
"""

import ctypes
import mmap
import sys

PAGE, PAGES, ROUNDS = 4096, 16, 8
MARK = 0x1122334455667788
FIRST, SECOND = 0x200000000000, 0x200080000000
STEP = 1 << 32  # no round shares a table with another
MAP_FIXED_NOREPLACE = 0x100000
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2

libc = ctypes.CDLL(None, use_errno=True)
for function in (libc.mmap, libc.mremap):
    function.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]


def words(place):
    """The first word of each page of a new mapping there."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    found = libc.mmap(place, PAGES * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert found == place, f"mmap: errno {ctypes.get_errno()}"
    return [ctypes.c_uint64.from_address(place + page * PAGE) for page in range(PAGES)]


def left_over(number):
    """How many pages are not those that were moved."""
    first, second = FIRST + number * STEP, SECOND + number * STEP
    over = words(first)
    for word in over:
        word.value = MARK
    words(second)[0].value = number
    moved = libc.mremap(second, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, first)
    assert moved == first, f"mremap: errno {ctypes.get_errno()}"
    return sum(word.value != (0 if page else number) for page, word in enumerate(over))


wrong = sum(left_over(number) for number in range(ROUNDS))
if wrong:
    sys.exit(f"{wrong} of {ROUNDS * PAGES} pages are those that were there before")
