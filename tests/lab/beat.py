"""beat.py DEVICE STOP: writes 4 KiB past the cache every 50 ms until the file STOP is there.

Prints the longest time that a write took, ms.
"""

import mmap
import os
import sys
import time

fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
block = mmap.mmap(-1, 4096)
longest = 0.0
while not os.path.exists(sys.argv[2]):
    began = time.monotonic()
    os.pwrite(fd, block, 4096 * (int(began * 20) % 4096))
    os.fsync(fd)
    longest = max(longest, time.monotonic() - began)
    time.sleep(0.05)
print(int(longest * 1000))
