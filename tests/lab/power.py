"""Power cuts below a file system: a workload that knows what must survive, the replay of what dm-log-writes
recorded, and the judge.

  power.py work FOLDER DEVICE JOURNAL   files written, synced and removed in FOLDER; each event goes to JOURNAL
                                        and, under its number, as a mark into the log of DEVICE
  power.py points LOG COUNT             at most COUNT moments at which the power may be cut, one per line:
                                        entries of the log until then, and the last mark among them. Half
                                        of them follow a flush, half a mark at once: what was acknowledged
                                        just now has no later flush to hide behind
  power.py replay LOG TARGET FROM TO    writes the log's entries FROM up to TO, without TO, to TARGET
  power.py verify FOLDER JOURNAL MARK   whether everything synced by then is in FOLDER

The log of dm-log-writes: a superblock, then entries of one sector each, every entry followed by its data.
Writes are in it in the order in which they became durable: at a flush those that had completed when it was
issued, and behind them the flush.
"""

import hashlib
import os
import random
import struct
import subprocess
import sys

SUPER = struct.Struct("<QQQI")
MAGIC = 0x6A736677736872
ENTRY = struct.Struct("<QQQQ")
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8

ROUNDS = 60
SIZES = [1, 4096, 10_000, 300_000, 1_200_000]
# The file that is overwritten in place: records that each hold its version.
HOT_RECORDS, HOT_RECORD_BYTES = 64, 4096


class Work:
    """Does something to a folder, and says so once it is durable."""

    def __init__(self, folder, device, journal):
        self.folder, self.device = folder, device
        self.journal = open(journal, "w", encoding="ascii")
        self.number = 0
        self.random = random.Random(7)
        self.alive = []

    def happened(self, *words):
        self.number += 1
        print(self.number, *words, file=self.journal, flush=True)
        subprocess.run(["dmsetup", "message", self.device, "0", "mark", str(self.number)], check=True)

    def write(self, name, synced):
        content = self.random.randbytes(self.random.choice(SIZES))
        file = os.open(os.path.join(self.folder, name), os.O_WRONLY | os.O_CREAT, 0o644)
        written = 0
        while written < len(content):
            written += os.write(file, content[written:])
        if synced:
            os.fsync(file)
            folder = os.open(self.folder, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
            self.happened("wrote", name, hashlib.sha256(content).hexdigest())
            self.alive.append(name)
        os.close(file)

    def remove(self):
        name = self.alive.pop(self.random.randrange(len(self.alive)))
        self.happened("removes", name)
        os.unlink(os.path.join(self.folder, name))

    def overwrite(self, version):
        self.happened("overwrites", version)
        file = os.open(os.path.join(self.folder, "hot"), os.O_WRONLY | os.O_CREAT, 0o644)
        for record in range(HOT_RECORDS):
            os.pwrite(file, hot_record(version), record * HOT_RECORD_BYTES)
        os.fdatasync(file)
        os.close(file)
        self.happened("overwrote", version)

    def run(self):
        self.overwrite(0)
        for round_number in range(1, ROUNDS + 1):
            self.write(f"file{round_number}", synced=True)
            if round_number % 3 == 0:
                self.overwrite(round_number // 3)
            if round_number % 4 == 0:
                self.write(f"unsynced{round_number}", synced=False)
            if len(self.alive) > 12:
                self.remove()


def hot_record(version):
    return struct.pack("<Q", version) * (HOT_RECORD_BYTES // 8)


def entries(log):
    """Position of its data, sector, sectors, flags and mark of each entry, and the sector's bytes."""
    magic, version, count, sector_bytes = SUPER.unpack(log.read(SUPER.size))
    if (magic, version) != (MAGIC, 1):
        sys.exit("this is no log of dm-log-writes")
    at = sector_bytes
    for _ in range(count):
        log.seek(at)
        head = log.read(sector_bytes)
        sector, sectors, flags, length = ENTRY.unpack_from(head)
        mark = head[ENTRY.size : ENTRY.size + length].decode("ascii") if flags & MARK else None
        at += sector_bytes
        yield at, sector, sectors, flags, mark, sector_bytes
        if not flags & DISCARD:
            at += sectors * sector_bytes


def points(log_name, wanted):
    flushes, marks, last_mark = [], [], 0
    with open(log_name, "rb") as log:
        for index, (_, _, _, flags, mark, _) in enumerate(entries(log)):
            if mark is not None and mark.isdigit():
                last_mark = int(mark)
                marks.append((index + 1, last_mark))
            elif flags & (FLUSH | FUA) and last_mark > 0:
                flushes.append((index + 1, last_mark))
    kept = sorted(evenly(flushes, wanted // 2) + evenly(marks, wanted // 2))
    print(f"{len(kept)} of {len(flushes) + len(marks)} moments", file=sys.stderr)
    for index, mark in kept:
        print(index, mark)


def evenly(found, wanted):
    if len(found) <= wanted:
        return found
    return [found[number * (len(found) - 1) // (wanted - 1)] for number in range(wanted)]


def replay(log_name, target_name, start, end):
    with open(log_name, "rb") as log, open(target_name, "r+b") as target:
        for index, (at, sector, sectors, flags, mark, sector_bytes) in enumerate(entries(log)):
            if index >= end:
                break
            if index < start or mark is not None or sectors == 0:
                continue
            target.seek(sector * sector_bytes)
            if flags & DISCARD:
                target.write(bytes(sectors * sector_bytes))
            else:
                log.seek(at)
                target.write(log.read(sectors * sector_bytes))


def verify(folder, journal, last_mark):
    expected, versions = {}, set()
    with open(journal, encoding="ascii") as lines:
        for number, event, *words in map(str.split, lines):
            if int(number) > last_mark:
                break
            if event == "wrote":
                expected[words[0]] = words[1]
            elif event == "removes":
                del expected[words[0]]
            elif event == "overwrites":
                versions.add(int(words[0]))
            elif event == "overwrote":
                versions = {int(words[0])}
    for name, digest in expected.items():
        with open(os.path.join(folder, name), "rb") as file:
            if hashlib.sha256(file.read()).hexdigest() != digest:
                sys.exit(f"{name} was synced before mark {last_mark} and has other content")
    if last_mark >= 2:  # the first version has been written
        verify_hot(os.path.join(folder, "hot"), versions)
    print(len(expected))


def verify_hot(name, versions):
    with open(name, "rb") as file:
        content = file.read()
    records = [content[at : at + HOT_RECORD_BYTES] for at in range(0, len(content), HOT_RECORD_BYTES)]
    legal = {hot_record(version) for version in versions}
    if len(records) != HOT_RECORDS or not all(record in legal for record in records):
        sys.exit(f"a record of {name} is of no version among {sorted(versions)}")


def main():
    command, *words = sys.argv[1:]
    if command == "work":
        Work(*words).run()
    elif command == "points":
        points(words[0], int(words[1]))
    elif command == "replay":
        replay(words[0], words[1], int(words[2]), int(words[3]))
    elif command == "verify":
        verify(words[0], words[1], int(words[2]))
    else:
        sys.exit(__doc__)


main()
